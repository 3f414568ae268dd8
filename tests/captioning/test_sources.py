"""Inputs of the command: which images they yield, under which ids, and what is left out."""

import io
import json
import tarfile

import datasets
import pytest

from qformer_captioner.captioning.items import KeySet, TarImage
from qformer_captioner.captioning.sources import (
    FolderSource,
    NamesSource,
    RowsSource,
    TarSource,
    names_in,
    sources_of,
)
from qformer_captioner.common.errors import InputError

from ..fixtures import tiny


def jpeg(seed: int = 0) -> bytes:
    """Return the file of an image."""
    content = io.BytesIO()
    tiny.picture(seed).save(content, "JPEG")
    return content.getvalue()


def write_tar(path, files: dict[str, bytes], mode: str = "w") -> None:
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


@pytest.fixture
def folder(tmp_path):
    for name in ("b.png", "a.JPG", "c/d.webp", ".hidden.png", "._a.JPG", ".git/e.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"content")
    return tmp_path


def names(source) -> list[str]:
    return [item.image_id for item in source]


def test_a_folder_yields_its_images_in_order_and_counts_what_it_leaves_out(folder):
    source = FolderSource(str(folder))
    assert names(source) == [str(folder / name) for name in ("a.JPG", "b.png", "c/d.webp")]
    assert source.left_out == {"hidden files or folders": 3, "files that are not images": 1}
    assert source.count() == 3


def test_a_link_to_a_folder_is_left_out(folder):
    (folder / "loop.png").symlink_to(folder)
    source = FolderSource(str(folder))
    assert len(names(source)) == 3
    assert source.left_out["links to folders"] == 1


def test_names_are_files_folders_patterns_or_urls(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert names(NamesSource(["c", "*.png", "**/*.webp", "nowhere.png", "https://example.org/dog"])) == [
        "c/d.webp",
        "b.png",
        "c/d.webp",
        "nowhere.png",
        "https://example.org/dog",
    ]
    (folder / "x[1].png").write_bytes(b"")
    assert names(NamesSource(["x[1].png"])) == ["x[1].png"]


def test_the_images_of_names_are_counted(folder):
    assert NamesSource([str(folder), "nowhere.png"]).count() == 4
    assert NamesSource(iter(["a"])).count() is None


def test_a_list_of_files_has_a_name_on_each_line(tmp_path):
    (tmp_path / "list.txt").write_text("\ufeffa b.png\r\n\nc.png\n", encoding="utf-8")
    assert list(names_in(str(tmp_path / "list.txt"))) == ["a b.png", "c.png"]
    with pytest.raises(InputError, match="list of files 'absent' cannot be read"):
        list(names_in("absent"))


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_tar_yields_the_first_image_of_each_sample(tmp_path, mode):
    tar = tmp_path / ("a.tar.gz" if mode == "w:gz" else "a.tar")
    images = {"x/1.jpg": jpeg(1), "x/1.seg.png": jpeg(2), "x/1.txt": b"a dog", "x/2.txt": b"", "x/2.png": jpeg(3)}
    write_tar(tar, images, mode)
    (source,) = sources_of(str(tar))
    items = list(source)
    assert [item.image_id for item in items] == ["x/1", "x/2"]
    contents = [item.image.read() if isinstance(item.image, TarImage) else item.image["bytes"] for item in items]
    assert contents == [images["x/1.jpg"], images["x/2.png"]]


def test_a_tar_that_was_cut_off_is_named(tmp_path):
    write_tar(tmp_path / "a.tar", {"1.jpg": jpeg()})
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:700])
    with pytest.raises(InputError, match=r"a\.tar' has no end"):
        list(TarSource(str(tmp_path / "a.tar")))
    (tmp_path / "b.tar").write_bytes(bytes(range(256)) * 10 + bytes(512))
    with pytest.raises(InputError, match=r"b\.tar' cannot be read"):
        list(TarSource(str(tmp_path / "b.tar")))


def test_a_file_that_cannot_be_read_does_not_end_the_others(tmp_path):
    for name in ("a.tar", "b.parquet"):
        (tmp_path / name).write_bytes(b"damaged" * 300)
    write_tar(tmp_path / "c.tar", {"1.jpg": jpeg()})
    items = list(NamesSource([str(tmp_path / name) for name in ("*.tar", "b.parquet")]))
    assert [item.image_id for item in items] == [f"{tmp_path}/a.tar", "1", f"{tmp_path}/b.parquet"]
    assert [isinstance(item.image, OSError) for item in items] == [True, False, True]


@pytest.mark.parametrize("ending", ["parquet", "parquet, streamed"])
def test_rows_have_the_ids_of_their_column(tmp_path, ending):
    path = str(tmp_path / "rows.parquet")
    rows = {"image": [{"bytes": jpeg(n), "path": f"{n}.jpg"} for n in range(3)], "image_id": [7, 8, 9]}
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).to_parquet(path)
    source = RowsSource(path, streaming="streamed" in ending)
    items = list(source)
    assert [item.image_id for item in items] == [7, 8, 9]
    assert [item.image["bytes"] for item in items] == [jpeg(n) for n in range(3)]
    assert source.count() == 3


def test_rows_of_a_file_name_images_beside_it(tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg())
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"photo": name}) + "\n" for name in ("a.jpg", "b.jpg")))
    first, second = RowsSource(str(tmp_path / "rows.jsonl"))
    assert first.path == str(tmp_path / "a.jpg") and first.image_id == "a.jpg"
    assert isinstance(second.image, OSError) and second.path is None


def test_a_missing_column_is_named(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"image": "a.jpg"}\n')
    with pytest.raises(InputError, match="no column 'picture'.*--image_column"):
        RowsSource(str(tmp_path / "rows.jsonl"), image_column="picture")
    with pytest.raises(InputError, match="no column 'key'.*--image_id_column"):
        RowsSource(str(tmp_path / "rows.jsonl"), image_id_column="key")


def test_a_set_of_keys_knows_what_was_added():
    keys = KeySet()
    assert all(keys.add(f"images/{number}.jpg") for number in range(20_000))
    assert not any(keys.add(f"images/{number}.jpg") for number in range(0, 20_000, 7))
    assert len(keys) == 20_000 and "images/19999.jpg" in keys and "images/20000.jpg" not in keys
