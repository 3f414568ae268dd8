"""The command `qformer-captioner`: its help, and captions from the command line."""

import argparse
import errno
import re
import shlex
import sys

import pytest
from transformers import AutoModel

from qformer_captioner import QFormerCaptioner, QFormerForPretraining, eval_captions
from qformer_captioner.cli import main as cli
from qformer_captioner.cli.caption import caption, find_images, printable_line
from qformer_captioner.evaluation.caption_files import read_predictions

from ..fixtures import tiny
from ..fixtures.processes import command_line
from ..model.test_loading import adapter_of


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


# --- Captions ---------------------------------------------------------------------------------------------------------

DECODING = dict(max_new_tokens=6)
FORMS = ["referenced", "included", "adapter", "stage1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with captioners in all forms, and images in a folder and in a folder below it."""
    folder = tmp_path_factory.mktemp("captioners")
    vision, language = tiny.save_vision(folder / "vision"), tiny.save_language(folder / "language")
    model = QFormerCaptioner.from_backbones(vision, language, **tiny.QFORMER)
    model.save_pretrained(folder / "referenced")
    model.save_pretrained(folder / "included", include_backbones=True)
    adapter_of(QFormerCaptioner.from_pretrained(folder / "referenced")).save_pretrained(folder / "adapter")
    stage1 = QFormerForPretraining.from_backbones(vision, tiny.text_tokenizer(), **tiny.QFORMER)
    stage1.save_pretrained(folder / "stage1")
    (folder / "images" / "below").mkdir(parents=True)
    for number, name in enumerate(["b.png", "a.JPG", "below/c.webp"]):
        tiny.picture(number).save(folder / "images" / name)
    (folder / "images" / "notes.txt").write_text("not an image")
    return folder


IMAGES = ["a.JPG", "b.png", "below/c.webp"]


def options_for(folder, form="referenced", **options) -> list[str]:
    return command_line(model=folder / form, **DECODING, **options)


@pytest.mark.parametrize("form", FORMS)
def test_each_image_gets_a_line_with_the_captioners_caption(folder, capsys, form):
    caption([str(folder / "images"), *options_for(folder, form)])
    files = [str(folder / "images" / name) for name in IMAGES]
    expected = AutoModel.from_pretrained(folder / form).caption(files, **DECODING)
    assert capsys.readouterr().out.splitlines() == [
        f"{file}: {text}" for file, text in zip(files, expected, strict=True)
    ]


def test_options_reach_the_captioner(folder, capsys):
    file = str(folder / "images" / "b.png")
    caption([file, *command_line(model=folder / "included", prompt="a star", num_beams=3, max_new_tokens=4)])
    model = AutoModel.from_pretrained(folder / "included")
    expected = model.caption(file, "a star", num_beams=3, max_new_tokens=4)
    assert expected != model.caption(file, max_new_tokens=4)
    assert capsys.readouterr().out == f"{file}: {expected}\n"


def test_the_batch_size_does_not_change_captions(folder, capsys):
    printed = []
    for size in (1, 2, 3):
        caption([str(folder / "images"), *options_for(folder, batch_size=size)])
        printed.append(capsys.readouterr().out)
    assert printed[0].count("\n") == 3 and len(set(printed)) == 1


def test_files_folders_and_patterns_name_each_image_once(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder / "images")
    assert find_images(["."]) == IMAGES
    assert find_images(["*.png", "b.png", "**/*.webp"]) == ["b.png", "below/c.webp"]
    assert find_images(["nowhere.png"]) == ["nowhere.png"]
    tiny.picture().save(tmp_path / "a[1].png")
    assert find_images([str(tmp_path / "a[1].png")]) == [str(tmp_path / "a[1].png")]


def test_a_bad_file_gets_an_error_and_the_others_get_captions(folder, tmp_path, capsys, monkeypatch):
    (tmp_path / "broken.png").write_bytes((folder / "images" / "b.png").read_bytes()[:200])
    files = [str(tmp_path / "broken.png"), str(tmp_path / "absent.png"), str(folder / "images" / "b.png")]
    with pytest.raises(SystemExit, match="2 of 3 images have no caption") as stopped:
        run(monkeypatch, "caption", *files, *options_for(folder, output=tmp_path / "captions.json"))
    assert stopped.value.code
    printed = capsys.readouterr()
    assert printed.out.startswith(f"{files[2]}: ") and printed.out.count("\n") == 1
    assert "broken.png" in printed.err and "absent.png" in printed.err
    assert list(read_predictions(tmp_path / "captions.json")) == files[2:]


@pytest.mark.parametrize("name", ["captions.json", "captions.jsonl"])
def test_saved_captions_can_be_scored(folder, tmp_path, capsys, name):
    caption([str(folder / "images"), *options_for(folder, output=tmp_path / name)])
    printed = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert read_predictions(tmp_path / name) == printed


def test_captions_are_printed_even_if_the_disk_of_the_file_is_full(folder, tmp_path, capsys, monkeypatch):
    def no_space(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("qformer_captioner.cli.caption.write_predictions", no_space)
    with pytest.raises(SystemExit, match="No space left on device.*make room. The captions are printed above"):
        run(monkeypatch, "caption", str(folder / "images" / "b.png"), *options_for(folder, output=tmp_path / "a.json"))
    assert capsys.readouterr().out.startswith(str(folder / "images" / "b.png"))


def test_control_characters_are_escaped(folder, tmp_path, capsys):
    tiny.picture().save(tmp_path / "red\x1b[31m\nerror: 1.png")
    caption([str(tmp_path), *options_for(folder)])
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and printed.count("\n") == 1
    assert r"red\x1b[31m\nerror: 1.png: " in printed
    assert printable_line("caf\N{LATIN SMALL LETTER E WITH ACUTE} \u202e \udcff") == r"café \u202e \udcff"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "nowhere/at/all"}, "captioner 'nowhere/at/all' cannot be loaded from a folder or the Hub"),
        ({"num_beams": 0}, "--num_beams must be at least 1, not 0"),
        ({"batch_size": -1}, "--batch_size must be at least 1, not -1"),
        ({"output": "nowhere/captions.json"}, "no folder for 'nowhere/captions.json'"),
        ({"output": "."}, "'.' is a folder: name a file in it"),
        ({"max_new_tokens": 500}, "language model accepts at most 64 tokens"),
    ],
)
def test_options_that_cannot_work_end_in_one_message(folder, monkeypatch, options, message):
    options = dict(model=folder / "referenced") | options
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        run(monkeypatch, "caption", str(folder / "images" / "b.png"), *command_line(**options))


def test_a_model_that_is_not_a_captioner_is_refused(folder, monkeypatch):
    with pytest.raises(SystemExit, match="holds a CLIPVisionModel, not a captioner"):
        run(monkeypatch, "caption", str(folder / "images" / "b.png"), *options_for(folder, "vision"))


def test_a_folder_without_images_is_named(folder, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=f"no images in '{tmp_path}'"):
        run(monkeypatch, "caption", str(tmp_path), *options_for(folder))
