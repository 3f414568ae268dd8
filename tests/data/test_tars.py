"""Tars of samples: images of mixed suffixes, captions by themselves, missing texts, names with dots, streams."""

import gzip
import io
import json
import tarfile

import datasets
import pytest
from PIL import Image

from qformer_captioner import precompute_features
from qformer_captioner.common.errors import InputError
from qformer_captioner.data.feature_store import FeatureStore
from qformer_captioner.data.samples import caption_kinds
from qformer_captioner.data.tars import names_end_at_last_dot

from ..fixtures import tiny
from ..fixtures.captioned_files import captioned, stream, take
from ..fixtures.read_rows import read_data


def write(path, **files):
    """Write a tar of files: colours of images, or texts. Names are given with `_` for dots and `__` for slashes."""
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            name = name.replace("__", "/").replace("_", ".")
            data = content.encode()
            if content in ("red", "green", "blue"):
                file = io.BytesIO()
                Image.new("RGB", (8, 8), content).save(file, "PNG")
                data = file.getvalue()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def train(path, *options):
    """Return the rows to train on."""
    return read_data("--dataset_name", path, *options).train


@pytest.mark.parametrize(
    "files",
    [
        {"a_jpg": "red", "a_txt": "one", "b_png": "green", "b_txt": "two"},
        {"a_JPG": "red", "a_TXT": "one", "b_jpeg": "green", "b_txt": "two"},
        {"a_webp": "red", "a_caption": "one", "b_gif": "green", "b_txt": "two"},
        {"x__a_jpg": "red", "x__a_json": '{"caption": "one"}', "x__b_jpg": "green", "x__b_json": '{"caption": "two"}'},
        {"a_b_jpg": "red", "a_b_txt": "one", "a_c_jpg": "green", "a_c_txt": "two"},
        {"1_5_jpg": "red", "1_5_txt": "one", "2_7_png": "green", "2_7_txt": "two"},
        {"a_seg_jpg": "red", "a_seg_txt": "one", "b_seg_jpg": "green", "b_seg_txt": "two"},
    ],
    ids=["mixed", "case", "kinds", "json", "dots", "numbers", "suffixes of two parts"],
)
def test_samples_give_images_and_captions_by_themselves(tmp_path, files):
    path = write(tmp_path / "a.tar", **files)
    assert train(path) == [("red", ["one"]), ("green", ["two"])]
    assert [captions for _, captions in take(stream(path), 2)] == [("one",), ("two",)]


def test_a_sample_without_a_text_or_without_an_image_is_counted_and_named(tmp_path):
    path = write(tmp_path / "a.tar", a_jpg="red", a_txt="one", b_jpg="green", c_txt="three")
    data = read_data("--dataset_name", path, "--max_skipped", 1)
    assert data.train == [("red", ["one"])]
    assert [(entry["row"], entry["file"], entry["reason"]) for entry in data.skipped] == [
        (1, "b.jpg", "no caption"),
        (2, None, "The row has no image."),
    ]


@pytest.mark.parametrize("kept", [0.1, 0.4, 0.9])
def test_a_tar_that_was_cut_off_is_refused(tmp_path, kept):
    path = write(tmp_path / "a.tar", **{f"{number}_jpg": "red" for number in range(9)}, a_txt="one")
    path.write_bytes(path.read_bytes()[: int(kept * 9 * 1024) + 7])
    with pytest.raises(InputError, match="was cut off: download or write it again"):
        train(path)


def test_a_compressed_tar_is_read(tmp_path):
    path = write(tmp_path / "a.tar", a_jpg="red", a_txt="one")
    path.write_bytes(gzip.compress(path.read_bytes()))
    assert train(path) == [("red", ["one"])]


def test_a_folder_of_shards_with_the_tables_of_img2dataset_is_read(tmp_path):
    write(tmp_path / "00000.tar", a_jpg="red", a_txt="one")
    datasets.Dataset.from_dict({"url": ["http://a"], "caption": ["one"]}).to_parquet(str(tmp_path / "00000.parquet"))
    (tmp_path / "00000_stats.json").write_text('{"count": 1}')
    assert train(tmp_path) == [("red", ["one"])]


def test_shards_may_have_different_suffixes(tmp_path):
    write(tmp_path / "0.tar", a_jpg="red", a_txt="one")
    write(tmp_path / "1.tar", b_png="green", b_caption="two")
    expected = [("red", ["one"]), ("green", ["two"])]
    assert train(tmp_path / "{0..1}.tar") == train(tmp_path / "*.tar") == expected
    assert [captions for _, captions in take(stream(tmp_path / "*.tar"), 2)] == [("one",), ("two",)]


def test_suffixes_are_columns_as_before(tmp_path):
    texts = json.dumps({"caption": "three", "all": ["four", "five"]})
    path = write(tmp_path / "a.tar", a_png="red", a_txt="one\ntwo", a_json=texts)
    assert captioned(path, image="png", caption="txt").references() == [["one\ntwo"]]
    assert captioned(path, image="png", caption="json.all").references() == [["four", "five"]]
    assert captioned(path, image="png", caption="json.caption").references() == [["three"]]


def test_texts_that_agree_are_the_captions_and_others_are_columns_to_choose_from():
    """The first case is that of tars from img2dataset."""
    assert caption_kinds([{"txt": ["one"], "json": ["one"]}]) == ("txt", "json")
    assert caption_kinds([{"txt": ["tags"], "json": ["one"]}]) == ()
    assert caption_kinds([{"txt": ["tags"], "caption": ["one"]}]) == ("caption",)


def test_a_damaged_text_is_a_row_without_a_caption(tmp_path):
    path = write(tmp_path / "a.tar", a_jpg="red", a_json='{"caption": "one"}', b_jpg="green", b_json="{")
    data = read_data("--dataset_name", path)
    assert data.train == [("red", ["one"])] and data.skipped[0]["file"] == "b.jpg"


@pytest.mark.parametrize(
    ("names", "last"),
    [
        (["a.jpg", "a.txt"], False),
        (["a.seg.png", "b.seg.png"], False),
        (["a.jpg", "a.seg.png", "a.json"], False),
        (["1.5.jpg", "1.5.txt"], True),
        (["v1.0/a.jpg", "v1.0/a.txt"], False),
        (["a.jpg", "a.txt", "x.y.jpg", "x.y.txt"], True),
    ],
)
def test_dots_belong_to_names_where_suffixes_would_differ(names, last):
    assert names_end_at_last_dot(names) is last


def test_the_images_of_tars_are_found_to_precompute_features(tmp_path):
    path = write(tmp_path / "a.tar", a_jpg="red", a_txt="one", b_jpg="green", b_txt="two")
    words = ["--vision_model_name_or_path", tiny.save_vision(tmp_path / "vision"), "--dataset_name", path]
    words += ["--output_dir", tmp_path / "features", "--use_cpu", "true"]
    precompute_features.precompute([str(word) for word in words])
    assert len(FeatureStore(tmp_path / "features").split("train")) == 2
