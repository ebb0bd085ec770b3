"""Transcripts by `generate`, as speech-to-text servers call it: with features alone, for the answer alone.

Such servers (`transformers serve`) treat all models as they treat Whisper. Leaves out: the prompt, which the processor
makes, and `generate` itself (`generation_blsp_kd.py`).
"""

import math
from typing import Any

import torch
from transformers import PreTrainedConfig

from .encoder_families import WINDOW_S, window_of

# Nobody speaks so fast in tokens, not even in bytes. A limit that a transcript reaches would cut it without a word.
MAX_TOKENS_PER_S = 25
MAX_OTHER_TOKENS = 16


def longest_transcript(config: PreTrainedConfig, input_features: torch.Tensor) -> int:
    """Return how many tokens a transcript of these features has at most.

    Args:
        config (`PreTrainedConfig`): of the speech encoder.
        input_features (`torch.FloatTensor` of shape (N, ...)): padded to the longest clip.
    """
    window_length, time_axis = window_of(config)
    duration_s = input_features.shape[time_axis] / window_length * WINDOW_S
    return MAX_OTHER_TOKENS + math.ceil(MAX_TOKENS_PER_S * duration_s)


def without_prompts(output: Any, prompt_length: int) -> Any:
    """Return what `generate` returned, without the prompts before the answers."""
    if isinstance(output, torch.Tensor):
        return output[:, prompt_length:]
    for name in {"sequences", "token_timestamps"} & output.keys():
        output[name] = output[name][:, prompt_length:]
    return output
