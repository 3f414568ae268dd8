"""Images that a data set itself holds, in base64 or as `data:` URLs, and columns that hold none."""

import base64

import datasets
import pytest
from PIL import Image

from qformer_captioner.common.errors import InputError
from qformer_captioner.data.images import file_of_image, image_keys, undecoded_images
from qformer_captioner.data.names import IMAGE_SUFFIXES
from qformer_captioner.data.skipped_rows import SkippedRows
from qformer_captioner.images_qformer import readable_formats

from ..fixtures.captioned_files import (
    COLOURS,
    captioned,
    png,
    seen,
    stream,
    take,
    write_jsonl,
    write_parquet,
)

RGB = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 255, 255), (0, 0, 0)]
EMBEDDED = {
    "base64": lambda text: text,
    "data URL": lambda text: f"data:image/png;base64,{text}",
    "dict of base64": lambda text: {"bytes": text, "path": None},
    "dict of a data URL": lambda text: {"path": f"data:image/png;base64,{text}"},
}


def embedded_rows(folder, form):
    """Return rows whose image column holds the pictures themselves."""
    texts = [base64.b64encode(png(folder, colour)).decode() for colour in COLOURS]
    return [
        {"image": EMBEDDED[form](text), "caption": f"all {colour}"} for text, colour in zip(texts, COLOURS, strict=True)
    ]


@pytest.mark.parametrize("form", EMBEDDED)
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "stream of jsonl", "stream of parquet"])
def test_images_in_base64_are_read(folder, form, kind):
    rows = embedded_rows(folder, form)
    if kind.endswith("parquet"):
        name = write_parquet(folder / "rows.parquet", [row["image"] for row in rows])
    else:
        name = write_jsonl(folder / "rows.jsonl", rows)
    if kind.startswith("stream"):
        colours = [colour for colour, _ in take(stream(name), len(RGB))]
    else:
        data = captioned(name)
        colours = [seen(data[row])[0] for row in range(len(data))]
    assert colours == RGB


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "images", "stream of jsonl", "stream of images"])
def test_a_list_of_one_image_is_that_image_and_others_are_skipped_rows(folder, kind):
    paths = [[f"pictures/{colour}.png"] for colour in COLOURS]
    cells = [paths[0], [], None, [*paths[1], *paths[2]], *paths[4:]]
    rows = [{"images": cell, "caption": str(number)} for number, cell in enumerate(cells)]
    if kind.endswith("images"):
        whole = datasets.Dataset.from_list(
            [{**row, "images": [str(folder / p) for p in row["images"] or []]} for row in rows]
        )
        name = str(folder / "rows.parquet")
        whole.cast_column("images", datasets.List(datasets.Image())).to_parquet(name)
    elif kind == "parquet":
        name = str(folder / "rows.parquet")
        datasets.Dataset.from_list(rows).to_parquet(name)
    else:
        name = write_jsonl(folder / "rows.jsonl", rows)
    skipped = SkippedRows()
    if kind.startswith("stream"):
        read = take(stream(name, skipped=skipped), 3)
    else:
        data = captioned(name, skipped=skipped).drop_unreadable()
        read = [seen(data[row]) for row in range(len(data))]
    assert read == [(RGB[0], ("0",)), (RGB[4], ("4",)), (RGB[5], ("5",))]
    reasons = [row["reason"] for row in skipped.pending]
    assert reasons[:2] == ["The row has no image."] * 2
    assert reasons[2].startswith("The row has 2 images, and a captioner reads one unless") and len(reasons) == 3


def test_a_number_as_id_is_the_name_of_a_file(folder):
    (folder / "pictures" / "red.png").rename(folder / "7.png")
    name = write_jsonl(folder / "rows.jsonl", [{"image_id": 7, "caption": "all red"}])
    assert seen(captioned(name)[0]) == (RGB[0], ("all red",))


def test_images_in_base64_of_a_csv_file_are_read(folder):
    lines = [f"{row['image']},{row['caption']}" for row in embedded_rows(folder, "base64")]
    (folder / "rows.csv").write_text("\n".join(["image,caption", *lines]))
    data = captioned(folder / "rows.csv")
    assert [seen(data[row]) for row in (0, 2)] == [(RGB[0], ("all red",)), (RGB[2], ("all blue",))]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "image",
    ["data:image/png;base64,AAAA", "QUJD" * 5000, {"bytes": "QUJD" * 5000, "path": None}],
    ids=["URL", "text", "dict"],
)
def test_the_record_of_a_broken_image_in_base64_does_not_repeat_it(folder, image, streaming):
    good = embedded_rows(folder, "base64")[2]
    if isinstance(image, dict):
        good["image"] = {"bytes": good["image"], "path": None}
    name = write_jsonl(folder / "rows.jsonl", [{"image": image, "caption": "one"}, good])
    skipped = SkippedRows()
    data = stream(name, skipped=skipped) if streaming else captioned(name, skipped=skipped)
    assert seen(next(iter(data))) == (RGB[2], ("all blue",))
    (entry,) = skipped.pending
    assert entry["file"] is None
    assert "cannot be read" in entry["reason"] and len(entry["reason"]) < 200


def test_keys_tell_images_in_base64_apart():
    """Their last parts are equal, as those of all PNG files are."""
    texts = [
        base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes([number]) * 90 + b"IEND").decode() + "/AAA" for number in (1, 2)
    ]
    rows = datasets.Dataset.from_dict({"image": texts})
    first, second = image_keys(undecoded_images(rows, "image", "--image_column"), "image")
    assert first != second


@pytest.mark.parametrize(
    "value",
    [5, True, {f"name {number}": 1 for number in range(500)}, [["a.jpg"]], [[[1, 2, 3]] * 9] * 9, [{"url": "a"}]],
    ids=lambda value: type(value).__name__,
)
def test_a_column_that_cannot_hold_images_is_refused(value):
    rows = datasets.Dataset.from_dict({"image": [value]})
    with pytest.raises(InputError, match="The column 'image' holds .* not images or paths") as refused:
        undecoded_images(rows, "image", "--image_column")
    assert len(str(refused.value)) <= 500


@pytest.mark.parametrize(
    ("value", "kind"),
    [(5, "'int'"), (True, "'bool'"), ([[1]], "'list'"), ({"src": "a"}, r"'dict' with the keys \['src'\]")],
)
def test_a_value_of_a_stream_that_is_not_an_image_is_named(folder, value, kind):
    skipped = SkippedRows()
    name = write_jsonl(folder / "rows.jsonl", [{"image": value, "caption": "one"}])
    with pytest.raises(InputError, match=f"a value of type {kind}, not an image"):
        next(iter(stream(name, skipped=skipped)))


def test_the_file_of_an_image_is_its_path():
    assert file_of_image({"bytes": None, "path": "a.jpg"}) == file_of_image("a.jpg") == "a.jpg"
    assert file_of_image(None) is None


def test_folders_find_every_kind_of_image_that_is_opened():
    registered = {suffix for suffix, kind in Image.registered_extensions().items() if kind in readable_formats()}
    assert registered <= IMAGE_SUFFIXES
    assert {".hif", ".jxl"} <= IMAGE_SUFFIXES  # of plug-ins that may be missing here
