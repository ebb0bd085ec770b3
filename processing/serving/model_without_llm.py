"""Load of a model what encodes speech: encoder, adapter and the LLM's embeddings, without the LLM's layers.

The result is a `BlspKdForCausalLM` whose LLM has no layers, so that `get_audio_features` is the model's own. The
embeddings align the tokens of an answer to the speech, and serve to check the engine. Leaves out: batches
(`clip_encoder.py`).
"""

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import GenerationConfig
from transformers.utils import logging

from modeling_blsp_kd import BlspKdConfig, BlspKdForCausalLM
from modeling_blsp_kd.backbones import fetch, load_audio_tower, load_language_model
from modeling_blsp_kd.thin_checkpoints import own_weights

ENCODING_PARTS = ("audio_tower.", "adapter.")


def load_without_llm(
    name_or_path: str | os.PathLike, dtype: torch.dtype | str = "auto", device: torch.device | str = "cpu"
) -> tuple[BlspKdForCausalLM, bool]:
    """Load a checkpoint, full or thin, without the layers of its LLM.

    Args:
        name_or_path (`str` or `os.PathLike`): folder or Hub id.
        dtype (`torch.dtype` or `str`): of all weights; "auto": as they are stored.

    Returns:
        the model, whose `generate` is of no use, and whether the checkpoint has partial LoRA.

    Raises:
        OSError, ValueError: a file is missing or broken, see `from_pretrained`.
    """
    config = BlspKdConfig.from_pretrained(name_or_path)
    has_plora = config.plora_options is not None
    bare = _without_layers(config)
    with _without_reports():
        if config.backbones is None:
            # With a key mapping, here an empty one, partial LoRA is not loaded and switched off: it has no layers.
            model = BlspKdForCausalLM.from_pretrained(name_or_path, config=bare, dtype=dtype, key_mapping={})
        else:
            model = _load_thin(name_or_path, bare, dtype)
    head = model.get_output_embeddings()
    if head is not None and head.weight is not model.get_input_embeddings().weight:
        model.set_output_embeddings(torch.nn.Identity())
    return model.eval().requires_grad_(False).to(device), has_plora


def _without_layers(config: BlspKdConfig) -> BlspKdConfig:
    bare = copy.deepcopy(config)
    bare.plora = None
    text_config = bare.text_config.get_text_config()
    text_config.num_hidden_layers = 0
    if getattr(text_config, "layer_types", None) is not None:
        text_config.layer_types = []
    for each in (bare, bare.text_config):
        # Only linear layers of an LLM are quantised, and there are none.
        if hasattr(each, "quantization_config"):
            del each.quantization_config
    return bare


def _load_thin(name_or_path, bare: BlspKdConfig, dtype) -> BlspKdForCausalLM:
    backbones = bare.backbones or {}
    text_config, speech_config = bare.text_config, bare.speech_config
    llm, _ = fetch("language_model", backbones["language_model"], load_language_model, config=text_config, dtype=dtype)
    tower, _ = fetch("audio_tower", backbones["audio_tower"], load_audio_tower, config=speech_config, dtype=dtype)
    model = BlspKdForCausalLM(bare, audio_tower=tower, language_model=llm)
    weights = {name: value for name, value in own_weights(name_or_path).items() if name.startswith(ENCODING_PARTS)}
    if missing := sorted(name for name in model.state_dict() if name.startswith("adapter.") and name not in weights):
        raise ValueError(f"{name_or_path} lacks weights of its adapter: {missing[:5]} ({len(missing)} in all).")
    if dtype != "auto":
        weights = {name: value.to(tower.dtype) for name, value in weights.items()}
    model.load_state_dict(weights, strict=False, assign=True)
    try:
        model.generation_config = GenerationConfig.from_pretrained(name_or_path)
    except OSError:  # it has none of its own
        model.generation_config = llm.generation_config
    return model


@contextmanager
def _without_reports() -> Iterator[None]:
    """Keep transformers from reporting each layer of the LLM as a weight that nothing takes."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
