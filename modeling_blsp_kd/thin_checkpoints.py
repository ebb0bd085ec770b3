"""Thin checkpoints: only what was trained, with the names and revisions of the backbones that the rest comes from.

A checkpoint is thin if its config has `backbones`. Saving is `save_pretrained`, which leaves out what `trained_names`
does not list. Leaves out: what is trained, which is the model's own choice (`freeze_backbones`).
"""

import copy
import os
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.quantizers import AutoQuantizationConfig
from transformers.utils import GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from .backbone_names import HUB_OPTIONS, ON_OTHER_REVISION, with_other_names
from .backbones import fetch, load_audio_tower, load_language_model, without_folder
from .config_options import require
from .ctc import CTC_HEAD
from .model_files import check_fit

# Arguments that place the LLM, the only large part.
PLACING_OPTIONS = ("low_cpu_mem_usage", "max_memory", "offload_buffers", "offload_folder", "use_safetensors")
# Arguments that the Auto classes and `transformers serve` pass on. Like their internal ones, which begin with an
# underscore, they have no meaning once the class is chosen.
AUTO_OPTIONS = ("trust_remote_code", "code_revision", "adapter_kwargs", "tqdm_class")


def is_thin(
    config_class: type[PreTrainedConfig],
    name_or_path: str | os.PathLike,
    config: PreTrainedConfig | None = None,
    **kwargs,
) -> bool:
    """Return whether `from_pretrained`, with these arguments, was asked for a thin checkpoint."""
    if isinstance(config, PreTrainedConfig):
        return config.backbones is not None
    if name_or_path is None or kwargs.get("state_dict") is not None:
        return False
    hub = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
    config_dict, _ = config_class.get_config_dict(config or name_or_path, **hub)
    return config_dict.get("backbones") is not None


def trained_names(model: PreTrainedModel) -> set[str]:
    """Return the names of what a thin checkpoint holds: adapter, partial LoRA, and whatever else is not frozen."""
    names = {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.requires_grad}
    names |= {name for name in model.state_dict() if name.startswith("adapter.")}
    if model.plora is not None:
        ours = {id(parameter) for parameter in model.plora.parameters}
        names |= {name for name, parameter in model.named_parameters() if id(parameter) in ours}
    if any(name.startswith("audio_tower.") for name in names):
        # Batch statistics change while an encoder is trained.
        names |= {f"audio_tower.{name}" for name, _ in model.audio_tower.named_buffers()}
    return names & set(model.state_dict())


def load_thin(
    model_class: type[PreTrainedModel],
    name_or_path: str | os.PathLike,
    config: PreTrainedConfig | None = None,
    dtype: torch.dtype | str = "auto",
    device_map: str | dict | None = None,
    quantization_config: Any = None,
    attn_implementation: str | dict | None = None,
    output_loading_info: bool = False,
    *,
    on_other_revision: str = "warn",
    **kwargs,
) -> Any:
    """Load a thin checkpoint: fetch its backbones, join them, and put in what was trained.

    Takes the arguments of `from_pretrained`. `dtype` "auto" keeps the dtypes of training. `quantization_config` is for
    the LLM. A `device_map` that names no parts, such as "auto", places the LLM, and the rest beside its embeddings.
    `config.backbones` of the model names the backbones that were found.

    Raises:
        OSError: a backbone is missing.
        ValueError: a backbone has changed or does not fit, or the weights do not fit the config.
        TypeError: unknown arguments.
    """
    require(
        on_other_revision in ON_OTHER_REVISION,
        f"on_other_revision must be one of {ON_OTHER_REVISION}",
        on_other_revision,
    )
    hub = {name: kwargs.pop(name) for name in HUB_OPTIONS if name in kwargs}
    placing = {name: kwargs.pop(name) for name in PLACING_OPTIONS if name in kwargs}
    dtype = kwargs.pop("torch_dtype", dtype)
    dtype = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
    kwargs = {name: value for name, value in kwargs.items() if name not in AUTO_OPTIONS and name[0] != "_"}
    if isinstance(config, PreTrainedConfig):
        config = copy.deepcopy(config)
        if (others := kwargs.pop("backbones", None)) is not None:
            config.backbones = with_other_names(config.backbones, others)
    else:
        config, kwargs = model_class.config_class.from_pretrained(
            config or name_or_path, return_unused_kwargs=True, **hub, **kwargs
        )
    if kwargs:
        raise TypeError(f"Unknown argument(s) of from_pretrained for a thin checkpoint: {sorted(kwargs)}.")
    if attn_implementation is not None:
        config._attn_implementation = attn_implementation

    hub_of_backbones = {name: value for name, value in hub.items() if name not in ("revision", "subfolder")}
    language_model, found_llm = fetch(
        "language_model",
        config.backbones["language_model"],
        _load_quantised,
        config=config.text_config,
        on_other_revision=on_other_revision,
        quantization_config=quantization_config,
        dtype=dtype,
        device_map=_part_of(device_map, "language_model"),
        **placing,
        **hub_of_backbones,
    )
    config.text_config = without_folder(language_model.config)
    if isinstance(device_map, str):
        embeddings = language_model.get_input_embeddings().weight
        device_map = {"": "cpu" if embeddings.is_meta else embeddings.device}
    audio_tower, found_encoder = fetch(
        "audio_tower",
        config.backbones["audio_tower"],
        load_audio_tower,
        config=config.speech_config,
        on_other_revision=on_other_revision,
        dtype=dtype,
        device_map=_part_of(device_map, "audio_tower"),
        **hub_of_backbones,
    )
    config.backbones = {"audio_tower": found_encoder, "language_model": found_llm}
    model = model_class(config, audio_tower=audio_tower, language_model=language_model)
    for name, device in (_part_of(device_map, "adapter") or {"": "cpu"}).items():
        model.adapter.get_submodule(name).to(device)

    weights = own_weights(name_or_path, hub)
    current = model.state_dict()
    expected = trained_names(model)
    if not any(name.startswith("audio_tower.") for name in weights):
        # Frozen so far; the backbone has its weights, whether it is to be trained from now on or not.
        expected = {name for name in expected if not name.startswith("audio_tower.")}
    # Training may turn the auxiliary CTC head on or off from one stage to the next.
    weights = {name: tensor for name, tensor in weights.items() if name in current or not name.startswith(CTC_HEAD)}
    missing = sorted(name for name in expected - set(weights) if not name.startswith(CTC_HEAD))
    unexpected = sorted(set(weights) - set(current))
    if missing or unexpected:
        raise ValueError(
            f"The weights of {name_or_path} do not fit its config: missing are {missing[:5]}, and unknown are "
            f"{unexpected[:5]} ({len(missing)} and {len(unexpected)} in all). Load it with its own config."
        )
    kinds = [(name, _kind_of(tensor), _kind_of(current[name])) for name, tensor in weights.items()]
    check_fit(name_or_path, [each for each in kinds if each[1] != each[2]])
    model.load_state_dict(
        {
            name: tensor.to(
                current[name].device, dtype if dtype != "auto" and tensor.is_floating_point() else tensor.dtype
            )
            for name, tensor in weights.items()
        },
        strict=False,
        assign=True,
    )
    model.tie_weights()
    for name, parameter in model.named_parameters():
        # Keep unfrozen what the user had unfrozen, or the next checkpoint would lose it.
        if name in weights:
            parameter.requires_grad_(True)
    if _file_if_there(name_or_path, GENERATION_CONFIG_NAME, hub) is not None:
        model.generation_config = GenerationConfig.from_pretrained(name_or_path, **hub)
    else:
        model.generation_config = GenerationConfig.from_dict(language_model.generation_config.to_dict())
    model.eval()
    loading_info: dict[str, set | list] = dict(
        missing_keys=set(), unexpected_keys=set(), mismatched_keys=set(), error_msgs=[]
    )
    return (model, loading_info) if output_loading_info else model


