"""`BlspKdForCausalLM`: speech encoder -> adapter -> LLM, its distillation loss, and generation from audio prompts.

Follows arXiv 2405.19041: speech tokens stand in the LLM's input where the transcript's tokens would stand, and the LLM
on the text prompt teaches the LLM on the speech prompt. Leaves out: the parts (`speech_encoder.py`, `adapters.py`,
`plora.py`, `speech_prompt.py`), the loss formulas (`distillation.py`), and training itself (`trainer.py`).

Shapes: B prompts, L prompt length, A audio clips in reading order over the batch, T encoder frames, U speech tokens of
a clip, S speech tokens of a prompt, H encoder width, D LLM width, V vocabulary.
"""

import os
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .adapters import CFormer, Subsampler
from .configuration_blsp_kd import BlspKdConfig
from .distillation import linear_cross_entropy, linear_kl, postprocess_logits, predicts_next, quantity_loss
from .plora import PartialLora
from .speech_encoder import TrueLengthWhisperEncoder
from .speech_prompt import SpeechPrompt, check_placeholders, find_placeholders, lay_out, merge_speech

ADAPTER_CLASSES = {"cformer": CFormer, "subsampler": Subsampler}
# What each loss part is a mean over, in the order of `num_items_in_batch`.
RESPONSE_TOKENS, CONTENT_TOKENS, CLIPS = range(3)
LOSS_PARTS = {
    "response_kl": RESPONSE_TOKENS,
    "input_kl": CONTENT_TOKENS,
    "quantity": CLIPS,
    "response_ce": RESPONSE_TOKENS,
    "transcript_ce": CONTENT_TOKENS,
}


@dataclass
class BlspKdAudioOutput(BaseModelOutputWithPooling):
    """What the ears hear in A clips.

    Args:
        last_hidden_state (`torch.FloatTensor` of shape (A, T, H)): encoder frames.
        pooler_output (`torch.FloatTensor` of shape (A, U, D)): speech tokens for the LLM.
        num_speech_tokens (`torch.LongTensor` of shape (A,)): valid speech tokens of each clip.
        frame_mask (`torch.BoolTensor` of shape (A, T)): True at frames of the clip.
        alphas (`torch.FloatTensor` of shape (A, T), *optional*): unscaled CIF weights (CFormer only).
        alpha_sum (`torch.FloatTensor` of shape (A,), *optional*): predicted token counts (CFormer only).
        firing_places (`torch.FloatTensor` of shape (A, U), *optional*):
            encoder frames (from the start) at which each token is complete; -1 past a clip's count (CFormer only).
    """

    num_speech_tokens: torch.LongTensor | None = None
    frame_mask: torch.BoolTensor | None = None
    alphas: torch.FloatTensor | None = None
    alpha_sum: torch.FloatTensor | None = None
    firing_places: torch.FloatTensor | None = None


@dataclass
class BlspKdOutputWithPast(CausalLMOutputWithPast):
    """
    Args:
        loss (`torch.FloatTensor`, *optional*): weighted sum of the loss parts, or cross-entropy of `labels`.
        logits (`torch.FloatTensor` of shape (B, L, V), *optional*): not computed in a distillation step.
        loss_parts (`dict[str, torch.FloatTensor]`, *optional*):
            of a distillation step: name -> (sum, count), detached. Their quotient is the mean that the loss weighs.
            Beside the losses: `token_count_accuracy` and `token_count_error` (mean absolute).
    """

    loss_parts: dict[str, torch.FloatTensor] | None = None


@contextmanager
def _frozen(module: nn.Module):
    """Run a frozen module: no gradient, and no dropout whatever the mode of the model around it."""
    was_training = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for child, training in was_training:
            child.training = training


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


