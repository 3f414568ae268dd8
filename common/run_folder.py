"""Output folder of one run, with a record of its settings and progress."""

import json
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from .errors import InputError, one_line
from .files import write_atomically
from .logging import get_logger

logger = get_logger(__name__)

TRAINER_STATE_NAME = "trainer_state.json"  # the name in `transformers.trainer`, whose import takes seconds
REMEDY = "Choose another --output_dir, or replace that run with --overwrite_output_dir."


class RunFolder:
    """Output folder that belongs to one run, with a record (`run.json`) of its settings and results.

    Two runs are the same if their settings are equal. The same run can continue after a kill or train longer, so its
    length is not one of its settings. Nothing is written or deleted before [`~RunFolder.start`].

    Args:
        path: the folder.
        settings: model, data and everything else that distinguishes two runs, as plain JSON.
        overwrite: replace the run that the folder holds when [`~RunFolder.start`] is called.

    Raises:
        InputError: if the folder holds another run, or files that are not from a run.

    Example:

    ```python
    run = RunFolder("outputs/mine", {"model": "clip_t5"})
    run.start()
    ...
    run.finish(seconds=61.5)
    ```
    """

    def __init__(self, path: str | os.PathLike, settings: dict[str, Any], overwrite: bool = False):
        self.path = Path(path)
        self.record_file = self.path / "run.json"
        self.overwrite = overwrite
        self.record: dict[str, Any] = {"settings": json.loads(json.dumps(settings)), "finished": None}
        self._check_folder()
        if self.record_file.exists() and not overwrite:
            existing = self._read_record()
            self._check_same_run(existing["settings"])
            self.record = existing

    def _check_folder(self) -> None:
        """Check that the path is a new or empty folder, or the folder of a run.

        Raises:
            InputError: if it is not.
        """
        if self.path.is_file():
            raise InputError(f"The output folder {str(self.path)!r} is a file. Choose another --output_dir.")
        if self.path.exists() and any(self.path.iterdir()) and not self.record_file.exists():
            raise InputError(
                f"The output folder {str(self.path)!r} is not empty and holds no run of this package. Choose another "
                "--output_dir."
            )

    def _read_record(self) -> dict[str, Any]:
        """Return the record of the run that the folder holds.

        Raises:
            InputError: if the record cannot be read.
        """
        try:
            record = json.loads(self.record_file.read_text())
            if not isinstance(record["settings"], dict) or not isinstance(record["finished"], dict | None):
                raise TypeError("its fields have other types")
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(
                f"The record {str(self.record_file)!r} of a run cannot be read ({one_line(error, 200)}). {REMEDY}"
            ) from error
        return record

    def _check_same_run(self, existing: dict[str, Any]) -> None:
        """Check that the folder holds a run with the same settings.

        Args:
            existing: settings of the run that the folder holds.

        Raises:
            InputError: if the settings differ; the message names them.
        """
        settings = self.record["settings"]
        different = [name for name in {**existing, **settings} if existing.get(name) != settings.get(name)]
        if not different:
            return
        name, names = different[0], one_line(", ".join(different), 120)
        before, now = (one_line(repr(values.get(name)), 60) for values in (existing, settings))
        raise InputError(
            f"The output folder {str(self.path)!r} holds another run: it differs in {names} ({name} was "
            f"{before}, now {now}). {REMEDY}"
        )

    @property
    def finished(self) -> dict[str, Any] | None:
        """Results that [`~RunFolder.finish`] recorded, or `None` for a run that has not finished."""
        return self.record["finished"]

    @property
    def checkpoints(self) -> list[Path]:
        """Folders of checkpoints, the last one first. Some may be incomplete."""
        paths = [path for path in self.path.glob("checkpoint-*") if path.name.split("-")[1].isdecimal()]
        return sorted(paths, key=lambda path: int(path.name.split("-")[1]), reverse=True)

    @property
    def last_checkpoint(self) -> str | None:
        """Last complete checkpoint, to resume from, or `None`."""
        if self.overwrite:
            return None
        return next((str(path) for path in self.checkpoints if is_complete(path)), None)

    def start(self) -> None:
        """Create the folder and record that the run has started. With `overwrite`, delete the old run first.

        Checkpoints that a kill or a full disk cut off are deleted. The Trainer would count them among those to keep.
        """
        if self.overwrite and self.path.exists():
            shutil.rmtree(self.path)
        self.overwrite = False
        for checkpoint in self.checkpoints:
            if not is_complete(checkpoint):
                logger.warning("Deleting %s, which is incomplete.", checkpoint)
                shutil.rmtree(checkpoint)
        self.path.mkdir(parents=True, exist_ok=True)
        self.record["finished"] = None
        self._write_record()

    def finish(self, **results: Any) -> None:
        """Record that the run has finished.

        Args:
            results: results that [`~RunFolder.finished`] returns afterwards, as plain JSON.
        """
        self.record["finished"] = results
        self._write_record()

    def _write_record(self) -> None:
        write_atomically(self.record_file, json.dumps(self.record, indent=2) + "\n")


def is_complete(checkpoint: Path) -> bool:
    """Return True if a checkpoint is complete.

    The Trainer writes its state last. The ends of the other files are checked, too, because they may have been cut off
    later, for example in a copy.
    """
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
        for file in checkpoint.glob("*.safetensors"):
            with safe_open(file, "np"):  # compares the size of the file with its header
                pass
    except (OSError, ValueError, SafetensorError):
        return False
    return all(map(zipfile.is_zipfile, (*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth"))))
