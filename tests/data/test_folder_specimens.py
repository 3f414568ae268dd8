"""Folders, paths, tars and splits of the shared specimens, with the right answers of their README."""

import pytest

from qformer_captioner.common.errors import InputError

from ..fixtures.read_rows import read_data

BLUE = ("blue", "a blue shape")
ANSWERS = {  # specimen and options: colours and captions
    "K5_folders/split_words_in_file_names": [("red", "a red shape"), ("green", "a green shape"), BLUE],
    "K5_folders/train_and_more": [("red", "a red shape")],
    "K5_folders/kaggle": [("red", "A red shape ."), ("green", "A green shape ."), ("blue", "A blue shape .")],
    "K5_folders/kohya": [("red", "a red shape, simple background"), ("green", "a green shape, simple background")],
    "K5_folders/json_sidecars": [("red", "a red shape"), ("green", "a green shape"), BLUE],
    "K3_structure/classes --caption_column label": [("red", "cat"), ("green", "dog")],
    "K6_paths/photos/backslash.csv": [("red", "a red thing"), ("green", "a green thing")],
    "K15_tars/mixed.tar": [("red", "a red photo"), ("green", "a green photo")],
    "K15_tars/missing_txt.tar": [("red", "a red photo"), ("blue", "a blue photo")],
    "K17_skips/199_of_200_missing.csv --max_skipped 1": [("red", "a red thing")],
    "K18_splits/training_valid.csv --train_split training": [("red", "a red"), ("green", "a green")],
}
REFUSED = {
    "K6_paths/photos/url.csv": "not downloaded",
    "K17_skips/199_of_200_missing.csv": "The images of 199 of 200 rows of train cannot be read .*--max_skipped",
    "K18_splits/training_valid.csv": "it has 'training', 'valid'. Choose with --train_split and --eval_split",
}


@pytest.mark.parametrize("specimen", ANSWERS)
def test_specimens_are_read(shared, specimen):
    name, *options = specimen.split()
    rows = read_data("--dataset_name", shared / "specimens" / name, *options).train
    assert rows == [(colour, [caption]) for colour, caption in ANSWERS[specimen]]


@pytest.mark.parametrize("specimen", REFUSED)
def test_specimens_are_refused_with_the_reason(shared, specimen):
    with pytest.raises(InputError, match=REFUSED[specimen]) as caught:
        read_data("--dataset_name", shared / "specimens" / specimen)
    assert len(str(caught.value)) <= 500


def test_a_name_in_another_unicode_normalization_finds_its_file(shared):
    rows = read_data("--dataset_name", shared / "specimens" / "K6_paths" / "photos" / "nfd.csv").train
    assert [captions for _, captions in rows] == [["a gray thing"], ["a green thing"]]


def test_what_is_left_out_is_named(shared, log):
    folder = shared / "specimens"
    assert read_data("--dataset_name", folder / "K15_tars" / "missing_txt.tar").skipped[0]["file"] == "2.jpg"
    read_data("--dataset_name", folder / "K5_folders" / "train_and_more")
    assert "also has 'more'" in log.text
