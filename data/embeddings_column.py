"""Features that a data set already holds in a column of embeddings."""

from collections.abc import Iterator, Sequence

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from ..common.errors import InputError
from .feature_shards import FeatureBatch, SplitLayout
from .skipped_rows import SkippedRow

ROWS_PER_CHUNK = 10_000
EMPTY = "The row has no embeddings."


class EmbeddingsColumn:
    """Source of features that reads them from a column of a data set.

    Args:
        rows: rows of each split. Only the column of embeddings is used.
        column: name of the column, which holds lists of numbers `[D]`, `[N, D]` or `[1, N, D]`. N may differ.

    Attributes:
        shape (`tuple[int | None, int]`): `(N, Dv)` of the features of a row. N is `None` if rows differ in length.
        mean_length (`float`): mean number of features of a row.
        compute_dtype: `None`, because nothing is computed.

    Raises:
        InputError: if all rows are empty, or the first that is not holds something else than embeddings.
    """

    compute_dtype: str | None = None

    def __init__(self, rows: dict[str, datasets.Dataset], column: str):
        self.rows = {split: own.with_format("arrow") for split, own in rows.items()}
        self.column = column
        width = self._first_width()
        lengths = np.concatenate([self._lengths(split) for split in rows])
        lengths = lengths[lengths > 0]
        is_equal = (lengths == lengths[0]).all()
        self.shape: tuple[int | None, int] = (lengths[0].item() if is_equal else None, width)
        self.mean_length: float = lengths.mean().item()

    def _first_width(self) -> int:
        for split, rows in self.rows.items():
            for row in range(len(rows)):
                (embeddings,) = self._read(split, range(row, row + 1))
                if embeddings is not None:
                    return embeddings.shape[1]
        splits = " and ".join(map(repr, self.rows))
        raise InputError(f"The column {self.column!r} of {splits} is empty: choose another with --embeddings_column.")

    def _lengths(self, split: str) -> np.ndarray:
        """Return the number of features of each row, 0 for an empty cell. The values are not read."""
        rows = self.rows[split]
        lengths = [np.zeros(0, np.int64)]
        for start in range(0, len(rows), ROWS_PER_CHUNK):
            cells = storage(rows[start : start + ROWS_PER_CHUNK][self.column])
            outer = pc.list_value_length(cells).fill_null(0).to_numpy()
            inner = pc.list_flatten(cells)
            if not is_list(inner.type):  # [D]
                outer = np.minimum(outer, 1)
            elif is_list(inner.type.value_type):  # [1, N, D]
                rows_of_inner = np.repeat(np.arange(len(outer)), outer)
                weights = pc.list_value_length(inner).fill_null(0).to_numpy()
                outer = np.bincount(rows_of_inner, weights, minlength=len(outer))
            lengths.append(outer.astype(np.int64))
        return np.concatenate(lengths)

    def batches(self, split: str, layout: SplitLayout, row_batches: Sequence[range]) -> Iterator[FeatureBatch]:
        """Yield the features of each batch of rows.

        Args:
            split: name of the split.
            layout: its layout, with one view.
            row_batches: numbers of the rows in each batch.

        Raises:
            InputError: if embeddings differ in width, or a number does not fit the dtype.
        """
        width = self.shape[1]
        for batch in row_batches:
            skipped: list[SkippedRow] = []
            present = [torch.zeros(0, width)]
            for row, embeddings in zip(batch, self._read(split, batch), strict=True):
                if embeddings is None:
                    skipped.append({"split": split, "row": row, "file": None, "reason": EMPTY})
                elif embeddings.shape[1] != width:
                    raise InputError(
                        f"The embeddings in the column {self.column!r} differ in width: those of row {row} of "
                        f"{split!r} have {embeddings.shape[1]} numbers each, others {width}."
                    )
                else:
                    present.append(embeddings)
            lengths = np.array([[len(embeddings)] for embeddings in present[1:]], np.int64).reshape(-1, 1)
            yield FeatureBatch.from_tensor(torch.cat(present), lengths, batch, skipped, layout)

    def _read(self, split: str, rows: range) -> list[torch.Tensor | None]:
        """Read the cells of some rows as `[N, Dv]` in float32. Empty cells are `None`."""
        cells = self.rows[split][rows.start : rows.stop][self.column]
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
        if values is not None and len(values) == 0 and (is_number or pa.types.is_null(values.type)):
            return None
        if values is None or not is_number or len(shape) not in (1, 2) or not all(shape):
            lengths = f"lists of lengths {shape}" if shape else "not a list"
            raise InputError(
                f"The column {self.column!r} must hold numbers in lists [D], [N, D] or [1, N, D], but row {row} of "
                f"{split!r} is {cell.type}, {lengths}."
            )
        array = values.to_numpy(zero_copy_only=False).astype(np.float32)
        return torch.from_numpy(array).view(-1, shape[-1] or 1)


def storage(cells: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return cells as lists, which `datasets.Array2D` wraps in a type of its own."""
    if isinstance(cells.type, pa.ExtensionType):
        return pa.chunked_array([chunk.storage for chunk in cells.chunks], cells.type.storage_type)
    return cells


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
