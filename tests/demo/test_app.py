"""The demo without a browser: files that visitors upload, generation, and the command line."""

import re
import sys

import attention
import pytest
import torch
from PIL import Image

from ..conftest import ROOT
from ..fixtures import tiny
from ..fixtures.image_files import BAD_FILES, bad_file

app = pytest.importorskip("app", reason="make test EXTRAS=test,demo runs the tests of the demo")


@pytest.mark.parametrize("kind", BAD_FILES)
def test_an_unsuitable_file_is_refused_with_the_reason(tmp_path, kind):
    with pytest.raises(ValueError, match=BAD_FILES[kind]):
        app.open_upload(tiny.captioner(), str(bad_file(kind, tmp_path)))


def test_transparency_is_laid_on_white_as_everywhere(tmp_path):
    Image.new("RGBA", (20, 10), (255, 0, 0, 0)).save(tmp_path / "logo.png")
    assert app.open_upload(tiny.captioner(), str(tmp_path / "logo.png")).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("search", [app.GREEDY, app.SAMPLING])
@pytest.mark.parametrize("language", ["llama", "t5"])
def test_a_caption_streams(language, search):
    model = tiny.captioner(language=language)
    image = attention.encode_image(model, tiny.picture())
    torch.manual_seed(0)
    *streamed, (last, captions) = app.generate_captions(
        model, image, search, num_beams=5, max_new_tokens=8, num_captions=3
    )
    texts = [text for text, _ in streamed]
    assert len(set(texts)) > 2 and all(last.startswith(text) for text in texts)
    assert last == model.processor.decode(captions[0], skip_special_tokens=True).strip()
    if search == app.GREEDY:
        assert last == model.caption(tiny.picture(), max_new_tokens=8) and len(captions) == 1


def test_more_tokens_than_the_language_model_allows_are_an_error():
    model = tiny.captioner()
    image = attention.encode_image(model, tiny.picture())
    with pytest.raises(ValueError, match="at most 64 tokens"):
        list(app.generate_captions(model, image, app.GREEDY, 5, 100, 1))


def test_generation_stops_when_the_visitor_leaves(monkeypatch):
    model = tiny.captioner()
    model.generation_config.eos_token_id = None
    lengths = []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda **options: lengths.append(ids := generate(**options)) or ids)
    writing = app.generate_captions(model, attention.encode_image(model, tiny.picture()), app.GREEDY, 5, 60, 1)
    next(writing)
    writing.close()
    assert lengths[0].shape[1] < 60


def test_the_space_installs_the_versions_that_are_tested():
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    required = dict(line.split("==") for line in (ROOT / "demo" / "requirements.txt").read_text().split())
    assert {name: pinned[name] for name in required} == required
    assert f"sdk_version: {pinned['gradio']}\n" in (ROOT / "demo" / "README.md").read_text()


@pytest.mark.parametrize("options", [["--model", "TESTS"], ["--model", "FOLDER", "--examples", "nowhere"], []])
def test_an_unusable_command_line_ends_with_one_line(environment, folder, monkeypatch, capsys, options):
    folders = {"FOLDER": str(folder), "TESTS": str(ROOT / "tests")}  # the folder of tests holds no captioner
    monkeypatch.setattr(sys, "argv", ["app.py", *(folders.get(word, word) for word in options)])
    with pytest.raises(SystemExit) as stopped:
        app.main()
    message = capsys.readouterr().err if stopped.value.code == 2 else stopped.value.code
    assert re.search("tests.* cannot be shown|nowhere|MODEL_ID", message.strip().splitlines()[-1])


def test_a_model_of_stage_1_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(OSError, match="holds a QFormerForPretraining, but the demo shows captioners"):
        app.load_captioner(tiny.save_stage1(tmp_path), None)
