"""Captioners that read only features, of an encoder that is not a part of them."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from qformer_captioner import (
    QFormerCaptioner,
    QFormerConfig,
    QFormerModel,
    eval_captions,
    precompute_features,
    train_hf,
)
from qformer_captioner.captioning.rows import caption_rows
from qformer_captioner.cli import caption
from qformer_captioner.common.errors import InputError
from qformer_captioner.data.feature_store import FeatureStore
from qformer_captioner.hub.model_card import describe_folder, render_card

from ..fixtures import tiny
from ..fixtures.feature_stores import with_embeddings
from ..fixtures.processes import command_line

WIDTH, LENGTHS = 7, (5, 2, 3)
OPTIONS = dict(num_beams=2, max_new_tokens=6, eos_token_id=None)


def features() -> dict[str, torch.Tensor]:
    """Return three rows of 5, 2 and 3 features."""
    generator = torch.Generator().manual_seed(2)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    embeds = torch.randn(*mask.shape, WIDTH, generator=generator)
    return {"image_embeds": embeds, "image_attention_mask": mask}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder with a language model and a captioner of features, which keeps it by reference."""
    folder = tmp_path_factory.mktemp("captioners")
    tiny.save_language(folder / "llama", max_position_embeddings=256)
    torch.manual_seed(0)
    model = QFormerCaptioner.from_backbones(None, folder / "llama", encoder_hidden_size=WIDTH, **tiny.QFORMER)
    torch.nn.init.normal_(model.language_projection.weight, std=0.2)  # so that the features matter
    model.save_pretrained(folder / "captioner")
    return folder


def answer(model: QFormerCaptioner) -> list[list[int]]:
    return model.eval().generate(**features(), **OPTIONS).tolist()


@pytest.mark.parametrize("included", [None, True, ["vision_model"]])
def test_saved_equals_loaded(folder, tmp_path, included):
    model = QFormerCaptioner.from_pretrained(folder / "captioner")
    assert len({tuple(row) for row in answer(model)}) == 3
    model.save_pretrained(tmp_path, include_backbones=included)
    for load_vision_model in (True, False):
        loaded = QFormerCaptioner.from_pretrained(tmp_path, load_vision_model=load_vision_model)
        assert answer(loaded) == answer(model)
    assert loaded.config.vision_config.to_dict()["hidden_size"] == WIDTH and not loaded.config.has_vision_model


def test_the_code_beside_its_weights_opens_it(folder, tmp_path):
    model = QFormerCaptioner.from_pretrained(folder / "captioner")
    model.save_pretrained(tmp_path, include_backbones=True)
    names = ("configuration_qformer.QFormerCaptionerConfig", "modeling_qformer.QFormerCaptioner")
    config_class, model_class = (get_class_from_dynamic_module(name, str(tmp_path)) for name in names)
    assert model_class.__module__.startswith("transformers_modules.")
    loaded = model_class.from_pretrained(tmp_path, config=config_class.from_pretrained(tmp_path))
    assert answer(loaded) == answer(model)
    loaded.save_pretrained(tmp_path / "again")
    assert answer(QFormerCaptioner.from_pretrained(tmp_path / "again")) == answer(model)


def test_images_and_other_widths_are_refused(folder):
    model = QFormerCaptioner.from_pretrained(folder / "captioner")
    model.load_vision_model()  # there is nothing to load
    with pytest.raises(ValueError, match="has no vision encoder for images: pass features of the width 7 as"):
        model.caption(tiny.picture())
    with pytest.raises(ValueError, match="The features have width 5, but this Q-Former accepts width 7"):
        model.generate(image_embeds=torch.zeros(1, 3, 5))


def test_rows_of_features_are_captioned_as_single_rows_are():
    model = tiny.captioner()
    rows = [torch.randn(length, tiny.VISION_WIDTH) for length in (7, 2, 4)]
    prompts = ["a green heart", "a star", "a red circle"]
    expected = []
    for row, prompt in zip(rows, prompts, strict=True):
        expected.append(model.caption(image_embeds=row.numpy(), prompt=prompt, max_new_tokens=4))
    assert model.caption(image_embeds=rows, prompt=prompts, max_new_tokens=4) == expected
    batch = model.processor(image_embeds=rows, text=prompts)
    assert batch["image_attention_mask"].sum(dim=1).tolist() == [7, 2, 4] and batch["image_embeds"].shape == (3, 7, 24)
    features = {name: batch[name] for name in ("image_embeds", "image_attention_mask")}
    assert model.caption(**features, prompt=prompts, max_new_tokens=4) == expected
    assert "image_attention_mask" not in model.processor(image_embeds=rows[:1])


