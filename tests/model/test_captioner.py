"""The captioner in one process: scoring, captioning, training. Each test states one property."""

import pathlib

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationConfig, Trainer, TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer

from qformer_captioner import QFormerCaptioner, QFormerCaptionerConfig

from ..fixtures import tiny

PAIRS = [
    ("clip", "t5"),
    ("vit", "flan-t5"),
    ("siglip", "bart"),
    ("dinov2", "llama"),
    ("clip", "gpt2"),
    ("siglip", "opt"),
    ("dinov2", "qwen2"),
    ("clip", "gemma"),
    ("vit", "bloom"),
]
ONE_OF_EACH_KIND = [("clip", "bart"), ("dinov2", "llama")]
NEAR = dict(rtol=1e-4, atol=1e-4)  # a wrong mask or position shifts the logits by 0.1 and more


@pytest.fixture(scope="module", params=PAIRS, ids="-".join)
def model(request):
    """Shared by the tests of a pair: they read it and change nothing."""
    return tiny.captioner(*request.param)


@pytest.fixture(scope="module", params=ONE_OF_EACH_KIND, ids="-".join)
def either(request):
    """As `model`, where one encoder-decoder and one decoder-only model tell enough."""
    return tiny.captioner(*request.param)


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    """Folders of pretrained backbones, as `from_backbones` reads them."""
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


def only(batch: dict, index: int) -> dict:
    """One row of a batch, without any padding and without a mask."""
    row = {name: tensor[index : index + 1] for name, tensor in batch.items() if name != "attention_mask"}
    row["input_ids"] = row["input_ids"][:, batch["attention_mask"][index].bool()]
    row["labels"] = row["labels"][row["labels"] != -100][None]
    return row


def written(ids: torch.Tensor) -> list[list[int]]:
    """The captions in a batch of token ids, each up to its end-of-sequence."""
    return [row[: row.index(1)] if 1 in row else row for row in ids.tolist()]


def several_captions() -> torch.Tensor:
    """Labels `[3 images, 4 captions, 5 tokens]`; of the second image one caption is missing, of the third two are."""
    rows = tiny.batch(prompts=[0] * 12, captions=(5, 3, 4, 2, 1, 5, 3, 3, 2, 4, 5, 5))["labels"].view(3, 4, 5)
    rows[1, 3] = rows[2, 0] = rows[2, 2] = -100
    return rows


# --- Scoring ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_scores_as_its_images_alone(model, side):
    """Prompts of 4, 0 and 2 words, padded on either side, and captions of unequal length."""
    batch = tiny.batch(side=side)
    together = model(**batch).logits
    for index in range(3):
        alone = model(**only(batch, index)).logits[0]
        torch.testing.assert_close(together[index, : len(alone)], alone, **NEAR)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.filterwarnings("ignore:Passing `no_repeat_ngram_size` with `inputs_embeds`:UserWarning")
@pytest.mark.parametrize("beams", [1, 3])
def test_a_batch_is_captioned_as_its_images_alone(model, side, beams):
    """Without repeating words, which random models love to do."""
    batch = tiny.batch(side=side)
    options = dict(max_new_tokens=6, num_beams=beams, no_repeat_ngram_size=1)
    together = written(model.generate(**batch, **options))
    assert together == [written(model.generate(**only(batch, index), **options))[0] for index in range(3)]
    assert together[0] != together[1]


def test_loss_is_the_language_models_own(model):
    """Of `[queries, prompt, caption]`, put together here by hand, for one image."""
    batch = only(tiny.batch(), 0)
    language, labels = model.language_model, batch["labels"]
    words = language.get_input_embeddings()
    prefix = torch.cat([model.get_soft_prompt(batch["pixel_values"]), words(batch["input_ids"])], dim=1)
    if model.config.is_encoder_decoder:
        reference = language(inputs_embeds=prefix, labels=labels).loss
    else:
        ignored = torch.full(prefix.shape[:2], -100)
        reference = language(
            inputs_embeds=torch.cat([prefix, words(labels)], dim=1), labels=torch.cat([ignored, labels], dim=1)
        ).loss
    torch.testing.assert_close(model(**batch).loss, reference, **NEAR)


