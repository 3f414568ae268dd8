"""Faults of the machine, such as a full disk or a killed worker process, explained in one sentence.

They reach a command as errors of many classes: `OSError`, errors of safetensors and of torch without a number, and
errors of other processes that hold a traceback as text.
"""

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from .errors import InputError, one_line

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NOT_WRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM)
NO_ANSWER = (errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.ENOTCONN, errno.ETIMEDOUT, errno.EREMOTEIO)
# Messages of torch and numpy about a file that could not be written as a whole; they do not say why.
CUT_OFF = re.compile(r"unexpected pos \d+ vs|file write failed|failed writing|requested and \d+ written")
# Numbers of errors in the messages of safetensors, and of errors that another process raised.
NUMBER = re.compile(r"(?:os error|\[Errno) (\d+)")
WORKER_ERROR = re.compile(r"Caught \w+ in DataLoader worker process")
WORKER_DEATH = re.compile(r"DataLoader worker \(pid\S* .*?\) (.*)", re.DOTALL)


@contextlib.contextmanager
def explain_faults(folder: str | os.PathLike, kept: str) -> Iterator[None]:
    """Convert an error that a fault of the machine caused to an `InputError` of one sentence.

    Args:
        folder: the folder that the code in the `with` block writes.
        kept: sentence about what is kept and how to go on.

    Raises:
        InputError: for such a fault, and for an `InputError` of a data loader worker, without its traceback. Other
            errors are raised unchanged.

    Example:

    ```python
    >>> with explain_faults("outputs/mine", "The same command continues."):  # doctest: +SKIP
    ...     Path("outputs/mine/captions.json").write_text("[]")
    Traceback (most recent call last):
    qformer_captioner.common.errors.InputError: A file could not be written to the disk of 'outputs/mine' (No space left
    on device, 0.0 MB free): make room. The same command continues.
    ```
    """
    try:
        yield
    except Exception as error:
        fault = next(filter(None, (describe_fault(each, Path(folder)) for each in causes_of(error))), None)
        if fault is not None:
            raise InputError(f"{fault} {kept}") from error
        if isinstance(error, InputError) and WORKER_ERROR.match(str(error)):
            raise InputError(last_line(error)) from error
        raise


def causes_of(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and the errors that caused it, each once: contexts may form a circle."""
    cause: BaseException | None = error
    seen: set[int] = set()
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        context = None if cause.__suppress_context__ or isinstance(cause, InputError) else cause.__context__
        cause = cause.__cause__ or context


def describe_fault(error: BaseException, folder: Path) -> str | None:
    """Return a sentence about a fault of the machine, or `None` for any other error.

    Args:
        error: the error.
        folder: the folder that was written.
    """
    if isinstance(error, InputError) and not WORKER_ERROR.match(str(error)):
        return None  # the sentence of the error is clear, but its cause may be a fault
    text = str(error)
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        return f"Memory ran out ({one_line(text or 'MemoryError', 80)}): use smaller batches or a smaller model."
    if match := WORKER_DEATH.search(text):
        reason = one_line(match[1], 60).rstrip(".")
        return (
            f"A data loader worker ended ({reason}), usually because memory or shared memory ran out: use fewer "
            "workers, smaller batches, or more memory."
        )
    if "shared memory" in text or "</torch_" in text:
        return f"The shared memory (/dev/shm) of the workers is full ({one_line(text, 80)}): use fewer workers."
    code = error.errno if isinstance(error, OSError) and error.errno else None
    if code is None and (match := NUMBER.search(text)):
        code = int(match[1])
    path = os.fspath(getattr(error, "filename", None) or folder)
    if code in FULL or CUT_OFF.search(text) or "No space left on device" in text:
        reason = os.strerror(code) if code else one_line(text, 80)
        return f"A file could not be written to the disk of {shown(folder)} ({reason}, {free(folder)} free): make room."
    if code in NOT_WRITABLE and Path(path).absolute().is_relative_to(folder.absolute()):
        return f"{shown(path)} cannot be written ({os.strerror(code)}): change its rights, or choose another folder."
    if code in NO_ANSWER:
        return f"The disk of {shown(path)} does not answer ({os.strerror(code)}): check it."
    if code == errno.ENOENT and not folder.is_dir():
        return f"The folder {shown(folder)} is gone: make its disk available again."
    if code in (errno.EMFILE, errno.ENFILE):
        return f"Too many files are open ({os.strerror(code)}): raise the limit with `ulimit -n`, or use fewer workers."
    return None


def shown(path: str | os.PathLike) -> str:
    """Return a path in quotes, cut to 100 characters."""
    return repr(one_line(os.fspath(path), 100))


def free(folder: Path) -> str:
    """Return the free space on the disk of a folder, in megabytes."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return f"{shutil.disk_usage(existing).free / 1e6:,.1f} MB"


def last_line(error: Exception) -> str:
    """Return the message of an error of a data loader worker, without the traceback in front of it."""
    return one_line(str(error).strip().splitlines()[-1].partition(": ")[2])
