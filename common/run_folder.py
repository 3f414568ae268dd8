"""One output folder, one run: what was started here, how far it got, and whether it may go on."""

import json
import os
import shutil
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME

from .errors import InputError


class RunFolder:
    """The output folder of a training run, with a record (`run.json`) of what the run is and how it ended.

    A run is told by its settings (which model, which data). Its length may grow: a run goes on where it stopped, killed
    or finished, as long as it is the same.

    Args:
        path: the folder.
        settings: what makes this run another run if it differs; must be plain JSON.
        overwrite: take the place of the run that is there, once [`~RunFolder.start`] is called.

    Raises:
        InputError: if the folder holds another run, or files that no run of ours left there.
    """

    def __init__(self, path: str | os.PathLike, settings: dict, overwrite: bool = False):
        self.path = Path(path)
        self.record_file = self.path / "run.json"
        self.record = {"settings": json.loads(json.dumps(settings)), "finished": None}
        self.overwrite = overwrite
        if self.path.is_file():
            raise InputError(f"The output folder {str(path)!r} is a file. Choose another --output_dir.")
        if not self.path.exists() or not any(self.path.iterdir()):
            return
        if not self.record_file.exists():
            raise InputError(
                f"The output folder {str(path)!r} is not empty and holds no run of ours. Choose another --output_dir."
            )
        if overwrite:
            return
        try:
            found = json.loads(self.record_file.read_text())
            theirs, ours = dict(found["settings"]), self.record["settings"]
            finished = found["finished"]
            if finished is not None and not isinstance(finished, dict):
                raise TypeError("'finished' is no results")
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(
                f"The record {str(self.record_file)!r} of the run in that folder cannot be read ({error}). Choose "
                "another --output_dir, or replace that run with --overwrite_output_dir."
            ) from error
        different = [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]
        if different:
            key = different[0]
            raise InputError(
                f"The output folder {str(path)!r} holds another run: it differs in {', '.join(different)} ({key} was "
                f"{theirs.get(key)!r}, now {ours.get(key)!r}). Choose another --output_dir, or replace that run with "
                "--overwrite_output_dir."
            )
        self.record = found

    @property
    def finished(self) -> dict | None:
        """What [`~RunFolder.finish`] wrote down, `None` for a run that has not come to its end."""
        return self.record["finished"]

    @property
    def last_checkpoint(self) -> str | None:
        """Where to go on from: the last checkpoint that was written to its end."""
        if self.overwrite:
            return None
        checkpoints = [path for path in self.path.glob("checkpoint-*") if path.name.split("-")[1].isdecimal()]
        checkpoints.sort(key=lambda path: int(path.name.split("-")[1]))
        return next((str(path) for path in reversed(checkpoints) if is_complete(path)), None)

    def start(self) -> None:
        """Make the folder and claim it for this run. Nothing has been written or deleted before."""
        if self.overwrite and self.path.exists():
            shutil.rmtree(self.path)
        self.overwrite = False
        self.path.mkdir(parents=True, exist_ok=True)
        self.record["finished"] = None
        self._write()

    def finish(self, **results) -> None:
        """Write down that the run came to its end, and with what."""
        self.record["finished"] = results
        self._write()

    def _write(self) -> None:
        unfinished = self.record_file.with_suffix(".tmp")  # a kill while writing must not cost the record
        unfinished.write_text(json.dumps(self.record, indent=2) + "\n")
        unfinished.replace(self.record_file)


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end: its `trainer_state.json` is the last file."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
        return True
    except (OSError, ValueError):
        return False
