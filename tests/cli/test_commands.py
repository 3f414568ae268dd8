"""The command `qformer-captioner`: its helps, and captions from the command line. Each test states one property."""

import argparse
import re
import shlex
import subprocess
import sys

import pytest
from transformers import AutoModel

from qformer_captioner import QFormerCaptioner, eval_captions
from qformer_captioner.cli import main as cli
from qformer_captioner.cli.caption import caption, find_images, printable_line
from qformer_captioner.evaluation.caption_files import read_predictions

from ..conftest import ROOT
from ..fixtures import tiny
from ..fixtures.processes import command_line
from ..model.test_loading import adapter_of


def run(monkeypatch, *words: str) -> None:
    """The command, as if typed in a shell."""
    monkeypatch.setattr(sys, "argv", ["qformer-captioner", *words])
    cli.main()


def shown(monkeypatch, capsys, *words: str) -> str:
    """The help of a command."""
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, *words, "--help")
    assert not ended.value.code
    return capsys.readouterr().out


# --- Help -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_the_command_lists_what_there_is_a_line_each(monkeypatch, capsys, words):
    run(monkeypatch, *words)
    lines = capsys.readouterr().out.splitlines()
    for command, (_, what) in cli.COMMANDS.items():
        assert [line.split() for line in lines].count([command, *what.split()]) == 1


def test_an_unknown_command_is_told_of_those_that_there_are(monkeypatch):
    with pytest.raises(SystemExit, match="no command 'describe'; there are train, .*caption"):
        run(monkeypatch, "describe")


class Parsed(Exception):
    pass


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_help_shows_examples_that_parse(monkeypatch, capsys, command):
    text = re.sub(r"\\\n\s*", "", shown(monkeypatch, capsys, command))
    examples = re.findall(rf"(?m)^ +qformer-captioner {command} ?(.*)$", text)
    assert any(examples)
    parse = argparse.ArgumentParser.parse_known_args

    def parse_and_stop(self, *args, **kwargs):
        options, unknown = parse(self, *args, **kwargs)
        if self.add_help:  # and not what looks for recipes first
            raise Parsed(unknown)
        return options, unknown

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_and_stop)
    for example in examples:
        with pytest.raises(Parsed) as stopped:
            run(monkeypatch, command, *shlex.split(example, comments=True))
        assert stopped.value.args == ([],), example


def test_an_example_is_in_the_words_of_whoever_asks(monkeypatch, capsys):
    assert "    qformer-captioner eval --predictions" in shown(monkeypatch, capsys, "eval")
    monkeypatch.setattr(sys, "argv", ["eval_captions.py", "--help"])
    with pytest.raises(SystemExit):
        eval_captions.main()
    assert "    python eval_captions.py --predictions" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["eval", "caption", "push"])
