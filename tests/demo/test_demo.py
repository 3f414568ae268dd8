"""The demo, in a headless browser: what a visitor does, and what a bad one tries. Each test states one property."""

import json
import re
import shutil
import struct
import sys
import time
import zlib
from pathlib import Path

import app
import attention
import httpx
import pytest
import screenshot
import torch
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from ..conftest import ROOT
from ..fixtures import tiny

needs_browser = "make test EXTRAS=test,demo, with chromium and chromium-driver, runs the demo in a browser"
pytest.importorskip("gradio", reason=needs_browser)
pytest.importorskip("selenium", reason=needs_browser)


if screenshot.find_browser() is None or shutil.which("chromedriver") is None:
    pytest.skip(needs_browser, allow_module_level=True)

MARKUP = "<script>window.ran=1</script><img/src=x/onerror=window.ran=1>${window.ran=1}{{window.ran=1}}"


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Of a machine without a network; gradio keeps its files where the test keeps its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("home")))
        patch.delenv("MODEL_ID", raising=False)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A saved captioner with two examples, one of which is none."""
    folder = tmp_path_factory.mktemp("captioner")
    model = tiny.captioner()
    model.generation_config.max_new_tokens = 8
    model.save_pretrained(folder)
    (folder / "examples").mkdir()
    tiny.picture(7).save(folder / "examples" / "seven.png")
    (folder / "examples" / "text.png").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return app.load(str(folder), None)


@pytest.fixture(scope="module")
def address(folder, environment):
    with screenshot.serve(str(folder)) as address:
        yield address


@pytest.fixture
def browser(address):
    with screenshot.open_browser(address) as browser:
        yield browser


def png(width: int, height: int) -> bytes:
    """The beginning of a PNG file that says it is so large."""
    chunks = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks
    )


def bad_file(kind: str, folder: Path) -> Path:
    path = folder / f"{kind}.png"
    if kind == "text":
        path.write_text("This is no image.")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "truncated":
        tiny.picture(size=(300, 300)).save(path, "JPEG")
        path.write_bytes(path.read_bytes()[:3000])
    elif kind == "bomb":
        path.write_bytes(png(60_000, 60_000))
    elif kind == "huge":
        path.write_bytes(png(9_000, 9_000))
    elif kind == "strip":
        tiny.picture(size=(2000, 2)).save(path)
    elif kind == "svg":
        path.write_text('<svg xmlns="http://www.w3.org/2000/svg" onload="window.ran=1"/>')
    elif kind == "eps":
        path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    return path


BAD = {
    "text": "cannot be read as an image",
    "empty": "cannot be read as an image",
    "truncated": "damaged or not complete",
    "bomb": "million pixels",
    "huge": "9000 x 9000 pixels",
    "strip": "too narrow a strip",
    "svg": "cannot be read as an image",
    "eps": "cannot be read as an image",
}


def status(browser) -> str:
    return browser.find_element(By.ID, "status").text


def captioned(browser) -> str:
    """The caption, once the maps below it have been drawn."""
    screenshot.wait_for(browser, screenshot.DRAWN.format("queries"))
    return screenshot.text_of(browser, "caption")


def click(browser, selector: str, which: int = 0) -> None:
    browser.execute_script("arguments[0].click()", screenshot.wait_for(browser, selector)[which])


# --- In the browser ---------------------------------------------------------------------------------------------------


def test_an_image_that_is_dropped_is_captioned_and_shows_where_words_and_queries_look(browser, model, tmp_path):
    tiny.picture(3).save(tmp_path / "picture.png")
    screenshot.upload(browser, tmp_path / "picture.png")
    assert captioned(browser) == model.caption(tmp_path / "picture.png") != ""
    assert len(browser.find_elements(By.CSS_SELECTOR, screenshot.DRAWN.format("queries"))) == tiny.QUERIES
    names = [name.text for name in browser.find_elements(By.CSS_SELECTOR, "#words figcaption b")]
    assert "".join(names) == screenshot.text_of(browser, "caption").replace(" ", "")


def test_an_example_is_captioned_when_it_is_clicked(browser, folder, model):
    examples = screenshot.wait_for(browser, ".gallery-item")
    assert len(examples) == 1  # the other file is no image
    click(browser, ".gallery-item")
    assert captioned(browser) == model.caption(folder / "examples" / "seven.png")


def test_beam_search_gives_captions_to_compare_and_a_click_shows_the_maps_of_another(browser, model, tmp_path):
    tiny.picture(3).save(tmp_path / "picture.png")
    click(browser, "#search input", -1)
    screenshot.upload(browser, tmp_path / "picture.png")
    first = captioned(browser)
    expected = model.caption(tmp_path / "picture.png", num_beams=5, num_return_sequences=5)
    cells = [cell.text for cell in screenshot.wait_for(browser, "#candidates [role=gridcell]", 20)]
    assert first == expected[0] and cells[::4] == expected
    scores = [float(score) for score in cells[1::4]]
    assert scores == sorted(scores, reverse=True)

    before = browser.find_element(By.ID, "words").text
    browser.find_element(By.CSS_SELECTOR, "#candidates [data-row='1'][data-col='0']").click()
    WebDriverWait(browser, 30).until(lambda _: browser.find_element(By.ID, "words").text != before)
    names = [name.text for name in browser.find_elements(By.CSS_SELECTOR, "#words figcaption b")]
    assert "".join(names) == expected[1].replace(" ", "")


@pytest.mark.parametrize("kind", ["text", "truncated", "bomb", "strip"])
def test_a_bad_file_gives_a_message_and_the_next_image_a_caption(browser, tmp_path, kind):
    screenshot.upload(browser, bad_file(kind, tmp_path))
    WebDriverWait(browser, 30).until(lambda _: "⚠" in status(browser))
    assert BAD[kind] in status(browser)
    assert not re.search("Traceback|Error", browser.find_element(By.TAG_NAME, "body").text)
    assert screenshot.text_of(browser, "caption") == ""
    click(browser, "#image button[aria-label='Clear'], #image button[aria-label='Remove Image']")
    tiny.picture(3).save(tmp_path / "picture.png")
    WebDriverWait(browser, 30).until(lambda _: browser.find_elements(By.CSS_SELECTOR, "#image input[type=file]"))
    screenshot.upload(browser, tmp_path / "picture.png")
    assert captioned(browser) != "" and status(browser) == ""


def test_markup_in_a_caption_is_text(environment, tmp_path):
    """Of a captioner all of whose words are markup."""
    model = tiny.captioner()
    model.generation_config.max_new_tokens = 8
    model.save_pretrained(tmp_path / "captioner")
    file = tmp_path / "captioner" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    words = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {
        word if number < 3 else f"Ġ{MARKUP}{number}": number for word, number in words.items()
    }
    file.write_text(json.dumps(tokenizer))
    tiny.picture(3).save(tmp_path / "picture.png")
    with (
        screenshot.serve(str(tmp_path / "captioner")) as address,
        screenshot.open_browser(address) as browser,
    ):
        screenshot.upload(browser, tmp_path / "picture.png")
        assert MARKUP in captioned(browser)
        for part in ("candidates", "words"):
            assert MARKUP in browser.find_element(By.ID, part).text
        time.sleep(0.5)  # for a picture that is not there to fail
        assert browser.execute_script("return window.ran") is None
        assert not browser.find_elements(By.CSS_SELECTOR, "img[src='x'], img[src='x/onerror=window.ran=1']")


def test_a_file_of_the_server_is_not_captioned(address, folder, tmp_path):
    """Whoever calls the page's function by hand may name files that were uploaded, and no others and no address."""

    def call(path: str, **more) -> str:
        words = [{"path": path, "meta": {"_type": "gradio.FileData"}, **more}, "", app.GREEDY, 5, 8, 1]
        event = httpx.post(f"{address}/gradio_api/call/caption", json={"data": words}).json()["event_id"]
        return httpx.get(f"{address}/gradio_api/call/caption/{event}", timeout=60).text

    tiny.picture(3).save(tmp_path / "picture.png")
    with (tmp_path / "picture.png").open("rb") as file:
        uploaded = httpx.post(f"{address}/gradio_api/upload", files={"files": file}).json()[0]
    assert "event: complete" in call(uploaded)
    for path in (tmp_path / "picture.png", folder / "config.json"):
        assert "event: complete" not in call(str(path))
    assert "event: complete" not in call(address, url=address)


