"""Image features that a data set already holds in a column of embeddings."""

from collections.abc import Iterator, Sequence

import datasets
import numpy as np
import pyarrow as pa
import torch
from transformers import AutoConfig

from ..backbones_qformer import loading_error, vision_config_of
from ..common.errors import UNUSABLE, InputError
from .feature_shards import FeatureBatch
from .skipped_rows import SkippedRow


class EmbeddingsColumn:
    """Source of features that reads them from a column of a data set.

    Args:
        rows: rows of each split. Only the column of embeddings is used.
        column: name of the column, which holds lists of numbers `[D]`, `[N, D]` or `[1, N, D]`.
        name_or_path: Hub id or folder of the vision encoder that computed the embeddings.
        revision: branch, tag or commit of the vision encoder on the Hub.
        dtype: dtype of the stored features, "float16" or "float32".

    Attributes:
        shape (`tuple[int, int]`): `(N, Dv)` of the features of an image.
        compute_dtype: `None`, because nothing is computed.

    Raises:
        InputError: if the column is empty, or its embeddings have another width than the features of the vision
            encoder.
        OSError: if the vision encoder's configuration cannot be loaded.
    """

    compute_dtype: str | None = None

    def __init__(
        self, rows: dict[str, datasets.Dataset], column: str, name_or_path: str, revision: str | None, dtype: str
    ):
        self.rows = rows
        self.column = column
        self.dtype = dtype
        self.shape = self._first_shape()
        width = hidden_size_of(name_or_path, revision)
        if width != self.shape[1]:
            raise InputError(
                f"The embeddings in the column {column!r} have {self.shape[1]} numbers, and features of "
                f"{name_or_path!r} have {width}: name the vision model that computed them."
            )

    def _first_shape(self) -> tuple[int, int]:
        split, rows = next(iter(self.rows.items()))
        for row in range(len(rows)):
            (embeddings,) = self._read(split, range(row, row + 1))
            if embeddings is not None:
                tokens, width = embeddings.shape
                return tokens, width
        raise InputError(f"The column {self.column!r} of the split {split!r} is empty.")

    def batches(self, split: str, views: int, row_batches: Sequence[range]) -> Iterator[FeatureBatch]:
        """Yield the features of each batch of rows.

        Args:
            split: name of the split.
            views: number of views of each image, always 1.
            row_batches: numbers of the rows in each batch.

        Raises:
            InputError: if embeddings differ in shape, or a number does not fit the dtype.
        """
        for batch in row_batches:
            skipped: list[SkippedRow] = []
            present = []
            for row, embeddings in zip(batch, self._read(split, batch), strict=True):
                if embeddings is None:
                    skipped.append({"split": split, "row": row, "file": None, "reason": "The row has no embeddings."})
                elif tuple(embeddings.shape) != self.shape:
                    raise InputError(
                        f"The embeddings in the column {self.column!r} differ in shape: those of row {row} of "
                        f"{split!r} are {list(embeddings.shape)}, others {list(self.shape)}."
                    )
                else:
                    present.append(embeddings)
            features = torch.stack(present).unsqueeze(1) if present else None
            yield FeatureBatch.from_tensor(features, split, batch, skipped, (views, *self.shape), self.dtype)

    def _read(self, split: str, rows: range) -> list[torch.Tensor | None]:
        """Read the cells of some rows as `[N, Dv]` in float32. Empty cells are `None`."""
        cells = self.rows[split].with_format("arrow")[rows.start : rows.stop][self.column]
        return [self._embeddings(cell, split, row) for row, cell in zip(rows, cells, strict=True)]

    def _embeddings(self, cell: pa.Scalar, split: str, row: int) -> torch.Tensor | None:
        if isinstance(cell, pa.ExtensionScalar):  # `datasets.Array2D`
            cell = cell.value
        if cell is None or not cell.is_valid:
            return None
        values, shape = flatten_lists(cell)
        if len(shape) == 3 and shape[0] == 1:
            shape = shape[1:]
        is_number = values is not None and (pa.types.is_floating(values.type) or pa.types.is_integer(values.type))
        if values is None or not is_number or len(shape) not in (1, 2) or not all(shape):
            lengths = f"lists of lengths {shape}" if shape else "not a list"
            raise InputError(
                f"The column {self.column!r} must hold numbers in lists [D], [N, D] or [1, N, D], but row {row} of "
                f"{split!r} is {cell.type}, {lengths}."
            )
        array = values.to_numpy(zero_copy_only=False).astype(np.float32)
        return torch.from_numpy(array).view(-1, shape[-1] or 1)


def flatten_lists(cell: pa.Scalar) -> tuple[pa.Array | None, list[int | None]]:
    """Flatten nested lists.

    Returns:
        The values, and the length of the lists on each level, which is `None` where the lengths differ. For a cell that
        is not a list, `None` and no lengths.
    """
    if not isinstance(cell, pa.ListScalar):
        return None, []
    values = cell.values
    shape: list[int | None] = [len(values)]
    while is_list(values.type):
        lengths = values.value_lengths().unique().to_pylist()
        shape.append(lengths[0] if len(lengths) == 1 else None)
        values = values.flatten()
    return values, shape


def is_list(kind: pa.DataType) -> bool:
    """Return whether an Arrow type is one of the list types."""
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def hidden_size_of(name_or_path: str, revision: str | None) -> int:
    """Return the width of the features of a vision encoder, from its configuration.

    Raises:
        OSError: if the configuration cannot be loaded.
    """
    try:
        config = AutoConfig.from_pretrained(name_or_path, revision=revision, trust_remote_code=False)
        return vision_config_of(config).hidden_size
    except (*UNUSABLE, OSError) as error:
        raise loading_error("vision_model", name_or_path, revision, error) from error
