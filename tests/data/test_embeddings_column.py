"""Columns of features: rows of equal and of different lengths, with and without the name of their encoder."""

import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from qformer_captioner import QFormerCaptioner, precompute_features
from qformer_captioner.common.errors import InputError
from qformer_captioner.data.collator import CaptionCollator
from qformer_captioner.data.feature_shards import FeatureBatch, SplitLayout
from qformer_captioner.data.feature_store import FeatureStore, finish_store
from qformer_captioner.data.features import FeatureRef
from qformer_captioner.training.shared_setup import normalize_image_features

from ..fixtures import tiny
from ..fixtures.feature_stores import command, with_embeddings


@pytest.fixture(scope="module")
def vision(tmp_path_factory):
    return tiny.save_vision(tmp_path_factory.mktemp("vision"))


EMBEDDINGS = torch.randn(7, 5, tiny.VISION_WIDTH, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("kind", ["[D]", "[N, D]", "[1, N, D]", "Array2D"])
def test_embeddings_of_a_column_are_features(vision, tmp_path, kind):
    values = EMBEDDINGS[:, 0] if kind == "[D]" else EMBEDDINGS[:, None] if kind == "[1, N, D]" else EMBEDDINGS
    column = datasets.Array2D(shape=(5, tiny.VISION_WIDTH), dtype="float32") if kind == "Array2D" else None
    data = with_embeddings(tmp_path / "data", values.tolist(), column)
    (Path(shutil.copytree(vision, tmp_path / "vision")) / "model.safetensors").write_bytes(b"never opened as weights")
    words = command(tmp_path / "vision", data, tmp_path / "store", "--embeddings_column", "own", "--dtype", "float32")
    precompute_features.precompute(words)
    expected = EMBEDDINGS[:, :1] if kind == "[D]" else EMBEDDINGS
    assert torch.equal(FeatureStore(tmp_path / "store").split("train").read(range(7)).image_embeds, expected)


def test_a_row_without_embeddings_is_skipped_and_recorded(vision, tmp_path):
    cells = EMBEDDINGS.tolist()
    cells[2], cells[4][0][0] = None, float("nan")
    data = with_embeddings(tmp_path / "data", cells)
    precompute_features.precompute(command(vision, data, tmp_path / "store", "--embeddings_column", "own"))
    train = FeatureStore(tmp_path / "store").split("train")
    assert train.reasons == {2: "The row has no embeddings.", 4: "Its features are not finite."}
    torch.testing.assert_close(train[5].float(), EMBEDDINGS[5], atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda cells: [*cells[:3], [row[:10] for row in cells[3]], *cells[4:]],
            r"differ in width: those of row 3 of 'train' have 10 numbers each, others 24",
        ),
        (lambda cells: [[[1.0, 2.0], [3.0]]], r"must hold numbers in lists .*, but row 0 of 'train' is list"),
        (lambda cells: ["[1.0, 2.0]"], "must hold numbers in lists .* is string, not a list"),
        (lambda cells: [[["a", "b"]]], "must hold numbers in lists"),
        (lambda cells: [[cell, cell] for cell in cells], r"must hold numbers in lists .* of lengths \[2, 5, 24\]"),
        (lambda cells: [[row[:10] for row in cell] for cell in cells], "have 10 numbers, and features of .* have 24"),
        (lambda cells: [None, None], "The column 'own' of 'train' is empty"),
        (lambda cells: [[[1e6] * 24]], "do not fit float16: use --dtype float32"),
    ],
)
def test_a_column_without_embeddings_ends_in_one_sentence(vision, tmp_path, change, message):
    data = with_embeddings(tmp_path / "data", change(EMBEDDINGS.tolist()))
    with pytest.raises(InputError, match=message):
        precompute_features.precompute(command(vision, data, tmp_path / "store", "--embeddings_column", "own"))


# --- Rows of different lengths ----------------------------------------------------------------------------------------

LENGTHS = [3, 1, 5, 2, 5, 4, 1]
ROWS = [EMBEDDINGS[row, :length] for row, length in enumerate(LENGTHS)]


