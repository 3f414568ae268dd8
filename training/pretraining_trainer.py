"""Trainer of stage 1 of BLIP-2, with evaluation of each loss and of retrieval, on right and on shuffled images."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

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

logger = get_logger(__name__)

LOSSES = ("itc_loss", "itm_loss", "itg_loss")
MAX_SIMILARITIES = 2**26  # computed at once, of queries and texts


class PretrainingTrainer(QFormerTrainer):
    """Trainer of a [`QFormerForPretraining`] on captioned images.

    **Evaluation** logs each loss (`eval_itc_loss`, ...) and their weighted sum (`eval_loss`). It also logs the recall
    of retrieval by contrast among all rows, such as `eval_image_to_text_r1`. All are logged again with the images
    shuffled among the rows (`eval_loss_shuffled`, ...). Then the recall is at chance. A table of the retrieved captions
    and two plots are written to the output folder (`evaluation_files.py`).

    **Loss.** The log of training has each loss, too. A row alone has no wrong pairs, so a last batch of one row is left
    out.

    Args:
        args, kwargs: as for [`QFormerTrainer`]. The collator is a [`PretrainingCollator`].

    Example:

    ```python
    >>> trainer = PretrainingTrainer(
    ...     model=model,
    ...     args=QFormerTrainingArguments(output_dir="outputs/stage1", metric_for_best_model="mean_recall"),
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
    evaluation_stem = "retrieval"

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.logged_losses: dict[str, list[torch.Tensor]] = {}  # of the batches since the last log entry
        config = self.model.config
        compares = bool(config.itc_weight or config.itm_weight)
        rows = 0 if isinstance(self.train_dataset, CaptionStream) else len(self.train_dataset)
        if compares and self.args.world_size == 1 and rows % self.args.train_batch_size == 1:
            self.args.dataloader_drop_last = True
            logger.info("The last batch of an epoch has one row, which has no wrong pairs: it is left out.")

    # --- Training -----------------------------------------------------------------------------------------------------

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
        losses, similarity, image_of_text = self._run(rows, "right inputs")
        shuffled_rows = ShuffledImages(rows)
        shuffled_losses, _, _ = self._run(shuffled_rows, "shuffled inputs")
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
        self, rows: CaptionDataset | ShuffledImages, description: str
    ) -> tuple[dict[str, float], torch.Tensor, torch.Tensor]:
        """Run the model on all rows once, in batches that do not depend on the number of processes.

        Returns:
            The losses by name, similarities of images and texts `[N, M]`, and the image of each text `[M]`, in the
            order of the rows.
        """
        model = self.accelerator.unwrap_model(self.model).eval()
        sums = {name: 0.0 for name in LOSSES if getattr(model.config, name.replace("loss", "weight"))}
        counts = dict.fromkeys(sums, 0)
        vectors: list[tuple[list[int], list[torch.Tensor], list[torch.Tensor]]] = []
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
                with self.compute_loss_context_manager():
                    outputs = model(**inputs)
                mask = inputs["attention_mask"]
                texts = mask.any(dim=-1)  # [b, K]
                # Means of contrast are over images, those of matching over texts, those of generation over tokens.
                sizes = torch.stack([mask.new_tensor(len(indices)), texts.sum(), mask.sum() - texts.sum()])
                sizes = self.accelerator.reduce(sizes, reduction="sum").tolist()
                for name, size in zip(LOSSES, sizes, strict=True):
                    if name in sums:
                        loss = self.accelerator.reduce(outputs[name].detach().float(), reduction="mean").item()
                        sums[name] += loss * size
                        counts[name] += size
                text_vectors = outputs.text_vectors.float().cpu().split(texts.sum(dim=1).tolist())
                vectors.append((indices, list(outputs.image_vectors.float().cpu()), list(text_vectors)))
        losses = {name: total / counts[name] for name, total in sums.items()}
        weighted = sum(getattr(model.config, name.replace("loss", "weight")) * loss for name, loss in losses.items())
        similarity, image_of_text = similarities(gather_object(vectors), self.args.device)
        return {"loss": weighted, **losses}, similarity, image_of_text

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


def similarities(
    parts: list[tuple[list[int], list[torch.Tensor], list[torch.Tensor]]], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the similarity of each image and each text `[N, M]`, and the image of each text `[M]`.

    Args:
        parts: for each batch of each process, the rows, and the vectors of their images (`[Q, E]` each) and of their
            texts (`[K, E]` each).
        device: device to compute on.
    """
    of_rows = ((row, images[at], texts[at]) for rows, images, texts in parts for at, row in enumerate(rows))
    in_order = sorted(of_rows, key=lambda part: part[0])
    counts = [len(texts) for _, _, texts in in_order]
    texts = torch.cat([texts for _, _, texts in in_order]).to(device)  # [M, E]
    images = torch.stack([image for _, image, _ in in_order])  # [N, Q, E]
    at_once = max(1, MAX_SIMILARITIES // (images.shape[1] * len(texts)))
    blocks = [(block.to(device) @ texts.T).amax(dim=1).cpu() for block in images.split(at_once)]
    return torch.cat(blocks), torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
