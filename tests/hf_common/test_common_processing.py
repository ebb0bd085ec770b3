"""transformers' common tests of processors, with an LLM's chat template and with none.

Leaves out: images and videos, which the processor does not take.
"""

import unittest
from itertools import chain
from unittest.mock import patch

import pytest
from transformers import WhisperFeatureExtractor
from transformers_tests.test_processing_common import ProcessorTesterMixin

from processing import BlspKdProcessor
from processing.chat_templates import FLATTEN_CONTENT, PLAIN_TEMPLATE
from processing.processing_blsp_kd import AUDIO_TOKEN
from tests.helpers.prompts import CHAT_TEMPLATE, make_tokenizer
from tests.hf_common.plugin import skip

pytestmark = pytest.mark.hf_common

VIDEO_OPTIONS = ("num_frames", "fps")
apply_chat_template = BlspKdProcessor.apply_chat_template


def apply_in_our_terms(self, conversations, *args, processor_kwargs=None, **kwargs):
    """Without options for video, and with files as `path`."""
    processor_kwargs = {name: value for name, value in (processor_kwargs or {}).items() if name not in VIDEO_OPTIONS}
    for message in chain.from_iterable(conversations):
        for block in message["content"]:
            if "url" in block:
                block["path"] = block.pop("url")
    return apply_chat_template(self, conversations, *args, processor_kwargs=processor_kwargs, **kwargs)


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

    def _test_apply_chat_template(self, *args):
        # The test gives every processor options for video, and ours refuses what it does not know. It names files as
        # `url`, which ours takes for what a stranger wrote.
        with patch.object(BlspKdProcessor, "apply_chat_template", apply_in_our_terms):
            super()._test_apply_chat_template(*args)

    test_chat_template_audio_sampling_rate = skip(
        "the processor reads audio itself, on calls too, and warns about arrays without a rate, so a chat without a "
        "rate must not have one filled in"
    )


class ChatTemplateProcessorTest(CommonProcessorTests, unittest.TestCase):
    text_template = CHAT_TEMPLATE


class PlainTemplateProcessorTest(CommonProcessorTests, unittest.TestCase):
    text_template = PLAIN_TEMPLATE
