"""Q-Formers of BLIP-2, InstructBLIP and BERT checkpoints between other backbones."""

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, BertTokenizer
from transformers.utils import logging

from qformer_captioner import QFormerCaptioner
from qformer_captioner.common.errors import InputError
from qformer_captioner.hub.convert import load_qformer, load_qformer_tokenizer
from qformer_captioner.training.from_scratch import train_tokenizer

from ..fixtures import tiny
from .test_convert import inputs, source


@pytest.fixture
def bert(tmp_path) -> str:
    """Return the folder of a BERT with its tokenizer."""
    folder = tmp_path / "bert"
    folder.mkdir()
    (folder / "words.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]))
    BertTokenizer(vocab=str(folder / "words.txt")).save_pretrained(folder)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40, vocab_size=13)
    BertModel(BertConfig(**sizes, max_position_embeddings=20, initializer_range=0.2)).save_pretrained(folder)
    return str(folder)


def test_the_q_former_of_a_blip2_joins_another_language_model(backbones, tmp_path):
    model = source("blip2", "opt")
    model.save_pretrained(tmp_path / "source")
    ours = QFormerCaptioner.from_backbones(*backbones, qformer=load_qformer(tmp_path / "source"))
    features = torch.randn(2, 5, 24)  # both vision encoders have the same width
    queries = model.query_tokens.expand(2, -1, -1)
    expected = model.qformer(query_embeds=queries, encoder_hidden_states=features).last_hidden_state
    torch.testing.assert_close(ours.qformer(features).last_hidden_state, expected, atol=1e-5, rtol=0)
    assert ours.language_projection.weight.shape[0] == tiny.TEXT_WIDTH


def test_vision_encoder_and_q_former_of_a_blip2_join_another_language_model(backbones, tmp_path):
    model = source("instructblip", "opt")
    model.save_pretrained(tmp_path / "source")
    tiny.image_processor().save_pretrained(tmp_path / "source")
    words = " ".join(f"word{i} word{i}" for i in range(60))
    train_tokenizer([words], vocab_size=50).save_pretrained(tmp_path / "source" / "qformer_tokenizer")
    qformer = load_qformer(tmp_path / "source")
    tokenizer = load_qformer_tokenizer(qformer.config.vocab_size, qformer=tmp_path / "source")
    ours = QFormerCaptioner.from_backbones(
        tmp_path / "source", backbones[1], qformer=qformer, qformer_tokenizer=tokenizer
    )
    batch = inputs("instructblip")
    features = model.vision_model(batch["pixel_values"]).last_hidden_state
    torch.testing.assert_close(ours.encode_images(batch["pixel_values"]).last_hidden_state, features, atol=1e-6, rtol=0)
    ours.save_pretrained(tmp_path / "ours")  # keeps the vision encoder of that folder by reference
    loaded = QFormerCaptioner.from_pretrained(tmp_path / "ours")
    assert torch.equal(loaded(**batch).logits, ours(**batch).logits)


def test_cross_attention_to_another_vision_encoder_is_newly_initialised_with_a_warning(backbones, tmp_path, caplog):
    model = source("blip2", "opt")
    model.config.vision_config.hidden_size = model.config.qformer_config.encoder_hidden_size = 40
    for layer in (0, 2):
        attention = model.qformer.encoder.layer[layer].crossattention.attention
        attention.key, attention.value = nn.Linear(40, 32), nn.Linear(40, 32)
    model.vision_model = nn.Identity()
    model.save_pretrained(tmp_path / "source")
    qformer = load_qformer(tmp_path / "source")
    assert qformer.config.encoder_hidden_size == 40
    expected = {name: weight.clone() for name, weight in qformer.state_dict().items()}
    logging.enable_propagation()
    ours = QFormerCaptioner.from_backbones(*backbones, qformer=qformer)
    logging.disable_propagation()
    assert "4 of its weights are newly initialised" in caplog.text
    for name, weight in ours.qformer.state_dict().items():
        if name.endswith(("crossattention.attention.key.weight", "crossattention.attention.value.weight")):
            assert weight.shape == (32, tiny.VISION_WIDTH) and weight.std() > 0.01
        else:
            assert torch.equal(weight, expected[name]), name


