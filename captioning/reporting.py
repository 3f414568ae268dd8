"""Progress of a run: a bar on a terminal, or a line each minute in a log. Errors, and captions without an output."""

import contextlib
import sys
import threading
import time
from typing import TYPE_CHECKING

from tqdm import tqdm

from ..common.errors import printable
from ..common.logging import get_logger

if TYPE_CHECKING:
    from .outputs import OutputRow
    from .run import Wanted
    from .sources import Source

logger = get_logger(__name__)

SECONDS_PER_LINE = 60.0


class Reporter:
    """Display of the progress of a run, in a `with` block.

    The images are counted in a thread, because that can take minutes.

    Args:
        source: the images.
        wanted: those that need a caption.
        prints: print captions to stdout instead of lines about the progress.
        num_captioned: number of images that have captions already.
        num_failed: number of images that have failed already.
    """

    def __init__(self, source: "Source", wanted: "Wanted", prints: bool, num_captioned: int = 0, num_failed: int = 0):
        self.source, self.wanted, self.prints = source, wanted, prints
        self.num_captioned, self.num_failed = num_captioned, num_failed
        self.begun_with = num_captioned + num_failed
        self.total: int | None = None
        self.start = self.last_line = time.monotonic()

    def __enter__(self) -> "Reporter":
        # `None` shows the bar only on a terminal.
        self.bar = tqdm(initial=self.begun_with, unit="images", disable=None, leave=not self.prints)
        self.counter = threading.Thread(target=self._count, daemon=True)
        self.counter.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def _count(self) -> None:
        with contextlib.suppress(Exception):  # whoever reads the images gets the same error
            self.total = self.source.count()
            self.bar.total = self.total_of_run()

    def tell(self, rows: "list[OutputRow]") -> None:
        """Show a batch that was written."""
        for output in rows:
            if output.row.error is not None:
                self.num_failed += 1
                self.bar.write(printable_line(f"error: {output.row.error}"), file=sys.stderr)
                continue
            self.num_captioned += 1
            if self.prints:
                for text in output.row.captions:
                    self.bar.write(printable_line(f"{output.item.image_id}: {text}"))
        self.bar.total = self.total_of_run()
        self.bar.update(len(rows))
        if not self.prints and self.bar.disable and time.monotonic() - self.last_line >= SECONDS_PER_LINE:
            self.last_line = time.monotonic()
            logger.info("%s", self.line())

    def total_of_run(self) -> int | None:
        """Return the number of images without those that were skipped so far, or `None` if it is unknown."""
        return None if self.total is None else self.total - self.wanted.num_skipped - self.wanted.num_repeated

    def line(self) -> str:
        """Return the state of the run as a line: images done, failed and remaining, and the rate."""
        done, total = self.num_captioned + self.num_failed, self.total_of_run()
        rate = (done - self.begun_with) / max(time.monotonic() - self.start, 1e-9)
        line = f"{done:,} images done, {self.num_failed:,} of them failed, {rate:,.1f} images/s"
        if total is not None:
            remaining = max(total - done, 0)
            line += f", {remaining:,} remaining"
            if rate > 0:
                line += f" ({remaining / rate / 60:,.0f} minutes)"
        return line


def printable_line(text: str) -> str:
    """Return a text as one line in which every control character is escaped."""
    return printable(text).replace("\n", r"\n").replace("\t", r"\t")
