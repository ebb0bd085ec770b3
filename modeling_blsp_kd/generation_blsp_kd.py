"""Generation after prompts of text and audio: transformers' `generate` on the expanded prompt.

The prompt is expanded once, before `generate`, and goes on as `input_ids` plus speech vectors at their positions, so
that everything that reads or repeats prompts (beams, assistants, logits processors, caches) works as for text. Leaves
out: hearing and the forward pass (`modeling_blsp_kd.py`).

Shapes: B prompts, L prompt length, P positions in a key-value cache, A audio clips.
"""

import torch
from torch import nn
from transformers import GenerationMixin
from transformers.generation.streamers import BaseStreamer


class _OriginalPromptStreamer(BaseStreamer):
    """Shows a streamer the caller's prompt, with one placeholder per audio, instead of the expanded one."""

    def __init__(self, streamer: BaseStreamer, input_ids: torch.LongTensor):
        self.streamer = streamer
        self.prompt = input_ids

    def put(self, value):
        if self.prompt is not None:
            value, self.prompt = self.prompt, None
        self.streamer.put(value.cpu())

    def end(self):
        self.streamer.end()


class BlspKdGenerationMixin(GenerationMixin):
    """`generate` of [`BlspKdForCausalLM`]."""

    @torch.no_grad()
    def generate(self, inputs=None, generation_config=None, *args, input_features=None, streamer=None, **kwargs):
        """Generate after prompts of text and audio; see `GenerationMixin.generate` for all other arguments.

        The result begins with the prompts exactly as they were given (one placeholder per audio), so
        `output[:, inputs["input_ids"].shape[1]:]` are the new tokens. `max_length` counts LLM positions, speech
        tokens included; `max_new_tokens` is unaffected. Without audio this is the LLM's own `generate`.

        A conversation goes on from `past_key_values` in two ways. With the attention mask of the prompts alone, (B, L),
        the prompts are whole conversations with all their audios, and what the cache holds of them is not read again.
        With that of P cached and L new positions, (B, P + L), prompts and audios are the new turn alone.

        Args:
            input_ids, attention_mask (B, L): prompts, left-padded; from the processor.
            input_features, input_features_mask, *optional*: their audio clips; from the processor.
            num_speech_tokens (`torch.LongTensor` of shape (A,), *optional*): tokens that CIF must fire.
            streamer ([`~transformers.generation.BaseStreamer`], *optional*): receives text tokens as they come.

        Raises:
            ValueError: placeholders and audios do not fit together, or the prompts do not fit the LLM's context or
                the cache.
        """
        input_ids = kwargs.pop("input_ids", inputs)
        input_features_mask = kwargs.pop("input_features_mask", None)
        num_speech_tokens = kwargs.pop("num_speech_tokens", None)
        if input_ids is not None and input_ids.dtype.is_floating_point:
            raise ValueError("generate takes prompts as input_ids, got floats. Pass audio as input_features.")
        if input_ids is not None:
            kwargs["input_ids"] = input_ids
        if input_features is None:
            # An assistant is given prompts that were expanded for the model it assists.
            if input_ids is not None and kwargs.get("speech_embeds") is None:
                self._check_text_only(input_ids, kwargs.get("attention_mask"))
            return super().generate(None, generation_config, *args, streamer=streamer, **kwargs)

        if input_ids is None:
            raise ValueError(
                "Audio needs a prompt: pass input_ids with one placeholder per audio (the processor does)."
            )
        attention_mask, cache = kwargs.pop("attention_mask", None), kwargs.get("past_key_values")
        num_past = 0 if cache is None else int(cache.get_seq_length())
        is_new_turn = attention_mask is not None and attention_mask.shape[1] != input_ids.shape[1]
        if is_new_turn:
            attention_mask = self._mask_after_cache(input_ids, attention_mask, num_past)
        prompt, _ = self._hear_prompt(
            input_ids, attention_mask, None, input_features, input_features_mask, num_speech_tokens
        )
        self._check_context(prompt, num_new_tokens=1)
        if not is_new_turn and prompt.input_ids.shape[1] <= num_past:
            raise ValueError(
                f"past_key_values hold {num_past} positions, but the whole conversation only takes "
                f"{prompt.input_ids.shape[1]}. Pass all of it, or the attention_mask of cached and new positions."
            )
        # Positions count from the start of the cache.
        num_before = num_past if is_new_turn else 0
        kwargs |= {
            "input_ids": prompt.input_ids.masked_fill(prompt.is_speech, self._unspoken_token_id()),
            "attention_mask": prompt.attention_mask,
            "is_speech": nn.functional.pad(prompt.is_speech, (num_before, 0), value=False),
            "speech_embeds": nn.functional.pad(prompt.speech_embeds, (0, 0, num_before, 0)),
        }
        if streamer is not None:
            streamer = _OriginalPromptStreamer(streamer, input_ids)
        output = super().generate(None, generation_config, *args, streamer=streamer, **kwargs)

        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        originals = input_ids.repeat_interleave(len(sequences) // len(input_ids), dim=0)
        sequences = torch.cat([originals, sequences[:, prompt.input_ids.shape[1] :]], dim=1)
        if isinstance(output, torch.Tensor):
            return sequences
        output.sequences = sequences
        return output

    def prepare_inputs_for_generation(
        self, *args, is_first_iteration=False, speech_embeds=None, is_speech=None, **kwargs
    ):
        inputs = super().prepare_inputs_for_generation(*args, is_first_iteration=is_first_iteration, **kwargs)
        # Speech is part of the prompt: with a cache, later steps are plain text.
        if is_first_iteration or not kwargs.get("use_cache", True):
            inputs |= {"speech_embeds": speech_embeds, "is_speech": is_speech}
        return inputs
