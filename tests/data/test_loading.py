"""Where rows come from: every kind of file to a first batch, paths that lead astray, splits, mixtures, streams."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path

import datasets
import pyarrow.parquet
import pytest
import torch
from PIL import Image, ImageColor
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from qformer_captioner import train_hf
from qformer_captioner.common.errors import InputError
from qformer_captioner.data.augmentation import Augmentation
from qformer_captioner.data.collator import CaptionCollator
from qformer_captioner.data.dataset import CaptionDataset, CaptionSource
from qformer_captioner.data.images import folder_of_images, locate
from qformer_captioner.data.loading import load_rows
from qformer_captioner.data.mixture import CaptionMixture
from qformer_captioner.data.skipped_rows import SkippedRows
from qformer_captioner.data.splits import load_eval_split, load_splits
from qformer_captioner.data.streaming import CaptionStream
from qformer_captioner.evaluation.benchmarks import load_evaluation_set
from qformer_captioner.training.data_setup import load_datasets

from ..conftest import ROOT
from ..fixtures import tiny
from ..fixtures.hub_server import Hub

COLOURS = ["red", "lime", "blue", "yellow", "white", "black"]
CAPTIONS = [[f"all {colour}", f"a {colour} wall"] for colour in COLOURS]


@pytest.fixture
def folder(tmp_path):
    """A folder with a picture of each colour in `pictures/`."""
    (tmp_path / "pictures").mkdir()
    for colour in COLOURS:
        Image.new("RGB", (20, 10), colour).save(tmp_path / "pictures" / f"{colour}.png")
    return tmp_path


def png(folder: Path, colour: str) -> bytes:
    return (folder / "pictures" / f"{colour}.png").read_bytes()


def rows_with_paths(captions=CAPTIONS) -> list[dict]:
    return [{"image": f"pictures/{colour}.png", "caption": own} for colour, own in zip(COLOURS, captions, strict=True)]


def write_csv(path: Path, separator: str = ",") -> str:
    lines = [f"pictures/{colour}.png{separator}all {colour}" for colour in COLOURS]
    path.write_text("\n".join([f"image{separator}caption", *lines]))
    return str(path)


def write_jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_tar(path: Path, folder: Path, colours=COLOURS) -> str:
    with tarfile.open(path, "w") as tar:
        for colour in colours:
            captions = json.dumps({"caption": f"all {colour}", "all": {"captions": CAPTIONS[COLOURS.index(colour)]}})
            for suffix, content in (
                ("png", png(folder, colour)),
                ("json", captions.encode()),
                ("txt", colour.encode()),
            ):
                member = tarfile.TarInfo(f"{colour}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return str(path)


def write_parquet(path: Path, images: list, feature=None) -> str:
    rows = datasets.Dataset.from_dict({"image": images, "caption": CAPTIONS})
    (rows.cast_column("image", feature) if feature else rows).to_parquet(path)
    return str(path)


def write_coco(path: Path) -> str:
    images = [{"id": 7 * number, "file_name": f"{colour}.png"} for number, colour in enumerate(COLOURS)]
    annotations = [
        {"id": 10 * k + number, "image_id": 7 * number, "caption": CAPTIONS[number][k]}
        for k in (0, 1)
        for number in range(len(COLOURS))
    ]
    path.write_text(json.dumps({"info": {}, "images": images, "annotations": annotations}))
    return str(path)


def write_karpathy(path: Path) -> str:
    splits = ["train", "restval", "val", "test", "train", "train"]
    images = [
        {
            "filepath": "pictures",
            "filename": f"{colour}.png",
            "split": split,
            "cocoid": number,
            "sentences": [{"raw": own} for own in captions],
        }
        for number, (colour, split, captions) in enumerate(zip(COLOURS, splits, CAPTIONS, strict=True))
    ]
    path.write_text(json.dumps({"images": images, "dataset": "coco"}))
    return str(path)


def captioned(name, image="image", caption="caption", image_folder=None, skipped=None):
    skipped = SkippedRows() if skipped is None else skipped
    rows = load_splits(str(name))[0]
    found = folder_of_images(str(name), rows, image_folder)
    return CaptionDataset(CaptionSource("train", rows, image, caption, image_folder=found), skipped)


def stream(*names, image="image", caption="caption", skipped=None, **options):
    skipped = SkippedRows() if skipped is None else skipped
    sources = []
    for name in names:
        rows = load_splits(str(name), streaming=True)[0]
        found = folder_of_images(str(name), rows)
        sources.append(CaptionSource(f"train of {name}", rows, image, caption, image_folder=found))
    return CaptionStream(sources, skipped, **{"shuffle_buffer": 0, **options})


def take(rows, number):
    """The first rows, as pairs of colour and captions."""
    return [seen(row) for row, _ in zip(iter(rows), range(number), strict=False)]


def seen(row):
    return row["image"].getpixel((0, 0)), tuple(row["captions"])


# ----------------------------------------------------------------------------------------------------------------------
# Kinds of files
# ----------------------------------------------------------------------------------------------------------------------


def image_folder(folder):
    rows = [{"file_name": f"{colour}.png", "caption": own} for colour, own in zip(COLOURS, CAPTIONS, strict=True)]
    write_jsonl(folder / "pictures" / "metadata.jsonl", rows)
    return folder / "pictures"


def json_list(folder):
    (folder / "rows.json").write_text(json.dumps(rows_with_paths(), indent=1))
    return folder / "rows.json"


def dicts(folder):
    captions = [[{"raw": caption} for caption in own] for own in CAPTIONS]
    return write_jsonl(folder / "rows.jsonl", rows_with_paths(captions))


def parquet(folder, make_cell, feature=None):
    return write_parquet(folder / "rows.parquet", [make_cell(colour) for colour in COLOURS], feature)


def parquet_folder(folder):
    (folder / "data").mkdir()
    write_parquet(folder / "data" / "train-0.parquet", [png(folder, colour) for colour in COLOURS])
    return folder / "data"


def tars(folder):
    for number in range(3):
        write_tar(folder / f"{number}.tar", folder, COLOURS[2 * number : 2 * number + 2])
    return folder / "{0..2}.tar"


KINDS = {
    "folder of images": image_folder,
    "json": json_list,
    "jsonl": lambda folder: write_jsonl(folder / "rows.jsonl", rows_with_paths()),
    "jsonl, COCO-style dicts": dicts,
    "csv": lambda folder: write_csv(folder / "rows.csv"),
    "tsv": lambda folder: write_csv(folder / "rows.tsv", "\t"),
    "parquet, paths": lambda folder: parquet(folder, lambda colour: f"pictures/{colour}.png"),
    "parquet, bytes": lambda folder: parquet(folder, lambda colour: png(folder, colour)),
    "parquet, dicts": lambda folder: parquet(folder, lambda colour: {"bytes": png(folder, colour), "path": "x.png"}),
    "parquet, images": lambda folder: parquet(
        folder, lambda colour: {"bytes": png(folder, colour), "path": None}, datasets.Image()
    ),
    "folder of parquet": parquet_folder,
    "tars": tars,
    "COCO": lambda folder: write_coco(folder / "pictures" / "captions.json"),
}


@pytest.fixture(params=KINDS)
def kind(request, folder):
    """A data set of each kind: its name, and the names of its columns."""
    columns = {"image": "png", "caption": "json.all.captions"} if request.param == "tars" else {}
    return KINDS[request.param](folder), columns


def test_every_kind_of_file_gives_images_and_captions(kind):
    name, columns = kind
    data = captioned(name, **columns)
    expected = {ImageColor.getrgb(colour): f"all {colour}" for colour in COLOURS}
    rows = [seen(data[row]) for row in range(len(data))]
    assert {pixel: captions[0] for pixel, captions in rows} == expected and len(rows) == len(expected)
    batch = CaptionCollator(tiny.processor())([data[0], data[1]])
    assert batch["pixel_values"].shape[0] == batch["labels"].shape[0] == 2


def test_every_kind_of_file_streams_the_same_rows(kind):
    name, columns = kind
    data = captioned(name, **columns)
    assert take(stream(name, **columns), len(data)) == [seen(data[row]) for row in range(len(data))]


def test_karpathys_file_tells_splits_and_restval_is_trained_on(folder):
    rows = load_rows(write_karpathy(folder / "dataset.json"))
    assert {split: len(part) for split, part in rows.items()} == {"train": 4, "val": 1, "test": 1}
    assert rows["val"][0]["caption"] == CAPTIONS[2]
    assert len(captioned(folder / "dataset.json").drop_unreadable()) == 4
    assert len(take(stream(folder / "dataset.json"), 4)) == 4


def test_drawn_pictures_stream_too():
    rows = load_splits("scenes", max_train_samples=3, max_eval_samples=1, streaming=True)[0]
    data = CaptionStream([CaptionSource("scenes", rows)], SkippedRows())
    assert next(iter(data))["image"].size == (48, 48)


def test_wildcards_and_numbers_in_braces_name_the_same_files(folder):
    for number in range(3):
        write_jsonl(folder / f"rows-{number:03}.jsonl", rows_with_paths()[2 * number : 2 * number + 2])
    one, other = (load_rows(str(folder / name))["train"] for name in ("rows-*.jsonl", "rows-{000..002}.jsonl"))
    assert one["image"] == other["image"] == [row["image"] for row in rows_with_paths()]


def test_rows_that_name_one_file_are_captions_of_one_image(tmp_path):
    rows = {"image": ["a.png", "b.png", "a.png", "c.png", "a.png"], "caption": ["one", "two", "three", "four", "five"]}
    found = load_evaluation_set(datasets.Dataset.from_dict(rows), "image", "caption", row_per_caption=True)
    assert found.references.captions == {0: ["one", "three", "five"], 1: ["two"], 3: ["four"]}


def test_words_that_pandas_takes_for_nothing_are_captions(folder):
    (folder / "rows.csv").write_text("image,caption\npictures/red.png,NA\npictures/blue.png,\npictures/lime.png,None\n")
    skipped = SkippedRows()
    assert captioned(folder / "rows.csv", skipped=skipped).references() == [["NA"], ["None"]]
    assert [entry["row"] for entry in skipped.pending] == [1]


def test_data_sets_on_the_hub_are_loaded_by_revision_and_streamed(folder, tmp_path):
    """In a process of its own, which asks another Hub."""
    with Hub() as hub:
        metadata = b'{"file_name": "red.png", "caption": "a dog"}\n'
        hub.files["dataset", "org/pictures"] = {"train/red.png": png(folder, "red"), "train/metadata.jsonl": metadata}
        hub.branches["dataset", "org/pictures", "v1"] = hub.files["dataset", "org/pictures"]
        program = (
            f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); import conftest\n"
            "from qformer_captioner.data.dataset import CaptionSource, SkippedRows\n"
            "from qformer_captioner.data.loading import load_rows\n"
            "from qformer_captioner.data.streaming import CaptionStream\n"
            "print(load_rows('org/pictures', revision='v1')['train'][0]['caption'])\n"
            "source = CaptionSource('', load_rows('org/pictures', streaming=True)['train'], 'image', 'caption')\n"
            "print(next(iter(CaptionStream([source], SkippedRows()))))\n"
        )
        environment = hub.environment(tmp_path / "home")
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    first, second = done.stdout.splitlines() or pytest.fail(done.stderr)
    assert first == "a dog" and "size=20x10" in second
    assert [request for request in hub.requests if request.endswith("/org/pictures/revision/v1")]


# ----------------------------------------------------------------------------------------------------------------------
# Splits
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def split_folder(folder):
    """The folder of images; the last two are the split "dev"."""
    rows = [
        {"file_name": f"{colour}.png", "caption": f"all {colour}", "split": "dev" if number > 3 else "train"}
        for number, colour in enumerate(COLOURS)
    ]
    write_jsonl(folder / "pictures" / "metadata.jsonl", rows)
    return folder / "pictures"


def test_a_folder_with_a_split_column_is_split_by_it(split_folder):
    train, evaluation = load_splits(str(split_folder))
    assert (len(train), len(evaluation)) == (4, 2)


def test_max_samples_keeps_the_first_rows(split_folder):
    train, evaluation = load_splits(str(split_folder), max_train_samples=3, max_eval_samples=1)
    assert (len(train), len(evaluation)) == (3, 1)


def test_an_unknown_split_names_those_there_are(split_folder):
    with pytest.raises(InputError, match="no split 'val'; it has .*'dev'"):
        load_splits(str(split_folder), eval_split="val")


def test_a_data_set_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        load_splits(str(tmp_path / "nowhere"))


def test_rows_of_a_file_are_an_evaluation_set(folder):
    name = write_csv(folder / "rows.csv")
    rows = load_rows(name)["train"]
    found = load_evaluation_set(rows, "image", "caption", image_folder=folder_of_images(name, rows))
    assert [found.open(image).getpixel((0, 0)) for image in found.row_of] == list(map(ImageColor.getrgb, COLOURS))


# ----------------------------------------------------------------------------------------------------------------------
# Paths
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("../secret.png", "leads out of the folder of images"),
        ("pictures/../../secret.png", "leads out of the folder of images"),
        ("/etc/passwd", "leads out of the folder of images"),
        ("link.png", "leads out of the folder of images"),
        ("linked/secret.png", "leads out of the folder of images"),
        ("https://example.com/a.png", "is not the path of a file"),
        ("file:///etc/passwd", "is not the path of a file"),
        ("data:image/png;base64,AAAA", "is not the path of a file"),
        ("a\0.png", "is not the path of a file"),
        ("pictures/gone.png", "There is no image file"),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "stream"])
def test_a_path_that_leads_out_of_the_folder_is_a_broken_row(tmp_path, folder, path, reason, kind):
    inside = tmp_path / "inside"
    inside.mkdir()
    (folder / "pictures").rename(inside / "pictures")
    Image.new("RGB", (5, 5)).save(tmp_path / "secret.png")
    (inside / "link.png").symlink_to(tmp_path / "secret.png")
    (inside / "linked").symlink_to(tmp_path)
    rows = [{"image": path, "caption": "one"}, {"image": "pictures/blue.png", "caption": "two"}]
    skipped = SkippedRows()
    if kind == "parquet":
        rows = {"image": [{"bytes": None, "path": row["image"]} for row in rows], "caption": ["one", "two"]}
        rows = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
        pyarrow.parquet.write_table(rows.data.table, inside / "rows.parquet")  # to_parquet would read the images
        data = captioned(inside / "rows.parquet", skipped=skipped)
    else:
        name = write_jsonl(inside / "rows.jsonl", rows)
        data = stream(name, skipped=skipped) if kind == "stream" else captioned(name, skipped=skipped)
    assert seen(next(iter(data))) == ((0, 0, 255), ("two",))
    assert [(entry["row"], entry["file"]) for entry in skipped.pending] == [(None if kind == "stream" else 0, path)]
    assert reason in skipped.pending[0]["reason"]


def test_an_absolute_path_inside_the_folder_is_read(folder):
    rows = [{"image": str(folder / row["image"]), "caption": row["caption"]} for row in rows_with_paths()]
    assert len(captioned(write_jsonl(folder / "rows.jsonl", rows)).drop_unreadable()) == len(COLOURS)


def test_another_folder_of_images_can_be_named(folder):
    (folder / "elsewhere").mkdir()
    rows = [{"image": f"{colour}.png", "caption": f"all {colour}"} for colour in COLOURS]
    name = write_jsonl(folder / "elsewhere" / "rows.jsonl", rows)
    with pytest.raises(InputError, match="No image of the train split can be read"):
        captioned(name)[0]
    assert len(captioned(name, image_folder=folder / "pictures").drop_unreadable()) == len(COLOURS)
    with pytest.raises(InputError, match="There is no folder of images 'nowhere'"):
        captioned(name, image_folder="nowhere")


def test_a_file_whose_name_has_brackets_is_no_pattern(folder):
    name = write_jsonl(folder / "rows[a].jsonl", rows_with_paths())
    assert len(captioned(name).drop_unreadable()) == len(COLOURS)


def test_a_file_whose_name_has_a_colon_is_no_address(tmp_path):
    assert locate("12:30.png", tmp_path) == tmp_path / "12:30.png"


# ----------------------------------------------------------------------------------------------------------------------
# Files that cannot be read
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.csv", None, "There is no file '.*gone.csv'"),
        ("gone-*.tar", None, "There is no file '.*gone-.*tar'"),
        ("rows.txt", "image,caption", "must all have the same suffix, one of .parquet, .*; these have .txt"),
        ("rows.csv", "image,caption\na,b\na,b,c\n", "rows.csv' cannot be read: Expected 2 fields in line 3, saw 3"),
        ("rows.csv", "", "rows.csv' cannot be read: No columns"),
        ("rows.csv", "image,caption\n", "rows.csv' cannot be read: it has no rows"),
        ("rows.jsonl", "", "rows.jsonl' cannot be read: it has no rows"),
        ("rows.jsonl", '{"image": "a"}\n{"image": \n', "rows.jsonl' cannot be read: line 2 .*is not valid JSON"),
        ("rows.json", '[{"image": "a"},\n{"image"}]', "rows.json' cannot be read: line 2 is not valid JSON"),
        (
            "rows.json",
            '{"images": [{"id": 1}], "annotations": []}',
            "rows.json' cannot be read: 'file_name' is missing",
        ),
        ("rows.parquet", "no parquet", "rows.parquet' cannot be read: .*Parquet"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    for streaming in (False, True):
        with pytest.raises(InputError, match=f"^[^\n]*{message}[^\n]*$"):
            rows = load_rows(str(tmp_path / name), streaming=streaming)["train"]
            source = CaptionSource(name, rows, image_folder=tmp_path)
            next(iter(CaptionStream([source], SkippedRows(), shuffle_buffer=0)))


def test_files_of_two_kinds_do_not_go_together(folder):
    write_csv(folder / "rows.csv")
    write_jsonl(folder / "rows.jsonl", rows_with_paths())
    with pytest.raises(InputError, match="must all have the same suffix, .*; these have .csv, .jsonl"):
        load_rows(str(folder / "rows.*"))


def test_a_column_that_is_not_there_lists_those_that_are(folder):
    name = write_tar(folder / "rows.tar", folder)
    for load in (captioned, stream):
        with pytest.raises(InputError, match="no column 'jpg'; its columns are .*'png', 'json', 'txt'"):
            load(name, image="jpg", caption="txt")


def test_strings_lists_and_numbers_may_stand_in_one_column(folder):
    rows = rows_with_paths(["one", ["two", "three"], 4, None, [], "  "])
    data = captioned(write_jsonl(folder / "rows.jsonl", rows))
    assert data.references() == [["one"], ["two", "three"], ["4"]]


def test_a_stream_without_one_usable_row_says_so(folder):
    rows = [{"image": "gone.png", "caption": "one"}] * 3
    with pytest.raises(InputError, match="No row of train of .* can be used; .*no image file"):
        next(iter(stream(write_jsonl(folder / "rows.jsonl", rows))))


# ----------------------------------------------------------------------------------------------------------------------
# Streams
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def many(folder):
    """Twelve rows, which tell their numbers, in three files of 5, 4 and 3."""
    number = iter(range(12))
    for file, rows in enumerate((5, 4, 3)):
        rows = [{"image": "pictures/red.png", "caption": str(next(number))} for _ in range(rows)]
        write_jsonl(folder / f"many-{file}.jsonl", rows)
    return folder / "many-*.jsonl"


def numbers(rows, count) -> list[int]:
    return [int(row["captions"][0]) for row, _ in zip(iter(rows), range(count), strict=False)]


def test_behind_its_last_row_a_stream_begins_again_in_another_order(many):
    rows = numbers(stream(many, shuffle_buffer=4), 36)
    passes = [rows[:12], rows[12:24], rows[24:]]
    assert all(sorted(each) == list(range(12)) for each in passes)
    assert passes[0] != passes[1] != passes[2] and passes[0] != sorted(passes[0])
    assert numbers(stream(many, shuffle_buffer=4), 36) == rows, "the order follows from the seed"
    assert numbers(stream(many, shuffle_buffer=4, augmentation=Augmentation(seed=7)), 36) != rows


@pytest.mark.parametrize("shuffle_buffer", [0, 4])
@pytest.mark.parametrize(("processes", "workers"), [(2, 1), (1, 3), (3, 1), (2, 2)])
def test_processes_and_workers_share_the_rows_of_a_pass(many, processes, workers, shuffle_buffer):
    """(2, 1) and (1, 3) have a file at least for each reader, (2, 2) has not."""
    shown = Counter()
    for process in range(processes):
        data = stream(many, shuffle_buffer=shuffle_buffer, process_index=process, num_processes=processes)
        for worker in range(workers):
            rows = data._one_pass(data.sources[0], 0, process * workers + worker, processes * workers)
            shown.update(row["caption"] for row in rows)
    assert shown == Counter(map(str, range(12)))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_data_loading_processes_share_the_rows(many):
    loader = DataLoader(stream(many), batch_size=1, num_workers=3, collate_fn=lambda rows: rows[0])
    rows = numbers(loader, 9)  # in turn, from files of 5, 4 and 3 rows
    assert rows == [0, 5, 9, 1, 6, 10, 2, 7, 11]


def test_the_first_rows_of_a_stream_are_shared_too(many):
    rows = load_splits(str(many), streaming=True)[0]
    for readers in (1, 2, 3):
        data = CaptionStream([CaptionSource("rows", rows, image_folder=many.parent)], SkippedRows(), max_rows=7)
        shown = [
            row["caption"] for reader in range(readers) for row in data._one_pass(data.sources[0], 0, reader, readers)
        ]
        assert sorted(map(int, shown)) == list(range(7)), readers


def test_too_few_rows_for_the_processes_that_read_is_said(many):
    with pytest.raises(InputError, match="too few rows for 40 processes"):
        next(iter(stream(many, process_index=39, num_processes=40)))


def test_a_damaged_image_of_a_stream_is_a_broken_row_too(folder):
    (folder / "pictures" / "red.png").write_bytes(b"no image")
    for kind in ("folder of images", "parquet, images"):
        skipped = SkippedRows()
        assert take(stream(KINDS[kind](folder), skipped=skipped), 1)[0][1] == tuple(CAPTIONS[1])
        assert "cannot be read, it may be damaged" in skipped.pending[0]["reason"], kind


def test_a_broken_row_of_a_stream_is_written_down_once(folder):
    rows = rows_with_paths()
    rows[1]["image"] = "gone.png"
    rows[2]["caption"] = []
    skipped = SkippedRows()
    data = stream(write_jsonl(folder / "rows.jsonl", rows), skipped=skipped)
    assert len({captions for _, captions in take(data, 20)}) == 4
    assert [entry["file"] for entry in skipped.pending] == ["gone.png", "pictures/blue.png"]
    assert {entry["row"] for entry in skipped.pending} == {None}, "of a stream nobody knows it"
    assert len(skipped) == 2


def test_images_of_a_stream_that_have_no_name_count_one_by_one(folder, tmp_path):
    rows = [{"image": {"bytes": b"no image", "path": None}, "caption": "one"} for _ in range(3)]
    rows += [{"image": {"bytes": (folder / "pictures" / "red.png").read_bytes(), "path": None}, "caption": "two"}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    skipped = SkippedRows()
    take(stream(tmp_path / "rows.parquet", skipped=skipped), 2)
    assert len(skipped) == 3


def test_a_stream_varies_its_rows_as_a_data_set_does(folder):
    name = write_jsonl(folder / "rows.jsonl", rows_with_paths())
    data = stream(
        name, augmentation=Augmentation(random_resized_crop_scale=0.3, captions_per_image=1, prompts=["a", "b"])
    )
    rows = [row for row, _ in zip(iter(data), range(60), strict=False)]
    assert {len(row["captions"]) for row in rows} == {1} and {row["prompt"] for row in rows} == {"a", "b"}
    assert len({row["image"].size for row in rows}) > 5
    again = [row for row, _ in zip(iter(data), range(60), strict=False)]
    assert [row["captions"] for row in again] == [row["captions"] for row in rows]


def test_a_stream_with_a_split_column_is_split_by_it(folder):
    rows = [{**row, "split": "dev" if number > 3 else "train"} for number, row in enumerate(rows_with_paths())]
    train, evaluation = load_splits(write_jsonl(folder / "rows.jsonl", rows), streaming=True)
    assert [row["caption"] for row in train] == CAPTIONS[:4] and evaluation["caption"] == CAPTIONS[4:]
    evaluation = load_splits(str(folder / "rows.jsonl"), streaming=True, max_eval_samples=1)[1]
    assert len(evaluation) == 1


def test_the_captions_of_a_stream_are_those_of_its_first_rows(folder):
    name, _ = write_tar(folder / "rows.tar", folder), None
    assert list(stream(name, image="png", caption="json.all.captions").references()) == CAPTIONS


# ----------------------------------------------------------------------------------------------------------------------
# Mixtures
# ----------------------------------------------------------------------------------------------------------------------


def numbered(folder, name, count):
    rows = [{"image": "pictures/red.png", "caption": f"{name} {number}"} for number in range(count)]
    return write_jsonl(folder / f"{name}.jsonl", rows)


def test_a_mixture_has_exactly_the_shares_asked_for(folder):
    a, b = captioned(numbered(folder, "a", 60)), captioned(numbered(folder, "b", 4))
    data = CaptionMixture([a, b], [3, 1])
    epochs = []
    for epoch in range(5):
        data.set_epoch(epoch)
        epochs.append([data[row]["captions"][0] for row in range(len(data))])
    for rows in epochs:
        assert Counter(row[0] for row in rows) == {"a": 12, "b": 4}
        assert len(set(rows)) == len(rows), "no row twice"
    assert len({row for rows in epochs for row in rows if row[0] == "a"}) == 60, "every epoch goes on behind the last"
    assert len(data.references()) == 64


@pytest.mark.parametrize("weights", [[3, 1], [0.1, 0.3], [7, 1]])
def test_streams_are_mixed_in_these_shares_at_any_time(folder, weights):
    data = stream(numbered(folder, "a", 5), numbered(folder, "b", 4), weights=weights)
    for count in (8, 24, 80):
        shown = Counter(row["captions"][0][0] for row, _ in zip(iter(data), range(count), strict=False))
        assert abs(shown["a"] - count * weights[0] / sum(weights)) <= 1, (count, shown)


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    folder = tmp_path_factory.mktemp("backbones")
    return tiny.save_vision(folder / "vision"), tiny.save_language(folder / "llama")


@pytest.fixture
def words(backbones, folder):
    """A command line that streams 40 rows from two files for eight steps."""
    for file in range(2):
        rows = [
            {"image": f"pictures/{COLOURS[number % 6]}.png", "caption": tiny.CAPTIONS[number % 3]}
            for number in range(20 * file, 20 * file + 20)
        ]
        write_jsonl(folder / f"train-{file}.jsonl", rows)
    write_jsonl(folder / "dev.jsonl", [{**row, "caption": tiny.CAPTIONS, "number": 3} for row in rows_with_paths()])

    def make(**options) -> list[str]:
        options = {
            "dataset_name": folder / "train-*.jsonl",
            "eval_dataset_name": folder / "dev.jsonl",
            "streaming": "true",
            "shuffle_buffer": 5,
            "max_steps": 8,
            "random_resized_crop_scale": 0.5,
            "vision_model_name_or_path": backbones[0],
            "language_model_name_or_path": backbones[1],
            "qformer_config": json.dumps(tiny.QFORMER),
            "output_dir": folder / "run",
            "per_device_train_batch_size": 8,
            "learning_rate": 0.01,
            "logging_steps": 1,
            "eval_strategy": "no",
            "load_best_model_at_end": "false",
            "save_strategy": "steps",
            "save_steps": 3,
            "save_total_limit": 9,
            "generation_num_beams": 1,
            "generation_max_length": 6,
            "use_cpu": "true",
            "disable_tqdm": "true",
        } | options
        command = []
        for name, value in options.items():
            command += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        return command

    return make


def losses(folder) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def test_a_stream_trains_and_goes_on_with_the_same_rows_after_a_kill(words, folder):
    """Eight batches of eight are more than the forty rows of a pass; checkpoint 6 lies in the second one."""
    train_hf.train(words())
    for step in (3, 6):
        again = folder / f"again-{step}"
        checkpoint = folder / "run" / f"checkpoint-{step}"
        train_hf.train(words(output_dir=again, resume_from_checkpoint=checkpoint))
        ours, theirs = (load_file(run / "model.safetensors") for run in (folder / "run", again))
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), step
    train_hf.train(words(output_dir=folder / "other", shuffle_buffer=0))
    assert losses(folder / "other") != losses(folder / "run")


def test_two_processes_killed_and_gone_on_log_the_losses_of_one(words, folder):
    """From one file, so that rows are shared out and not files: then the batches of both are those of one process."""
    one_file = {"dataset_name": folder / "train-0.jsonl", "dataloader_num_workers": 1}
    train_hf.train(words(output_dir=folder / "one", **one_file))
    options = words(output_dir=folder / "two", per_device_train_batch_size=4, **one_file)
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    run += [str(ROOT / "train_hf.py"), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(run, env=environment, start_new_session=True, stderr=subprocess.DEVNULL)
    while not list((folder / "two").glob("checkpoint-*/trainer_state.json")):
        assert process.poll() is None, "the run ended before it was killed"
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (folder / "two" / "model.safetensors").exists()
    subprocess.run(run, env=environment, check=True, capture_output=True, timeout=120)
    torch.testing.assert_close(losses(folder / "two"), losses(folder / "one"), rtol=1e-5, atol=1e-5)


def test_a_stream_is_evaluated_and_saved_every_so_many_steps(words, folder, log):
    train_hf.train(words(eval_strategy="epoch", save_strategy="epoch", max_steps=20, load_best_model_at_end="true"))
    assert "--eval_strategy is steps, --eval_steps 2" in log.text
    history = json.loads((folder / "run" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "eval_loss" in entry] == list(range(2, 21, 2))
    assert len((folder / "run" / "captions.jsonl").read_text().splitlines()) == len(COLOURS)


def test_the_word_loss_and_a_fresh_captioner_read_the_captions_of_a_stream(words, folder):
    scratch = {"vision_model_name_or_path": None, "language_model_name_or_path": None}
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    options = words(
        vision_config=json.dumps({"model_type": "vit", "image_size": 16, "patch_size": 8, **sizes}),
        text_config=json.dumps({"model_type": "llama", **sizes}),
        qformer_config=json.dumps(sizes),
        bag_of_words_loss_weight=0.1,
        max_steps=2,
    )
    for name in scratch:
        place = options.index(f"--{name}")
        del options[place : place + 2]
    train_hf.train(options)
    assert len(losses(folder / "run")) == 2


def test_a_mixture_trains(words, folder):
    train_hf.train(
        words(
            streaming="false",
            dataset_name=[folder / "train-0.jsonl", write_tar(folder / "rows.tar", folder)],
            dataset_weights=[3, 1],
            image_column=["image", "png"],
            caption_column=["caption", "json.caption"],
            max_steps=-1,
            num_train_epochs=1,
        )
    )
    assert len(losses(folder / "run")) == 3  # 6 rows of the tar, 18 of the other's 20


def test_an_evaluation_set_may_have_columns_and_a_folder_of_its_own(words, folder):
    (folder / "elsewhere").mkdir()
    (folder / "pictures" / "red.png").rename(folder / "elsewhere" / "moved.png")
    write_jsonl(folder / "dev.jsonl", [{"file": "moved.png", "says": ["one", "two"]}])
    own = {"eval_image_column": "file", "eval_caption_column": "says", "eval_image_folder": folder / "elsewhere"}
    args = train_hf.parse_options(words(streaming="false", **own))[1]
    training, evaluation = load_datasets(args, None, SkippedRows(), Augmentation())
    assert (len(training), evaluation.references()) == (40, [["one", "two"]])


def test_a_configuration_of_an_evaluation_set_can_be_chosen(tmp_path):
    configs = "".join(f"- {{config_name: {name}, data_files: {name}.jsonl}}\n" for name in ("short", "long"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    for name in ("short", "long"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"image": "a.png", "caption": name}])
    assert load_eval_split(str(tmp_path), "long")["caption"] == ["long"]


def test_what_is_said_of_an_evaluation_set_needs_one(words):
    options = words(eval_caption_column="text")
    place = options.index("--eval_dataset_name")
    with pytest.raises(InputError, match="--eval_caption_column describes --eval_dataset_name"):
        train_hf.train(options[:place] + options[place + 2 :])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_steps": -1}, "A stream has no end: give .* --max_steps"),
        ({"dataset_weights": [1, 2]}, "--dataset_weights must be 1 numbers above 0"),
        ({"dataset_name": ["a", "b"], "dataset_weights": [1, 0]}, "--dataset_weights must be 2 numbers above 0"),
        (
            {"dataset_name": ["a.csv", "b.csv", "c.csv"], "image_column": ["a", "b"]},
            "--image_column has 2 values for 3",
        ),
        ({"dataset_name": "gone.csv"}, "There is no file 'gone.csv'"),
        ({"eval_dataset_name": "gone.csv"}, "There is no file 'gone.csv'"),
        ({"eval_caption_column": "text"}, "no column 'text'; its columns .* Choose one with --eval_caption_column"),
        ({"eval_image_column": "text"}, "no column 'text'; its columns .* Choose one with --eval_image_column"),
        (
            {"eval_image_column": "number"},
            "holds .*, not images or paths. Choose another column with --eval_image_column",
        ),
        ({"eval_image_folder": "gone"}, "There is no folder of images 'gone' .--eval_image_folder"),
        ({"image_folder": "gone"}, "There is no folder of images 'gone'"),
        ({"caption_column": "text"}, "no column 'text'; its columns are 'image', 'caption'"),
        ({"shuffle_buffer": -1}, "--shuffle_buffer must be at least 0, not -1"),
        ({"image_id_column": "image"}, "--image_id_column needs all rows"),
    ],
)
def test_what_does_not_go_together_is_one_sentence(words, options, message):
    with pytest.raises(InputError, match=f"^[^\n]*{message}[^\n]*$"):
        train_hf.train(words(**options))
