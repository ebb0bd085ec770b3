"""Prompts with speech in them: where the speech tokens stand, and what the LLM reads there.

A prompt comes with one placeholder per audio. How many positions an audio takes is known only after the adapter has
heard it, so the placeholder is repeated here. Leaves out: hearing (`adapters.py`) and reading (`modeling_blsp_kd.py`).

Shapes: B prompts, L their length, A clips in reading order, U speech tokens of a clip, D LLM width.
"""

from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class SpeechPrompt:
    """A batch of prompts in which every audio has its positions.

    Args:
        input_ids, labels: (B, L); labels may be None.
        attention_mask (B, P + L): begins with that of P positions in a key-value cache, if there is one.
        is_speech (B, L): True at speech positions.
        speech_embeds (B, L, D): speech vectors at speech positions, zero elsewhere.
        text_embeds (B, L, D), *optional*: the caller's own embeddings of the text.
        position_ids (B, L): of the expanded prompt.
    """

    input_ids: torch.LongTensor
    attention_mask: torch.LongTensor
    labels: torch.LongTensor | None
    is_speech: torch.BoolTensor
    speech_embeds: torch.FloatTensor
    position_ids: torch.LongTensor
    text_embeds: torch.FloatTensor | None = None


def find_placeholders(input_ids, attention_mask, audio_token_id: int) -> torch.BoolTensor:
    """True at audio placeholders that are not padding: (B, L)."""
    is_placeholder = input_ids == audio_token_id
    if attention_mask is None:
        return is_placeholder
    return is_placeholder & attention_mask[:, -input_ids.shape[1] :].bool()


def check_placeholders(is_placeholder, audio_token_id: int, num_audios: int, num_speech_tokens=None) -> bool:
    """Whether the placeholders are already repeated, one per speech token.

    Args:
        num_speech_tokens (`torch.LongTensor` of shape (A,), *optional*): counts that the audios are forced to.

    Raises:
        ValueError: the placeholders fit neither way.
    """
    num_placeholders = int(is_placeholder.sum())
    if num_placeholders == num_audios:
        return False
    if num_speech_tokens is not None and num_placeholders == int(num_speech_tokens.sum()):
        return True
    raise ValueError(
        f"The prompts hold {num_placeholders} audio placeholder(s) (token id {audio_token_id}), but {num_audios} "
        "audio(s) were given. Write the placeholder exactly once per audio, in reading order."
    )


def lay_out(
    input_ids,
    attention_mask,
    labels,
    is_placeholder,
    is_repeated: bool,
    speech_embeds,
    num_speech_tokens,
    pad_id: int,
    text_embeds=None,
    position_ids=None,
) -> SpeechPrompt:
    """Repeat the placeholder of each audio once per speech token, and pad anew on the side that was padded.

    Prompts without padding count as left-padded, which is what generation needs.

    Args:
        input_ids (B, L), attention_mask (B, P + L) or None.
        is_placeholder (B, L), is_repeated: of [`find_placeholders`] and [`check_placeholders`].
        speech_embeds (A, U, D), num_speech_tokens (A,): what the adapter made of the audios.
        pad_id: token id at padding.
        text_embeds (B, L, D), *optional*: what is read instead of the embeddings of input_ids.
        position_ids (B or 1, L), *optional*: of the prompts as given; they shift by what audios before have added.
            Omitted: counted by the attention mask.
    """
    if attention_mask is None:
        if len(input_ids) > 1 and bool((input_ids[:, [0, -1]] == pad_id).any()):
            raise ValueError("A batch of padded audio prompts needs its attention_mask; the processor returns it.")
        attention_mask = torch.ones_like(input_ids)
    num_rows, length = input_ids.shape
    past_mask, attention_mask = attention_mask[:, :-length], attention_mask[:, -length:]
    repeats = attention_mask.long()
    if not is_repeated:
        repeats = repeats.masked_scatter(is_placeholder, num_speech_tokens.to(repeats))
    lengths = repeats.sum(1)

    # Row-major source position of every expanded position, then its place in its own row.
    source = torch.arange(num_rows * length, device=input_ids.device).repeat_interleave(repeats.flatten())
    row, column = source // length, torch.arange(source.shape[0], device=source.device)
    column = column - (lengths.cumsum(0) - lengths)[row]
    num_added = column - (attention_mask.cumsum(1) - 1).flatten()[source]
    max_length = int(lengths.max())
    if bool(attention_mask[:, -1].all()):
        column = column + (max_length - lengths)[row]

    def expand(values, fill):
        expanded = values.new_full((num_rows, max_length, *values.shape[2:]), fill)
        expanded[row, column] = values.flatten(0, 1)[source]
        return expanded

    is_speech = expand(is_placeholder, False)
    is_token = torch.arange(speech_embeds.shape[1], device=num_speech_tokens.device) < num_speech_tokens[:, None]
    embeds = speech_embeds.new_zeros(*is_speech.shape, speech_embeds.shape[-1])
    embeds[is_speech] = speech_embeds[is_token]
    expanded_mask = torch.cat([past_mask, expand(attention_mask, 0)], dim=1)
    if position_ids is None:
        position_ids = (expanded_mask.cumsum(1) - 1).clamp(min=0)[:, -max_length:]
    else:
        position_ids = expand(position_ids[:, -length:].expand(num_rows, -1), 0)
        position_ids[row, column] += num_added
    return SpeechPrompt(
        input_ids=expand(input_ids, pad_id),
        attention_mask=expanded_mask,
        labels=None if labels is None else expand(labels.masked_fill(is_placeholder, -100), -100),
        is_speech=is_speech,
        speech_embeds=embeds,
        position_ids=position_ids,
        text_embeds=None if text_embeds is None else expand(text_embeds, 0.0),
    )


def cut_out(values, start: int, length: int):
    """What one call reads of a prompt: positions `start` to `start + length` of (B, L, ...).

    Positions past the prompt are generated text: zero, or False.
    """
    missing = max(0, start + length - values.shape[1])
    padding = (0, 0) * (values.ndim - 2) + (0, missing)
    return nn.functional.pad(values, padding, value=0)[:, start : start + length]