@pytest.mark.parametrize("kind", ["pegasus", "marian", "bart"])
def test_words_of_a_prompt_are_as_loud_as_the_encoder_has_them(kind):
    fields = tiny.BART | dict(model_type=kind, scale_embedding=True, decoder_start_token_id=2)
    text = AutoConfig.for_model(**fields, vocab_size=tiny.WORDS, pad_token_id=0, eos_token_id=1, bos_token_id=1)
    config = QFormerCaptionerConfig(
        vision_config=tiny.vision_config("clip"), text_config=text, qformer_config=tiny.QFORMER
    )
    model, words = QFormerCaptioner(config).eval(), tiny.batch()["input_ids"][:1]
    prefix, _ = model.get_prefix(torch.zeros(1, tiny.QUERIES, tiny.TEXT_WIDTH), words)
    encoder = model.language_model.get_encoder()
    torch.testing.assert_close(
        encoder(inputs_embeds=prefix[:, tiny.QUERIES :]).last_hidden_state, encoder(input_ids=words).last_hidden_state
    )


@pytest.mark.parametrize("kind", ["m2m_100", "nllb-moe", "blenderbot", "blenderbot-small"])
def test_loss_is_that_of_encoder_decoders_that_shift_labels_in_forward(kind):
    fields = tiny.BART | dict(model_type=kind, decoder_start_token_id=2, forced_eos_token_id=None)
    if kind == "nllb-moe":
        fields |= dict(encoder_sparse_step=0, decoder_sparse_step=0)
    text = AutoConfig.for_model(**fields, vocab_size=tiny.WORDS, pad_token_id=0, eos_token_id=1, bos_token_id=1)
    config = QFormerCaptionerConfig(
        vision_config=tiny.vision_config("clip"), text_config=text, qformer_config=tiny.QFORMER
    )
    model = QFormerCaptioner(config).eval()
    test_loss_is_the_language_models_own(model)
    assert model.generate(**tiny.batch(), max_new_tokens=3).shape == (3, 3)


def test_logits_are_those_of_the_labels_and_nothing_else(model):
    batch = tiny.batch()
    assert model(**batch).logits.shape == (3, 5, tiny.WORDS)
    assert model(**{**batch, "labels": several_captions()}).logits.shape == (3, 4, 5, tiny.WORDS)
    assert model(**{**batch, "labels": None}).logits.shape == (3, 1, tiny.WORDS)
    assert model(**{**batch, "labels": None}).loss is None


def test_the_last_label_is_predicted_not_read(model):
    batch = only(tiny.batch(), 0)
    other = {**batch, "labels": batch["labels"].clone()}
    other["labels"][0, -1] = 50
    assert torch.equal(model(**other).logits, model(**batch).logits)
    other["labels"][0, -2] = 50
    assert not torch.allclose(model(**other).logits[0, -1], model(**batch).logits[0, -1], atol=1e-2)


def test_several_captions_score_as_one_by_one(model):
    batch = tiny.batch()
    labels = several_captions()
    together = model(**{**batch, "labels": labels})
    apart = [model(**{**batch, "labels": labels[:, k]}) for k in range(4)]
    there = (labels != -100)[..., None]
    logits = torch.stack([output.logits for output in apart], dim=1)
    torch.testing.assert_close(together.logits * there, logits * there, **NEAR)
    tokens = (labels != -100).sum(dim=(0, 2))
    loss = sum(output.loss * number for output, number in zip(apart, tokens, strict=True)) / tokens.sum()
    torch.testing.assert_close(together.loss, loss, **NEAR)


