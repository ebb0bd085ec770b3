"""`BlspKdForCausalLM`: speech encoder -> adapter -> LLM.

Follows arXiv 2405.19041: speech tokens stand in the LLM's input where the transcript's tokens would stand, and the LLM
on the text prompt teaches the LLM on the speech prompt. Leaves out: the parts (`speech_encoder.py`, `adapters.py`,
`plora.py`, `speech_prompt.py`), what is returned (`outputs_blsp_kd.py`), the distillation loss
(`distillation_step.py`), `generate` (`generation_blsp_kd.py`), loading and saving (`pretrained_blsp_kd.py`), and
training itself (`trainer.py`).

From a clip to the loss: `get_audio_features` turns `input_features` into speech tokens, `SpeechPrompt.expand` gives
them their positions, `forward` has the LLM read the prompts, and `distillation_loss` compares.

Shapes: B prompts, L prompt length, P positions in a key-value cache, N audio clips in reading order over the batch, W
windows of clips, T encoder frames, U speech tokens of a clip, H encoder width, D LLM width, V vocabulary. Vectors for
the LLM have one name per shape: `speech_tokens` (N, U, D) by clip, `speech_embeds` (B, L, D) at their positions in the
prompts, `inputs_embeds` (B, L, D) with the text around them. Only the output of `get_audio_features` calls the first
`pooler_output`, as in all models of transformers.
"""

from contextlib import nullcontext
from dataclasses import asdict

import torch
from torch import nn
from transformers import AutoModelForCausalLM, Cache, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from .adapters import CFormer
from .configuration_blsp_kd import BlspKdConfig
from .conversation_cache import mask_after_cache
from .distillation_step import ComparedPrompts, distillation_loss, wanted_losses
from .encoder_families import frame_duration_s, frame_starts_s, steps_per_frame, window_of
from .expected_embeddings import llm_vectors
from .frozen import frozen
from .generation_blsp_kd import BlspKdGenerationMixin
from .kept_teacher import KeptTeacher
from .listening_blsp_kd import BlspKdListeningMixin
from .llm_outputs import LlmStates
from .model_files import CHECK_CONFIG, explained
from .outputs_blsp_kd import BlspKdAudioOutput, BlspKdOutputWithPast
from .plora import PartialLora, leave_out_of_peft_model
from .pretrained_blsp_kd import BlspKdPreTrainedModel
from .speech_encoder import TrueLengthWhisperEncoder, build_speech_encoder, encode_speech
from .speech_prompt import ExpandedPrompt, SpeechPrompt, check_text_only, cut_out, find_in_embeds
from .speech_windows import check_mask, join_windows, split_into_windows
from .stored_dtypes import build_in
from .streaming_options import causal_form
from .subsampler import Subsampler
from .token_times import find_silence, loudness, token_times
from .versions import CACHE_NAME, one_cache

ADAPTER_CLASSES = {"cformer": CFormer, "subsampler": Subsampler}


