"""Tiny configurations and inputs, in the form that the common tests of transformers ask for."""

import unittest
from typing import Any

import torch
from transformers import Blip2Config, PreTrainedConfig

from qformer_captioner import QFormerCaptionerConfig, QFormerConfig, QFormerPretrainingConfig

from ..fixtures import tiny

BATCH_SIZE, PROMPT_LENGTH, IMAGE_TOKENS = 3, 7, 5


class ModelTester:
    """Maker of the configuration and the inputs of one kind of model.

    The common tests read the attributes of a model that has layers; a captioner answers for its vision encoder.
    """

    is_training = True
    batch_size = BATCH_SIZE
    seq_length = PROMPT_LENGTH
    hidden_size = tiny.VISION_WIDTH
    num_hidden_layers = 2
    num_attention_heads = 4

    def __init__(self, parent: unittest.TestCase):
        self.parent = parent

    def get_config(self) -> PreTrainedConfig:
        raise NotImplementedError

    def get_inputs(self) -> dict[str, Any]:
        raise NotImplementedError

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict[str, Any]]:
        return self.get_config(), self.get_inputs()


def prompts(vocab_size: int = tiny.WORDS) -> dict[str, torch.Tensor]:
    """Return prompts of random tokens without padding."""
    input_ids = torch.randint(3, vocab_size, (BATCH_SIZE, PROMPT_LENGTH))
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


class CaptionerTester(ModelTester):
    """Tester of a captioner.

    Args:
        parent: the test case.
        language: language model, a key of `tiny.TEXT`.
        projection_per_query: whether each query has its own projection.
        qformer_fields: further fields of the Q-Former.
    """

    def __init__(
        self, parent: unittest.TestCase, language: str, projection_per_query: bool = False, **qformer_fields: Any
    ):
        super().__init__(parent)
        self.language, self.projection_per_query, self.qformer_fields = language, projection_per_query, qformer_fields

    def get_config(self) -> QFormerCaptionerConfig:
        return QFormerCaptionerConfig(
            vision_config=tiny.vision_config("clip"),
            text_config=tiny.text_config(self.language),
            qformer_config=tiny.QFORMER | self.qformer_fields,
            projection_per_query=self.projection_per_query,
        )

    def get_inputs(self) -> dict[str, Any]:
        inputs = {"pixel_values": torch.rand(BATCH_SIZE, 3, tiny.SIDE, tiny.SIDE), **prompts()}
        if self.qformer_fields.get("use_qformer_text_input"):
            words = prompts(self.qformer_fields["vocab_size"])
            inputs |= {"qformer_input_ids": words["input_ids"], "qformer_attention_mask": words["attention_mask"]}
        return inputs


class QFormerTester(ModelTester):
    """Tester of a Q-Former, with or without a prompt.

    Args:
        parent: the test case.
        fields: fields of the Q-Former.
    """

    hidden_size = tiny.QFORMER_WIDTH

    def __init__(self, parent: unittest.TestCase, **fields: Any):
        super().__init__(parent)
        self.fields = fields
        self.seq_length = tiny.QUERIES + (PROMPT_LENGTH if fields else 0)  # the prompt follows the queries

    def get_config(self) -> QFormerConfig:
        return QFormerConfig(encoder_hidden_size=tiny.VISION_WIDTH, **tiny.QFORMER, **self.fields)

    def get_inputs(self) -> dict[str, Any]:
        inputs = {"encoder_hidden_states": torch.rand(BATCH_SIZE, IMAGE_TOKENS, tiny.VISION_WIDTH)}
        return inputs | (prompts(self.fields["vocab_size"]) if self.fields else {})


class PretrainingTester(ModelTester):
    """Tester of a model of stage 1."""

    def get_config(self) -> QFormerPretrainingConfig:
        return tiny.pretraining_model("clip").config

    def get_inputs(self) -> dict[str, Any]:
        return {"pixel_values": torch.rand(BATCH_SIZE, 3, tiny.SIDE, tiny.SIDE), **prompts()}


class Blip2Tester(ModelTester):
    """Tester of transformers' BLIP-2, which shows that the harness itself fails nothing.

    Args:
        parent: the test case.
        language: language model, a key of `tiny.TEXT`.
    """

    def __init__(self, parent: unittest.TestCase, language: str):
        super().__init__(parent)
        self.language = language
        if not tiny.text_config(language).is_encoder_decoder:
            self.seq_length = tiny.QUERIES + PROMPT_LENGTH  # labels of a decoder-only model cover its inputs

    def get_config(self) -> Blip2Config:
        vision = dict(hidden_size=tiny.VISION_WIDTH, intermediate_size=40, image_size=tiny.SIDE, patch_size=16)
        qformer = dict(hidden_size=tiny.QFORMER_WIDTH, intermediate_size=40, vocab_size=tiny.WORDS)
        return Blip2Config(
            vision_config=vision | tiny.LAYERS,
            qformer_config=qformer | tiny.LAYERS | dict(encoder_hidden_size=tiny.VISION_WIDTH),
            text_config=tiny.text_config(self.language, pad_token_id=0).to_dict(),
            num_query_tokens=tiny.QUERIES,
            image_token_index=2,
        )

    def get_inputs(self) -> dict[str, Any]:
        images = torch.full((BATCH_SIZE, tiny.QUERIES), 2)
        input_ids = torch.cat([images, prompts()["input_ids"]], dim=1)
        inputs = {
            "pixel_values": torch.rand(BATCH_SIZE, 3, tiny.SIDE, tiny.SIDE),
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
        }
        if tiny.text_config(self.language).is_encoder_decoder:
            words = prompts()["input_ids"]
            inputs |= {"decoder_input_ids": words, "decoder_attention_mask": torch.ones_like(words), "labels": words}
        return inputs
