"""Importing and loading take nothing along that they do not use."""

import subprocess
import sys

from tests.helpers.models import make_model

CHILD = """
import sys
import torch
import modeling_blsp_kd, processing
from modeling_blsp_kd import BlspKdForCausalLM

BlspKdForCausalLM.from_pretrained(sys.argv[1])
print(*sorted({name.split(".")[0] for name in sys.modules} & set(sys.argv[2:])))
from modeling_blsp_kd import BlspKdTrainer
print(BlspKdTrainer.__name__, "datasets" in sys.modules)
"""
NOT_NEEDED = ("peft", "bitsandbytes", "datasets", "pandas", "matplotlib", "gradio", "evaluate", "librosa", "torchcodec")


def test_nothing_heavy_is_imported_that_is_not_used(tmp_path):
    """A model without partial LoRA waited for PEFT and bitsandbytes, and all who import for what training takes."""
    make_model(plora=False).save_pretrained(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path), *NOT_NEEDED], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["", "BlspKdTrainer True"]
