"""Hostile input from strangers: images, file names, captions and tables.

Each ends in an error (`OSError`, `InputError`) or a skipped row. None makes the process hang or fills the memory. No
file outside the folder is read: a red picture lies there, the canary, and no row may show it.
"""

import io
import json
import os
import resource
import struct
import tarfile
import zlib
from pathlib import Path

import datasets
import pytest
from PIL import Image
from transformers import AutoTokenizer

from qformer_captioner.common.errors import InputError
from qformer_captioner.data.captions import captions_of
from qformer_captioner.data.collator import CaptionCollator
from qformer_captioner.data.dataset import CaptionDataset, CaptionSource
from qformer_captioner.data.image_paths import folder_of_images
from qformer_captioner.data.skipped_rows import SkippedRows
from qformer_captioner.data.splits import load_splits
from qformer_captioner.data.streaming import CaptionStream
from qformer_captioner.images_qformer import open_image

from ..fixtures import tiny

CANARY = (255, 0, 0)


def chunk(kind: bytes, content: bytes) -> bytes:
    """Return a chunk of a PNG file."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, pixels: bytes = b"\0" * 100, more: bytes = b"") -> bytes:
    """Return a PNG file whose header states this size, whatever pixels it has."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + more + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def saved(kind: str, mode: str = "RGB", **options) -> bytes:
    """Return the file of a picture in a format of Pillow."""
    file = io.BytesIO()
    tiny.picture(mode=mode).save(file, kind, **options)
    return file.getvalue()


GOOD = saved("PNG")
ZEROS = zlib.compress(bytes(50_000_000))
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(ran) (w) file closefile showpage\n%%EOF"

# ----------------------------------------------------------------------------------------------------------------------
# Images
# ----------------------------------------------------------------------------------------------------------------------

IMAGES = {
    "bomb of 900 megapixels": png(30_000, 30_000),
    "bomb that Pillow only warns of": png(13_000, 13_000),
    "size of 2**31": png(2**31 - 1, 2**31 - 1),
    "no width": png(0, 10),
    "one pixel wide, 60,000 high": png(1, 60_000, b"\0\0" * 60_000),
    "one pixel high, 60,000 wide": png(60_000, 1, b"\0" * 60_001),
    "pixels missing": png(500, 500),
    "text that unpacks to 50 MB": png(8, 8, b"\0" * 72, chunk(b"zTXt", b"k\0\0" + ZEROS)),
    "colour profile that unpacks to 50 MB": png(8, 8, b"\0" * 72, chunk(b"iCCP", b"k\0\0" + ZEROS)),
    "GIF bomb": b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b",\0\0\0\0\xff\xff\xff\xff\0\x08\x01\0;",
    "PPM bomb": b"P6 100000 100000 255\n",
    "TIFF directory that is its own next": b"II*\0\x08\0\0\0\x01\0"
    + struct.pack("<HHII", 256, 4, 1, 10)
    + b"\x08\0\0\0",
    "cut JPEG": saved("JPEG")[:300],
    "cut PNG": GOOD[:100],
    "cut WEBP": saved("WEBP")[:60],
    "cut TIFF": saved("TIFF")[:50],
    "nothing": b"",
    "HTML": b"<html><script>alert(1)</script></html>",
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>",
    "PostScript, which Pillow would run": POSTSCRIPT,
    "zeros": bytes(1000),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", IMAGES)
def test_a_hostile_image_is_refused_by_name_and_does_not_fill_the_memory(name, tmp_path):
    path = tmp_path / "holiday.jpg"
    path.write_bytes(IMAGES[name])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # peak so far, in kilobytes
    with pytest.raises(OSError, match=r"The image '.*holiday.jpg' cannot be read"):
        open_image(path)
    with pytest.raises(OSError, match=r"The image 'holiday.jpg' cannot be read"):
        open_image(IMAGES[name], "holiday.jpg")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "content",
    [
        pytest.param(saved("JPEG", "CMYK"), id="CMYK"),
        pytest.param(saved("PNG", "I;16"), id="16 bits"),
        pytest.param(saved("PNG", "P", transparency=b"\0\1\2"), id="palette with transparency"),
        pytest.param(saved("GIF", save_all=True, append_images=[tiny.picture(1)] * 3), id="animation"),
        pytest.param(png(8, 8, b"\0" * 72, chunk(b"eXIf", b"MM\0*\0\0\0\x08\xff\xff" + b"\xff" * 3000)), id="bad EXIF"),
    ],
)
def test_an_unusual_image_is_read(content):
    assert open_image(content).mode == "RGB"


