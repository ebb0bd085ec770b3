"""Devices without float64, the dtype that is chosen for a device, and the check of a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from modeling_blsp_kd.devices import float64_device

TESTS = Path(__file__).parent


def test_float64_is_computed_on_the_device_where_it_exists():
    assert float64_device(torch.device("cuda", 1)) == torch.device("cuda", 1)
    assert float64_device(torch.device("cpu")) == torch.device("cpu")
    assert float64_device(torch.device("mps")) == torch.device("cpu")


def test_a_device_without_float64_does_all_that_the_cpu_does():
    """On a Mac, where the Trainer and pipelines take MPS by themselves, any prompt with audio failed in CIF."""
    checks = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", TESTS / "on_stand_in_device.py"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])},
        capture_output=True,
        text=True,
    )
    assert checks.returncode == 0, checks.stdout[-5000:]
