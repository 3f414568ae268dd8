"""Configuration, processor and saved folders of pretraining, which share their code with captioners.

`Pair` has the parts that the shared code knows: a vision encoder, a Q-Former and a tied output layer.
"""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, BitsAndBytesConfig

from qformer_captioner import (
    QFormerCaptioner,
    QFormerCaptionerProcessor,
    QFormerModel,
    QFormerPretrainingConfig,
    QFormerPretrainingProcessor,
)
from qformer_captioner.backbones_qformer import VisionModelPlaceholder, load_backbone
from qformer_captioner.cards_qformer import PRETRAINING_CARD, PushWithPretrainingCard
from qformer_captioner.encoders_qformer import vision_model_from_config
from qformer_captioner.saving_qformer import QFormerPreTrainedModel

from ..fixtures import tiny

WORDS = 40


class Pair(PushWithPretrainingCard, QFormerPreTrainedModel):
    config_class = QFormerPretrainingConfig
    config: QFormerPretrainingConfig
    processor_class = QFormerPretrainingProcessor
    backbones = ("vision_model",)
    base_model_prefix = "pair"
    _tied_weights_keys = {"lm_head.weight": "qformer.embeddings.word_embeddings.weight"}

    def __init__(self, config, vision_model=None):
        super().__init__(config)
        dtype = getattr(torch, (config.dtypes or {}).get("vision_model", "float32"))
        self.vision_model = vision_model or vision_model_from_config(config.vision_config, dtype)
        self.qformer = QFormerModel._from_config(config.qformer_config)
        self.lm_head = nn.Linear(tiny.QFORMER_WIDTH, WORDS, bias=False)
        self.post_init()
        self._freeze()


def pair_of(vision: str) -> Pair:
    """Return a pair whose vision encoder is frozen and kept by reference, as `from_backbones` makes it."""
    torch.manual_seed(0)
    encoder = load_backbone("vision_model", vision)
    config = QFormerPretrainingConfig(
        vision_config=encoder.config,
        qformer_config=tiny.QFORMER | {"vocab_size": WORDS},
        vision_model_name_or_path=vision,
        freeze_vision_model=True,
    )
    model = Pair(config, encoder)
    model.processor = QFormerPretrainingProcessor(tiny.image_processor(), tiny.text_tokenizer())
    model._keep_by_reference(model.frozen_backbones())
    model._take_fingerprints(model.backbones)
    return model.eval()


@pytest.fixture(scope="module")
def vision(tmp_path_factory):
    return tiny.save_vision(tmp_path_factory.mktemp("vision"))


@pytest.fixture(scope="module")
def folder(vision, tmp_path_factory):
    """Folder of a pair that keeps its vision encoder by reference."""
    folder = tmp_path_factory.mktemp("pair")
    pair_of(vision).save_pretrained(folder)
    return folder


def parts_in(folder) -> set[str]:
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        return {name.partition(".")[0] for name in weights.keys()}  # noqa: SIM118


# --- Configuration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"itc_loss": "hinge"}, '`itc_loss` must be "softmax" or "sigmoid", got \'hinge\''),
        ({"itm_weight": -1}, "`itm_weight` must be a number of at least 0"),
        ({"itg_weight": float("nan")}, "`itg_weight` must be a number of at least 0"),
        ({"itc_weight": 0, "itm_weight": 0, "itg_weight": 0}, "All losses have the weight 0"),
        ({"label_smoothing": 1}, "`label_smoothing` must be at least 0 and below 1"),
        ({"image_text_hidden_size": 0}, "`image_text_hidden_size` must be at least 1"),
        ({"qformer_config": {"window_size": 4}}, "cannot have a `window_size`"),
    ],
)
def test_fields_that_cannot_train_are_refused(fields, message):
    with pytest.raises(Exception, match=message):
        QFormerPretrainingConfig(**fields)


def test_the_q_former_reads_texts():
    config = QFormerPretrainingConfig(qformer_config={"use_qformer_text_input": False})
    assert config.qformer_config.use_qformer_text_input


def test_the_scale_of_similarities_begins_as_in_the_paper_of_the_loss():
    scales = [QFormerPretrainingConfig(itc_loss=loss).logit_scale_init_value for loss in ("softmax", "sigmoid")]
    assert np.exp(scales) == pytest.approx([1 / 0.07, 10])


def test_auto_config_opens_a_folder(folder):
    config = AutoConfig.from_pretrained(folder)
    assert type(config) is QFormerPretrainingConfig
    assert config.auto_map["AutoModel"] == "pretraining_qformer.QFormerForPretraining"


# --- Folders ----------------------------------------------------------------------------------------------------------


def test_a_frozen_encoder_is_kept_by_reference_and_fetched(folder, vision):
    saved, loaded = pair_of(vision), Pair.from_pretrained(folder)
    assert parts_in(folder) == {"qformer"}
    assert loaded.frozen_backbones() == loaded.config.referenced_backbones == ["vision_model"]
    for name, weight in saved.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name


def test_a_self_contained_folder_needs_no_encoder(vision, tmp_path):
    model = pair_of(vision)
    model.config.vision_model_name_or_path = "/nowhere"
    model.save_pretrained(tmp_path, include_backbones=True)
    loaded = Pair.from_pretrained(tmp_path)
    assert parts_in(tmp_path) == {"vision_model", "qformer"}
    assert loaded.config.referenced_backbones == []
    assert torch.equal(loaded.vision_model.state_dict().popitem()[1], model.vision_model.state_dict().popitem()[1])


def test_a_changed_encoder_is_saved(vision, tmp_path):
    model = pair_of(vision)
    for weight in model.vision_model.parameters():
        weight.data += 1
    model.save_pretrained(tmp_path)
    assert parts_in(tmp_path) == {"vision_model", "qformer"}


