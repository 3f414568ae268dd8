"""Captions from the command line: what is printed and written, and what is refused."""

import io
import json
import os
import sys

import datasets
import pytest
from transformers import AutoModel

from qformer_captioner import QFormerCaptioner, QFormerForPretraining
from qformer_captioner.captioning.arguments import parse_options, settings_of
from qformer_captioner.captioning.reporting import printable_line
from qformer_captioner.cli.caption import caption, main, open_source
from qformer_captioner.common.errors import InputError
from qformer_captioner.evaluation.caption_files import ReferenceSet, join, read_predictions

from ..fixtures import tiny
from ..fixtures.processes import command_line
from ..model.test_loading import adapter_of

DECODING = dict(max_new_tokens=6)
FORMS = ["referenced", "included", "adapter", "stage1"]


def run(monkeypatch, *words: str) -> None:
    """Run the command as a program."""
    monkeypatch.setattr(sys, "argv", ["qformer-captioner caption", *words])
    main()


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
    (folder / "images" / "._a.JPG").write_bytes(b"what macOS writes")
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


def test_a_bad_file_gets_an_error_and_the_others_get_captions(folder, tmp_path, capsys, monkeypatch):
    (tmp_path / "broken.png").write_bytes((folder / "images" / "b.png").read_bytes()[:200])
    files = [str(tmp_path / "broken.png"), str(tmp_path / "absent.png"), str(folder / "images" / "b.png")]
    with pytest.raises(SystemExit, match="2 of 3 images have no caption") as stopped:
        run(monkeypatch, *files, *options_for(folder, output=tmp_path / "captions.json"))
    assert stopped.value.code
    printed = capsys.readouterr()
    assert "broken.png" in printed.err and "absent.png" in printed.err
    assert list(read_predictions(tmp_path / "captions.json")) == files[2:]


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".csv", ".parquet"])
def test_saved_captions_can_be_scored(folder, tmp_path, capsys, ending):
    output = tmp_path / f"captions{ending}"
    caption([str(folder / "images"), *options_for(folder)])
    printed = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    caption([str(folder / "images"), *options_for(folder, output=output)])
    assert read_predictions(output) == printed
    references = ReferenceSet({number: ["a star"] for number in range(3)}, dict(enumerate(IMAGES)))
    joined, _ = join(read_predictions(output), references)
    assert sorted(joined) == [0, 1, 2]


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
        run(monkeypatch, str(folder / "images" / "b.png"), *command_line(**options))


def test_a_model_that_is_not_a_captioner_is_refused(folder, monkeypatch):
    with pytest.raises(SystemExit, match="holds a CLIPVisionModel, not a captioner"):
        run(monkeypatch, str(folder / "images" / "b.png"), *options_for(folder, "vision"))


def test_a_folder_without_images_is_named(folder, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=f"no images in '{tmp_path}'"):
        run(monkeypatch, str(tmp_path), *options_for(folder))


# --- Many images ------------------------------------------------------------------------------------------------------


def captions_of(output) -> list[str]:
    return [json.loads(line)["caption"] for line in output.read_text().splitlines()]


def break_after(output, batches: int) -> None:
    """Undo what a run wrote after some batches, as if it had been killed."""
    record = output.with_name(f"{output.name}.progress")
    record.write_text("".join(record.read_text().splitlines(keepends=True)[: 1 + batches]))


def test_sampled_captions_are_the_same_after_a_kill(folder, tmp_path):
    sampling = dict(do_sample="", temperature=1.5, num_return_sequences=2, batch_size=1)
    words = [word for word in options_for(folder, output=tmp_path / "a.jsonl", **sampling) if word]
    caption([str(folder / "images"), *words])
    captions = captions_of(tmp_path / "a.jsonl")
    assert len({text for texts in captions for text in texts}) > 3
    break_after(tmp_path / "a.jsonl", 1)
    caption([str(folder / "images"), *words])
    assert captions_of(tmp_path / "a.jsonl") == captions
    caption([str(folder / "images"), *words, "--overwrite_output", "--seed", "1"])
    assert captions_of(tmp_path / "a.jsonl") != captions


def test_new_images_are_added_and_broken_ones_tried_again(folder, tmp_path):
    images, output = tmp_path / "images", tmp_path / "a.jsonl"
    images.mkdir()
    (images / "a.png").write_bytes(b"")
    tiny.picture(1).save(images / "b.png")
    words = [str(images), *options_for(folder, output=output)]
    with pytest.raises(InputError, match="1 of 2 images have no caption"):
        caption(words)
    tiny.picture(2).save(images / "c.png")
    with pytest.raises(InputError, match="1 of 3 images have no caption"):
        caption(words)
    tiny.picture(3).save(images / "a.png")
    caption(words)
    ids = [json.loads(line)["image_id"] for line in output.read_text().splitlines()]
    assert ids == [str(images / name) for name in ("b.png", "c.png", "a.png")]


def test_names_come_from_stdin_and_lists(folder, tmp_path, monkeypatch, capsys):
    files = [str(folder / "images" / name) for name in IMAGES]
    (tmp_path / "list").write_text("\n".join(files[:2]))
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{files[2]}\n{files[0]}\n"))
    caption(["-", "--filelist", str(tmp_path / "list"), *options_for(folder)])
    printed = [line.split(": ")[0] for line in capsys.readouterr().out.splitlines()]
    assert printed == [files[2], files[0], files[1]]  # each once


