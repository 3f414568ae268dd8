"""Rows whose image cannot be read: how many stop a run before it starts, and what is said about them."""

import base64
import json

import pytest

from qformer_captioner import precompute_features
from qformer_captioner.common.errors import InputError
from qformer_captioner.data.skip_limit import SAMPLE_ROWS, SkipLimit, sample_of, try_images
from qformer_captioner.data.skipped_rows import SkippedRows

from ..fixtures import tiny
from ..fixtures.captioned_files import write_jsonl
from ..fixtures.read_rows import read_data


@pytest.fixture
def rows(folder):
    """Return a function that writes rows, of which some name an image that does not exist."""

    def write(good: int, missing: int, name: str = "rows.jsonl") -> str:
        images = ["pictures/red.png"] * good + [f"gone{number}.png" for number in range(missing)]
        return write_jsonl(folder / name, [{"image": image, "caption": image} for image in images])

    return write


def reads(name, *options):
    """Return the number of rows that are read for training."""
    return len(read_data("--dataset_name", name, *options).train)


def test_more_than_a_tenth_of_unreadable_rows_stops_a_run(rows):
    assert reads(rows(18, 2)) == 18
    message = r"The images of 2 of 19 rows of train cannot be read .There is no image file 'gone0.png'"
    with pytest.raises(InputError, match=message):
        reads(rows(17, 2))


@pytest.mark.parametrize(("allowed", "stops"), [(0.5, True), (0.51, False), (1, False), (100, True), (101, False)])
def test_max_skipped_is_a_share_up_to_one_and_then_a_number(allowed, stops):
    limit, errors = SkipLimit(allowed), [OSError("gone")] * 101
    if stops:
        with pytest.raises(InputError, match="--max_skipped"):
            limit.check("train", 200, 200, errors)
    else:
        limit.check("train", 200, 200, errors)


def test_max_skipped_allows_more(rows):
    assert reads(rows(1, 9), "--max_skipped", 0.9) == reads(rows(1, 9), "--max_skipped", 9) == 1


def test_unreadable_rows_to_evaluate_on_stop_a_run_too(rows):
    evaluation = ["--eval_dataset_name", rows(1, 2, "dev.jsonl")]
    with pytest.raises(InputError, match="The images of 2 of 3 rows of evaluation cannot be read"):
        reads(rows(5, 0), *evaluation)
    assert len(read_data("--dataset_name", rows(5, 0), *evaluation, "--max_skipped", 0.7).evaluation) == 1


def test_a_stream_stops_before_it_is_read(rows):
    from qformer_captioner.data.augmentation import Augmentation
    from qformer_captioner.train_hf import parse_options
    from qformer_captioner.training.data_setup import load_datasets

    for good, missing, stops in ((8, 2, True), (9, 1, False)):
        options = ["--dataset_name", rows(good, missing), "--streaming", "true", "--max_steps", "1"]
        args = parse_options(options)[1]
        if stops:
            with pytest.raises(InputError, match="The images of 2 of 10 rows of train cannot be read"):
                load_datasets(args, None, SkippedRows(), Augmentation())
        else:
            load_datasets(args, None, SkippedRows(), Augmentation())


def test_precomputing_stops_before_it_starts(rows, tmp_path):
    words = ["--vision_model_name_or_path", tiny.save_vision(tmp_path / "vision"), "--dataset_name", rows(8, 2)]
    words += ["--output_dir", tmp_path / "features", "--use_cpu", "true"]
    with pytest.raises(InputError, match="The images of 2 of 10 rows of train cannot be read"):
        precompute_features.precompute([str(word) for word in words])
    assert not (tmp_path / "features").exists()
    precompute_features.precompute([str(word) for word in (*words, "--max_skipped", 2)])
    entries = map(json.loads, (tmp_path / "features" / "skipped_rows.jsonl").read_text().splitlines())
    assert [entry["file"] for entry in entries] == ["gone0.png", "gone1.png"]


def test_an_even_sample_of_many_rows_is_tried():
    assert sample_of(range(SAMPLE_ROWS)) == range(SAMPLE_ROWS)
    sample = sample_of(range(10 * SAMPLE_ROWS))
    assert len(sample) == SAMPLE_ROWS and set(sample) == set(range(0, 10 * SAMPLE_ROWS, 10))


def test_rows_are_tried_in_order_and_read_in_portions():
    def open_row(row):
        if row % 3 == 0:
            raise OSError(row)

    taken = []
    outcomes = try_images((taken.append(row) or row for row in range(1000)), open_row)
    first = [next(outcomes) for _ in range(4)]
    assert [(row, error is not None) for row, error in first] == [(0, True), (1, False), (2, False), (3, True)]
    assert len(taken) < 100


def test_no_entry_holds_a_whole_image(folder, log):
    """Text in the column of images may be base64 that does not decode to an image."""
    text = base64.b64encode(b"no image" * 50_000).decode()
    good = [{"image": "pictures/red.png", "caption": "one"}] * 10
    name = write_jsonl(folder / "rows.jsonl", [*good, {"image": text, "caption": "two"}])
    (entry,) = read_data("--dataset_name", name).skipped
    assert len(entry["reason"]) <= 500 and entry["file"] is None
    assert max(map(len, log.messages)) <= 550


def test_the_first_reasons_are_logged(rows, log):
    skipped = read_data("--dataset_name", rows(5, 5), "--max_skipped", 1).skipped
    shown = [message for message in log.messages if "is skipped" in message]
    assert len(skipped) == 5 and len(shown) == 3
    assert shown[0].startswith("Row 5 of train (gone0.png) is skipped: There is no image file 'gone0.png'")