def test_fields_that_contradict_the_checkpoint_are_refused(backbones, tmp_path):
    source("blip2", "opt").save_pretrained(tmp_path / "source")
    with pytest.raises(InputError, match=r"'query_tokens' of shape \(1, 4, 32\), but the fields ask for \(1, 9, 32\)"):
        load_qformer(tmp_path / "source", num_query_tokens=9)
    with pytest.raises(TypeError, match=r"pass \['num_query_tokens'\] to `load_qformer`"):
        QFormerCaptioner.from_backbones(*backbones, qformer=load_qformer(tmp_path / "source"), num_query_tokens=9)


def captioner_from_bert(backbones: tuple[str, str], bert: str) -> QFormerCaptioner:
    qformer, tokenizer = load_qformer(bert, num_query_tokens=3), load_qformer_tokenizer(13, name=bert)
    return QFormerCaptioner.from_backbones(*backbones, qformer=qformer, qformer_tokenizer=tokenizer)


def test_the_layers_of_a_bert_initialise_those_of_queries_and_text(backbones, bert):
    ours = captioner_from_bert(backbones, bert)
    theirs = BertModel.from_pretrained(bert)
    layer, other = ours.qformer.encoder.layer[1], theirs.encoder.layer[1]
    assert torch.equal(layer.attention.attention.query.weight, other.attention.self.query.weight)
    assert torch.equal(layer.intermediate.dense.weight, other.intermediate.dense.weight)
    assert torch.equal(layer.intermediate_query.dense.weight, other.intermediate.dense.weight)
    assert torch.equal(ours.qformer.embeddings.word_embeddings.weight, theirs.embeddings.word_embeddings.weight)
    inputs = ours.processor(images=[tiny.picture(), tiny.picture(1)], text=["a b", "c"])
    assert inputs["qformer_input_ids"].tolist() == [[2, 5, 6, 3], [2, 7, 3, 0]]
    assert ours(**inputs).soft_prompt.shape == (2, 3, tiny.TEXT_WIDTH)


def test_a_fresh_q_former_that_reads_text_takes_the_tokenizer_it_is_given(backbones, bert):
    fields = tiny.QFORMER | dict(use_qformer_text_input=True, vocab_size=13)
    tokenizer = load_qformer_tokenizer(13, name=bert)
    ours = QFormerCaptioner.from_backbones(*backbones, qformer_tokenizer=tokenizer, **fields)
    assert ours.processor(images=tiny.picture(), text="a b")["qformer_input_ids"].tolist() == [[2, 5, 6, 3]]
    with pytest.raises(ValueError, match="The Q-Former reads the prompt: pass its tokenizer as `qformer_tokenizer`"):
        QFormerCaptioner.from_backbones(*backbones, **fields)


def test_a_tokenizer_that_does_not_fit_the_q_former_is_refused(bert):
    with pytest.raises(OSError, match="cannot be loaded from '/nowhere': name one with `qformer_tokenizer`"):
        load_qformer_tokenizer(13, name="/nowhere")
    with pytest.raises(OSError, match="cannot be loaded from .*it has 13 tokens"):
        load_qformer_tokenizer(99, name=bert)


def test_the_q_formers_tokenizer_is_saved_and_loaded(backbones, bert, tmp_path):
    ours = captioner_from_bert(backbones, bert)
    ours.save_pretrained(tmp_path / "ours", include_backbones=True)
    loaded = QFormerCaptioner.from_pretrained(tmp_path / "ours")
    picture = tiny.picture()
    assert loaded.processor.qformer_tokenizer("a b").input_ids == [2, 5, 6, 3]
    for prompt in ("a b", "c d e"):
        expected = ours(**ours.processor(images=picture, text=prompt)).soft_prompt
        assert torch.equal(loaded(**loaded.processor(images=picture, text=prompt)).soft_prompt, expected)
