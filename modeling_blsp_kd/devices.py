"""Handle differences between devices: which compute float64, which dtype is fast, how many cores a process has.

Apple's MPS and some Intel GPUs have no float64. For them, the few functions that need it run on the CPU, so that their
results are the same on every device; their inputs and outputs are small. For operations that a device lacks, PyTorch
has its own fallback (PYTORCH_ENABLE_MPS_FALLBACK).
"""

import dataclasses
import functools
import os
from collections.abc import Callable

import torch
from transformers.utils import logging

logger = logging.get_logger(__name__)

WITHOUT_FLOAT64 = {"mps"}


def float64_device(device: torch.device) -> torch.device:
    """Return the device that computes float64 for tensors of `device`: itself, or the CPU if it has no float64."""
    lacks_float64 = device.type in WITHOUT_FLOAT64
    if device.type == "xpu":
        lacks_float64 = not torch.xpu.get_device_properties(device).has_fp64
    return torch.device("cpu") if lacks_float64 else device


def fast_dtype(dtype: torch.dtype | str | None = None, device: torch.device | None = None) -> torch.dtype | str:
    """Return the dtype to load a model in: the requested one, or the fast one on the device.

    The fast one is float32 on a CPU, which is logged, and "auto", the stored dtype, on all other devices. Many models
    are stored in half precision, which most CPUs convert back and forth at every step.

    Args:
        dtype (`torch.dtype` or `str`, *optional*): the dtype that the user requested.
        device (`torch.device`, *optional*): defaults to the accelerator of this machine, or its CPU if it has none.
    """
    if dtype is not None:
        return dtype
    on_cpu = not torch.accelerator.is_available() if device is None else device.type == "cpu"
    if not on_cpu:
        return "auto"
    logger.warning_once(
        "On a CPU models are loaded in float32, since half precision is several times slower on most. Ask for another "
        'dtype to overrule this; "auto" is what a model is stored in.'
    )
    return "float32"


def usable_cores() -> int:
    """Return the number of CPU cores that this process may use, of which `taskset` and containers may take some."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def computes_in_float64(function: Callable) -> Callable:
    """Decorate a function that computes in float64, so that it also accepts tensors on a device without float64.

    The first argument decides the device. If it has no float64, all tensors in the arguments are moved to the CPU, and
    those in the result are moved back, including tensors in tuples and data classes. Gradients flow through the moves.
    """

    @functools.wraps(function)
    def run(first, *args, **kwargs):
        device, exact = first.device, float64_device(first.device)
        if exact == device:
            return function(first, *args, **kwargs)
        moved = [_moved(value, exact) for value in (first, *args)]
        kwargs = {name: _moved(value, exact) for name, value in kwargs.items()}
        return _moved(function(*moved, **kwargs), device)

    return run


def _moved(value, device: torch.device):
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_moved(item, device) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        return dataclasses.replace(value, **{name: _moved(getattr(value, name), device) for name in names})
    return value
