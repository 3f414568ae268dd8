"""The common tests of transformers on the processor."""

import unittest

from qformer_captioner import QFormerCaptionerProcessor

from ..fixtures import tiny
from . import decisions, suite

common = suite.load("test_processing_common")


@decisions.skip(decisions.PROCESSOR)
class ProcessorTest(common.ProcessorTesterMixin, unittest.TestCase):
    processor_class = QFormerCaptionerProcessor

    @classmethod
    def _setup_tokenizer(cls):
        return tiny.tokenizer()

    @classmethod
    def _setup_image_processor(cls):
        return tiny.image_processor()