def test_several_captions_encode_the_image_once(either):
    runs = []
    hooks = [
        part.register_forward_hook(lambda module, inputs, output: runs.append(len(output.last_hidden_state)))
        for part in (either.vision_model, either.qformer)
    ]
    either(**{**tiny.batch(), "labels": several_captions()})
    for hook in hooks:
        hook.remove()
    assert runs == [3, 3]


def test_missing_captions_change_neither_loss_nor_gradients(either):
    batch = tiny.batch()
    missing = torch.full_like(batch["labels"], -100)
    three = torch.stack([missing, batch["labels"], missing], dim=1)
    queries = either.qformer.query_tokens

    loss = either(**batch).loss
    padded = either(**{**batch, "labels": three}).loss
    torch.testing.assert_close(padded, loss)
    torch.testing.assert_close(torch.autograd.grad(padded, queries), torch.autograd.grad(loss, queries), **NEAR)


def test_no_caption_at_all_is_a_loss_of_zero(either):
    batch = tiny.batch()
    assert either(**{**batch, "labels": torch.full_like(batch["labels"], -100)}).loss == 0


@pytest.mark.parametrize("labels", [tiny.batch()["labels"], several_captions()], ids=["one", "several"])
def test_loss_is_the_mean_over_caption_tokens(either, labels):
    output = either(**{**tiny.batch(), "labels": labels})
    log_probabilities = output.logits.double().log_softmax(dim=-1)
    total, count = 0.0, 0
    for position in (labels != -100).nonzero().tolist():
        total -= log_probabilities[(*position, labels[tuple(position)])].item()
        count += 1
    assert output.loss.item() == pytest.approx(total / count, rel=1e-5)


def test_loss_is_divided_by_the_items_of_the_whole_batch_where_told(either):
    batch = tiny.batch()
    count = (batch["labels"] != -100).sum()
    whole = either(**batch, num_items_in_batch=torch.tensor(40)).loss
    torch.testing.assert_close(whole, either(**batch).loss * count / 40)


def test_forward_takes_what_callers_of_transformers_models_pass(model):
    batch = tiny.batch()
    output = model(**batch)
    assert torch.equal(model(**batch, use_cache=False).loss, output.loss)
    found = model(**batch, use_cache=True, return_dict=False)
    assert isinstance(found, tuple)
    assert len(found) == len(output)
    assert all(torch.equal(part, expected) for part, expected in zip(found, output.to_tuple(), strict=True))


@pytest.mark.parametrize("prompt", [None, torch.zeros(3, 0, dtype=torch.long)], ids=["none", "empty"])
def test_no_prompt_is_a_prompt_of_padding(model, prompt):
    batch = tiny.batch()
    batch["attention_mask"] = torch.zeros_like(batch["attention_mask"])
    without = {**batch, "input_ids": prompt, "attention_mask": None}
    torch.testing.assert_close(model(**without).loss, model(**batch).loss, **NEAR)


def test_what_stands_in_front_matters(either):
    """The image, the prompt and its order all change the answer."""
    batch = only(tiny.batch(), 0)
    logits = either(**batch).logits
    for change in (
        dict(pixel_values=batch["pixel_values"].flip(-1)),
        dict(input_ids=batch["input_ids"][:, 1:]),
        dict(input_ids=batch["input_ids"].flip(1)),
    ):
        assert not torch.allclose(either(**{**batch, **change}).logits, logits, atol=1e-2), change.keys()


def test_image_features_stand_for_the_image(model):
    batch = tiny.batch()
    features = model.get_image_features(batch["pixel_values"])
    assert features.shape[0] == 3 and features.shape[2] == tiny.VISION_WIDTH
    instead = {**batch, "pixel_values": None, "image_embeds": features}
    assert torch.equal(model(**instead).logits, model(**batch).logits)
    assert torch.equal(model.generate(**instead, max_new_tokens=5), model.generate(**batch, max_new_tokens=5))


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_both_or_neither_of_image_and_features_are_refused(either, call):
    pixels = tiny.images()
    for inputs in ({}, dict(pixel_values=pixels, image_embeds=either.get_image_features(pixels))):
        with pytest.raises(ValueError, match="pixel_values.*image_embeds"):
            getattr(either, call)(**inputs)


