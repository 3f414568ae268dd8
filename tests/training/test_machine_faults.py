"""Runs on a disk that becomes full, whose Hub fails, or whose workers are killed: one sentence, and nothing is lost."""

import errno
import os
import shlex
import signal
import subprocess

import pytest
import torch
import yaml
from safetensors.torch import load_file

from qformer_captioner import train_hf
from qformer_captioner.common.errors import InputError
from qformer_captioner.data.dataset import CaptionDataset
from qformer_captioner.training import evaluation_files
from qformer_captioner.training.trainer import CaptionTrainer

from .test_train import TINY

TWO_CHECKPOINTS = {**TINY, "max_steps": 4, "eval_strategy": "no", "save_strategy": "steps", "save_steps": 2}
TWO_CHECKPOINTS |= {"load_best_model_at_end": False, "save_total_limit": 1}


def write_recipe(folder, output_dir, **changes) -> list[str]:
    """Write a recipe for a run that saves after steps 2 and 4, and return the command line."""
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump({**TWO_CHECKPOINTS, "output_dir": str(output_dir), **changes}))
    return ["--recipe", str(file)]


def checkpoints(folder) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Weights of a run without a fault."""
    folder = tmp_path_factory.mktemp("unbroken")
    train_hf.train(write_recipe(folder, folder / "run"))
    return load_file(folder / "run" / "model.safetensors")


@pytest.mark.parametrize("method", ["_save_optimizer_and_scheduler", "_save_rng_state", "_save"])
def test_a_full_disk_keeps_the_last_checkpoint_and_the_run_goes_on(method, unbroken, tmp_path, monkeypatch, log):
    original = getattr(CaptionTrainer, method)

    def full_after_step_2(self, output_dir=None, *args, **kwargs):
        original(self, output_dir, *args, **kwargs)
        if self.state.global_step > 2:
            no_space()

    command = write_recipe(tmp_path, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(CaptionTrainer, method, full_after_step_2)
        message = f"^A file could not be written to the disk of '{tmp_path / 'run'}' .No space left on device, .* free"
        with pytest.raises(InputError, match=message) as raised:
            train_hf.train(command)
    assert "the same command continues" in str(raised.value)
    assert checkpoints(tmp_path / "run") == ["checkpoint-2"]
    train_hf.train(command)
    assert any("Resuming from" in message and "checkpoint-2" in message for message in log.messages)
    weights = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(weights[name], unbroken[name]) for name in unbroken)


def test_a_disk_that_is_full_at_the_end_is_named_and_the_run_goes_on(unbroken, tmp_path, monkeypatch):
    command = write_recipe(tmp_path, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(CaptionTrainer, "save_final_model", no_space)
        with pytest.raises(InputError, match="make room"):
            train_hf.train(command)
    assert checkpoints(tmp_path / "run") == ["checkpoint-4"]
    train_hf.train(command)
    weights = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(weights[name], unbroken[name]) for name in unbroken)


def test_a_disk_that_is_full_when_captions_are_written_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation_files, "draw_caption_sheet", no_space)
    with pytest.raises(InputError, match="make room"):
        train_hf.train(write_recipe(tmp_path, tmp_path / "run", eval_strategy="steps", eval_steps=3))
    assert checkpoints(tmp_path / "run") == ["checkpoint-2"]


def test_a_worker_that_is_killed_is_explained(tmp_path, monkeypatch):
    def killed(self, position):
        if torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, position)

    original = CaptionDataset.__getitem__
    monkeypatch.setattr(CaptionDataset, "__getitem__", killed)
    with pytest.raises(InputError, match="A data loader worker ended .*use fewer workers"):
        train_hf.train(write_recipe(tmp_path, tmp_path / "run", dataloader_num_workers=1))


@pytest.mark.parametrize("error", [InputError("The Hub refuses 'me/x' (403)."), OSError("The network is gone.")])
def test_a_hub_that_fails_at_the_end_leaves_the_captioner_and_names_the_command(error, tmp_path, monkeypatch):
    def fail(self, *args, **kwargs):
        raise error

    monkeypatch.setattr(CaptionTrainer, "init_hf_repo", lambda self: setattr(self, "hub_model_id", "me/x"))
    monkeypatch.setattr(CaptionTrainer, "push_to_hub", fail)
    run = tmp_path / "a run"
    options = {"push_to_hub": True, "hub_model_id": "me/x", "hub_strategy": "end", "hub_private_repo": True}
    with pytest.raises(InputError) as raised:
        train_hf.train(write_recipe(tmp_path, run, **options))
    assert str(raised.value).startswith(str(error))
    command = shlex.split(str(raised.value).partition("to publish it later: ")[2])
    assert command == ["qformer-captioner", "push", str(run), "me/x", "--private"]
    assert (run / "model.safetensors").exists() and '"summary"' in (run / "run.json").read_text()


@pytest.fixture
def small_disk(tmp_path):
    """Folder on a disk of a given size, if this user may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str):
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("needs the right to mount a file system")
        return folder

    yield mount
    subprocess.run(["umount", str(folder)], capture_output=True)


@pytest.mark.slow
def test_a_run_on_a_disk_that_becomes_full_continues_when_there_is_room(unbroken, small_disk, tmp_path):
    """The disk has room for one checkpoint and a part of the second."""
    train_hf.train(write_recipe(tmp_path, tmp_path / "probe", max_steps=2))
    size = sum(file.stat().st_size for file in (tmp_path / "probe" / "checkpoint-2").rglob("*"))
    disk = small_disk(f"size={int(1.5 * size)}")
    command = write_recipe(tmp_path, disk / "run")
    with pytest.raises(InputError, match="A file could not be written to the disk of"):
        train_hf.train(command)
    assert checkpoints(disk / "run") == ["checkpoint-2"]
    subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
    train_hf.train(command)
    weights = load_file(disk / "run" / "model.safetensors")
    assert all(torch.equal(weights[name], unbroken[name]) for name in unbroken)


@pytest.mark.slow
def test_a_read_only_folder_is_named(small_disk, tmp_path):
    disk = small_disk("size=1m,ro")
    with pytest.raises(InputError, match=f"'{disk}/run' cannot be written .Read-only file system.*another folder"):
        train_hf.train(write_recipe(tmp_path, disk / "run"))
