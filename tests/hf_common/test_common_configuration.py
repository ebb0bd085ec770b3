"""transformers' common tests of configurations, one class per adapter, with partial LoRA and without.

Leaves out: what is wrong with an option, which `test_configuration.py` covers.
"""

import unittest
from itertools import product

import pytest
from transformers_tests.test_configuration_common import ConfigTester

from modeling_blsp_kd import BlspKdConfig
from tests.hf_common.small_models import REPEATED, ModelTester

pytestmark = pytest.mark.hf_common

CHECKS = [name for name in dir(ConfigTester) if name.startswith(("create_and_test_", "check_"))]


class CommonConfigurationTests:
    tester_options = {}

    def setUp(self):
        self.model_tester = ModelTester(self, **self.tester_options, layout=REPEATED)
        options = {
            name: value
            for name, value in self.model_tester.get_config().to_dict().items()
            if name in ("adapter", "plora", "distillation", "freeze_speech_encoder", "audio_token_id")
        }
        self.config_tester = ConfigTester(self, config_class=BlspKdConfig, has_text_modality=False, **options)


def add_check(check: str):
    def test(self):
        getattr(self.config_tester, check)()

    setattr(CommonConfigurationTests, f"test_{check.removeprefix('create_and_test_')}", test)


for check in CHECKS:
    add_check(check)

for adapter, plora, family in product(("cformer", "subsampler"), (False, True), ("llama", "qwen3")):
    name = f"{adapter.title()}{'Plora' if plora else ''}{family.title()}ConfigurationTest"
    options = {"family": family, "adapter": adapter, "plora": plora}
    globals()[name] = type(name, (CommonConfigurationTests, unittest.TestCase), {"tester_options": options})