def precompute(data: Path, folder: Path, *more: str) -> FeatureStore:
    """Store the column `own` of a data set in float32, without the name of an encoder."""
    words = command(None, data, folder, "--embeddings_column", "own", "--dtype", "float32", *more)
    precompute_features.precompute(words)
    return FeatureStore(folder)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Return a data set with rows of different lengths, and its store."""
    folder = tmp_path_factory.mktemp("different")
    data = with_embeddings(folder / "data", [row.tolist() for row in ROWS])
    precompute(data, folder / "store")
    return data, folder / "store"


@pytest.mark.parametrize("kind", ["[N, D]", "[1, N, D]", "Array2D", "JSON", "arrays"])
def test_rows_of_different_lengths_are_padded_with_zeros(tmp_path, kind):
    cells: list = [[row.tolist()] if kind == "[1, N, D]" else row.tolist() for row in ROWS]
    if kind == "JSON":
        (tmp_path / "data").mkdir()
        lines = (json.dumps({"own": cell, "caption": "a"}) + "\n" for cell in cells)
        (tmp_path / "data" / "train.jsonl").write_text("".join(lines))
    else:
        cells = [row.numpy() for row in ROWS] if kind == "arrays" else cells
        column = datasets.Array2D(shape=(None, tiny.VISION_WIDTH), dtype="float32") if kind == "Array2D" else None
        with_embeddings(tmp_path / "data", cells, column)
    train = precompute(tmp_path / "data", tmp_path / "store").split("train")
    order = [6, 2, 0, 3]
    features, mask = train.read(order)
    expected = torch.nn.utils.rnn.pad_sequence([ROWS[row] for row in order], batch_first=True)
    assert torch.equal(features, expected)
    assert mask.dtype == torch.bool and mask.sum(dim=1).tolist() == [1, 5, 3, 2]
    assert train.shape == (None, tiny.VISION_WIDTH)


def test_rows_of_one_length_have_no_mask(store):
    train = FeatureStore(store[1]).split("train")
    features, mask = train.read([4, 2])
    assert mask is None and torch.equal(features, torch.stack([ROWS[4], ROWS[2]]))
    assert torch.equal(train[3], ROWS[3])


def test_a_buffer_that_is_reused_has_zeros_as_padding(store):
    train = FeatureStore(store[1]).split("train")
    place = train.read([2, 4]).image_embeds.data_ptr()
    features, mask = train.read([2, 1])
    assert features.data_ptr() == place and not features[1, 1:].any() and mask is not None


def test_a_file_of_features_with_offsets_can_be_read_with_numpy(store):
    values = np.load(store[1] / "train" / "00001.npy")
    offsets = np.load(store[1] / "train" / "00001.offsets.npy")
    assert offsets.tolist() == [0, 5, 9, 10]  # rows 4 to 6
    np.testing.assert_array_equal(values[offsets[1] : offsets[2]], ROWS[5])


def test_rows_without_features_are_skipped_with_a_reason(tmp_path):
    cells: list = [row.tolist() for row in ROWS]
    cells[0], cells[2], cells[3], cells[5][1][3] = [], None, [[]], float("inf")
    store = precompute(with_embeddings(tmp_path / "data", cells), tmp_path / "store")
    train = store.split("train")
    empty = "The row has no embeddings."
    assert train.reasons == {0: empty, 2: empty, 3: empty, 5: "Its features are not finite."}
    assert torch.equal(train.read([6, 4]).image_embeds[1], ROWS[4])
    with pytest.raises(ValueError, match="Row 5 has no features: Its features are not finite"):
        train.read([5])


def test_views_may_differ_in_length(tmp_path):
    lengths = np.array([[2, 1], [3, 1], [1, 4]])
    values = np.arange(12 * 4, dtype=np.float32).reshape(12, 4)
    layout = SplitLayout(tmp_path / "train", rows=3, rows_per_shard=2, views=2, shape=(None, 4), dtype="float32")
    layout.write(0, [FeatureBatch(values[:3], lengths[:1], []), FeatureBatch(values[3:7], lengths[1:2], [])])
    layout.write(1, [FeatureBatch(values[7:], lengths[2:], [])])
    finish_store(tmp_path, None, {}, {"train": layout})
    features, mask = FeatureStore(tmp_path).split("train").read([2, 0, 1], [1, 0, 0])
    assert mask.sum(dim=1).tolist() == [4, 2, 3]
    np.testing.assert_array_equal(features[mask], np.concatenate([values[8:], values[:2], values[3:6]]))


def damage_offsets(change):
    return lambda path: np.save(path, change(np.load(path)))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.unlink(), "No such file"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "mmap length is greater than file size"),
        (lambda path: path.write_bytes(b""), "EOF: reading magic string"),
        (damage_offsets(lambda offsets: offsets[:-1]), r"holds int64 \[3\], not int64 \[4\]"),
        (damage_offsets(lambda offsets: offsets[::-1].copy()), "do not rise from 0"),
        (damage_offsets(lambda offsets: offsets * 2), r"holds float32 \[10, 24\], not float32 \[20, 24\]"),
    ],
)
def test_damaged_offsets_are_named_and_restored_by_the_same_command(store, tmp_path, damage, reason):
    shutil.copytree(store[1], tmp_path / "store")
    offsets = tmp_path / "store" / "train" / "00001.offsets.npy"
    damage(offsets)
    with pytest.raises(InputError, match=rf"0001.*\.npy' of the features is missing or damaged .*{reason}"):
        FeatureStore(tmp_path / "store").split("train")
    precompute(store[0], tmp_path / "store")
    for path in (store[1] / "train").iterdir():
        assert (tmp_path / "store" / "train" / path.name).read_bytes() == path.read_bytes()


def test_a_row_without_features_that_is_not_skipped_is_refused(store, tmp_path):
    shutil.copytree(store[1], tmp_path / "store")
    np.save(tmp_path / "store" / "train" / "00001.offsets.npy", [0, 0, 9, 10])
    with pytest.raises(InputError, match=r"00001\.offsets\.npy' .* no features for its row 0, .* delete it, and give"):
        FeatureStore(tmp_path / "store").split("train")


def test_a_store_of_the_first_format_is_read(tmp_path):
    store = precompute(with_embeddings(tmp_path / "data", EMBEDDINGS.tolist()), tmp_path / "store")
    index = json.loads((store.folder / "index.json").read_text())
    assert index["format"] == 2 and index["splits"]["train"]["shape"] == [5, tiny.VISION_WIDTH]
    (store.folder / "index.json").write_text(json.dumps({**index, "format": 1}))
    assert torch.equal(FeatureStore(store.folder).split("train").read([3]).image_embeds[0], EMBEDDINGS[3])


def test_the_disk_that_rows_of_different_lengths_need_is_known(store, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    needed = sum(LENGTHS) * tiny.VISION_WIDTH * 4
    monkeypatch.setattr("qformer_captioner.data.feature_run.format_size", str)
    with pytest.raises(InputError, match=f"The features need another {needed}, and the disk"):
        precompute(store[0], tmp_path / "store")


def test_a_vision_encoder_or_a_column_must_be_named(store, tmp_path):
    with pytest.raises(InputError, match="Name the vision encoder .* or a column .* with --embeddings_column"):
        precompute_features.precompute(command(None, store[0], tmp_path / "store"))


# --- Batches of the collator ------------------------------------------------------------------------------------------


def loss_and_gradients(model: QFormerCaptioner, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict]:
    model.zero_grad()
    output = model(**batch)
    (output.loss * (batch["labels"] != -100).sum()).backward()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    return output.losses.sum(dim=-1), gradients


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("language", ["llama", "t5"])
def test_a_batch_of_different_lengths_equals_its_rows(store, language, attention):
    """In float64, because rounding in float32 opens and closes ReLUs of T5."""
    model = tiny.captioner(language=language).double()
    model.set_attn_implementation({"qformer_config": attention})
    train, collate = FeatureStore(store[1]).split("train"), CaptionCollator(model.processor)
    captions = {6: tiny.CAPTIONS[:2], 2: tiny.CAPTIONS[2:], 0: tiny.CAPTIONS[1:]}
    rows: list = [{"image_embeds": FeatureRef(train, row, 0), "captions": own} for row, own in captions.items()]
    options = dict(num_beams=2, max_new_tokens=6, eos_token_id=None)
    batch = collate(rows)
    assert batch["image_attention_mask"].sum(dim=1).tolist() == [1, 5, 3]
    losses, gradients = loss_and_gradients(model, batch)
    tokens = model.generate(**batch, **options)
    summed: dict = {}
    for index, row in enumerate(rows):
        single = collate([row])
        assert "image_attention_mask" not in single
        single_losses, single_gradients = loss_and_gradients(model, single)
        torch.testing.assert_close(losses[index], single_losses[0])
        summed = {name: summed.get(name, 0) + value for name, value in single_gradients.items()}
        assert model.generate(**single, **options)[0].tolist() == tokens[index].tolist()
    torch.testing.assert_close(gradients, summed)
    assert summed["qformer.query_tokens"].abs().max() > 1e-3


def test_normalised_features_are_those_without_padding(store):
    """The store of equal rows holds the mean feature of each row, so both give the same statistics."""
    train = FeatureStore(store[1]).split("train")
    models = [tiny.captioner(), tiny.captioner()]
    means = torch.stack([row.mean(dim=0) for row in ROWS])
    models[0].qformer.normalize_image_features(means[:, None])
    rows: list = [{"image_embeds": FeatureRef(train, row, 0), "captions": ["a star"]} for row in range(len(ROWS))]
    normalize_image_features(models[1], rows, CaptionCollator(models[1].processor), len(ROWS))
    torch.testing.assert_close(models[1].qformer.state_dict(), models[0].qformer.state_dict())
