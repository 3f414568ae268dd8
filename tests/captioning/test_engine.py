import io
import pickle

import datasets
import numpy as np
import pandas as pd
import pytest
import torch

from qformer_captioner import Captions
from qformer_captioner.captioning.rows import caption_rows
from qformer_captioner.common.devices import device_of
from qformer_captioner.common.errors import InputError
from qformer_captioner.hub.load import load_captioner

from ..fixtures import tiny

OPTIONS = dict(max_new_tokens=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("captioner")
    tiny.captioner().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def contents():
    """Files of four images, of which the third is damaged."""

    def content(seed: int) -> bytes:
        file = io.BytesIO()
        tiny.picture(seed).save(file, "PNG")
        return file.getvalue()

    return [content(0), content(1), b"damaged", content(3)]


@pytest.fixture(scope="module")
def expected(folder, contents):
    rows = caption_rows(load_captioner(str(folder)), contents, **OPTIONS)
    return {
        "caption": [row.captions[0] if row.captions else "" for row in rows],
        "caption_error": [row.error or "" for row in rows],
    }


def test_a_batch_of_lists_gets_captions_and_errors(folder, contents, expected):
    batch = {"image": contents, "id": [1, 2, 3, 4]}
    assert Captions(folder, **OPTIONS)(batch) == {**batch, **expected}
    assert [error == "" for error in expected["caption_error"]] == [True, True, False, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "^batch_size must be at least 1, not 0.$"),
        ({"dtype": "bf16"}, "^dtype must be auto, float32, bfloat16 or float16, not 'bf16'.$"),
    ],
)
def test_options_that_cannot_work_are_refused_before_the_model_is_loaded(options, message):
    with pytest.raises(InputError, match=message):
        Captions("nowhere", **options)


def test_a_batch_of_arrays_gets_captions(folder, contents, expected):
    batch = {"image": np.array(contents, dtype=object), "id": np.arange(4)}
    captioned = Captions(folder, **OPTIONS)(batch)
    assert {name: captioned[name] for name in expected} == expected


def test_a_data_frame_gets_captions_and_keeps_its_index(folder, contents, expected):
    frame = pd.DataFrame({"image": contents, "id": [1, 2, 3, 4]}, index=[10, 20, 30, 40])
    captioned = Captions(folder, **OPTIONS)(frame)
    assert list(captioned.columns) == ["image", "id", "caption", "caption_error"]
    assert captioned.index.equals(frame.index)
    assert {name: captioned[name].tolist() for name in expected} == expected


def test_nothing_is_loaded_before_the_first_batch_and_pickling_leaves_the_model_out(folder, contents, monkeypatch):
    loaded = []
    monkeypatch.setattr(
        "qformer_captioner.hub.load.load_captioner", lambda *args: loaded.append(args) or load_captioner(*args)
    )
    captions = Captions(folder, **OPTIONS)
    assert not loaded
    fresh = pickle.dumps(captions)
    first = captions({"image": contents})
    assert captions({"image": contents}) == first and len(loaded) == 1
    assert pickle.dumps(captions) == fresh
    assert pickle.loads(fresh)({"image": contents}) == first and len(loaded) == 2


def test_large_batches_are_split(folder, contents, monkeypatch):
    sizes = []
    monkeypatch.setattr(
        "qformer_captioner.captioning.rows.caption_rows",
        lambda model, images, *args, **kwargs: sizes.append(len(images)) or caption_rows(model, images, **OPTIONS),
    )
    assert len(Captions(folder, batch_size=3)({"image": contents})["caption"]) == 4
    assert sizes == [3, 1]


def test_several_captions_and_their_scores_are_lists(folder, contents):
    options = dict(num_beams=2, num_return_sequences=2, score=True, caption_column="text", **OPTIONS)
    captioned = Captions(folder, **options)({"image": contents})
    assert set(captioned) == {"image", "text", "text_error", "text_score"}
    assert [len(own) for own in captioned["text"]] == [len(own) for own in captioned["text_score"]] == [2, 2, 2, 2]
    assert captioned["text"][2] == ["", ""] and np.isnan(captioned["text_score"][2]).all()
    assert np.isfinite([captioned["text_score"][row] for row in (0, 1, 3)]).all()


def test_a_model_of_stage_1_adds_matching_scores_also_to_a_batch_without_images(tmp_path, contents):
    captions = Captions(tiny.save_stage1(tmp_path), score=True, **OPTIONS)
    scores = np.array(captions({"image": contents})["caption_matching_score"])
    assert ((scores > 0) & (scores < 1)).tolist() == [True, True, False, True] and np.isnan(scores[2])
    assert captions({"image": []})["caption_matching_score"] == []


def test_the_dtype_is_that_of_the_weights(folder):
    assert Captions(folder, dtype="bfloat16").load().language_model.dtype == torch.bfloat16


def test_a_missing_column_is_named(folder):
    with pytest.raises(InputError, match="no column 'image' but 'picture'"):
        Captions(folder)({"picture": []})


def test_processes_share_the_accelerators(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert [str(device_of(rank)) for rank in (None, 0, 1, 2)] == ["cuda", "cuda:0", "cuda:1", "cuda:0"]


@pytest.mark.parametrize("first", [1, 2], ids=["readable", "broken"])
def test_a_data_set_is_captioned_whatever_its_first_row_is(folder, contents, expected, first):
    """`datasets` takes the types of columns from the first batch."""
    images = datasets.Features(image=datasets.Image(decode=False))
    rows = datasets.Dataset.from_dict({"image": [contents[first], *contents]}, features=images)
    captioned = rows.map(Captions(folder, **OPTIONS), batched=True, batch_size=1, writer_batch_size=1)
    assert captioned["caption"][:] == [expected["caption"][first], *expected["caption"]]
    assert captioned.features["image"] == datasets.Image(decode=False)


@pytest.mark.slow
def test_processes_of_datasets_give_the_same_captions(folder, contents, expected):
    images = datasets.Features(image=datasets.Image(decode=False))
    rows = datasets.Dataset.from_dict({"image": contents}, features=images)
    captions = Captions(folder, **OPTIONS)
    captioned = rows.map(captions, batched=True, batch_size=2, with_rank=True, num_proc=2)
    assert {name: captioned[name][:] for name in expected} == expected
