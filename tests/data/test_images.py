"""Paths of images: relative to a folder, never out of it, and never a URL."""

import datasets
import pyarrow.parquet
import pytest
from PIL import Image

from qformer_captioner.common.errors import InputError
from qformer_captioner.data.images import locate
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
        ("data:image/png;base64,AAAA", "is not the path of a file"),
        ("a\0.png", "is not the path of a file"),
        ("pictures/gone.png", "There is no image file"),
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
    assert locate("12:30.png", tmp_path) == tmp_path / "12:30.png"
