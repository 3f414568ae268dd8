"""Methods of a captioner that peft, trl and accelerate call, beside those of BLIP-2 or of the language model alone."""

import pytest
import torch
from accelerate.utils.modeling import check_tied_parameters_in_config
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, Blip2Config, Blip2ForConditionalGeneration

from qformer_captioner import QFormerCaptioner, QFormerCaptionerConfig

from ..fixtures import tiny

LANGUAGES = ["llama", "opt", "gpt2", "t5", "flan-t5", "bart"]
EMBEDDINGS = {"llama": "embed_tokens", "opt": "embed_tokens", "gpt2": "wte", "t5": "shared", "bart": "shared"}
TIED = list(EMBEDDINGS)
ATTENTION = r".*\.(q_proj|q|c_attn)"


def text_config(language: str):
    """Return the configuration of a language model whose output layer is its input embedding, as most are."""
    return tiny.text_config(language, **({} if language == "flan-t5" else {"tie_word_embeddings": True}))


def captioner(language: str) -> QFormerCaptioner:
    torch.manual_seed(0)
    config = QFormerCaptionerConfig(
        vision_config=tiny.vision_config("clip"), text_config=text_config(language), qformer_config=tiny.QFORMER
    )
    model = QFormerCaptioner(config).eval()
    tiny.own_head(model.language_model)
    return model


def blip2(language: str) -> Blip2ForConditionalGeneration:
    vision = dict(tiny.LAYERS, hidden_size=tiny.VISION_WIDTH, intermediate_size=40, image_size=tiny.SIDE, patch_size=16)
    qformer = dict(tiny.LAYERS, hidden_size=tiny.QFORMER_WIDTH, intermediate_size=40)
    text = text_config(language).to_dict()
    return Blip2ForConditionalGeneration(Blip2Config(vision_config=vision, qformer_config=qformer, text_config=text))


def language_model(language: str):
    config = text_config(language)
    return (AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM).from_config(config)


def name_of(module, model) -> str:
    return next(name for name, part in model.named_modules() if part is module)


@pytest.mark.parametrize("language", LANGUAGES[:-1])  # BLIP-2 takes only the decoder of a BART
def test_accessors_return_the_modules_that_those_of_blip2_do(language):
    ours, theirs = captioner(language), blip2(language)
    for call in (
        lambda model: model.get_input_embeddings(),
        lambda model: model.get_output_embeddings(),
        lambda model: model.get_encoder(),
        lambda model: model.get_encoder(modality="image"),
        lambda model: model.get_decoder(),
    ):
        assert name_of(call(ours), ours) == name_of(call(theirs), theirs)
    assert (
        ours.prepare_inputs_for_generation(torch.ones(1, 2)).keys()
        == theirs.prepare_inputs_for_generation(torch.ones(1, 2)).keys()
    )


@pytest.mark.parametrize("language", LANGUAGES)
def test_setters_change_what_the_getters_return(language):
    model = captioner(language)
    embeddings, head = torch.nn.Embedding(7, tiny.TEXT_WIDTH), torch.nn.Linear(tiny.TEXT_WIDTH, 7)
    model.set_input_embeddings(embeddings)
    model.set_output_embeddings(head)
    assert model.get_input_embeddings() is model.language_model.get_input_embeddings() is embeddings
    assert model.get_output_embeddings() is model.language_model.get_output_embeddings() is head
    encoder, vision, decoder = torch.nn.Identity(), torch.nn.Identity(), torch.nn.Identity()
    if model.config.is_encoder_decoder:
        model.set_encoder(encoder)
        assert model.get_encoder() is encoder
    model.set_encoder(vision, modality="image")
    assert model.get_encoder(modality="image") is model.vision_model is vision
    model.set_decoder(decoder)
    assert model.get_decoder() is decoder


@pytest.mark.parametrize("language", LANGUAGES)
def test_tied_weights_are_those_of_the_language_model(language):
    model = captioner(language)
    tied, embedding = language != "flan-t5", model.get_input_embeddings().weight
    assert model.config.tie_word_embeddings is tied
    for _ in range(2):
        assert (model.get_output_embeddings().weight is embedding) is tied
        model.tie_weights()
    assert check_tied_parameters_in_config(model)
    model.set_output_embeddings(torch.nn.Linear(tiny.TEXT_WIDTH, tiny.WORDS, bias=False))
    model.config.tie_word_embeddings = False
    model.tie_weights()
    assert model.get_output_embeddings().weight is not embedding


