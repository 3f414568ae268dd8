"""Hidden states and attention weights of the three models in the output of a captioner."""

import pytest
import torch

from ..fixtures import tiny
from ..fixtures.batches import NEAR, labels_of_several_captions, single_row

FIELDS = ("vision_outputs", "qformer_outputs", "language_model_outputs")
ASKED = dict(output_hidden_states=True, output_attentions=True)


@pytest.fixture(scope="module", params=["llama", "t5", "bart", "gpt2"])
def model(request):
    """Captioner whose parts compute attention weights, which needs eager attention."""
    model = tiny.captioner(language=request.param)
    model.set_attn_implementation("eager")
    return model


def by_hand(model, row: dict):
    """Return the output of the language model's own `forward` for one image."""
    prefix = torch.cat([model.get_soft_prompt(row["pixel_values"]), model.get_input_embeddings()(row["input_ids"])], 1)
    if model.config.is_encoder_decoder:
        return model.language_model(inputs_embeds=prefix, labels=row["labels"], **ASKED)
    embedded = model.get_input_embeddings()(row["labels"][:, :-1])
    return model.language_model(inputs_embeds=torch.cat([prefix, embedded], 1), **ASKED)


def test_outputs_are_those_of_the_three_models(model):
    row = single_row(tiny.batch(), 0)
    output, plain = model(**row, **ASKED), model(**row)
    torch.testing.assert_close(output.loss, plain.loss)
    expected = {
        "vision_outputs": model.vision_model(row["pixel_values"], **ASKED),
        "language_model_outputs": by_hand(model, row),
    }
    features = expected["vision_outputs"].last_hidden_state
    expected["qformer_outputs"] = model.qformer(features, **ASKED)
    for field in FIELDS:
        for name in expected[field]:
            if name.endswith(("hidden_states", "attentions")):
                torch.testing.assert_close(output[field][name], expected[field][name], msg=f"{field}.{name}", **NEAR)
    kinds = ["decoder_", "encoder_"] if model.config.is_encoder_decoder else [""]
    assert all(len(output.language_model_outputs[f"{kind}attentions"]) == 2 for kind in kinds)
    assert len(output.qformer_outputs.cross_attentions) == 1


def test_each_of_several_captions_has_a_row(model):
    batch, labels = tiny.batch(), labels_of_several_captions()
    together = model(**{**batch, "labels": labels}, **ASKED)
    torch.testing.assert_close(together.loss, model(**{**batch, "labels": labels}).loss, **NEAR)
    alone = model(**{**batch, "labels": labels[:, 1]}, **ASKED)
    name = "decoder_hidden_states" if model.config.is_encoder_decoder else "hidden_states"
    states, expected = together.language_model_outputs[name][-1], alone.language_model_outputs[name][-1]
    assert states.shape[0] == 12
    length = int((labels[0, 1] != -100).sum())
    last = slice(states.shape[1] - 5 + (model.config.is_encoder_decoder is False), None)
    torch.testing.assert_close(states[1, last][: length - 1], expected[0, last][: length - 1], **NEAR)


def test_they_are_absent_unless_asked_for(model):
    batch = tiny.batch()
    assert not set(FIELDS) & set(model(**batch))
    assert model(**batch, output_hidden_states=True).vision_outputs.get("attentions") is None
    model.config.output_hidden_states = True
    try:
        assert set(FIELDS) <= set(model(**batch))
        assert not set(FIELDS) & set(model(**batch, output_hidden_states=False))
    finally:
        model.config.output_hidden_states = False


def test_tuples_begin_with_loss_and_logits_and_hold_them_as_tuples(model):
    loss, logits, losses, soft_prompt, *parts = model(**tiny.batch(), **ASKED, return_dict=False)
    assert (loss.dim(), logits.dim(), losses.dim(), soft_prompt.dim()) == (0, 3, 1, 3)
    assert [type(part) for part in parts] == [tuple] * 3


def test_image_features_have_no_vision_outputs(model):
    batch = tiny.batch()
    features = model.encode_images(batch.pop("pixel_values")).last_hidden_state
    output = model(**batch, image_embeds=features, **ASKED)
    assert output.vision_outputs is None and output.qformer_outputs is not None
