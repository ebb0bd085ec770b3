"""transformers' common tests of processors, with an LLM's chat template and with none.

Leaves out: images and videos, which the processor does not take.
"""

import unittest

import pytest
from conftest import CHAT_TEMPLATE, make_tokenizer
from transformers import WhisperFeatureExtractor
from transformers_tests.test_processing_common import ProcessorTesterMixin

from processing import BlspKdProcessor
from processing.processing_blsp_kd import AUDIO_TOKEN, FLATTEN_CONTENT, PLAIN_TEMPLATE

pytestmark = pytest.mark.hf_common


class CommonProcessorTests(ProcessorTesterMixin):
    # The mixin asks for the packages for pictures as a whole, and would skip all of its tests without them.
    __unittest_skip__ = False
    processor_class = BlspKdProcessor
    text_template = None

    @classmethod
    def _setup_feature_extractor(cls):
        return WhisperFeatureExtractor()

    @classmethod
    def _setup_tokenizer(cls):
        tokenizer = make_tokenizer()
        tokenizer.add_special_tokens({"additional_special_tokens": [AUDIO_TOKEN]})
        return tokenizer

    @classmethod
    def prepare_processor_dict(cls):
        return {"chat_template": FLATTEN_CONTENT.replace("AUDIO_TOKEN", AUDIO_TOKEN) + cls.text_template}

    # So do these two, which some tests call and then leave the result aside.
    def prepare_images_inputs(self, batch_size=None, nested=False):
        return None

    def prepare_videos_inputs(self, batch_size=None):
        return None


class ChatTemplateProcessorTest(CommonProcessorTests, unittest.TestCase):
    text_template = CHAT_TEMPLATE


class PlainTemplateProcessorTest(CommonProcessorTests, unittest.TestCase):
    text_template = PLAIN_TEMPLATE
