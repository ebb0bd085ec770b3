"""The pretrained backbones, speech encoder and LLM: load them from where they are published, or where a user has them.

Leaves out: joining them (`modeling_blsp_kd.py`), which ones a thin checkpoint needs (`backbone_names.py`), and such
checkpoints themselves (`thin_checkpoints.py`).
"""

import copy
import os
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.quantizers import AutoQuantizationConfig

from .backbone_names import CHECKSUM, HUB_OPTIONS, as_found, check_architecture, checksum
from .configuration_blsp_kd import SPEECH_ENCODERS
from .encoder_families import ENCODER_FAMILIES
from .model_files import check_folder
from .plora import ADAPTER_NAME
from .speech_encoder import encoder_class_of

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
        ValueError: a file is broken, or weights are missing.
    """
    check_folder(name_or_path, kwargs.get("subfolder", ""))
    language_model, loading = AutoModelForCausalLM.from_pretrained(
        name_or_path, dtype=dtype, output_loading_info=True, **kwargs
    )
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(
            f"{name_or_path} is no LLM that fits its own config: the weights {missing[:5]} are missing, and would be "
            "random."
        )
    return language_model


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


def fetch(
    part: str,
    backbone: dict[str, str],
    load: Callable,
    config: PreTrainedConfig,
    on_other_revision: str = "warn",
    **kwargs,
) -> tuple[PreTrainedModel, dict[str, str]]:
    """Load a backbone that a thin checkpoint, or its user, names.

    Args:
        part (`str`): "audio_tower" or "language_model", for messages.
        backbone (`dict`): its entry in the config, see `backbone_names.py`.
        load (`Callable`): [`load_audio_tower`] or [`load_language_model`], called with the name, `config` and `kwargs`.
        config (`PreTrainedConfig`): of the backbone in training.
        on_other_revision (`str`): "warn" or "error".

    Returns:
        `tuple`: the backbone, and the entry that names what was found.

    Raises:
        OSError: it is missing.
        ValueError: it is not the one that the entry asks for, or of another architecture than in training.
    """
    name, revision = backbone["name_or_path"], backbone.get("revision", "")
    if revision.startswith(CHECKSUM):
        if not os.path.isdir(name):
            raise OSError(_missing(part, backbone, "there is no such folder"))
        found = checksum(name)
        if found != revision:
            raise ValueError(
                f"The {part} of this thin checkpoint has changed: it was trained on {name} with weights {revision}, "
                f"but the weights there now are {found}. Put the original back, or use a full checkpoint "
                "(save_pretrained(folder, full=True) where the original still is). To try what is there all the same, "
                f'name it: from_pretrained(..., backbones={{"{part}": {name!r}}}).'
            )
    elif revision:
        kwargs["revision"] = revision
    try:
        if "trained_revision" in backbone:
            hub = {option: kwargs[option] for option in HUB_OPTIONS if option in kwargs}
            check_architecture(part, name, AutoConfig.from_pretrained(name, **hub), config)
        model = load(name, config=config, **kwargs)
    except OSError as error:
        raise OSError(_missing(part, backbone, error)) from error
    if "trained_revision" in backbone:
        backbone = as_found(part, backbone, kwargs, on_other_revision)
    return model, backbone


def _missing(part: str, backbone: dict[str, str], reason) -> str:
    name, revision = backbone["name_or_path"], backbone.get("revision", "the newest")
    return (
        f"The {part} of this thin checkpoint cannot be loaded: {name} (revision {revision}): {reason}. A thin "
        "checkpoint holds only what was trained. Make its backbones available, name another place of them, a folder or "
        f'a Hub id (from_pretrained(..., backbones={{"{part}": "/its/folder"}})), or use a full checkpoint '
        "(save_pretrained(folder, full=True))."
    )
