"""Switch partial LoRA on or off while a checkpoint is loaded: `from_pretrained(..., plora=...)`.

The checkpoint is loaded in its stored form, whose weight names fit, and the LLM's layers are changed afterwards. So
transformers handles shards, device maps and quantisation as usual. A stored partial LoRA cannot change its rank or its
layers, because its weights would not fit.
"""

import copy
import os

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from .backbone_names import HUB_OPTIONS
from .plora import ADAPTER_NAME, PartialLora

logger = logging.get_logger(__name__)


def load_as_stored(
    config_class: type[PreTrainedConfig], name_or_path: str | os.PathLike, kwargs: dict
) -> tuple[dict, dict | None, bool]:
    """Change the arguments of `from_pretrained` so that it loads a checkpoint with partial LoRA as stored.

    Args:
        config_class (`type`): [`BlspKdConfig`].
        name_or_path (`str` or `os.PathLike`, *optional*), kwargs (`dict`): arguments of `from_pretrained`.

    Returns:
        `tuple`: the `kwargs` to use instead, the requested options of partial LoRA (None: off), and whether the caller
        must call [`switch`] afterwards, because the checkpoint differs from the request.

    Raises:
        ValueError: the options are invalid.
    """
    config = kwargs.get("config")
    made = config if isinstance(config, PreTrainedConfig) else None  # else a path, or nothing
    names_weights = kwargs.get("state_dict") is not None or kwargs.get("key_mapping") is not None
    if name_or_path is None or names_weights or not (made is not None or "plora" in kwargs):
        return kwargs, None, False
    source = name_or_path if made is not None or config is None else config
    hub = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
    try:
        stored = config_class.get_config_dict(source, **hub)[0].get("plora") or None
    except OSError:
        if made is not None:  # the caller passed a config, so the checkpoint may lack one
            return kwargs, None, False
        raise
    wanted = kwargs["plora"] if made is None else made.plora
    if (stored is None) == (wanted is None or wanted is False):
        return kwargs, None, False
    if made is not None:
        made = copy.deepcopy(made)
        made.plora = stored
        return {**kwargs, "config": made}, wanted, True
    wanted = config_class.from_pretrained(source, plora=wanted, **hub).plora
    return {**kwargs, "plora": stored}, wanted, True


def switch(model: PreTrainedModel, options: dict | None, name_or_path: str | os.PathLike) -> set[str]:
    """Add partial LoRA to a model that has none (`options`), or remove it (None).

    When added, it changes no answer until it is trained, because A is random and B is zero.

    Returns:
        `set[str]`: the names of its weights.
    """
    language_model = model.language_model
    if options is None:
        names = _weight_names(model)
        model.plora.take_off(language_model)
        model.plora = None
        logger.warning(
            f"plora is off: {len(names)} trained weights of partial LoRA in {name_or_path} are left out, and the LLM "
            "reads speech with its own weights alone."
        )
    else:
        trained = [parameter for parameter in language_model.parameters() if parameter.requires_grad]
        model.plora = PartialLora(language_model, **options)
        model.plora.initialize()
        dtype = next(model.adapter.parameters()).dtype
        for parameter in model.plora.parameters:
            parameter.data = parameter.data.to(dtype)
        for parameter in trained:  # PEFT freezes all parameters except its own
            parameter.requires_grad_(True)
        language_model.train(language_model.training)
        names = _weight_names(model)
        logger.info(f"plora is on, which {name_or_path} has no weights of: it changes nothing until it is trained.")
    model.config.plora = options
    return names


def _weight_names(model) -> set[str]:
    return {name for name in model.state_dict() if f".{ADAPTER_NAME}." in name}