class BlspKdForCausalLM(BlspKdPreTrainedModel, BlspKdGenerationMixin, BlspKdListeningMixin):
    """An LLM that reads speech in the place of text.

    Args:
        config ([`BlspKdConfig`]).
        audio_tower (`PreTrainedModel`, *optional*), language_model (`PreTrainedModel`, *optional*):
            pretrained parts to take over, see [`~BlspKdForCausalLM.from_backbones`]. The language model is changed in
            place when the config asks for partial LoRA. Omitted: built from the config.
    """

    def __init__(
        self,
        config: BlspKdConfig,
        audio_tower: PreTrainedModel | None = None,
        language_model: PreTrainedModel | None = None,
    ):
        super().__init__(config)
        speech_config, text_config = config.speech_config, config.text_config
        with explained("The speech encoder of speech_config cannot be built", CHECK_CONFIG):
            self.audio_tower = audio_tower or build_speech_encoder(speech_config)
        if isinstance(self.audio_tower, TrueLengthWhisperEncoder):
            self.audio_tower.pad_to_window = config.speech_padding == "max_length"
        with explained("The LLM of text_config cannot be built", CHECK_CONFIG):
            self.language_model = language_model or AutoModelForCausalLM.from_config(text_config)
        options, adapter_class = asdict(config.adapter_options), ADAPTER_CLASSES[config.adapter_options.type]
        if adapter_class is CFormer:
            options["attn_implementation"] = config._attn_implementation or "sdpa"
            options["has_ctc_head"] = config.distillation_options.ctc > 0
        self.adapter = adapter_class(speech_config.hidden_size, text_config.get_text_config().hidden_size, **options)
        plora = config.plora_options
        self.plora = None if plora is None else PartialLora(self.language_model, **asdict(plora))
        self.register_state_dict_post_hook(leave_out_of_peft_model)
        build_in(self, config.part_dtypes)
        self.post_init()
        # Whisper also names its decoder's layers, and accelerate's FSDP refuses names of layers that are not there.
        self._no_split_modules = set(self._no_split_modules) & {type(module).__name__ for module in self.modules()}
        self.freeze_backbones()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module):
        self.language_model.set_output_embeddings(new_embeddings)

    def get_decoder(self) -> PreTrainedModel:
        return self.language_model.get_decoder()

    # -- clips to speech tokens ---------------------------------------------------------------------------------------

    @property
    def frame_duration_s(self) -> float:
        """Seconds of audio per encoder frame: turns firing places into times."""
        return frame_duration_s(self.config.speech_config)

    @can_return_tuple
    def get_audio_features(
        self,
        input_features: torch.Tensor,
        input_features_mask: torch.Tensor | None = None,
        num_speech_tokens: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_token_times: bool = False,
    ) -> BlspKdAudioOutput:
        """Turn audio clips into encoder frames and the speech tokens that the LLM reads.

        Args:
            input_features (`torch.FloatTensor` of shape (N, ...)): what the encoder's feature extractor makes: log-mel
                (N, num_mel_bins, length) for Whisper, waveforms (N, length), or filter bank frames (N, length, bins).
                Longer than 30 s: encoded in windows, see `speech_windows.py`. A streaming model attends in chunks of
                `config.streaming["chunk_ms"]`, in training of a length that is drawn.
            input_features_mask (`torch.Tensor` of shape (N, length), *optional*): 1 at what belongs to the clip.
            output_hidden_states, output_attentions (`bool`, *optional*): of the encoder, by window; not from encoders
                that take clips one at a time.
            num_speech_tokens (`torch.LongTensor` of shape (N,), *optional*):
                tokens that CIF must fire, which the output then repeats; omitted, they are predicted. CFormer only.
            output_token_times (`bool`): tell when each token was said. CFormer only.
        """
        # Do not pass options that were not given: None would override the encoder's own config.
        wanted = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
        wanted = {name: value for name, value in wanted.items() if value is not None}
        causal = causal_form(self.config.streaming_options, self.frame_duration_s, self.training)
        if blocks := causal.get("blocks"):
            blocks.check_outputs(wanted)
            wanted["blocks"] = blocks
        window, time_axis = window_of(self.config.speech_config)
        mask = check_mask(input_features, input_features_mask, time_axis)
        windows, window_mask, windows_per_clip = split_into_windows(input_features, mask, window, time_axis)
        is_trained = any(parameter.requires_grad for parameter in self.audio_tower.parameters())
        with nullcontext() if is_trained else frozen(self.audio_tower, input_features):
            encoded = encode_speech(self.audio_tower, windows, window_mask, **wanted)
        frames, frame_mask = encoded.last_hidden_state, encoded.frame_mask
        if self.training and self.is_activation_checkpointing and not frames.requires_grad:
            # Reentrant checkpointing gives a layer no gradient unless its input needs one.
            frames.requires_grad_(True)
        adapter_dtype = next(self.adapter.parameters()).dtype
        adapted = self.adapter(frames.to(adapter_dtype), frame_mask, num_speech_tokens, windows_per_clip, **causal)
        times = None
        if output_token_times and adapted.alphas is not None:
            times = self._time_tokens(windows, window_mask, frame_mask, windows_per_clip, adapted)
        frame_mask, frames = join_windows(windows_per_clip, frame_mask, frames)
        return BlspKdAudioOutput(
            last_hidden_state=frames,
            pooler_output=llm_vectors(self, adapted.speech_tokens),
            token_states=adapted.speech_tokens,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
            num_speech_tokens=adapted.num_speech_tokens,
            frame_mask=frame_mask,
            alphas=adapted.alphas,
            alpha_sum=adapted.alpha_sum,
            firing_places=adapted.firing_places,
            token_times=times,
            ctc_logits=adapted.ctc_logits,
            num_ctc_frames=adapted.num_ctc_frames,
        )

    def _time_tokens(self, windows, window_mask, frame_mask, windows_per_clip, adapted) -> torch.Tensor:
        """Return start and end of every speech token: (N, U, 2)."""
        speech_config, options = self.config.speech_config, self.config.timestamp_options
        time_axis, frames_per_window = window_of(speech_config)[1], frame_mask.shape[1]
        frame_loudness = loudness(windows, window_mask, time_axis, steps_per_frame(speech_config), frames_per_window)
        frame_mask, frame_loudness = join_windows(windows_per_clip, frame_mask, frame_loudness)
        is_silent = find_silence(frame_loudness, frame_mask, options.silence).to(adapted.alphas.device)
        starts_s = frame_starts_s(speech_config, is_silent.shape[1], frames_per_window)
        counts, delay_s = adapted.num_speech_tokens, options.delay_s
        return token_times(adapted.alphas, counts, is_silent, starts_s, self.frame_duration_s, delay_s)

    def _encode_no_clips(self, input_features) -> BlspKdAudioOutput:
        """Run encoder and adapter for no clip at all, input_features (0, ...).

        They run on zeros, and the whole output is cut off. So every process runs the same modules, and every parameter
        has a gradient, of zero: DDP, FSDP and ZeRO-3 wait for both.
        """
        silence = input_features.new_zeros(1, *input_features.shape[1:])
        num_tokens = torch.ones(1, dtype=torch.long, device=silence.device) if self.adapter.one_to_one else None
        audio = self.get_audio_features(silence, num_speech_tokens=num_tokens, return_dict=True)
        return BlspKdAudioOutput(
            **{name: value[:0] for name, value in audio.items() if isinstance(value, torch.Tensor)}
        )

    # -- speech tokens into the prompt --------------------------------------------------------------------------------

    def _prompt(
        self, num_past: int, input_ids, attention_mask=None, position_ids=None, inputs_embeds=None, labels=None
    ) -> SpeechPrompt:
        """Return prompts with audio, which follow `num_past` positions in a key-value cache, as they were given."""
        audio_token_id = self.config.audio_token_id
        if audio_token_id is None:
            raise ValueError(
                "The config of this model has no audio_token_id, so no token of a prompt stands for audio. Set "
                "model.config.audio_token_id to that of the processor."
            )
        if input_ids is None:
            input_ids = find_in_embeds(inputs_embeds, self.get_input_embeddings(), audio_token_id)
        attention_mask = mask_after_cache(attention_mask, input_ids, num_past)
        return SpeechPrompt(input_ids, audio_token_id, attention_mask, labels, position_ids, inputs_embeds)

    def _expand_prompt(
        self,
        prompt: SpeechPrompt,
        input_features,
        input_features_mask=None,
        num_speech_tokens=None,
        output_token_times: bool = False,
    ) -> tuple[ExpandedPrompt, BlspKdAudioOutput]:
        """Encode the clips of a batch of prompts, and expand each placeholder to the positions of its clip."""
        is_repeated = prompt.is_repeated(len(input_features), num_speech_tokens)
        if len(input_features) == 0:
            audio = self._encode_no_clips(input_features)
        else:
            audio = self.get_audio_features(
                input_features,
                input_features_mask,
                num_speech_tokens,
                output_token_times=output_token_times,
                return_dict=True,
            )
        pad_id = self._harmless_token_id()
        return prompt.expand(audio.pooler_output, audio.num_speech_tokens, is_repeated, pad_id), audio

    def _harmless_token_id(self) -> int:
        """Return an id inside the vocabulary; its embedding is masked or overwritten wherever it stands."""
        pad_token_id = self.config.get_text_config().pad_token_id
        return 0 if pad_token_id is None else pad_token_id

    def _embed(self, input_ids, is_speech, speech_embeds, text_embeds=None):
        """Embed tokens (unless they are), with speech vectors at speech positions: (B, L) -> (B, L, D)."""
        if text_embeds is None:
            text_embeds = self.get_input_embeddings()(input_ids.masked_fill(is_speech, self._harmless_token_id()))
        return torch.where(is_speech[..., None], speech_embeds.to(text_embeds.dtype), text_embeds)

    @property
    def _context_length(self) -> int | None:
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)

    # -- what the LLM reads -------------------------------------------------------------------------------------------

    def _read_clips(
        self, given: dict, num_past: int, input_features, input_features_mask, num_speech_tokens
    ) -> tuple[dict, torch.BoolTensor, BlspKdAudioOutput]:
        """Return what the LLM reads of prompts with clips, where it is speech, and the output for the clips.

        Args:
            given (`dict`): the prompts as inputs of the LLM, with placeholders.
            num_past (`int`): positions in the key-value cache.
        """
        prompt, audio = self._expand_prompt(
            self._prompt(num_past, **given), input_features, input_features_mask, num_speech_tokens
        )
        prompt.check_context(self._context_length)
        # Without a mask, position_ids may tell that one row holds several prompts (packing).
        is_packed = given["attention_mask"] is None and given["position_ids"] is not None and len(prompt.input_ids) == 1
        read = {
            "input_ids": None,
            "attention_mask": None if is_packed else prompt.attention_mask,
            "position_ids": prompt.position_ids,
            "inputs_embeds": self._embed(prompt.input_ids, prompt.is_speech, prompt.speech_embeds, prompt.text_embeds),
            "labels": prompt.labels,
        }
        return read, prompt.is_speech, audio

    def _read_expanded(self, given: dict, num_past: int, is_speech, speech_embeds) -> tuple[dict, torch.BoolTensor]:
        """Return what the LLM reads of a part of prompts that were expanded before, and where it is speech.

        Args:
            given (`dict`): the part as inputs of the LLM.
            num_past (`int`): where it begins.
            is_speech, speech_embeds: of the whole prompts, see `forward`.
        """
        if given["inputs_embeds"] is not None:
            return given, cut_out(is_speech, num_past, given["inputs_embeds"].shape[1])
        length = given["input_ids"].shape[1]
        is_speech = cut_out(is_speech, num_past, length)
        inputs_embeds = self._embed(given["input_ids"], is_speech, cut_out(speech_embeds, num_past, length))
        return {**given, "input_ids": None, "inputs_embeds": inputs_embeds}, is_speech

    def _partial_lora_at(self, is_speech):
        # Needed without speech, too: otherwise a nested call would use the mask of the outer call.
        return nullcontext() if self.plora is None else self.plora.at(is_speech)

    def _distill(
        self, read: dict, prompts: ComparedPrompts, teacher_attention_mask, audio: BlspKdAudioOutput, num_items_in_batch
    ) -> BlspKdOutputWithPast:
        """Run the LLM on the prompts that the losses need, and compute the losses.

        Args:
            read (`dict`): what the LLM reads of the speech prompts.
            teacher_attention_mask, num_items_in_batch: see `forward`.
        """
        weights = asdict(self.config.distillation_options)
        wanted = wanted_losses(weights, self.training, self.adapter.one_to_one)
        layers = weights["alignment_layers"] if "layer_alignment" in wanted else []
        student_states = teacher_states = None
        # `base_model` is the LLM without its head: vocabulary products are taken at the compared positions only.
        llm = self.language_model.base_model
        reads_text, reads_speech = prompts.passes(wanted)
        if reads_text:
            teacher = {"input_ids": prompts.teacher_input_ids, "attention_mask": teacher_attention_mask}
            with frozen(self.language_model), self._partial_lora_at(None):
                teacher_states = LlmStates.after(llm, layers, **teacher)
        if reads_speech:
            student = {name: read[name] for name in ("inputs_embeds", "attention_mask", "position_ids")}
            with self._partial_lora_at(prompts.is_speech):
                student_states = LlmStates.after(llm, layers, **student)
        loss, loss_parts = distillation_loss(
            prompts,
            audio,
            self.language_model,
            weights,
            wanted,
            student_states=student_states,
            teacher_states=teacher_states,
            num_items_in_batch=num_items_in_batch,
        )
        return BlspKdOutputWithPast(loss=loss, loss_parts=loss_parts)

    # -- forward ------------------------------------------------------------------------------------------------------

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        input_features: torch.FloatTensor | None = None,
        input_features_mask: torch.Tensor | None = None,
        num_speech_tokens: torch.LongTensor | None = None,
        speech_embeds: torch.FloatTensor | None = None,
        is_speech: torch.BoolTensor | None = None,
        labels: torch.LongTensor | None = None,
        teacher_input_ids: torch.LongTensor | None = None,
        teacher_attention_mask: torch.Tensor | None = None,
        teacher_is_content: torch.BoolTensor | None = None,
        teacher_is_response: torch.BoolTensor | None = None,
        teacher_top_ids: torch.LongTensor | None = None,
        teacher_top_log_probs: torch.FloatTensor | None = None,
        transcript_bytes: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BlspKdOutputWithPast:
        """Predict next tokens after text and speech, or compute the distillation loss.

        Args:
            input_ids (`torch.LongTensor` of shape (B, L)):
                prompts with one placeholder per audio. The model repeats the placeholder once per speech token, so
                logits and attention refer to the longer, expanded prompt.
            attention_mask (`torch.Tensor` of shape (B, L), *optional*): 1 at tokens, 0 at padding on either side. After
                a key-value cache (B, P + L), as in all causal LMs.
            position_ids (`torch.LongTensor` of shape (B, L), *optional*):
                of the prompts as given; with audio they move on by the positions that the audio adds.
            past_key_values, cache (`Cache`, *optional*): a key-value cache, by either of its names. transformers calls
                it `past_key_values` up to 5.23 and `cache` from 5.24 on.
            input_features, input_features_mask: the audio clips, see [`~BlspKdForCausalLM.get_audio_features`].
            num_speech_tokens (`torch.LongTensor` of shape (N,), *optional*):
                token counts that CIF must fire (the transcripts' own, in training). With them, the prompt may also
                come with the placeholders already repeated.
            inputs_embeds (`torch.FloatTensor` of shape (B, L, D), *optional*): embedded prompts; with audio, those of
                the placeholder stand at its places.
            is_speech (`torch.BoolTensor` of shape (B, P + L), *optional*):
                instead of `input_features`: the speech positions of an expanded prompt (`generate`).
            speech_embeds (`torch.FloatTensor` of shape (B, P + L, D), *optional*):
                speech tokens at these positions. Omitted, `inputs_embeds` holds them.
            labels (`torch.LongTensor` of shape (B, L), *optional*): response tokens, -100 elsewhere.
            teacher_input_ids, teacher_attention_mask (B, L'), *optional*:
                the same dialogues with the transcript in place of the placeholder. Given: a distillation step.
            teacher_is_content, teacher_is_response (`torch.BoolTensor` of shape (B, L')):
                True at transcript tokens and at response tokens.
            teacher_top_ids (B, L', K), teacher_top_log_probs (B, L', K + 1), *optional*:
                [`KeptTeacher`] at the compared positions. With them, the LLM need not read the text prompts.
            transcript_bytes (`torch.LongTensor` of shape (N, S), *optional*):
                UTF-8 bytes of the lower-cased transcripts, -1 at padding: for the distillation option `ctc`.
            num_items_in_batch (`torch.Tensor` of shape (3,) or (4,), *optional*):
                [`ItemCounts`] of the whole optimiser step, over all processes. Omitted: those of this batch. Without
                a teacher: the number of labels, as in any causal LM.

        Raises:
            ValueError: placeholders and audios do not fit together, or the distillation inputs do not.
        """
        cache = one_cache(past_key_values, cache)
        num_past = 0 if cache is None else int(cache.get_seq_length())
        read = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "labels": labels,
        }
        audio = None
        if input_features is not None:
            if speech_embeds is not None:
                raise ValueError("input_features go without speech_embeds: the model makes its own.")
            if teacher_input_ids is not None and not self.adapter.one_to_one:
                num_speech_tokens = None  # an adapter of a fixed rate ignores the transcripts' lengths
            clips = (input_features, input_features_mask, num_speech_tokens)
            read, is_speech, audio = self._read_clips(read, num_past, *clips)
        elif is_speech is not None:
            read, is_speech = self._read_expanded(read, num_past, is_speech, speech_embeds)
        elif input_ids is not None and num_past == 0 and not torch.compiler.is_compiling():
            check_text_only(input_ids, attention_mask, self.config.audio_token_id)

        if teacher_input_ids is not None:
            if audio is None or labels is None:
                raise ValueError("A distillation step needs input_features and labels beside the teacher's inputs.")
            of_teacher = (teacher_input_ids, teacher_is_content, teacher_is_response)
            kept = None if teacher_top_ids is None else KeptTeacher(teacher_top_ids, teacher_top_log_probs)
            prompts = ComparedPrompts(
                read["labels"], is_speech, *of_teacher, transcript_bytes, self.generation_config.eos_token_id, kept
            )
            return self._distill(read, prompts, teacher_attention_mask, audio, num_items_in_batch)
        if num_items_in_batch is not None:
            # A single number, as from a plain Trainer, is the count of labels.
            kwargs["num_items_in_batch"] = torch.as_tensor(num_items_in_batch).flatten()[0]
        options = {"use_cache": use_cache, "logits_to_keep": logits_to_keep, "return_dict": True, CACHE_NAME: cache}
        with self._partial_lora_at(is_speech):
            outputs = self.language_model(**read, **options, **kwargs)
        return BlspKdOutputWithPast(
            loss=outputs.loss,
            logits=outputs.logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
        )


BlspKdForCausalLM.register_for_auto_class("AutoModelForCausalLM")
