"""Generation after prompts of text and audio: transformers' `generate` on the expanded prompt.

The prompt is expanded once, before `generate`, and goes on as `input_ids` plus speech vectors at their positions, so
that everything that reads or repeats prompts (beams, assistants, logits processors, caches) works as for text. Leaves
out: encoding the clips and the forward pass (`modeling_blsp_kd.py`).

Shapes: B prompts, L prompt length, P positions in a key-value cache, N audio clips.
"""

from typing import Any

import torch
from torch import nn
from transformers import Cache, GenerationConfig, GenerationMixin
from transformers.generation.streamers import BaseStreamer
from transformers.utils import ModelOutput

from .configuration_blsp_kd import own_options
from .conversation_cache import check_cache, note_mask
from .speech_prompt import ExpandedPrompt, check_text_only, suppress_token, unspoken_token_id
from .token_times import answer_token_times
from .transcription import longest_transcript, without_prompts
from .versions import CACHE_NAME, CACHE_NAMES, one_cache


class _OriginalPromptStreamer(BaseStreamer):
    """Show a streamer the caller's prompt, with one placeholder per audio, instead of the expanded one."""

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
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args,
        input_features: torch.Tensor | None = None,
        streamer: Any = None,
        return_timestamps: bool = False,
        transcription_prompt_ids: torch.Tensor | None = None,
        **kwargs,
    ) -> Any:
        """Generate after prompts of text and audio; see `GenerationMixin.generate` for all other arguments.

        The result begins with the prompts exactly as they were given (one placeholder per audio), so
        `output[:, inputs["input_ids"].shape[1]:]` are the new tokens. `max_length` counts LLM positions, speech
        tokens included; `max_new_tokens` is unaffected. Without audio this is the LLM's own `generate`.

        A conversation goes on from a key-value cache (`past_key_values` or `cache`, which are the same) in two ways.
        With the attention mask of the prompts alone, (B, L), the prompts are whole conversations with all their audios,
        and what the cache holds of them is not read again. With that of P cached and L new positions, (B, P + L),
        prompts and audios are the last generated token and the new turn. The mask of the cached positions, (B, P), is
        `past_key_values.attention_mask` of the output.

        Args:
            input_ids, attention_mask (B, L): prompts, left-padded; from the processor.
            inputs_embeds (B, L, D), *optional*: their embeddings, to be read instead.
            input_features, input_features_mask, *optional*: their audio clips; from the processor.
            num_speech_tokens (`torch.LongTensor` of shape (N,), *optional*): tokens that CIF must fire.
            streamer ([`~transformers.generation.BaseStreamer`], *optional*): receives text tokens as they come.
            return_timestamps (`bool`): tell when each token was said, which makes sense for answers that repeat what
                was said. The output is then an object as with `return_dict_in_generate=True`, with `token_timestamps`
                (a float tensor of the shape of `sequences` and 2): start and end in seconds of each token in its row's
                audio; NaN at prompts, at the ends of answers, and in rows without audio. A prompt has at most one
                audio then.
            transcription_prompt_ids (`torch.LongTensor` of shape (B, L), *optional*): prompts instead of `input_ids`,
                which the result does not begin with; from the processor, called with a waveform alone.

        Raises:
            ValueError: placeholders and audios do not fit together, the prompts do not fit the LLM's context or the
                cache, or there are no timestamps for them.
        """
        if transcription_prompt_ids is not None:
            if inputs is not None or input_features is None or kwargs.keys() & {"input_ids", "inputs_embeds"}:
                raise ValueError("transcription_prompt_ids go with input_features, and without any other prompts.")
            if generation_config is None and not kwargs.keys() & {"max_new_tokens", "max_length"}:
                kwargs["max_new_tokens"] = longest_transcript(self.config.speech_config, input_features)
            options = {"input_features": input_features, "streamer": streamer, "return_timestamps": return_timestamps}
            output = self.generate(transcription_prompt_ids, generation_config, *args, **options, **kwargs)
            return without_prompts(output, transcription_prompt_ids.shape[1])
        input_ids = kwargs.pop("input_ids", inputs)
        cache = one_cache(*(kwargs.pop(name, None) for name in CACHE_NAMES))
        if cache is not None:
            kwargs[CACHE_NAME] = cache
        clips = {name: kwargs.pop(name, None) for name in ("input_features_mask", "num_speech_tokens")}
        defaults = generation_config or self.generation_config
        settings = {name: kwargs.get(name, getattr(defaults, name)) for name in ("eos_token_id", "pad_token_id")}
        if kwargs.get("tokenizer") is not None:
            # `transformers serve` passes the processor, which lacks the vocabulary that stop strings need.
            kwargs["tokenizer"] = getattr(kwargs["tokenizer"], "tokenizer", kwargs["tokenizer"])
        if input_ids is not None and input_ids.dtype.is_floating_point:
            raise ValueError("generate takes prompts as input_ids, got floats. Pass audio as input_features.")
        if return_timestamps:
            self._check_timestamps(input_features)
            kwargs["return_dict_in_generate"] = True
        if input_features is None:
            if input_ids is not None:
                # An assistant model receives prompts that the main model has already expanded.
                if kwargs.get("speech_embeds") is None:
                    check_text_only(input_ids, kwargs.get("attention_mask"), self.config.audio_token_id)
                kwargs["input_ids"] = input_ids
            output = super().generate(None, generation_config, *args, streamer=streamer, **kwargs)
            prompt_length = 0 if input_ids is None else input_ids.shape[1]
            note_mask(output, kwargs.get("attention_mask"), prompt_length, settings)
            return output

        given = {name: kwargs.pop(name, None) for name in ("attention_mask", "inputs_embeds", "position_ids")}
        given["input_ids"], clips["input_features"] = input_ids, input_features
        prompt, audio, expanded = self._expand_inputs(given, clips, cache, return_timestamps)
        if return_timestamps and int(prompt.is_speech.any(1).sum()) < len(audio.num_speech_tokens):
            raise ValueError("return_timestamps is for prompts with one audio each, but a prompt here has several.")
        if streamer is not None and input_ids is not None:
            streamer = _OriginalPromptStreamer(streamer, input_ids)
        if self.config.audio_token_id < self.config.get_text_config().vocab_size:
            # A placeholder in an answer would require a clip in the next turn of the conversation.
            generation_config, kwargs = suppress_token(
                self.config.audio_token_id, generation_config, kwargs, self.generation_config
            )
        output = super().generate(None, generation_config, *args, streamer=streamer, **kwargs, **expanded)
        # After embeddings without ids only the answer comes back, as without audio.
        prompt_length = 0 if input_ids is None else prompt.input_ids.shape[1]
        note_mask(output, prompt.attention_mask, prompt_length, settings)
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        answers = sequences[:, prompt_length:]
        if input_ids is not None:
            originals = input_ids.repeat_interleave(len(sequences) // len(input_ids), dim=0)
            sequences = torch.cat([originals, answers], dim=1)
        if isinstance(output, torch.Tensor):
            return sequences
        output.sequences = sequences
        if return_timestamps:
            embed = self.get_input_embeddings()
            times = answer_token_times(embed, answers, audio, prompt.is_speech.any(1), settings)
            num_before = sequences.shape[1] - answers.shape[1]
            output["token_timestamps"] = nn.functional.pad(times, (0, 0, num_before, 0), value=torch.nan)
        return output

    def adjust_generation_fn(self, *args, **kwargs):
        super().adjust_generation_fn(*args, **kwargs)
        # transformers also puts there what `from_pretrained` was given for the config, and would save it.
        for name in own_options():
            self.generation_config.__dict__.pop(name, None)

    def _check_timestamps(self, input_features):
        if not self.adapter.one_to_one:
            raise ValueError(
                "return_timestamps needs one speech token per text token, which the subsampler adapter does not make. "
                "Use a model with adapter='cformer'."
            )
        if input_features is None:
            raise ValueError(
                "return_timestamps needs the audio: pass input_features (the processor's), also when the conversation "
                "goes on from a cache."
            )

    def _expand_inputs(
        self, given: dict, clips: dict, cache, output_token_times: bool
    ) -> tuple[ExpandedPrompt, ModelOutput, dict]:
        """Expand prompts with audio for transformers' `generate`.

        Args:
            given (`dict`): the prompts: `input_ids`, `inputs_embeds`, `attention_mask` and `position_ids`, None where
                omitted.
            clips (`dict`): `input_features`, `input_features_mask` and `num_speech_tokens`.
            cache (`Cache`, *optional*).
            output_token_times (`bool`): tell when each token was said.

        Returns:
            `tuple`: the expanded prompts, the output of encoder and adapter, and what `generate` takes in place of the
            prompts and their audio.
        """
        num_past = 0 if cache is None else int(cache.get_seq_length())
        text = given["inputs_embeds"] if given["input_ids"] is None else given["input_ids"]
        mask = given["attention_mask"]
        is_new_turn = num_past > 0 and mask is not None and text is not None and mask.shape[1] != text.shape[1]
        if is_new_turn and given["inputs_embeds"] is not None:
            raise ValueError("A new turn after a key-value cache is read from input_ids, not from inputs_embeds.")
        num_before = num_past if is_new_turn else 0  # positions count from the start of the cache
        prompt, audio = self._expand_prompt(
            self._prompt(num_before, **given), output_token_times=output_token_times, **clips
        )
        prompt.check_context(self._context_length, num_new_tokens=1)
        if num_past and not is_new_turn:
            check_cache(prompt, cache, num_past)

        expanded = {
            "attention_mask": prompt.attention_mask,
            "is_speech": nn.functional.pad(prompt.is_speech, (num_before, 0), value=False),
        }
        if given["position_ids"] is not None:
            expanded["position_ids"] = prompt.position_ids
        if given["input_ids"] is not None:
            unspoken_id = unspoken_token_id(
                self.config.audio_token_id, self.config.get_text_config(), self.generation_config
            )
            expanded["input_ids"] = prompt.input_ids.masked_fill(prompt.is_speech, unspoken_id)
        if given["inputs_embeds"] is None:
            expanded["speech_embeds"] = nn.functional.pad(prompt.speech_embeds, (0, 0, num_before, 0))
        else:
            expanded["inputs_embeds"] = self._embed(
                prompt.input_ids, prompt.is_speech, prompt.speech_embeds, prompt.text_embeds
            )
        return prompt, audio, expanded

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        speech_embeds: torch.Tensor | None = None,
        is_speech: torch.Tensor | None = None,
        **kwargs,
    ) -> dict:
        cache = one_cache(past_key_values, cache)
        inputs = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, **{CACHE_NAME: cache}, **kwargs
        )
        # Speech is part of the prompt: once the prompt is in the cache, only text follows.
        num_past = 0 if cache is None else int(cache.get_seq_length())
        if is_speech is not None and num_past < is_speech.shape[1]:
            inputs |= {"speech_embeds": speech_embeds, "is_speech": is_speech}
        return inputs