def test_features_of_another_width_are_refused(either):
    with pytest.raises(ValueError, match=rf"\b17\b.*\b{tiny.VISION_WIDTH}\b"):
        either(image_embeds=torch.zeros(1, 5, 17))


@pytest.mark.parametrize("language", ["llama", "gpt2", "opt", "bart"])
def test_as_much_as_the_language_model_allows_is_possible_and_more_a_clear_error(language):
    """The limit is 64; a decoder-only model has to fit queries, prompt and caption in it."""
    model = tiny.captioner("clip", language)
    room = 0 if language == "bart" else 5
    fits = 64 - tiny.QUERIES - room
    batch = tiny.batch(prompts=[fits], captions=[5])
    assert model(**batch).loss.isfinite()
    assert model.generate(**batch, max_new_tokens=5, min_new_tokens=5).shape == (1, 5)
    longer = tiny.batch(prompts=[fits + 1], captions=[5])
    for too_long in (lambda: model(**longer), lambda: model.generate(**longer, max_new_tokens=5)):
        with pytest.raises(ValueError, match=rf"at most 64 .* {tiny.QUERIES} queries, a prompt of {fits + 1} .* 5 "):
            too_long()


# --- Captioning -------------------------------------------------------------------------------------------------------


def test_greedy_captions_are_the_likeliest_words_of_forward(model):
    """Word by word, each from a forward pass of its own; so the cache and the positions behind it are right."""
    for index in range(3):
        inputs = only(tiny.batch(), index)
        inputs.pop("labels")
        caption = model.generate(**inputs, max_new_tokens=5, min_new_tokens=5)
        so_far = []
        for _ in range(5):
            labels = torch.tensor([[*so_far, 0]])
            likelihood = model(**inputs, labels=labels).logits[0, -1].clone()
            likelihood[1] = -torch.inf  # `min_new_tokens` forbids to end
            so_far.append(likelihood.argmax().item())
        assert caption[0].tolist() == so_far


def test_cached_equals_uncached(model):
    batch = tiny.batch()
    options = dict(max_new_tokens=6, num_beams=2)
    assert torch.equal(
        model.generate(**batch, **options, use_cache=True), model.generate(**batch, **options, use_cache=False)
    )


@pytest.mark.parametrize("how", ["max_length", "max_new_tokens", "config max_length", "config max_new_tokens"])
def test_lengths_count_the_words_of_the_caption(either, how):
    lengths = {how.split()[-1]: 4, how.split()[-1].replace("max", "min"): 4}
    if how.startswith("config"):
        lengths = {"generation_config": GenerationConfig(**lengths, eos_token_id=1, decoder_start_token_id=1)}
    assert either.generate(**tiny.batch(), **lengths).shape == (3, 4)


@pytest.mark.parametrize("own", [True, False], ids=["the model's configuration", "the call's configuration"])
def test_a_least_length_counts_the_words_of_the_caption_wherever_it_is_said(either, own, monkeypatch):
    words = dict(sequence_bias=[[[1], 100.0]], max_new_tokens=5)  # wants to end at once
    config = GenerationConfig(min_length=3, eos_token_id=1, pad_token_id=0, decoder_start_token_id=1)
    if own:
        monkeypatch.setattr(either, "generation_config", config)
    written = either.generate(**tiny.batch(), **words, **({} if own else {"generation_config": config}))
    assert written.shape == (3, 4)


def test_a_caption_ends_at_its_end_of_sequence(either):
    """Whatever the model finds likeliest first is declared the end."""
    batch = only(tiny.batch(), 0)
    first = either.generate(**batch, max_new_tokens=1).item()
    assert either.generate(**batch, max_new_tokens=6, eos_token_id=first).tolist() == [[first]]


