"""Captioners without their vision encoder in memory, for training on precomputed features."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModel

from qformer_captioner import QFormerCaptioner, QFormerCaptionerConfig, precompute_features, train_hf
from qformer_captioner.common.errors import InputError

from ..fixtures import tiny
from ..fixtures.processes import command_line


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder with backbones, captioned pictures, and captioners that hold their backbones or keep them by reference."""
    folder = tmp_path_factory.mktemp("captioners")
    tiny.save_vision(folder / "vision")
    tiny.save_language(folder / "llama", max_position_embeddings=256)
    captioner = QFormerCaptioner.from_backbones(folder / "vision", folder / "llama", **tiny.QFORMER)
    torch.nn.init.normal_(captioner.language_projection.weight, std=0.2)  # so that the image matters
    captioner.save_pretrained(folder / "referring")
    captioner.save_pretrained(folder / "including", include_backbones=True)
    (folder / "pictures").mkdir()
    lines = []
    for row in range(20):
        tiny.picture(row).save(folder / "pictures" / f"{row}.png")
        entry = {"file_name": f"{row}.png", "caption": tiny.CAPTIONS[row % 3], "split": "train" if row < 16 else "dev"}
        lines.append(json.dumps(entry))
    (folder / "pictures" / "broken.png").write_bytes(b"no picture")
    lines.append(json.dumps({"file_name": "broken.png", "caption": tiny.CAPTIONS[0], "split": "dev"}))
    (folder / "pictures" / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def logits_of(model: QFormerCaptioner, **image) -> torch.Tensor:
    batch = {name: value for name, value in tiny.batch().items() if name != "pixel_values"}
    return model.eval()(**image, **batch).logits


@pytest.mark.parametrize("form", ["referring", "including"])
def test_features_give_the_logits_of_their_images(folder, form):
    whole = QFormerCaptioner.from_pretrained(folder / form)
    without = QFormerCaptioner.from_pretrained(folder / form, load_vision_model=False)
    features = whole.encode_images(tiny.images()).last_hidden_state
    assert torch.equal(logits_of(without, image_embeds=features), logits_of(whole, pixel_values=tiny.images()))


def test_it_has_no_weights_of_the_vision_encoder(folder):
    without = QFormerCaptioner.from_pretrained(folder / "including", load_vision_model=False)
    assert sum(parameter.numel() for parameter in without.vision_model.parameters()) == 0


def test_images_are_refused_with_a_remedy(folder):
    without = QFormerCaptioner.from_pretrained(folder / "referring", load_vision_model=False)
    with pytest.raises(ValueError, match=r"without its vision encoder .* `load_vision_model\(\)`"):
        without.caption(tiny.picture())


def test_the_vision_encoder_can_be_fetched_later(folder):
    whole = QFormerCaptioner.from_pretrained(folder / "referring")
    without = QFormerCaptioner.from_pretrained(folder / "referring", load_vision_model=False)
    without.load_vision_model()
    assert without.caption(tiny.picture()) == whole.caption(tiny.picture())
    assert not any(parameter.requires_grad for parameter in without.vision_model.parameters())


@pytest.mark.parametrize("included", [True, False, ["vision_model"]])
def test_it_saves_a_whole_captioner(folder, tmp_path, included):
    whole = QFormerCaptioner.from_pretrained(folder / "referring")
    without = QFormerCaptioner.from_pretrained(folder / "referring", load_vision_model=False)
    without.save_pretrained(tmp_path, include_backbones=included)
    loaded = QFormerCaptioner.from_pretrained(tmp_path)
    expected = logits_of(whole, pixel_values=tiny.images())
    assert torch.equal(logits_of(loaded, pixel_values=tiny.images()), expected)


def test_a_vision_encoder_that_cannot_be_fetched_cannot_be_left_out(tmp_path):
    tiny.captioner().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has its own vision encoder and cannot be loaded without it"):
        QFormerCaptioner.from_pretrained(tmp_path, load_vision_model=False)


# --- train_hf.py --features -------------------------------------------------------------------------------------------


def command(folder, output_dir, **more) -> list[str]:
    values = {
        "language_model_name_or_path": folder / "llama",
        "vision_model_name_or_path": folder / "vision",
        "qformer_config": json.dumps(tiny.QFORMER),
        "dataset_name": folder / "pictures",
        "output_dir": output_dir,
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "logging_steps": 1,
        "generation_num_beams": 1,
        "generation_max_length": 6,
        "max_skipped": 1,
        "use_cpu": "true",
        "disable_tqdm": "true",
    } | more
    return command_line(**values)


def precompute(folder, output_dir, **more) -> None:
    values = {"vision_model_name_or_path": folder / "vision", "dataset_name": folder / "pictures"} | more
    precompute_features.precompute(command_line(**values, output_dir=output_dir, max_skipped=1))


def losses(output_dir) -> torch.Tensor:
    history = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    names = ("loss", "eval_loss", "eval_loss_shuffled", "eval_cider")
    return torch.tensor([entry[name] for entry in history for name in names if name in entry])


@pytest.fixture(scope="module")
def features(folder):
    """Folder of the features of all pictures."""
    precompute(folder, folder / "features")
    return folder / "features"


TRAINED_ALREADY = {"vision_model_name_or_path": None, "language_model_name_or_path": None, "qformer_config": None}


@pytest.fixture(scope="module")
def run_on_images(folder):
    """Output folder of a run that reads the pictures."""
    own = TRAINED_ALREADY | {"model_name_or_path": folder / "referring"}
    train_hf.train(command(folder, folder / "images", **own))
    return folder / "images"


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float16", 1e-3)])
def test_a_run_on_features_has_the_losses_of_a_run_on_images(folder, run_on_images, tmp_path, dtype, tolerance):
    precompute(folder, tmp_path / "features", dtype=dtype)
    own = TRAINED_ALREADY | {"model_name_or_path": folder / "referring", "dataset_name": None}  # the features name it
    train_hf.train(command(folder, tmp_path / "run", features=tmp_path / "features", **own))
    expected, found = losses(run_on_images), losses(tmp_path / "run")
    assert len(found) > 10
    assert (expected[-3] - expected[-2]).abs() > 0.01, "which image it is must matter"
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    assert (tmp_path / "run" / "captions.png").exists()
    assert "broken.png" in (tmp_path / "run" / "skipped_rows.jsonl").read_text()
    for run in (run_on_images, tmp_path / "run"):  # the backbones are local folders, so all of them are in it
        assert isinstance(QFormerCaptioner.from_pretrained(run).caption(tiny.picture()), str)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [{}, {"lora_r": 2}])
