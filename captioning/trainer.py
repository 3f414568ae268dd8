"""The HF Trainer, taught what a captioner's evaluation is."""

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import PeftModel
from tqdm import tqdm
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import speed_metrics

from .data import CaptionDataset, ShuffledImages
from .pictures import draw_caption_sheet, draw_loss_curve
from .words import WordLoss

ScoreFunction = Callable[[list[str], CaptionDataset], dict[str, float]]


@dataclass
class CaptionTrainingArguments(Seq2SeqTrainingArguments):
    """transformers' `Seq2SeqTrainingArguments` with a captioner's defaults; every field can be set as usual."""

    remove_unused_columns: bool = field(default=False, metadata={"help": "The images would be such a column."})
    learning_rate: float = field(default=1e-4, metadata={"help": "The highest learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "The scheduler type to use."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Steps, or below 1 a share of all steps."})
    weight_decay: float = field(default=0.05, metadata={"help": "Weight decay for AdamW."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate: no, steps or epoch."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to save: no, steps, epoch or best."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep, the best one apart."})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "End with the best checkpoint."})
    metric_for_best_model: str | None = field(default="cider", metadata={"help": "The score that says which it is."})
    generation_max_length: int | None = field(default=30, metadata={"help": "Tokens of a caption in evaluation."})
    generation_num_beams: int | None = field(default=3, metadata={"help": "Beams in evaluation."})
    word_warmup_epochs: float = field(
        default=0.0, metadata={"help": "Train on the word loss (captioning/words.py) alone for so many epochs first."}
    )
    word_loss_weight: float = field(
        default=0.0, metadata={"help": "After that, add so much of the word loss to the caption loss."}
    )

    def __post_init__(self):
        super().__post_init__()
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()


class CaptionTrainer(Seq2SeqTrainer):
    """Trains a [`QFormerCaptioner`] on a [`CaptionDataset`].

    Each evaluation logs the loss with the right images (`eval_loss`), the loss with the images shuffled among the rows
    (`eval_loss_shuffled`), and the scores of generated captions, with right and with shuffled images
    (`eval_facts`, `eval_facts_shuffled`). What shuffling costs is what the captioner gets from looking. It leaves the
    captions (`captions.jsonl`) and two pictures (`captions.png`, `loss_curve.png`) in the output folder.

    With `args.word_warmup_epochs` training begins by asking the soft prompt alone for the words of the captions
    ([`WordLoss`]), which wakes the queries up; with `args.word_loss_weight` it goes on asking beside the caption loss.
    What is logged as training loss is the sum.

    Args:
        score: from captions and the data set that they describe to named scores; higher is better.
        args, kwargs: as for the Trainer.
    """

    def __init__(self, *args, score: ScoreFunction, **kwargs):
        super().__init__(*args, **kwargs)
        self.score = score
        self.word_loss = None
        if self.args.word_warmup_epochs or self.args.word_loss_weight:
            encode = self.data_collator.processor.encode_caption
            captions = [encode(caption) for row in self.train_dataset.references() for caption in row]
            self.word_loss = WordLoss(captions, self.model.get_input_embeddings().weight)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The caption loss; in training the word loss too, or alone while it warms up."""
        if self.word_loss is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.state.epoch < self.args.word_warmup_epochs:
            images = {name: value for name, value in inputs.items() if name != "labels"}
            loss, outputs, weight = 0.0, model(**images), 1.0  # the language model reads the prompt and no caption
        else:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            weight = self.args.word_loss_weight
        # The Trainer expects the loss to be divided among the batches of a step already.
        words = self.word_loss(outputs.soft_prompt, inputs["labels"]) / self.current_gradient_accumulation_steps
        loss = loss + weight * words
        return (loss, outputs) if return_outputs else loss

    def evaluate(
        self,
        eval_dataset: CaptionDataset | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Evaluate as the class says. Takes what `Trainer.evaluate` takes."""
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
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _mean_loss(self, rows: CaptionDataset | ShuffledImages, description: str) -> float:
        loader = self.get_eval_dataloader(rows)
        return self.evaluation_loop(loader, description, prediction_loss_only=True).metrics["eval_loss"]

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
        with (folder / "captions.jsonl").open("w") as lines:
            for number, (caption, own) in enumerate(zip(captions, references, strict=True)):
                row = {"image_id": number, "caption": caption, "references": own}
                lines.write(json.dumps(row, ensure_ascii=False) + "\n")
        shown = range(0, len(rows), math.ceil(len(rows) / 12))
        title = f"Held-out images after step {self.state.global_step}: generated caption, one reference"
        sheet = folder / f"captions_step_{self.state.global_step}.png"
        draw_caption_sheet(
            [rows[row]["image"] for row in shown],
            [captions[row] for row in shown],
            [references[row][0] for row in shown],
            sheet,
            title,
        )
        (folder / "captions.png").write_bytes(sheet.read_bytes())
        draw_loss_curve(
            self.state.log_history,
            f"eval_{self.args.metric_for_best_model.removeprefix('eval_')}",
            folder / "loss_curve.png",
        )

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Checkpoints hold only what trains, under the names that the weights have in memory.

        On disk transformers gives some weights older names (DINOv2's, for one), and the Trainer resumes without
        translating them back: those weights would silently keep their fresh values.
        """
        output_dir = output_dir or self.args.output_dir
        if isinstance(self.model, PeftModel):  # which saves just that by itself
            super()._save(output_dir, state_dict)
            return
        self.model.save_pretrained(
            output_dir,
            include_backbones=False,
            state_dict=state_dict,
            is_main_process=self.args.should_save,
            save_original_format=False,
        )
        torch.save(self.args, os.path.join(output_dir, TRAINING_ARGS_NAME))