def test_pipes_folders_and_circular_links_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "circle.png").symlink_to(tmp_path / "circle.png")
    for path in (*tmp_path.iterdir(), Path("/dev/zero")):
        with pytest.raises(OSError, match="There is no image file"):
            open_image(path)


# ----------------------------------------------------------------------------------------------------------------------
# Names of files
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return a folder with an image `good.png`. Two links in it lead to a secret file outside the folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    Image.new("RGB", (8, 8), CANARY).save(tmp_path / "canary.png")
    folder = tmp_path / "stranger"
    (folder / "deep").mkdir(parents=True)
    (folder / "good.png").write_bytes(GOOD)
    (folder / "link.png").symlink_to(tmp_path / "canary.png")
    (folder / "way").symlink_to(tmp_path)
    (folder / "circle.png").symlink_to(folder / "circle.png")
    os.mkfifo(folder / "pipe.png")
    return folder


def readable_rows(name: Path, streaming: bool = False) -> tuple[list[dict], list[dict]]:
    """Return the readable rows and the entries of the skipped ones, as training sees them."""
    train, _ = load_splits(str(name), streaming=streaming)
    image, caption = ("png", "txt") if name.suffix == ".tar" else ("image", "caption")
    skipped, images = SkippedRows(), folder_of_images(str(name), train)
    source = CaptionSource("train", train, image, caption, image_folder=images)
    if streaming:
        return [next(iter(CaptionStream([source], skipped, shuffle_buffer=0)))], skipped.pending
    data = CaptionDataset(source, skipped).drop_unreadable()
    return [data[row] for row in range(len(data))], skipped.pending


NAMES = {
    "the folder above": "../canary.png",
    "up and down": "deep/../../canary.png",
    "an absolute path": "{outside}/canary.png",
    "a link": "link.png",
    "a link to a folder": "way/canary.png",
    "a circle of links": "circle.png",
    "a pipe": "pipe.png",
    "a file address": "file://{outside}/canary.png",
    "a web address": "http://127.0.0.1:9/canary.png",
    "data in the name": "data:image/png;base64,iVBORw0KGgo=",
    "an archive outside": "zip://canary.png::{outside}/canary.zip",
    "an archive on the web": "zip://canary.png::http://127.0.0.1:9/canary.zip",
    "Windows": "..\\..\\canary.png",
    "a NUL": "good.png\0.txt",
    "a new line": "good\n.png",
    "5,000 letters": "x" * 5000,
    "right to left": "\u202egnp.exe",
    "markup": "<img src=x onerror=alert(1)>.png",
    "home": "~/canary.png",
    "a device": "/dev/zero",
    "nothing": "",
}


@pytest.mark.parametrize("streaming", [False, True], ids=["read", "streamed"])
@pytest.mark.parametrize("name", NAMES)
def test_a_row_cannot_name_a_file_outside_its_folder(name, streaming, folder):
    names = [NAMES[name].format(outside=folder.parent), "good.png"]
    rows = [{"image": each, "caption": "a picture"} for each in names]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found, skipped = readable_rows(folder / "rows.jsonl", streaming)
    assert [row["image"].tobytes() for row in found] == [tiny.picture().tobytes()]
    assert [entry["row"] for entry in skipped] == [None if streaming else 0]
    assert len(skipped[0]["reason"]) < 1000


