"""The captioning part of `eval_captions.py`: resolve the options of a run, and caption its images."""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME, cached_file
from transformers.utils.hub import extract_commit_hash
from transformers.utils.logging import disable_progress_bar

from ..captioning_qformer import QFormerCaptioningModel
from ..common.errors import InputError
from ..common.logging import get_logger
from ..common.run_folder import RunFolder
from ..data.caption_forms import VizWizRules
from ..data.dataset import CaptionSource
from ..data.feature_store import FeatureStore
from ..data.image_paths import folder_of_images
from ..data.loading import load_rows
from ..data.skipped_rows import SkippedRows
from ..data.splits import default_eval_split
from ..hub.load import load_captioner
from ..saving_qformer import QFormerPreTrainedModel
from .arguments import CaptioningArguments, DataSetArguments
from .benchmarks import BENCHMARKS, Benchmark, EvaluationSet, get_benchmark, load_benchmark, load_evaluation_set
from .caption_files import ImageId
from .inference import caption_images
from .scoring import FaultyImage

logger = get_logger(__name__)

DataSetOptions = TypeVar("DataSetOptions", bound=DataSetArguments)
DEFAULT_GENERATION: dict[str, int | float] = {"num_beams": 5, "max_new_tokens": 30}
# Options that do not change the captions. A run can continue with other values of them.
UNRELATED_OPTIONS = ("output_dir", "overwrite_output_dir", "num_workers", "use_cpu")


@dataclass(frozen=True)
class CaptioningRun:
    """Captioner, images and decoding of a run, resolved from its options.

    Args:
        args: the options.
        benchmark: the benchmark, or `None` for the user's own data.
        state: the processes of the run.
        model: the captioner, on the device of this process.
        weights: version of the captioner's weights in each folder or Hub repository.
        split: the split of the data set.
        whole_split: all images of the split.
        images: the images to caption.
        prompt: text that captions continue; an empty prompt is the captioner's own.
        generation: arguments of `generate`.
        skipped_rows: record of the rows that are not in the data set's splits, such as rejected captions.
    """

    args: CaptioningArguments
    benchmark: Benchmark | None
    state: PartialState
    model: QFormerCaptioningModel
    weights: dict[str, Any]
    split: str
    whole_split: EvaluationSet
    images: EvaluationSet
    prompt: str
    generation: dict[str, int | float]
    skipped_rows: SkippedRows

    @property
    def name(self) -> str:
        """Name of the benchmark or of the data set."""
        return str(self.args.benchmark or self.args.dataset_name)

    @property
    def has_references(self) -> bool:
        """`True` if the references of the images are public, so that the captions can be scored."""
        return self.benchmark is None or not self.benchmark.hidden_references

    def facts(self) -> dict[str, Any]:
        """Return facts that make the captions reproducible, for the file of scores."""
        dataset_name = self.benchmark.dataset_name if self.benchmark is not None else None
        processor = self.model.processor
        return {
            "model": self.args.model,
            "revision": self.args.revision,
            "weights": self.weights,
            "dtype": self.args.dtype,
            "benchmark": self.args.benchmark,
            "dataset": self.args.dataset_name or dataset_name,
            "features": self.args.features,
            "split": self.split,
            "max_samples": self.args.max_samples,
            "prompt": self.prompt or (processor.prompt if processor is not None else ""),
            "images_with_own_prompt": len(self.images.prompts),
            "batch_size": self.args.batch_size,
            "generation": self.generation,
        }

    def note(self, num_captions: int) -> str | None:
        """Return a note that only some images were scored, or `None`.

        Args:
            num_captions: number of images with a caption.
        """
        total = self.whole_split.num_images
        if num_captions == total:
            return None
        kind = "images" if self.images.features is None else "rows"
        return f"Only {num_captions} of {total} {kind} were scored, so this is not a score of {self.name}."


# ----------------------------------------------------------------------------------------------------------------------
# From options to a run
# ----------------------------------------------------------------------------------------------------------------------


