"""Captioners built from pretrained backbones: frozen parts, dtypes, output layers, initial projection."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from qformer_captioner import QFormerCaptioner, QFormerCaptionerConfig, QFormerConfig, QFormerModel

from ..fixtures import tiny
from ..fixtures.batches import NEAR


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    """Folders of pretrained backbones for `from_backbones`."""
    folder = tmp_path_factory.mktemp("backbones")
    return {
        "clip": tiny.save_vision(folder / "clip", "clip"),
        "dinov2-bf16": tiny.save_vision(folder / "dinov2", "dinov2", torch.bfloat16),
        "llama": tiny.save_language(folder / "llama", "llama", attention_dropout=0.5),
        "t5": tiny.save_language(folder / "t5", "t5", dropout_rate=0.5),
        "flan-t5": tiny.save_language(folder / "flan-t5", "flan-t5"),
        "llama-bf16": tiny.save_language(folder / "llama-bf16", "llama", torch.bfloat16),
        "flan-t5-bf16": tiny.save_language(folder / "flan-t5-bf16", "flan-t5", torch.bfloat16),
    }


def from_backbones(vision: str, language: str, **options) -> QFormerCaptioner:
    torch.manual_seed(0)
    return QFormerCaptioner.from_backbones(vision, language, **tiny.QFORMER | options)


def trained_parts(model: QFormerCaptioner) -> set[str]:
    """Return the parts whose parameters get a gradient. In each part, either all parameters or no parameters do."""
    model(**tiny.batch()).loss.backward()
    reached = {part: set() for part, _ in model.named_children()}
    for name, parameter in model.named_parameters():
        reached[name.split(".")[0]].add(parameter.grad is not None)
    assert all(len(answers) == 1 for answers in reached.values()), reached
    return {part for part, answers in reached.items() if answers == {True}}


@pytest.mark.parametrize("language", ["llama", "t5"])
def test_gradients_reach_trainable_parts_only(backbones, language):
    model = from_backbones(backbones["clip"], backbones[language])
    assert trained_parts(model.train()) == {"qformer", "language_projection"}
    model = from_backbones(backbones["clip"], backbones[language], freeze_language_model=False)
    assert trained_parts(model.train()) == {"qformer", "language_projection", "language_model"}


def test_an_unfrozen_vision_encoder_learns(backbones):
    model = from_backbones(backbones["clip"], backbones["llama"], freeze_vision_model=False)
    model(**tiny.batch()).loss.backward()
    assert model.vision_model.get_parameter("embeddings.patch_embedding.weight").grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in model.language_model.parameters())


@pytest.mark.parametrize("language", ["llama", "t5"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_frozen_backbones_stay_in_evaluation_mode(backbones, language, checkpointing):
    """The dropout of frozen backbones (0.5 here) stays off, with activation checkpointing, too."""
    model = from_backbones(backbones["clip"], backbones[language])
    loss = model(**tiny.batch()).loss
    if checkpointing:
        model.activation_checkpointing_enable()
    model.train()
    assert model.qformer.training and model.training
    for part in (model.vision_model, model.language_model):
        training = {type(module) for module in part.modules() if module.training}
        # The mode of an embedding has no effect. That of a layer itself makes transformers recompute its activations.
        training -= {torch.nn.Embedding}
        assert all(checkpointing and issubclass(kind, GradientCheckpointingLayer) for kind in training)
    torch.testing.assert_close(model(**tiny.batch()).loss, loss)
    model.eval()
    assert not any(module.training for module in model.modules())


def test_an_unfrozen_language_model_trains_with_its_dropout(backbones):
    model = from_backbones(backbones["clip"], backbones["t5"], freeze_language_model=False).train()
    assert model.language_model.training and not model.vision_model.training
    assert model(**tiny.batch()).loss != model(**tiny.batch()).loss


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_frozen_vision_encoder_records_no_graph(backbones, checkpointing):
    model = from_backbones(backbones["clip"], backbones["llama"]).train()
    if checkpointing:
        model.activation_checkpointing_enable()
        model.enable_input_require_grads()  # what the Trainer and PEFT do with it
    recorded = []
    model.vision_model.register_forward_hook(
        lambda module, inputs, output: recorded.append(output.last_hidden_state.requires_grad)
    )
    model(**tiny.batch()).loss.backward()
    assert recorded == [False]
    assert model.qformer.query_tokens.grad is not None


@pytest.mark.parametrize("language", ["llama", "bart"])
def test_activation_checkpointing_changes_no_gradient(language):
    gradients = []
    for checkpointing in (False, True):
        model = tiny.captioner("clip", language).train()
        if checkpointing:
            model.activation_checkpointing_enable()
            assert model.is_activation_checkpointing
        model(**tiny.batch()).loss.backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None})
    torch.testing.assert_close(gradients[1], gradients[0], **NEAR)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_the_vision_tower_of_a_two_tower_checkpoint_is_used(name, backbones, tmp_path):
    torch.manual_seed(6)
    text = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=50)
    towers = AutoConfig.for_model(
        name, vision_config=tiny.vision_config(name).to_dict(), text_config=text, projection_dim=8
    )
    both = AutoModel.from_config(towers).eval()
    both.save_pretrained(tmp_path)
    tiny.image_processor().save_pretrained(tmp_path)

    model = from_backbones(tmp_path, backbones["llama"])
    expected = both.vision_model(tiny.images()).last_hidden_state
    assert torch.equal(model.encode_images(tiny.images()).last_hidden_state, expected)
    config = QFormerCaptionerConfig(vision_config=towers, text_config=tiny.text_config("llama"))
    assert config.vision_config.model_type == f"{name}_vision_model"
    assert config.qformer_config.encoder_hidden_size == tiny.VISION_WIDTH


@pytest.mark.parametrize("language", ["llama-bf16", "flan-t5-bf16"])
def test_bfloat16_backbones_beside_a_float32_qformer(backbones, language):
    model = from_backbones(backbones["dinov2-bf16"], backbones[language]).train()
    dtypes = {name: {weight.dtype for weight in part.parameters()} for name, part in model.named_children()}
    half, full = {torch.bfloat16}, {torch.float32}
    assert dtypes == dict(vision_model=half, qformer=full, language_projection=full, language_model=half)

    output = model(**tiny.batch())
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    assert all(weight.grad.isfinite().all() for weight in model.qformer.parameters())
    exact = from_backbones(backbones["dinov2-bf16"], backbones[language], dtype=torch.float32)(**tiny.batch())
    assert output.loss.item() == pytest.approx(exact.loss.item(), rel=0.05)
    assert model.generate(**tiny.batch(), max_new_tokens=4, min_new_tokens=4, num_beams=2).shape == (3, 4)


def test_an_unknown_qformer_field_is_answered_with_the_nearest(backbones):
    with pytest.raises(TypeError, match="'num_querry_tokens'.*'num_query_tokens'"):
        from_backbones(backbones["clip"], backbones["llama"], num_querry_tokens=4)


@pytest.mark.parametrize(
    ("option", "remedy"),
    [
        (dict(qformer="Salesforce/blip2-opt-2.7b"), "`qformer_captioner.hub.convert.load_qformer`"),
        (dict(quantization_config=None), r"`model.quantize_language_model\(quantization_config\)`"),
        (dict(qformer_revision="main"), r"`qformer=load_qformer\(name, revision\)`"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_keyword_of_another_function_is_answered_with_that_function(option, remedy):
    with pytest.raises(TypeError, match=remedy):
        QFormerCaptioner.from_backbones("vision", "language", **option)


@pytest.mark.parametrize("projection_per_query", [False, True])
def test_the_configuration_is_that_of_a_given_qformer(projection_per_query, monkeypatch):
    config = QFormerCaptionerConfig(
        vision_config=tiny.vision_config("clip"),
        text_config=tiny.text_config("llama"),
        qformer_config=tiny.QFORMER,
        projection_per_query=projection_per_query,
    )
    fields = tiny.QFORMER | dict(num_query_tokens=7, hidden_size=40, encoder_hidden_size=tiny.VISION_WIDTH)
    model = QFormerCaptioner(config, qformer=QFormerModel(QFormerConfig(**fields))).eval()
    assert model.config.qformer_config is model.qformer.config
    assert model.get_soft_prompt(tiny.images()).shape == (3, 7, tiny.TEXT_WIDTH)
    warnings: list[str] = []
    monkeypatch.setattr("transformers.modeling_utils.logger.warning", warnings.append)
    model.set_attn_implementation("eager")
    assert model.qformer.config._attn_implementation == "eager"
    assert warnings == []


@pytest.mark.parametrize("part", ["vision model", "language model"])
def test_a_missing_backbone_is_named(backbones, part, tmp_path):
    absent = str(tmp_path / "absent")
    folders = (absent, backbones["llama"]) if part == "vision model" else (backbones["clip"], absent)
    with pytest.raises(OSError, match=f"{part} '{absent}'"):
        from_backbones(*folders)


def test_a_bert_does_not_attend_to_later_tokens(backbones, tmp_path):
    """A BERT attends to them unless its configuration says that it is a decoder."""
    config = AutoConfig.for_model("bert", **tiny.LAYERS, hidden_size=32, intermediate_size=40, vocab_size=tiny.WORDS)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    model, batch = from_backbones(backbones["clip"], tmp_path), tiny.batch()
    expected = model(**batch).logits[:, 0]
    batch["labels"][:, 1:] = batch["labels"][:, 1:].roll(1, dims=0)
    torch.testing.assert_close(model(**batch).logits[:, 0], expected)


def test_models_of_the_caller_keep_their_attention_and_its_masks():
    vision_model = AutoModel.from_config(tiny.vision_config("clip"))
    language_model = AutoModelForCausalLM.from_config(tiny.text_config("llama"))
    config = QFormerCaptionerConfig(
        vision_config=vision_model.config, text_config=language_model.config, qformer_config=tiny.QFORMER
    )
    model = QFormerCaptioner(config, vision_model=vision_model, language_model=language_model).eval()
    assert vision_model.config._attn_implementation == language_model.config._attn_implementation == "sdpa"
    batch = tiny.batch()
    losses = model(**batch).losses
    batch["input_ids"][batch["attention_mask"] == 0] = 5  # padding
    assert torch.equal(model(**batch).losses, losses)


def test_from_backbones_starts_from_the_saved_weights(backbones):
    model = from_backbones(backbones["clip"], backbones["flan-t5"])
    reference = AutoModel.from_pretrained(backbones["clip"])
    assert torch.equal(
        model.encode_images(tiny.images()).last_hidden_state, reference(pixel_values=tiny.images()).last_hidden_state
    )


@pytest.mark.parametrize("projection_per_query", [False, True])
def test_a_new_soft_prompt_has_three_times_the_norm_of_embeddings(backbones, projection_per_query):
    model = from_backbones(backbones["clip"], backbones["llama"], projection_per_query=projection_per_query)
    words = model.language_model.get_input_embeddings().weight
    assert model.get_soft_prompt(tiny.images()).std().item() == pytest.approx(3 * words.std().item(), rel=0.3)


def test_a_projection_per_query_is_a_linear_layer_for_each():
    model = tiny.captioner(projection_per_query=True)
    queries = model.qformer(model.encode_images(tiny.images()).last_hidden_state).last_hidden_state
    soft_prompt = model.get_soft_prompt(tiny.images())
    for query in range(tiny.QUERIES):
        weight, bias = model.language_projection.weight[query], model.language_projection.bias[query]
        torch.testing.assert_close(soft_prompt[:, query], queries[:, query] @ weight + bias)


def test_a_projection_per_query_is_saved_and_loaded(tmp_path):
    model = tiny.captioner(projection_per_query=True)
    model.save_pretrained(tmp_path)
    loaded = QFormerCaptioner.from_pretrained(tmp_path)
    assert torch.equal(loaded(**tiny.batch()).logits, model(**tiny.batch()).logits)


def test_flan_t5_keeps_its_own_output_layer(backbones, tmp_path):
    """It survives `tie_weights`, which the Trainer calls, and saving and loading."""
    model = from_backbones(backbones["clip"], backbones["flan-t5"])
    language = model.language_model
    head = language.lm_head.weight.clone()
    assert not torch.allclose(head, language.shared.weight, atol=0.1)
    logits = model(**tiny.batch()).logits
    for tie in (model.tie_weights, language.tie_weights):
        tie()
        assert torch.equal(language.lm_head.weight, head)
    assert torch.equal(model(**tiny.batch()).logits, logits)

    for included in (False, True):
        model.save_pretrained(tmp_path / str(included), include_backbones=included)
        loaded = QFormerCaptioner.from_pretrained(tmp_path / str(included))
        loaded.tie_weights()
        assert torch.equal(loaded.language_model.lm_head.weight, head)
        assert torch.equal(loaded(**tiny.batch()).logits, logits)


def test_a_tied_t5_stays_tied(tmp_path):
    model = tiny.captioner("clip", "t5")
    model.save_pretrained(tmp_path)
    for language in (model.language_model, QFormerCaptioner.from_pretrained(tmp_path).language_model):
        assert language.lm_head.weight is language.shared.weight


@pytest.mark.parametrize("language", ["t5", "flan-t5", "bart", "llama", "gpt2"])
def test_a_larger_vocabulary_reaches_inputs_outputs_and_configuration(language):
    model = tiny.captioner("clip", language)
    model.resize_token_embeddings(tiny.WORDS + 7)
    assert model.config.get_text_config().vocab_size == model.vocab_size == tiny.WORDS + 7
    assert model.language_model.get_input_embeddings().weight.shape[0] == tiny.WORDS + 7
    assert model(**tiny.batch()).logits.shape == (3, 5, tiny.WORDS + 7)


@pytest.mark.parametrize("vision", ["clip", "siglip", "dinov2"])
def test_missing_weights_of_a_backbone_have_the_scale_of_a_new_model(vision):
    config = tiny.captioner(vision).config
    new = QFormerCaptioner(copy.deepcopy(config))
    loaded = QFormerCaptioner.from_pretrained(None, config=config, state_dict={})
    for (name, weight), missing in zip(new.named_parameters(), loaded.parameters(), strict=True):
        assert missing.std().item() == pytest.approx(weight.std().item(), rel=0.5, abs=1e-6), name