def test_tie_word_embeddings_is_read_from_the_language_model(tmp_path):
    for value in (True, False):
        text = tiny.text_config("llama", tie_word_embeddings=value)
        config = QFormerCaptionerConfig(text_config=text)
        config.save_pretrained(tmp_path)
        saved = QFormerCaptionerConfig.from_pretrained(tmp_path)
        assert saved.tie_word_embeddings is saved.text_config.tie_word_embeddings is value
        assert saved.to_dict()["tie_word_embeddings"] is value
    saved = QFormerCaptionerConfig.from_pretrained(tmp_path, tie_word_embeddings=True)
    assert saved.text_config.tie_word_embeddings is True


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("language", LANGUAGES)
def test_adapters_on_all_linear_layers_leave_out_the_output_layer_and_merge(language):
    model = captioner(language)
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(model, config)
    adapters = [name for name, _ in adapted.named_modules() if name.endswith("lora_A.default")]
    assert adapters and not any("lm_head" in name for name in adapters)
    loss = adapted(**tiny.batch()).loss
    torch.testing.assert_close(adapted.merge_and_unload()(**tiny.batch()).loss, loss, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of peft, the same for both
@pytest.mark.parametrize("language", TIED)
@pytest.mark.parametrize("options", ["head", "tied head", "tied embedding", "tokens", "adapted embedding"])
def test_peft_ties_what_it_ties_in_the_language_model_alone(language, options):
    embedding = EMBEDDINGS[language]
    results = []
    for model in (captioner(language), language_model(language)):
        fields = {
            "head": {"modules_to_save": ["lm_head"]},
            "tied head": {"modules_to_save": ["lm_head"], "ensure_weight_tying": True},
            "tied embedding": {"modules_to_save": [embedding], "ensure_weight_tying": True},
            "tokens": {"trainable_token_indices": {embedding: [3, 4]}},
            "adapted embedding": {"target_modules": rf".*({embedding}|lm_head)", "ensure_weight_tying": True},
        }[options]
        adapted = get_peft_model(model, LoraConfig(**{"r": 2, "target_modules": ATTENTION, **fields}))
        trained = {
            name.replace("language_model.", "")
            for name, weight in adapted.named_parameters()
            if weight.requires_grad and ("lora" not in name or embedding in name or "lm_head" in name)
        }
        kind = type(model.get_output_embeddings()).__name__
        merged = adapted.merge_and_unload()
        tied = merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
        results.append((trained, kind, tied, merged.config.tie_word_embeddings))
    assert results[0] == results[1]


@pytest.mark.parametrize("language", ["llama", "t5"])
def test_preparation_for_adapters_keeps_the_loss_and_lets_gradients_pass(language):
    """`prepare_model_for_kbit_training` calls `enable_input_require_grads` and `gradient_checkpointing_enable`."""
    model = captioner(language)
    loss = model(**tiny.batch()).loss
    model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": True}).train()
    adapted = get_peft_model(model, LoraConfig(target_modules=r"language_model.*\.(q_proj|q)"))
    trained = adapted(**tiny.batch()).loss
    torch.testing.assert_close(trained, loss)
    trained.backward()
    for name, weight in adapted.named_parameters():
        assert (weight.grad is not None) is weight.requires_grad, name
    model.disable_input_require_grads()
    model.gradient_checkpointing_disable()
    torch.testing.assert_close(adapted(**tiny.batch()).loss, loss)


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION"])
def test_the_task_type_of_an_adapter_changes_nothing(task_type):
    language = "t5" if task_type == "SEQ_2_SEQ_LM" else "llama"
    plain = captioner(language)
    loss, ids = plain(**tiny.batch()).loss, plain.generate(**tiny.batch(), max_new_tokens=4)
    config = LoraConfig(target_modules=r"language_model.*\.(q_proj|q)", task_type=task_type)
    adapted = get_peft_model(plain, config).eval()
    torch.testing.assert_close(adapted(**tiny.batch()).loss, loss, rtol=1e-6, atol=0)
    if task_type != "FEATURE_EXTRACTION":
        assert torch.equal(adapted.generate(**tiny.batch(), max_new_tokens=4), ids)
