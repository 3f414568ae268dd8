"""The outputs of a run together with its record."""

from typing import Any

from .items import KeySet, hashes_of
from .outputs import Output, OutputRow
from .progress import Progress


class Writer:
    """Outputs of a run with its record.

    Args:
        outputs: the outputs.
        progress: the record, or `None` without outputs.
    """

    def __init__(self, outputs: list[Output], progress: Progress | None):
        self.outputs, self.progress = outputs, progress

    @property
    def done(self) -> KeySet:
        """Keys of the images that need no caption."""
        return KeySet() if self.progress is None else self.progress.done

    @property
    def failed(self) -> KeySet:
        """Keys of the images that failed in a pass that was killed."""
        return KeySet() if self.progress is None else self.progress.failed

    @property
    def is_of_texts(self) -> bool:
        """`True` if texts beside images are the only output."""
        return bool(self.outputs) and not any(output.is_file for output in self.outputs)

    @property
    def num_captioned(self) -> int:
        """Number of images with captions."""
        return 0 if self.progress is None else self.progress.num_captioned

    @property
    def num_failed(self) -> int:
        """Number of images that failed in the current pass."""
        return 0 if self.progress is None else self.progress.num_failed

    def begin(self, settings: dict[str, Any], overwrite: bool) -> None:
        """Begin the run, or open the outputs as they were after the last batch in the record.

        Args:
            settings: everything that decides the captions, as plain JSON.
            overwrite: replace an existing run.

        Raises:
            InputError: if the record is of a run with other settings, or an output is not what the record says.
        """
        if self.progress is None:
            return
        was_killed = self.progress.ending is None
        for output, ending in zip(self.outputs, self.progress.ending or (), strict=False):
            if not overwrite:
                output.check(ending)
        self.progress.begin(settings, overwrite)
        records = self.progress.records
        for number, output in enumerate(self.outputs):
            output.resume(None if records is None else records[number])
            if records is not None and was_killed:
                output.apply(records[number])

    def write(self, rows: list[OutputRow]) -> None:
        """Write a batch."""
        if self.progress is None:
            return
        captioned = [row for row in rows if row.row.error is None]
        failed = [row for row in rows if row.row.error is not None]
        records = [output.prepare(captioned) for output in self.outputs]
        keys, others = (hashes_of(row.item for row in some) for some in (captioned, failed))
        self.progress.commit(keys, others, records)
        for output, record in zip(self.outputs, records, strict=True):
            output.apply(record)

    def finish(self) -> None:
        """Complete the outputs after the last batch. The record of a run that wrote only texts is deleted."""
        if self.progress is None:
            return
        ending = [output.finish() for output in self.outputs]
        if self.is_of_texts:
            self.progress.remove()
        else:
            self.progress.finish(ending)

    def close(self) -> None:
        """Close the outputs, and then the record, whose lock ends."""
        for output in self.outputs:
            output.close()
        if self.progress is not None:
            self.progress.close()
