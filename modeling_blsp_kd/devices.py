"""Differences between devices: where float64 can be computed, and which dtype is fast.

Apple's MPS and some Intel GPUs have no float64. There, the few functions that need it run on the CPU, so that their
results are the same on every device; what they read and write is small. Leaves out: operations that a device lacks
altogether, for which PyTorch has its own fallback (PYTORCH_ENABLE_MPS_FALLBACK).
"""

import dataclasses
import functools

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
    """Return the dtype to load a model in: the one asked for, else the fast one on the device, with a line in the log.

    That is float32 on a CPU, and "auto", the dtype that a model is stored in, on all other devices. Many models are
    stored in half precision, which most CPUs convert back and forth at every step.

    Args:
        dtype (`torch.dtype` or `str`, *optional*): what a user asked for.
        device (`torch.device`, *optional*): omitted, the accelerator of this machine, or its CPU if it has none.
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


def computes_in_float64(function):
    """Decorate a function that computes in float64, so that it also serves tensors of a device without it.

    The device is that of the first argument. If it has no float64, all tensors among the arguments go to the CPU, and
    those of the result come back, both also inside data classes. Gradients follow.
    """

    @functools.wraps(function)
    def run(first, *args, **kwargs):
        device, exact = first.device, float64_device(first.device)
        if exact == device:
            return function(first, *args, **kwargs)
        args = [_moved(value, exact) for value in (first, *args)]
        kwargs = {name: _moved(value, exact) for name, value in kwargs.items()}
        return _moved(function(*args, **kwargs), device)

    return run


def _moved(value, device: torch.device):
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_moved(item, device) for item in value)
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        return dataclasses.replace(value, **{name: _moved(getattr(value, name), device) for name in names})
    return value