def test_a_mask_of_the_features_of_an_image_reaches_the_model():
    """The features that it hides are those of the bottom of the image, so a caption may not depend on them."""
    model, mask = tiny.captioner(), torch.tensor([[1, 1, 0, 0, 0]])
    image = tiny.picture()
    inputs = model.processor(image, image_attention_mask=mask)
    features = model.encode_images(inputs["pixel_values"]).last_hidden_state[:, :2]
    torch.testing.assert_close(model(**inputs).logits, model(image_embeds=features).logits)
    with pytest.raises(ValueError, match=r"has the shape \[1, 4\], but the features need \[1, 5\]"):
        model.caption(image, image_attention_mask=mask[:, :4])
    video = torch.randn(2, 1, 4, tiny.VISION_WIDTH)  # of one frame each
    assert len(model.caption(image_embeds=video, max_new_tokens=2)) == 2
    assert model.caption(image_embeds=[]) == []
    with pytest.raises(ValueError, match="nothing to caption: pass `images`, or features"):
        model.caption()


def test_wrong_rows_of_features_are_named():
    processor = tiny.processor()
    for rows, message in {
        (torch.ones(3, 4), torch.ones(2, 5)): "row 0 has 4 numbers in each feature, and row 1 has 5",
        (torch.ones(3, 4), torch.ones(0, 4)): r"Row 1 of the features .* has the shape \[0, 4\]",
        (torch.ones(4),): r"has the shape \[4\], but must be \[N, D\]",
    }.items():
        with pytest.raises(ValueError, match=message):
            processor(image_embeds=list(rows))
    with pytest.raises(TypeError, match="Row 1 of the features .* is a 'str' that cannot be read as numbers"):
        processor(image_embeds=[torch.ones(3, 4), "protein.npy"])
    with pytest.raises(ValueError, match="There are no rows of features in `image_embeds`"):
        processor(image_embeds=[])
    with pytest.raises(ValueError, match="Pass either `images` or their features"):
        processor(tiny.picture(), image_embeds=[torch.ones(3, 4)])


def test_either_a_vision_encoder_or_a_width_is_needed(folder):
    for vision, width in ((None, None), ("org/vision", 7)):
        with pytest.raises(TypeError, match="Pass either a vision encoder as `vision`, or `vision=None` and `enc"):
            QFormerCaptioner.from_backbones(vision, folder / "llama", encoder_hidden_size=width)


def test_a_pretrained_qformer_gets_the_width_of_the_features(folder):
    qformer = QFormerModel(QFormerConfig(**tiny.QFORMER, encoder_hidden_size=24))
    model = QFormerCaptioner.from_backbones(None, folder / "llama", encoder_hidden_size=WIDTH, qformer=qformer)
    assert model.get_soft_prompt(**features()).shape == (3, tiny.QUERIES, tiny.TEXT_WIDTH)


def test_its_card_shows_how_to_caption_features(folder):
    facts = describe_folder(folder / "captioner")
    card = render_card({"model": "USER/proteins", **facts})
    assert "print(model.caption(image_embeds=features))" in card and "[N, 7]" in card
    assert [part["name"] for part in facts["parts"]] == ["language_model", "qformer", "language_projection"]
    assert not {"model.caption", "vision_model", "image-text-to-text", "image-captioning"} & set(card.split())


# --- Commands ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Return the store of 24 rows of different lengths, 4 of which are to evaluate on; one has no features."""
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    cells = [generator.normal(size=(generator.integers(1, 6), WIDTH)).tolist() for _ in range(24)]
    cells[21] = []
    with_embeddings(folder / "data", cells, splits=["train"] * 20 + ["dev"] * 4)
    words = {"dataset_name": folder / "data", "embeddings_column": "own", "output_dir": folder / "store"}
    precompute_features.precompute(command_line(**words))
    return folder / "store"


