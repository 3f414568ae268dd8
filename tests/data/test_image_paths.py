"""Paths of images: where they start, where they may lead, and which file they name."""

import unicodedata

import datasets
import pyarrow.parquet
import pytest
from PIL import Image

from qformer_captioner.common.errors import InputError
from qformer_captioner.data.image_paths import ImageFolder
from qformer_captioner.data.skipped_rows import SkippedRows

from ..fixtures.captioned_files import COLOURS, captioned, rows_with_paths, seen, stream, write_jsonl


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
        ("a\0.png", "is not the path of a file"),
        ("pictures/gone.png", "There is no image file"),
        ("/another/machine/gone.png", "There is no image file"),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "stream"])
def test_a_row_whose_path_leads_out_of_the_folder_is_skipped(tmp_path, folder, path, reason, kind):
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


def test_a_file_name_with_a_colon_is_not_read_as_a_url(tmp_path):
    (tmp_path / "12:30.png").touch()
    assert ImageFolder(tmp_path).locate("12:30.png") == tmp_path / "12:30.png"


def touched(folder, *names):
    """Make empty files in a folder, and return the folder."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return ImageFolder(folder)


@pytest.mark.parametrize(
    ("written", "file"),
    [
        (r"sub\deep\a.jpg", "sub/deep/a.jpg"),
        ("./sub/a.jpg", "sub/a.jpg"),
        (r".\sub\a.jpg", "sub/a.jpg"),
        ("sub/a", "sub/a.jpeg"),
        ("a", "a.WEBP"),
        ("IMG_1.jpg", "IMG_1.JPG"),
        ("Photos/IMG_1.JPG", "photos/img_1.jpg"),
        ("000000000009", "000000000009.jpg"),
        ("a.b", "a.b.png"),
        ("my%20dog.jpg", "my dog.jpg"),
        (" a.jpg ", "a.jpg"),
        (unicodedata.normalize("NFD", "ünï/ö.jpg"), unicodedata.normalize("NFC", "ünï/ö.jpg")),
        (unicodedata.normalize("NFC", "ünï/ö.jpg"), unicodedata.normalize("NFD", "ünï/ö.jpg")),
        ("한글", unicodedata.normalize("NFD", "한글.png")),
    ],
)
def test_a_path_written_in_another_way_names_the_only_file_that_fits(tmp_path, written, file):
    folder = touched(tmp_path, file, "other.jpg")
    assert folder.locate(written) == tmp_path / file


@pytest.mark.parametrize("name", ["a%20b.jpg", "back\\slash.jpg", " a.jpg", "a"])
def test_a_file_named_exactly_as_written_comes_first(tmp_path, name):
    folder = touched(tmp_path, name, "a b.jpg", "back/slash.jpg", "a.jpg", "A.jpg")
    assert folder.locate(name) == tmp_path / name


@pytest.mark.parametrize(
    ("written", "files"), [("a", ["a.jpg", "a.png"]), ("b.JPG", ["b.jpg", "B.jpg"]), ("c", ["c.jpg", "c.JPG"])]
)
def test_a_path_that_several_files_fit_is_refused_with_their_names(tmp_path, written, files):
    with pytest.raises(OSError, match=f"fits several files, .*{files[0]}.*: write the whole name"):
        touched(tmp_path, *files).locate(written)


def test_a_text_file_is_not_the_image_whose_suffix_is_missing(tmp_path):
    with pytest.raises(OSError, match="There is no image file 'a' in"):
        touched(tmp_path, "a.txt").locate("a")


@pytest.mark.parametrize("path", ["https://example.com/a.jpg", "s3://bucket/a.jpg", "HTTP://x/a.jpg"])
def test_a_url_is_refused_with_the_reason(tmp_path, path):
    with pytest.raises(OSError, match="images are not downloaded"):
        ImageFolder(tmp_path).locate(path)


def test_a_path_beside_the_rows_starts_at_the_rows_once_its_folder_is_allowed(tmp_path):
    """Both options widen the border: --image_folder as a new start, --allowed_image_folders without one."""
    touched(tmp_path, "photos/a.jpg", "lists/captions.csv", "secret/a.jpg")
    lists, photos = tmp_path / "lists", tmp_path / "photos"
    with pytest.raises(OSError, match=f"leads out of the folder .* --allowed_image_folders '{photos}'"):
        ImageFolder(lists, lists).locate("../photos/a.jpg")
    for folder in (ImageFolder(lists, lists, (photos,)), ImageFolder(tmp_path, lists), ImageFolder(photos, lists)):
        for path in ("../photos/a.jpg", str(photos / "a.jpg")):
            assert folder.locate(path) == photos / "a.jpg"
    for path in ("../secret/a.jpg", "../../etc/passwd", r"..\secret\a.jpg", "..%2Fsecret%2Fa.jpg"):
        with pytest.raises(OSError, match="leads out of the folder"):
            ImageFolder(lists, lists, (photos,)).locate(path)


def test_a_link_is_followed_into_an_allowed_folder_only(tmp_path):
    touched(tmp_path, "photos/a.jpg", "set/rows.csv")
    (tmp_path / "set" / "b.jpg").symlink_to(tmp_path / "photos" / "a.jpg")
    with pytest.raises(OSError, match="leads out of the folder"):
        ImageFolder(tmp_path / "set").locate("b.jpg")
    assert ImageFolder(tmp_path / "set", allowed=(tmp_path / "photos",)).locate("b.jpg").name == "a.jpg"
