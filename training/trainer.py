"""The HF Trainer, taught what a captioner's evaluation is."""

import json
import math
import os
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import psutil
import torch
from accelerate.data_loader import DataLoaderShard
from huggingface_hub import HfApi
from peft import PeftModel
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import Seq2SeqTrainer
from transformers.trainer_utils import HubStrategy, SaveStrategy, speed_metrics
from transformers.utils import PushInProgress

from ..common.errors import InputError
from ..common.onednn import has_relu, onednn_linears
from ..data.dataset import CaptionDataset, ShuffledImages
from ..data.streaming import CaptionStream
from ..evaluation.plots import draw_caption_sheet, draw_loss_curve
from ..hub.layout import PICTURES
from ..hub.model_card import write_card
from ..hub.push import open_repository, publish
from .bag_of_words import BagOfWordsLoss
from .callbacks import SetEpochCallback
from .ema import EMACallback
from .run_facts import describe_results

ScoreFunction = Callable[[list[str], CaptionDataset], dict[str, float]]


class CaptionTrainer(Seq2SeqTrainer):
    """Trains a [`QFormerCaptioner`] on a [`CaptionDataset`].

    Each evaluation logs the loss with the right images (`eval_loss`), the loss with the images shuffled among the rows
    (`eval_loss_shuffled`), and the scores of generated captions, with right and with shuffled images
    (`eval_facts`, `eval_facts_shuffled`). What shuffling costs is what the captioner gets from looking. It leaves the
    captions (`captions.jsonl`) and two pictures (`captions.png`, `loss_curve.png`) in the output folder.

    With `args.bag_of_words_loss_weight` training also asks the soft prompt alone for the words of the captions
    ([`BagOfWordsLoss`]). The logged training loss is the sum. Images per second since the last line and memory in GB
    are logged beside it: the peak of the GPU, or the current memory of the process.

    With `args.push_to_hub` each save publishes the captioner as it is then, in the background and in one commit
    (`hub/push.py`), and [`~CaptionTrainer.push_to_hub`] the finished output folder.

    Args:
        score: from captions and the data set that they describe to named scores; higher is better.
        include_backbones: which backbones are in the folders for others (`QFormerCaptioner.save_pretrained`).
        facts: of the run, for the model card (`hub/model_card.py`); without them there is none in the output folder.
        args, kwargs: as for the Trainer.
    """

    def __init__(
        self,
        *args,
        score: ScoreFunction,
        include_backbones: bool | list[str] | None = None,
        facts: dict | None = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.hub_token, self.args.hub_token = self.args.hub_token, None  # so that no file of the run can hold it
        self.score = score
        self.include_backbones = include_backbones
        self.facts = facts
        self.last_logged = (time.time(), self.state.global_step)
        self.has_relu = has_relu(self.model)
        if not isinstance(self.model, PeftModel):  # the Trainer expects these weights to be missing in a checkpoint
            self.model._keys_to_ignore_on_save = self.model.keys_left_out(include_backbones=False)
        self.add_callback(SetEpochCallback(self.train_dataset))
        self.average = None
        if self.args.ema_decay is not None:
            self.average = EMACallback(self.model, self.args.ema_decay)
            self.add_callback(self.average)
        self.word_loss = None
        if self.args.bag_of_words_loss_weight:
            encode = self.data_collator.processor.encode_caption
            captions = [encode(caption) for row in self.train_dataset.references() for caption in row]
            self.word_loss = BagOfWordsLoss(captions, self.model.get_input_embeddings().weight)

    def get_train_dataloader(self) -> DataLoader:
        """The Trainer's; of a stream, one that leaves it alone.

        The Trainer would have one process open the images of all, or each process open all images. A stream shares its
        rows among the processes by itself.
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

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """The Trainer's, in which parts may have learning rates of their own."""
        optimizer = super().create_optimizer(model)
        name_of = {parameter: name for name, parameter in (model or self.model).named_parameters()}
        for part in ("vision_model", "language_model", "language_projection"):
            rate = getattr(self.args, f"{part}_learning_rate")
            for group in list(optimizer.param_groups) if rate is not None else ():
                own = [parameter for parameter in group["params"] if part in name_of[parameter].split(".")]
                if own:
                    group["params"] = [each for each in group["params"] if part not in name_of[each].split(".")]
                    optimizer.add_param_group({**group, "params": own, "lr": rate})
        return optimizer

    def train(self, *args, **kwargs):
        """As the Trainer does; ends with the averaged weights, where there are any."""
        result = super().train(*args, **kwargs)
        if self.average is not None:
            self.average.keep()
        return result

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the Trainer does, with speed and memory beside the training loss."""
        if "loss" in logs:
            then, step = self.last_logged
            self.last_logged = now, _ = time.time(), self.state.global_step
            images = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
            logs["images_per_second"] = round((self.state.global_step - step) * images / (now - then), 2)
            gpu = torch.cuda.is_available() and not self.args.use_cpu
            memory = torch.cuda.max_memory_allocated() if gpu else psutil.Process().memory_info().rss
            logs["memory_gb"] = round(memory / 1e9, 2)
        super().log(logs, start_time)

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        """Compute the loss and its gradients as the Trainer does, on a float32 CPU by oneDNN."""
        if self.args.gradient_checkpointing:  # recomputed layers would leave the context
            return super().training_step(*args, **kwargs)
        with onednn_linears(self.args.device, backward_only=self.has_relu):
            return super().training_step(*args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The caption loss; in training some of the word loss, too."""
        if self.word_loss is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        # The Trainer expects the loss to be divided among the batches of a step already.
        words = self.word_loss(outputs.soft_prompt, inputs["labels"]) / self.current_gradient_accumulation_steps
        loss = loss + self.args.bag_of_words_loss_weight * words
        return (loss, outputs) if return_outputs else loss

    def get_eval_dataloader(self, eval_dataset: CaptionDataset | ShuffledImages | None = None) -> DataLoader:
        """As the Trainer does, but of the rows that are asked for, and all of them.

        With persistent workers it would give those of the first call, whatever is asked for, and leave out the last few
        rows where training does.
        """
        names = ("dataloader_persistent_workers", "dataloader_drop_last")
        kept = {name: getattr(self.args, name) for name in names}
        for name in names:
            setattr(self.args, name, False)
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            for name in names:
                setattr(self.args, name, kept[name])

    def evaluate(
        self,
        eval_dataset: CaptionDataset | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Evaluate as the class says. Takes what `Trainer.evaluate` takes."""
        averaged = nullcontext() if self.average is None else self.average.in_place()
        # Loading data draws random numbers. Training must not notice, or it would go on otherwise after a kill.
        with averaged, torch.random.fork_rng(devices=[]), onednn_linears(self.args.device):
            return self._measure(eval_dataset, metric_key_prefix)

    def _measure(self, eval_dataset: CaptionDataset | None, metric_key_prefix: str) -> dict[str, float]:
        start = time.time()
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        metrics = {
            "loss": self._mean_loss(rows, "right images"),
            "loss_shuffled": self._mean_loss(ShuffledImages(rows), "shuffled images"),
        }
        captions = self.generate_captions(rows)
        # A caption depends on its image alone, so shuffling the images means shuffling the captions.
        image_of = ShuffledImages(rows).image_of
        scores = self.score(captions, rows)
        shuffled = self.score([captions[image_of[row]] for row in range(len(rows))], rows)
        for name in scores:
            metrics |= {name: scores[name], f"{name}_shuffled": shuffled[name]}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        metrics |= speed_metrics(metric_key_prefix, start, num_samples=len(rows))

        self.log(metrics)
        if self.is_world_process_zero():
            self._leave_pictures(rows, captions)
        self.last_logged = (time.time(), self.state.global_step)  # evaluation is no time of training
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @torch.no_grad()
    def _mean_loss(self, rows: CaptionDataset | ShuffledImages, description: str) -> float:
        """Nats per caption token. The Trainer's own mean of batch means would depend on batches and processes."""
        model = self.accelerator.unwrap_model(self.model).eval()
        nats, tokens = 0.0, 0
        for batch in tqdm(self.get_eval_dataloader(rows), description, leave=False, disable=self.args.disable_tqdm):
            batch = self._prepare_inputs(batch)
            labels = batch["labels"].flatten(1)  # [B, K*T]
            with self.compute_loss_context_manager():
                losses = model(**batch).losses.view(len(labels), -1).sum(dim=1)  # [B]
            losses, counts = self.accelerator.gather_for_metrics((losses, (labels != -100).sum(dim=1)))
            nats, tokens = nats + losses.double().sum().item(), tokens + counts.sum().item()
        return nats / max(tokens, 1)  # as `forward` has it, where there is no caption at all

    def generate_captions(self, rows: CaptionDataset) -> list[str]:
        """Caption every row, in order, by `generation_num_beams` beams of up to `generation_max_length` tokens."""
        model = self.accelerator.unwrap_model(self.model)
        processor = self.data_collator.processor
        model.eval()
        captions = []
        for batch in tqdm(self.get_eval_dataloader(rows), "captions", leave=False, disable=self.args.disable_tqdm):
            with self.compute_loss_context_manager():
                ids = model.generate(
                    **self._prepare_inputs(batch),
                    num_beams=self.args.generation_num_beams,
                    max_new_tokens=self.args.generation_max_length,
                )
            ids = self.accelerator.pad_across_processes(ids, dim=1, pad_index=processor.tokenizer.pad_token_id)
            ids = self.accelerator.gather_for_metrics(ids)
            captions += [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]
        return captions

    def _leave_pictures(self, rows: CaptionDataset, captions: list[str]) -> None:
        folder = Path(self.args.output_dir)
        references = rows.references()
        name = f"captions_step_{self.state.global_step}"
        with (folder / f"{name}.jsonl").open("w") as lines:
            for number, (caption, own) in enumerate(zip(captions, references, strict=True)):
                row = {"image_id": number, "caption": caption, "references": own}
                lines.write(json.dumps(row, ensure_ascii=False) + "\n")
        shown = range(0, len(rows), math.ceil(len(rows) / 12))
        title = f"Held-out images after step {self.state.global_step}: generated caption, one reference"
        sheet = folder / f"{name}.png"
        draw_caption_sheet(
            [rows.image_to_show(row) for row in shown],
            [captions[row] for row in shown],
            [references[row][0] for row in shown],
            sheet,
            title,
        )
        for kind in ("jsonl", "png"):
            shutil.copyfile(folder / f"{name}.{kind}", folder / f"captions.{kind}")
        draw_loss_curve(
            self.state.log_history,
            f"eval_{self.args.metric_for_best_model.removeprefix('eval_')}",
            folder / "loss_curve.png",
        )

    # --- Folders and the Hub ------------------------------------------------------------------------------------------

    def save_final_model(
        self,
        folder: str | os.PathLike,
        state_dict: dict[str, torch.Tensor] | None = None,
        training: dict | None = None,
    ) -> None:
        """Write the folder that anybody opens: captioner or adapter, processor, pictures, card.

        Args:
            folder: where to.
            state_dict: the weights, where processes share them.
            training: how it went, once it has come to its end: steps, epochs, seconds, whether it was resumed.
        """
        if isinstance(self.model, PeftModel):
            self.model.save_pretrained(folder, state_dict=state_dict)
            self.model.processor.save_pretrained(folder)
        else:
            self.model.save_pretrained(folder, include_backbones=self.include_backbones, state_dict=state_dict)
        for picture in map(Path(self.args.output_dir).joinpath, PICTURES):
            if picture.exists() and picture.parent != Path(folder):
                shutil.copy(picture, folder)
        if self.facts is not None:
            ended_with_best = training is not None and self.args.load_best_model_at_end
            score_name = self.args.metric_for_best_model.removeprefix("eval_") if ended_with_best else None
            write_card(folder, {**self.facts, **describe_results(self.state, score_name), "training": training})

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """As the Trainer does, before anything is trained; what is wrong is one sentence."""
        if self.is_world_process_zero():
            self.hub_model_id = open_repository(
                self.args.hub_model_id or Path(self.args.output_dir).absolute().name,
                self.args.hub_private_repo if private is None else private,
                self.args.hub_revision,
                token or self.args.hub_token,
            )
            self.push_in_progress = None

    def push_to_hub(self, commit_message: str | None = "End of training", **kwargs) -> None:
        """Publish the output folder, once [`~CaptionTrainer.save_final_model`] has written it.

        Raises:
            InputError: if the Hub does not take it.
        """
        if self.is_world_process_zero():
            self._finish_current_push()
            self._publish(self.args.output_dir, commit_message)

    def _publish(self, folder: str | os.PathLike, commit_message: str) -> None:
        publish(
            folder,
            self.hub_model_id,
            private=self.args.hub_private_repo,
            revision=self.args.hub_revision,
            token=self.hub_token,
            commit_message=commit_message,
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Publish the captioner as it is now. The Trainer would push the files that a run goes on from, pickles too.

        Where processes share the weights (FSDP, DeepSpeed) only the end is published.
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
        folder = Path(self.args.output_dir) / "push"
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed while it pushed
        with nullcontext() if self.average is None else self.average.in_place():
            self.save_final_model(folder)
        job = HfApi().run_as_future(self._publish_copy, folder, self.state.global_step)
        self.push_in_progress = PushInProgress([job])

    def _publish_copy(self, folder: Path, step: int) -> None:
        try:
            self._publish(folder, f"Training in progress, step {step}")
        except InputError as error:
            print(f"Step {step} is not on the Hub: {error} Training goes on.")
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Checkpoints hold only what trains, under the names that the weights have in memory.

        On disk transformers gives some weights older names (DINOv2's, for one), and the Trainer resumes without
        translating them back: those weights would silently keep their fresh values.
        """
        output_dir = output_dir or self.args.output_dir
        os.makedirs(output_dir, exist_ok=True)
        if self.average is not None:
            self.average.save(output_dir)
        if isinstance(self.model, PeftModel):  # which saves just that by itself
            self.model.save_pretrained(output_dir, state_dict=state_dict, is_main_process=self.args.should_save)
            return
        self.model.save_pretrained(
            output_dir,
            include_backbones=False,
            state_dict=state_dict,
            is_main_process=self.args.should_save,
            save_original_format=False,
        )

    def _save_rng_state(self, output_dir: str) -> None:
        """As the Trainer does; no process goes on before all have.

        What comes after is `trainer_state.json`: a checkpoint that has it is complete, whenever the run is killed.
        """
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.average is not None:
            self.average.load(resume_from_checkpoint)

    def _determine_best_metric(self, metrics: dict[str, float], trial) -> bool:
        """As the Trainer does, but of equals the last is the best: at first all scores may be zero.

        And what is not saved cannot be the best that a run ends with: it would end with others, and not say so.
        """
        saved = self.control.should_save or self.args.save_strategy == SaveStrategy.BEST
        if self.args.load_best_model_at_end and not saved:
            return False
        name = f"eval_{self.args.metric_for_best_model.removeprefix('eval_')}"
        if metrics[name] == self.state.best_metric:
            self.state.best_metric = None
        return super()._determine_best_metric(metrics, trial)

    def _load_best_model(self) -> None:
        """As the Trainer does; captions and sheet in the output folder become those of that model, too."""
        super()._load_best_model()
        folder, step = Path(self.args.output_dir), self.state.best_global_step
        for kind in ("jsonl", "png") if self.is_world_process_zero() else ():
            if (own := folder / f"captions_step_{step}.{kind}").exists():  # a run may go on in another folder
                shutil.copyfile(own, folder / f"captions.{kind}")
        if self.average is not None:
            self.average.load(self.state.best_model_checkpoint)
