"""The Q-Former alone. Each test states one property."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from qformer_captioner import QFormerConfig, QFormerModel

from ..fixtures import tiny

WIDTH, LENGTH = tiny.VISION_WIDTH, 7


def make_qformer(**fields) -> QFormerModel:
    torch.manual_seed(0)
    fields = tiny.QFORMER | {"encoder_hidden_size": WIDTH} | fields
    return QFormerModel(QFormerConfig(**fields)).eval()


def features(number: int = 2, width: int = WIDTH) -> torch.Tensor:
    return torch.randn(number, LENGTH, width, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("frequency, depth", [(1, 1), (1, 3), (2, 2), (2, 5), (3, 4)])
def test_equals_blip2_in_outputs_and_gradients(frequency, depth):
    """Parameters have the same names on both sides. The queries are an input of transformers' Q-Former."""
    ours = make_qformer(cross_attention_frequency=frequency, num_hidden_layers=depth)
    sizes = dict(cross_attention_frequency=frequency, num_hidden_layers=depth, encoder_hidden_size=WIDTH)
    sizes = {name: value for name, value in (tiny.QFORMER | sizes).items() if name != "num_query_tokens"}
    theirs = Blip2QFormerModel(Blip2QFormerConfig(**sizes)).eval()
    weights = ours.state_dict()
    queries = weights.pop("query_tokens")
    theirs.load_state_dict(weights, strict=True)
    queries.requires_grad_(True)

    image = features()
    actual = ours(image, output_hidden_states=True)
    reference = theirs(query_embeds=queries.expand(2, -1, -1), encoder_hidden_states=image, output_hidden_states=True)
    assert len(actual.hidden_states) == len(reference.hidden_states) == depth + 1
    torch.testing.assert_close(actual.last_hidden_state, reference.last_hidden_state)
    torch.testing.assert_close(actual.pooler_output, reference.pooler_output)
    torch.testing.assert_close(actual.hidden_states, reference.hidden_states)

    direction = torch.randn_like(actual.last_hidden_state)
    (actual.last_hidden_state * direction).sum().backward()
    (reference.last_hidden_state * direction).sum().backward()
    torch.testing.assert_close(ours.query_tokens.grad, queries.grad)
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name).grad, parameter.grad, msg=name)


@pytest.mark.parametrize("frequency, expected", [(1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (3, [0, 3]), (9, [0])])
def test_every_nth_layer_from_the_first_has_cross_attention(frequency, expected):
    layers = make_qformer(cross_attention_frequency=frequency, num_hidden_layers=5).encoder.layer
    assert [index for index, layer in enumerate(layers) if hasattr(layer, "crossattention")] == expected


@pytest.mark.parametrize("masked", [False, True])
def test_eager_attention_equals_sdpa(masked):
    model = make_qformer()
    mask = torch.tensor([[1] * LENGTH, [1] * 4 + [0] * (LENGTH - 4)]) if masked else None
    assert model.config._attn_implementation == "sdpa"
    sdpa = model(features(), mask).last_hidden_state
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(features(), mask).last_hidden_state, sdpa)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.long, torch.bool])
def test_masked_image_features_are_as_if_absent(attention, dtype):
    model = make_qformer()
    model.set_attn_implementation(attention)
    image = features()
    mask = torch.tensor([[1] * LENGTH, [1] * 4 + [0] * (LENGTH - 4)], dtype=dtype)
    masked = model(image, mask).last_hidden_state
    torch.testing.assert_close(masked[0], model(image).last_hidden_state[0])
    torch.testing.assert_close(masked[1], model(image[:, :4]).last_hidden_state[1])
    assert not torch.allclose(masked[1], model(image).last_hidden_state[1], atol=1e-3)


def test_new_queries_have_different_outputs():
    """Equal queries would stay equal. The outputs differ much, although the default standard deviation is small."""
    outputs = make_qformer(initializer_range=0.02).forward(features()).last_hidden_state[0]
    distances = torch.cdist(outputs, outputs) + torch.eye(len(outputs)) * 9
    assert distances.min() > 0.1


def test_new_queries_have_the_configured_standard_deviation():
    model = make_qformer(num_query_tokens=100, initializer_range=0.3)
    assert model.query_tokens.std().item() == pytest.approx(0.3, rel=0.1)
    assert model.query_tokens.mean().item() == pytest.approx(0, abs=0.03)


def test_queries_depend_on_the_image():
    outputs = make_qformer()(features()).last_hidden_state
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-2)


def test_order_of_image_features_does_not_matter():
    """The Q-Former adds no positions; the features contain them."""
    model, image = make_qformer(), features()
    torch.testing.assert_close(model(image.flip(1)).last_hidden_state, model(image).last_hidden_state)


@pytest.mark.parametrize("frequency", [1, 2])
def test_attention_maps_of_queries_and_of_image(frequency):
    model = make_qformer(num_hidden_layers=3, cross_attention_frequency=frequency)
    model.set_attn_implementation("eager")
    output = model(features(), output_attentions=True)
    cross_attentions = 3 if frequency == 1 else 2
    assert [tuple(x.shape) for x in output.attentions] == [(2, 4, tiny.QUERIES, tiny.QUERIES)] * 3
    assert [tuple(x.shape) for x in output.cross_attentions] == [(2, 4, tiny.QUERIES, LENGTH)] * cross_attentions
    for weights in (*output.attentions, *output.cross_attentions):
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, tiny.QUERIES))


