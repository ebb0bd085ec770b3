"""transformers' common tests of training and of tensor parallelism, on text.

Leaves out: FSDP and expert parallelism, for which the configuration declares no plan.
"""

import unittest
from itertools import product
from unittest.mock import patch

import pytest
from hf_common.small_models import TEXT_ONLY, ModelTester
from transformers_tests import test_tensor_parallel_mixin
from transformers_tests.test_tensor_parallel_mixin import TensorParallelTesterMixin
from transformers_tests.test_training_mixin import TrainingTesterMixin

from modeling_blsp_kd import BlspKdForCausalLM

pytestmark = pytest.mark.hf_common


def unfrozen_model(config):
    """With the LLM trainable: it is all that a batch of text goes through, and is frozen by design."""
    model = BlspKdForCausalLM(config)
    model.language_model.requires_grad_(True)
    return model


class TextModelTester(ModelTester):
    def get_config(self):
        config = super().get_config()
        config.vocab_size = config.text_config.vocab_size  # where the training test looks for it
        return config


class CommonTrainingTests(TrainingTesterMixin):
    model_tester = None
    tester_options = {}
    all_model_classes = (BlspKdForCausalLM,)
    training_overfit_learning_rate = 1e-2

    def setUp(self):
        self.model_tester = TextModelTester(self, **self.tester_options, layout=TEXT_ONLY)

    def _get_trainable_model_class(self):
        return unfrozen_model


class CommonTensorParallelTests(TensorParallelTesterMixin):
    model_tester = None
    tester_options = {}
    all_model_classes = (BlspKdForCausalLM,)

    def setUp(self):
        self.model_tester = ModelTester(self, **self.tester_options, layout=TEXT_ONLY)
        # The mixin runs its distributed tests for a list of model types only.
        self.enterContext(patch.object(test_tensor_parallel_mixin, "TP_DISTRIBUTED_TEST_MODEL_TYPES", None))


for plora, family in product((False, True), ("llama", "qwen3")):
    options = {"tester_options": {"family": family, "adapter": "cformer", "plora": plora}}
    for kind in (CommonTrainingTests, CommonTensorParallelTests):
        name = f"{'Plora' if plora else 'Plain'}{family.title()}{kind.__name__.removeprefix('Common')[:-1]}"
        globals()[name] = type(name, (kind, unittest.TestCase), options)