def test_the_output_layer_is_the_embedding_after_loading(folder):
    model = Pair.from_pretrained(folder)
    assert model.lm_head.weight is model.qformer.embeddings.word_embeddings.weight


def test_the_encoder_can_stay_out_of_memory_until_it_is_needed(folder, vision):
    model = Pair.from_pretrained(folder, load_vision_model=False)
    assert isinstance(model.vision_model, VisionModelPlaceholder)
    model.load_vision_model()
    expected = pair_of(vision).vision_model.state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in model.vision_model.state_dict().items())


def test_each_part_keeps_its_dtype(vision, tmp_path):
    model = pair_of(vision)
    model.vision_model.to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert Pair.from_pretrained(tmp_path).vision_model.dtype == torch.bfloat16


def test_a_frozen_encoder_stays_in_evaluation_mode(folder):
    model = Pair.from_pretrained(folder).train()
    assert model.qformer.training and not model.vision_model.training


def test_the_processor_is_saved_and_loaded(folder):
    processor = Pair.from_pretrained(folder).processor
    assert type(processor) is QFormerPretrainingProcessor
    assert processor.tokenizer.bos_token == "[DEC]"


def test_backbones_of_captioners_are_unknown(vision, tmp_path):
    with pytest.raises(ValueError, match=r"names \['language_model'\]; the backbones are \['vision_model'\]"):
        pair_of(vision).save_pretrained(tmp_path, include_backbones=["language_model"])


def test_quantisation_is_refused(folder):
    with pytest.raises(TypeError, match="Q-Former in pretraining has no language model"):
        Pair.from_pretrained(folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True))


def test_a_captioner_is_not_pretraining_and_the_reverse(folder, tmp_path):
    with pytest.raises(OSError, match=r"not a captioner: load it with `QFormerForPretraining`.*--qformer_name_or_path"):
        QFormerCaptioner.from_pretrained(folder)
    tiny.captioner().config.save_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"holds a captioner and not .*: load it with `QFormerCaptioner`\.$"):
        Pair.from_pretrained(tmp_path)


def test_a_card_shows_how_to_compare(monkeypatch, tmp_path, vision):
    model = pair_of(vision)
    assert (model.card_template, model.pipeline_tag) == (PRETRAINING_CARD, None)
    assert 'model.similarity("image.png", texts)' in PRETRAINING_CARD


# --- Processor --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def processor():
    return QFormerPretrainingProcessor(tiny.image_processor(), tiny.text_tokenizer())


def test_texts_are_between_cls_and_sep_and_padded_on_the_right(processor):
    batch = processor(text=["a green heart", "a star"])
    ids = [row[mask.bool()].tolist() for row, mask in zip(batch.input_ids, batch.attention_mask, strict=True)]
    texts = [processor.tokenizer.convert_ids_to_tokens(row) for row in ids]
    assert texts == [["[CLS]", "a", "green", "heart", "[SEP]"], ["[CLS]", "a", "star", "[SEP]"]]
    assert batch.attention_mask[1].tolist() == [1, 1, 1, 1, 0]


def test_texts_and_images_differ_in_number(processor):
    batch = processor([tiny.picture(0), tiny.picture(1)], "a star")
    assert (batch.pixel_values.shape, batch.input_ids.shape) == ((2, 3, 32, 32), (1, 4))


def test_images_become_those_of_a_captioner(processor):
    ours, theirs = (
        each(tiny.picture()).pixel_values
        for each in (processor, QFormerCaptionerProcessor(tiny.image_processor(), tiny.tokenizer()))
    )
    assert torch.equal(ours, theirs)


def test_rows_of_features_are_padded(processor):
    batch = processor(image_embeds=[np.ones((3, 4)), np.ones((2, 4))])
    assert batch.image_embeds.shape == (2, 3, 4)
    assert batch.image_attention_mask.tolist() == [[True] * 3, [True, True, False]]
    assert "input_ids" not in batch


def test_max_length_counts_cls_and_sep(processor):
    text = " ".join(["a star"] * 400)
    assert processor(text=text).input_ids.shape == (1, 802)
    cut = processor(text=text, max_length=5).input_ids[0]
    assert processor.tokenizer.convert_ids_to_tokens(cut) == ["[CLS]", "a", "star", "a", "[SEP]"]


def test_special_tokens_in_a_text_are_not_special(processor):
    ids = processor(text="a [SEP] star [DEC]").input_ids[0, 1:-1].tolist()
    assert not {processor.tokenizer.sep_token_id, processor.tokenizer.bos_token_id} & set(ids)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "There is nothing to process"),
        ({"text": []}, ValueError, "`text` is an empty list"),
        ({"text": ["a star", 3]}, TypeError, "entry 2 is 3"),
        ({"text": 3}, TypeError, "`text` must be a string or a list of strings, not 3"),
        ({"text": "a star", "max_length": 2}, ValueError, "`max_length` must be at least 3"),
        ({"images": tiny.picture(), "image_embeds": torch.ones(2, 3)}, ValueError, "not both"),
    ],
)
def test_inputs_that_cannot_be_processed_are_refused(processor, arguments, error, message):
    with pytest.raises(error, match=message):
        processor(**arguments)


def test_a_tokenizer_without_cls_is_refused():
    with pytest.raises(ValueError, match="needs a `cls_token`"):
        QFormerPretrainingProcessor(tiny.image_processor(), tiny.tokenizer())


def test_a_saved_processor_gives_the_same_tokens(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "processor_config.json").read_text())["num_frames"] == 1
    loaded = QFormerPretrainingProcessor.from_pretrained(tmp_path)
    assert torch.equal(loaded(text=tiny.CAPTIONS).input_ids, processor(text=tiny.CAPTIONS).input_ids)
