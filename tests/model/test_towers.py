"""Vision encoders of transformers, of every kind, as parts of a captioner."""

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    DetrImageProcessorPil,
    Idefics3ImageProcessorPil,
    PixtralImageProcessorPil,
    Siglip2ImageProcessorPil,
    VideoMAEImageProcessorPil,
)

from qformer_captioner import QFormerCaptioner, QFormerCaptionerConfig, QFormerCaptionerProcessor
from qformer_captioner.backbones_qformer import load_backbone
from qformer_captioner.data.collator import CaptionCollator
from qformer_captioner.encoders_qformer import EncoderError, run_encoder
from qformer_captioner.inputs_qformer import timm_image_processor
from qformer_captioner.training.from_scratch import build_from_scratch
from qformer_captioner.vision_qformer import split_vision_inputs

from ..fixtures import tiny
from ..fixtures.towers import TOWERS, images_for, tiny_model_of_images_and_text, tower
from .test_prefix import OTHERS, other_text_config

NEAR = dict(rtol=1e-4, atol=1e-5)


# Each vision encoder is tested with another language model, so that all models of both kinds are tested.
PAIRS = list(zip(TOWERS, itertools.cycle([*tiny.TEXT, *OTHERS]), strict=False))


def captioner(name: str, language: str = "llama") -> QFormerCaptioner:
    vision_model = tower(name)
    config = QFormerCaptionerConfig(
        vision_config=vision_model.config,
        text_config=tiny.text_config(language) if language in tiny.TEXT else other_text_config(language),
        qformer_config=tiny.QFORMER,
    )
    torch.manual_seed(0)
    model = QFormerCaptioner(config, vision_model=vision_model).eval()
    torch.nn.init.normal_(model.language_projection.weight, std=0.2)
    return model


def test_all_models_are_in_the_table():
    assert len(TOWERS) >= 45 and len({language for _, language in PAIRS}) == len(tiny.TEXT) + len(OTHERS) >= 60


@pytest.mark.parametrize(("name", "language"), PAIRS, ids=map("-".join, PAIRS))
def test_a_pair_serves(name, language, tmp_path):
    """Captions of an image equal rows, a batch equals single images, saved equals loaded, and the Q-Former learns."""
    model = captioner(name, language)
    images = images_for(model.vision_model)
    labels = torch.randint(3, tiny.WORDS, (3, 2, 4), generator=torch.Generator().manual_seed(2))
    output = model(**images, labels=labels)
    output.loss.backward()
    assert model.qformer.query_tokens.grad.abs().max() > 0
    with torch.no_grad():
        rows = {name: value.repeat_interleave(2, dim=0) for name, value in images.items()}
        torch.testing.assert_close(model(**rows, labels=labels.flatten(0, 1)).loss, output.loss, **NEAR)
        for row in (1, 2):
            image = {name: value[row : row + 1] for name, value in images.items()}
            single = model(**image, labels=labels[row : row + 1])
            torch.testing.assert_close(single.losses, output.losses[row : row + 1], **NEAR)
        assert (output.soft_prompt[0] - output.soft_prompt[1]).abs().max() > 1e-3  # the image matters
        model.save_pretrained(tmp_path)
        loaded = QFormerCaptioner.from_pretrained(tmp_path)
        torch.testing.assert_close(loaded(**images, labels=labels).losses, output.losses, **NEAR)


