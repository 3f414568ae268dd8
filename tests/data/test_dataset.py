"""Data sets of captioned images: columns, skipped rows, augmentation, shuffled images, batches."""

import json

import datasets
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from qformer_captioner.common.errors import InputError
from qformer_captioner.data.augmentation import Augmentation, random_crop
from qformer_captioner.data.collator import CaptionCollator
from qformer_captioner.data.dataset import CaptionDataset, CaptionSource, ShuffledImages
from qformer_captioner.data.skipped_rows import SkippedRows
from qformer_captioner.data.splits import load_splits
from qformer_captioner.training.from_scratch import build_from_scratch

COLOURS = ["red", "green", "blue", "yellow"]


@pytest.fixture
def image_folder(tmp_path):
    """Return a folder of six one-colour pictures with two captions each. The last two are the split "dev"."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rows = []
    for index in range(6):
        colour = COLOURS[index % 4]
        Image.new("RGB", (20, 10), colour).save(folder / f"{index}.png")
        captions = [f"all {colour}", f"a {colour} wall"]
        rows.append({"file_name": f"{index}.png", "split": "dev" if index > 3 else "train", "captions": captions})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def captioned(rows, caption_column="captions", augmentation=None, **columns):
    """Return the data set of rows."""
    source = CaptionSource("train", rows, caption_column=caption_column, **columns)
    return CaptionDataset(source, SkippedRows(), augmentation)


@pytest.mark.parametrize("column", ["image", "captions"])
def test_a_missing_column_is_answered_with_the_existing_ones(image_folder, tmp_path, column):
    rows = load_splits(str(image_folder))[0].rename_column(column, "other")
    with pytest.raises(InputError, match=f"no column '{column}'; its columns are .*'other'"):
        captioned(rows)


def test_a_caption_column_may_hold_strings(image_folder, tmp_path):
    rows = load_splits(str(image_folder))[0].map(lambda row: {"text": row["captions"][0]})
    assert captioned(rows, "text")[0]["captions"] == ["all red"]


def test_a_damaged_image_is_recorded_and_replaced_by_the_next(image_folder, tmp_path):
    (image_folder / "1.png").write_bytes((image_folder / "1.png").read_bytes()[:50])
    data = captioned(load_splits(str(image_folder))[0])
    assert data[1]["captions"] == ["all blue", "a blue wall"]
    assert len(data.skipped) == 1
    data.skipped.write_to(tmp_path / "skipped_rows.jsonl")
    entry = json.loads((tmp_path / "skipped_rows.jsonl").read_text())
    assert entry["row"] == 1 and entry["file"].endswith("1.png")
    data[1]
    assert len(data.skipped) == 1, "the same row counts once"


@pytest.mark.parametrize("torn", ['{"split": "train", "ro', '{"split": "train", "row": 7}', "\x80", "7\n[]\nnull"])
def test_a_line_that_was_cut_off_does_not_affect_other_lines(tmp_path, torn):
    path = tmp_path / "skipped_rows.jsonl"
    whole = json.dumps({"split": "train", "row": 0, "file": "0.png", "reason": "damaged"})
    path.write_text(f"{whole}\n{torn}")
    skipped = SkippedRows()
    skipped.add("train", 0, "0.png", "damaged")
    skipped.add("train", 1, "1.png", "damaged")
    skipped.write_to(path)
    skipped.add("train", 2, "2.png", "damaged")
    assert len(skipped) == 3 + ('"row": 7' in torn)
    assert len(path.read_text().splitlines()) == 4 + len(torn.splitlines())


def test_a_damaged_image_is_recorded_once_however_often_it_is_opened(image_folder, tmp_path):
    (image_folder / "1.png").write_bytes(b"no image")
    data = captioned(load_splits(str(image_folder))[0])
    data.skipped.write_to(tmp_path / "skipped_rows.jsonl")
    for _ in range(3):
        assert len(list(data)) == 4
    assert len((tmp_path / "skipped_rows.jsonl").read_text().splitlines()) == 1


def test_a_missing_image_file_is_skipped(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "there.png")
    rows = {"image": [str(tmp_path / "gone.png"), str(tmp_path / "there.png")], "captions": [["one"], ["two"]]}
    data = captioned(datasets.Dataset.from_dict(rows))
    assert data[0]["captions"] == ["two"]


def test_rows_without_a_caption_are_left_out_and_recorded(image_folder, tmp_path):
    rows = load_splits(str(image_folder))[0].map(
        lambda row, index: {"captions": ["", " "] if index == 2 else row["captions"]}, with_indices=True
    )
    data = captioned(rows)
    assert (len(data), len(data.skipped)) == (3, 1)


def test_rows_of_one_image_become_one_row_with_all_its_captions(image_folder):
    rows = load_splits(str(image_folder))[0]
    rows = datasets.concatenate_datasets([rows, rows.select([1]).map(lambda row: {"captions": ["more"]})])
    rows = rows.add_column("image_id", [7, 8, 9, 10, 8])
    data = captioned(rows, image_id_column="image_id")
    assert data.references()[1] == ["all green", "a green wall", "more"]
    assert (len(data), len(data.skipped)) == (4, 0)


def test_rows_of_the_same_image_file_become_one_row(image_folder):
    rows = load_splits(str(image_folder))[0]
    rows = datasets.concatenate_datasets([rows, rows.select([1]).map(lambda row: {"captions": ["more"]})])
    assert captioned(rows, image_id_column="image").references()[1] == ["all green", "a green wall", "more"]


def test_rows_without_an_image_id_are_not_merged(image_folder):
    rows = load_splits(str(image_folder))[0].add_column("image_id", ["", "", None, "x"])
    assert captioned(rows, image_id_column="image_id").references() == captioned(rows).references()


def test_drop_unreadable_drops_rows_with_damaged_images(image_folder, tmp_path):
    (image_folder / "0.png").write_bytes(b"no image")
    data = captioned(load_splits(str(image_folder))[0]).drop_unreadable()
    assert len(data) == 3
    assert data.references()[0] == data[0]["captions"] == ["all green", "a green wall"]


@pytest.mark.parametrize("min_scale", [0.2, 0.9])
def test_a_random_crop_keeps_at_least_the_given_share_of_the_area(min_scale):
    generator = torch.Generator().manual_seed(0)
    crops = [random_crop(Image.new("RGB", (100, 80)), min_scale, generator) for _ in range(50)]
    areas = [crop.width * crop.height / 8000 for crop in crops]
    assert min_scale - 0.02 < min(areas) <= max(areas) <= 1
    assert len(set(areas)) > 10
    assert all(0.7 < crop.width / crop.height < 1.4 for crop in crops)


def epochs(data: CaptionDataset, number: int = 30) -> list[dict]:
    """Return the first row as the first epochs show it."""
    rows = []
    for epoch in range(number):
        data.set_epoch(epoch)
        rows.append(data[0])
    return rows


def test_captions_per_image_draws_some_of_the_captions(image_folder):
    data = captioned(load_splits(str(image_folder))[0], augmentation=Augmentation(captions_per_image=1))
    assert {tuple(row["captions"]) for row in epochs(data)} == {("all red",), ("a red wall",)}


def test_prompts_are_drawn(image_folder):
    data = captioned(load_splits(str(image_folder))[0], augmentation=Augmentation(prompts=["a photo of", "it shows"]))
    assert {row["prompt"] for row in epochs(data)} == {"a photo of", "it shows"}


def test_augmentation_depends_on_seed_epoch_and_row_alone(image_folder):
    rows = load_splits(str(image_folder))[0]
    first, second, other = (
        captioned(rows, augmentation=Augmentation(0.3, 0.5, 1, ["a", "b"], seed=seed)) for seed in (0, 0, 1)
    )
    second[1], second[2]  # reading other rows in between changes nothing
    assert [str(row) for row in epochs(first)] != [str(row) for row in epochs(other)]
    for row, again in zip(epochs(first), epochs(second), strict=True):
        assert row["image"].tobytes() == again["image"].tobytes()
        assert (row["captions"], row["prompt"]) == (again["captions"], again["prompt"])


def test_persistent_workers_see_the_next_epoch(image_folder):
    data = captioned(
        load_splits(str(image_folder))[0], augmentation=Augmentation(prompts=[str(n) for n in range(1000)])
    )
    loader = DataLoader(data, batch_size=4, num_workers=1, persistent_workers=True, collate_fn=list)
    drawn = []
    for epoch in range(2):
        data.set_epoch(epoch)
        drawn += [[row["prompt"] for batch in loader for row in batch]]
    assert drawn[0] != drawn[1]


def test_some_images_are_mirrored(image_folder):
    image = Image.new("RGB", (20, 10))
    image.paste("red", (0, 0, 5, 10))
    image.save(image_folder / "0.png")
    data = captioned(load_splits(str(image_folder))[0], augmentation=Augmentation(horizontal_flip_prob=0.5))
    drawn = {(row["image"].getpixel((0, 0)), row["image"].size) for row in epochs(data)}
    assert drawn == {((255, 0, 0), (20, 10)), ((0, 0, 0), (20, 10))}


def test_a_row_without_an_image_is_skipped_and_recorded(image_folder):
    rows = load_splits(str(image_folder))[0]
    whole = [
        {"image": image, "captions": captions} for image, captions in zip(rows["image"], rows["captions"], strict=True)
    ]
    features = datasets.Features({"image": datasets.Image(), "captions": datasets.List(datasets.Value("string"))})
    rows = datasets.Dataset.from_list([whole[0] | {"image": None}, *whole[1:]], features=features)
    data = captioned(rows)
    assert data[0]["image"].size == (20, 10)  # the image of the next row
    assert data.skipped.pending == [{"split": "train", "row": 0, "file": None, "reason": "The row has no image."}]


def test_shuffled_images_give_every_row_the_image_of_another(image_folder, tmp_path):
    data = captioned(load_splits(str(image_folder))[0])
    shuffled = ShuffledImages(data)
    for own, other in ((data[row], shuffled[row]) for row in range(len(data))):
        assert own["captions"] == other["captions"]
        assert own["image"].getpixel((0, 0)) != other["image"].getpixel((0, 0))
    assert sorted(shuffled.image_of.values()) == list(range(len(data)))


def test_labels_are_token_ids_end_of_sequence_and_padding(image_folder, tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = build_from_scratch(
        {"model_type": "vit", "image_size": 16, "patch_size": 8, **sizes},
        {"model_type": "llama", **sizes},
        sizes,
        ["all red", "a red wall"],
    )
    batch = CaptionCollator(model.processor)(
        [
            {"image": Image.new("L", (4, 9)), "captions": ["all red", "a red wall"]},
            {"image": Image.new("RGBA", (9, 4)), "captions": ["red"]},
        ]
    )
    tokenizer = model.processor.tokenizer
    red, end = tokenizer("red").input_ids, tokenizer.eos_token_id
    assert batch["pixel_values"].shape == (2, 3, 16, 16)
    assert batch["labels"].shape == (2, 2, 4)
    assert batch["labels"][1].tolist() == [[*red, end, -100, -100], [-100] * 4]
    assert tokenizer.decode(batch["labels"][0, 1][:-1]).strip() == "a red wall"
    assert torch.isfinite(model(**batch).loss)