def test_who_asks_for_help_does_not_wait_for_torch(command):
    program = (
        "import contextlib, sys\n"
        "from qformer_captioner.cli import main as cli\n"
        f"sys.argv[1:] = [{command!r}, '--help']\n"
        "with contextlib.suppress(SystemExit):\n"
        "    cli.main()\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT.parent)
    assert f"qformer-captioner {command}" in done.stdout
    assert done.stdout.endswith("False\n")


# --- Captions ---------------------------------------------------------------------------------------------------------

DECODING = dict(max_new_tokens=6)
FORMS = ["referenced", "included", "adapter"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Captioners, and pictures in a folder and in one below it."""
    folder = tmp_path_factory.mktemp("captioners")
    vision, language = tiny.save_vision(folder / "vision"), tiny.save_language(folder / "language")
    model = QFormerCaptioner.from_backbones(vision, language, **tiny.QFORMER)
    model.save_pretrained(folder / "referenced")
    model.save_pretrained(folder / "included", include_backbones=True)
    adapter_of(QFormerCaptioner.from_pretrained(folder / "referenced")).save_pretrained(folder / "adapter")
    (folder / "pictures" / "below").mkdir(parents=True)
    for number, name in enumerate(["b.png", "a.JPG", "below/c.webp"]):
        tiny.picture(number).save(folder / "pictures" / name)
    (folder / "pictures" / "notes.txt").write_text("no picture")
    return folder


PICTURES = ["a.JPG", "b.png", "below/c.webp"]


def words(folder, form="referenced", **options) -> list[str]:
    return command_line(model=folder / form, **DECODING, **options)


@pytest.mark.parametrize("form", FORMS)
def test_each_picture_gets_a_line_with_the_captioners_caption(folder, capsys, form):
    caption([str(folder / "pictures"), *words(folder, form)])
    files = [str(folder / "pictures" / name) for name in PICTURES]
    expected = AutoModel.from_pretrained(folder / form).caption(files, **DECODING)
    assert capsys.readouterr().out.splitlines() == [
        f"{file}: {said}" for file, said in zip(files, expected, strict=True)
    ]


def test_options_reach_the_captioner(folder, capsys):
    file = str(folder / "pictures" / "b.png")
    caption([file, *command_line(model=folder / "included", prompt="a star", num_beams=3, max_new_tokens=4)])
    model = AutoModel.from_pretrained(folder / "included")
    expected = model.caption(file, "a star", num_beams=3, max_new_tokens=4)
    assert expected != model.caption(file, max_new_tokens=4)
    assert capsys.readouterr().out == f"{file}: {expected}\n"


def test_the_size_of_a_batch_changes_nothing(folder, capsys):
    printed = []
    for size in (1, 2, 3):
        caption([str(folder / "pictures"), *words(folder, batch_size=size)])
        printed.append(capsys.readouterr().out)
    assert printed[0].count("\n") == 3 and len(set(printed)) == 1


def test_words_mean_files_folders_and_patterns_each_picture_once(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder / "pictures")
    assert find_images(["."]) == PICTURES
    assert find_images(["*.png", "b.png", "**/*.webp"]) == ["b.png", "below/c.webp"]
    assert find_images(["nowhere.png"]) == ["nowhere.png"]
    tiny.picture().save(tmp_path / "a[1].png")
    assert find_images([str(tmp_path / "a[1].png")]) == [str(tmp_path / "a[1].png")]


def test_a_bad_file_gets_a_message_and_the_others_their_captions(folder, tmp_path, capsys, monkeypatch):
    (tmp_path / "broken.png").write_bytes((folder / "pictures" / "b.png").read_bytes()[:200])
    files = [str(tmp_path / "broken.png"), str(tmp_path / "absent.png"), str(folder / "pictures" / "b.png")]
    with pytest.raises(SystemExit, match="2 of 3 images have no caption") as ended:
        run(monkeypatch, "caption", *files, *words(folder, output=tmp_path / "captions.json"))
    assert ended.value.code  # not zero
    printed = capsys.readouterr()
    assert printed.out.startswith(f"{files[2]}: ") and printed.out.count("\n") == 1
    assert "broken.png" in printed.err and "absent.png" in printed.err
    assert list(read_predictions(tmp_path / "captions.json")) == files[2:]


@pytest.mark.parametrize("name", ["captions.json", "captions.jsonl"])
def test_the_captions_can_be_kept_and_scored(folder, tmp_path, capsys, name):
    caption([str(folder / "pictures"), *words(folder, output=tmp_path / name)])
    printed = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert read_predictions(tmp_path / name) == printed


def test_a_terminal_is_told_nothing_that_it_would_obey(folder, tmp_path, capsys):
    tiny.picture().save(tmp_path / "red\x1b[31m\nerror: 1.png")
    caption([str(tmp_path), *words(folder)])
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and printed.count("\n") == 1
    assert r"red\x1b[31m\nerror: 1.png: " in printed
    assert printable_line("caf\N{LATIN SMALL LETTER E WITH ACUTE} \u202e \udcff") == r"café \u202e \udcff"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "nowhere/at/all"}, "captioner 'nowhere/at/all' cannot be loaded from a folder or the Hub"),
        ({"num_beams": 0}, "--num_beams is at least 1, not 0"),
        ({"batch_size": -1}, "--batch_size is at least 1, not -1"),
        ({"output": "nowhere/captions.json"}, "no folder for 'nowhere/captions.json'"),
        ({"output": "."}, "'.' is a folder: name a file in it"),
        ({"max_new_tokens": 500}, "language model reads at most 64 tokens"),
    ],
)
def test_what_cannot_work_ends_in_a_message(folder, monkeypatch, options, message):
    options = dict(model=folder / "referenced") | options
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        run(monkeypatch, "caption", str(folder / "pictures" / "b.png"), *command_line(**options))


def test_another_model_is_no_captioner(folder, monkeypatch):
    with pytest.raises(SystemExit, match="holds a CLIPVisionModel and no captioner"):
        run(monkeypatch, "caption", str(folder / "pictures" / "b.png"), *words(folder, "vision"))


def test_a_folder_without_pictures_is_named(folder, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=f"no images in '{tmp_path}'"):
        run(monkeypatch, "caption", str(tmp_path), *words(folder))
