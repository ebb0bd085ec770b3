"""Partial LoRA beside the same LLM without it: prompts that are speech in part, text prompts, decoding steps, training.

The LLM has the shape of Qwen2-0.5B, cut to a few layers, without its output head. Leaves out: how right it is
(`tests/test_plora.py`).
"""

import copy

import torch
from transformers import DynamicCache, Qwen2Config, Qwen2Model

from modeling_blsp_kd.plora import PartialLora

from .measure import OURS, Case

SIZE = {"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2}
SMALL_SIZE = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
REPEATS = 11


def cases(small: bool, device, dtype):
    config = Qwen2Config(**(SMALL_SIZE if small else SIZE), num_hidden_layers=2 if small else 4, vocab_size=1000)
    base = Qwen2Model(config).to(device, dtype).eval().requires_grad_(False)
    adapted = copy.deepcopy(base)
    plora = PartialLora(adapted, r=16, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear")
    adapted.to(device, dtype).eval()
    for num_positions in (8,) if small else (32, 66, 256):
        for speech_share in (0.0, 0.5, 1.0):
            yield _prefill(base, adapted, plora, (1, num_positions), speech_share)
    for num_positions in (8,) if small else (66,):
        yield _prefill(base, adapted, plora, (8, num_positions), 0.5)
        yield _training(base, adapted, plora, (4, num_positions))
    yield _decoding(base, adapted)


def _inputs(model, size, speech_share: float):
    """Embeddings, and which of them are speech: the middle of each prompt."""
    num_speech = round(speech_share * size[1])
    start = (size[1] - num_speech) // 2
    is_speech = torch.zeros(size, dtype=torch.bool, device=model.device)
    is_speech[:, start : start + num_speech] = True
    return torch.randn(*size, model.config.hidden_size, device=model.device, dtype=model.dtype), is_speech


def _case(name: str, ours, base, unit_bytes: int) -> Case:
    return Case(
        name=name, candidates={OURS: ours, "base LLM": base}, memory_unit=("input", unit_bytes), repeats=REPEATS
    )


def _prefill(base, adapted, plora, size, speech_share: float) -> Case:
    embeds, is_speech = _inputs(base, size, speech_share)

    @torch.no_grad()
    def run(model):
        return model(inputs_embeds=embeds, use_cache=False).last_hidden_state

    def ours():
        # As the model does: without audio in a call, there is no mask.
        with plora.at(is_speech if speech_share else None):
            return run(adapted)

    name = f"prompts {size}, {speech_share:.0%} speech"
    return _case(name, ours, lambda: run(base), embeds.numel() * embeds.element_size())


def _training(base, adapted, plora, size) -> Case:
    embeds, is_speech = _inputs(base, size, 0.5)
    embeds.requires_grad_()
    direction = torch.randn_like(embeds)

    def run(model, trained):
        states = model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        return torch.autograd.grad(states, [embeds, *trained], direction)

    def ours():
        with plora.at(is_speech):
            return run(adapted, plora.parameters)

    name = f"forward + backward {size}, 50% speech"
    return _case(name, ours, lambda: run(base, []), embeds.numel() * embeds.element_size())


def _decoding(base, adapted) -> Case:
    prompt, _ = _inputs(base, (1, 32), 0.0)
    step = prompt[:, :1]
    caches = {}
    for model in (base, adapted):
        caches[model] = DynamicCache(config=model.config)
        with torch.no_grad():
            model(inputs_embeds=prompt, past_key_values=caches[model])

    @torch.no_grad()
    def run(model):
        states = model(inputs_embeds=step, past_key_values=caches[model]).last_hidden_state
        caches[model].crop(-1)
        return states

    return _case("a decoding step", lambda: run(adapted), lambda: run(base), step.numel() * step.element_size())