def test_the_page_asks_nobody_else_for_anything(browser, address, tmp_path):
    tiny.picture(3).save(tmp_path / "picture.png")
    screenshot.upload(browser, tmp_path / "picture.png")
    captioned(browser)
    asked = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert asked and [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []


# --- Without one ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_image_to_caption_is_refused_with_the_reason(tmp_path, kind):
    with pytest.raises(ValueError, match=BAD[kind]):
        app.open_image(str(bad_file(kind, tmp_path)))


@pytest.mark.parametrize("search", [app.GREEDY, app.SAMPLING])
@pytest.mark.parametrize("language", ["llama", "t5"])
def test_a_caption_streams(language, search):
    model = tiny.captioner(language=language)
    seen = attention.see(model, tiny.picture())
    torch.manual_seed(0)
    *streamed, (last, found) = app.write(model, seen, search, 5, 8, 3)
    texts = [text for text, _ in streamed]
    assert len(set(texts)) > 2 and all(last.startswith(text) for text in texts)
    assert last == model.processor.decode(found[0], skip_special_tokens=True).strip()
    if search == app.GREEDY:
        assert last == model.caption(tiny.picture(), max_new_tokens=8) and len(found) == 1


def test_more_tokens_than_the_language_model_reads_are_an_error_and_no_wait():
    model = tiny.captioner()
    seen = attention.see(model, tiny.picture())
    with pytest.raises(ValueError, match="at most 64 tokens"):
        list(app.write(model, seen, app.GREEDY, 5, 100, 1))


def test_a_visitor_who_leaves_stops_the_caption(monkeypatch):
    model = tiny.captioner()
    model.generation_config.eos_token_id = None
    lengths = []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda **options: lengths.append(ids := generate(**options)) or ids)
    writing = app.write(model, attention.see(model, tiny.picture()), app.GREEDY, 5, 60, 1)
    next(writing)
    writing.close()
    assert lengths[0].shape[1] < 60


def test_what_the_space_installs_is_what_is_tested():
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    wanted = dict(line.split("==") for line in (ROOT / "demo" / "requirements.txt").read_text().split())
    assert {name: pinned[name] for name in wanted} == wanted
    assert f"sdk_version: {pinned['gradio']}\n" in (ROOT / "demo" / "README.md").read_text()


@pytest.mark.parametrize("options", [["--model", "TESTS"], ["--model", "FOLDER", "--examples", "nowhere"], []])
def test_a_captioner_that_cannot_be_shown_is_one_line(environment, folder, monkeypatch, capsys, options):
    folders = {"FOLDER": str(folder), "TESTS": str(ROOT / "tests")}  # in the other one there is no captioner
    monkeypatch.setattr(sys, "argv", ["app.py", *(folders.get(word, word) for word in options)])
    with pytest.raises(SystemExit) as stopped:
        app.main()
    message = capsys.readouterr().err if stopped.value.code == 2 else stopped.value.code
    assert re.search("tests.* cannot be shown|nowhere|MODEL_ID", message.strip().splitlines()[-1])