def command(output_dir, **more) -> list[str]:
    values = {
        "qformer_config": json.dumps(tiny.QFORMER),
        "output_dir": output_dir,
        "per_device_train_batch_size": 4,
        "num_train_epochs": 1,
        "generation_num_beams": 1,
        "generation_max_length": 6,
        "use_cpu": "true",
        "disable_tqdm": "true",
    } | more
    return command_line(**values)


@pytest.mark.slow
def test_training_evaluation_and_further_training_on_features_of_an_unknown_encoder(folder, store, tmp_path, capsys):
    train_hf.train(command(tmp_path / "run", features=store, language_model_name_or_path=folder / "llama"))
    skipped = (tmp_path / "run" / "skipped_rows.jsonl").read_text()
    assert "no features: The row has no embeddings." in skipped
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert any({"eval_loss", "eval_loss_shuffled", "eval_cider_shuffled"} <= entry.keys() for entry in history)
    card = (tmp_path / "run" / "README.md").read_text()
    assert "Captioner of features" in card and "| dev |" in card
    more = {"model_name_or_path": tmp_path / "run", "features": store, "qformer_config": None}
    train_hf.train(command(tmp_path / "more", **more))
    scores = {"model": tmp_path / "more", "features": store, "output_dir": tmp_path / "scores", "use_cpu": "true"}
    eval_captions.evaluate([*command_line(**scores), "--allow_missing", "--allow_empty"])
    captions = json.loads((tmp_path / "scores" / "captions.json").read_text())
    assert [caption["image_id"] for caption in captions] == [0, 2, 3]  # and not the row without features
    np.save(tmp_path / "row.npy", FeatureStore(store).split("dev")[2].numpy())
    caption.caption([str(tmp_path / "row.npy"), "--model", str(tmp_path / "more"), "--num_beams", "5"])
    text = next(each["caption"] for each in captions if each["image_id"] == 2)
    assert f"row.npy: {text}" in capsys.readouterr().out


def test_a_store_of_an_unknown_encoder_is_refused_for_a_vision_encoder(folder, store, tmp_path):
    vision = tiny.save_vision(tmp_path / "vision")
    backbones = {"language_model_name_or_path": folder / "llama", "vision_model_name_or_path": vision}
    with pytest.raises(InputError, match=r"do not say which encoder .* leave out --vision_model_name_or_path"):
        train_hf.train(command(tmp_path / "run", features=store, **backbones))


def test_features_are_refused_by_a_captioner_with_a_vision_encoder_of_its_own(store, tmp_path):
    tiny.captioner().save_pretrained(tmp_path / "own")
    words = {"model": tmp_path / "own", "features": store, "output_dir": tmp_path / "scores", "use_cpu": "true"}
    with pytest.raises(InputError, match="has a vision encoder of its own, which did not compute the features in"):
        eval_captions.evaluate(command_line(**words))


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((3, 5)), r"are float64 \[3, 5\], and the captioner reads numbers in an array \[N, 7\]"),
        (np.zeros((0, WIDTH)), r"are float64 \[0, 7\]"),
        (np.full((2, WIDTH), np.nan), "hold NaN or infinity"),
        (None, "cannot be read: EOF: reading magic string"),
    ],
)
def test_files_without_features_do_not_stop_the_others(folder, tmp_path, array, reason):
    model = QFormerCaptioner.from_pretrained(folder / "captioner")
    files = [str(tmp_path / name) for name in ("bad.npy", "good.npy", "picture.png", "long.npy")]
    if array is None:
        Path(files[0]).touch()
    else:
        np.save(files[0], array)
    np.save(files[1], features()["image_embeds"][1, :2])
    np.save(files[3], features()["image_embeds"][0])
    rows = dict(zip(files, caption_rows(model, files, **OPTIONS), strict=True))
    assert re.search(reason, rows[files[0]].error)
    assert re.search(r"no vision encoder for .*picture\.png': give features", rows[files[2]].error)
    expected = model.processor.batch_decode(answer(model), skip_special_tokens=True)
    assert [rows[files[3]].captions, rows[files[1]].captions] == [[text.strip()] for text in expected[:2]]