def test_a_training_batch_can_be_captioned_as_it_is(either):
    batch = tiny.batch()
    without = {name: tensor for name, tensor in batch.items() if name != "labels"}
    assert torch.equal(either.generate(**batch, max_new_tokens=5), either.generate(**without, max_new_tokens=5))


def test_several_captions_of_an_image(either):
    batch = tiny.batch()
    beams = either.generate(**batch, max_new_tokens=4, num_beams=3, num_return_sequences=2)
    assert beams.shape[0] == 6 and beams.shape[1] <= 4
    assert written(beams[::2]) == written(either.generate(**batch, max_new_tokens=4, num_beams=3))
    assert not torch.equal(beams[0], beams[1])
    sampled = either.generate(**batch, max_new_tokens=4, do_sample=True, num_return_sequences=2)
    assert sampled.shape[0] == 6


@pytest.mark.parametrize("beams", [1, 2])
def test_a_returned_dict_holds_the_same_captions(either, beams):
    batch = tiny.batch()
    options = dict(max_new_tokens=4, num_beams=beams)
    output = either.generate(**batch, **options, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(output.sequences, either.generate(**batch, **options))
    assert output.scores[0].shape == (3 * beams, tiny.WORDS)
    assert len(output.scores) == output.sequences.shape[1]


def test_generate_changes_no_settings(either):
    before = either.generation_config.to_dict()
    either.generate(**tiny.batch(), max_new_tokens=3, num_beams=2)
    own = GenerationConfig(max_new_tokens=3)
    either.generate(**tiny.batch(), generation_config=own, num_beams=2)
    assert either.generation_config.to_dict() == before
    assert own.num_beams is None


def test_generate_records_no_graph(either):
    output = either.generate(**tiny.batch(), max_new_tokens=2, return_dict_in_generate=True, output_logits=True)
    assert not output.logits[0].requires_grad


class TestCaption:
    """`caption`: from pictures to strings."""

    OPTIONS = dict(max_new_tokens=6, min_new_tokens=6)

    def test_a_picture_gives_a_string(self, either):
        caption = either.caption(tiny.picture(), **self.OPTIONS)
        assert isinstance(caption, str) and caption and caption == caption.strip()
        assert "<" not in caption  # no special tokens

    def test_is_what_processor_and_generate_give(self, either):
        inputs = either.processor(images=tiny.picture(), text="a blue star")
        ids = either.generate(**inputs, **self.OPTIONS)
        text = either.processor.tokenizer.decode(ids[0], skip_special_tokens=True)
        assert either.caption(tiny.picture(), prompt="a blue star", **self.OPTIONS) == text.strip()

    @pytest.mark.parametrize("kind", [str, pathlib.Path])
    def test_a_path_is_as_good_as_its_picture(self, either, kind, tmp_path):
        tiny.picture().save(tmp_path / "noise.png")
        caption = either.caption(kind(tmp_path / "noise.png"), **self.OPTIONS)
        assert caption == either.caption(tiny.picture(), **self.OPTIONS)

    def test_a_list_gives_a_list_of_the_same_captions(self, either):
        pictures = [tiny.picture(0), tiny.picture(1)]
        captions = either.caption(pictures, **self.OPTIONS)
        assert captions == [either.caption(picture, **self.OPTIONS) for picture in pictures]
        assert captions[0] != captions[1]
        assert either.caption(pictures[:1], **self.OPTIONS) == captions[:1]

    def test_prompts_one_for_all_or_one_each(self, either):
        pictures, prompts = [tiny.picture(0), tiny.picture(1)], ["a red circle above", "two"]
        captions = either.caption(pictures, prompt=prompts, **self.OPTIONS)
        assert captions == [
            either.caption(picture, prompt=prompt, **self.OPTIONS)
            for picture, prompt in zip(pictures, prompts, strict=True)
        ]
        assert either.caption(pictures, prompt="two", **self.OPTIONS)[1] == captions[1]
        assert either.caption(pictures, **self.OPTIONS) != captions

    def test_several_captions_of_one_picture_are_a_list(self, either):
        captions = either.caption(tiny.picture(), num_beams=3, num_return_sequences=3, **self.OPTIONS)
        assert len(captions) == len(set(captions)) == 3

    def test_no_picture_has_no_caption(self, either):
        assert either.caption([]) == []

    def test_a_missing_file_is_named(self, either, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"absent\.png"):
            either.caption(tmp_path / "absent.png")

    def test_a_damaged_file_is_named(self, either, tmp_path):
        tiny.picture().save(tmp_path / "cut.png")
        whole = (tmp_path / "cut.png").read_bytes()
        (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(OSError, match=r"cut\.png"):
            either.caption([tiny.picture(), tmp_path / "cut.png"])

    def test_without_a_processor_it_says_what_to_do(self):
        model = tiny.captioner()
        model.processor = None
        with pytest.raises(ValueError, match=r"model\.processor = "):
            model.caption(tiny.picture())


# --- Devices ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("skip_logits", [False, True])
def test_a_loss_is_computed_on_the_captioners_device(model, skip_logits):
    """A tensor that is made without saying where would be on the CPU beside a GPU, and here where nothing computes."""
    batch = tiny.batch() | {"labels": several_captions()}
    with torch.device("meta"):
        outputs = model(**batch, skip_logits=skip_logits)
        (gradient,) = torch.autograd.grad(outputs.loss, model.qformer.query_tokens)
    tensors = [gradient, *(value for value in outputs.values() if value is not None)]
    assert {tensor.device for tensor in tensors} == {model.device}


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "num_return_sequences": 2}], ids=["greedy", "sampled"])
def test_captions_are_written_on_the_captioners_device(model, options):
    batch = tiny.batch()
    with torch.device("meta"):
        captions = model.generate(**batch, max_new_tokens=5, **options)
    assert captions.device == model.device


