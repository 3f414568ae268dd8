"""Take a screenshot of the demo in a headless Chromium.

    python demo/screenshot.py --model outputs/scenes
    python demo/screenshot.py --model ID --image picture.jpg --examples FOLDER

It needs `pip install selenium`, and Chromium with its driver (`apt install chromium chromium-driver`). Without --image
it draws scenes, which needs the package qformer-captioner and a captioner trained with `python train_hf.py`.
"""

import argparse
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

TIMEOUT = 120  # seconds to wait for loading or captioning
MAPS = "#{} figure img"  # selector of the maps of "words" or "queries"


@contextmanager
def serve(model: str, *options: str) -> Iterator[str]:
    """Run the demo on a free port, and yield its address.

    Args:
        model: folder or Hub id of a captioner.
        options: more options of `app.py`.

    Raises:
        RuntimeError: if the demo does not start; the message holds its output.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    app = [sys.executable, str(Path(__file__).with_name("app.py")), "--model", model, "--port", str(port), *options]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(app, stdout=log, stderr=subprocess.STDOUT)
        try:
            address = f"http://127.0.0.1:{port}"
            deadline = time.monotonic() + TIMEOUT
            while not _answers(address):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise RuntimeError(f"The demo did not start:\n{log.read()[-3000:]}")
                time.sleep(0.2)
            yield address
        finally:
            process.terminate()
            process.wait()


def _answers(address: str) -> bool:
    try:
        return urllib.request.urlopen(address, timeout=10).status == 200
    except OSError:
        return False


def find_browser() -> str | None:
    """Return the path of Chromium or Chrome, or `None` if neither is installed."""
    return shutil.which("chromium") or shutil.which("google-chrome")


@contextmanager
def open_browser(address: str, width: int = 1280, height: int = 1200) -> Iterator[WebDriver]:
    """Open an address in a headless Chromium, and yield the browser once the page has loaded."""
    options = webdriver.ChromeOptions()
    options.binary_location = find_browser()
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
        f"--window-size={width},{height}",
    ):
        options.add_argument(flag)
    browser = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        browser.get(address)
        wait_for(browser, "#image input[type=file]")
        yield browser
    finally:
        browser.quit()


def wait_for(browser: WebDriver, selector: str, number: int = 1) -> list[WebElement]:
    """Wait until a CSS selector finds a number of elements, and return them.

    Raises:
        TimeoutException: if they do not appear within `TIMEOUT`.
    """
    WebDriverWait(browser, TIMEOUT).until(lambda _: len(browser.find_elements(By.CSS_SELECTOR, selector)) >= number)
    return browser.find_elements(By.CSS_SELECTOR, selector)


def text_of(browser: WebDriver, element_id: str) -> str:
    """Return the text in a text box of the page."""
    return browser.find_element(By.CSS_SELECTOR, f"#{element_id} textarea, #{element_id} input").get_property("value")


def upload(browser: WebDriver, path: str | os.PathLike) -> None:
    """Upload an image file to the page."""
    browser.find_element(By.CSS_SELECTOR, "#image input[type=file]").send_keys(os.path.abspath(path))


def draw_held_out(folder: Path, number: int = 12) -> list[Path]:
    """Draw scenes that the captioner of `make demo` was not trained on, and return their paths."""
    from qformer_captioner.data.scenes import load_scenes

    paths = [folder / f"{i:02}.png" for i in range(number)]
    for path, row in zip(paths, load_scenes(0, number, image_size=384)["validation"], strict=True):
        row["image"].save(path)
    return paths


def main() -> None:
    """Serve the demo, caption an image, and save a screenshot."""
    parser = argparse.ArgumentParser(description="Take a screenshot of the demo.")
    parser.add_argument("--model", required=True, help="Folder or Hub id of a captioner.")
    parser.add_argument("--image", help="Image to caption. By default a drawn scene for the captioner of `make demo`.")
    parser.add_argument("--examples", help="Folder of example images. By default more drawn scenes.")
    parser.add_argument(
        "--output",
        default=str(Path(__file__).with_name("screenshot.png")),
        help="File to write. By default demo/screenshot.png.",
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        image, examples = arguments.image, arguments.examples
        if image is None:
            image, examples = draw_held_out(Path(folder))[9], examples or folder
        options = ["--examples", examples] if examples else []
        with serve(arguments.model, *options) as address, open_browser(address) as browser:
            # Beam search, to have captions to compare.
            browser.find_elements(By.CSS_SELECTOR, "#search input")[-1].click()
            upload(browser, image)
            wait_for(browser, MAPS.format("queries"))
            time.sleep(1)  # images fade in
            height = browser.execute_script("return document.documentElement.scrollHeight")
            browser.set_window_size(1280, height + 150)  # the size includes the frame of the window
            time.sleep(1)
            browser.save_screenshot(arguments.output)
    Image.open(arguments.output).convert("RGB").save(arguments.output, optimize=True)


if __name__ == "__main__":
    main()
