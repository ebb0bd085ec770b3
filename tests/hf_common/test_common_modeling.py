"""transformers' common tests of models, one class per configuration and layout.

Leaves out: `generate`, whose common tests the source distribution lacks.
"""

import unittest
from itertools import product
from unittest.mock import patch

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES
from transformers.testing_utils import set_config_for_less_flaky_test
from transformers_tests import test_modeling_common
from transformers_tests.generation.test_utils import GenerationTesterMixin
from transformers_tests.test_modeling_common import ModelTesterMixin

from modeling_blsp_kd import BlspKdConfig, BlspKdForCausalLM
from tests.hf_common.plugin import skip
from tests.hf_common.small_models import (
    GROWING,
    ONE_TO_ONE,
    REPEATED,
    SUBSAMPLED_GROWING,
    SUBSAMPLED_ONE,
    TEXT_ONLY,
    ModelTester,
)

pytestmark = pytest.mark.hf_common


def as_base_model():
    """Some tests silently pass over all classes that are not listed as base models."""
    return patch.dict(MODEL_MAPPING_NAMES, {BlspKdConfig.model_type: BlspKdForCausalLM.__name__})


def set_norms_of_sub_configs(config):
    """Raise the epsilons of all norms, as the tests do, but not in our own configuration, which refuses them."""
    for name in config.sub_configs:
        set_config_for_less_flaky_test(getattr(config, name))


class CommonModelTests(ModelTesterMixin, GenerationTesterMixin):
    tester_options = {}
    all_model_classes = (BlspKdForCausalLM,)
    _is_composite = True
    test_can_init_all_missing_weights_before_2023 = True  # decided by a copyright line that our files do without
    additional_model_inputs = ["input_features", "input_features_mask", "num_speech_tokens"]

    def setUp(self):
        self.model_tester = ModelTester(self, **self.tester_options)
        # The tests choose by class name who gets labels.
        names = {BlspKdConfig.model_type: BlspKdForCausalLM.__name__}
        self.enterContext(patch.dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, names))
        self.enterContext(
            patch.object(test_modeling_common, "set_config_for_less_flaky_test", set_norms_of_sub_configs)
        )

    def _audio_features_prepare_config_and_inputs(self):
        # A prompt of text has no clips, yet its model has ears.
        layout = self.model_tester.layout
        with patch.object(self.model_tester, "layout", REPEATED if layout == TEXT_ONLY else layout):
            config, inputs = super()._audio_features_prepare_config_and_inputs()
        config.audio_config = config.speech_config  # the name that the tests know
        return config, inputs

    def _audio_features_get_expected_num_attentions(self, model_tester=None):
        return self.model_tester.get_config().speech_config.encoder_layers

    test_model_base_model_prefix = skip(
        "the LLM keeps its own head, whatever its family, so this model holds no base model apart from a head"
    )

    def test_inputs_embeds_matches_input_ids(self):
        with as_base_model():
            super().test_inputs_embeds_matches_input_ids()

    def test_model_forward_default_config_values(self):
        with as_base_model():
            super().test_model_forward_default_config_values()


def add_test_class(name: str, **options):
    globals()[name] = type(name, (CommonModelTests, unittest.TestCase), {"tester_options": options})


for adapter, plora, family in product(("cformer", "subsampler"), (False, True), ("llama", "qwen3")):
    layout = REPEATED if adapter == "cformer" else SUBSAMPLED_ONE
    name = f"{adapter.title()}{'Plora' if plora else ''}{family.title()}Test"
    add_test_class(name, family=family, adapter=adapter, plora=plora, layout=layout)

for name, adapter, layout in (
    ("OneFiringTest", "cformer", ONE_TO_ONE),
    ("GrowingPromptTest", "cformer", GROWING),
    ("SubsampledGrowingPromptTest", "subsampler", SUBSAMPLED_GROWING),
):
    add_test_class(name, family="llama", adapter=adapter, plora=True, layout=layout)

add_test_class(
    "FrozenSpeechEncoderTest",
    family="llama",
    adapter="cformer",
    plora=True,
    layout=REPEATED,
    freeze_speech_encoder=True,
)


class TextOnlyTest(CommonModelTests, unittest.TestCase):
    tester_options = {"family": "llama", "adapter": "cformer", "plora": True, "layout": TEXT_ONLY}

    skip_training = skip("the LLM is frozen, and a prompt of text alone meets no parameter that is trained")
    test_training = skip_training
    test_retain_grad_hidden_states_attentions = skip_training
    skip_checkpointing = skip(
        "the test watches the first layer that can be checkpointed, which is the speech encoder's, and a prompt of "
        "text alone does not run it"
    )
    test_training_gradient_checkpointing = skip_checkpointing
    test_training_gradient_checkpointing_use_reentrant_false = skip_checkpointing
    test_training_gradient_checkpointing_use_reentrant_true = skip_checkpointing
