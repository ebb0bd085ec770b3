"""A prompt that grows while one speaks, whose beginning is in the LLM's key-value cache.

`read` and `generate` take whole prompts and compute what the cache does not hold of them. So it does not matter why a
prompt differs from the one before: speech went on, a template rewrites earlier turns, an answer was cut short. Leaves
out: chats and their turns, which the processor renders.

Shapes: L positions of a prompt, D LLM width, V vocabulary.
"""

from typing import Any

import torch
from torch import nn
from transformers import Cache

from .speech_prompt import unspoken_token_id
from .versions import CACHE_NAME

# What a session decides itself, and options that make several sequences of a prompt.
OF_THE_PROMPT = {
    "inputs",
    "input_ids",
    "inputs_embeds",
    "attention_mask",
    "position_ids",
    "input_features",
    "input_features_mask",
    "num_speech_tokens",
    "past_key_values",
    "cache",
    "use_cache",
    "return_dict_in_generate",
    "return_timestamps",
}


class CachedPrompt:
    """A prompt of text and speech, one of them at a time.

    A prompt is a list of whole numbers: token ids, and for each speech token the negative number that
    [`~CachedPrompt.add_speech`] gave it.

    Args:
        model ([`BlspKdForCausalLM`]).
    """

    def __init__(self, model: Any):
        self.model = model
        width = model.get_input_embeddings().weight.shape[1]
        self.speech_tokens = torch.zeros(0, width, device=model.device, dtype=model.adapter.output_proj.weight.dtype)
        self.forget()

    def forget(self):
        """Empty the cache. Speech tokens stay."""
        self.cached: list[int] = []
        self.cache: Cache | None = None
        self.logits: torch.Tensor | None = None

    def add_speech(self, speech_tokens: torch.Tensor) -> list[int]:
        """Keep speech tokens, (U, D), and return the numbers that stand for them in prompts."""
        first = len(self.speech_tokens)
        self.speech_tokens = torch.cat([self.speech_tokens, speech_tokens.to(self.speech_tokens)])
        return [-1 - index for index in range(first, len(self.speech_tokens))]

    def drop_speech(self, num_kept: int):
        """Drop all speech tokens but the first ones, and what the cache holds of them."""
        if num_kept < len(self.speech_tokens):
            self.speech_tokens = self.speech_tokens[:num_kept]
            dropped = [index for index, number in enumerate(self.cached) if number < -num_kept]
            self._crop(min(dropped, default=len(self.cached)))

    @torch.no_grad()
    def read(self, prompt: list[int]):
        """Bring a prompt into the cache, and only it. `logits` (V,) then predict what follows it.

        Raises:
            ValueError: the LLM's context does not hold it.
        """
        self._check_context(len(prompt))
        self._crop(self._num_common(prompt))
        new = prompt[len(self.cached) :]
        if not new:
            return
        is_speech, speech_embeds = self._speech_in(new)
        text_embeds = self.model.get_input_embeddings()(self._ids(new))
        given = {
            "inputs_embeds": torch.where(is_speech[..., None], speech_embeds.to(text_embeds), text_embeds),
            "attention_mask": torch.ones(1, len(prompt), dtype=torch.long, device=self.model.device),
            "is_speech": nn.functional.pad(is_speech, (len(self.cached), 0), value=False),
            "use_cache": True,
            "logits_to_keep": 1,
            "return_dict": True,
            CACHE_NAME: self.cache,
        }
        try:
            output = self.model(**given)
        except BaseException:
            self.forget()  # some layers may have read it
            raise
        self.cache, self.cached, self.logits = output[CACHE_NAME], list(prompt), output.logits[0, -1].float()

    def generate(self, prompt: list[int], **kwargs: Any) -> list[int]:
        """Generate after a prompt, and keep prompt and answer in the cache.

        Args:
            kwargs: of the model's `generate`, for one sequence.

        Returns:
            `list[int]`: the new token ids.

        Raises:
            ValueError: the LLM's context does not hold the prompt and one more token, or an option is not for this.
        """
        self.check_options(kwargs)
        self._check_context(len(prompt) + 1)
        self._crop(min(self._num_common(prompt), len(prompt) - 1))  # the last position predicts the first token
        is_speech, speech_embeds = self._speech_in(prompt)
        input_ids = self._ids(prompt)
        cache = {} if self.cache is None else {CACHE_NAME: self.cache}
        try:
            output = self.model.generate(
                input_ids=input_ids,
                attention_mask=torch.ones_like(input_ids),
                is_speech=is_speech,
                speech_embeds=speech_embeds,
                return_dict_in_generate=True,
                **cache,
                **kwargs,
            )
        except BaseException:
            self.forget()
            raise
        new = output.sequences[0, len(prompt) :].tolist()
        self.cache, self.logits = output.get(CACHE_NAME), None
        # The last token was not read any more.
        self.cached = [*prompt, *new][: 0 if self.cache is None else int(self.cache.get_seq_length())]
        return new

    def check_options(self, options: dict):
        """Check options of `generate`.

        Raises:
            ValueError: an option gives another prompt, or asks for several sequences.
        """
        if names := sorted(OF_THE_PROMPT & set(options)):
            raise ValueError(f"{names} cannot be given here: prompt and cache are the session's own.")
        config = options.get("generation_config") or self.model.generation_config
        for name in ("num_beams", "num_return_sequences"):
            number = options.get(name, getattr(config, name, None))
            if number is not None and number > 1:
                raise ValueError(f"A session has one answer at a time, but {name} is {number}. Set it to 1.")

    def _check_context(self, num_positions: int):
        capacity = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if capacity is not None and num_positions > capacity:
            raise ValueError(
                f"The conversation takes {num_positions} positions ({len(self.speech_tokens)} of them speech), but the "
                f"LLM's context holds {capacity}, the answer included. Begin anew: reset()."
            )

    def _num_common(self, prompt: list[int]) -> int:
        pairs = enumerate(zip(self.cached, prompt))
        return next((index for index, (old, new) in pairs if old != new), min(len(self.cached), len(prompt)))

    def _crop(self, length: int):
        """Take off the cache what stands behind `length` positions; all, if it cannot be cropped."""
        num_removed = len(self.cached) - length
        if num_removed <= 0:
            return
        self.logits = None
        if length == 0 or self.cache is None or not self.cache.is_croppable:
            self.forget()
            return
        try:
            self.cache.crop(-num_removed)
        except RuntimeError:  # a sliding window has lost what it would go back to
            self.forget()
            return
        self.cached = self.cached[:length]

    def _ids(self, prompt: list[int]) -> torch.LongTensor:
        config = self.model.config
        unspoken = unspoken_token_id(config.audio_token_id, config.get_text_config(), self.model.generation_config)
        return torch.tensor([[unspoken if number < 0 else number for number in prompt]], device=self.model.device)

    def _speech_in(self, prompt: list[int]) -> tuple[torch.BoolTensor, torch.Tensor]:
        """Return where a prompt is speech, (1, L), and the speech tokens there, (1, L, D)."""
        numbers = torch.tensor(prompt, device=self.model.device)
        is_speech = numbers < 0
        embeds = self.speech_tokens.new_zeros(len(prompt), self.speech_tokens.shape[1])
        embeds[is_speech] = self.speech_tokens[-1 - numbers[is_speech]]
        return is_speech[None], embeds[None]
