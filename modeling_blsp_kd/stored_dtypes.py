"""Keep the dtype of each part of a model in full checkpoints: trained parts are float32, the LLM is often in half.

transformers loads a checkpoint in one dtype, that of its config or the requested one. This would round the trained
weights or double the memory of the LLM. But transformers keeps a weight in the dtype that the built model has for it.
So the config of a checkpoint names the dtype of each part, and the model is built accordingly. Thin checkpoints do not
need this; they load each backbone in its own dtype (`thin_checkpoints.py`).
"""

import copy
import functools

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from .plora import ADAPTER_NAME


def part_of(name: str) -> str:
    """Return the part, of `PARTS` in `config_options.py`, to which the weight `name` belongs."""
    return "plora" if f".{ADAPTER_NAME}." in name else name.split(".")[0]


def dtypes_of_parts(state_dict: dict[str, torch.Tensor]) -> dict[str, str] | None:
    """Return each part's dtype: the widest of its floating point weights. None if all weights have one dtype."""
    found: dict[str, set[torch.dtype]] = {}
    for name, tensor in state_dict.items():
        if tensor.is_floating_point():
            found.setdefault(part_of(name), set()).add(tensor.dtype)
    if len(set().union(*found.values())) <= 1:
        return None
    return {part: str(functools.reduce(torch.promote_types, dtypes))[6:] for part, dtypes in found.items()}


def note_dtypes(model: PreTrainedModel, state_dict: dict[str, torch.Tensor] | None = None):
    """Write the dtypes that loading needs into the config of a model that is being saved.

    Args:
        state_dict (`dict`, *optional*): what is saved of a full checkpoint; omitted, the model's own.

    Raises:
        ValueError: the checkpoint is full, but the LLM alone was quantised.
    """
    config = model.config
    if config.backbones is not None:  # what loading makes of the backbones; the weights here have their own dtypes
        config.speech_config.dtype, config.text_config.dtype = model.audio_tower.dtype, model.language_model.dtype
        return
    if hasattr(model.language_model, "hf_quantizer") and not hasattr(model, "hf_quantizer"):
        raise ValueError(
            "The LLM alone was quantised when this model was built, so a full checkpoint of it could not be loaded "
            "again. Build it with from_backbones(..., thin=True), or save a model of the original LLM and quantise "
            "that when loading."
        )
    config.part_dtypes = dtypes_of_parts(model.state_dict() if state_dict is None else state_dict)


def build_in(model: PreTrainedModel, part_dtypes: dict[str, str] | None):
    """Convert the weights of a newly built model to the dtypes in a checkpoint's config."""
    if part_dtypes is None or is_deepspeed_zero3_enabled():  # ZeRO-3 holds shards of weights, in its own dtype
        return
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and part_of(name) in part_dtypes:
            tensor.data = tensor.data.to(getattr(torch, part_dtypes[part_of(name)]))


def convert_frozen(model: PreTrainedModel, dtype: torch.dtype):
    """Convert the weights that are frozen, except those of a quantised LLM."""
    is_quantised = hasattr(model, "hf_quantizer") or hasattr(model.language_model, "hf_quantizer")
    for name, parameter in model.named_parameters():
        if not (parameter.requires_grad or is_quantised and name.startswith("language_model.")):
            parameter.data = parameter.data.to(dtype)
    _match_statistics(model)


def convert_trained(model: PreTrainedModel, dtype: torch.dtype):
    """Convert the weights that are trained."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    _match_statistics(model)


def _match_statistics(model: PreTrainedModel):
    """Convert the batch statistics of the speech encoder to the dtype of the weights beside them."""
    for module in model.audio_tower.modules():
        weight = next(module.parameters(recurse=False), None)
        for buffer in module.buffers(recurse=False):
            if weight is not None and buffer.is_floating_point():
                buffer.data = buffer.data.to(weight.dtype)


def without_part_dtypes_if_told(kwargs: dict) -> dict:
    """Return the arguments of `from_pretrained`, changed so that an explicit dtype applies to all parts."""
    if all(kwargs.get(name) in (None, "auto") for name in ("dtype", "torch_dtype")):
        return kwargs
    config = kwargs.get("config")
    if not isinstance(config, PreTrainedConfig):
        return {**kwargs, "part_dtypes": None}
    config = copy.deepcopy(config)
    config.part_dtypes = None
    return {**kwargs, "config": config}
