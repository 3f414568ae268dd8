"""Captions as a function of batches of columns, for engines that run it in many processes: [`Captions`].

`datasets.map`, Ray Data and Spark's `mapInPandas` all call a function with a batch of columns, in processes of their
own. A loaded model cannot be sent to them, so each process loads it at its first batch.
"""

import os
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ..common.arguments import DTYPES, in_words
from ..common.errors import InputError

if TYPE_CHECKING:
    import torch

    from ..captioning_qformer import QFormerCaptioningModel
    from .rows import CaptionedRow


class Captions:
    """Function from a batch of columns to the same columns and their captions, which can be pickled.

    The model is loaded in the process that calls it, at its first batch, and stays there. Pickling leaves it out.

    Args:
        model: folder or Hub id of a captioner, an adapter or a model of stage 1. All processes must reach it.
        revision: branch, tag or commit on the Hub.
        image_column: column of images, in the forms that [`caption_rows`] takes: bytes, paths, dicts of `datasets`,
            arrays, PIL images.
        caption_column: column for the captions. Further columns have its name and an ending.
        prompt: text that the captions continue; by default the captioner's own.
        batch_size: largest number of images in a forward pass. Larger batches are split.
        dtype: dtype of the weights, such as `"bfloat16"`; by default the dtype in which each part was saved.
        score: add scores of the captions, too.
        generation: options of the captioner's `generate`, such as `num_beams=5`.

    Raises:
        InputError: if `batch_size` is below 1, or `dtype` is a text that names no dtype of weights.

    Example:

    ```python
    >>> from qformer_captioner import Captions
    >>> captions = Captions("outputs/own_images", num_beams=5)
    >>> captions({"image": ["dog.jpg", b"damaged"]})  # doctest: +SKIP
    {'image': ['dog.jpg', b'damaged'],
     'caption': ['a dog in the snow', ''],
     'caption_error': ['', 'An image without a name cannot be read: ...']}
    >>> dataset.map(captions, batched=True, with_rank=True, num_proc=2)  # doctest: +SKIP
    ```
    """

    def __init__(
        self,
        model: str | os.PathLike,
        revision: str | None = None,
        *,
        image_column: str = "image",
        caption_column: str = "caption",
        prompt: str | None = None,
        batch_size: int = 8,
        dtype: "str | torch.dtype | None" = None,
        score: bool = False,
        **generation: Any,
    ):
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, not {batch_size}.")
        if isinstance(dtype, str) and dtype not in DTYPES:
            raise InputError(f"dtype must be {in_words(DTYPES)}, not {dtype!r}.")
        self.model_name = os.fspath(model)
        self.revision = revision
        self.image_column = image_column
        self.caption_column = caption_column
        self.prompt = prompt
        self.batch_size = batch_size
        self.dtype = dtype
        self.score = score
        self.generation = generation
        self._model: QFormerCaptioningModel | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_model": None}

    def __call__(self, batch: Any, rank: int | None = None) -> Any:
        """Caption a batch.

        Args:
            batch: columns of equal length: a dict of lists or of numpy arrays, a `LazyBatch` of `datasets`, or a
                `DataFrame` of pandas.
            rank: number of the process, which chooses the GPU. By default the first GPU that the process has.

        Returns:
            The same kind of batch with these columns, too, whose types never change:

            - `caption`: the caption, or a list of captions if `num_return_sequences` is above 1; empty texts for a row
              that cannot be read;
            - `caption_error`: why a row cannot be read, otherwise an empty text;
            - `caption_score`, `caption_matching_score`: with `score=True`, the mean log-likelihood in nats and, of a
              model of stage 1 that was trained to match, the probability that the caption fits. NaN for a row that
              cannot be read, and lists where captions are lists.

        Raises:
            InputError: if the captioner cannot be loaded, or the image column does not exist.
            ValueError: for options of `generate` that contradict each other.
        """
        if self.image_column not in batch:
            raise InputError(
                f"The batch has no column {self.image_column!r} but {', '.join(map(repr, batch))}: name the column of "
                "images as `image_column`."
            )
        columns = self._columns(self.caption(list(batch[self.image_column]), rank))
        if isinstance(batch, pd.DataFrame):
            return batch.assign(**columns)
        return batch | columns  # a `LazyBatch` of `datasets` remembers which columns have not changed

    def caption(self, images: list[Any], rank: int | None = None) -> "list[CaptionedRow]":
        """Caption images, with an error for each that cannot be read.

        Args:
            images: images or features, as [`caption_rows`] takes them.
            rank: number of the process, which chooses the GPU.

        Raises:
            InputError, ValueError: as the call does.
        """
        from .rows import caption_rows

        model = self.load(rank)
        pieces = (images[start : start + self.batch_size] for start in range(0, len(images), self.batch_size))
        options = {"score": self.score, **self.generation}
        return [row for piece in pieces for row in caption_rows(model, piece, self.prompt, **options)]

    def load(self, rank: int | None = None) -> "QFormerCaptioningModel":
        """Return the model, which is loaded at the first call.

        Args:
            rank: number of the process, which chooses the GPU.

        Raises:
            InputError: if the captioner cannot be loaded.
        """
        if self._model is None:
            from transformers.utils.logging import disable_progress_bar

            from ..common.devices import device_of
            from ..hub.load import load_captioner

            disable_progress_bar()
            self._model = load_captioner(self.model_name, self.revision, self.dtype or "auto", device_of(rank))
        return self._model

    def _columns(self, rows: "list[CaptionedRow]") -> dict[str, list[Any]]:
        """Return the new columns. Engines take the types of columns from their first rows, so there are no nulls."""
        from .rows import captions_of_a_row, gives_matching_scores

        model = self.load()
        count = captions_of_a_row(model, self.generation)

        def column(values: list[list[Any]], missing: Any) -> list[Any]:
            filled = [own or [missing] * count for own in values]
            return filled if count > 1 else [own[0] for own in filled]

        columns = {
            self.caption_column: column([row.captions for row in rows], ""),
            f"{self.caption_column}_error": [row.error or "" for row in rows],
        }
        if self.score:
            columns[f"{self.caption_column}_score"] = column([row.scores for row in rows], np.nan)
            if gives_matching_scores(model):
                scores = column([row.matching_scores for row in rows], np.nan)
                columns[f"{self.caption_column}_matching_score"] = scores
        return columns