def resolve_run(
    args: CaptioningArguments, image_folder: str | None = None, rules: VizWizRules | None = None
) -> CaptioningRun:
    """Start the processes, load the captioner and the images, and choose prompt and decoding.

    Args:
        args: the options.
        image_folder: folder of the images, if it is not the folder of the data set.
        rules: rules for the captions of VizWiz.

    Raises:
        InputError: if the captioner or the data cannot be loaded.
    """
    if args.model is None:
        raise InputError("Say which captioner captions: --model.")
    args, image_folder, store = with_data_set(args, image_folder)
    assert args.model is not None, "it is not an option of the data set"
    benchmark = None if args.benchmark is None else get_benchmark(args.benchmark)
    state = start_processes(args.use_cpu)
    disable_progress_bar()  # for loading weights
    model = load_captioner(args.model, args.revision, args.dtype, state.device)
    if store is not None:
        assert model.processor is not None, "load_captioner checks it"
        store.check_model(model.config, model.processor.image_processor)
    skipped_rows = SkippedRows()
    num_frames = 1 if model.processor is None else model.processor.num_frames
    split, whole_split = load_images(
        args, image_folder, skipped_rows, rules, store, num_frames, prompt_column=args.prompt_column
    )
    return CaptioningRun(
        args=args,
        benchmark=benchmark,
        state=state,
        model=model,
        weights=versions_of_weights(model, args.model, args.revision),
        split=split,
        whole_split=whole_split,
        images=whole_split.first(args.max_samples),
        prompt=resolve_prompt(args, benchmark),
        generation=resolve_generation(args, benchmark),
        skipped_rows=skipped_rows,
    )


def with_data_set(
    args: DataSetOptions, image_folder: str | None
) -> tuple[DataSetOptions, str | None, FeatureStore | None]:
    """Return the options with the data set of precomputed features, its folder of images, and the features.

    Args:
        args: the options.
        image_folder: folder of the images, if the options name it.

    Raises:
        InputError: if the options name neither a benchmark nor a data set nor features, or the features are damaged.
    """
    store = None if args.features is None else FeatureStore(args.features)
    if store is not None and args.dataset_name is None:
        options = store.dataset_options
        image_folder = image_folder or options.pop("image_folder", None)
        args = replace(args, **options)  # type: ignore[arg-type]  # all of them are strings
    if args.benchmark is None and args.dataset_name is None:
        raise InputError(
            f"Say which images to read: --dataset_name, --features, or --benchmark {', '.join(BENCHMARKS)}."
        )
    return args, image_folder, store


def start_processes(use_cpu: bool) -> PartialState:
    """Return the state of the processes, which wait for each other for up to two hours."""
    # accelerate finds every kind of accelerator, but does not choose the CPU automatically.
    cpu = use_cpu or not torch.accelerator.is_available()
    return PartialState(cpu=cpu, timeout=timedelta(hours=2))


def load_images(
    args: DataSetArguments,
    image_folder: str | None,
    skipped: SkippedRows | None = None,
    rules: VizWizRules | None = None,
    store: FeatureStore | None = None,
    num_frames: int = 1,
    prompt_column: str | None = None,
) -> tuple[str, EvaluationSet]:
    """Return the name of the split, and its images and references.

    Args:
        args: the options, which name a benchmark or a data set.
        image_folder: folder of the images, if it is not the folder of the data set.
        skipped: record of the rows that belong to no split, and of rejected captions.
        rules: rules for the captions of VizWiz.
        store: precomputed features to read instead of images.
        num_frames: largest number of frames to read of a video.
        prompt_column: column of prompts, if each image has its own.

    Raises:
        InputError: if the benchmark, the data set, the split or a column does not exist, or a file cannot be read.

    Example:

    ```python
    >>> split, images = load_images(CaptioningArguments(dataset_name="scenes"), None)  # doctest: +SKIP
    ```
    """
    if args.benchmark is not None:
        images = load_benchmark(args.benchmark, args.dataset_name, image_folder, args.allowed_image_folders)
        return get_benchmark(args.benchmark).split, images
    name = str(args.dataset_name)
    splits = load_rows(
        name, args.dataset_config_name, args.split_column, revision=args.dataset_revision, skipped=skipped, rules=rules
    )
    only_split = next(iter(splits)) if len(splits) == 1 else "test"
    available = splits if store is None else [split for split in splits if split in store.layouts]
    split = args.split or default_eval_split(available, prefer_test=True) or only_split
    if split not in splits:
        raise InputError(f"{name!r} has no split {split!r}; choose with --split: {', '.join(map(repr, splits))}.")
    rows = splits[split]
    source = CaptionSource(
        split,
        rows,
        args.image_column,
        args.caption_column,
        args.image_id_column,
        folder_of_images(name, rows, image_folder, args.allowed_image_folders),
        prompt_column=prompt_column,
        num_frames=num_frames,
    )
    features = None if store is None else store.split(split)
    return split, load_evaluation_set(source.with_existing_columns(), features=features)