# --- Backbones --------------------------------------------------------------------------------------------------------


def from_backbones(vision: str, language: str, **options) -> QFormerCaptioner:
    torch.manual_seed(0)
    return QFormerCaptioner.from_backbones(vision, language, **tiny.QFORMER | options)


def trained_parts(model: QFormerCaptioner) -> set[str]:
    """The parts whose parameters get a gradient; within a part either all or none do."""
    model(**tiny.batch()).loss.backward()
    reached = {part: set() for part, _ in model.named_children()}
    for name, parameter in model.named_parameters():
        reached[name.split(".")[0]].add(parameter.grad is not None)
    assert all(len(answers) == 1 for answers in reached.values()), reached
    return {part for part, answers in reached.items() if answers == {True}}


@pytest.mark.parametrize("language", ["llama", "t5"])
def test_gradients_reach_only_what_trains(backbones, language):
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
    """No dropout where nothing learns (it is 0.5 there), and activation checkpointing does not turn it on."""
    model = from_backbones(backbones["clip"], backbones[language])
    loss = model(**tiny.batch()).loss
    if checkpointing:
        model.activation_checkpointing_enable()
    model.train()
    assert model.qformer.training and model.training
    for part in (model.vision_model, model.language_model):
        training = {type(module) for module in part.modules() if module.training}
        # A layer's own flag only has transformers recompute its activations.
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
def test_of_a_two_tower_checkpoint_the_vision_tower_is_taken(name, backbones, tmp_path):
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
    assert torch.equal(model.get_image_features(tiny.images()), expected)
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


@pytest.mark.parametrize("part", ["vision model", "language model"])
def test_a_backbone_that_is_not_there_is_named(backbones, part, tmp_path):
    absent = str(tmp_path / "absent")
    folders = (absent, backbones["llama"]) if part == "vision model" else (backbones["clip"], absent)
    with pytest.raises(OSError, match=f"{part} '{absent}'"):
        from_backbones(*folders)


