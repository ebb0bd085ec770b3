"""The dtypes of a model's parts, kept by its full checkpoints: what was trained is float32, often beside a half LLM.

transformers loads a checkpoint in one dtype, that of its config or the one asked for, and so would round what was
trained or double the memory of the LLM. But it leaves a weight in the dtype that the built model has for it. So the
config of a checkpoint names the dtype of each part, and the model is built accordingly. Leaves out: thin checkpoints,
which fetch each backbone in its own dtype (`thin_checkpoints.py`).
"""

import copy
import functools

import torch
from transformers import PreTrainedConfig
from transformers.integrations import is_deepspeed_zero3_enabled

from .plora import ADAPTER_NAME

PARTS = ("audio_tower", "adapter", "language_model", "plora")


def part_of(name: str) -> str:
    """Return which of `PARTS` the weight `name` belongs to."""
    return "plora" if f".{ADAPTER_NAME}." in name else name.split(".")[0]


def dtypes_of_parts(state_dict: dict[str, torch.Tensor]) -> dict[str, str] | None:
    """Return the dtype of each part by name: the widest of its floating point weights. None if all are of one dtype."""
    found = {}
    for name, tensor in state_dict.items():
        if tensor.is_floating_point():
            found.setdefault(part_of(name), set()).add(tensor.dtype)
    if len(set().union(*found.values())) <= 1:
        return None
    return {part: str(functools.reduce(torch.promote_types, dtypes))[6:] for part, dtypes in found.items()}


def build_in(model, part_dtypes: dict[str, str] | None):
    """Give the weights of a model without contents the dtypes of a checkpoint's config."""
    if part_dtypes is None or is_deepspeed_zero3_enabled():  # which holds shares of weights, in a dtype of its own
        return
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and part_of(name) in part_dtypes:
            tensor.data = tensor.data.to(getattr(torch, part_dtypes[part_of(name)]))


def without_part_dtypes_if_told(kwargs: dict) -> dict:
    """Return the arguments of `from_pretrained`, by which an explicit dtype is that of all parts."""
    if all(kwargs.get(name) in (None, "auto") for name in ("dtype", "torch_dtype")):
        return kwargs
    config = kwargs.get("config")
    if not isinstance(config, PreTrainedConfig):
        return {**kwargs, "part_dtypes": None}
    config = copy.deepcopy(config)
    config.part_dtypes = None
    return {**kwargs, "config": config}
