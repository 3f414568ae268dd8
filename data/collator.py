"""Collators that convert rows of images and captions to a batch of tensors."""

from collections.abc import Sequence
from typing import Any

import torch

from ..processing_qformer import QFormerCaptionerProcessor, QFormerPretrainingProcessor
from .dataset import CaptionRow
from .features import read_features


class CaptionCollator:
    """Collator that converts rows of a [`CaptionDataset`] to a batch for a [`QFormerCaptioner`].

    Args:
        processor: the captioner's processor.
        max_caption_length: maximum number of tokens of a caption. Longer captions are cut.

    Returns:
        A dict with

        - `pixel_values` (`[B, 3, H, W]`, or `[B, F, 3, H, W]` with videos), or `image_embeds` (`[B, N, Dv]`) for rows
          with precomputed features;
        - `frame_attention_mask` (`[B, F]`), only if videos differ in their number of frames;
        - `image_attention_mask` (bool `[B, N]`), only if rows differ in their number of features;
        - `input_ids` and `attention_mask` (`[B, P]`) of the prompts;
        - `labels` (`[B, K, T]`): all captions of each image, with the end-of-sequence token, padded with -100. If an
          image has fewer than `K` captions, its remaining rows contain only -100.

    Example:

    ```python
    >>> collate = CaptionCollator(model.processor)  # doctest: +SKIP
    >>> loss = model(**collate([dataset[0], dataset[1]])).loss  # doctest: +SKIP
    ```
    """

    def __init__(self, processor: QFormerCaptionerProcessor, max_caption_length: int | None = None):
        self.processor = processor
        self.max_caption_length = max_caption_length

    def __call__(self, rows: Sequence[CaptionRow]) -> dict[str, torch.Tensor]:
        prompts = [row.get("prompt") or self.processor.prompt for row in rows]
        return {**batch_of(self.processor, rows, prompts), "labels": self._labels(rows, prompts)}

    def _labels(self, rows: Sequence[CaptionRow], prompts: list[str]) -> torch.Tensor:
        """Return the token ids of the captions, `[B, K, T]`, padded with -100."""
        token_ids = [
            [self.processor.encode_caption(caption, prompt, self.max_caption_length) for caption in row["captions"]]
            for prompt, row in zip(prompts, rows, strict=True)
        ]
        max_captions = max(len(captions) for captions in token_ids)
        max_tokens = max(len(caption) for captions in token_ids for caption in captions)
        labels = torch.full((len(rows), max_captions, max_tokens), -100)
        for b, captions in enumerate(token_ids):
            for k, caption in enumerate(captions):
                labels[b, k, : len(caption)] = torch.tensor(caption)
        return labels


class RewardCollator(CaptionCollator):
    """Collator that adds what reward functions read to the batch of a [`CaptionCollator`].

    Args:
        processor, max_caption_length: as for [`CaptionCollator`].

    Returns:
        The dict of a [`CaptionCollator`], with

        - `prompts`: the prompt of each row;
        - `columns`: a dict of lists with an entry for each row: `references`, the captions of the row, `image`, if the
          rows have images, and the other columns that all rows have.
    """

    def __call__(self, rows: Sequence[CaptionRow]) -> dict[str, Any]:
        others = [row.get("columns", {}) for row in rows]
        shared = set.intersection(*(set(cells) for cells in others))
        columns: dict[str, list[Any]] = {name: [cells[name] for cells in others] for name in sorted(shared)}
        columns["references"] = [row["captions"] for row in rows]
        if "image" in rows[0]:
            columns["image"] = [row["image"] for row in rows]
        prompts = [row.get("prompt") or self.processor.prompt for row in rows]
        return {**super().__call__(rows), "prompts": prompts, "columns": columns}


class PretrainingCollator:
    """Collator that converts rows of a [`CaptionDataset`] to a batch for a [`QFormerForPretraining`].

    Args:
        processor: the processor of the model.
        max_caption_length: maximum number of tokens of a caption, `[CLS]` and `[SEP]` included. Longer ones are cut.

    Returns:
        A dict with

        - the images or their features, as [`CaptionCollator`] returns them;
        - `input_ids` and `attention_mask` (`[B, K, T]`): all captions of each image as `[CLS] caption [SEP]`. If an
          image has fewer than `K` captions, its remaining rows are masked.

    Example:

    ```python
    >>> collate = PretrainingCollator(model.processor)  # doctest: +SKIP
    >>> loss = model(**collate([dataset[0], dataset[1]])).loss  # doctest: +SKIP
    ```
    """

    def __init__(self, processor: QFormerPretrainingProcessor, max_caption_length: int | None = None):
        self.processor = processor
        self.max_caption_length = max_caption_length

    def __call__(self, rows: Sequence[CaptionRow]) -> dict[str, torch.Tensor]:
        texts = [caption for row in rows for caption in row["captions"]]
        batch = batch_of(self.processor, rows, texts, max_length=self.max_caption_length)
        counts = [len(row["captions"]) for row in rows]
        for name, padding in (("input_ids", self.processor.tokenizer.pad_token_id), ("attention_mask", 0)):
            tokens = batch[name].split(counts)  # of each image, [captions, T]
            batch[name] = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=padding)
        return batch


def batch_of(
    processor: QFormerCaptionerProcessor | QFormerPretrainingProcessor,
    rows: Sequence[CaptionRow],
    texts: list[str],
    **options: Any,
) -> dict[str, torch.Tensor]:
    """Return the images of rows, or their features, and texts as a processor prepares them.

    Args:
        processor: the processor.
        rows: the rows. If the first has an image, all have one.
        texts: the texts.
        options: options of the processor.
    """
    if "image" in rows[0]:
        return dict(processor(images=[row["image"] for row in rows], text=texts, **options))
    features = read_features([row["image_embeds"] for row in rows])
    batch = dict(processor(text=texts, **options))
    return batch | {name: value for name, value in features._asdict().items() if value is not None}