def resolve_prompt(args: CaptioningArguments, benchmark: Benchmark | None) -> str:
    """Return the prompt of the command line, otherwise that of the benchmark."""
    if args.prompt is not None:
        return args.prompt
    return benchmark.prompt if benchmark is not None else ""


def resolve_generation(args: CaptioningArguments, benchmark: Benchmark | None) -> dict[str, int | float]:
    """Return the arguments of `generate`: those of the benchmark, overridden by the command line."""
    generation = dict(benchmark.generation if benchmark is not None else DEFAULT_GENERATION)
    for name in ("num_beams", "max_new_tokens", "min_new_tokens", "length_penalty"):
        if (value := getattr(args, name)) is not None:
            generation[name] = value
    return generation


def versions_of_weights(model: QFormerPreTrainedModel, name: str, revision: str | None) -> dict[str, Any]:
    """Return the versions of captioner or adapter, the base captioner of an adapter, and backbones kept by reference.

    Args:
        model: a captioner, or a model of stage 1.
        name: folder or Hub id from which it was loaded.
        revision: branch, tag or commit of `name`.
    """
    revisions: dict[str, str | None] = {str(model.name_or_path): None, name: revision}
    for part in model.config.referenced_backbones or []:
        source = getattr(model.config, f"{part}_name_or_path")
        revisions.setdefault(source, getattr(model.config, f"{part}_revision"))
    return {source: version_of(source, revision_of) for source, revision_of in revisions.items()}


def version_of(name: str, revision: str | None) -> str | list | None:
    """Return the commit of a repository, or the sizes and times of the weight and configuration files of a folder.

    Args:
        name: folder or Hub id.
        revision: branch, tag or commit.
    """
    if not Path(name).is_dir():
        file = cached_file(name, ADAPTER_CONFIG_NAME, revision=revision, _raise_exceptions_for_missing_entries=False)
        return extract_commit_hash(file or cached_file(name, CONFIG_NAME, revision=revision), None)
    files = sorted(file for kind in ("*.safetensors", "*.bin", "*config.json") for file in Path(name).glob(kind))
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


# ----------------------------------------------------------------------------------------------------------------------
# From a run to captions
# ----------------------------------------------------------------------------------------------------------------------


def caption_all(run: CaptioningRun) -> tuple[dict[ImageId, str], list[FaultyImage]]:
    """Caption the images of a run, write the progress to its output folder, and end the process group.

    Args:
        run: the run.

    Returns:
        The caption of each image, and the images that have no caption or cannot be read; the same in every process.

    Raises:
        InputError: if the folder holds another run, or no image can be read.
    """
    if run.state.is_main_process:
        folder = Path(run.args.output_dir)
        RunFolder(folder, run_settings(run), run.args.overwrite_output_dir).start()
        if len(run.skipped_rows):
            run.skipped_rows.write_to(folder / "skipped_rows.jsonl")
            logger.info("%d rows could not be used; %s lists them.", len(run.skipped_rows), run.skipped_rows.path)
    run.state.wait_for_everyone()
    captions, unreadable = caption_images(
        run.model,
        run.images,
        run.args.output_dir,
        run.prompt,
        run.args.batch_size,
        run.args.num_workers,
        **run.generation,
    )
    run.state.wait_for_everyone()
    run.state.destroy_process_group()  # from here on only the main process works
    names = run.images.references.files
    faulty = [FaultyImage(image, str(names.get(image, image)), reason) for image, reason in unreadable.items()]
    return captions, [*run.images.skipped, *faulty]


def run_settings(run: CaptioningRun) -> dict[str, Any]:
    """Return the settings that must be the same for a killed run to continue.

    They include the versions of the weights and a hash of the references. After further training, or with other data of
    the same name, the existing captions are not valid.
    """
    settings = {name: value for name, value in asdict(run.args).items() if name not in UNRELATED_OPTIONS}
    references = json.dumps([*run.images.references.captions.items(), *run.images.prompts.items()])
    return {
        **settings,
        "prompt": run.prompt,
        "generation": run.generation,
        "weights": run.weights,
        "references": hashlib.sha256(references.encode()).hexdigest(),
    }
