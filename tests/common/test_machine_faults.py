"""Faults of the machine are explained in one sentence, whatever error they reach a command as."""

import errno
import logging
import os
import signal

import pytest
import torch
from safetensors import SafetensorError

from qformer_captioner.common.errors import InputError
from qformer_captioner.common.logging import MessageHandler
from qformer_captioner.common.machine_faults import causes_of, explain_faults
from qformer_captioner.common.run_folder import RunFolder

FULL = "A file could not be written to the disk of '{folder}' .* free.: make room. Kept."
ERRORS = {
    "no space": (OSError(errno.ENOSPC, "No space left on device"), FULL),
    "quota": (OSError(errno.EDQUOT, "Disk quota exceeded", "x"), FULL),
    "too large": (OSError(errno.EFBIG, "File too large"), FULL),
    "safetensors": (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), FULL),
    "torch": (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"), FULL),
    "torch's writer": (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), FULL),
    "numpy": (OSError("100000 requested and 24968 written"), FULL),
    "a worker's disk": (
        OSError(
            "Caught OSError in DataLoader worker process 0.\nTraceback\nOSError: [Errno 28] No space left on device"
        ),
        FULL,
    ),
    "read-only": (
        OSError(errno.EROFS, "Read-only file system", "{folder}/a"),
        "'{folder}/a' cannot be written .Read-only file system.: change its rights, or choose another folder. Kept.",
    ),
    "rights": (PermissionError(errno.EACCES, "Permission denied", "{folder}/a"), "'{folder}/a' cannot be written"),
    "network disk": (OSError(errno.ESTALE, "Stale file handle"), "The disk of '{folder}' does not answer"),
    "broken disk": (OSError(errno.EIO, "Input/output error"), "The disk of '{folder}' does not answer"),
    "open files": (OSError(errno.EMFILE, "Too many open files"), "Too many files are open .*ulimit -n"),
    "memory": (MemoryError(), "Memory ran out"),
    "memory of a GPU": (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), "Memory ran out .CUDA"),
    "killed worker": (
        RuntimeError("DataLoader worker (pid 71) is killed by signal: Killed. "),
        "A data loader worker ended .is killed by signal: Killed., usually because memory",
    ),
    "ended worker": (
        RuntimeError("DataLoader worker (pid(s) 71, 72) exited unexpectedly"),
        "A data loader worker ended .exited unexpectedly., usually because memory",
    ),
    "shared memory": (
        RuntimeError("unable to write to file </torch_1_2_3>: No space left on device (28)"),
        "The shared memory ./dev/shm. of the workers is full",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_a_fault_of_the_machine_is_one_sentence_that_names_it(name, tmp_path):
    error, message = ERRORS[name]
    if isinstance(error, OSError) and error.filename is not None:
        error.filename = error.filename.replace("{folder}", str(tmp_path))
    with (
        pytest.raises(InputError, match=message.replace("{folder}", str(tmp_path))) as raised,
        explain_faults(tmp_path, "Kept."),
    ):
        raise error
    assert len(str(raised.value)) <= 500 and "\n" not in str(raised.value)
    assert raised.value.__cause__ is error


def test_a_fault_that_another_error_hides_is_found(tmp_path):
    with pytest.raises(InputError, match="disk of .* make room"), explain_faults(tmp_path, "Kept."):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise InputError("The data set cannot be loaded.") from error


def test_a_folder_that_is_gone_is_named(tmp_path):
    folder = tmp_path / "gone"
    with pytest.raises(InputError, match=f"The folder '{folder}' is gone"), explain_faults(folder, "Kept."):
        (folder / "a").write_text("")


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a bug"),
        InputError("A mistake."),
        FileNotFoundError(errno.ENOENT, "No such file", "data.csv"),
        PermissionError(errno.EACCES, "Permission denied", "/data/of/somebody.csv"),
        SafetensorError("Error while deserializing header: incomplete metadata"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_other_errors_stay_as_they_are(error, tmp_path):
    with pytest.raises(type(error)) as raised, explain_faults(tmp_path, "Kept."):
        raise error
    assert raised.value is error


class Rows(torch.utils.data.Dataset):
    """Rows whose reading does what a test says."""

    def __init__(self, read):
        self.read = read

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        return self.read()


def raise_mistake() -> None:
    raise InputError("No image can be read. Check the files.")


def end_process() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_the_error_of_a_worker_loses_its_traceback(tmp_path):
    with pytest.raises(InputError, match=r"^No image can be read\. Check the files\.$"), explain_faults(tmp_path, ""):
        list(torch.utils.data.DataLoader(Rows(raise_mistake), num_workers=1))


def test_a_killed_worker_is_explained(tmp_path):
    with pytest.raises(InputError, match="A data loader worker ended"), explain_faults(tmp_path, "Kept."):
        list(torch.utils.data.DataLoader(Rows(end_process), num_workers=1))


class FullStream:
    """Stream to a file on a full disk."""

    def write(self, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_messages_on_a_full_disk_are_dropped_without_a_traceback(monkeypatch, capfd):
    monkeypatch.setattr("sys.stdout", FullStream())
    MessageHandler().emit(logging.LogRecord("qformer_captioner", logging.INFO, "", 0, "a message", None, None))
    assert capfd.readouterr().err == ""


# --- Checkpoints ------------------------------------------------------------------------------------------------------


def write_checkpoint(folder, step: int):
    """Write a checkpoint with weights, an optimizer and the state of the Trainer."""
    from safetensors.torch import save_file

    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    save_file({"a": torch.zeros(100)}, checkpoint / "model.safetensors")
    torch.save({"a": torch.zeros(100)}, checkpoint / "optimizer.pt")
    (checkpoint / "trainer_state.json").write_text("{}")
    return checkpoint


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer_state.json"])
def test_a_cut_off_checkpoint_is_neither_used_nor_kept(name, tmp_path, log):
    RunFolder(tmp_path / "run", {}).start()
    whole, cut_off = write_checkpoint(tmp_path / "run", 9), write_checkpoint(tmp_path / "run", 10)
    folder = RunFolder(tmp_path / "run", {})
    assert folder.last_checkpoint == str(cut_off)
    content = (cut_off / name).read_bytes()
    (cut_off / name).write_bytes(content[: len(content) // 2])
    assert folder.last_checkpoint == str(whole)
    folder.start()
    assert whole.exists() and not cut_off.exists()
    assert "checkpoint-10, which is incomplete" in log.text


def test_errors_whose_contexts_form_a_circle_end(tmp_path):
    first, second = ValueError("first"), KeyError("second")
    first.__context__, second.__context__ = second, first
    assert list(causes_of(first)) == [first, second]
