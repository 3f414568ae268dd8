"""Messages are short, whatever the user gave, and keep their beginning and their end."""

import logging
import sys

import pytest

from qformer_captioner import eval_captions, precompute_features, train_hf
from qformer_captioner.cli import caption
from qformer_captioner.common.command import run_command
from qformer_captioner.common.errors import InputError
from qformer_captioner.common.logging import MessageHandler

LONG = "x" * 5000


def test_a_long_message_keeps_its_beginning_and_its_remedy():
    message = str(InputError(f"There is no file {LONG!r}: check the path."))
    assert len(message) <= 500
    assert message.startswith("There is no file 'xxx") and message.endswith("xxx': check the path.")


def test_a_short_message_is_unchanged():
    assert str(InputError("There is no file.")) == "There is no file."


@pytest.mark.parametrize("text", [LONG, "\x1b" * 3000, "é" * 600])
def test_a_command_prints_a_short_error(monkeypatch, text):
    def command(words):
        raise OSError(f"cannot write {text}: disk full")

    monkeypatch.setattr(sys, "argv", ["command"])
    with pytest.raises(SystemExit) as stopped:
        run_command(command)
    assert len(stopped.value.code) <= 500 and stopped.value.code.endswith(": disk full")


def test_a_warning_is_short(capsys):
    logger = logging.Logger("test")
    logger.addHandler(MessageHandler())
    logger.warning("The file %s is skipped.", LONG)
    assert len(capsys.readouterr().err.strip()) <= 500


@pytest.mark.parametrize(
    ("main", "words"),
    [
        (train_hf.main, ["--dataset_name", f"{LONG}.csv", "--output_dir", "out"]),
        (train_hf.main, ["--recipe", LONG]),
        (train_hf.main, [f"--{LONG}", "1"]),
        (train_hf.main, ["--learning_rate", LONG]),
        (eval_captions.main, ["--references", LONG, "--predictions", LONG]),
        (eval_captions.main, ["--extra_metrics", LONG]),
        (precompute_features.main, ["--recipe", LONG]),
        (precompute_features.main, ["--batch_size", LONG]),
        (caption.main, ["a.jpg", "--model", LONG]),
        (caption.main, [LONG, "--model", LONG]),
        (caption.main, ["a.jpg", "--model", "m", "--output", LONG]),
    ],
)
def test_every_command_names_a_long_value_in_a_short_error(monkeypatch, tmp_path, main, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "argv", ["command", *words])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert str(stopped.value.code).startswith("error: ") and len(stopped.value.code) <= 500
