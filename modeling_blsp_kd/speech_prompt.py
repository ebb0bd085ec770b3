"""Prompts with speech in them: where the speech tokens stand, and what the LLM reads there.

A prompt comes with one placeholder per audio. How many positions an audio takes is known only after the adapter has
run, so `SpeechPrompt` holds prompts as they come, and its `expand` repeats the placeholders. Leaves out: the adapter
(`adapters.py`), and the LLM that reads the prompts (`modeling_blsp_kd.py`).

Shapes: B prompts, L their length, P positions in a key-value cache, N clips in reading order, U speech tokens of a
clip, D LLM width.
"""

import copy
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig

from .speech_windows import is_within


@dataclass
class ExpandedPrompt:
    """A batch of prompts in which every audio has its positions.

    Args:
        input_ids, labels: (B, L); labels may be None.
        attention_mask (B, P + L): begins with that of P positions in a key-value cache, if there is one.
        is_speech (B, L): True at speech positions.
        speech_embeds (B, L, D): speech tokens at speech positions, zero elsewhere.
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

    def check_context(self, capacity: int | None, num_new_tokens: int = 0):
        """Check that an LLM's context can hold the prompts and an answer.

        Raises:
            ValueError: it holds fewer positions.
        """
        num_positions = self.attention_mask.shape[1]
        if capacity is not None and num_positions + num_new_tokens > capacity:
            raise ValueError(
                f"The prompt takes {num_positions} positions ({int(self.is_speech.sum(1).max())} of them speech), "
                f"but the LLM's context holds {capacity}, the answer included. Shorten the audio or the text. "
                "A pipeline for speech recognition cuts recordings itself: chunk_length_s=20."
            )


@dataclass
class SpeechPrompt:
    """A batch of prompts as they are given, with one placeholder per audio or, of known counts, one per speech token.

    Args:
        input_ids (B, L).
        audio_token_id (`int`): id of the placeholder.
        attention_mask (B, P + L), *optional*: see [`mask_after_cache`].
        labels (B, L), *optional*.
        position_ids (B or 1, L), *optional*: of the prompts as given; audio moves them on by the positions that it
            adds. Omitted: counted by the attention mask.
        text_embeds (B, L, D), *optional*: what is read instead of the embeddings of input_ids.
    """

    input_ids: torch.LongTensor
    audio_token_id: int
    attention_mask: torch.Tensor | None = None
    labels: torch.LongTensor | None = None
    position_ids: torch.LongTensor | None = None
    text_embeds: torch.FloatTensor | None = None
    is_placeholder: torch.BoolTensor = field(init=False)

    def __post_init__(self):
        # A placeholder's id at padding means nothing.
        self.is_placeholder = self.input_ids == self.audio_token_id
        if self.attention_mask is not None:
            is_token = self.attention_mask[:, -self.input_ids.shape[1] :].bool()
            self.is_placeholder = self.is_placeholder & is_token

    def is_repeated(self, num_audios: int, num_speech_tokens: torch.Tensor | None = None) -> bool:
        """Tell whether the placeholders stand once per speech token already, and not once per audio.

        Args:
            num_speech_tokens (`torch.LongTensor` of shape (N,), *optional*): counts that the audios are forced to.

        Raises:
            ValueError: the placeholders fit neither way.
        """
        num_placeholders = int(self.is_placeholder.sum())
        if num_placeholders == num_audios:
            return False
        if num_speech_tokens is not None and num_placeholders == int(num_speech_tokens.sum()):
            return True
        raise ValueError(
            f"The prompts hold {num_placeholders} audio placeholder(s) (token id {self.audio_token_id}), but "
            f"{num_audios} audio(s) were given. Write the placeholder exactly once per audio, in reading order."
        )

    def expand(
        self, speech_tokens: torch.Tensor, num_speech_tokens: torch.Tensor, is_repeated: bool, pad_id: int
    ) -> ExpandedPrompt:
        """Repeat the placeholder of each audio once per speech token, and pad anew on the side that was padded.

        Prompts without padding count as left-padded, which is what generation needs.

        Args:
            speech_tokens (N, U, D), num_speech_tokens (N,): what the adapter made of the audios.
            is_repeated (`bool`): of [`SpeechPrompt.is_repeated`].
            pad_id (`int`): token id at padding.
        """
        input_ids, attention_mask, is_placeholder = self.input_ids, self.attention_mask, self.is_placeholder
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

        # The source of every expanded position, in row-major order, then its place in its own row.
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
        speech_embeds = speech_tokens.new_zeros(*is_speech.shape, speech_tokens.shape[-1])
        speech_embeds[is_speech] = speech_tokens[is_within(num_speech_tokens, speech_tokens.shape[1])]
        expanded_mask = torch.cat([past_mask, expand(attention_mask, 0)], dim=1)
        if self.position_ids is None:
            position_ids = (expanded_mask.cumsum(1) - 1).clamp(min=0)[:, -max_length:]
        else:
            position_ids = expand(self.position_ids[:, -length:].expand(num_rows, -1), 0)
            position_ids[row, column] += num_added
        return ExpandedPrompt(
            input_ids=expand(input_ids, pad_id),
            attention_mask=expanded_mask,
            labels=None if self.labels is None else expand(self.labels.masked_fill(is_placeholder, -100), -100),
            is_speech=is_speech,
            speech_embeds=speech_embeds,
            position_ids=position_ids,
            text_embeds=None if self.text_embeds is None else expand(self.text_embeds, 0.0),
        )


def find_in_embeds(inputs_embeds: torch.Tensor, embeddings: nn.Module, audio_token_id: int) -> torch.LongTensor:
    """Return ids that tell the placeholders in embedded prompts from all else: (B, L, D) to (B, L).

    Args:
        embeddings (`nn.Module`): the LLM's, called with ids.

    Raises:
        ValueError: there are no embedded prompts, or the placeholder has no embedding.
    """
    if inputs_embeds is None or audio_token_id >= embeddings.weight.shape[0]:
        raise ValueError(
            "Audio needs a prompt: pass input_ids with one placeholder per audio (the processor does)"
            + (f", since the placeholder {audio_token_id} has no embedding." if inputs_embeds is not None else ".")
        )
    placeholder = embeddings(torch.tensor(audio_token_id, device=inputs_embeds.device))
    is_placeholder = (inputs_embeds == placeholder.to(inputs_embeds.dtype)).all(-1)
    return torch.where(is_placeholder, audio_token_id, -1)


def check_text_only(input_ids: torch.Tensor, attention_mask: torch.Tensor, audio_token_id: int | None):
    """Check that prompts without audio hold no placeholder.

    Raises:
        ValueError: they do.
    """
    if audio_token_id is None:
        return
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.shape != input_ids.shape:
        attention_mask = None  # of a static cache (also one mask per kind of layer), or 4-D
    SpeechPrompt(input_ids, audio_token_id, attention_mask).is_repeated(num_audios=0)


def cut_out(values: torch.Tensor, start: int, length: int) -> torch.Tensor:
    """Return what one call reads of a prompt: positions `start` to `start + length` of (B, L, ...).

    Positions past the prompt are generated text: zero, or False.
    """
    missing = max(0, start + length - values.shape[1])
    padding = (0, 0) * (values.ndim - 2) + (0, missing)
    return nn.functional.pad(values, padding, value=0)[:, start : start + length]


def unspoken_token_id(audio_token_id: int, text_config: PreTrainedConfig, generation_config: GenerationConfig) -> int:
    """Return an id for speech positions, which logits processors see in the prompt and which is never generated.

    The placeholder itself, as in other audio LLMs; if that lies outside the vocabulary, the start of text or
    whatever else does not look like an end.
    """
    if audio_token_id < text_config.vocab_size:
        return audio_token_id
    ends = {text_config.pad_token_id, generation_config.pad_token_id}
    for eos_token_id in (text_config.eos_token_id, generation_config.eos_token_id):
        ends |= set(eos_token_id) if isinstance(eos_token_id, (list, tuple)) else {eos_token_id}
    return next(
        token_id
        for token_id in chain([text_config.bos_token_id], range(text_config.vocab_size))
        if token_id is not None and token_id not in ends
    )


def suppress_token(
    token_id: int, generation_config: GenerationConfig | None, options: dict, defaults: GenerationConfig
) -> tuple[GenerationConfig | None, dict]:
    """Return config and other arguments of `generate`, changed so that no answer contains a token.

    Args:
        defaults (`GenerationConfig`): the model's own, whose suppressed tokens remain if the call names none.
    """
    named = defaults.suppress_tokens
    if generation_config is not None and generation_config.suppress_tokens is not None:
        named = generation_config.suppress_tokens
    suppressed = [*(options.get("suppress_tokens", named) or ()), token_id]
    if generation_config is None or "suppress_tokens" in options:
        return generation_config, {**options, "suppress_tokens": suppressed}
    # `generate` deprecates parameters beside a `generation_config`.
    generation_config = copy.deepcopy(generation_config)
    generation_config.suppress_tokens = suppressed
    return generation_config, options
