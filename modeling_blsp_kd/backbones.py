"""The pretrained backbones, speech encoder and LLM, loaded from where they are published.

Leaves out: joining them (`modeling_blsp_kd.py`), and checkpoints without them (`thin_checkpoints.py`).
"""

import copy
import os

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from .checkpoint_files import check_folder
from .configuration_blsp_kd import SPEECH_ENCODERS
from .speech_encoder import TrueLengthWhisperEncoder


def load_audio_tower(name_or_path, config=None, dtype: torch.dtype | str = "auto", **kwargs) -> PreTrainedModel:
    """Load a speech encoder, alone or out of a whole speech model.

    Args:
        name_or_path (`str` or `os.PathLike`): Hub id or folder.
        config (`PreTrainedConfig`, *optional*): of the encoder or the whole model. Omitted: its own.
        kwargs: for `from_pretrained`.

    Raises:
        ValueError: no speech encoder that we know, or weights are missing or broken.
    """
    check_folder(name_or_path, kwargs.get("subfolder", ""))
    if config is None:
        config = AutoConfig.from_pretrained(name_or_path, **kwargs)
    config = getattr(config, "encoder_config", config)  # Parakeet's heads hold their encoder's
    if config.model_type not in SPEECH_ENCODERS:
        raise ValueError(
            f"The speech model must be of a type among {SPEECH_ENCODERS}, but {name_or_path} is {config.model_type!r}."
        )
    if config.model_type == "whisper":
        encoder_class = TrueLengthWhisperEncoder
        # A whole Whisper names its encoder's weights model.encoder.*, an encoder saved alone names them bare.
        kwargs["key_mapping"] = {r"^model\.encoder\.": "", r"^encoder\.": ""}
    else:
        encoder_class = AutoModel
    audio_tower, loading = encoder_class.from_pretrained(
        name_or_path, config=config, dtype=dtype, output_loading_info=True, **kwargs
    )
    # What SpecAugment writes over masked frames; published checkpoints often lack it.
    missing = sorted(name for name in loading["missing_keys"] if name != "masked_spec_embed")
    if missing:
        raise ValueError(
            f"{name_or_path} is no {config.model_type} encoder that fits its own config: the weights {missing[:5]} are "
            "missing."
        )
    return audio_tower


def without_folder(config):
    """A copy of a backbone's config that does not tell where on this machine it lay; a Hub id is worth keeping."""
    config = copy.deepcopy(config)
    if os.path.isdir(config._name_or_path):
        config._name_or_path = ""
    return config


def load_language_model(name_or_path, dtype: torch.dtype | str = "auto", **kwargs) -> PreTrainedModel:
    check_folder(name_or_path, kwargs.get("subfolder", ""))
    return AutoModelForCausalLM.from_pretrained(name_or_path, dtype=dtype, **kwargs)
