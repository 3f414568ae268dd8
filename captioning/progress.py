"""Record of a run beside its output: which images are done, and up to where the output holds whole batches.

The file has one line of JSON for each event. It begins with the settings of the run. Each batch adds a line after it
was written, so whatever a killed run wrote later is known to be incomplete. A line says that all images were tried.
"""

import base64
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..common.errors import InputError, one_line
from .items import KeySet

SUFFIX = ".progress"


class Progress:
    """Record of a run, locked while this object is open.

    The lock belongs to the process, so it ends with the process, however that ends.

    Args:
        path: the record. It is created if it does not exist.
        output: name of the output, for messages; `None` for texts beside images.

    Attributes:
        done (`KeySet`): keys of the images that have a caption.
        failed (`KeySet`): keys of the images that failed in a pass that has not ended. They are not tried again in it.
        num_captioned (`int`): number of images with captions.
        num_failed (`int`): number of images that failed in the current pass.
        records: what each output said of the last batch; `None` before the first one.
        ending: what each output said at the end of the run; `None` for a run that has not ended.

    Raises:
        InputError: if another process uses the record, or it cannot be written.
    """

    def __init__(self, path: str | os.PathLike, output: str | None):
        self.path, self.output = Path(path), output
        self.name = f"the texts in {str(self.path.parent)!r}" if output is None else f"the output {output!r}"
        self.done, self.failed = KeySet(), KeySet()
        self.num_captioned = self.num_failed = 0
        self.records: list[Any] | None = None
        self.settings: dict[str, Any] | None = None
        self.ending: list[Any] | None = None
        self._failed: list[np.ndarray] = []
        try:
            self._file = locked(self.path)
        except BlockingIOError as error:
            raise InputError(f"Another process writes {self.name}: wait for its end.") from error
        except OSError as error:
            raise InputError(f"{str(self.path)!r} cannot be written ({error.strerror}).") from error
        self._read()

    def begin(self, settings: dict[str, Any], overwrite: bool = False) -> None:
        """Begin or continue the run with these settings.

        Args:
            settings: everything that decides the captions, as plain JSON.
            overwrite: forget an existing run.

        Raises:
            InputError: if the record is of a run with other settings.
        """
        settings = json.loads(json.dumps(settings))
        if self.settings is not None and not overwrite and self.settings != settings:
            raise self._other_run(settings)
        if self.settings is None or overwrite:
            self._file.seek(0)
            self._file.truncate()
            self.done, self.records, self._failed = KeySet(), None, []
            self.num_captioned = self.num_failed = 0
            self._append({"settings": settings})
        elif self.ending is not None:  # a new pass tries again what failed
            self._append({"continued": True})
            self._failed, self.num_failed = [], 0
        self.failed.update(self._failed)
        self.settings, self.ending = settings, None

    def commit(self, keys: np.ndarray, failed: np.ndarray, records: list[Any]) -> None:
        """Record a batch that was written.

        Args:
            keys: hashes of the keys of its images with captions: `[images]` of uint64.
            failed: hashes of the keys of those without.
            records: what each output says of the batch.
        """
        self._append({"done": encoded(keys), "failed": encoded(failed), "records": records})
        self.num_captioned += len(keys)
        self.num_failed += len(failed)

    def finish(self, ending: list[Any]) -> None:
        """Record that all images were tried.

        Args:
            ending: what each output says at the end.
        """
        self._append({"finished": ending})
        self.ending = ending

    def remove(self) -> None:
        """Delete the record, before the lock ends."""
        self.path.unlink()

    def close(self) -> None:
        """End the lock."""
        self._file.close()

    def _append(self, event: dict[str, Any]) -> None:
        self._file.write(json.dumps(event).encode() + b"\n")
        self._file.flush()

    def _read(self) -> None:
        """Read the events, and cut off what a killed run wrote after the last whole line.

        Raises:
            InputError: if the file holds something else.
        """
        end = 0
        done: list[np.ndarray] = []
        for line, event in self._events():
            end += len(line)
            if "settings" in event:
                self.settings = event["settings"]
            elif "finished" in event:
                self.ending = event["finished"]
            elif "continued" in event:
                self._failed, self.num_failed, self.ending = [], 0, None
            else:
                done.append(decoded(event["done"]))
                self._failed.append(decoded(event["failed"]))
                self.num_captioned += len(done[-1])
                self.num_failed += len(self._failed[-1])
                self.records = event["records"]
        self.done.update(done)
        self._file.seek(end)
        self._file.truncate()

    def _events(self) -> Iterator[tuple[bytes, dict[str, Any]]]:
        self._file.seek(0)
        for number, line in enumerate(self._file):
            if not line.endswith(b"\n"):
                return
            try:
                event = json.loads(line)
                if not isinstance(event, dict) or ("settings" in event) != (number == 0):
                    raise ValueError("its lines are of something else")
                if not isinstance(event.get("finished", []), list):
                    raise ValueError("its end is of another version")
                is_batch = event.keys() >= {"done", "failed", "records"}
                if not is_batch and not event.keys() & {"settings", "finished", "continued"}:
                    raise ValueError("its lines are of something else")
            except ValueError as error:
                with_it = "" if self.output is None else f", and {self.output!r} with it"
                raise InputError(
                    f"{str(self.path)!r} is not the record of a run ({one_line(error, 100)}): delete it{with_it}."
                ) from error
            yield line, event

    def _other_run(self, settings: dict[str, Any]) -> InputError:
        """Return the error for settings that differ."""
        before = self.settings or {}
        different = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
        name = different[0]
        was, now = (one_line(repr(values.get(name)), 60) for values in (before, settings))
        remedy = "choose another --output, or replace it with --overwrite_output"
        if self.output is None:
            remedy = f"give the same ones to continue it, or delete {str(self.path)[-100:]!r} to begin a new run"
        return InputError(
            f"There is a run with other options: {one_line(', '.join(different), 100)} ({name} was {was}, now {now}). "
            f"For {self.name}, {remedy}."
        )


def locked(path: Path) -> Any:
    """Open a file for reading and writing, and lock it.

    Raises:
        BlockingIOError: if another process has locked it.
        OSError: if it cannot be opened.
    """
    while True:
        path.touch()
        file = path.open("r+b")
        try:
            if sys.platform == "win32":
                import msvcrt

                try:
                    file.seek(2**40)  # far behind the content, because a locked byte cannot be read
                    msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
                except OSError as error:
                    raise BlockingIOError from error
            else:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except BaseException:
            file.close()
            raise
        file.close()  # the process that had it locked has deleted it: use the new one


def encoded(hashes: np.ndarray) -> str:
    """Return hashes as text."""
    return base64.b64encode(hashes.astype("<u8").tobytes()).decode()


def decoded(text: str) -> np.ndarray:
    """Return hashes from a text.

    Raises:
        ValueError: if the text is something else.
    """
    return np.frombuffer(base64.b64decode(text, validate=True), "<u8")
