"""One training run: its options, output folder and processes, before data and model are loaded."""

from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

from ..common.errors import InputError
from ..common.run_folder import RunFolder
from ..data.augmentation import Augmentation
from ..data.feature_store import FeatureStore
from ..data.skipped_rows import SkippedRows
from ..processing_qformer import QFormerCaptionerProcessor, QFormerPretrainingProcessor
from .arguments import DataArguments, ModelArguments, RunArguments, unread_options
from .checks import check_options, draws_scenes
from .training_arguments import QFormerTrainingArguments


@dataclass
class TrainingRun:
    """Options and state that the steps of a training run share.

    Args:
        model_args, data_args, run_args, training_args: the options.
        changed_options: options whose values are not the defaults, for the model card.
        folder: the output folder, which belongs to this run once [`~TrainingRun.claim_folder`] is called.
        checkpoint: checkpoint to resume from, `None` for a new run.
        features: precomputed image features to train on, `None` for images.
        augmentation: augmentation of the training rows.
        skipped_rows: record of the rows that cannot be used.
    """

    model_args: ModelArguments
    data_args: DataArguments
    run_args: RunArguments
    training_args: QFormerTrainingArguments
    changed_options: dict[str, object]
    folder: RunFolder
    checkpoint: str | None
    features: FeatureStore | None
    augmentation: Augmentation
    skipped_rows: SkippedRows = field(default_factory=SkippedRows)

    @property
    def output_dir(self) -> Path:
        """Return the path of the output folder."""
        return self.training_args.output_folder

    @property
    def is_main_process(self) -> bool:
        """Return True in the process that writes files."""
        return self.training_args.process_index == 0

    @property
    def objective(self) -> str:
        """Return what the run trains, one of `OBJECTIVES`."""
        return self.model_args.objective

    @property
    def draws_scenes(self) -> bool:
        """Return True if the run is evaluated on drawn scenes."""
        return draws_scenes(self.data_args)

    @cached_property
    def num_frames(self) -> int:
        """Return the largest number of frames to read of a video: `--num_frames`, or that of an existing captioner."""
        name = self.model_args.model_name_or_path
        if self.model_args.num_frames is not None or name is None:
            return self.model_args.num_frames or 1
        processor_class = QFormerPretrainingProcessor if self.objective == "pretrain" else QFormerCaptionerProcessor
        try:
            processor = processor_class.from_folder_if_any(name)
        except ValueError:  # of another kind of model, which `build_model` refuses
            return 1
        return 1 if processor is None else processor.num_frames

    @property
    def length(self) -> list[float]:
        """Return the length that the options ask for: epochs, and steps (-1 if the epochs decide)."""
        return [self.training_args.num_train_epochs, self.training_args.max_steps]

    @property
    def is_finished(self) -> bool:
        """Return True if the output folder already holds this run, at least as long as the options ask for.

        Without `--max_steps` the epochs decide. A run that stopped at `--max_steps` before is then not finished.
        """
        finished = self.folder.finished
        if finished is None:
            return False
        (epochs, steps), (finished_epochs, finished_steps) = self.length, finished["length"]
        return epochs <= finished_epochs and (finished_steps <= 0 or 0 < steps <= finished_steps)

    def wait_for_everyone(self) -> None:
        """Wait until all processes of the run reach this point."""
        self.training_args.distributed_state.wait_for_everyone()

    def claim_folder(self) -> None:
        """Claim the output folder for this run. Nothing is written or deleted before this call."""
        self.wait_for_everyone()  # every process must have read the folder before it changes
        if self.is_main_process:
            self.folder.start()
            self.skipped_rows.write_to(self.output_dir / "skipped_rows.jsonl")
        self.wait_for_everyone()


def resolve(
    model_args: ModelArguments,
    data_args: DataArguments,
    run_args: RunArguments,
    training_args: QFormerTrainingArguments,
    changed_options: dict[str, object],
) -> TrainingRun:
    """Check the options, complete them, and open the output folder and the precomputed features that they name.

    Args:
        model_args, data_args, run_args, training_args: the options.
        changed_options: options whose values are not the defaults.

    Raises:
        InputError: if an option is not valid, options contradict each other, or the output folder holds another run.
    """
    features = None
    if data_args.features is not None:
        features = FeatureStore(data_args.features)
        complete_from_features(features, model_args, data_args)
    if training_args.metric_for_best_model is None and model_args.objective != "pretrain" and draws_scenes(data_args):
        training_args.metric_for_best_model = "facts"
    check_options(model_args, data_args, run_args, training_args, changed_options)
    settings = settings_of_run(model_args, data_args)
    folder = RunFolder(training_args.output_folder, settings, run_args.overwrite_output_dir)
    return TrainingRun(
        model_args=model_args,
        data_args=data_args,
        run_args=run_args,
        training_args=training_args,
        changed_options=changed_options,
        folder=folder,
        checkpoint=training_args.resume_from_checkpoint or folder.last_checkpoint,
        features=features,
        augmentation=Augmentation(
            data_args.random_resized_crop_scale,
            data_args.horizontal_flip_prob,
            data_args.captions_per_image,
            seed=training_args.seed,
            sample_view=True,
        ),
    )


def settings_of_run(model_args: ModelArguments, data_args: DataArguments) -> dict[str, object]:
    """Return what distinguishes two runs: the options of model and data that the objective reads."""
    settings = {**asdict(model_args), **asdict(data_args)}
    unread = unread_options(model_args.objective)
    if model_args.objective == "caption":
        unread.add("objective")  # runs before there were objectives have no record of it
    return {name: value for name, value in settings.items() if name not in unread}


def complete_from_features(store: FeatureStore, model_args: ModelArguments, data_args: DataArguments) -> None:
    """Take the data set and the vision encoder from precomputed features, unless the options name them.

    Raises:
        InputError: if other options need images or a vision encoder, which the features replace.
    """
    if data_args.random_resized_crop_scale is not None or data_args.horizontal_flip_prob:
        raise InputError(
            "--random_resized_crop_scale and --horizontal_flip_prob change images, which --features replaces: give "
            "them to precompute_features.py, together with --views."
        )
    if not model_args.freeze_vision_model or model_args.vision_config is not None:
        raise InputError(
            "--features replaces the vision encoder, which then cannot be trained: leave out --features, or "
            "--freeze_vision_model false and --vision_config."
        )
    if data_args.dataset_name is None:
        for name, value in store.dataset_options.items():  # all but one are lists, with a value for each data set
            setattr(data_args, name, value if name == "split_column" else [value])
    joins_backbones = model_args.language_model_name_or_path is not None or model_args.objective == "pretrain"
    if joins_backbones and model_args.vision_model_name_or_path is None and model_args.model_name_or_path is None:
        model_args.vision_model_name_or_path = store.vision_model_name_or_path
        model_args.vision_model_revision = store.vision_model_revision