def test_training_on_features_never_loads_the_vision_encoder(folder, features, tmp_path, monkeypatch, lora):
    monkeypatch.setattr(AutoModel, "from_pretrained", lambda *args, **kwargs: pytest.fail("it was loaded"))
    own = {"include_backbones": "false", "num_train_epochs": 1, **lora}
    train_hf.train(command(folder, tmp_path / "run", features=features, **own))
    assert (tmp_path / "run" / "run.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"random_resized_crop_scale": 0.5},
            "--random_resized_crop_scale and --horizontal_flip_prob change images, which --features replaces",
        ),
        ({"freeze_vision_model": "false"}, "--features replaces the vision encoder, which then cannot be trained"),
        ({"eval_split": "train", "vision_model_name_or_path": "{folder}/other"}, "not of"),
        ({"train_split": "validation"}, "no split 'validation'"),
        ({"dataset_name": "{folder}/reversed"}, "belong to other images, or to another order, from row 0 on"),
        ({"eval_dataset_name": "{folder}/pictures"}, "--features works with one data set"),
    ],
)
def test_options_that_contradict_features_are_named(folder, features, tmp_path, options, message):
    tiny.save_vision(folder / "other", "vit")
    if not (folder / "reversed").exists():
        shutil.copytree(folder / "pictures", folder / "reversed")
        lines = (folder / "pictures" / "metadata.jsonl").read_text().splitlines()
        (folder / "reversed" / "metadata.jsonl").write_text("\n".join(reversed(lines)))
    options = {name: str(value).format(folder=folder) for name, value in options.items()}
    with pytest.raises(InputError, match=message):
        train_hf.train(command(folder, tmp_path / "run", features=features, **options))


@pytest.mark.slow
def test_a_data_set_that_has_moved_keeps_its_features(folder, features, tmp_path):
    shutil.copytree(folder / "pictures", tmp_path / "moved")
    own = {"dataset_name": tmp_path / "moved", "num_train_epochs": 1}
    train_hf.train(command(folder, tmp_path / "run", features=features, **own))
    assert (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.slow
def test_a_new_captioner_takes_the_vision_encoder_of_the_features(folder, features, tmp_path):
    own = {"vision_model_name_or_path": None, "num_train_epochs": 1}
    train_hf.train(command(folder, tmp_path / "run", features=features, **own))
    assert isinstance(QFormerCaptioner.from_pretrained(tmp_path / "run").caption(tiny.picture()), str)


# --- Checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_checkpoint_holds_trainable_parts_and_loads_alone(folder, tmp_path):
    train_hf.train(command(folder, tmp_path / "run", num_train_epochs=1, include_backbones="false"))
    checkpoint = tmp_path / "run" / "checkpoint-4"
    with safe_open(checkpoint / "model.safetensors", framework="pt") as file:
        assert {name.split(".")[0] for name in file.keys()} == {"qformer", "language_projection"}  # noqa: SIM118
    assert isinstance(QFormerCaptioner.from_pretrained(checkpoint).caption(tiny.picture()), str)


def test_a_checkpoint_of_clip_and_llama_3b_is_under_2_percent_of_the_whole():
    """Count bytes of the recipe's shapes, with backbones in bfloat16 and trainable parts in float32."""
    args = train_hf.parse_options(["--recipe", "clip_llama"])[0]
    llama = dict(hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24)
    llama |= dict(num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=True, model_type="llama")
    clip = {"model_type": "clip_vision_model", "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
    clip |= {"num_attention_heads": 12, "patch_size": 32, "image_size": 224}
    dtypes = {"vision_model": "bfloat16", "language_model": "bfloat16"}
    dtypes |= {"qformer": "float32", "language_projection": "float32"}
    config = QFormerCaptionerConfig(
        vision_config=clip, text_config=llama, qformer_config=json.loads(args.qformer_config), dtypes=dtypes
    )
    with torch.device("meta"):
        model = QFormerCaptioner(config)
    sizes = {
        name: sum(parameter.numel() * parameter.element_size() for parameter in part.parameters())
        for name, part in model.named_children()
    }
    assert sizes["language_model"] > 6.4e9
    assert sizes["qformer"] + sizes["language_projection"] < 0.02 * sum(sizes.values())
