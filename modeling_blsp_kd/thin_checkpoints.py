"""Thin checkpoints: only what was trained, with the names and revisions of the backbones that the rest comes from.

A checkpoint is thin if its config has `backbones`. Saving is `save_pretrained`, which leaves out what `trained_names`
does not list. Leaves out: what is trained, which is the model's own choice (`freeze_backbones`).
"""

import copy
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.quantizers import AutoQuantizationConfig
from transformers.utils import GENERATION_CONFIG_NAME
from transformers.utils.hub import cached_file, extract_commit_hash, get_checkpoint_shard_files

from .backbones import load_audio_tower, load_language_model, without_folder
from .model_files import misfits

WEIGHT_SUFFIXES = (".safetensors", ".bin")
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
# Where and how the LLM, the one large part, is to be put.
PLACING_OPTIONS = ("low_cpu_mem_usage", "max_memory", "offload_buffers", "offload_folder", "use_safetensors")
# What the Auto classes and `transformers serve` hand on; of no meaning once the class is chosen.
AUTO_OPTIONS = ("trust_remote_code", "code_revision", "adapter_kwargs", "tqdm_class", "_from_auto", "_commit_hash")


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
    """Names of the tensors that a thin checkpoint holds: adapter, partial LoRA, and whatever else is not frozen."""
    names = {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.requires_grad}
    names |= {name for name in model.state_dict() if name.startswith("adapter.")}
    if model.plora is not None:
        ours = {id(parameter) for parameter in model.plora.parameters}
        names |= {name for name, parameter in model.named_parameters() if id(parameter) in ours}
    if any(name.startswith("audio_tower.") for name in names):
        # Batch statistics move while an encoder is trained.
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
    **kwargs,
) -> Any:
    """Load a thin checkpoint: fetch its backbones, join them, and put in what was trained.

    Takes the arguments of `from_pretrained`. `dtype` "auto" keeps the dtypes of training. `quantization_config` is for
    the LLM. A `device_map` that names no parts, such as "auto", places the LLM, and the rest beside its embeddings.

    Raises:
        OSError: a backbone is missing.
        ValueError: a backbone has changed, or the weights do not fit the config.
        TypeError: unknown arguments.
    """
    hub = {name: kwargs.pop(name) for name in HUB_OPTIONS if name in kwargs}
    placing = {name: kwargs.pop(name) for name in PLACING_OPTIONS if name in kwargs}
    dtype = kwargs.pop("torch_dtype", dtype)
    dtype = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
    for name in AUTO_OPTIONS:
        kwargs.pop(name, None)
    if isinstance(config, PreTrainedConfig):
        config = copy.deepcopy(config)
    else:
        config, kwargs = model_class.config_class.from_pretrained(
            config or name_or_path, return_unused_kwargs=True, **hub, **kwargs
        )
    if kwargs:
        raise TypeError(f"Unknown argument(s) of from_pretrained for a thin checkpoint: {sorted(kwargs)}.")
    if attn_implementation is not None:
        config._attn_implementation = attn_implementation

    hub_of_backbones = {name: value for name, value in hub.items() if name not in ("revision", "subfolder")}
    language_model = fetch(
        "language_model",
        config.backbones["language_model"],
        _load_quantised,
        config=config.text_config,
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
    audio_tower = fetch(
        "audio_tower",
        config.backbones["audio_tower"],
        load_audio_tower,
        config=config.speech_config,
        dtype=dtype,
        device_map=_part_of(device_map, "audio_tower"),
        **hub_of_backbones,
    )
    model = model_class(config, audio_tower=audio_tower, language_model=language_model)
    for name, device in (_part_of(device_map, "adapter") or {"": "cpu"}).items():
        model.adapter.get_submodule(name).to(device)

    weights = _own_weights(name_or_path, hub)
    current = model.state_dict()
    expected = trained_names(model)
    if not any(name.startswith("audio_tower.") for name in weights):
        # Frozen so far; the backbone has its weights, whether it is to be trained from now on or not.
        expected = {name for name in expected if not name.startswith("audio_tower.")}
    missing, unexpected = sorted(expected - set(weights)), sorted(set(weights) - set(current))
    if missing or unexpected:
        raise ValueError(
            f"The weights of {name_or_path} do not fit its config: missing are {missing[:5]}, and unknown are "
            f"{unexpected[:5]} ({len(missing)} and {len(unexpected)} in all). Load it with its own config."
        )
    kinds = [(name, _kind_of(tensor), _kind_of(current[name])) for name, tensor in weights.items()]
    if wrong := [each for each in kinds if each[1] != each[2]]:
        raise ValueError(misfits(name_or_path, wrong))
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
        # What its user had unfrozen stays so, or the next checkpoint would lose it.
        if name in weights:
            parameter.requires_grad_(True)
    if cached_file(name_or_path, GENERATION_CONFIG_NAME, _raise_exceptions_for_missing_entries=False, **hub):
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


def _own_weights(name_or_path, hub: dict) -> dict[str, torch.Tensor]:
    one_file = cached_file(name_or_path, "model.safetensors", _raise_exceptions_for_missing_entries=False, **hub)
    if one_file is not None:
        return load_file(one_file)
    index = cached_file(name_or_path, "model.safetensors.index.json", **hub)
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


def identify(name_or_path: str | os.PathLike, loading_options: dict) -> dict[str, str]:
    """Name a backbone so that the same weights can be fetched again.

    Args:
        name_or_path (`str` or `os.PathLike`): Hub id or folder.
        loading_options (`dict`): what it will be loaded with, such as `revision`.

    Returns:
        `dict` of `name_or_path`, and `revision`: the commit on the Hub, or the checksum of a folder's weight files.
    """
    if os.path.isdir(name_or_path):
        return {"name_or_path": os.path.abspath(name_or_path), "revision": _checksum(Path(name_or_path))}
    hub = {name: loading_options[name] for name in HUB_OPTIONS if name in loading_options}
    commit = extract_commit_hash(cached_file(name_or_path, "config.json", **hub), None)
    if commit is None:
        raise ValueError(
            f"The commit of {name_or_path} is unknown, so a thin checkpoint could not name it. Load it from the Hub or "
            "from a folder, or build the model with thin=False."
        )
    return {"name_or_path": str(name_or_path), "revision": commit}


def fetch(part: str, backbone: dict[str, str], load: Callable, **kwargs) -> PreTrainedModel:
    """Load a backbone that a thin checkpoint names.

    Args:
        part (`str`): "audio_tower" or "language_model", for messages.
        backbone (`dict`): of [`identify`].
        load (`Callable`): [`load_audio_tower`] or [`load_language_model`], called with the name and `kwargs`.

    Raises:
        OSError: it is missing.
        ValueError: it is not the one that the checkpoint was trained on.
    """
    name, revision = backbone["name_or_path"], backbone["revision"]
    if revision.startswith("sha256:"):
        if not os.path.isdir(name):
            raise OSError(_missing(part, name, revision, "there is no such folder"))
        found = _checksum(Path(name))
        if found != revision:
            raise ValueError(
                f"The {part} of this thin checkpoint has changed: it was trained on {name} with weights {revision}, "
                f"but the weights there now are {found}. Put the original back, or use a full checkpoint "
                "(save_pretrained(folder, full=True) where the original still is)."
            )
    else:
        kwargs["revision"] = revision
    try:
        return load(name, **kwargs)
    except OSError as error:
        raise OSError(_missing(part, name, revision, error)) from error


def _missing(part: str, name: str, revision: str, reason) -> str:
    return (
        f"The {part} of this thin checkpoint cannot be loaded: {name} (revision {revision}): {reason}. A thin "
        "checkpoint holds only what was trained; make its backbones available, or use a full checkpoint "
        "(save_pretrained(folder, full=True))."
    )


def _checksum(folder: Path) -> str:
    """SHA-256 over the names and contents of a folder's weight files."""
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.iterdir() if path.suffix in WEIGHT_SUFFIXES):
        with file.open("rb") as stream:
            digest.update(f"{file.name}\0{hashlib.file_digest(stream, 'sha256').hexdigest()}\0".encode())
    return f"sha256:{digest.hexdigest()}"
