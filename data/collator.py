"""TODO."""

import torch

from ..processing_qformer import QFormerCaptionerProcessor


class CaptionCollator:
    """Rows of a [`CaptionDataset`] to a batch of a [`QFormerCaptioner`].

    Returns `pixel_values` `[B, 3, H, W]` or `image_embeds` `[B, N, Dv]`, `input_ids` and `attention_mask` `[B, P]` of
    the prompt, and `labels` `[B, K, T]`: all captions of each image, end-of-sequence included, padded with -100 (a row
    with fewer captions than the others has rows of nothing but -100).

    Args:
        processor: the captioner's.
        max_caption_length: cut longer captions to so many tokens.

    Example:

    ```python
    >>> collate = CaptionCollator(model.processor)  # doctest: +SKIP
    >>> loss = model(**collate([dataset[0], dataset[1]])).loss  # doctest: +SKIP
    ```
    """

    def __init__(self, processor: QFormerCaptionerProcessor, max_caption_length: int | None = None):
        self.processor = processor
        self.max_caption_length = max_caption_length

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        prompts = [row.get("prompt") or self.processor.prompt for row in rows]
        if "image" in rows[0]:
            batch = self.processor(images=[row["image"] for row in rows], text=prompts)
        else:
            batch = self.processor(text=prompts)
            features, indices, views = zip(*(row["image_embeds"] for row in rows), strict=True)
            batch["image_embeds"] = features[0].read(indices, views)  # one copy, from file to batch
        ids = [
            [self.processor.encode_caption(caption, prompt, self.max_caption_length) for caption in row["captions"]]
            for prompt, row in zip(prompts, rows, strict=True)
        ]
        number = max(len(captions) for captions in ids)
        length = max(len(caption) for captions in ids for caption in captions)
        labels = torch.full((len(rows), number, length), -100)
        for b, captions in enumerate(ids):
            for k, caption in enumerate(captions):
                labels[b, k, : len(caption)] = torch.tensor(caption)
        return {**batch, "labels": labels}
