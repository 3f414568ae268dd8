"""Q-Formers inside checkpoints of other models: `QFormerModel.from_pretrained` finds them by their tensors."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2QFormerConfig,
    Blip2QFormerModel,
    Granite4VisionConfig,
    Granite4VisionForConditionalGeneration,
    GraniteSpeechConfig,
    GraniteSpeechForConditionalGeneration,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipVideoConfig,
    InstructBlipVideoForConditionalGeneration,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.granite_speech.modeling_granite_speech import GraniteSpeechEncoderProjector

from qformer_captioner import QFormerConfig, QFormerModel
from qformer_captioner.common.errors import InputError
from qformer_captioner.hub.convert import load_qformer
from qformer_captioner.training.arguments import ModelArguments
from qformer_captioner.training.captioner_setup import qformer_options

from ..fixtures import tiny

WIDTH = 24  # of features
SIZES = dict(tiny.LAYERS, hidden_size=32, intermediate_size=40, encoder_hidden_size=WIDTH, vocab_size=50)
SIZES |= dict(num_hidden_layers=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
VISION = dict(tiny.LAYERS, hidden_size=WIDTH, intermediate_size=40, image_size=32, patch_size=16)
BLIPS = {
    "blip-2": (Blip2Config, Blip2ForConditionalGeneration),
    "instructblip": (InstructBlipConfig, InstructBlipForConditionalGeneration),
    "instructblipvideo": (InstructBlipVideoConfig, InstructBlipVideoForConditionalGeneration),
}
GRANITE = dict(tiny.LAYERS, model_type="granite", hidden_size=32, intermediate_size=32, num_key_value_heads=2)


def randomized(model: nn.Module) -> nn.Module:
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def granite_speech() -> GraniteSpeechForConditionalGeneration:
    encoder = dict(input_dim=8, num_layers=1, hidden_dim=WIDTH, num_heads=2, dim_head=12, context_size=8)
    config = GraniteSpeechConfig(
        text_config=dict(GRANITE, vocab_size=50),
        encoder_config=dict(encoder, max_pos_emb=8, output_dim=5),
        projector_config=dict(SIZES, model_type="blip_2_qformer"),
        window_size=6,
        downsample_rate=2,
        audio_token_index=3,
    )
    return randomized(GraniteSpeechForConditionalGeneration(config))


def features(length: int = 10) -> torch.Tensor:
    return torch.randn(2, length, WIDTH, generator=torch.Generator().manual_seed(1))


def assert_close(ours: QFormerModel, expected: torch.Tensor, **prompt: torch.Tensor) -> None:
    torch.testing.assert_close(ours(features(), **prompt).last_hidden_state, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("max_shard_size", ["1GB", "20KB"])
def test_the_projector_of_granite_speech(tmp_path, max_shard_size):
    model = granite_speech()
    model.save_pretrained(tmp_path / "part", max_shard_size=max_shard_size)
    ours = QFormerModel.from_pretrained(tmp_path, subfolder="part")
    (projector,) = (module for module in model.modules() if isinstance(module, GraniteSpeechEncoderProjector))
    assert (ours.config.num_query_tokens, ours.config.window_size) == (3, 6)
    torch.testing.assert_close(
        projector.linear(ours(features()).last_hidden_state), projector(features()), atol=1e-5, rtol=0
    )
    assert ours.dtype == torch.float32
    assert QFormerModel.from_pretrained(tmp_path / "part", dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", BLIPS)
def test_the_q_former_of_a_blip(tmp_path, kind):
    config_class, model_class = BLIPS[kind]
    text = tiny.text_config("opt", word_embed_proj_dim=tiny.TEXT_WIDTH)
    parts = dict(vision_config=VISION, qformer_config=SIZES, text_config=text, num_query_tokens=5)
    model = randomized(model_class(config_class(**parts)))
    model.save_pretrained(tmp_path)
    ours = QFormerModel.from_pretrained(tmp_path)
    queries, prompt = model.query_tokens.expand(2, -1, -1), {}
    if kind == "blip-2":
        expected = model.qformer(query_embeds=queries, encoder_hidden_states=features()).last_hidden_state
    else:
        prompt = {"input_ids": torch.tensor([[3, 4, 5], [6, 7, 8]])}
        mask = {"attention_mask": torch.ones(2, 8)}
        outputs = model.qformer(query_embeds=queries, encoder_hidden_states=features(), **prompt, **mask)
        expected = outputs.last_hidden_state[:, :5]
    assert_close(ours, expected, **prompt)
    assert torch.equal(load_qformer(tmp_path).query_tokens, ours.query_tokens)


def test_a_bare_q_former_gets_new_query_tokens(tmp_path):
    model = randomized(Blip2QFormerModel(Blip2QFormerConfig(**SIZES)))
    model.save_pretrained(tmp_path)
    ours, info = QFormerModel.from_pretrained(tmp_path, num_query_tokens=7, output_loading_info=True)
    assert set(info["missing_keys"]) == {"query_tokens"} and ours.query_tokens.std() > 0.01
    queries = ours.query_tokens.expand(2, -1, -1)
    assert queries.shape == (2, 7, 32)
    assert_close(ours, model(query_embeds=queries, encoder_hidden_states=features()).last_hidden_state)


def write_projector(folder, model: Blip2QFormerModel, query: torch.Tensor, config: dict) -> None:
    """Write a projector as SLAM-LLM names its parameters, in a folder of a model that transformers does not know."""
    weights = {f"encoder_projector.qformer.{name}": weight for name, weight in model.state_dict().items()}
    others = {"encoder_projector.query": query, "encoder_projector.linear.weight": torch.ones(9, 32)}
    save_file({**weights, **others, "query": torch.ones(1, 2, 32)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "slam", **config}))


def test_a_q_former_of_a_model_that_transformers_does_not_know(tmp_path):
    model, query = randomized(Blip2QFormerModel(Blip2QFormerConfig(**SIZES))), torch.randn(1, 6, 32)
    parts = {"projector": model.config.to_dict()}
    write_projector(tmp_path, model, query, {"model_config": parts})
    expected = model(query_embeds=query.expand(2, -1, -1), encoder_hidden_states=features()).last_hidden_state
    assert_close(QFormerModel.from_pretrained(tmp_path), expected)
    assert_close(load_qformer(tmp_path), expected)
    write_projector(tmp_path, model, query, {})
    with pytest.raises(OSError, match=r"has the weights of a Q-Former \('encoder_projector.qformer'\), but its config"):
        QFormerModel.from_pretrained(tmp_path)
    assert_close(QFormerModel.from_pretrained(tmp_path, config=QFormerConfig(**SIZES, num_query_tokens=6)), expected)


def test_one_of_several_q_formers_is_chosen_by_its_name(tmp_path):
    config = Granite4VisionConfig(
        text_config=dict(GRANITE, model_type="granite4_vision_text", vocab_size=50, num_hidden_layers=4),
        vision_config=dict(VISION, model_type="clip_vision_model", hidden_size=64, image_size=64),
        deepstack_layer_map=[[-1, 0], [-2, 1]],
        spatial_target_layers=[2, 3],
        downsample_rate="1/2",
        image_grid_pinpoints=[[64, 64]],
    )
    model = randomized(Granite4VisionForConditionalGeneration(config))
    model.save_pretrained(tmp_path)
    with pytest.raises(OSError, match="has [0-9]+ Q-Formers: choose one with `module_name`.*, out of 'model") as error:
        QFormerModel.from_pretrained(tmp_path)
    assert len(str(error.value)) < 500
    names = [name for name, module in model.named_modules() if isinstance(module, Blip2QFormerModel)]
    ours = QFormerModel.from_pretrained(tmp_path, module_name=names[1])
    theirs = model.get_submodule(names[1])
    assert torch.equal(ours.query_tokens, model.get_submodule(names[1].removesuffix(".qformer")).query)
    options = qformer_options(ModelArguments(qformer_name_or_path=str(tmp_path), qformer_module_name=names[1]))
    assert torch.equal(options["qformer"].query_tokens, ours.query_tokens)
    queries, wide = ours.query_tokens.expand(2, -1, -1), torch.randn(2, 4, 64)
    expected = theirs(query_embeds=queries, encoder_hidden_states=wide).last_hidden_state
    torch.testing.assert_close(ours(wide).last_hidden_state, expected, atol=1e-5, rtol=0)


def test_a_checkpoint_without_a_q_former_is_refused(tmp_path):
    tiny.save_vision(tmp_path)
    with pytest.raises(OSError, match="is a 'clip_vision_model' and has no Q-Former: give a BLIP-2"):
        QFormerModel.from_pretrained(tmp_path)
    with pytest.raises(InputError, match="is a 'clip_vision_model' and has no Q-Former: give a BLIP-2"):
        load_qformer(tmp_path)


def test_the_files_beside_a_captioner_load_its_q_former_and_others(tmp_path):
    captioner = tiny.captioner(num_query_tokens=3)
    captioner.save_pretrained(tmp_path / "captioner", include_backbones=True)
    granite_speech().save_pretrained(tmp_path / "granite")
    travelling = get_class_from_dynamic_module("modeling_qformer.QFormerModel", str(tmp_path / "captioner"))
    assert travelling is not QFormerModel
    own = travelling.from_pretrained(tmp_path / "captioner")
    assert torch.equal(own.query_tokens, captioner.qformer.query_tokens)
    expected = QFormerModel.from_pretrained(tmp_path / "granite")(features()).last_hidden_state
    assert torch.equal(travelling.from_pretrained(tmp_path / "granite")(features()).last_hidden_state, expected)
