"""Splits: by name, by a column, and the default split to evaluate on."""

import datasets
import pytest

from qformer_captioner.common.errors import InputError
from qformer_captioner.data.loading import load_rows
from qformer_captioner.data.splits import default_eval_split, load_eval_split, load_splits

from ..fixtures.captioned_files import (
    CAPTIONS,
    COLOURS,
    captioned,
    rows_with_paths,
    stream,
    take,
    write_jsonl,
    write_karpathy,
)


@pytest.mark.parametrize(
    ("splits", "validation_first", "test_first"),
    [
        (["train", "test", "dev", "val", "validation"], "validation", "test"),
        (["test", "dev", "val"], "val", "test"),
        (["dev", "train"], "dev", "dev"),
        (["test"], "test", "test"),
        (["train"], None, None),
    ],
)
def test_the_default_split_is_a_validation_split_while_training_and_test_afterwards(
    splits, validation_first, test_first
):
    assert default_eval_split(splits) == validation_first
    assert default_eval_split(splits, prefer_test=True) == test_first


@pytest.fixture
def split_folder(folder):
    """Return a folder of images whose last two rows are the split "dev"."""
    rows = [
        {"file_name": f"{colour}.png", "caption": f"all {colour}", "split": "dev" if number > 3 else "train"}
        for number, colour in enumerate(COLOURS)
    ]
    write_jsonl(folder / "pictures" / "metadata.jsonl", rows)
    return folder / "pictures"


def test_a_folder_with_a_split_column_is_split_by_it(split_folder):
    train, evaluation = load_splits(str(split_folder))
    assert (len(train), len(evaluation)) == (4, 2)


def test_a_stream_with_a_split_column_is_split_by_it(folder):
    rows = [{**row, "split": "dev" if number > 3 else "train"} for number, row in enumerate(rows_with_paths())]
    train, evaluation = load_splits(write_jsonl(folder / "rows.jsonl", rows), streaming=True)
    assert [row["caption"] for row in train] == CAPTIONS[:4] and evaluation["caption"] == CAPTIONS[4:]
    evaluation = load_splits(str(folder / "rows.jsonl"), streaming=True, max_eval_samples=1)[1]
    assert len(evaluation) == 1


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["split", "Split", " SPLIT "])
def test_a_split_column_may_be_written_in_another_way(folder, name, streaming):
    rows = [{**row, name: split} for row, split in zip(rows_with_paths(), ("train", " val", "train "), strict=False)]
    splits = load_rows(write_jsonl(folder / "rows.jsonl", rows), streaming=streaming)
    assert {split: [row["caption"] for row in part] for split, part in splits.items()} == {
        "train": [CAPTIONS[0], CAPTIONS[2]],
        "val": [CAPTIONS[1]],
    }


def test_numbers_name_splits_as_text(folder):
    rows = [{**row, "split": number} for number, row in enumerate(rows_with_paths()[:2])]
    assert list(load_rows(write_jsonl(folder / "rows.jsonl", rows))) == ["0", "1"]


def test_a_missing_split_column_that_was_asked_for_is_named(folder, log):
    load_rows(write_jsonl(folder / "rows.jsonl", rows_with_paths()), split_column="fold")
    assert "has no column 'fold' (--split_column)" in log.text


@pytest.mark.parametrize("splits", [("train",), ("train", "dev")])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_of_save_to_disk_is_read(tmp_path, splits, streaming):
    parts = {split: datasets.Dataset.from_dict({"image": ["a.png"], "caption": [split]}) for split in splits}
    (datasets.DatasetDict(parts) if len(parts) > 1 else parts["train"]).save_to_disk(tmp_path / "saved")
    loaded = load_rows(str(tmp_path / "saved"), streaming=streaming)
    assert {split: [row["caption"] for row in rows] for split, rows in loaded.items()} == {s: [s] for s in splits}


def test_max_samples_keeps_the_first_rows(split_folder):
    train, evaluation = load_splits(str(split_folder), max_train_samples=3, max_eval_samples=1)
    assert (len(train), len(evaluation)) == (3, 1)


def test_an_unknown_split_is_answered_with_the_existing_ones(split_folder):
    with pytest.raises(InputError, match="no split 'val'; it has .*'dev'"):
        load_splits(str(split_folder), eval_split="val")


def test_a_missing_data_set_is_named(tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        load_splits(str(tmp_path / "nowhere"))


def test_karpathys_file_names_splits_and_restval_belongs_to_train(folder):
    rows = load_rows(write_karpathy(folder / "dataset.json"))
    assert {split: len(part) for split, part in rows.items()} == {"train": 4, "val": 1, "test": 1}
    assert rows["val"][0]["caption"] == CAPTIONS[2]
    assert len(captioned(folder / "dataset.json").drop_unreadable()) == 4
    assert len(take(stream(folder / "dataset.json"), 4)) == 4


def test_a_configuration_of_an_evaluation_set_can_be_chosen(tmp_path):
    configs = "".join(f"- {{config_name: {name}, data_files: {name}.jsonl}}\n" for name in ("short", "long"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    for name in ("short", "long"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"image": "a.png", "caption": name}])
    assert load_eval_split(str(tmp_path), "long")["caption"] == ["long"]
