"""The demo in a headless browser: use by a visitor, and misuse."""

import json
import re
import shutil
import time

import httpx
import pytest

from ..fixtures import tiny
from ..fixtures.image_files import BAD_FILES, bad_file

NEEDS_BROWSER = "make test EXTRAS=test,demo, with chromium and chromium-driver, runs the demo in a browser"
app = pytest.importorskip("app", reason=NEEDS_BROWSER)
screenshot = pytest.importorskip("screenshot", reason=NEEDS_BROWSER)
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

if screenshot.find_browser() is None or shutil.which("chromedriver") is None:
    pytest.skip(NEEDS_BROWSER, allow_module_level=True)

pytestmark = pytest.mark.slow

MARKUP = "<script>window.ran=1</script><img/src=x/onerror=window.ran=1>${window.ran=1}{{window.ran=1}}"


@pytest.fixture(scope="module")
def model(folder):
    return app.load_captioner(str(folder), None)


@pytest.fixture(scope="module")
def address(folder, environment):
    with screenshot.serve(str(folder)) as address:
        yield address


@pytest.fixture(scope="module")
def window(address):
    with screenshot.open_browser(address) as browser:
        yield browser


@pytest.fixture
def browser(window, address):
    """Return a browser that shows the page as a new visitor finds it."""
    return reload(window, address)


def reload(browser, address: str):
    browser.get(address)
    screenshot.wait_for(browser, "#image input[type=file]")
    return browser


def status(browser) -> str:
    return browser.find_element(By.ID, "status").text


def captioned(browser) -> str:
    """Wait until the maps are drawn, and return the caption."""
    screenshot.wait_for(browser, screenshot.MAPS.format("queries"))
    return screenshot.text_of(browser, "caption")


def click(browser, selector: str, index: int = 0) -> None:
    browser.execute_script("arguments[0].click()", screenshot.wait_for(browser, selector)[index])


def test_an_uploaded_image_gets_a_caption_and_maps(browser, model, tmp_path):
    tiny.picture(3).save(tmp_path / "picture.png")
    screenshot.upload(browser, tmp_path / "picture.png")
    assert captioned(browser) == model.caption(tmp_path / "picture.png") != ""
    assert len(browser.find_elements(By.CSS_SELECTOR, screenshot.MAPS.format("queries"))) == tiny.QUERIES
    names = [name.text for name in browser.find_elements(By.CSS_SELECTOR, "#words figcaption b")]
    assert "".join(names) == screenshot.text_of(browser, "caption").replace(" ", "")


def test_a_clicked_example_gets_a_caption(browser, folder, model):
    examples = screenshot.wait_for(browser, ".gallery-item")
    assert len(examples) == 1  # the other file is not an image
    click(browser, ".gallery-item")
    assert captioned(browser) == model.caption(folder / "examples" / "seven.png")


def test_beam_search_lists_captions_and_a_click_on_one_shows_its_maps(browser, model, tmp_path):
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
def test_a_bad_file_gets_a_message_and_the_next_image_a_caption(browser, tmp_path, kind):
    screenshot.upload(browser, bad_file(kind, tmp_path))
    WebDriverWait(browser, 30).until(lambda _: "⚠" in status(browser))
    assert BAD_FILES[kind] in status(browser)
    assert not re.search("Traceback|Error", browser.find_element(By.TAG_NAME, "body").text)
    assert screenshot.text_of(browser, "caption") == ""
    click(browser, "#image button[aria-label='Clear'], #image button[aria-label='Remove Image']")
    tiny.picture(3).save(tmp_path / "picture.png")
    WebDriverWait(browser, 30).until(lambda _: browser.find_elements(By.CSS_SELECTOR, "#image input[type=file]"))
    screenshot.upload(browser, tmp_path / "picture.png")
    assert captioned(browser) != "" and status(browser) == ""


def test_markup_in_a_caption_is_text(window, tmp_path):
    """All tokens of the captioner are markup."""
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
    with screenshot.serve(str(tmp_path / "captioner")) as address:
        browser = reload(window, address)
        screenshot.upload(browser, tmp_path / "picture.png")
        assert MARKUP in captioned(browser)
        for part in ("candidates", "words"):
            assert MARKUP in browser.find_element(By.ID, part).text
        time.sleep(0.5)  # time for a missing image to fail
        assert browser.execute_script("return window.ran") is None
        assert not browser.find_elements(By.CSS_SELECTOR, "img[src='x'], img[src='x/onerror=window.ran=1']")


def test_a_file_of_the_server_is_not_captioned(address, folder, tmp_path):
    """A request by hand can name uploaded files only, no other files and no addresses."""

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


def test_the_page_loads_nothing_from_other_servers(browser, address, tmp_path):
    tiny.picture(3).save(tmp_path / "picture.png")
    screenshot.upload(browser, tmp_path / "picture.png")
    captioned(browser)
    urls = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert urls and [url for url in urls if not url.startswith((address, "data:", "blob:"))] == []
