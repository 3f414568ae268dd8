"""Base of the trainers: what training shares whatever its objective is.

It resumes, averages weights, writes checkpoints and folders that others can load, publishes them, and logs speed and
memory.
"""

import os
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from accelerate.data_loader import DataLoaderShard
from huggingface_hub import HfApi
from torch.utils.data import DataLoader
from transformers import Seq2SeqTrainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, SaveStrategy, TrainOutput, speed_metrics
from transformers.utils import PushInProgress

from ..common.errors import InputError
from ..common.logging import get_logger
from ..common.onednn import has_relu, onednn_linears
from ..common.run_folder import is_complete
from ..data.dataset import CaptionDataset, ShuffledImages
from ..data.streaming import CaptionStream
from ..hub.layout import PICTURES
from ..hub.model_card import write_card
from ..hub.push import open_repository, publish
from ..saving_qformer import QFormerPreTrainedModel
from .callbacks import SetEpochCallback
from .data_setup import TrainingData
from .ema import EMACallback
from .evaluation_files import show_files_of_step
from .lora import without_adapters
from .param_groups import set_learning_rates
from .run_facts import describe_results
from .training_arguments import QFormerTrainingArguments

if TYPE_CHECKING:
    from peft import PeftModel

logger = get_logger(__name__)


class QFormerTrainer(Seq2SeqTrainer):
    """Base of the trainers of models with a Q-Former. A subclass says how to evaluate ([`_evaluate_rows`]).

    **Log.** Each log entry also has images per second and memory in GB. On a GPU this is peak memory, otherwise the
    current memory of the process.

    **Hub.** With `args.push_to_hub`, each save also publishes the model in the background, as one commit. The caller
    publishes the final folder with [`~QFormerTrainer.push_to_hub`].

    Args:
        model: the model.
        args: options of training.
        others, kwargs: as for `transformers.Trainer`.
        include_backbones: frozen backbones to store in the final folder, as in [`~QFormerCaptioner.save_pretrained`].
        facts: facts of the run for the model card, as `run_facts.py` returns them. Without facts no card is written.
    """

    args: QFormerTrainingArguments
    model: "QFormerPreTrainedModel | PeftModel"
    train_dataset: TrainingData
    eval_dataset: CaptionDataset | None
    hub_model_id: str | None  # type: ignore[assignment]
    push_in_progress: PushInProgress | None  # type: ignore[assignment]
    evaluation_stems: tuple[str, ...]  # beginnings of the names of files that an evaluation writes

    def __init__(
        self,
        model: "QFormerPreTrainedModel | PeftModel",
        args: QFormerTrainingArguments,
        *others: Any,
        include_backbones: bool | list[str] | None = None,
        facts: dict | None = None,
        **kwargs: Any,
    ):
        if args.metric_for_best_model is None:
            args.metric_for_best_model = self.default_best_score(model)
        if args.greater_is_better is None:
            args.greater_is_better = not args.metric_for_best_model.endswith("loss")
        super().__init__(model, args, *others, **kwargs)
        self.hub_token, self.args.hub_token = self.args.hub_token, None  # files of the run must not contain the token
        self.include_backbones = include_backbones
        self.facts = facts
        self.last_logged = (time.time(), self.state.global_step)
        self.has_relu = has_relu(self.model)
        if isinstance(self.model, QFormerPreTrainedModel):
            # Weights that the Trainer expects to be missing from a checkpoint
            self.model._keys_to_ignore_on_save = self.model.keys_left_out(include_backbones=False)
        self.add_callback(SetEpochCallback(self.train_dataset))
        self.ema: EMACallback | None = None
        if self.args.ema_decay is not None:
            self.ema = EMACallback(self.model, self.args.ema_decay)
            self.add_callback(self.ema)

    # --- Training -----------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """Return the Trainer's loader, or for a stream a loader that does not distribute the rows again.

        A stream shares its rows among the processes itself. With the Trainer's loader, one process would open the
        images of all processes, or every process would open all images.
        """
        if not isinstance(self.train_dataset, CaptionStream):
            return super().get_train_dataloader()
        workers = self.args.dataloader_num_workers
        return DataLoaderShard(
            self.train_dataset,
            device=self.args.device,
            batch_size=self._train_batch_size,
            collate_fn=self.data_collator,
            num_workers=workers,
            prefetch_factor=self.args.dataloader_prefetch_factor if workers else None,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def part_learning_rates(self) -> Mapping[str, float | None]:
        """Return the learning rates of parts by name; `None` is that of all other parts."""
        return {"vision_model": self.args.vision_model_learning_rate}

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """Return the Trainer's optimizer, with the separate learning rates of parts."""
        optimizer = super().create_optimizer(model)
        set_learning_rates(optimizer, self.model if model is None else model, self.part_learning_rates())
        return optimizer

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train as the Trainer does, and keep the EMA of the weights if there is one."""
        output = super().train(*args, **kwargs)
        if self.ema is not None:
            self.ema.copy_to_model()
        return output

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute the loss and its gradients as the Trainer does, with oneDNN's linear layers in float32 on a CPU."""
        is_recomputed = self.args.gradient_checkpointing or without_adapters(self.model).is_activation_checkpointing
        if is_recomputed:  # recomputed layers would run outside the context
            return super().training_step(*args, **kwargs)
        with onednn_linears(self.args.device, backward_only=self.has_relu):
            return super().training_step(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as the Trainer does, and add speed and memory to the training loss."""
        if "loss" in logs:
            last_time, last_step = self.last_logged
            self.last_logged = now, step = time.time(), self.state.global_step
            images = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
            logs["images_per_second"] = round((step - last_step) * images / (now - last_time), 2)
            has_gpu = torch.cuda.is_available() and not self.args.use_cpu
            memory = torch.cuda.max_memory_allocated() if has_gpu else psutil.Process().memory_info().rss
            logs["memory_gb"] = round(memory / 1e9, 2)
        super().log(logs, start_time)

    # --- Evaluation ---------------------------------------------------------------------------------------------------

    def get_eval_dataloader(  # type: ignore[override]
        self, eval_dataset: CaptionDataset | ShuffledImages | None = None
    ) -> DataLoader:
        """Return a loader of all rows of the given data set.

        With persistent workers, the Trainer would return the loader of the first call for every data set. With
        `dataloader_drop_last`, which is meant for training, it would leave out the last rows.
        """
        names = ("dataloader_persistent_workers", "dataloader_drop_last")
        values = {name: getattr(self.args, name) for name in names}
        for name in names:
            setattr(self.args, name, False)
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            for name, value in values.items():
                setattr(self.args, name, value)

    def evaluate(  # type: ignore[override]
        self,
        eval_dataset: CaptionDataset | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Return and log losses and scores with right and with shuffled images, and write the evaluation files.

        Args:
            eval_dataset: the rows; by default the evaluation data of the trainer.
            ignore_keys: ignored; accepted for compatibility with the Trainer.
            metric_key_prefix: prefix of the names in the log.

        Returns:
            The losses and scores by name, such as `eval_loss` and `eval_loss_shuffled`.

        Raises:
            ValueError: if there are no rows to evaluate on.
        """
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        if rows is None:
            raise ValueError("There are no rows to evaluate on: pass `eval_dataset`.")
        # Data loading draws random numbers. They must not affect training, or a resumed run would differ.
        with self._averaged_weights(), torch.random.fork_rng(devices=[]), onednn_linears(self.args.device):
            start = time.time()
            values, write_files = self._evaluate_rows(rows)
            metrics = {f"{metric_key_prefix}_{name}": value for name, value in values.items()}
            metrics |= speed_metrics(metric_key_prefix, start, num_samples=len(rows))
            self.log(metrics)
            if self.is_world_process_zero():
                write_files()
            self.last_logged = (time.time(), self.state.global_step)  # the training speed excludes evaluation
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

    def _evaluate_rows(self, rows: CaptionDataset) -> tuple[dict[str, float], Callable[[], None]]:
        """Return losses and scores by name, and the function that writes the files of the evaluation.

        The main process calls the function after the losses and scores are logged.
        """
        raise NotImplementedError

    def _averaged_weights(self) -> AbstractContextManager[None]:
        return nullcontext() if self.ema is None else self.ema.averaged_weights()

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the predictions of a batch as the Trainer does, with oneDNN's linear layers in float32 on a CPU."""
        with onednn_linears(self.args.device):
            return super().prediction_step(*args, **kwargs)

    # --- The best checkpoint ------------------------------------------------------------------------------------------

    def default_best_score(self, model: "QFormerPreTrainedModel | PeftModel") -> str:
        """Return the score that selects the best checkpoint if the options name none."""
        raise NotImplementedError

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Return True for a new best score.

        Among equal scores the last is the best, because all first scores may be zero.

        Evaluations whose weights are not saved are ignored, because those weights cannot be loaded at the end.
        """
        is_saved = self.control.should_save or self.args.save_strategy == SaveStrategy.BEST
        if self.args.load_best_model_at_end and not is_saved:
            return False
        if metrics[f"eval_{self.args.best_score_name}"] == self.state.best_metric:
            self.state.best_metric = None
        return super()._determine_best_metric(metrics, trial)

    def _load_best_model(self) -> None:
        """Load the best checkpoint as the Trainer does, with its EMA, and show the files of its evaluation."""
        super()._load_best_model()
        if self.is_world_process_zero():
            for stem in self.evaluation_stems:
                show_files_of_step(self.args.output_folder, stem, self.state.best_global_step)
        if self.ema is not None:
            self.ema.load(str(self.state.best_model_checkpoint))

    # --- Checkpoints --------------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Save the trainable weights of a checkpoint, under their names in memory.

        `save_pretrained` stores some weights under older names, for example those of DINOv2. The Trainer does not
        translate these names when it resumes, so the weights would silently keep their initial values.
        """
        output_dir = output_dir or str(self.args.output_folder)
        os.makedirs(output_dir, exist_ok=True)
        if self.ema is not None:
            self.ema.save(output_dir, self.args.should_save)
        if not self.args.should_save:
            return
        if isinstance(self.model, QFormerPreTrainedModel):
            self.model.save_pretrained(
                output_dir, include_backbones=False, state_dict=state_dict, save_original_format=False
            )
        else:  # adapters already leave out the frozen weights
            self.model.save_pretrained(output_dir, state_dict=state_dict)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Save a checkpoint as the Trainer does, and delete it if it could not be written as a whole.

        The Trainer deletes old checkpoints afterwards, so a full disk leaves the last complete checkpoint.
        """
        folder = self.args.output_folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
        except BaseException:
            if self.is_world_process_zero() and not is_complete(folder):
                shutil.rmtree(folder, ignore_errors=True)
            raise

    def _save_rng_state(self, output_dir: str) -> None:
        """Save the random state as the Trainer does, then wait until all processes have saved theirs.

        The Trainer writes `trainer_state.json` next, so a checkpoint that has this file is complete.
        """
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the optimizer and the schedule of a checkpoint as the Trainer does, and its EMA.

        The Trainer calls this method after FSDP or DeepSpeed has prepared the model and loaded its weights.
        """
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.ema is not None and checkpoint is not None:
            self.ema.load(checkpoint)

    # --- The final folder and the Hub ---------------------------------------------------------------------------------

    def save_final_model(
        self,
        folder: str | os.PathLike,
        state_dict: dict[str, torch.Tensor] | None = None,
        training: dict | None = None,
    ) -> None:
        """Write a folder that others can load: model or adapter, processor, plots and model card.

        Args:
            folder: the folder to write.
            state_dict: the gathered weights, if they are sharded (FSDP, DeepSpeed).
            training: steps, epochs and seconds of a finished run, and whether it was resumed.
        """
        if isinstance(self.model, QFormerPreTrainedModel):
            self.model.save_pretrained(folder, include_backbones=self.include_backbones, state_dict=state_dict)
        else:
            self.model.save_pretrained(os.fspath(folder), state_dict=state_dict)
            processor = without_adapters(self.model).processor
            assert processor is not None, "build_model checks it"
            processor.save_pretrained(folder)
        for name in PICTURES:
            picture = self.args.output_folder / name
            if picture.exists() and picture.parent != Path(folder):
                shutil.copy(picture, folder)
        if self.facts is not None:
            ended_with_best = training is not None and self.args.load_best_model_at_end
            results = describe_results(self.state, self.args.best_score_name if ended_with_best else None)
            write_card(folder, {**self.facts, **results, "training": training})

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository before training, so that an invalid name or token raises an error at once.

        Raises:
            InputError: if the Hub refuses it.
        """
        if self.is_world_process_zero():
            self.hub_model_id = open_repository(
                self.args.hub_model_id or self.args.output_folder.absolute().name,
                self.args.hub_private_repo if private is None else private,
                self.args.hub_revision,
                token or self.args.hub_token,
            )
            self.push_in_progress = None

    def push_to_hub(  # type: ignore[override]
        self, commit_message: str | None = "End of training", **kwargs: Any
    ) -> None:
        """Publish the output folder, after [`~QFormerTrainer.save_final_model`] has written it.

        Args:
            commit_message: title of the commit.
            kwargs: ignored; accepted for compatibility with the Trainer.

        Raises:
            InputError: if the Hub refuses it.
        """
        if self.is_world_process_zero():
            self._finish_current_push()
            self._publish(self.args.output_folder, commit_message or "End of training")

    def _publish(self, folder: Path, commit_message: str) -> None:
        publish(
            folder,
            str(self.hub_model_id),
            private=self.args.hub_private_repo,
            revision=self.args.hub_revision,
            token=self.hub_token,
            commit_message=commit_message,
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Publish the current model in the background.

        The Trainer would publish the checkpoint, which holds pickles. With sharded weights (FSDP, DeepSpeed), only the
        final folder is published.
        """
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return
        if self.push_in_progress is not None and not self.push_in_progress.is_done():
            if not self.args.hub_always_push:
                return
            self._finish_current_push()
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        folder = self.args.output_folder / "push"
        shutil.rmtree(folder, ignore_errors=True)  # left by a run that was killed during a push
        with self._averaged_weights():
            self.save_final_model(folder)
        job = HfApi().run_as_future(self._publish_copy, folder, self.state.global_step)
        self.push_in_progress = PushInProgress([job])  # type: ignore[arg-type]

    def _publish_copy(self, folder: Path, step: int) -> None:
        try:
            self._publish(folder, f"Training in progress, step {step}")
        except InputError as error:
            logger.warning("Step %d was not published: %s Training continues.", step, error)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
