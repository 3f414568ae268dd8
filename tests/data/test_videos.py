"""Rows whose cell of images is a list: the frames of a video."""

from itertools import islice

import datasets
import numpy as np
import pytest
from PIL import Image

from qformer_captioner.data.augmentation import Augmentation
from qformer_captioner.data.dataset import CaptionDataset, CaptionSource
from qformer_captioner.data.images import image_keys, open_image_cell, undecoded_images
from qformer_captioner.data.skipped_rows import SkippedRows
from qformer_captioner.evaluation.benchmarks import load_evaluation_set

from ..fixtures.captioned_files import captioned, stream, write_jsonl

VIDEOS = [["red", "lime", "blue"], ["white"], ["lime", "red"], ["red", "lime", "blue", "yellow", "white", "black"]]
# A video of more than three frames is sampled: the first, the last and the one between them.
READ = [["red", "lime", "blue"], "white", ["lime", "red"], ["red", "blue", "black"]]


def paths_of(folder, videos=VIDEOS) -> list[list[str]]:
    return [[str(folder / "pictures" / f"{colour}.png") for colour in video] for video in videos]


def rows_of(folder) -> list[dict]:
    return [{"frames": video, "caption": str(number)} for number, video in enumerate(paths_of(folder))]


def colours(picture) -> list[str] | str:
    names = {(255, 0, 0): "red", (0, 255, 0): "lime", (0, 0, 255): "blue", (255, 255, 255): "white", (0, 0, 0): "black"}
    if isinstance(picture, Image.Image):
        return names[picture.getpixel((0, 0))]
    return [names[frame.getpixel((0, 0))] for frame in picture]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "images", "stream of jsonl", "stream of images"])
def test_lists_of_images_are_the_frames_of_videos(folder, kind):
    rows = rows_of(folder)
    if kind.endswith("jsonl"):
        name = write_jsonl(folder / "rows.jsonl", rows)
    else:
        name = str(folder / "rows.parquet")
        table = datasets.Dataset.from_list(rows)
        table = table.cast_column("frames", datasets.List(datasets.Image())) if kind.endswith("images") else table
        table.to_parquet(name)
    if kind.startswith("stream"):
        read = list(islice(stream(name, image="frames", num_frames=3), 4))
    else:
        data = captioned(name, image="frames", num_frames=3)
        read = [data[row] for row in range(len(data))]
    assert [(colours(row["image"]), row["captions"]) for row in read] == [(v, [str(n)]) for n, v in enumerate(READ)]


def test_a_frame_that_cannot_be_read_is_named_and_the_row_skipped(folder):
    rows = rows_of(folder)
    rows[2]["frames"][1] = str(folder / "pictures" / "missing.png")
    skipped = SkippedRows()
    data = captioned(write_jsonl(folder / "rows.jsonl", rows), image="frames", skipped=skipped, num_frames=3)
    assert [row["captions"] for row in map(data.drop_unreadable().__getitem__, range(3))] == [["0"], ["1"], ["3"]]
    (entry,) = skipped.pending
    assert entry["row"] == 2 and "missing.png" in entry["reason"]


def test_features_are_not_computed_of_videos(folder):
    (video, image, *_) = undecoded_images(datasets.Dataset.from_dict({"image": paths_of(folder)}), "image", "")["image"]
    assert colours(open_image_cell(image)) == "white"
    with pytest.raises(OSError, match="The row has 3 images, and features of videos cannot be precomputed"):
        open_image_cell(video)


def test_all_frames_of_a_video_are_augmented_in_the_same_way():
    """Each frame is the same picture, so equal crops and flips leave equal frames."""
    noise = np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    rows = datasets.Dataset.from_dict({"image": [[Image.fromarray(noise)] * 4] * 6, "caption": ["noise"] * 6})
    augmentation = Augmentation(random_resized_crop_scale=0.3, horizontal_flip_prob=0.5)
    data = CaptionDataset(CaptionSource("train", rows, num_frames=4), SkippedRows(), augmentation)
    videos = [[np.asarray(frame).tobytes() for frame in data[row]["image"]] for row in range(6)]
    assert all(len(video) == 4 and len(set(video)) == 1 for video in videos)
    assert len({video[0] for video in videos}) == 6


def test_keys_of_videos_depend_on_the_order_of_their_frames():
    videos = [["a.png", "b.png"], ["b.png", "a.png"], ["a.png"], ["a.png", "b.png"]]
    rows = datasets.Dataset.from_dict({"image": videos, "single": ["a.png"] * 4})
    keys = image_keys(undecoded_images(rows, "image", ""), "image")
    assert keys[0] == keys[3] and len(set(keys)) == 3
    assert keys[2] == image_keys(undecoded_images(rows, "single", ""), "single")[0]


def test_rows_of_the_same_frames_are_captions_of_one_video_in_evaluation(folder):
    videos = paths_of(folder, [["red", "lime"], ["lime", "red"], ["red", "lime"]])
    rows = datasets.Dataset.from_dict({"image": videos, "caption": ["one", "two", "three"]})
    found = load_evaluation_set(CaptionSource("test", rows, num_frames=2))
    assert found.references.captions == {0: ["one", "three"], 1: ["two"]}
    assert [colours(found.open(video)) for video in (0, 1)] == [["red", "lime"], ["lime", "red"]]
    assert found.references.files == {} and len(set(found.fingerprints().values())) == 2


@pytest.mark.parametrize("kind", ["paths", "images"])
def test_a_video_identifies_its_rows(folder, kind):
    videos = [*paths_of(folder, [["red", "lime"], ["lime", "red"], ["red", "lime"]]), None, None]
    rows = datasets.Dataset.from_dict({"image": videos, "caption": ["one", "two", "three", "four", "five"]})
    rows = rows.cast_column("image", datasets.List(datasets.Image())) if kind == "images" else rows
    data = CaptionDataset(CaptionSource("train", rows, image_id_column="image", num_frames=2), SkippedRows())
    assert data.references() == [["one", "three"], ["two"], ["four"], ["five"]]
