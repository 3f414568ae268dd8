"""The command `qformer-captioner` and its help."""

import argparse
import re
import shlex
import sys

import pytest

from qformer_captioner import eval_captions
from qformer_captioner.cli import main as cli


def run(monkeypatch, *words: str) -> None:
    """Run the command with these arguments."""
    monkeypatch.setattr(sys, "argv", ["qformer-captioner", *words])
    cli.main()


def help_of(monkeypatch, capsys, *words: str) -> str:
    """Return the help of a command."""
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, *words, "--help")
    assert not stopped.value.code
    return capsys.readouterr().out


# --- Help -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_help_lists_every_command_in_one_line(monkeypatch, capsys, words):
    run(monkeypatch, *words)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    for name, command in cli.COMMANDS.items():
        assert lines.count([name, *command.summary.split()]) == 1


def test_an_unknown_command_is_answered_with_the_list_of_commands(monkeypatch):
    with pytest.raises(SystemExit, match="^error: 'describe' is not a command. Use train, .* or export.$"):
        run(monkeypatch, "describe")


def test_a_mistyped_command_is_answered_with_the_nearest_one(monkeypatch):
    with pytest.raises(SystemExit, match="^error: 'trian' is not a command. Did you mean 'train'\\?$"):
        run(monkeypatch, "trian")


class Parsed(Exception):
    pass


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_help_shows_examples_that_parse(monkeypatch, capsys, command):
    text = re.sub(r"\\\n\s*", "", help_of(monkeypatch, capsys, command))
    examples = re.findall(rf"(?m)^ +qformer-captioner {command} ?(.*)$", text)
    assert any(examples)
    parse = argparse.ArgumentParser.parse_known_args

    def parse_and_stop(self, *args, **kwargs):
        options, unknown = parse(self, *args, **kwargs)
        if self.add_help:  # the parser of all options, not the one that looks for `--recipe` first
            raise Parsed(unknown)
        return options, unknown

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_and_stop)
    for example in examples:
        with pytest.raises(Parsed) as stopped:
            run(monkeypatch, command, *shlex.split(example, comments=True))
        assert stopped.value.args == ([],), example


def test_examples_show_the_program_that_was_started(monkeypatch, capsys):
    assert "    qformer-captioner eval --predictions" in help_of(monkeypatch, capsys, "eval")
    monkeypatch.setattr(sys, "argv", ["eval_captions.py", "--help"])
    with pytest.raises(SystemExit):
        eval_captions.main()
    assert "    python eval_captions.py --predictions" in capsys.readouterr().out