def test_texts_are_written_beside_the_images(folder, tmp_path, log):
    for number, name in enumerate(("a.png", "b.png")):
        tiny.picture(number).save(tmp_path / name)
    (tmp_path / "a.txt").write_text("a dog")
    caption([str(tmp_path), *options_for(folder, sidecar=".txt", prefix="sks, ", suffix=".")])
    assert (tmp_path / "a.txt").read_text() == "a dog"
    text = (tmp_path / "b.txt").read_text()
    assert text.startswith("sks, ") and text.endswith(".\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "a.txt", "b.png", "b.txt"]
    assert "1 images have captions, 1 had them before, 1 files that are not images left out." in log.messages


def test_a_data_set_is_captioned_and_scored(folder, tmp_path):
    pictures = [tiny.picture(number) for number in range(3)]
    columns = {"photo": [*pictures[:2], None], "key": ["x", "y", "z"]}
    rows = datasets.Dataset.from_dict(
        columns, features=datasets.Features(photo=datasets.Image(), key=datasets.Value("string"))
    )
    rows.to_parquet(tmp_path / "rows.parquet")
    words = ["--dataset_name", str(tmp_path / "rows.parquet"), "--image_id_column", "key", "--score"]
    with pytest.raises(InputError, match="1 of 3 images have no caption"):
        caption([*words, *options_for(folder, output=tmp_path / "a.jsonl")])
    found = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [row["image_id"] for row in found] == ["x", "y"]
    assert [row["caption"] for row in found] == AutoModel.from_pretrained(folder / "referenced").caption(
        pictures[:2], **DECODING
    )
    assert all(row["score"] < 0 for row in found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output": "captions.txt"}, "ending of --output 'captions.txt' does not say a form: use .jsonl, .csv"),
        ({"temperature": 0.5}, "--temperature belongs to sampling: add --do_sample"),
        ({"num_return_sequences": 2}, "--num_return_sequences 2 needs --do_sample, or --num_beams of at least 2"),
        ({"sidecar": "txt"}, "--sidecar must be a suffix such as .txt or .caption, not 'txt'"),
        ({"sidecar": ".JPG"}, "--sidecar .JPG would replace images or data by texts"),
        ({"sidecar": ".small.parquet"}, "--sidecar .small.parquet would replace images or data by texts"),
        ({"seed": 2**64}, "--seed must be at most 18446744073709551615, not 18446744073709551616"),
        ({"existing": "append"}, "--existing append belongs to --sidecar"),
        ({"split": "dev"}, "--split belongs to --dataset_name"),
        ({"filelist": "absent"}, "list of files 'absent' cannot be read"),
        ({"repetition_penalty": 0}, "--repetition_penalty must be above 0"),
    ],
)
def test_options_that_contradict_each_other_end_in_one_message(folder, monkeypatch, options, message):
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        run(monkeypatch, str(folder / "images" / "b.png"), *command_line(model=folder / "referenced", **options))


def test_an_output_of_another_program_is_not_touched(folder, tmp_path, monkeypatch):
    (tmp_path / "a.csv").write_text("mine")
    with pytest.raises(SystemExit, match="exists, and has no record 'a.csv.progress'.*--overwrite_output"):
        run(monkeypatch, str(folder / "images"), *options_for(folder, output=tmp_path / "a.csv"))
    assert (tmp_path / "a.csv").read_text() == "mine"


def test_nothing_to_caption_is_said_at_once(monkeypatch):
    with pytest.raises(SystemExit, match="name files or folders, or give --filelist or --dataset_name"):
        run(monkeypatch, "--model", "nowhere")


@pytest.mark.parametrize("way", ["name", "pattern", "link", "list", "data set"])
def test_an_input_that_is_the_output_is_refused_and_kept(tmp_path, monkeypatch, way):
    (tmp_path / "own.tar").write_bytes(b"samples")
    (tmp_path / "link.tar").symlink_to(tmp_path / "own.tar")
    (tmp_path / "list").write_text(f"{tmp_path}/own.tar\n")
    words = {
        "name": [f"{tmp_path}/own.tar"],
        "pattern": [f"{tmp_path}/o*.tar"],
        "link": [f"{tmp_path}/link.tar"],
        "list": ["--filelist", f"{tmp_path}/list"],
        "data set": ["--dataset_name", f"{tmp_path}/own.tar"],
    }[way]
    with pytest.raises(SystemExit, match=r"own\.tar' is also an input: choose another --output"):
        run(monkeypatch, *words, *command_line(model="nowhere", output=tmp_path / "own.tar"), "--overwrite_output")
    assert (tmp_path / "own.tar").read_bytes() == b"samples"


def test_an_output_inside_the_data_set_is_refused(tmp_path, monkeypatch):
    words = command_line(dataset_name=tmp_path, model="nowhere", output=tmp_path / "metadata.jsonl")
    with pytest.raises(SystemExit, match="is inside the data set: choose an --output outside of it"):
        run(monkeypatch, *words)


def test_a_list_of_names_may_be_a_pipe(tmp_path):
    tiny.picture().save(tmp_path / "a.png")
    reader, writer = os.pipe()
    os.write(writer, f"{tmp_path}/a.png\n".encode())
    os.close(writer)
    options = parse_options(["--filelist", f"/dev/fd/{reader}", "--model", "nowhere"], "")
    assert [item.path for item in open_source(options)] == [f"{tmp_path}/a.png"]
    os.close(reader)


def test_the_batch_size_is_a_setting_of_sampling_only():
    words = ["a.png", "--model", "nowhere", "--batch_size"]
    sampled, greedy = (
        [settings_of(parse_options([*words, size, *more], "")) for size in "48"] for more in (["--do_sample"], [])
    )
    assert sampled[0] != sampled[1] and greedy[0] == greedy[1]
