"""A `Blip2ForImageTextRetrieval` as a model of stage 1: equal outputs, conversion, and its Q-Former in stage 2."""

import pytest
import torch
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    Blip2Config,
    Blip2ForImageTextRetrieval,
    Blip2TextModelWithProjection,
    Blip2VisionModelWithProjection,
)
from transformers.utils import logging

from qformer_captioner import QFormerCaptioner, QFormerForPretraining, QFormerModel
from qformer_captioner.common.errors import InputError
from qformer_captioner.hub.convert import convert, load_qformer, load_qformer_tokenizer

from ..fixtures import tiny

WORDS = 30
VISION = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40, patch_size=16)
VISION |= dict(image_size=tiny.SIDE)
QFORMER = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=40, vocab_size=WORDS)
QFORMER |= dict(max_position_embeddings=20, cross_attention_frequency=2)
CLOSE = dict(atol=1e-5, rtol=0)


def retrieval_model(
    vision: dict | None = None, width: int = 20, queries: int = 4, seed: int = 0, **qformer
) -> Blip2ForImageTextRetrieval:
    """Return a `Blip2ForImageTextRetrieval` whose weights are all random, biases included."""
    torch.manual_seed(seed)
    config = Blip2Config(
        vision_config=VISION | (vision or {}),
        qformer_config=QFORMER | dict(use_qformer_text_input=True) | qformer,
        num_query_tokens=queries,
        image_text_hidden_size=width,
    )
    model = Blip2ForImageTextRetrieval(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return model


@pytest.fixture
def folder(tmp_path):
    """Return the folder of a retrieval model with an image processor and BERT's kind of tokenizer."""
    retrieval_model().save_pretrained(tmp_path / "source")
    tiny.image_processor().save_pretrained(tmp_path / "source")
    tiny.text_tokenizer().save_pretrained(tmp_path / "source")
    return tmp_path / "source"


# --- Outputs ----------------------------------------------------------------------------------------------------------


def random_sizes(seed: int) -> dict:
    """Return random sizes of a retrieval model."""
    draw = torch.Generator().manual_seed(seed)

    def choose(*values):
        return values[int(torch.randint(len(values), (), generator=draw))]

    heads, head_size = choose(1, 2, 3, 4), choose(4, 8)
    vision_heads = choose(1, 2, 4)
    vision = dict(
        hidden_size=vision_heads * choose(4, 8, 12),
        num_attention_heads=vision_heads,
        num_hidden_layers=choose(1, 2),
        hidden_act=choose("gelu", "quick_gelu"),
        **choose(dict(image_size=32, patch_size=8), dict(image_size=30, patch_size=10)),
    )
    return dict(
        vision=vision,
        width=choose(5, 16, 33),
        queries=choose(1, 3, 8),
        seed=seed,
        hidden_size=heads * head_size,
        num_attention_heads=heads,
        num_hidden_layers=choose(1, 2, 3, 5),
        cross_attention_frequency=1 + seed % 3,
        intermediate_size=choose(12, 48),
        hidden_act=choose("gelu", "relu", "gelu_new"),
        layer_norm_eps=choose(1e-12, 1e-5),
        encoder_hidden_size=vision["hidden_size"],
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("seed", range(8))
def test_similarities_matching_and_projections_are_those_of_transformers(seed, attention, tmp_path):
    model = retrieval_model(**random_sizes(seed))
    model.save_pretrained(tmp_path)
    ours = QFormerForPretraining.from_pretrained(tmp_path, attn_implementation=attention)
    assert ours.qformer.config._attn_implementation == attention
    side = model.config.vision_config.image_size
    pixels, ids = torch.randn(3, 3, side, side), torch.randint(3, WORDS, (3, 9))
    mask = (torch.arange(9) < torch.tensor([[9], [2], [6]])).long()
    batch = dict(pixel_values=pixels, input_ids=ids, attention_mask=mask)
    with torch.no_grad():
        contrast, matching = model(**batch), model(**batch, use_image_text_matching_head=True)
        images, texts = ours.get_image_features(pixels), ours.get_text_features(ids, mask)
        logits = ours.get_matching_logits(ids, mask, pixels)
        similarity = (images.pooler_output @ texts.pooler_output.T).amax(dim=1)
        towers = {"config": model.config, "state_dict": model.state_dict()}
        vision = Blip2VisionModelWithProjection.from_pretrained(None, **towers)(pixels)
        text = Blip2TextModelWithProjection.from_pretrained(None, **towers)(ids, mask)
    torch.testing.assert_close(similarity, contrast.logits_per_image, **CLOSE)
    torch.testing.assert_close(logits, matching.logits_per_image, **CLOSE)
    torch.testing.assert_close(images.pooler_output, vision.image_embeds, **CLOSE)
    torch.testing.assert_close(texts.pooler_output, text.text_embeds[:, 0], **CLOSE)
    torch.testing.assert_close(texts.last_hidden_state[mask.bool()], text.last_hidden_state[mask.bool()], **CLOSE)


# --- Loading and conversion -------------------------------------------------------------------------------------------


def answers(model: QFormerForPretraining) -> tuple[torch.Tensor, torch.Tensor]:
    pictures = [tiny.picture(seed) for seed in range(3)]
    return model.similarity(pictures, tiny.CAPTIONS), model.match(pictures, tiny.CAPTIONS)


def test_a_retrieval_model_opens_with_its_processor_and_says_what_it_lacks(folder, log):
    logging.enable_propagation()
    model = QFormerForPretraining.from_pretrained(folder)
    logging.disable_propagation()
    assert "(`lm_head`) and the temperature (`logit_scale`) are newly initialised" in log.text
    assert "`itg_weight` is 0: with 0, the output layer is not trained" in log.text
    theirs = retrieval_model()
    inputs = model.processor(images=[tiny.picture()], text=tiny.CAPTIONS[:1])
    with torch.no_grad():
        expected = theirs(**inputs).logits_per_image
    torch.testing.assert_close(model.similarity(tiny.picture(), tiny.CAPTIONS[0]), expected, **CLOSE)
    assert model.logit_scale.exp().item() == pytest.approx(1 / 0.07)
    assert model.lm_head.decoder.weight is model.qformer.embeddings.word_embeddings.weight
    assert 0.01 < model.lm_head.dense.weight.std() < 0.03 and (model.lm_head.LayerNorm.weight == 1).all()
    names = [model.processor.tokenizer.convert_ids_to_tokens(i) for i in (model.config.bos_token_id,)]
    assert names == ["[DEC]"] and model.config.eos_token_id == model.processor.tokenizer.sep_token_id
    assert model.frozen_backbones() == ["vision_model"]
    model.train()
    loss = model(**model.processor(images=[tiny.picture(), tiny.picture(1)], text=tiny.CAPTIONS[:2])).loss
    loss.backward()
    assert loss.isfinite() and model.logit_scale.grad is not None


def test_the_processor_is_read_from_where_the_weights_are(folder, tmp_path, monkeypatch):
    places = {"token": "hf_abc", "cache_dir": str(tmp_path / "cache"), "local_files_only": True, "subfolder": "source"}
    asked = []
    for loader in (AutoTokenizer, AutoImageProcessor):

        def from_pretrained(source, load=loader.from_pretrained, **kwargs):
            asked.append({name: kwargs.get(name) for name in places})
            return load(source, **kwargs)

        monkeypatch.setattr(loader, "from_pretrained", from_pretrained)
    model = QFormerForPretraining.from_pretrained(folder.parent, **places)
    assert asked == [places, places]
    assert model.similarity(tiny.picture(), tiny.CAPTIONS[0]).isfinite()


def test_a_new_output_layer_for_texts_is_trained_only_if_asked_for(folder, tmp_path):
    convert(folder, tmp_path / "ours")
    for place in (folder, tmp_path / "ours"):
        model = QFormerForPretraining.from_pretrained(place)
        assert (model.config.itc_weight, model.config.itm_weight, model.config.itg_weight) == (1, 1, 0)
    assert QFormerForPretraining.from_pretrained(folder, itg_weight=0.5).config.itg_weight == 0.5


@pytest.mark.parametrize("include_backbones", [False, True])
def test_a_converted_model_gives_the_same_answers(folder, include_backbones, tmp_path):
    expected = answers(QFormerForPretraining.from_pretrained(folder))
    convert(folder, tmp_path / "ours", include_backbones=include_backbones)
    model = QFormerForPretraining.from_pretrained(tmp_path / "ours")
    torch.testing.assert_close(answers(model), expected, rtol=0, atol=0)
    assert model.config.referenced_backbones == ([] if include_backbones else ["vision_model"])
    if include_backbones:
        folder.rename(tmp_path / "elsewhere")
    opened = AutoModel.from_pretrained(tmp_path / "ours")
    torch.testing.assert_close(answers(opened), expected, rtol=0, atol=0)


def test_bfloat16_is_kept(tmp_path):
    theirs = retrieval_model().bfloat16()
    theirs.save_pretrained(tmp_path / "source")
    for name in ("source", "ours"):
        model = QFormerForPretraining.from_pretrained(tmp_path / name)
        assert {weight.dtype for name, weight in model.named_parameters() if "logit" not in name} == {torch.bfloat16}
        assert model.logit_scale.dtype == torch.float32
        pixels, ids = tiny.images(), torch.randint(3, WORDS, (3, 6))
        with torch.no_grad():
            expected = theirs(pixels.bfloat16(), ids, torch.ones_like(ids)).logits_per_image
            found = model.get_image_features(pixels).pooler_output @ model.get_text_features(ids).pooler_output.T
        torch.testing.assert_close(found.amax(dim=1), expected, atol=0.05, rtol=0.05)
        if name == "source":
            convert(tmp_path / "source", tmp_path / "ours")


def test_a_checkpoint_without_a_word_for_the_start_of_captions_gets_one(folder, tmp_path):
    tokens = len(tiny.text_tokenizer())
    retrieval_model(vocab_size=tokens).save_pretrained(folder)
    model = QFormerForPretraining.from_pretrained(folder)
    assert model.config.bos_token_id == tokens
    assert model.qformer.config.vocab_size == model.lm_head.decoder.out_features == tokens + 1
    model.save_pretrained(tmp_path / "ours")
    assert torch.equal(
        QFormerForPretraining.from_pretrained(tmp_path / "ours").state_dict()["lm_head.decoder.weight"],
        model.lm_head.decoder.weight,
    )


def test_what_is_not_a_model_of_stage_1_is_refused(tmp_path):
    load = QFormerForPretraining.from_pretrained
    config = Blip2Config(vision_config=VISION, qformer_config=QFORMER, text_config=tiny.text_config("gpt2"))
    config.architectures = ["Blip2ForConditionalGeneration"]
    config.save_pretrained(tmp_path / "blip2")
    with pytest.raises(OSError, match="holds a model of the type 'blip-2' and not a Q-Former in pretraining"):
        load(tmp_path / "blip2")
    QFormerModel(tiny.pretraining_model().qformer.config).save_pretrained(tmp_path / "former")
    with pytest.raises(OSError, match="holds a Q-Former alone.*`qformer-captioner convert` wrote.*convert that again"):
        load(tmp_path / "former")


def test_a_damaged_retrieval_model_is_not_converted(tmp_path):
    theirs = retrieval_model()
    weights = {name: weight for name, weight in theirs.state_dict().items() if name != "itm_head.weight"}
    theirs.save_pretrained(tmp_path / "source", state_dict=weights)
    with pytest.raises(InputError, match="lacks 'itm_head.weight', so it cannot be converted"):
        convert(tmp_path / "source", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


# --- Stage 2 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["a retrieval model", "a model of stage 1"])
@pytest.mark.parametrize("load", [load_qformer, QFormerModel.from_pretrained])
def test_stage_2_begins_with_the_q_former_without_its_text_part(folder, form, load, log, backbones, tmp_path):
    if form == "a model of stage 1":
        QFormerForPretraining.from_pretrained(folder).save_pretrained(tmp_path / "ours")
        folder = tmp_path / "ours"
    stage_1 = QFormerForPretraining.from_pretrained(folder)
    logging.enable_propagation()
    log.clear()
    qformer = load(folder)
    logging.disable_propagation()
    assert [record.levelname for record in log.records] == ["INFO"]
    assert "without its text part" in log.text
    assert not qformer.config.use_qformer_text_input
    features = torch.randn(2, 5, VISION["hidden_size"])
    expected = stage_1.get_image_features(image_embeds=features).last_hidden_state
    torch.testing.assert_close(qformer(features).last_hidden_state, expected, **CLOSE)
    model = QFormerCaptioner.from_backbones(*backbones, qformer=qformer)
    assert model.processor.qformer_tokenizer is None


@pytest.mark.parametrize("load", [load_qformer, QFormerModel.from_pretrained])
def test_stage_2_can_keep_the_text_part(folder, load, tmp_path):
    stage_1 = QFormerForPretraining.from_pretrained(folder)
    stage_1.save_pretrained(tmp_path / "ours")
    qformer = load(tmp_path / "ours", use_qformer_text_input=True)
    for name, weight in stage_1.qformer.state_dict().items():
        assert torch.equal(qformer.state_dict()[name], weight), name
    tokenizer = load_qformer_tokenizer(qformer.config.vocab_size, qformer=tmp_path / "ours")
    assert tokenizer("a star").input_ids == stage_1.processor.tokenizer("a star").input_ids