@pytest.mark.parametrize("name", ["a link", "a link to a folder", "a pipe", "a circle of links"])
def test_metadata_of_a_folder_cannot_name_a_file_outside_it(name, folder):
    rows = [{"file_name": each, "caption": "a picture"} for each in (NAMES[name], "good.png")]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    try:
        found, skipped = readable_rows(folder)
    except InputError as error:  # `datasets` does not list the file
        assert "cannot be loaded" in str(error)
    else:
        assert [row["image"].tobytes() for row in found] == [tiny.picture().tobytes()]
        assert len(skipped) == 1


@pytest.mark.parametrize("name", ["the folder above", "an absolute path"])
def test_metadata_that_leads_out_of_the_folder_is_refused(name, folder):
    row = {"file_name": NAMES[name].format(outside=folder.parent), "caption": "a picture"}
    (folder / "metadata.jsonl").write_text(json.dumps(row))
    with pytest.raises(InputError, match="leads out of the folder of images"):
        readable_rows(folder)


@pytest.mark.parametrize("form", ["COCO", "Karpathy"])
def test_annotations_cannot_name_a_file_outside_their_folder(form, folder):
    if form == "COCO":
        images = [{"id": 1, "file_name": "../canary.png"}, {"id": 2, "file_name": "good.png"}]
        content = {"images": images, "annotations": [{"image_id": each, "caption": "a"} for each in (1, 2)]}
    else:
        names = [{"filepath": "..", "filename": "canary.png"}, {"filename": "good.png"}]
        content = {"images": [{**each, "split": "train", "sentences": [{"raw": "a"}]} for each in names]}
    (folder / "rows.json").write_text(json.dumps(content))
    found, skipped = readable_rows(folder / "rows.json")
    assert [row["image"].tobytes() for row in found] == [tiny.picture().tobytes()]
    assert "leads out of the folder" in skipped[0]["reason"]


def write_tar(path: Path, *members: tuple) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content, *link in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            if link:
                info.type, info.linkname = link
            tar.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize("streaming", [False, True], ids=["read", "streamed"])
def test_members_of_an_archive_are_not_written_to_disk(streaming, folder):
    outside = folder.parent / "written.png"
    for number, name in enumerate(("../written", str(outside.with_suffix("")))):
        write_tar(folder / f"{number}.tar", (f"{name}.png", GOOD), (f"{name}.txt", b"a"))
        readable_rows(folder / f"{number}.tar", streaming)
    assert not list(folder.parent.rglob("written*"))


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE], ids=["link", "hard link", "device"]
)
def test_links_in_an_archive_are_not_followed(kind, folder):
    link = ("a.png", b"", kind, str(folder.parent / "canary.png"))
    write_tar(folder / "rows.tar", ("b.png", GOOD), ("b.txt", b"b"), link, ("a.txt", b"a"))
    try:
        found, _ = readable_rows(folder / "rows.tar")
    except InputError as error:
        assert "cannot be read" in str(error)
    else:
        assert {row["image"].getpixel((0, 0)) for row in found} != {CANARY}


# ----------------------------------------------------------------------------------------------------------------------
# Captions
# ----------------------------------------------------------------------------------------------------------------------

CAPTIONS = {
    "markup": ("<script>alert(1)</script>", "<script>alert(1)</script>"),
    "escape sequence": ("\x1b[2Ja dog\x07", "[2Ja dog"),
    "one-byte escape sequence": ("a dog\x9b2J", "a dog 2J"),
    "NUL": ("a\0dog", "a dog"),
    "half a character": ("a \ud800dog", "a  dog"),
    "formula": ("=cmd|' /C calc'!A0", "=cmd|' /C calc'!A0"),
    "family": ("\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f468\u200d\U0001f469\u200d\U0001f467"),
    "10 megabytes": ("word " * 2_000_000, ("word " * 2000).strip()),
    "number": (17, "17"),
}
NO_CAPTIONS = {
    "nothing": None,
    "blank": " \n\t",
    "control characters alone": "\0\x1b\x07",
    "not a number": float("nan"),
    "list in a list": [["a dog"]],
    "other fields": {"mood": "a dog"},
    "bytes": b"a dog",
    "truth": True,
}


@pytest.mark.parametrize("name", CAPTIONS)
def test_a_caption_is_plain_text(name):
    written, read = CAPTIONS[name]
    assert captions_of(written) == captions_of([{"raw": written}]) == [read]


