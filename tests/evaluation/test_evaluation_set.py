"""Evaluation sets out of the rows of a data set."""

import datasets
import pytest
from PIL import ImageColor

from qformer_captioner.common.errors import InputError
from qformer_captioner.data.dataset import CaptionSource
from qformer_captioner.data.image_paths import folder_of_images
from qformer_captioner.data.loading import load_rows
from qformer_captioner.evaluation.benchmarks import load_evaluation_set

from ..fixtures.captioned_files import COLOURS, write_csv, write_pictures


@pytest.fixture
def folder(tmp_path):
    """Return a folder with a picture of each colour in `pictures/`."""
    return write_pictures(tmp_path)


def test_rows_that_name_the_same_file_are_captions_of_one_image(tmp_path):
    rows = {"image": ["a.png", "b.png", "a.png", "c.png", "a.png"], "caption": ["one", "two", "three", "four", "five"]}
    found = load_evaluation_set(CaptionSource("test", datasets.Dataset.from_dict(rows)))
    assert found.references.captions == {0: ["one", "three", "five"], 1: ["two"], 3: ["four"]}


def test_lists_of_one_image_become_an_evaluation_set(folder):
    rows = datasets.Dataset.from_dict({"images": [[str(folder / "pictures/red.png")]], "caption": ["all red"]})
    found = load_evaluation_set(CaptionSource("test", rows, "images"))
    assert found.open(0).getpixel((0, 0)) == (255, 0, 0) and list(found.fingerprints()) == [0]


def test_rows_of_a_file_become_an_evaluation_set(folder):
    name = write_csv(folder / "rows.csv")
    rows = load_rows(name)["train"]
    found = load_evaluation_set(CaptionSource("test", rows, image_folder=folder_of_images(name, rows)))
    assert [found.open(image).getpixel((0, 0)) for image in found.row_of] == list(map(ImageColor.getrgb, COLOURS))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"image": [0.5, 2.5], "caption": ["one", "two"]},
            "'image' holds Value.'float64'., not images or paths.*image_column",
        ),
        ({"image": [[["a.png"]]], "caption": ["both"]}, "'image' holds List.*, not images or paths"),
        ({"image": ["a.png"], "caption": [{"boxes": 1}]}, "holds a dictionary with 'boxes'.*--caption_column"),
    ],
)
def test_columns_without_images_or_captions_are_described(columns, message):
    with pytest.raises(InputError, match=message):
        load_evaluation_set(CaptionSource("test", datasets.Dataset.from_dict(columns)))