def test_no_language_model_sees_the_words_to_come(backbones, tmp_path):
    """A BERT would, unless it is told that it is a decoder."""
    config = AutoConfig.for_model("bert", **tiny.LAYERS, hidden_size=32, intermediate_size=40, vocab_size=tiny.WORDS)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    model, batch = from_backbones(backbones["clip"], tmp_path), tiny.batch()
    expected = model(**batch).logits[:, 0]
    batch["labels"][:, 1:] = batch["labels"][:, 1:].roll(1, dims=0)
    torch.testing.assert_close(model(**batch).logits[:, 0], expected)


def test_from_backbones_starts_from_the_saved_weights(backbones):
    model = from_backbones(backbones["clip"], backbones["flan-t5"])
    reference = AutoModel.from_pretrained(backbones["clip"])
    assert torch.equal(model.get_image_features(tiny.images()), reference(pixel_values=tiny.images()).last_hidden_state)


@pytest.mark.parametrize("projection_per_query", [False, True])
def test_a_fresh_soft_prompt_is_three_times_as_loud_as_words(backbones, projection_per_query):
    model = from_backbones(backbones["clip"], backbones["llama"], projection_per_query=projection_per_query)
    words = model.language_model.get_input_embeddings().weight
    assert model.get_soft_prompt(tiny.images()).std().item() == pytest.approx(3 * words.std().item(), rel=0.3)


def test_a_projection_per_query_is_a_linear_layer_for_each():
    model = tiny.captioner(projection_per_query=True)
    queries = model.qformer(model.get_image_features(tiny.images())).last_hidden_state
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
    """Through `tie_weights`, which the Trainer calls, and through saving and loading."""
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
    assert model.config.text_config.vocab_size == tiny.WORDS + 7
    assert model.language_model.get_input_embeddings().weight.shape[0] == tiny.WORDS + 7
    assert model(**tiny.batch()).logits.shape == (3, 5, tiny.WORDS + 7)


# --- The Trainer ------------------------------------------------------------------------------------------------------


class Captions(Dataset):
    """Eight images with captions of 1 to 8 words."""

    def __init__(self):
        self.batch = tiny.batch(prompts=[2] * 8, captions=range(1, 9))

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {name: tensor[index] for name, tensor in self.batch.items()}


def train(model: nn.Module, folder: pathlib.Path, batch_size: int, accumulation: int) -> list[float]:
    """Two steps of SGD, each on all eight images; returns the logged losses."""
    options = dict(learning_rate=1e-3, lr_scheduler_type="constant", max_grad_norm=0.0, optim="sgd", num_train_epochs=2)
    options |= dict(per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation)
    options |= dict(logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True)
    trainer = Trainer(
        model, TrainingArguments(folder, remove_unused_columns=False, **options), train_dataset=Captions()
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("language", ["bart", "llama"])
def test_gradient_accumulation_is_a_larger_batch(language, tmp_path):
    """Captions of unequal length: a mean of means would weigh the words of short captions more."""
    whole, parts = tiny.captioner("clip", language), tiny.captioner("clip", language)
    start = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    first_loss = whole(**Captions().batch).loss.item()
    losses = [train(whole, tmp_path, 8, 1), train(parts, tmp_path, 2, 4)]
    assert losses[0][0] == pytest.approx(first_loss, abs=1e-4)
    assert losses[0][1] < losses[0][0]
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)  # they are logged with four digits
    for name, tensor in parts.state_dict().items():
        torch.testing.assert_close(tensor, whole.state_dict()[name], rtol=0, atol=1e-6, msg=name)
    moved = max((tensor - start[name]).abs().max() for name, tensor in whole.state_dict().items())
    assert moved > 1e-4
