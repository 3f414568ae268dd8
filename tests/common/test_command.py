"""How a command ends: its message, its exit status, and its traceback for a bug."""

import sys

import pytest

from qformer_captioner.common.command import run_command
from qformer_captioner.common.errors import InputError


def raising(error: BaseException):
    def command(words: list[str]) -> None:
        raise error

    return command


def test_a_command_gets_the_arguments_after_its_name(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["qformer-captioner push", "folder", "--private"])
    received = []
    run_command(received.extend)
    assert received == ["folder", "--private"]


@pytest.mark.parametrize("error", [InputError("There is no\x1b file."), OSError("There is no\x1b file.")])
def test_an_expected_error_is_one_message_without_control_characters(error):
    with pytest.raises(SystemExit) as stopped:
        run_command(raising(error))
    assert stopped.value.code == r"error: There is no\x1b file."  # Python prints it to stderr and exits with status 1


def test_an_unexpected_error_keeps_its_traceback():
    with pytest.raises(ValueError, match="a bug"):
        run_command(raising(ValueError("a bug")))
    with pytest.raises(SystemExit, match="error: beams"):
        run_command(raising(ValueError("beams")), expected=(ValueError,))


def test_ctrl_c_exits_with_status_130(capsys):
    with pytest.raises(SystemExit) as stopped:
        run_command(raising(KeyboardInterrupt()), interrupted="Stopped.")
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "\nStopped.\n"
