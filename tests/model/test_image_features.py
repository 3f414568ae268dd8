"""Features of images, in the form of transformers' `get_image_features`."""

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..fixtures import tiny


def test_image_features_are_those_of_the_encoder_and_the_soft_prompt():
    model, pixel_values = tiny.captioner(), tiny.images()
    features = model.get_image_features(pixel_values)
    assert isinstance(features, BaseModelOutputWithPooling)
    assert torch.equal(features.last_hidden_state, model.vision_model(pixel_values).last_hidden_state)
    assert torch.equal(features.pooler_output, model.get_soft_prompt(pixel_values))


def test_a_prompt_for_the_qformer_changes_the_soft_prompt():
    model, pixel_values = tiny.captioner(use_qformer_text_input=True, vocab_size=50), tiny.images()
    prompt = torch.tensor([[3, 4]]).expand(3, -1)
    features = model.get_image_features(pixel_values, qformer_input_ids=prompt)
    assert torch.equal(features.pooler_output, model.get_soft_prompt(pixel_values, qformer_input_ids=prompt))
    assert not torch.allclose(features.pooler_output, model.get_soft_prompt(pixel_values))


def test_image_features_come_as_a_tuple_where_that_is_asked_for():
    model = tiny.captioner()
    features = model.get_image_features(tiny.images(), return_dict=False)
    assert isinstance(features, tuple)
    assert torch.equal(features[0], model.encode_images(tiny.images()).last_hidden_state)


@pytest.mark.parametrize("name", ["hidden_states", "attentions"])
def test_image_features_hold_the_states_that_were_asked_for(name):
    model = tiny.captioner()
    model.set_attn_implementation("eager")
    features = model.get_image_features(tiny.images(), **{f"output_{name}": True})
    expected = model.vision_model(tiny.images(), **{f"output_{name}": True})[name]
    assert all(map(torch.equal, features[name], expected))
    assert len(features[name]) == len(expected) > 0
    assert len(features.qformer_outputs[name]) > 0
    assert name not in model.get_image_features(tiny.images())


@pytest.mark.parametrize("part", ["config", "vision_config", "qformer_config"])
def test_outputs_as_tuples_in_the_configuration_do_not_change_captions(part):
    model = tiny.captioner()
    expected = model.generate(tiny.images(), max_new_tokens=3)
    (model.config if part == "config" else getattr(model.config, part)).return_dict = False
    assert torch.equal(model.generate(tiny.images(), max_new_tokens=3), expected)
