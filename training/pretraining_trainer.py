"""Trainer of stage 1 of BLIP-2, with evaluation of each loss and of retrieval, on right and on shuffled images."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..common.logging import get_logger
from ..data.collator import PretrainingCollator
from ..data.dataset import CaptionDataset, ShuffledImages
from ..data.streaming import CaptionStream
from ..evaluation.recall import recalls
from ..pretraining_qformer import QFormerForPretraining
from .base_trainer import QFormerTrainer
from .evaluation_files import write_retrieval_files

if TYPE_CHECKING:
    from peft import PeftModel

    from ..saving_qformer import QFormerPreTrainedModel

logger = get_logger(__name__)

LOSSES = ("itc_loss", "itm_loss", "itg_loss")
MAX_SIMILARITIES = 2**26  # computed at once, of queries and texts

RowVectors = tuple[int, torch.Tensor, torch.Tensor]  # number of a row, vectors of its image [Q, E] and its texts [K, E]


class PretrainingTrainer(QFormerTrainer):
    """Trainer of a [`QFormerForPretraining`] on captioned images.

    **Evaluation** logs each loss (`eval_itc_loss`, ...) and their weighted sum (`eval_loss`), for the first caption of
    each row. It also logs the recall of retrieval by contrast among all captions, such as `eval_image_to_text_r1`. All
    are logged again with the images shuffled among the rows (`eval_loss_shuffled`, ...). Then the recall is at chance.
    A table of the retrieved captions and two plots are written to the output folder (`evaluation_files.py`).

    **Loss.** The log of training has each loss, too. A row alone has no wrong pairs, so a last batch of one row is left
    out.

    Args:
        args, kwargs: as for [`QFormerTrainer`]. The collator is a [`PretrainingCollator`].

    Example:

    ```python
    >>> trainer = PretrainingTrainer(
    ...     model=model,
    ...     args=QFormerTrainingArguments(output_dir="outputs/stage1"),
    ...     train_dataset=train_data,
    ...     eval_dataset=eval_data,
    ...     data_collator=PretrainingCollator(model.processor),
    ... )  # doctest: +SKIP
    >>> trainer.train()  # doctest: +SKIP
    >>> trainer.save_final_model("outputs/stage1")  # doctest: +SKIP
    ```
    """

    model: QFormerForPretraining
    data_collator: PretrainingCollator
    evaluation_stems = ("retrieval",)

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.logged_losses: dict[str, list[torch.Tensor]] = {}  # of the batches since the last log entry
        config = self.model.config
        compares = bool(config.itc_weight or config.itm_weight)
        rows = 0 if isinstance(self.train_dataset, CaptionStream) else len(self.train_dataset)
        if compares and self.args.world_size == 1 and rows % self.args.train_batch_size == 1:
            self.args.dataloader_drop_last = True
            logger.info("The last batch of an epoch has one row, which has no wrong pairs: it is left out.")

    def default_best_score(self, model: "QFormerPreTrainedModel | PeftModel") -> str:
        """Return the mean recall, or without contrast the loss, because the recall then stays at chance."""
        return "mean_recall" if model.config.itc_weight else "loss"

    # --- Training -----------------------------------------------------------------------------------------------------

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """Return the names that the Trainer returns without the temperature, which CLIP and BLIP-2 do not decay."""
        return [name for name in super().get_decay_parameter_names(model) if not name.endswith("logit_scale")]

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Return the weighted sum of the losses, and in training keep each of them for the log."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            for name in LOSSES:
                if (part := outputs.get(name)) is not None:  # a loss of weight 0 is not computed
                    self.logged_losses.setdefault(name, []).append(part.detach())
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as the base does, and add each loss to the training loss."""
        if "loss" in logs and self.logged_losses:
            for name, losses in self.logged_losses.items():
                mean = self.accelerator.reduce(torch.stack(losses).mean(), reduction="mean")
                logs[name] = round(mean.item(), 4)
            self.logged_losses = {}
        super().log(logs, start_time)

    # --- Evaluation ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _evaluate_rows(self, rows: CaptionDataset) -> tuple[dict[str, float], Callable[[], None]]:
        """Return losses and recalls with right and with shuffled images, and the function that writes the files."""
        losses, vectors = self._run(rows, "right inputs")
        similarity, image_of_text = similarities(gather_object(vectors), self.args.device)
        shuffled_rows = ShuffledImages(rows)
        shuffled_losses, _ = self._run(shuffled_rows, "shuffled inputs", with_texts=False)
        place = torch.tensor([shuffled_rows.image_of[row] for row in range(len(rows))])
        found = {**losses, **recalls(similarity, image_of_text)}
        shuffled = {**shuffled_losses, **recalls(similarity[place], image_of_text)}
        metrics: dict[str, float] = {}
        for name in found:
            metrics |= {name: found[name], f"{name}_shuffled": shuffled[name]}
        write = functools.partial(
            write_retrieval_files,
            self.args.output_folder,
            rows,
            similarity,
            image_of_text,
            self.state,
            self.args.best_score_name,
        )
        return metrics, write

    def _run(
        self, rows: CaptionDataset | ShuffledImages, description: str, with_texts: bool = True
    ) -> tuple[dict[str, float], list[RowVectors]]:
        """Run the model on all rows once, in batches that do not depend on the number of processes.

        The losses are those of the first caption of each row. With all captions, matching would take most of the time.

        Args:
            rows: the rows.
            description: what the progress bar shows.
            with_texts: return the vectors of all captions, too.

        Returns:
            The losses by name, and the vectors of the rows of this process.
        """
        model = self.accelerator.unwrap_model(self.model).eval()
        weights = {name: getattr(model.config, name.replace("loss", "weight")) for name in LOSSES}
        sums, counts = dict.fromkeys(LOSSES, 0.0), dict.fromkeys(LOSSES, 0)
        vectors: list[RowVectors] = []
        batches = self._evaluation_batches(len(rows))
        loader = DataLoader(
            rows,
            batch_sampler=batches,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
        )
        with self._same_random_numbers():
            progress = tqdm(loader, description, leave=False, disable=self.args.disable_tqdm)
            for indices, batch in zip(batches, progress, strict=True):
                inputs = self._prepare_inputs(batch)
                ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask")  # [b, K, T]
                with self.compute_loss_context_manager():
                    outputs = model(**inputs, input_ids=ids[:, 0], attention_mask=mask[:, 0])
                # Means of contrast and matching are over rows, those of generation over all tokens but the first.
                tokens = mask[:, 0].sum() - len(indices)
                sizes = torch.stack([mask.new_tensor(len(indices)), tokens])
                num_rows, num_tokens = self.accelerator.reduce(sizes, reduction="sum").tolist()
                for name in (name for name, weight in weights.items() if weight):
                    loss = self.accelerator.reduce(outputs[name].float(), reduction="mean").item()
                    size = num_tokens if name == "itg_loss" else num_rows
                    sums[name], counts[name] = sums[name] + loss * size, counts[name] + size
                if with_texts:
                    texts = mask.any(dim=-1)  # [b, K]
                    with self.compute_loss_context_manager():
                        of_texts = model.get_text_features(ids[texts], mask[texts]).pooler_output
                    parts = of_texts.float().cpu().split(texts.sum(dim=1).tolist())
                    vectors += zip(indices, outputs.image_vectors.float().cpu(), parts, strict=True)
        losses = {name: sums[name] / counts[name] for name, weight in weights.items() if weight}
        return {"loss": sum(weights[name] * loss for name, loss in losses.items()), **losses}, vectors

    def _evaluation_batches(self, num_rows: int) -> list[list[int]]:
        """Return the rows of each batch of this process.

        Batches of all processes together are equally long but for one row, and have two rows or more, because one row
        has no wrong pairs.
        """
        processes, process = self.args.world_size, self.args.process_index
        size = self.args.per_device_eval_batch_size * processes
        count = max(1, min(-(-num_rows // size), num_rows // max(2, processes)))
        shares = torch.arange(num_rows).tensor_split(count)
        return [share.tensor_split(processes)[process].tolist() for share in shares]

    @contextmanager
    def _same_random_numbers(self) -> Iterator[None]:
        """Draw the same negatives in each evaluation, and leave the random numbers of training as they were."""
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(0)
            yield


def similarities(vectors: list[RowVectors], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the similarity of each image and each text `[N, M]`, and the image of each text `[M]`.

    Args:
        vectors: those of all rows, in any order.
        device: device to compute on.
    """
    in_order = sorted(vectors, key=lambda row: row[0])
    texts = torch.cat([texts for _, _, texts in in_order]).to(device)  # [M, E]
    images = torch.stack([image for _, image, _ in in_order])  # [N, Q, E]
    at_once = max(1, MAX_SIMILARITIES // (images.shape[1] * len(texts)))
    blocks = [(block.to(device) @ texts.T).amax(dim=1).cpu() for block in images.split(at_once)]
    counts = torch.tensor([len(texts) for _, _, texts in in_order])
    return torch.cat(blocks), torch.arange(len(counts)).repeat_interleave(counts)
