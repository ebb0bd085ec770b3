"""Count the operations of a training step of the real model, without its weights, by part.

Counts with torch's `FlopCounterMode` in the step of `step_cost.py`, attention as GPUs compute it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import PreTrainedModel

from ..speech_encoder import encode_speech
from .step_cost import FAKE, FakeNumbers, with_fake_features


def count_operations(model: PreTrainedModel, batch: dict, bf16: bool) -> dict[str, int]:
    """Count the operations (2 per multiplication and addition) of forward and backward by part.

    Frozen weights get no gradient, but it flows through them; what checkpointing repeats is counted again. torch's
    counter assigns some of backward to wrong parts, so the parts run alone, and the adapter is the remainder. For the
    arguments, see [`peak_memory`].
    """
    batch, llm = with_fake_features(batch), model.language_model.base_model
    llm_name = f"language_model.{model.language_model.base_model_prefix}"
    with FAKE:
        embeds = torch.zeros(*batch["teacher_input_ids"].shape, llm.config.hidden_size, requires_grad=True)

    def encoder():
        frames = encode_speech(model.audio_tower, batch["input_features"], batch["input_features_mask"])
        return frames.last_hidden_state.sum()

    def student():
        inputs = {"inputs_embeds": embeds, "attention_mask": batch["teacher_attention_mask"], "use_cache": False}
        return llm(**inputs).last_hidden_state.sum()

    total, in_forward = _count(lambda: model(**batch).loss, bf16)
    with model._partial_lora_at(batch["teacher_is_content"]):
        of_student, student_forward = _count(student, bf16)
    of_encoder, _ = _count(encoder, bf16)
    model.zero_grad()
    name = type(model).__name__
    # The KL computes all its products in forward, outside of these parts.
    vocabulary = in_forward[name] - sum(in_forward[f"{name}.{part}"] for part in ("audio_tower", "adapter", llm_name))
    teacher = in_forward[f"{name}.{llm_name}"] - student_forward["Global"]
    return {
        "speech encoder": of_encoder,
        "adapter": total - of_encoder - of_student - teacher - vocabulary,
        "LLM as student": of_student,
        "LLM as teacher": teacher,
        "vocabulary": vocabulary,
    }


def _count(function: Callable[[], torch.Tensor], bf16: bool) -> tuple[int, dict[str, int]]:
    """Count the operations of a function with the backward of its result, and those of forward by module."""
    counter = FlopCounterMode(display=False)
    with FakeNumbers(), counter, _counted_attention(counter):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output = function()
        in_forward = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
        if output.requires_grad:
            output.backward()
    return counter.get_total_flops(), in_forward


@contextmanager
def _counted_attention(counter: FlopCounterMode) -> Iterator[None]:
    """Count attention as GPUs compute it, which is all that the counter knows. The step here runs that of CPUs."""
    attend = nn.functional.scaled_dot_product_attention

    def add(operations: int):
        for module in counter.mod_tracker.parents:
            counter.flop_counts[module][attend] += operations

    def attend_and_count(query, key, value, *args, **kwargs):
        counted = counter.get_total_flops()
        output = attend(query, key, value, *args, **kwargs)
        if counter.get_total_flops() == counted:  # with dropout it is made of products, which are counted
            # Heads of keys and values that several of the queries share are repeated.
            shapes = [query.shape, *(query.shape[:2] + each.shape[2:] for each in (key, value))]
            add(sdpa_flop_count(*shapes))
            if output.requires_grad:
                operations = sdpa_backward_flop_count(output.shape, *shapes)
                output.register_hook(lambda _: add(operations))
        return output

    with patch.object(nn.functional, "scaled_dot_product_attention", attend_and_count):
        yield
