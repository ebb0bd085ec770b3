"""The pretrained backbones, speech encoder and LLM: load them from where they are published, and find them again.

Leaves out: joining them (`modeling_blsp_kd.py`), and checkpoints without them (`thin_checkpoints.py`).
"""

import copy
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.quantizers import AutoQuantizationConfig
from transformers.utils.hub import cached_file, extract_commit_hash

from .configuration_blsp_kd import SPEECH_ENCODERS
from .encoder_families import ENCODER_FAMILIES
from .model_files import check_folder
from .plora import ADAPTER_NAME
from .speech_encoder import encoder_class_of

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
WEIGHT_SUFFIXES = (".safetensors", ".bin")
# Names of the weights that whole speech models have besides their encoder: decoders, heads, and those of pretraining.
OTHER_PARTS = (
    r"^(model\.)?decoder\.",
    r"^(proj_out|lm_head|ctc_head|joint|encoder_projector|classifier|projector|tdnn|objective|quantizer|project_q|project_hid)\.",
    r"^layer_weights$",
    r"^feature_extractor\.(weight|bias)$",  # of a speaker model; an encoder's own has layers
)
# The vector that SpecAugment writes over masked frames. Published checkpoints often lack it; then it is random.
MAY_BE_MISSING = (r"^masked_spec_embed$",)


def load_audio_tower(
    name_or_path: str | os.PathLike, config: PreTrainedConfig | None = None, dtype: torch.dtype | str = "auto", **kwargs
) -> PreTrainedModel:
    """Load a speech encoder, alone or out of a whole speech model.

    The other parts of a whole model are skipped silently. Weights that belong to none of its parts are logged, as in
    transformers.

    Args:
        name_or_path (`str` or `os.PathLike`): Hub id or folder.
        config (`PreTrainedConfig`, *optional*): of the encoder or the whole model. Omitted: its own.
        kwargs: for `from_pretrained`.

    Raises:
        ValueError: the model is no speech encoder that we know, or weights are missing or broken.
    """
    check_folder(name_or_path, kwargs.get("subfolder", ""))
    if config is None:
        config = AutoConfig.from_pretrained(name_or_path, **kwargs)
    config = getattr(config, "encoder_config", config)  # Parakeet's heads hold their encoder's
    if config.model_type not in SPEECH_ENCODERS:
        raise ValueError(
            f"The speech model must be of a type among {SPEECH_ENCODERS}, but {name_or_path} is {config.model_type!r}."
        )
    encoder_class = encoder_class_of(config)
    if prefixes := ENCODER_FAMILIES[config.model_type].prefixes:
        kwargs["key_mapping"] = dict.fromkeys(prefixes, "")
    # A class of its own, because transformers reads from the class which weights not to report.
    ignored = {"_keys_to_ignore_on_load_unexpected": OTHER_PARTS, "_keys_to_ignore_on_load_missing": MAY_BE_MISSING}
    loading_class: Any = type(
        encoder_class.__name__, (encoder_class,), {"__module__": encoder_class.__module__, **ignored}
    )
    audio_tower, loading = loading_class.from_pretrained(
        name_or_path, config=config, dtype=dtype, output_loading_info=True, **kwargs
    )
    audio_tower.__class__ = encoder_class
    for name in ignored:  # a model takes these over from its parts
        delattr(audio_tower, name)
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(
            f"{name_or_path} is no {config.model_type} encoder that fits its own config: the weights {missing[:5]} are "
            "missing."
        )
    return audio_tower


def without_folder(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a copy of a backbone's config without the folder that it came from; a Hub id stays."""
    config = copy.deepcopy(config)
    if os.path.isdir(config.name_or_path or ""):
        config.name_or_path = ""
    return config


def load_language_model(
    name_or_path: str | os.PathLike, dtype: torch.dtype | str = "auto", **kwargs
) -> PreTrainedModel:
    """Load a causal LLM; `kwargs` are for `from_pretrained`.

    Raises:
        ValueError: a file is broken.
    """
    check_folder(name_or_path, kwargs.get("subfolder", ""))
    return AutoModelForCausalLM.from_pretrained(name_or_path, dtype=dtype, **kwargs)


def for_language_model_only(quantization_config: Any) -> Any:
    """Return a quantisation that exempts all but the LLM's linear layers, in addition to what its user exempts.

    Raises:
        ValueError: quantisations of its kind have no exemptions.
    """
    if isinstance(quantization_config, dict):
        quantization_config = AutoQuantizationConfig.from_dict(quantization_config)
    # Regular expressions from the start of a name of a module (bitsandbytes) or of a weight (torchao).
    kept = ["audio_tower", "adapter", rf".*\.lora_[AB]\.{ADAPTER_NAME}", r".*\.(lm_head|embed_out)"]
    for option in ("llm_int8_skip_modules", "modules_to_not_convert"):
        if hasattr(quantization_config, option):
            quantization_config = copy.copy(quantization_config)
            setattr(quantization_config, option, [*kept, *(getattr(quantization_config, option) or [])])
            return quantization_config
    raise ValueError(
        f"{type(quantization_config).__name__} cannot exempt parts of a model, and only the LLM should be quantised. "
        "Quantise it in from_backbones(..., text_kwargs={'quantization_config': ...})."
    )


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
    """Return the SHA-256 over the names and contents of a folder's weight files."""
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.iterdir() if path.suffix in WEIGHT_SUFFIXES):
        with file.open("rb") as stream:
            digest.update(f"{file.name}\0{hashlib.file_digest(stream, 'sha256').hexdigest()}\0".encode())
    return f"sha256:{digest.hexdigest()}"