def test_masked_features_get_no_attention():
    model = make_qformer()
    model.set_attn_implementation("eager")
    mask = torch.tensor([[1] * LENGTH, [1] * 4 + [0] * (LENGTH - 4)])
    (weights,) = model(features(), mask, output_attentions=True).cross_attentions
    assert weights[1, :, :, 4:].max() == 0
    assert weights[0].min() > 0


def test_a_mask_of_a_prompt_without_its_tokens_is_refused():
    model = tiny.captioner()
    with pytest.raises(ValueError, match="mask of a prompt without its tokens"):
        model(tiny.images(1), qformer_attention_mask=torch.ones(1, 2, dtype=torch.long))


def test_features_of_another_width_are_refused_by_name():
    with pytest.raises(ValueError, match=rf"\b{WIDTH + 1}\b.*\b{WIDTH}\b"):
        make_qformer()(features(width=WIDTH + 1))


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(num_query_tokens=0), "num_query_tokens"),
        (dict(num_query_tokens=-1), "num_query_tokens"),
        (dict(num_hidden_layers=0), "num_hidden_layers"),
        (dict(hidden_size=0), "hidden_size"),
        (dict(cross_attention_frequency=0), "cross_attention_frequency"),
        (dict(hidden_size=30, num_attention_heads=4), "30.*multiple.*4"),
        (dict(num_attention_heads=0), "num_attention_heads"),
        (dict(num_query_tokens="32"), "num_query_tokens"),
    ],
)
def test_impossible_sizes_are_refused(fields, message):
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        QFormerConfig(**fields)


def test_features_of_another_dtype_are_cast():
    model = make_qformer()
    output = model(features().bfloat16()).last_hidden_state
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, model(features().bfloat16().float()).last_hidden_state)


def test_activation_checkpointing_changes_nothing():
    model = make_qformer().train()
    plain = torch.autograd.grad(model(features()).last_hidden_state[:, 0, 0].sum(), model.query_tokens)
    model.activation_checkpointing_enable()
    assert all(layer.gradient_checkpointing for layer in model.encoder.layer)
    checkpointed = torch.autograd.grad(model(features()).last_hidden_state[:, 0, 0].sum(), model.query_tokens)
    torch.testing.assert_close(checkpointed, plain)


def test_saved_equals_loaded(tmp_path):
    model = make_qformer()
    model.save_pretrained(tmp_path)
    loaded, info = QFormerModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(loaded(features()).last_hidden_state, model(features()).last_hidden_state)


def test_normalized_image_features_are_folded_into_the_values():
    model = QFormerModel(QFormerConfig(**tiny.QFORMER, encoder_hidden_size=tiny.VISION_WIDTH)).eval()
    torch.manual_seed(0)
    features = 5 + 3 * torch.randn(40, 6, tiny.VISION_WIDTH)
    values = [layer.crossattention.attention.value for layer in model.encoder.layer if layer.has_cross_attention]
    images = features.mean(dim=1)
    expected = [value((images - images.mean(dim=0)) / images.std(dim=0)) for value in values]
    model.normalize_image_features(features)
    assert len(values) == 1
    for value, before in zip(values, expected, strict=True):
        torch.testing.assert_close(value(images), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("frequency", [1, 2])
def test_resizing_image_features_replaces_the_weights_that_read_them(frequency):
    model = make_qformer(cross_attention_frequency=frequency)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    model.resize_image_features(WIDTH + 8)
    assert model(features(width=WIDTH + 8)).last_hidden_state.shape == (2, tiny.QUERIES, tiny.QFORMER_WIDTH)
    replaced = {name for name, weight in model.state_dict().items() if weight.shape != before[name].shape}
    assert len(replaced) == 2 * (2 if frequency == 1 else 1)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items() if name not in replaced)


def test_resizing_image_features_to_the_same_width_changes_nothing():
    model = make_qformer()
    expected = model(features()).last_hidden_state
    model.resize_image_features(WIDTH)
    assert torch.equal(model(features()).last_hidden_state, expected)


def test_the_embeddings_of_the_prompt_can_be_replaced_and_resized():
    model = make_qformer(use_qformer_text_input=True, vocab_size=50)
    new = torch.nn.Embedding(50, tiny.QFORMER_WIDTH)
    model.set_input_embeddings(new)
    assert model.get_input_embeddings() is model.embeddings.word_embeddings is new
    weight = new.weight.detach().clone()
    model.resize_token_embeddings(60)
    assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == 60
    assert torch.equal(model.get_input_embeddings().weight[:50], weight)


def test_a_qformer_without_prompts_has_no_embeddings_to_replace():
    with pytest.raises(ValueError, match="does not read prompts"):
        make_qformer().set_input_embeddings(torch.nn.Embedding(50, tiny.QFORMER_WIDTH))
