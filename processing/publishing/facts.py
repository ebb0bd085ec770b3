"""The facts of a checkpoint that its model card states: its parts, their sizes and licences, and what was measured.

Facts are counted from the model, read from the `results.json` of `train.py`, or given by the user. Unknown facts are
None, and the card says so. Leaves out: wording (`card.py`), memory in use (`verify.py`).
"""

import os

import torch

from modeling_blsp_kd import BlspKdForCausalLM
from modeling_blsp_kd.backbone_names import trained_revision

from .card import TINY_WORLD

# Distributed with the code, under the code's licence.
OWN_BACKBONES = "examples/tiny_world/"
OWN_LICENCE = "apache-2.0"


def describe_checkpoint(
    model: BlspKdForCausalLM,
    training: dict | None,
    given: dict[str, tuple],
    licence: str | None,
    languages: list[str] | None,
    datasets: list[str] | None,
) -> dict:
    """Return parts, licence, languages and data sets, as [`make_card`] takes them.

    Args:
        model, training, given: see [`describe_parts`].
        licence, languages, datasets: what the user says (None or empty if nothing). Of a model that is made of this
            repository alone, licence and language are known without.

    Raises:
        ValueError: the user names another base model than the checkpoint does.
    """
    parts = describe_parts(model, training, given)
    base_models = [part["base_model"] or "" for part in parts if part["name"] in ("speech encoder", "LLM")]
    stages = None if training is None else training.get("before", [])
    is_tiny_world = stages is not None and all(stage["data"]["source"] == TINY_WORLD for stage in [*stages, training])
    # Then all of it is ours, and English.
    is_ours = is_tiny_world and all(name.startswith(OWN_BACKBONES) for name in base_models)
    return {
        "parts": parts,
        "licence": licence or (OWN_LICENCE if is_ours else None),
        "languages": languages or (["en"] if is_ours else []),
        "datasets": datasets,
    }


def describe_parts(model: BlspKdForCausalLM, training: dict | None, given: dict[str, tuple]) -> list[dict]:
    """Describe the parts of a model: what they are, where they come from, and how many parameters they have.

    Args:
        model: as loaded; a thin checkpoint's backbones are counted too.
        training (*optional*): the record of [`describe_training`] in `results.json`.
        given: what the user says of `"speech_model"` and `"text_model"`: (Hub id, licence or None).

    Returns:
        list of dict with `name`, `what` (its kind and size), `base_model` (Hub id, or folder of the code repository),
        `licence`, `parameters` and `trained` (counts of numbers). The backbones of a thin checkpoint also have
        `trained_revision`, the commit or checksum that training saw.

    Raises:
        ValueError: the user names another base model than the checkpoint does.
    """
    config, counts = model.config, count_parameters(model)
    speech, text, adapter = config.speech_config, config.text_config.get_text_config(), config.adapter
    if adapter["type"] == "cformer":
        layers = f"{adapter['num_pre_layers']} + {adapter['num_post_layers']} transformer layers around CIF"
        what = f"CFormer, {layers}, one vector per text token"
    else:
        what = f"subsampler, one vector per {2 ** adapter['num_layers']} encoder frames"
    plora = f"rank {config.plora['r']}, at speech positions only" if config.plora else "off"
    parts = [
        {
            "name": "speech encoder",
            "what": f"`{speech.model_type}`, {speech.num_hidden_layers} layers of width {speech.hidden_size}",
            **_origin(model, "audio_tower", speech, "speech_model", training, given),
        },
        {"name": "adapter", "what": what},
        {"name": "partial LoRA", "what": plora},
        {
            "name": "LLM",
            "what": f"`{text.model_type}`, {text.num_hidden_layers} layers of width {text.hidden_size}",
            **_origin(model, "language_model", config.text_config, "text_model", training, given),
        },
    ]
    return [{"base_model": None, "licence": None, **part, **counts[part["name"]]} for part in parts]


def count_parameters(model: BlspKdForCausalLM) -> dict[str, dict[str, int]]:
    """Return the number of parameters of each part, all and trained ones; tied weights count once."""
    with torch.device("meta"):
        # Of an LLM that was quantised, the stored tensors are packed: they do not tell how many numbers they hold.
        shapes = dict(BlspKdForCausalLM(model.config).named_parameters())
    ours = set() if model.plora is None else {id(parameter) for parameter in model.plora.parameters}
    counts = {name: {"parameters": 0, "trained": 0} for name in ("speech encoder", "adapter", "partial LoRA", "LLM")}
    by_prefix = {"audio_tower": "speech encoder", "adapter": "adapter", "language_model": "LLM"}
    for name, parameter in model.named_parameters():
        part = counts["partial LoRA" if id(parameter) in ours else by_prefix[name.split(".")[0]]]
        part["parameters"] += shapes[name].numel()
        part["trained"] += shapes[name].numel() * parameter.requires_grad
    return counts


def _origin(model, part: str, part_config, option: str, training: dict | None, given: dict) -> dict:
    """Return base model and licence of a backbone, from the checkpoint and from the user's options."""
    entry = (model.config.backbones or {}).get(part)
    candidates = [
        entry and entry["name_or_path"],
        part_config.name_or_path,
        (training or {}).get(option),
    ]
    # A folder of this machine means nothing to others.
    known = next((name for name in candidates if name and not os.path.isabs(name)), None)
    name, licence = given.get(option, (known, None))
    if known and name != known:
        raise ValueError(
            f"--{option} says {name}, but the checkpoint was made from {known}. Leave it out, or correct it."
        )
    if name and name.startswith(OWN_BACKBONES):
        licence = licence or OWN_LICENCE
    revision = {} if entry is None else {"trained_revision": trained_revision(entry)}
    return {"base_model": name, "licence": licence, **revision}