REFUSED = {  # and the reason
    "hgnet_v2": "it returns no sequence of features",
    "maskformer": "it returns no sequence of features",
    "mgp-str": "it returns no sequence of features",
    "lightglue": "it cannot encode an image",
    "minicpm_ocr_vision": "it cannot encode an image",
    "oneformer": "it needs `task_inputs` beside images",
    "qwen2_5_vl_vision": "it needs `grid_thw` beside images",
    "seggpt": "it needs `prompt_pixel_values` beside images",
    **dict.fromkeys(("idefics2_vision", "pp_chart2table_vision"), "transformers has no class for it alone"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_encoder_that_cannot_serve_is_refused_by_name(name):
    with pytest.raises(EncoderError) as caught:
        QFormerCaptionerConfig(vision_config=AutoConfig.for_model(name))
    assert f"{name!r} cannot be the vision encoder of a captioner: {REFUSED[name]}" in str(caught.value)
    assert len(str(caught.value)) <= 500


@pytest.mark.parametrize("part", ["vision_config", "text_config"])
def test_an_unknown_type_of_model_is_named(part):
    with pytest.raises(ValueError, match=rf"no model of the type 'convnet' \(`{part}`\): did you mean 'convnext'\?"):
        QFormerCaptionerConfig(**{part: {"model_type": "convnet"}})


# --- Other sizes, dtypes and modes ------------------------------------------------------------------------------------

KINDS = ["vit", "swin", "convnext", "resnet", "sam_vision_model", "sam2_vision_model", "pixtral", "videomae"]


@pytest.mark.parametrize("name", KINDS)
def test_features_are_a_sequence_in_the_dtype_of_the_encoder(name):
    model = captioner(name)
    images = images_for(model.vision_model)
    expected = model.encode_images(**images).last_hidden_state
    assert expected.shape[::2] == (3, model.config.qformer_config.encoder_hidden_size)
    model.vision_model.bfloat16()
    features = model.encode_images(**images).last_hidden_state
    assert features.dtype == torch.bfloat16 and features.shape == expected.shape
    assert (features.float() - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("name", KINDS)
def test_an_unfrozen_encoder_learns_with_checkpointed_activations(name):
    model = captioner(name)
    batch = dict(images_for(model.vision_model), labels=torch.full((3, 2), 5))
    model(**batch).loss.backward()
    gradients = {
        key: weight.grad.clone() for key, weight in model.vision_model.named_parameters() if weight.grad is not None
    }
    assert len(gradients) > 5 and max(gradient.abs().max() for gradient in gradients.values()) > 0
    model.zero_grad()
    model.activation_checkpointing_enable()
    model(**batch).loss.backward()
    for key, gradient in gradients.items():
        torch.testing.assert_close(model.vision_model.get_parameter(key).grad, gradient, msg=key)


@pytest.mark.parametrize("name", ["vit", "swin", "convnext", "resnet", "sam_vision_model", "siglip2_vision_model"])
def test_hidden_states_are_those_of_the_encoder(name):
    model = captioner(name)
    images = images_for(model.vision_model)
    outputs = model.get_image_features(**images, output_hidden_states=True)
    expected = model.vision_model(**images, output_hidden_states=True)
    assert len(outputs.hidden_states) == len(expected.hidden_states)
    for states, expected_states in zip(outputs.hidden_states, expected.hidden_states, strict=True):
        assert torch.equal(states, expected_states)
    assert torch.equal(model.get_soft_prompt(**images), outputs.pooler_output)


@pytest.mark.parametrize(
    ("name", "size", "map_of", "shape"),
    [
        ("resnet", (128, 64), lambda features: features.permute(0, 2, 3, 1), (2, 16, 8, 16)),
        ("sam2_vision_model", (64, 128), lambda features: features, (2, 8, 16, 16)),
    ],
)
def test_a_feature_map_is_read_row_by_row(name, size, map_of, shape):
    """Here a side of the map is as long as its features are wide."""
    vision_model = tower(name)
    features, mask, output = run_encoder(vision_model, torch.randn(2, 3, *size))
    feature_map = map_of(output.last_hidden_state)  # [B, H, W, Dv]
    assert feature_map.shape == shape
    assert mask is None and feature_map.ndim == 4
    assert torch.equal(features, torch.cat(list(feature_map.unbind(1)), dim=1))


@pytest.mark.parametrize("name", ["vit", "dinov2"])
def test_position_embeddings_are_interpolated(name):
    """DINOv2 does so without being asked."""
    model = captioner(name)
    images = dict(pixel_values=torch.randn(1, 3, 48, 32), interpolate_pos_encoding=True)
    expected = model.vision_model(
        images["pixel_values"], **{key: True for key in images if key != "pixel_values" and name == "vit"}
    ).last_hidden_state
    output = model(**images, labels=torch.full((1, 2), 5))
    torch.testing.assert_close(output.soft_prompt, model.get_soft_prompt(image_embeds=expected))
    assert model.generate(**images, max_new_tokens=2).shape == (1, 2)


def test_vit_mae_keeps_all_patches_in_their_order():
    """A ViT with the same weights gives the same features."""
    mae, vit = tower("vit_mae"), tower("vit")
    vit.load_state_dict(mae.state_dict(), strict=False)
    images = images_for(vit)["pixel_values"]
    state = torch.get_rng_state()
    features, _, _ = run_encoder(mae, images)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(features, vit(images).last_hidden_state)


def test_an_image_is_a_video_that_stands_still():
    model = captioner("videomae")
    images = images_for(model.vision_model)["pixel_values"]
    video = images[:, None].expand(-1, 2, -1, -1, -1)
    assert torch.equal(model.get_soft_prompt(images), model.get_soft_prompt(video))
    with pytest.raises(ValueError, match="'videomae' reads videos of 2 frames, and not of 3: give it that many"):
        model.get_soft_prompt(images[:, None].expand(-1, 3, -1, -1, -1))


def test_a_captioner_from_scratch_may_have_an_encoder_of_any_image_size():
    vision = dict(model_type="resnet", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    text = dict(model_type="llama", hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    model = build_from_scratch(vision, text, tiny.QFORMER, tiny.CAPTIONS * 2)
    assert model.processor(tiny.picture()).pixel_values.shape == (1, 3, 224, 224)
    assert isinstance(model.caption(tiny.picture(), max_new_tokens=3), str)


# --- Image processors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "image_processor", "number"),
    [
        ("pixtral", PixtralImageProcessorPil(patch_size=8, size={"longest_edge": 32}), [8, 16]),
        ("siglip2_vision_model", Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16), [15, 16]),
        ("videomae", VideoMAEImageProcessorPil(size={"shortest_edge": 32}, crop_size=dict(height=32, width=32)), None),
    ],
)
def test_images_of_different_shapes_are_captioned_and_trained_on(name, image_processor, number):
    """A batch gives the captions and losses of single images."""
    model = captioner(name)
    model.processor = QFormerCaptionerProcessor(image_processor, tiny.tokenizer())
    pictures = [tiny.picture(0, size=(32, 16)), tiny.picture(1, size=(30, 31))]
    captions = model.caption(pictures, max_new_tokens=5)
    assert captions == [model.caption(picture, max_new_tokens=5) for picture in pictures]
    rows = [{"image": picture, "captions": ["a green heart"]} for picture in pictures]
    collate = CaptionCollator(model.processor)
    batch = collate(rows)
    losses = torch.cat([model(**collate([row])).losses for row in rows])
    torch.testing.assert_close(model(**batch).losses, losses, **NEAR)
    mask = model.encode_images(**split_vision_inputs(batch)[0], pixel_values=batch["pixel_values"]).attention_mask
    assert number == (None if mask is None else mask.sum(dim=1).tolist())


def test_inputs_that_an_encoder_does_not_read_are_named():
    model = captioner("vit")
    with pytest.raises(
        ValueError, match="A vision encoder of the type 'vit' does not read `image_sizes`, which an image"
    ):
        model(**images_for(captioner("pixtral").vision_model))
    detr = DetrImageProcessorPil(size=dict(shortest_edge=32, longest_edge=64))
    model.processor = QFormerCaptionerProcessor(detr, tiny.tokenizer())
    with pytest.raises(ValueError, match="does not read `pixel_mask`, which an image processor returns for images of"):
        model.caption([tiny.picture(size=(64, 32)), tiny.picture(size=(32, 64))])
    assert len(model.caption([tiny.picture(size=(32, 32))] * 2)) == 2  # of one size, the mask is full
    processor = QFormerCaptionerProcessor(Idefics3ImageProcessorPil(), tiny.tokenizer())
    with pytest.raises(ValueError, match="A Idefics3ImageProcessorPil makes 1 rows of 2 images, because it cuts them"):
        processor([tiny.picture(), tiny.picture(1)])


def test_images_are_prepared_as_timm_prepares_them():
    """It resizes the shorter side to the size of the crop divided by `crop_pct`."""
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    settings = dict(input_size=[3, 28, 28], crop_pct=0.875, interpolation="bicubic", mean=mean, std=std)
    picture = tiny.picture(size=(64, 40))
    resized = picture.resize((51, 32), Image.Resampling.BICUBIC).crop((11, 2, 39, 30))
    expected = (torch.from_numpy(np.array(resized)) / 255 - torch.tensor(mean)) / torch.tensor(std)
    pixel_values = timm_image_processor(settings)(picture, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixel_values[0], expected.permute(2, 0, 1), rtol=1e-4, atol=1e-4)


def test_a_timm_model_serves(tmp_path):
    timm = pytest.importorskip("timm", reason="needs timm, which needs torchvision", exc_type=ImportError)
    timm.models.save_for_hf(timm.create_model("resnet10t"), tmp_path / "vision", safe_serialization=True)
    tiny.save_language(tmp_path / "language", max_position_embeddings=256)
    model = QFormerCaptioner.from_backbones(tmp_path / "vision", tmp_path / "language", **tiny.QFORMER)
    model.save_pretrained(tmp_path / "captioner", include_backbones=True)
    loaded = QFormerCaptioner.from_pretrained(tmp_path / "captioner")
    pictures = [tiny.picture(), tiny.picture(1)]
    assert loaded.caption(pictures, max_new_tokens=4) == model.caption(pictures, max_new_tokens=4)
    features = model.encode_images(torch.randn(2, 3, 176, 176)).last_hidden_state
    assert features.shape == (2, 36, 512)


# --- Weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "part"),
    [
        *(("clip", "vision_model"), ("blip", "vision_model"), ("aimv2", "vision_model"), ("xclip", "vision_model")),
        *(
            ("kosmos-2", "vision_model"),
            ("git", "image_encoder"),
            ("llava", "vision_tower"),
            ("mistral3", "vision_tower"),
        ),
        ("vision-text-dual-encoder", "vision_model"),
    ],
)
def test_the_vision_encoder_in_a_larger_model_has_its_weights(model_type, part, tmp_path):
    whole = tiny_model_of_images_and_text(model_type)
    whole.save_pretrained(tmp_path)
    tower = load_backbone("vision_model", str(tmp_path))
    expected = whole.get_submodule(part).state_dict()
    assert len(expected) > 10
    for name, weight in tower.state_dict().items():
        assert torch.equal(weight, expected[name]), name


def test_a_checkpoint_without_the_weights_of_the_encoder_is_refused(tmp_path):
    tiny_model_of_images_and_text("clip").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    renamed = {name.replace("vision_model.", "eyes.part_"): weight for name, weight in weights.items()}
    save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(OSError, match="it has no weights of the vision encoder 'clip_vision_model' under the names"):
        load_backbone("vision_model", str(tmp_path))


FRESH_PROCESS = """
import sys
sys.modules["qformer_captioner"] = None  # hides an installed package
import json, torch
from transformers import AutoModel

losses = {}
for name in sys.argv[1:]:
    model = AutoModel.from_pretrained(name, trust_remote_code=True)
    losses[name] = model(**torch.load(f"{name}.pt")).losses.tolist()
print(json.dumps(losses))
"""


@pytest.mark.slow
def test_captioners_open_in_a_process_without_the_package(tmp_path):
    expected = {}
    for name in ("convnext", "pixtral", "siglip2_vision_model", "vit_mae", "xclip_vision_model", "sam_vision_model"):
        model = captioner(name)
        model.save_pretrained(tmp_path / name)
        batch = dict(images_for(model.vision_model), labels=torch.full((3, 2), 5))
        torch.save(batch, tmp_path / f"{name}.pt")
        expected[name] = model(**batch).losses.tolist()
    command = [sys.executable, "-c", FRESH_PROCESS, *expected]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    losses = json.loads(done.stdout.splitlines()[-1])
    assert losses.keys() == expected.keys()
    for name in expected:
        assert losses[name] == pytest.approx(expected[name], rel=1e-5), name
