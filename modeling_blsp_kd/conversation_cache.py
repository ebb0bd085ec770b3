"""Conversations that go on from a key-value cache: which of its positions are padding, and whether prompts fit it.

A cache does not tell where the prompts in it were padded, and only `generate` knows how prompts with audio were
expanded. So the mask of the cached positions is kept on the cache. Leaves out: the two ways to go on, which `generate`
documents (`generation_blsp_kd.py`).

Shapes: B prompts, L their length, P positions in the cache.
"""

from typing import Any

import torch
from torch import nn
from transformers import Cache
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .speech_prompt import ExpandedPrompt
from .versions import CACHE_NAME


def mask_after_cache(attention_mask: torch.Tensor, input_ids: torch.Tensor, num_past: int) -> torch.LongTensor | None:
    """Return the attention mask of P cached and L new positions, (B, P + L); None if there is no cache and no mask.

    Args:
        attention_mask (B, P + L), *optional*; input_ids (B, L).
        num_past (`int`): P.

    Raises:
        ValueError: the mask is of another shape, or is missing where there may be padding.
    """
    if attention_mask is None and num_past == 0:
        return None
    batch_size, length = input_ids.shape
    if attention_mask is None and batch_size == 1:
        return input_ids.new_ones(1, num_past + length)
    expected = (batch_size, num_past + length)
    if attention_mask is None or tuple(attention_mask.shape) != expected:
        raise ValueError(
            f"A prompt with audio needs the attention_mask of {num_past} cached and {length} new positions, of shape "
            f"{expected}, but got {None if attention_mask is None else tuple(attention_mask.shape)}."
        )
    # As in the LLM alone it may be of any dtype. Half precision cannot count positions beyond 256.
    return attention_mask.long()


def check_cache(prompt: ExpandedPrompt, cache: Cache, num_past: int):
    """Check that whole conversations begin with what the cache holds, at the same positions.

    Args:
        prompt ([`ExpandedPrompt`]): the whole conversations.
        cache (`Cache`), num_past (`int`): the key-value cache, and its number of positions.

    Raises:
        ValueError: they are shorter than that, or padded in another way.
    """
    if prompt.input_ids.shape[1] <= num_past:
        raise ValueError(
            f"past_key_values hold {num_past} positions, but the whole conversation only takes "
            f"{prompt.input_ids.shape[1]}. Pass all of it, or the attention_mask of cached and new positions."
        )
    cached_mask = getattr(cache, "attention_mask", None)
    if cached_mask is None or cached_mask.shape != (len(prompt.input_ids), num_past):
        return
    if not torch.equal(cached_mask.bool(), prompt.attention_mask[:, :num_past].bool()):
        raise ValueError(
            "These whole conversations are padded otherwise than past_key_values were, so the cache does not fit "
            "them. Pass the new turn alone, with the attention_mask of cached and new positions: "
            "torch.cat([past_key_values.attention_mask, new_attention_mask], dim=1)."
        )


def note_mask(output: Any, prompt_mask: torch.Tensor, prompt_length: int, settings: dict):
    """Keep the mask of the cached positions on the cache, because only this call knows how prompts were expanded.

    Args:
        output: of transformers' `generate`; only its own single sequences have a cache that can go on.
        prompt_mask (B, P + L), *optional*: what `generate` was given; omitted, one prompt without padding.
        prompt_length (`int`): how much of each sequence is prompt.
        settings (`dict`): `eos_token_id` and `pad_token_id` of this call.
    """
    if not isinstance(output, GenerateDecoderOnlyOutput) or CACHE_NAME not in output:
        return
    cache, answers = output[CACHE_NAME], output.sequences[:, prompt_length:]
    num_cached = int(cache.get_seq_length())
    if prompt_mask is None and len(answers) > 1:
        cache.attention_mask = None  # transformers guessed where padding is
        return
    if prompt_mask is None:
        prompt_mask = answers.new_ones(1, max(0, num_cached + 1 - answers.shape[1]))
    ends = torch.as_tensor([] if settings["eos_token_id"] is None else settings["eos_token_id"]).flatten().tolist()
    pad_token_id = settings["pad_token_id"]
    if pad_token_id is None and ends:
        pad_token_id = ends[0]
    # Rows that end before the longest one continue with padding, whatever ended them.
    is_pad_token = torch.zeros_like(answers) if pad_token_id is None else (answers == pad_token_id).long()
    is_padding = is_pad_token.flip(1).cumprod(1).flip(1).bool()
    if pad_token_id in ends:
        # The first of them is part of the answer.
        is_padding = is_padding & nn.functional.pad(is_padding, (1, 0), value=False)[:, :-1]
    prompt_mask = prompt_mask.repeat_interleave(len(answers) // len(prompt_mask), dim=0)
    cache.attention_mask = torch.cat([prompt_mask, (~is_padding).to(prompt_mask)], dim=1)[:, :num_cached]