class BlspKdPreTrainedModel(PreTrainedModel):
    config_class = BlspKdConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("audio", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["WhisperEncoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # Only `BlspKdTrainer` counts what each loss part is a mean over; a plain Trainer must take means as they are.
    accepts_loss_kwargs = False


class BlspKdForCausalLM(BlspKdPreTrainedModel, GenerationMixin):
    """An LLM with ears.

    Args:
        config ([`BlspKdConfig`]).
        audio_tower (`PreTrainedModel`, *optional*), language_model (`PreTrainedModel`, *optional*):
            pretrained parts to take over, see [`~BlspKdForCausalLM.from_backbones`]. The language model is changed in
            place when the config asks for partial LoRA. Omitted: built from the config.
    """

    def __init__(self, config: BlspKdConfig, audio_tower=None, language_model=None):
        super().__init__(config)
        speech_config, text_config = config.speech_config, config.text_config
        self.audio_tower = audio_tower or TrueLengthWhisperEncoder._from_config(speech_config)
        self.language_model = language_model or AutoModelForCausalLM.from_config(text_config)
        options = dict(config.adapter)
        adapter_class = ADAPTER_CLASSES[options.pop("type")]
        if adapter_class is CFormer:
            options["attn_implementation"] = config._attn_implementation or "sdpa"
        self.adapter = adapter_class(speech_config.d_model, text_config.get_text_config().hidden_size, **options)
        self.plora = PartialLora(self.language_model, **config.plora) if config.plora else None
        self.post_init()
        self.freeze_backbones()

    # -- building, initialising, freezing -----------------------------------------------------------------------------

    @classmethod
    def from_backbones(
        cls,
        speech_model,
        text_model,
        *,
        audio_token_id: int,
        dtype: torch.dtype | str = "auto",
        speech_kwargs: dict | None = None,
        text_kwargs: dict | None = None,
        **config_options,
    ) -> "BlspKdForCausalLM":
        """Give an LLM ears: join two pretrained backbones with a new adapter.

        Args:
            speech_model (`str` or `os.PathLike`): Hub id or folder of a Whisper model (or of its encoder alone).
            text_model (`str` or `os.PathLike`): Hub id or folder of a causal LLM.
            audio_token_id (`int`): `processor.audio_token_id` of [`BlspKdProcessor.from_backbones`].
            dtype (`torch.dtype` or `str`): of the frozen weights; `"auto"`: the dtype that the LLM is stored in. What
                will be trained is float32, as optimisers want it.
            speech_kwargs, text_kwargs (`dict`, *optional*): for the two `from_pretrained` calls.
            config_options: fields of [`BlspKdConfig`]: `adapter`, `plora`, `distillation`, `freeze_speech_encoder`.

        Returns:
            [`BlspKdForCausalLM`] with the LLM's generation config.
        """
        speech_kwargs, text_kwargs = dict(speech_kwargs or {}), dict(text_kwargs or {})
        speech_config = speech_kwargs.pop("config", None) or AutoConfig.from_pretrained(speech_model, **speech_kwargs)
        if speech_config.model_type != "whisper":
            raise ValueError(
                f"The speech model must be of type 'whisper', but {speech_model} is {speech_config.model_type!r}."
            )
        language_model = AutoModelForCausalLM.from_pretrained(text_model, dtype=dtype, **text_kwargs)
        dtype = language_model.dtype
        audio_tower, loading = TrueLengthWhisperEncoder.from_pretrained(
            speech_model,
            config=speech_config,
            dtype=dtype,
            output_loading_info=True,
            # A whole Whisper names its encoder's weights model.encoder.*, an encoder saved alone names them bare.
            key_mapping={r"^model\.encoder\.": "", r"^encoder\.": ""},
            **speech_kwargs,
        )
        if loading["missing_keys"]:
            raise ValueError(
                f"{speech_model} is no Whisper encoder that fits its own config: the weights "
                f"{sorted(loading['missing_keys'])[:5]} are missing."
            )
        speech_config, text_config = audio_tower.config.to_dict(), language_model.config.to_dict()
        for backbone_config in (speech_config, text_config):
            # The id of a Hub model is worth keeping; a folder of this machine has no place in a published config.
            if os.path.isdir(backbone_config["_name_or_path"]):
                del backbone_config["_name_or_path"]
        config = cls.config_class(
            speech_config=speech_config,
            text_config=text_config,
            audio_token_id=audio_token_id,
            **config_options,
        )
        model = cls(config, audio_tower=audio_tower, language_model=language_model)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        if language_model.can_generate():
            model.generation_config = GenerationConfig.from_dict(language_model.generation_config.to_dict())
        return model.eval()

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        # transformers makes every loaded parameter trainable, so freezing has to be repeated.
        result = super().from_pretrained(*args, **kwargs)
        (result[0] if isinstance(result, tuple) else result).freeze_backbones()
        return result

    def initialize_weights(self):
        super().initialize_weights()
        # The LLM's own rule has by now given LoRA's B noise instead of zeros. `init` leaves loaded weights alone.
        if self.plora is not None:
            self.plora.initialize()

    def freeze_backbones(self):
        """Freeze the LLM (never its partial LoRA) and, if the config says so, the speech encoder."""
        self.language_model.requires_grad_(False)
        self.audio_tower.requires_grad_(not self.config.freeze_speech_encoder)
        # A table of sinusoids, never trained.
        self.audio_tower.embed_positions.requires_grad_(False)
        if self.plora is not None:
            for parameter in self.plora.parameters:
                parameter.requires_grad_(True)

    def merge_and_unload(self, *args, **kwargs):
        """Always raises: partial LoRA applies at speech positions only."""
        if self.plora is None:
            raise ValueError("There is nothing to merge: this model was built with plora off.")
        self.plora.layers[0].merge()

    def _set_gradient_checkpointing(self, enable=True, gradient_checkpointing_func=checkpoint, **kwargs):
        if self.plora is not None:
            gradient_checkpointing_func = self.plora.checkpoint(gradient_checkpointing_func)
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **kwargs)

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings):
        self.language_model.set_output_embeddings(new_embeddings)

    def get_decoder(self):
        return self.language_model.get_decoder()

    # -- audio into the prompt ----------------------------------------------------------------------------------------

    def get_audio_features(self, input_features, input_features_mask=None, num_speech_tokens=None) -> BlspKdAudioOutput:
        """Hear audio clips: encoder frames, and the speech tokens that the LLM reads.

        Args:
            input_features (`torch.FloatTensor` of shape (A, num_mel_bins, num_mel_frames)): log-mel features.
            input_features_mask (`torch.Tensor` of shape (A, num_mel_frames), *optional*): 1 at frames of the clip.
            num_speech_tokens (`torch.LongTensor` of shape (A,), *optional*):
                tokens that CIF must fire; omitted, they are predicted. CFormer only.
        """
        with _frozen(self.audio_tower) if self.config.freeze_speech_encoder else nullcontext():
            encoded = self.audio_tower(input_features, input_features_mask)
        frames = encoded.last_hidden_state.to(next(self.adapter.parameters()).dtype)
        adapted = self.adapter(frames, encoded.frame_mask, num_speech_tokens)
        return BlspKdAudioOutput(
            last_hidden_state=encoded.last_hidden_state,
            pooler_output=adapted.speech_embeds,
            num_speech_tokens=adapted.num_speech_tokens,
            frame_mask=encoded.frame_mask,
            alphas=adapted.alphas,
            alpha_sum=adapted.alpha_sum,
            firing_places=adapted.firing_places,
        )

    def _hear_prompt(
        self, input_ids, attention_mask, labels, input_features, input_features_mask, num_speech_tokens
    ) -> tuple[SpeechPrompt, BlspKdAudioOutput]:
        """Hear the clips of a batch of prompts and give each its positions."""
        audio_token_id = self.config.audio_token_id
        is_placeholder = find_placeholders(input_ids, attention_mask, audio_token_id)
        is_repeated = check_placeholders(is_placeholder, audio_token_id, len(input_features), num_speech_tokens)
        audio = self.get_audio_features(input_features, input_features_mask, num_speech_tokens)
        prompt = lay_out(
            input_ids,
            attention_mask,
            labels,
            is_placeholder,
            is_repeated,
            audio.pooler_output,
            audio.num_speech_tokens,
            self._harmless_token_id(),
        )
        return prompt, audio

    def _check_text_only(self, input_ids, attention_mask):
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            attention_mask = None  # of a static cache, or 4-D
        audio_token_id = self.config.audio_token_id
        check_placeholders(find_placeholders(input_ids, attention_mask, audio_token_id), audio_token_id, num_audios=0)

    def _harmless_token_id(self) -> int:
        """An id inside the vocabulary; its embedding is masked or overwritten wherever it stands."""
        pad_token_id = self.config.get_text_config().pad_token_id
        return 0 if pad_token_id is None else pad_token_id

    def _unspoken_token_id(self) -> int:
        """What logits processors, which read the prompt, see at speech positions: an id that is never generated.

        The placeholder itself, as in other audio LLMs; if that lies outside the vocabulary, the start of text.
        """
        text_config = self.config.get_text_config()
        if self.config.audio_token_id < text_config.vocab_size:
            return self.config.audio_token_id
        bos_token_id = text_config.bos_token_id
        return self._harmless_token_id() if bos_token_id is None else bos_token_id

    def _embed(self, input_ids, is_speech, speech_embeds):
        """Embed tokens, with speech vectors at speech positions: (B, L) -> (B, L, D)."""
        text_embeds = self.get_input_embeddings()(input_ids.masked_fill(is_speech, self._harmless_token_id()))
        return merge_speech(text_embeds, is_speech, speech_embeds)

    def _partial_lora_at(self, is_speech):
        return nullcontext() if self.plora is None or is_speech is None else self.plora.at(is_speech)

    # -- forward ------------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values=None,
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
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BlspKdOutputWithPast:
        """Predict next tokens after text and speech, or compute the distillation loss.

        Args:
            input_ids (`torch.LongTensor` of shape (B, L)):
                prompts with one placeholder per audio. The model repeats the placeholder once per speech token, so
                logits and attention refer to the longer, expanded prompt.
            attention_mask (`torch.Tensor` of shape (B, L), *optional*): 1 at tokens, 0 at padding on either side.
            input_features, input_features_mask: the audio clips, see [`~BlspKdForCausalLM.get_audio_features`].
            num_speech_tokens (`torch.LongTensor` of shape (A,), *optional*):
                token counts that CIF must fire (the transcripts' own, in training). With them, the prompt may also
                come with the placeholders already repeated.
            speech_embeds (`torch.FloatTensor` of shape (B, S, D)), is_speech (`torch.BoolTensor` of shape (B, L)):
                instead of `input_features`: speech tokens and their positions in an expanded prompt (`generate`).
            labels (`torch.LongTensor` of shape (B, L), *optional*): response tokens, -100 elsewhere.
            teacher_input_ids, teacher_attention_mask (B, L'), *optional*:
                the same dialogues with the transcript in place of the placeholder. Given: a distillation step.
            teacher_is_content, teacher_is_response (`torch.BoolTensor` of shape (B, L')):
                True at transcript tokens and at response tokens.
            num_items_in_batch (`torch.Tensor` of shape (3,), *optional*):
                response tokens, content tokens and clips of the whole optimiser step, over all processes. Omitted:
                those of this batch. Without a teacher: the number of labels, as in any causal LM.

        Raises:
            ValueError: placeholders and audios do not fit together, or the distillation inputs do not.
        """
        if teacher_input_ids is not None and not self.adapter.one_to_one:
            num_speech_tokens = None  # the transcripts' lengths do not bind an adapter of a fixed rate
        has_past = past_key_values is not None and past_key_values.get_seq_length() > 0
        audio = None
        if input_features is not None:
            if input_ids is None or speech_embeds is not None or position_ids is not None:
                raise ValueError(
                    "input_features go with input_ids alone: the model expands the prompt and makes its own "
                    "inputs_embeds, speech_embeds and position_ids."
                )
            if has_past:
                raise ValueError("Audio after a key-value cache is not supported: pass the whole conversation again.")
            prompt, audio = self._hear_prompt(
                input_ids, attention_mask, labels, input_features, input_features_mask, num_speech_tokens
            )
            input_ids, attention_mask, position_ids = prompt.input_ids, prompt.attention_mask, prompt.position_ids
            labels, is_speech, speech_embeds = prompt.labels, prompt.is_speech, prompt.speech_embeds
        if speech_embeds is not None:
            # Without a cache, generated text grows past the mask of the prompt.
            is_speech = nn.functional.pad(is_speech, (0, input_ids.shape[1] - is_speech.shape[1]), value=False)
            inputs_embeds = self._embed(input_ids, is_speech, speech_embeds)
            input_ids = None
        elif input_ids is not None and not has_past and not torch.compiler.is_compiling():
            self._check_text_only(input_ids, attention_mask)

        if teacher_input_ids is not None:
            if audio is None or labels is None:
                raise ValueError("A distillation step needs input_features and labels beside the teacher's inputs.")
            student = {"inputs_embeds": inputs_embeds, "attention_mask": attention_mask, "position_ids": position_ids}
            teacher = {"input_ids": teacher_input_ids, "attention_mask": teacher_attention_mask}
            return self._distill(
                student, teacher, labels, is_speech, audio, teacher_is_content, teacher_is_response, num_items_in_batch
            )
        if num_items_in_batch is not None:
            kwargs["num_items_in_batch"] = torch.as_tensor(num_items_in_batch).flatten()[RESPONSE_TOKENS]
        with self._partial_lora_at(is_speech):
            outputs = self.language_model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                labels=labels,
                use_cache=use_cache,
                logits_to_keep=logits_to_keep,
                **kwargs,
            )
        return BlspKdOutputWithPast(
            loss=outputs.loss,
            logits=outputs.logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    # -- distillation -------------------------------------------------------------------------------------------------

    def _distill(
        self, student, teacher, labels, is_speech, audio, teacher_is_content, teacher_is_response, num_items_in_batch
    ) -> BlspKdOutputWithPast:
        weights = self.config.distillation
        # Evaluation reports every KL that exists; training computes only what the loss weighs.
        wanted = {name for name in LOSS_PARTS if weights[name]}
        if not self.training:
            wanted |= {"response_kl", "input_kl"} if self.adapter.one_to_one else {"response_kl"}

        # `base_model` is the LLM without its head: vocabulary products are taken at the compared positions only.
        with _frozen(self.language_model):
            teacher_states = self.language_model.base_model(**teacher, use_cache=False).last_hidden_state
        with self._partial_lora_at(is_speech):
            student_states = self.language_model.base_model(**student, use_cache=False).last_hidden_state

        predicts_response = predicts_next(labels != -100)
        teacher_predicts_response = predicts_next(teacher_is_response)
        compared = {
            "response": (student_states[predicts_response], teacher_states[teacher_predicts_response]),
            "content": (student_states[is_speech], teacher_states[teacher_is_content]),
        }
        for name in ("response", "content") if self.adapter.one_to_one else ("response",):
            num_student, num_teacher = (len(states) for states in compared[name])
            if num_student != num_teacher:
                raise ValueError(
                    f"Speech and text prompts must hold the same {name} tokens, but hold {num_student} and "
                    f"{num_teacher}. Build both with BlspKdDataCollator."
                )
        response, content = compared["response"], compared["content"]
        weight, head_options = self._output_head()
        kl_options = {"temperature": weights["temperature"], "reduction": "sum", **head_options}

        parts = {}
        if "response_kl" in wanted:
            parts["response_kl"] = linear_kl(*response, weight, **kl_options)
        if "input_kl" in wanted:
            parts["input_kl"] = linear_kl(*content, weight, **kl_options)
        if "quantity" in wanted:
            parts["quantity"] = quantity_loss(audio.alpha_sum, audio.num_speech_tokens)
        if "response_ce" in wanted:
            targets = labels[:, 1:][predicts_response[:, :-1]]
            parts["response_ce"] = linear_cross_entropy(response[0], targets, weight, **head_options)
        if "transcript_ce" in wanted:
            # The LLM's token embeddings double as the output matrix of the recogniser.
            num_slots = audio.pooler_output.shape[1]
            is_token = torch.arange(num_slots, device=labels.device) < audio.num_speech_tokens[:, None]
            targets = teacher["input_ids"][teacher_is_content]
            parts["transcript_ce"] = linear_cross_entropy(
                audio.pooler_output[is_token], targets, self.get_input_embeddings().weight
            )

        counts = torch.stack(
            [
                predicts_response.sum(),
                teacher_is_content.sum(),
                torch.tensor(len(audio.num_speech_tokens), device=labels.device),
            ]
        )
        divisors = counts if num_items_in_batch is None else num_items_in_batch.to(counts.device)
        loss = sum(
            weights[name] * part / divisors[LOSS_PARTS[name]].clamp(min=1)
            for name, part in parts.items()
            if weights[name]
        )
        loss_parts = {
            name: torch.stack([part.detach().float(), counts[LOSS_PARTS[name]].float()]) for name, part in parts.items()
        }
        if audio.alpha_sum is not None:
            miss = (audio.alpha_sum.detach().round().clamp(min=1) - audio.num_speech_tokens).abs()
            num_clips = counts[CLIPS].float()
            loss_parts["token_count_accuracy"] = torch.stack([(miss == 0).sum().float(), num_clips])
            loss_parts["token_count_error"] = torch.stack([miss.sum(), num_clips])
        return BlspKdOutputWithPast(loss=loss, loss_parts=loss_parts)

    def _output_head(self) -> tuple[torch.Tensor, dict]:
        """The LLM's output head as the losses take it. Read anew in each forward: sharding swaps the weight."""
        head = self.language_model.get_output_embeddings()
        text_config = self.config.get_text_config()
        scale = getattr(text_config, "logit_scale", None) or 1.0  # Cohere
        scale /= getattr(text_config, "logits_scaling", None) or 1.0  # Granite
        softcap = getattr(text_config, "final_logit_softcapping", None)  # Gemma
        return head.weight, {"lm_head_bias": getattr(head, "bias", None), "scale": scale, "softcap": softcap}

    @torch.no_grad()
    def check_output_head(self):
        """Make sure that the losses see the same logits as the LLM's own forward returns.

        The losses read the output head directly, which is only right while they know all that the LLM does to its
        logits afterwards. The trainer calls this once.

        Raises:
            ValueError: this LLM does something else.
        """
        input_ids = torch.arange(4, device=self.device)[None]
        weight, options = self._output_head()
        with _frozen(self.language_model):
            own = self.language_model(input_ids=input_ids, use_cache=False).logits.float()
            states = self.language_model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
            logits = nn.functional.linear(states, weight, options.pop("lm_head_bias"))
        difference = (postprocess_logits(logits, **options) - own).abs().max()
        tolerance = 1e-3 if own.dtype == torch.float32 else 1e-1
        if not difference <= tolerance * max(1.0, float(own.abs().max())):
            raise ValueError(
                f"{type(self.language_model).__name__} treats its logits in a way that the distillation losses do not "
                f"know (largest difference {float(difference):.3g}); distilling it would be wrong. Known are a scale "
                "(logit_scale, logits_scaling) and soft-capping (final_logit_softcapping)."
            )

    # -- generation ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(self, inputs=None, generation_config=None, *args, input_features=None, streamer=None, **kwargs):
        """Generate after prompts of text and audio; see `GenerationMixin.generate` for all other arguments.

        The result begins with the prompts exactly as they were given (one placeholder per audio), so
        `output[:, inputs["input_ids"].shape[1]:]` are the new tokens. `max_length` counts LLM positions, speech
        tokens included; `max_new_tokens` is unaffected. Without audio this is the LLM's own `generate`.

        Args:
            input_ids, attention_mask (B, L): prompts, left-padded; from the processor.
            input_features, input_features_mask, *optional*: their audio clips; from the processor.
            streamer ([`~transformers.generation.BaseStreamer`], *optional*): receives text tokens as they come.

        Raises:
            ValueError: placeholders and audios do not fit together, or the prompts do not fit the LLM's context.
        """
        input_ids = kwargs.pop("input_ids", inputs)
        input_features_mask = kwargs.pop("input_features_mask", None)
        if input_ids is not None and input_ids.dtype.is_floating_point:
            raise ValueError("generate takes prompts as input_ids, got floats. Pass audio as input_features.")
        if input_ids is not None:
            kwargs["input_ids"] = input_ids
        if input_features is None:
            if input_ids is not None:
                self._check_text_only(input_ids, kwargs.get("attention_mask"))
            return super().generate(None, generation_config, *args, streamer=streamer, **kwargs)

        if input_ids is None:
            raise ValueError(
                "Audio needs a prompt: pass input_ids with one placeholder per audio (the processor does)."
            )
        prompt, _ = self._hear_prompt(
            input_ids, kwargs.pop("attention_mask", None), None, input_features, input_features_mask, None
        )
        self._check_context(prompt)
        if kwargs.get("past_key_values") is not None:
            raise ValueError("Audio after a key-value cache is not supported: pass the whole conversation again.")
        kwargs |= {
            "input_ids": prompt.input_ids.masked_fill(prompt.is_speech, self._unspoken_token_id()),
            "attention_mask": prompt.attention_mask,
            "is_speech": prompt.is_speech,
            "speech_embeds": prompt.speech_embeds,
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

    def _check_context(self, prompt: SpeechPrompt):
        capacity = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        if capacity is not None and prompt.input_ids.shape[1] >= capacity:
            raise ValueError(
                f"The prompt takes {prompt.input_ids.shape[1]} positions ({int(prompt.is_speech.sum(1).max())} of them "
                f"speech), but the LLM's context holds {capacity}, the answer included. Shorten the audio or the text."
            )

    def prepare_inputs_for_generation(
        self, *args, is_first_iteration=False, speech_embeds=None, is_speech=None, **kwargs
    ):
        inputs = super().prepare_inputs_for_generation(*args, is_first_iteration=is_first_iteration, **kwargs)
        # Speech is part of the prompt: with a cache, later steps are plain text.
        if is_first_iteration or not kwargs.get("use_cache", True):
            inputs |= {"speech_embeds": speech_embeds, "is_speech": is_speech}
        return inputs


BlspKdForCausalLM.register_for_auto_class("AutoModelForCausalLM")
