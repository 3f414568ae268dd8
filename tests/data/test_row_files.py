"""Files of rows: every kind gives a first batch, and a file that cannot be read ends in one sentence."""

import pytest
from PIL import ImageColor

from qformer_captioner.common.errors import InputError
from qformer_captioner.data.collator import CaptionCollator
from qformer_captioner.data.dataset import CaptionSource
from qformer_captioner.data.image_paths import ImageFolder
from qformer_captioner.data.loading import load_rows
from qformer_captioner.data.skipped_rows import SkippedRows
from qformer_captioner.data.streaming import CaptionStream

from ..fixtures import tiny
from ..fixtures.captioned_files import (
    COLOURS,
    KINDS,
    captioned,
    png,
    rows_with_paths,
    seen,
    stream,
    take,
    write_csv,
    write_jsonl,
    write_tar,
)


@pytest.fixture(params=KINDS)
def kind(request, folder):
    """Return the name of a data set of each kind, and the names of its columns."""
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


def test_wildcards_and_numbers_in_braces_name_the_same_files(folder):
    for number in range(3):
        write_jsonl(folder / f"rows-{number:03}.jsonl", rows_with_paths()[2 * number : 2 * number + 2])
    one, other = (load_rows(str(folder / name))["train"] for name in ("rows-*.jsonl", "rows-{000..002}.jsonl"))
    assert one["image"] == other["image"] == [row["image"] for row in rows_with_paths()]


def test_a_file_name_with_brackets_is_not_read_as_a_pattern(folder):
    name = write_jsonl(folder / "rows[a].jsonl", rows_with_paths())
    assert len(captioned(name).drop_unreadable()) == len(COLOURS)


def test_captions_that_pandas_reads_as_missing_values_are_kept(folder):
    (folder / "rows.csv").write_text("image,caption\npictures/red.png,NA\npictures/blue.png,\npictures/lime.png,None\n")
    skipped = SkippedRows()
    assert captioned(folder / "rows.csv", skipped=skipped).references() == [["NA"], ["None"]]
    assert [entry["row"] for entry in skipped.pending] == [1]


def test_a_column_may_mix_strings_lists_and_numbers(folder):
    rows = rows_with_paths(["one", ["two", "three"], 4, None, [], "  "])
    data = captioned(write_jsonl(folder / "rows.jsonl", rows))
    assert data.references() == [["one"], ["two", "three"], ["4"]]


def test_a_missing_column_is_answered_with_the_existing_ones(folder):
    name = write_tar(folder / "rows.tar", folder)
    for load in (captioned, stream):
        with pytest.raises(InputError, match="no column 'jpg'; its columns are .*'png', 'json', 'txt'"):
            load(name, image="jpg", caption="txt")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.csv", None, "There is no file '.*gone.csv'"),
        ("gone-*.tar", None, "There is no file '.*gone-.*tar'"),
        ("rows.doc", "image,caption", "must all have the same suffix, one of .csv, .*; these have .doc"),
        ("rows.csv", "image,caption\na,b\na,b,c\n", "Line 3 of '.*rows.csv' has 3 fields, but the table has 2 columns"),
        ("rows.csv", "", "rows.csv' is empty"),
        ("rows.csv", "image,caption\n", "rows.csv' has no rows"),
        ("rows.jsonl", "", "rows.jsonl' is empty"),
        ("rows.json", "[]", "rows.json' has no rows"),
        ("rows.jsonl", '{"image": "a"}\n{"image": \n', "rows.jsonl' cannot be read: line 2 .*is not valid JSON"),
        ("rows.json", '[{"image": "a"},\n{"image"}]', "rows.json' cannot be read: line 2 is not valid JSON"),
        ("rows.json", '{"images": [{"id": [1]}], "annotations": []}', "rows.json', image 0 has no valid id"),
        ("rows.parquet", "no parquet", "rows.parquet' cannot be read: .*Parquet"),
    ],
)
def test_a_file_that_cannot_be_read_ends_in_one_sentence(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    for streaming in (False, True):
        with pytest.raises(InputError, match=f"^[^\n]*{message}[^\n]*$"):
            rows = load_rows(str(tmp_path / name), streaming=streaming)["train"]
            source = CaptionSource(name, rows, image_folder=ImageFolder(tmp_path))
            next(iter(CaptionStream([source], SkippedRows(), shuffle_buffer=0)))


def test_files_of_two_kinds_are_refused(folder):
    write_csv(folder / "rows.csv")
    write_jsonl(folder / "rows.jsonl", rows_with_paths())
    with pytest.raises(InputError, match="must all have the same suffix, .*; these have .csv, .jsonl"):
        load_rows(str(folder / "rows.*"))


@pytest.mark.slow
def test_data_sets_on_the_hub_are_loaded_by_revision_and_streamed(hub, commands, folder, tmp_path):
    """The data are loaded in another process, which uses a local Hub."""
    metadata = b'{"file_name": "red.png", "caption": "a dog"}\n'
    hub.files["dataset", "org/pictures"] = {"train/red.png": png(folder, "red"), "train/metadata.jsonl": metadata}
    hub.branches["dataset", "org/pictures", "v1"] = hub.files["dataset", "org/pictures"]
    program = (
        "from qformer_captioner.data.dataset import CaptionSource, SkippedRows\n"
        "from qformer_captioner.data.loading import load_rows\n"
        "from qformer_captioner.data.streaming import CaptionStream\n"
        "print(load_rows('org/pictures', revision='v1')['train'][0]['caption'])\n"
        "source = CaptionSource('', load_rows('org/pictures', streaming=True)['train'], 'image', 'caption')\n"
        "print(next(iter(CaptionStream([source], SkippedRows()))))\n"
    )
    done = commands.run("python", program, tmp_path)
    first, second = done.stdout.splitlines() or pytest.fail(done.stderr)
    assert first == "a dog" and "size=20x10" in second
    assert [request for request in hub.requests if request.endswith("/org/pictures/revision/v1")]