@pytest.mark.parametrize("name", NO_CAPTIONS)
def test_a_value_that_is_not_text_is_not_a_caption(name):
    assert captions_of(NO_CAPTIONS[name]) == captions_of([NO_CAPTIONS[name]]) == []


@pytest.mark.parametrize("name", ["tiny", "t5", "gpt2"])
def test_a_caption_cannot_contain_special_tokens(name, shared):
    processor = tiny.processor(is_encoder_decoder=name == "t5")
    if name != "tiny":
        processor.tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / name)
        processor.tokenizer.pad_token = processor.tokenizer.pad_token or processor.tokenizer.eos_token
    tokenizer = processor.tokenizer
    end, pad = tokenizer.eos_token, tokenizer.pad_token
    special = {tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id}
    for caption in (f"a red circle {end} above", f"{pad} a red circle", f"{end}{end}", f"a{end[:2]}{end}{end[2:]}"):
        *words, last = processor.encode_caption(caption)
        assert last == tokenizer.eos_token_id
        assert not special & set(words)


def test_a_caption_without_tokens_can_be_in_a_batch(shared):
    processor = tiny.processor(is_encoder_decoder=True)
    processor.tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / "t5")
    rows = [{"image": tiny.picture(), "captions": ["\x01\x02"]}, {"image": tiny.picture(), "captions": ["a dog"]}]
    assert CaptionCollator(processor)(rows)["labels"].shape[:2] == (2, 1)


# ----------------------------------------------------------------------------------------------------------------------
# Tables
# ----------------------------------------------------------------------------------------------------------------------

TABLES = {
    "brackets 100,000 deep": (
        "rows.jsonl",
        b'{"image": "good.png", "caption": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ),
    "brackets 100,000 deep, of COCO": ("rows.json", b'{"images": ' + b"[" * 100_000),
    "metadata with brackets": ("metadata.jsonl", b'{"file_name": "good.png", "caption": ' + b'[{"a":' * 50_000),
    "100,000 columns": ("rows.csv", b"image,caption\ngood.png," + b"x," * 100_000),
    "line that is no JSON": ("rows.jsonl", b'{"image": "good.png", "caption": "a"}\n{broken\n'),
    "NULs": ("rows.jsonl", b"\0" * 100),
    "Latin-1": ("rows.csv", b"image,caption\ngood.png,caf\xe9\n"),
    "half a character": ("rows.jsonl", b'{"image": "good.png", "caption": "\\ud800"}'),
    "nothing": ("rows.jsonl", b""),
    "parquet without content": ("rows.parquet", b"PAR1" + bytes(100) + b"PAR1"),
    "COCO's images are numbers": ("rows.json", b'{"images": [1, 2], "annotations": []}'),
    "COCO's ids are lists": ("rows.json", b'{"images": [{"id": [1], "file_name": "good.png"}], "annotations": []}'),
    "COCO's file is a mapping": (
        "rows.json",
        b'{"images": [{"id": 1, "file_name": {}}], "annotations": [{"image_id": 1, "caption": "a"}]}',
    ),
    "names that are numbers": ("metadata.jsonl", b'{"file_name": 5, "caption": "a"}'),
    "names that are lists": ("metadata.jsonl", b'{"file_name": ["good.png", "good.png"], "caption": "a"}'),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_hostile_table_ends_in_one_sentence(name, folder):
    file, content = TABLES[name]
    (folder / file).write_bytes(content)
    with pytest.raises(InputError) as caught:
        readable_rows(folder if file.startswith("metadata") else folder / file)
    assert len(str(caught.value)) < 2000


def test_a_pickle_in_a_tar_does_not_run(folder):
    code = b"cos\nsystem\n(S'touch " + str(folder.parent / "ran").encode() + b"'\ntR."
    write_tar(folder / "rows.tar", ("a.png", GOOD), ("a.txt", b"a"), ("a.pth", code))
    rows, _ = readable_rows(folder / "rows.tar")
    assert len(rows) == 1 and not (folder.parent / "ran").exists()
