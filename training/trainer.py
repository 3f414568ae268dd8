"""Trainer of captioners, with evaluation on shuffled images and generated captions."""

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from ..common.onednn import onednn_linears
from ..data.collator import CaptionCollator
from ..data.dataset import CaptionDataset, ShuffledImages
from ..evaluation.plots import LOSSES, LossCurves
from .bag_of_words import BagOfWordsLoss
from .base_trainer import QFormerTrainer
from .evaluation_files import write_caption_files
from .lora import captioner_of
from .scores import ScoreFunction

if TYPE_CHECKING:
    from peft import PeftModel

    from ..modeling_qformer import QFormerCaptioner
    from ..saving_qformer import QFormerPreTrainedModel


class CaptionTrainer(QFormerTrainer):
    """Trainer of a [`QFormerCaptioner`] on captioned images.

    **Evaluation** logs the loss (`eval_loss`) and the scores of generated captions, such as `eval_cider`. Both are
    logged again with the images shuffled among the rows: `eval_loss_shuffled`, `eval_cider_shuffled`. The difference
    shows how much the captioner uses the image. The captions and two plots are written to the output folder
    (`evaluation_files.py`).

    **Loss.** With `args.bag_of_words_loss_weight` the [`BagOfWordsLoss`] is added in training, and the logged training
    loss is the sum.

    Args:
        args, kwargs: as for [`QFormerTrainer`]. The collator is a [`CaptionCollator`], and the model is a captioner or
            an adapter on one.
        score: function from captions and their rows to scores by name. Higher is better.

    Example:

    ```python
    >>> trainer = CaptionTrainer(
    ...     model=model,
    ...     args=QFormerTrainingArguments(output_dir="outputs/mine"),
    ...     train_dataset=train_data,
    ...     eval_dataset=eval_data,
    ...     data_collator=CaptionCollator(model.processor),
    ...     score=CaptionScorer(),
    ... )  # doctest: +SKIP
    >>> trainer.train()  # doctest: +SKIP
    >>> trainer.save_final_model("outputs/mine")  # doctest: +SKIP
    ```
    """

    model: "QFormerCaptioner | PeftModel"
    data_collator: CaptionCollator
    evaluation_stems: tuple[str, ...] = ("captions",)
    plotted_losses: LossCurves = LOSSES

    def __init__(self, *args: Any, score: ScoreFunction, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.score = score
        self.bag_of_words_loss: BagOfWordsLoss | None = None
        if self.args.bag_of_words_loss_weight:
            encode = self.data_collator.processor.encode_caption
            rows = zip(self.train_dataset.row_prompts(), self.train_dataset.references(), strict=True)
            captions = [encode(caption, prompt) for prompt, row in rows for caption in row]
            embeddings = captioner_of(self.model).get_input_embeddings()
            self.bag_of_words_loss = BagOfWordsLoss(captions, embeddings.get_parameter("weight"))

    def default_best_score(self, model: "QFormerPreTrainedModel | PeftModel") -> str:
        """Return CIDEr."""
        return "cider"

    # --- Training -----------------------------------------------------------------------------------------------------

    def part_learning_rates(self) -> Mapping[str, float | None]:
        """Return the learning rates of the vision encoder, the language model and the projection."""
        return {
            **super().part_learning_rates(),
            "language_model": self.args.language_model_learning_rate,
            "language_projection": self.args.language_projection_learning_rate,
        }

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Return the caption loss, and in training add the weighted bag-of-words loss."""
        if self.bag_of_words_loss is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        # The Trainer sums the losses of the batches of one step, so each is divided by their number.
        bag_of_words = self.bag_of_words_loss(outputs.soft_prompt, inputs["labels"])
        loss = loss + self.args.bag_of_words_loss_weight * bag_of_words / self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss

    # --- Evaluation ---------------------------------------------------------------------------------------------------

    def _evaluate_rows(self, rows: CaptionDataset) -> tuple[dict[str, float], Callable[[], None]]:
        """Return losses and scores with right and with shuffled images, and the function that writes the captions."""
        shuffled_rows = ShuffledImages(rows)
        metrics = {
            "loss": self._mean_loss(rows, "right inputs"),
            "loss_shuffled": self._mean_loss(shuffled_rows, "shuffled inputs"),
        }
        captions = self.generate_captions(rows)
        if any(rows.row_prompts()):
            shuffled_captions = self.generate_captions(shuffled_rows)
        else:  # a caption depends only on its image, so shuffling the images shuffles the captions in the same way
            shuffled_captions = [captions[shuffled_rows.image_of[row]] for row in range(len(rows))]
        scores, shuffled_scores = self.score(captions, rows), self.score(shuffled_captions, rows)
        for name in scores:
            metrics |= {name: scores[name], f"{name}_shuffled": shuffled_scores[name]}
        metrics |= self.describe_captions(captions)
        write = functools.partial(
            write_caption_files,
            self.args.output_folder,
            rows,
            captions,
            self.state,
            self.args.best_score_name,
            self.plotted_losses,
        )
        return metrics, write

    def describe_captions(self, captions: list[str]) -> dict[str, float]:
        """Return further facts about the generated captions for the log, by name."""
        return {}

    @torch.no_grad()
    def _mean_loss(self, rows: CaptionDataset | ShuffledImages, description: str) -> float:
        """Return the mean loss in nats per caption token, over all rows and processes.

        The Trainer would average the means of batches, which depends on the batch size and the number of processes.
        """
        model = self.accelerator.unwrap_model(self.model).eval()
        nats, tokens = 0.0, 0
        for batch in tqdm(self.get_eval_dataloader(rows), description, leave=False, disable=self.args.disable_tqdm):
            inputs = self._prepare_inputs(batch)
            labels = inputs["labels"].flatten(1)  # [B, K*T]
            with self.compute_loss_context_manager():
                losses = model(**inputs, skip_logits=True).losses.view(len(labels), -1).sum(dim=1)  # [B]
            losses, counts = self.accelerator.gather_for_metrics((losses, (labels != -100).sum(dim=1)))
            nats, tokens = nats + losses.double().sum().item(), tokens + int(counts.sum())
        return nats / max(tokens, 1)

    def generate_captions(self, rows: CaptionDataset | ShuffledImages) -> list[str]:
        """Generate a caption for every row, in order, with the number of beams and the length in the options."""
        model = self.accelerator.unwrap_model(self.model).eval()
        processor = self.data_collator.processor
        captions = []
        for batch in tqdm(self.get_eval_dataloader(rows), "captions", leave=False, disable=self.args.disable_tqdm):
            with self.compute_loss_context_manager(), onednn_linears(self.args.device):
                ids = model.generate(
                    **self._prepare_inputs(batch),
                    num_beams=self.args.generation_num_beams,
                    max_new_tokens=self.args.generation_max_length,
                    # All processes must take the same number of steps, in which they gather the sharded weights.
                    synced_gpus=self.is_fsdp_enabled or None,
                )
            ids = self.accelerator.pad_across_processes(ids, dim=1, pad_index=processor.tokenizer.pad_token_id)
            ids = self.accelerator.gather_for_metrics(ids)
            captions += [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]
        return captions
