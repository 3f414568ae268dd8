"""Specimens of users' image files, each with its right answer."""

import json

import numpy as np
import pytest

from qformer_captioner.images_qformer import open_image

from ..fixtures.read_rows import read_data


def pixels(path) -> np.ndarray:
    """Return the pixels of an image, `[H, W, 3]`."""
    return np.asarray(open_image(path))


@pytest.mark.parametrize("name", ["logo.png", "t.webp"])
def test_transparency_is_laid_on_white(shared, name):
    assert pixels(shared / "specimens/K10_pixels" / name)[0, 0].tolist() == [255, 255, 255]


def test_16_bit_grey_keeps_its_gradient(shared):
    picture = pixels(shared / "specimens/K10_pixels/g16.png")
    assert picture.mean() == 127.5 and (picture.min(), picture.max()) == (0, 255)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("K10_pixels/trunc2.jpg", "it is cut off or damaged"),
        ("K11_kinds/zero.jpg", "it is empty"),
        ("K11_kinds/html.jpg", "an HTML page"),
        ("K11_kinds/a.heic", "a HEIC image; `pip install pillow-heif`|of a kind that Pillow does not read"),
    ],
)
def test_a_file_is_named_for_what_it_is(shared, name, kind):
    with pytest.raises(OSError, match=f"cannot be read: .*({kind})"):
        open_image(shared / "specimens" / name)


def test_base64_that_holds_no_image_is_not_repeated_in_messages(shared, folder, tmp_path):
    row = json.loads((shared / "specimens/K9_long/base64.jsonl").read_text().splitlines()[0])
    rows = [row, *[{"image": "pictures/red.png", "caption": "all red"}] * 19]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (entry,) = read_data("--dataset_name", folder / "rows.jsonl").skipped
    assert len(json.dumps(entry)) <= 500 and "its format is unknown" in entry["reason"]
