"""The common tests of transformers on captioners and Q-Formers, and on BLIP-2 beside them."""

import unittest

from transformers import Blip2Config, Blip2ForConditionalGeneration

from qformer_captioner import (
    QFormerCaptioner,
    QFormerCaptionerConfig,
    QFormerConfig,
    QFormerForPretraining,
    QFormerModel,
    QFormerPretrainingConfig,
)

from . import decisions, suite
from .testers import Blip2Tester, CaptionerTester, PretrainingTester, QFormerTester

modeling, configuration = suite.load("test_modeling_common"), suite.load("test_configuration_common")
PROMPT = dict(use_qformer_text_input=True, vocab_size=50, max_position_embeddings=16)


class ConfigurationTests:
    """The common tests of a configuration, which are one function in transformers."""

    config_class: type

    def test_config(self) -> None:
        fields = {} if self.config_class.sub_configs else {"hidden_size": 36}
        configuration.ConfigTester(
            self, config_class=self.config_class, has_text_modality=False, **fields
        ).run_common_tests()


@decisions.skip(decisions.CAPTIONER)
class CaptionerTests(ConfigurationTests, modeling.ModelTesterMixin, suite.GenerationTesterMixin):
    config_class = QFormerCaptionerConfig
    all_model_classes = (QFormerCaptioner,)
    _is_composite = True
    test_attention_outputs = False  # as for BLIP-2
    test_all_params_have_gradient = False  # CLIP's last norm belongs to its pooled output, which captions do not need
    test_can_init_all_missing_weights_before_2023 = True


class LlamaTest(CaptionerTests, unittest.TestCase):
    def setUp(self) -> None:
        self.model_tester = CaptionerTester(self, "llama")


class OptTest(CaptionerTests, unittest.TestCase):
    def setUp(self) -> None:
        self.model_tester = CaptionerTester(self, "opt")


class T5Test(CaptionerTests, unittest.TestCase):
    def setUp(self) -> None:
        self.model_tester = CaptionerTester(self, "t5")


class BartTest(CaptionerTests, unittest.TestCase):
    def setUp(self) -> None:
        self.model_tester = CaptionerTester(self, "bart")


class PromptTest(CaptionerTests, unittest.TestCase):
    def setUp(self) -> None:
        self.model_tester = CaptionerTester(self, "gpt2", **PROMPT)


class ProjectionPerQueryTest(CaptionerTests, unittest.TestCase):
    def setUp(self) -> None:
        self.model_tester = CaptionerTester(self, "gpt2", projection_per_query=True)


class QFormerTests(ConfigurationTests, modeling.ModelTesterMixin):
    config_class = QFormerConfig
    all_model_classes = (QFormerModel,)
    additional_model_inputs = ["input_ids"]
    test_can_init_all_missing_weights_before_2023 = True


@decisions.skip(decisions.WITHOUT_PROMPT)
class QFormerTest(QFormerTests, unittest.TestCase):
    def setUp(self) -> None:
        self.model_tester = QFormerTester(self)


class PromptQFormerTest(QFormerTests, unittest.TestCase):
    def setUp(self) -> None:
        self.model_tester = QFormerTester(self, **PROMPT)


@decisions.skip(decisions.PRETRAINING)
class PretrainingTest(ConfigurationTests, modeling.ModelTesterMixin, suite.GenerationTesterMixin, unittest.TestCase):
    config_class = QFormerPretrainingConfig
    all_model_classes = (QFormerForPretraining,)
    _is_composite = True
    test_attention_outputs = False
    test_all_params_have_gradient = False  # CLIP's last norm belongs to its pooled output, which nothing needs
    test_can_init_all_missing_weights_before_2023 = True

    def setUp(self) -> None:
        self.model_tester = PretrainingTester(self)


@decisions.skip(decisions.AS_BLIP2)
class Blip2Tests(ConfigurationTests, modeling.ModelTesterMixin, suite.GenerationTesterMixin):
    config_class = Blip2Config
    all_model_classes = (Blip2ForConditionalGeneration,)
    additional_model_inputs = ["input_ids"]
    _is_composite = True
    test_attention_outputs = False


class Blip2OptTest(Blip2Tests, unittest.TestCase):
    def setUp(self) -> None:
        self.model_tester = Blip2Tester(self, "opt")


@decisions.skip(decisions.EAGER_AND_SDPA)
class Blip2T5Test(Blip2Tests, unittest.TestCase):
    def setUp(self) -> None:
        self.model_tester = Blip2Tester(self, "t5")
