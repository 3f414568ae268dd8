"""Public names and commands, as docs/python_api.md lists them."""

import importlib
import re
import runpy
import sys

import pytest

from qformer_captioner.cli.main import COMMANDS

from ..conftest import ROOT

PAGE = (ROOT / "docs" / "python_api.md").read_text()
IMPORTS = [
    (module, name)
    for module, names in re.findall(r"^\| `from (\S+) import ([\w, ]+)` \|", PAGE, re.M)
    for name in names.split(", ")
]
SUBCOMMANDS = re.findall(r"^\| `qformer-captioner (\w+)` \|", PAGE, re.M)
MODULES = re.findall(r"^\| `python -m (\S+)` \|", PAGE, re.M)


@pytest.mark.parametrize(("module", "name"), IMPORTS)
def test_a_listed_name_can_be_imported(module, name):
    assert hasattr(importlib.import_module(module), name)


@pytest.mark.parametrize("module", ["qformer_captioner", "qformer_captioner.metrics"])
def test_every_exported_name_is_listed(module):
    listed = {name for listed_module, name in IMPORTS if listed_module == module}
    assert listed == set(importlib.import_module(module).__all__)


def test_every_command_is_listed():
    assert set(SUBCOMMANDS) == set(COMMANDS)


@pytest.mark.parametrize("module", ["qformer_captioner.cli.main", *MODULES])
def test_help_of_a_module_works(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(module, run_name="__main__")
        sys.exit(0)
    assert not ended.value.code
    assert "usage:" in capsys.readouterr().out


@pytest.mark.parametrize("command", SUBCOMMANDS)
def test_help_of_a_command_works(command, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["qformer-captioner", command, "--help"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module("qformer_captioner.cli.main").main()
    assert not ended.value.code
    assert "usage:" in capsys.readouterr().out
