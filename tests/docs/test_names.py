"""Public names, commands and options, as the README and docs name them."""

import importlib
import re
import runpy
import sys

import pytest

from qformer_captioner.cli.main import COMMANDS

from ..conftest import ROOT
from ..fixtures import tiny
from ..fixtures.towers import TOWERS
from ..model.test_prefix import OTHERS
from ..model.test_towers import REFUSED

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
API = (ROOT / "docs" / "python_api.md").read_text()
IMPORTS = [
    (module, name)
    for module, names in re.findall(r"^\| `from (\S+) import ([\w, ]+)` \|", API, re.M)
    for name in names.split(", ")
]
SUBCOMMANDS = re.findall(r"^\| `qformer-captioner (\w+)` \|", API, re.M)
MODULES = re.findall(r"^\| `python -m (\S+)` \|", API, re.M)


def help_of(monkeypatch, capsys, command: str, option: str = "--help") -> str:
    """Return the help of a command of `qformer-captioner`."""
    monkeypatch.setattr(sys, "argv", ["qformer-captioner", command, option])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module("qformer_captioner.cli.main").main()
    assert not ended.value.code
    return capsys.readouterr().out


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
    assert "usage:" in help_of(monkeypatch, capsys, command)


def test_every_option_in_the_text_of_a_page_exists(monkeypatch, capsys):
    helps = [help_of(monkeypatch, capsys, command) for command in COMMANDS]
    options = set(re.findall(r"--\w+", "".join([*helps, help_of(monkeypatch, capsys, "train", "--help_all")])))
    for page in PAGES:
        text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
        assert set(re.findall(r"(?<![\w-])--\w+", text)) <= options, page.name


def test_the_tables_of_models_are_those_of_the_tests():
    """The page and the README also give their numbers."""
    page = (ROOT / "docs" / "vision_encoders.md").read_text()
    encoders, refused, _, languages, _ = (
        set(re.findall(r"`([^`]+)`", table)) for table in re.findall(r"(?:^\|.*\n)+", page, re.M)
    )
    tested = {**tiny.TEXT, **OTHERS}.values()
    assert encoders == set(TOWERS) and refused == set(REFUSED)
    assert languages == {fields["model_type"] for fields in tested}
    for text in (page, (ROOT / "README.md").read_text()):
        assert f"{len(encoders)} vision encoders and {len(languages)} language models" in " ".join(text.split())
