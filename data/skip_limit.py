"""Limit on the rows whose image cannot be read, checked before training or precomputing starts."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

from ..common.errors import InputError, one_line

Row = TypeVar("Row")

SAMPLE_ROWS = 2000  # an even sample of larger splits; the share in it deviates by less than two percent
STREAM_ROWS = 1000
THREADS = 4  # each may hold one of the largest images
MAX_REASON_CHARACTERS = 220


@dataclass(frozen=True)
class SkipLimit:
    """Largest number of rows of a split whose image may be unreadable.

    Args:
        value: a share of the rows if it is at most 1, otherwise a number of rows.

    Example:

    ```python
    >>> SkipLimit(0.1).check("train", 200, 200, [OSError("There is no image file 'a.jpg'.")])
    >>> SkipLimit(0).check("train", 200, 200, [OSError("There is no image file 'a.jpg'.")])
    Traceback (most recent call last):
    qformer_captioner.common.errors.InputError: The images of 1 of 200 rows of train cannot be read ...
    ```
    """

    value: float = 0.1

    def check(self, name: str, num_rows: int, tried: int, errors: Sequence[OSError]) -> None:
        """Check the unreadable images among some rows of a split.

        Args:
            name: name of the split.
            num_rows: number of rows of the split.
            tried: number of rows whose image was opened.
            errors: the errors of those that could not be opened.

        Raises:
            InputError: if there are too many.
        """
        share = self.value if self.value <= 1 else self.value / max(num_rows, 1)
        if len(errors) > share * tried:
            tried_rows = f"{tried:,} rows" if tried == num_rows else f"{tried:,} rows that were tried"
            reason = one_line(errors[0], MAX_REASON_CHARACTERS).removesuffix(".")
            raise InputError(
                f"The images of {len(errors):,} of {tried_rows} of {name[:100]} cannot be read ({reason}): correct the "
                f"data, or allow more than {self.value:g} with --max_skipped."
            )


def sample_of(rows: Sequence[Row]) -> Sequence[Row]:
    """Return the rows, or an even sample of more than 2,000 rows."""
    if len(rows) <= SAMPLE_ROWS:
        return rows
    return [rows[number * len(rows) // SAMPLE_ROWS] for number in range(SAMPLE_ROWS)]


def try_images(rows: Iterable[Row], open_image: Callable[[Row], object]) -> Iterator[tuple[Row, OSError | None]]:
    """Open the images of rows in several threads, and yield each row with its error or `None`.

    Args:
        rows: the rows, or their numbers. They are read in small portions.
        open_image: function that opens the image of a row, and raises an OSError if it cannot.
    """

    def error_of(row: Row) -> OSError | None:
        try:
            open_image(row)
        except OSError as error:
            return error
        return None

    rows = iter(rows)
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        while portion := list(islice(rows, 16 * THREADS)):
            yield from zip(portion, pool.map(error_of, portion), strict=True)
