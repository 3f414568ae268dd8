"""Folders of images: what decides about captions and splits, and that nothing is left out in silence."""

import json
import os

import pytest
from PIL import Image

from qformer_captioner.common.errors import InputError
from qformer_captioner.data.loading import load_rows
from qformer_captioner.data.split_names import splits_of_files, splits_of_folders
from qformer_captioner.data.splits import load_splits

from ..fixtures.captioned_files import stream, take, write_jsonl
from ..fixtures.read_rows import read_data


def put(folder, name, content):
    """Write an image of a colour, or a text, and return the folder."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if content in ("red", "green", "blue") and not name.endswith((".txt", ".caption")):
        Image.new("RGB", (8, 8), content).save(path, "PNG")
    else:
        path.write_text(content, encoding="utf-8")
    return folder


@pytest.fixture
def colours(tmp_path):
    """Return a folder with the images a.jpg (red), b.png (green) and c.webp (blue)."""
    for name, colour in (("a.jpg", "red"), ("b.png", "green"), ("c.webp", "blue")):
        put(tmp_path, name, colour)
    return tmp_path


THREE = [("red", ["one"]), ("green", ["two"]), ("blue", ["three"])]


def train(folder, *options):
    """Return the rows to train on."""
    return read_data("--dataset_name", folder, *options).train


# --- Files of captions ------------------------------------------------------------------------------------------------


def rows_of(names, key="file_name"):
    """Return JSON lines that give the images the captions "one", "two" and "three"."""
    texts = ("one", "two", "three")
    return "".join(json.dumps({key: name, "caption": text}) + "\n" for name, text in zip(names, texts, strict=False))


def test_metadata_decides_and_words_for_splits_in_names_of_images_do_not(tmp_path):
    names = ["COCO_val2014_1.jpg", "train_2.jpg", "test-3.jpg"]
    for name, colour in zip(names, ("red", "green", "blue"), strict=True):
        put(tmp_path, name, colour)
    put(tmp_path, "metadata.jsonl", rows_of(names))
    assert train(tmp_path) == THREE


@pytest.mark.parametrize(
    "name", ["captions.csv", "captions.jsonl", "my_captions.tsv", "captions.json", "list.csv", "metadata.csv"]
)
def test_a_file_of_captions_beside_the_images_is_read(colours, name):
    rows = [("a.jpg", "one"), ("b.png", "two"), ("c.webp", "three")]
    separator = "\t" if name.endswith("tsv") else ","
    text = f"file_name{separator}caption\n" + "".join(f"{image}{separator}{caption}\n" for image, caption in rows)
    if name.endswith("jsonl"):
        text = rows_of([image for image, _ in rows])
    elif name.endswith("json"):
        text = json.dumps([{"image": image, "caption": caption} for image, caption in rows])
    assert train(put(colours, name, text)) == THREE


def test_images_may_lie_in_a_subfolder_that_the_file_of_captions_does_not_name(tmp_path):
    for name, colour in (("Images/deep/a.jpg", "red"), ("Images/b.jpg", "green"), ("Images/c.jpg", "blue")):
        put(tmp_path, name, colour)
    assert train(put(tmp_path, "captions.jsonl", rows_of(["a.jpg", "b", r"Images\c.jpg"], "image"))) == THREE


def test_coco_annotations_in_a_folder_of_their_own_give_the_splits(tmp_path):
    put(put(tmp_path, "train2017/1.jpg", "red"), "val2017/2.jpg", "green")
    for split, image, text in (("train", 1, "one"), ("val", 2, "two")):
        annotations = {"images": [{"id": image, "file_name": f"{image}.jpg"}]}
        annotations["annotations"] = [{"id": 9, "image_id": image, "caption": text}]
        put(tmp_path, f"annotations/captions_{split}2017.json", json.dumps(annotations))
        put(tmp_path, f"annotations/instances_{split}2017.json", "{")  # is not read
    data = read_data("--dataset_name", tmp_path)
    assert (data.train, data.evaluation) == ([("red", ["one"])], [("green", ["two"])])


def test_several_files_of_captions_are_named_with_the_way_to_choose(colours):
    for name in ("captions_en.csv", "captions_de.csv"):
        put(colours, name, "image,caption\na.jpg,one\n")
    with pytest.raises(InputError, match="'captions_de.csv', 'captions_en.csv': choose one, .* --dataset_name"):
        train(colours)
    options = ["--image_folder", colours]
    assert train(colours / "captions_en.csv", *options) == [("red", ["one"])]


def test_metadata_and_captions_of_two_kinds_do_not_compete_with_a_more_explicit_name(colours):
    put(colours, "scores.csv", "image,score\na.jpg,7\n")
    put(colours, "captions.csv", "image,caption\na.jpg,seven\n")
    assert train(colours) == [("red", ["seven"])]
    assert train(put(colours, "metadata.jsonl", rows_of(["a.jpg"]))) == [("red", ["one"])]


def test_a_damaged_file_of_captions_is_named(colours):
    with pytest.raises(InputError, match="captions.csv"):
        train(put(colours, "captions.csv", "image,caption\na.jpg,one\nb.png,two,more,fields\n"))


def test_an_image_that_no_file_mentions_and_a_caption_without_an_image_are_counted(colours):
    put(colours, "metadata.jsonl", rows_of(["a.jpg", "b.png", "gone.jpg"]))
    data = read_data("--dataset_name", colours, "--max_skipped", 1)
    assert data.train == THREE[:2]
    reasons = {entry["file"]: entry["reason"] for entry in data.skipped}
    assert reasons["c.webp"] == "No file of captions mentions this image."
    assert "There is no image file 'gone.jpg'" in reasons["gone.jpg"] and len(reasons) == 2


# --- Texts of the same name -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "text"),
    [
        (".txt", "{}\n"),
        (".caption", "{}"),
        (".TXT", "\ufeff{}"),
        (".json", '{{"caption": "{}"}}'),
        (".json", '["{}"]'),
        (".jpg.txt", "{}"),
    ],
)
def test_texts_of_the_same_name_are_the_captions(tmp_path, suffix, text):
    names = ("10_style a/a", "20_style b/deep/b", "c")
    for name, (colour, (caption,)) in zip(names, THREE, strict=True):
        put(put(tmp_path, f"{name}.jpg", colour), f"{name}{suffix}", text.format(caption))
    assert sorted(train(tmp_path)) == sorted(THREE)


def test_each_line_of_a_text_is_a_caption(colours):
    assert train(put(colours, "a.txt", "one\n\nmore\n"))[0] == ("red", ["one", "more"])


def test_an_image_without_a_text_and_a_text_without_an_image_are_counted(colours):
    for name in ("a.txt", "b.txt", "gone.txt"):
        put(colours, name, name)
    data = read_data("--dataset_name", colours)
    assert data.train == [("red", ["a.txt"]), ("green", ["b.txt"])]
    reasons = {os.path.basename(entry["file"]): entry["reason"] for entry in data.skipped}
    assert reasons.pop("gone.txt").startswith("There is no image of the same name as this text")
    assert reasons == {"c.webp": "no caption"}


@pytest.mark.parametrize(
    ("images", "texts"),
    [
        ("{}.jpg", "captions/{}.txt"),
        ("images/{}.jpg", "text/{}.txt"),
        ("images/x/{}.jpg", "text/x/{}.txt"),
        ("x/images/{}.jpg", "x/labels/{}.caption"),
    ],
)
def test_texts_in_a_folder_of_their_own_are_the_captions(tmp_path, images, texts):
    for name, (colour, (caption,)) in zip("abc", THREE, strict=True):
        put(put(tmp_path, images.format(name), colour), texts.format(name), caption)
    assert train(tmp_path) == THREE


@pytest.mark.parametrize(
    "more",
    [
        {"tags/a.txt": "tag"},  # which of the two folders?
        {"y/a.jpg": "green"},  # which of the two images?
    ],
)
def test_a_text_in_a_folder_of_its_own_is_not_used_if_several_texts_or_images_fit(tmp_path, more):
    put(put(put(put(tmp_path, "x/a.jpg", "red"), "captions/a.txt", "?"), "x/b.jpg", "blue"), "x/b.txt", "b")
    for name, content in more.items():
        put(tmp_path, name, content)
    data = read_data("--dataset_name", tmp_path)
    assert data.train == [("blue", ["b"])]
    assert "captions/a.txt" in [entry["file"] for entry in data.skipped]


def test_a_text_beside_other_images_is_not_that_of_an_image_elsewhere(tmp_path):
    put(put(put(put(tmp_path, "cat/a.jpg", "red"), "dog/b.jpg", "green"), "dog/b.txt", "two"), "dog/a.txt", "wrong")
    assert train(tmp_path) == [("green", ["two"])]


def test_a_name_in_several_folders_is_that_in_the_folder_of_the_split(tmp_path):
    for split, (colour, (caption,)) in zip(("train", "val"), THREE, strict=False):
        put(tmp_path, f"{split}2017/1.jpg", colour)
        put(tmp_path, f"annotations/captions_{split}2017.csv", f"file_name,caption\n1.jpg,{caption}")
    data = read_data("--dataset_name", tmp_path)
    assert (data.train, data.evaluation) == (THREE[:1], THREE[1:2])


def test_texts_in_utf_16_are_read(colours):
    (colours / "a.txt").write_bytes("one".encode("utf-16"))
    assert train(colours) == THREE[:1]


def test_texts_of_two_kinds_that_differ_are_columns_to_choose_from(colours):
    put(put(colours, "a.txt", "tags"), "a.json", '{"caption": "one"}')
    with pytest.raises(InputError, match="no column 'caption'; its columns are 'image', 'txt', 'json'"):
        train(colours)
    assert train(colours, "--caption_column", "json") == [("red", ["one"])]
    assert train(put(colours, "a.caption", "best")) == [("red", ["best"])]


def test_texts_of_two_kinds_that_agree_are_the_captions(colours):
    put(put(put(colours, "a.txt", "one"), "a.json", '{"caption": "one"}'), "b.json", '{"caption": "two"}')
    assert train(colours) == THREE[:2]


def test_a_text_that_cannot_be_read_is_counted(colours):
    (colours / "a.txt").write_bytes(b"caf\xe9")
    data = read_data("--dataset_name", put(colours, "b.txt", "two"))
    assert data.train == [("green", ["two"])]
    (reason,) = (entry["reason"] for entry in data.skipped if entry["file"] == "a.txt")
    assert "it is not UTF-8 text (byte 0xe9): save it as UTF-8" in reason


def test_texts_none_of_which_can_be_read_are_answered_with_an_empty_column(colours):
    (colours / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match="has a caption in its column 'caption', which holds nothing"):
        train(colours)


# --- Folders ----------------------------------------------------------------------------------------------------------


def test_folders_of_classes_are_captions_by_label(tmp_path):
    put(put(tmp_path, "cat/a.jpg", "red"), "dog/b.jpg", "green")
    assert train(tmp_path, "--caption_column", "label") == [("red", ["cat"]), ("green", ["dog"])]


@pytest.mark.parametrize("names", [("train", "val"), ("Train", "validation"), ("training", "dev"), ("train", "test")])
@pytest.mark.parametrize("kind", ["texts", "metadata in each", "metadata above"])
def test_folders_named_as_splits_are_splits(tmp_path, names, kind):
    for name, colour in zip(names, ("red", "green"), strict=True):
        put(tmp_path, f"{name}/x.jpg", colour)
        if kind == "texts":
            put(tmp_path, f"{name}/x.txt", f"of {colour}")
        elif kind == "metadata in each":
            put(tmp_path, f"{name}/metadata.jsonl", json.dumps({"file_name": "x.jpg", "caption": f"of {colour}"}))
    if kind == "metadata above":
        pairs = zip(names, ("red", "green"), strict=True)
        rows = [{"file_name": f"{name}/x.jpg", "caption": f"of {colour}"} for name, colour in pairs]
        write_jsonl(tmp_path / "metadata.jsonl", rows)
    data = read_data("--dataset_name", tmp_path)
    assert (data.train, data.evaluation) == ([("red", ["of red"])], [("green", ["of green"])])


def test_a_folder_beside_those_of_splits_is_a_split_and_is_named(tmp_path, log):
    for name, colour in (("train", "red"), ("more", "green")):
        put(put(tmp_path, f"{name}/a.jpg", colour), f"{name}/a.txt", colour)
    assert train(tmp_path) == [("red", ["red"])]
    assert "also has 'more': --train_split and --eval_split choose" in log.text
    assert train(tmp_path, "--train_split", "more") == [("green", ["green"])]


def test_a_linked_folder_is_named_and_not_read(colours, log, tmp_path_factory):
    (colours / "linked").symlink_to(put(tmp_path_factory.mktemp("other"), "x.jpg", "red"))
    put(colours, "a.txt", "one")
    assert train(colours) == [("red", ["one"])] and "'linked'" in log.text


def test_hidden_files_are_not_images(colours):
    put(put(colours, "a.txt", "one"), "__MACOSX/._a.jpg", "no image")
    assert len(load_rows(str(put(colours, "._b.jpg", "no image")))["train"]) == 3


def test_a_folder_streams_the_same_rows(colours):
    put(put(put(colours, "a.txt", "one"), "b.txt", "two"), "c.txt", "three")
    assert [captions for _, captions in take(stream(colours), 3)] == [("one",), ("two",), ("three",)]


def test_words_in_names_of_files_and_folders():
    assert splits_of_files(["captions_train2017.json", "captions_val2017.json"]) == {
        "captions_train2017.json": "train",
        "captions_val2017.json": "validation",
    }
    assert splits_of_files(["train_en.csv", "train_de.csv"]) == splits_of_files(["a.csv", "val.csv"]) == {}
    assert splits_of_folders(["training_images/a.jpg", "val_old_b/a.jpg"]) == ["train", "train"]
    assert splits_of_folders(["train_1/a.jpg", "b.jpg", "more/x/c.jpg"]) == ["train", "train", "more"]


# --- Rows without a split ---------------------------------------------------------------------------------------------


def test_a_missing_split_is_answered_with_those_that_exist_and_the_options(colours):
    (colours / "rows.csv").write_text("image,caption,split\na.jpg,one,training\nb.png,two,valid\n")
    message = "no split 'train'; it has 'training', 'valid'. Choose with --train_split and --eval_split"
    with pytest.raises(InputError, match=message):
        train(colours / "rows.csv")
    data = read_data("--dataset_name", colours / "rows.csv", "--train_split", "training", "--eval_split", "valid")
    assert (data.train, data.evaluation) == ([("red", ["one"])], [("green", ["two"])])


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl"])
def test_rows_without_a_split_are_counted(colours, name, log):
    text = "image,caption,split\na.jpg,one,train\nb.png,two,\nc.webp,three,  \n"
    if name.endswith("jsonl"):
        rows = [("a.jpg", "one", "train"), ("b.png", "two", None), ("c.webp", "three", "")]
        text = "".join(json.dumps({"image": i, "caption": c, "split": s}) + "\n" for i, c, s in rows)
    data = read_data("--dataset_name", put(colours, name, text) / name)
    assert data.train == [("red", ["one"])]
    assert [(entry["row"], entry["reason"]) for entry in data.skipped] == [
        (1, "The row has no split: its column 'split' is empty."),
        (2, "The row has no split: its column 'split' is empty."),
    ]
    assert "2 rows have no split" in log.text


def test_a_column_of_empty_splits_is_no_split(colours):
    put(colours, "rows.csv", "image,caption,split\na.jpg,one,\nb.png,two,\n")
    assert len(load_splits(str(colours / "rows.csv"))[0]) == 2


# --- Tables and folders without captions ------------------------------------------------------------------------------


def test_a_folder_without_captions_is_answered_with_its_columns(colours):
    with pytest.raises(InputError, match="no column 'caption'; its columns are 'image'"):
        train(colours)
    assert len(load_rows(str(colours))["train"]) == 3


def test_metadata_without_a_column_of_images_is_named(colours):
    with pytest.raises(InputError, match="metadata.csv' has no column of images: add file_name"):
        train(put(colours, "metadata.csv", "name,caption\na.jpg,one\n"))


def test_a_table_of_another_purpose_does_not_hide_the_captions(colours):
    put(put(colours, "notes.csv", "x,y\n1,2,3\n"), "a.txt", "one")
    assert train(colours) == [("red", ["one"])]


def test_tables_without_images_are_splits_by_their_names_and_read_as_text(colours, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables")
    put(folder, "train-0.csv", f"image,caption\n{colours}/a.jpg,007\n")
    put(folder, "train-1.csv", f"image,caption\n{colours}/b.png,NA\n")
    put(folder, "val.csv", f"image,caption\n{colours}/c.webp,True\n")
    data = read_data("--dataset_name", folder, "--allowed_image_folders", colours)
    assert (data.train, data.evaluation) == ([("red", ["007"]), ("green", ["NA"])], [("blue", ["True"])])


def test_a_file_of_captions_without_images_is_named(colours, log):
    with pytest.raises(InputError, match="no column 'caption'"):
        train(put(colours, "captions.txt", "one\ntwo\nthree\n"))
    assert "'captions.txt' is left out, because it has no column of images" in log.text
