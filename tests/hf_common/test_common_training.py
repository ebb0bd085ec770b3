"""transformers' common tests of training and of tensor parallelism, on text.

Leaves out: FSDP and expert parallelism, for which the configuration declares no plan.
"""

import unittest
from itertools import product
from unittest.mock import patch

import pytest
from transformers_tests import test_tensor_parallel_mixin
from transformers_tests.test_tensor_parallel_mixin import TensorParallelTesterMixin
from transformers_tests.test_training_mixin import TrainingTesterMixin

from modeling_blsp_kd import BlspKdForCausalLM
from tests.hf_common.plugin import skip
from tests.hf_common.small_models import TEXT_ONLY, ModelTester

pytestmark = pytest.mark.hf_common


class UnfrozenModel(BlspKdForCausalLM):
    """With the LLM trainable: it is all that a batch of text goes through, and is frozen by design."""

    def freeze_backbones(self):
        self.requires_grad_(True)


class UnfrozenTester(ModelTester):
    causal_lm_class = UnfrozenModel


class TrainingTester(UnfrozenTester):
    def get_config(self):
        config = super().get_config()
        config.vocab_size = config.text_config.vocab_size  # where the training test looks for it
        return config


class CommonTrainingTests(TrainingTesterMixin):
    model_tester = None
    tester_options = {}
    training_overfit_learning_rate = 1e-2

    def setUp(self):
        self.model_tester = TrainingTester(self, **self.tester_options, layout=TEXT_ONLY)


class CommonTensorParallelTests(TensorParallelTesterMixin):
    model_tester = None
    tester_options = {}
    all_model_classes = (BlspKdForCausalLM,)

    def setUp(self):
        self.model_tester = UnfrozenTester(self, **self.tester_options, layout=TEXT_ONLY)
        # The mixin runs its distributed tests for a list of model types only.
        self.enterContext(patch.object(test_tensor_parallel_mixin, "TP_DISTRIBUTED_TEST_MODEL_TYPES", None))


class PartialLoraTensorParallelTests(CommonTensorParallelTests):
    skip_sharding = skip(
        "partial LoRA wraps the linear layers that the LLM's tensor parallel plan finds by name, so it is not sharded"
    )
    test_tp_forward_0 = skip_sharding
    test_tp_forward_1 = skip_sharding
    test_tp_backward = skip_sharding
    test_tp_generation = skip_sharding
    test_tp_generation_quantized = skip_sharding


for plora, family in product((False, True), ("llama", "qwen3")):
    options = {"tester_options": {"family": family, "adapter": "cformer", "plora": plora}}
    parallel = PartialLoraTensorParallelTests if plora else CommonTensorParallelTests
    for name, kind in (("Training", CommonTrainingTests), ("TensorParallel", parallel)):
        name = f"{'Plora' if plora else 'Plain'}{family.title()}{name}Test"
        globals()[name] = type(name, (kind, unittest.TestCase), options)