def _kind_of(tensor: torch.Tensor) -> str:
    return f"{'floating point' if tensor.is_floating_point() else 'integer'} {tuple(tensor.shape)}"


def _load_quantised(name_or_path, config, quantization_config, device_map, **kwargs):
    """Load the LLM, quantised while loading if it was so in training but its own weights are not."""
    own_config = AutoConfig.from_pretrained(name_or_path, **kwargs)
    in_training = getattr(config, "quantization_config", None)
    if not hasattr(own_config, "quantization_config") and in_training is not None:
        # Left in the config, it would say that the stored weights are quantised.
        config = copy.deepcopy(config)
        del config.quantization_config
        quantization_config = quantization_config or in_training
    if isinstance(quantization_config, dict):
        quantization_config = AutoQuantizationConfig.from_dict(quantization_config)
    return load_language_model(
        name_or_path, config=config, quantization_config=quantization_config, device_map=device_map, **kwargs
    )


def _file_if_there(name_or_path, name: str, hub: dict) -> str | None:
    """Return the path of a file of a checkpoint, which is downloaded if it is on the Hub; None if there is none."""
    if os.path.isdir(name_or_path):
        path = os.path.join(name_or_path, hub.get("subfolder") or "", name)
        return path if os.path.isfile(path) else None
    try:
        # Not `cached_file`, which raises the same error for a file that is not there and for a Hub that is not.
        return hf_hub_download(name_or_path, name, **hub)
    except EntryNotFoundError:
        return None


def own_weights(name_or_path: str | os.PathLike, hub: dict | None = None) -> dict[str, torch.Tensor]:
    """Return the weights that a checkpoint holds itself; `hub` has options of the Hub, such as `revision`."""
    hub = hub or {}
    one_file = _file_if_there(name_or_path, SAFE_WEIGHTS_NAME, hub)
    if one_file is not None:
        return load_file(one_file)
    index = cached_file(name_or_path, SAFE_WEIGHTS_INDEX_NAME, **hub)
    files, _ = get_checkpoint_shard_files(name_or_path, index, **hub)
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def _part_of(device_map, part: str):
    """Return the entries of a device map for one part of the model, under that part's own names."""
    if device_map is None or isinstance(device_map, str):
        return device_map
    if not isinstance(device_map, dict):
        return {"": device_map}
    inside = {name[len(part) :].lstrip("."): device for name, device in device_map.items() if name.startswith(part)}
    return inside or ({"": device_map[""]} if "" in device_map else None)
