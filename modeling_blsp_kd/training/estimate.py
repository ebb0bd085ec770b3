"""Estimate what a training costs, before anything is downloaded: parameters, memory of a GPU, and time.

`step_cost.py` and `step_operations.py` run a step without contents; sharding and time are arithmetic on top.
`examples/estimate.py` is the command. Leaves out: speech encoders other than Whisper, and the time to load data,
evaluate and save.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from transformers import AutoConfig, PreTrainedModel

from ..configuration_blsp_kd import BlspKdConfig
from ..modeling_blsp_kd import BlspKdForCausalLM
from .step_cost import Memory, peak_memory, without_contents
from .step_operations import count_operations

GB = 1e9


@dataclass
class Assumptions:
    """Assumptions about machines and data.

    Args:
        num_gpus (`int`): processes, one GPU each.
        num_shards (`int`): GPUs over which FSDP2 splits weights, gradients and optimiser states; 1: DDP.
        gpu_memory_gb (`float`), peak_tflops (`float`): of one GPU, in 1e9 bytes and 1e12 dense operations per second.
        utilisation (`float`): share of the peak that a step reaches, in (0, 1].
        network_gb_per_s (`float`): data that one GPU receives from the others, in 1e9 bytes per second.
        overhead_gb (`float`): memory of CUDA, its libraries and fragmentation, in 1e9 bytes.
        clip_s (`float`), longest_clip_s (`float`): seconds of the mean clip, for the time, and of the longest, for the
            memory.
        tokens_per_s (`float`): transcript tokens per second of speech.
        prompt_tokens (`int`), response_tokens (`int`): tokens of template with instruction, and of the LLM's answer.
    """

    num_gpus: int = 1
    num_shards: int = 1
    gpu_memory_gb: float = 24.0
    peak_tflops: float = 165.0
    utilisation: float = 0.35
    network_gb_per_s: float = 50.0
    overhead_gb: float = 1.5
    clip_s: float = 10.0
    longest_clip_s: float = 30.0
    tokens_per_s: float = 3.3
    prompt_tokens: int = 40
    response_tokens: int = 40


def read_recipe(path: str | Path) -> tuple[dict, dict]:
    """Return the options for `examples/train.py`, and the section `estimate` with fields of [`Assumptions`]."""
    recipe = yaml.safe_load(Path(path).read_text())
    return recipe, recipe.pop("estimate", {})


def model_config(recipe: dict, configs: Path | None = None) -> BlspKdConfig:
    """Return the config of the model that a recipe trains.

    Args:
        configs: a folder of configs by Hub id, which are read instead of those on the Hub.

    Raises:
        ValueError: the speech encoder is not Whisper's.
    """

    def read_config(name: str):
        folder = None if configs is None else configs / name
        return AutoConfig.from_pretrained(name if folder is None or not folder.is_dir() else folder)

    stage = {
        "freeze_speech_encoder": recipe.get("freeze_speech_encoder", False),
        "speech_padding": recipe.get("speech_padding", "do_not_pad"),
    }
    if "start_from" in recipe:
        config = BlspKdConfig.from_pretrained(recipe["start_from"], **stage)
        if recipe.get("plora") and not config.plora:
            config.plora = recipe["plora"]
    else:
        text_config = read_config(recipe["text_model"])
        config = BlspKdConfig(
            speech_config=read_config(recipe["speech_model"]).to_dict(),
            text_config=text_config.to_dict(),
            adapter={"type": recipe.get("adapter", "cformer"), **recipe.get("adapter_options", {})},
            plora=recipe.get("plora", False),
            audio_token_id=text_config.vocab_size,
            **stage,
        )
    speech_type = config.speech_config.model_type
    if speech_type != "whisper":
        raise ValueError(f"Costs are estimated for Whisper encoders, but {backbones(recipe)} has {speech_type!r}.")
    return config


def backbones(recipe: dict) -> str:
    """Return the names of the models that a recipe trains."""
    return recipe.get("start_from") or f"{recipe['speech_model']} + {recipe['text_model']}"


def build_model(config: BlspKdConfig, dtype: torch.dtype, checkpoints: bool) -> BlspKdForCausalLM:
    """Build a model in training mode, frozen weights in `dtype`, trained ones in float32, as `from_backbones` does."""
    model = BlspKdForCausalLM(config).train()
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    if checkpoints:
        model.activation_checkpointing_enable()
    return model


def make_batch(config: BlspKdConfig, batch_size: int, clip_s: float, assume: Assumptions) -> dict:
    """Make a batch of equal clips and prompts. Only the last one is shorter, so that padding is masked as usual."""
    num_content = max(2, round(clip_s * assume.tokens_per_s))
    num_before, num_response = assume.prompt_tokens, assume.response_tokens
    length = num_before + num_content + num_response
    text = torch.zeros(batch_size, length, dtype=torch.long)
    place = torch.arange(length).expand(batch_size, -1)
    is_token = torch.ones_like(text)
    is_token[-1, -1] = 0
    is_response = (place >= length - num_response) & is_token.bool()

    def spoken(values, at_placeholder: int | None):
        column = torch.full((batch_size, 1), at_placeholder)
        return torch.cat([values[:, :num_before], column, values[:, num_before + num_content :]], dim=1)

    num_mel_frames = round(100 * clip_s)
    features_mask = torch.ones(batch_size, num_mel_frames, dtype=torch.long)
    features_mask[-1, -2:] = 0
    return {
        "input_ids": spoken(text, config.audio_token_id),
        "attention_mask": spoken(is_token, 1),
        "labels": spoken(text.masked_fill(~is_response, -100), -100),
        "input_features": torch.zeros(batch_size, config.speech_config.num_mel_bins, num_mel_frames),
        "input_features_mask": features_mask,
        "num_speech_tokens": torch.full((batch_size,), num_content),
        "teacher_input_ids": text,
        "teacher_attention_mask": is_token,
        "teacher_is_content": (place >= num_before) & (place < num_before + num_content),
        "teacher_is_response": is_response,
    }


def count_parameters(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """Return the numbers of trained and frozen parameters by part."""
    partial_lora = [] if model.plora is None else model.plora.parameters
    is_partial_lora = {id(parameter) for parameter in partial_lora}
    parts = {
        "speech encoder": list(model.audio_tower.parameters()),
        "adapter": list(model.adapter.parameters()),
        "partial LoRA": partial_lora,
        "LLM": [each for each in model.language_model.parameters() if id(each) not in is_partial_lora],
    }
    return {
        part: tuple(sum(each.numel() for each in given if each.requires_grad == trained) for trained in (True, False))
        for part, given in parts.items()
    }


def gathered_bytes(model: PreTrainedModel, bf16: bool) -> int:
    """Return the bytes that FSDP2 gathers at one time: the weights outside of layers, and those of two layers."""
    layer_names = {*(model._no_split_modules or ()), *(model.language_model._no_split_modules or ())}

    def size(module) -> int:
        return sum(each.numel() * (2 if bf16 else each.element_size()) for each in module.parameters())

    layers = [size(module) for module in model.modules() if type(module).__name__ in layer_names]
    return size(model) - sum(layers) + 2 * max(layers)


def memory_of_gpu(memory: Memory, gathered: int, assume: Assumptions) -> dict[str, float]:
    """Return the bytes on one of the GPUs by purpose."""
    rows = {
        "weights": memory.weights / assume.num_shards,
        "gradients": memory.gradients / assume.num_shards,
        "optimiser states": memory.optimizer / assume.num_shards,
        "activations, temporary": memory.activations,
        "CUDA, fragmentation (assumed)": assume.overhead_gb * GB,
    }
    if assume.num_shards > 1:
        rows["gathered by FSDP2"] = gathered
    elif assume.num_gpus > 1:
        rows["buckets of DDP"] = memory.gradients
    return rows


def seconds_per_step(memory: Memory, operations: int, accumulation: int, assume: Assumptions) -> tuple[float, float]:
    """Return the seconds of a step's computation, and of its traffic, which at best overlap.

    FSDP2 gathers the weights three times a batch (teacher, student, backward); gradients are exchanged once a step.
    """
    compute_s = accumulation * operations / (assume.peak_tflops * 1e12 * assume.utilisation)
    gathered = 3 * accumulation * memory.weights * (1 - 1 / assume.num_shards)
    exchanged = 2 * memory.gradients * (1 - 1 / assume.num_gpus)
    return compute_s, (gathered + exchanged) / (assume.network_gb_per_s * GB)


def estimate(recipe: dict, assume: Assumptions, configs: Path | None = None) -> dict:
    """Return all figures of a recipe: `parameters`, `memory` (bytes), `operations` of a batch, and the whole run's.

    Args:
        recipe: options for `examples/train.py`.
        configs: see [`model_config`].
    """
    config, bf16 = model_config(recipe, configs), recipe.get("bf16", False)
    batch_size, accumulation = recipe["per_device_train_batch_size"], recipe.get("gradient_accumulation_steps", 1)
    dtype, checkpoints = getattr(torch, recipe.get("dtype", "float32")), recipe.get("activation_checkpointing", False)
    model = without_contents(lambda: build_model(config, dtype, checkpoints))
    longest, usual = (make_batch(config, batch_size, s, assume) for s in (assume.longest_clip_s, assume.clip_s))
    operations = count_operations(model, usual, bf16)
    accumulates = accumulation > 1 or assume.num_shards > 1
    memory = peak_memory(model, longest, bf16, accumulates, on_gpu=True)
    compute_s, network_s = seconds_per_step(memory, sum(operations.values()), accumulation, assume)
    clips_per_step = batch_size * accumulation * assume.num_gpus
    return {
        "parameters": count_parameters(model),
        "memory": memory_of_gpu(memory, gathered_bytes(model, bf16), assume),
        "operations": operations,
        "compute_s": compute_s,
        "network_s": network_s,
        "clips_per_step": clips_per_step,
        "clips_per_s": clips_per_step / max(compute_s, network_s),
        "hours": recipe["max_steps"] * max(compute_s, network_s) / 3600,
        "speech_hours": recipe["max_steps"] * clips_per_step * assume.clip_s / 3600,
    }
