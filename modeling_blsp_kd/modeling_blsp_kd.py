"""`BlspKdForCausalLM`: speech encoder -> adapter -> LLM.

Follows arXiv 2405.19041: speech tokens stand in the LLM's input where the transcript's tokens would stand, and the LLM
on the text prompt teaches the LLM on the speech prompt. Leaves out: the parts (`speech_encoder.py`, `adapters.py`,
`plora.py`, `speech_prompt.py`), the distillation loss (`distillation_step.py`), `generate` (`generation_blsp_kd.py`)
and training itself (`trainer.py`).

Shapes: B prompts, L prompt length, P positions in a key-value cache, A audio clips in reading order over the batch, T
encoder frames, U speech tokens of a clip, H encoder width, D LLM width, V vocabulary.
"""

import copy
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.processing_utils import Unpack
from transformers.quantizers import AutoQuantizationConfig
from transformers.utils import TransformersKwargs, can_return_tuple

from .adapters import CFormer, Subsampler
from .backbones import load_audio_tower, load_language_model, without_folder
from .checkpoint_files import CHECK_CONFIG, check_folder, explained, misfits
from .configuration_blsp_kd import BlspKdConfig
from .distillation_step import (
    NEED_STUDENT,
    NEED_TEACHER,
    ComparedPrompts,
    distillation_loss,
    wanted_losses,
)
from .encoder_families import frame_duration_s, frame_starts_s, steps_per_frame, window_of
from .frozen import frozen
from .generation_blsp_kd import BlspKdGenerationMixin
from .loudness import find_silence, loudness
from .plora import ADAPTER_NAME, PartialLora, leave_out_of_peft_model
from .plora_switching import load_as_stored, switch
from .speech_encoder import TrueLengthWhisperEncoder, build_speech_encoder, encode_speech
from .speech_prompt import SpeechPrompt, check_placeholders, cut_out, find_placeholders, lay_out
from .speech_windows import join_windows, split_into_windows
from .stored_dtypes import build_in, dtypes_of_parts, without_part_dtypes_if_told
from .thin_checkpoints import identify, is_thin, load_thin, trained_names
from .token_times import token_times
from .versions import CACHE_NAME, CACHE_NAMES, one_cache

ADAPTER_CLASSES = {"cformer": CFormer, "subsampler": Subsampler}


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
            encoder frames (from the start) at which each token is complete, see [`CifOutput`]; -1 past a clip's count
            (CFormer only).
        token_times (`torch.FloatTensor` of shape (A, U, 2), *optional*):
            where they were asked for: seconds from the start of the clip where each token begins and ends, corrected
            as `config.timestamps` says; NaN past a clip's count (CFormer only). Uncorrected, tokens end at firing
            places times `frame_duration_s`.
    """

    num_speech_tokens: torch.LongTensor | None = None
    frame_mask: torch.BoolTensor | None = None
    alphas: torch.FloatTensor | None = None
    alpha_sum: torch.FloatTensor | None = None
    firing_places: torch.FloatTensor | None = None
    token_times: torch.FloatTensor | None = None


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


def _for_language_model_only(quantization_config):
    """Exempt all but the LLM's linear layers from a quantisation, beside what its user exempts."""
    if isinstance(quantization_config, dict):
        quantization_config = AutoQuantizationConfig.from_dict(quantization_config)
    # Regular expressions from the start of a name of a module (bitsandbytes) or of a weight (torchao).
    kept = ["audio_tower", "adapter", rf".*\.lora_[AB]\.{ADAPTER_NAME}", r".*\.(lm_head|embed_out)"]
    for option in ("llm_int8_skip_modules", "modules_to_not_convert"):
        if hasattr(quantization_config, option):
            quantization_config = copy.copy(quantization_config)
            setattr(quantization_config, option, [*kept, *(getattr(quantization_config, option) or [])])
            return quantization_config
    raise ValueError(
        f"{type(quantization_config).__name__} cannot exempt parts of a model, and only the LLM should be quantised. "
        "Quantise it in from_backbones(..., text_kwargs={'quantization_config': ...})."
    )


class BlspKdPreTrainedModel(PreTrainedModel):
    config_class = BlspKdConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("audio", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["WhisperEncoderLayer"]
    _skip_keys_device_placement = list(CACHE_NAMES)
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # Only `BlspKdTrainer` counts what each loss part is a mean over; a plain Trainer must take means as they are.
    accepts_loss_kwargs = False


class BlspKdForCausalLM(BlspKdPreTrainedModel, BlspKdGenerationMixin):
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
        with explained("The speech encoder of speech_config cannot be built", CHECK_CONFIG):
            self.audio_tower = audio_tower or build_speech_encoder(speech_config)
        if isinstance(self.audio_tower, TrueLengthWhisperEncoder):
            self.audio_tower.pad_to_window = config.speech_padding == "max_length"
        with explained("The LLM of text_config cannot be built", CHECK_CONFIG):
            self.language_model = language_model or AutoModelForCausalLM.from_config(text_config)
        options = dict(config.adapter)
        adapter_class = ADAPTER_CLASSES[options.pop("type")]
        if adapter_class is CFormer:
            options["attn_implementation"] = config._attn_implementation or "sdpa"
        self.adapter = adapter_class(speech_config.hidden_size, text_config.get_text_config().hidden_size, **options)
        self.plora = None
        if config.plora:
            self.plora = PartialLora(self.language_model, **config.plora)
        self.register_state_dict_post_hook(leave_out_of_peft_model)
        build_in(self, config.part_dtypes)
        self.post_init()
        # Whisper also names its decoder's layers, and accelerate's FSDP refuses names of layers that are not there.
        self._no_split_modules = set(self._no_split_modules) & {type(module).__name__ for module in self.modules()}
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
        thin: bool = False,
        **config_options,
    ) -> "BlspKdForCausalLM":
        """Give an LLM ears: join two pretrained backbones with a new adapter.

        Args:
            speech_model (`str` or `os.PathLike`): Hub id or folder of a speech model of one of the types
                `SPEECH_ENCODERS`, or of its encoder alone.
            text_model (`str` or `os.PathLike`): Hub id or folder of a causal LLM.
            audio_token_id (`int`): `processor.audio_token_id` of [`BlspKdProcessor.from_backbones`].
            dtype (`torch.dtype` or `str`): of the frozen weights; `"auto"`: the dtype that the LLM is stored in. What
                will be trained is float32, as optimisers want it.
            speech_kwargs, text_kwargs (`dict`, *optional*): for the two `from_pretrained` calls.
            thin (`bool`): save only what was trained; checkpoints name both backbones and fetch them when loaded.
            config_options: fields of [`BlspKdConfig`]: `adapter`, `plora`, `distillation`, `freeze_speech_encoder`,
                `speech_padding`.

        Returns:
            [`BlspKdForCausalLM`] with the LLM's generation config.

        Raises:
            ValueError: an option or a backbone does not fit, or nothing that is trained would learn the token counts.
        """
        speech_kwargs, text_kwargs = dict(speech_kwargs or {}), dict(text_kwargs or {})
        if thin:
            config_options["backbones"] = {
                "audio_tower": identify(speech_model, speech_kwargs),
                "language_model": identify(text_model, text_kwargs),
            }
        language_model = load_language_model(text_model, dtype, **text_kwargs)
        audio_tower = load_audio_tower(speech_model, dtype=language_model.dtype, **speech_kwargs)
        config = cls.config_class(
            speech_config=without_folder(audio_tower.config).to_dict(),
            text_config=without_folder(language_model.config).to_dict(),
            audio_token_id=audio_token_id,
            **config_options,
        )
        reads_encoder = config.adapter.get("num_pre_layers") == 0 and config.adapter["frame_stride"] == 1
        if reads_encoder and config.freeze_speech_encoder:
            raise ValueError(
                "With num_pre_layers=0 CIF reads its weights off the encoder, so while that is frozen nothing would "
                "learn the token counts. Set freeze_speech_encoder=False, or have a pre-CIF layer or a frame_stride "
                "above 1."
            )
        model = cls(config, audio_tower=audio_tower, language_model=language_model)
        model.upcast_trained()
        if language_model.can_generate():
            model.generation_config = GenerationConfig.from_dict(language_model.generation_config.to_dict())
        return model.eval()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Load a checkpoint, full or thin; see `PreTrainedModel.from_pretrained` for all arguments.

        Each part comes in the dtype that it was saved in, so that trained float32 weights beside a half-precision LLM
        are not rounded; an explicit `dtype` is that of all. Quantisation is for the LLM: speech encoder, adapter and
        partial LoRA keep their precision.

        Of the config's fields that may be given here, `plora` also puts partial LoRA on a model without it (it changes
        nothing until it is trained), or takes it off (`False`), leaving the LLM as it was.

        Raises:
            OSError: a file is missing or cannot be read.
            ValueError: a file is broken, or weights do not fit the config, or lack what it asks for.
        """
        files = {name: kwargs[name] for name in ("subfolder", "variant") if name in kwargs}
        check_folder(pretrained_model_name_or_path, **files)
        kwargs, plora, is_switched = load_as_stored(cls.config_class, pretrained_model_name_or_path, kwargs)
        is_full = not is_thin(cls.config_class, pretrained_model_name_or_path, **kwargs)
        if is_full:
            kwargs = without_part_dtypes_if_told(kwargs)
            if kwargs.get("quantization_config") is not None:
                kwargs["quantization_config"] = _for_language_model_only(kwargs["quantization_config"])
            result = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        else:
            result = load_thin(cls, pretrained_model_name_or_path, *args, **kwargs)
        model = result[0] if isinstance(result, tuple) else result
        if is_switched:
            names = switch(model, plora, pretrained_model_name_or_path)
            if isinstance(result, tuple):
                result[1]["unexpected_keys" if plora is None else "missing_keys"].update(names)
        if is_full:
            # transformers makes every loaded parameter trainable, so freezing has to be repeated.
            model.freeze_backbones()
            model.config.part_dtypes = None  # they are those of the file
        model._skip_backbones_on_save()
        distributed = getattr(model.config, "distributed_config", None)
        if model.plora is not None and getattr(distributed, "tp_plan", None) is not None:
            raise ValueError(
                "Tensor parallelism does not know the layers that partial LoRA wraps. Use a device_map, FSDP or data "
                "parallelism, or a model with plora off."
            )
        return result

    @staticmethod
    def _finalize_model_loading(model, load_config, loading_info):
        # transformers would first allocate what does not fit, however large, and its error names no weight.
        wrong = [(name, tuple(stored), tuple(own)) for name, stored, own in loading_info.mismatched_keys]
        if wrong and not load_config.ignore_mismatched_sizes:
            raise ValueError(misfits(load_config.pretrained_model_name_or_path, wrong))
        loading_info = PreTrainedModel._finalize_model_loading(model, load_config, loading_info)
        # Partial LoRA without weights changes nothing. Who brings a state dict of their own knows what is in it.
        missing = sorted(name for name in loading_info.missing_keys if f".{ADAPTER_NAME}." not in name)
        if missing and load_config.pretrained_model_name_or_path is not None:
            raise ValueError(
                f"{load_config.pretrained_model_name_or_path} lacks weights that the config asks for, which would be "
                f"random: {missing[:5]} ({len(missing)} in all). Load it with its own config; only plora may be "
                "switched while loading. Another adapter or LLM is joined, and trained, by from_backbones."
            )
        return loading_info

    def save_pretrained(self, save_directory, *args, full: bool = False, **kwargs):
        """Save a checkpoint; see `PreTrainedModel.save_pretrained` for the other arguments.

        Args:
            full (`bool`): save the backbones too, though the model was built with `thin=True`.

        Raises:
            ValueError: the backbones cannot be saved, because only the LLM was quantised.
        """
        backbones = self.config.backbones
        only_llm_quantised = hasattr(self.language_model, "hf_quantizer") and not hasattr(self, "hf_quantizer")
        if only_llm_quantised and (full or backbones is None):
            raise ValueError(
                "The LLM alone was quantised when this model was built, so a full checkpoint of it could not be loaded "
                "again. Build it with from_backbones(..., thin=True), or save a model of the original LLM and quantise "
                "that when loading."
            )
        if full:
            self.config.backbones = None
        try:
            self._skip_backbones_on_save()
            if self.config.backbones is None:
                saved = kwargs.get("state_dict")
                self.config.part_dtypes = dtypes_of_parts(self.state_dict() if saved is None else saved)
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self.config.backbones, self.config.part_dtypes = backbones, None
            self._skip_backbones_on_save()

    def resize_token_embeddings(self, *args, **kwargs):
        if self.config.backbones is not None:
            raise ValueError(
                "The vocabulary belongs to the LLM, which this model's thin checkpoints leave out, so new embeddings "
                "would not be saved. Export a full checkpoint first: save_pretrained(folder, full=True). The audio "
                "placeholder needs no embedding."
            )
        return super().resize_token_embeddings(*args, **kwargs)

    def _skip_backbones_on_save(self):
        is_full = self.config.backbones is None
        # The Trainer reads it too: keys that it must not miss when it resumes.
        self._keys_to_ignore_on_save = set() if is_full else set(self.state_dict()) - trained_names(self)

    def initialize_weights(self):
        super().initialize_weights()
        # The LLM's own rule has by now given LoRA's B noise instead of zeros. `init` leaves loaded weights alone.
        if self.plora is not None:
            self.plora.initialize()

    def freeze_backbones(self):
        """Freeze the LLM (never its partial LoRA) and, if the config says so, the speech encoder."""
        self.language_model.requires_grad_(False)
        self.audio_tower.requires_grad_(not self.config.freeze_speech_encoder)
        if isinstance(self.audio_tower, TrueLengthWhisperEncoder):
            # A table of sinusoids, never trained.
            self.audio_tower.embed_positions.requires_grad_(False)
        if self.plora is not None:
            for parameter in self.plora.parameters:
                parameter.requires_grad_(True)
        self._skip_backbones_on_save()

    def upcast_trained(self) -> "BlspKdForCausalLM":
        """Make what is trained float32, as optimisers want it; returns the model."""
        for parameter in self.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        return self

    def cast_frozen(self, dtype: torch.dtype | str) -> "BlspKdForCausalLM":
        """Make what is frozen `dtype` ("auto": leave it), but for a quantised LLM; returns the model."""
        if dtype == "auto":
            return self
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        is_quantised = hasattr(self, "hf_quantizer") or hasattr(self.language_model, "hf_quantizer")
        for name, parameter in self.named_parameters():
            if not (parameter.requires_grad or is_quantised and name.startswith("language_model.")):
                parameter.data = parameter.data.to(dtype)
        return self

    def merge_and_unload(self, *args, **kwargs):
        """Always raises: partial LoRA applies at speech positions only."""
        if self.plora is None:
            raise ValueError("There is nothing to merge: this model was built with plora off.")
        self.plora.layers[0].merge()

    def _set_gradient_checkpointing(self, enable=True, gradient_checkpointing_func=checkpoint, **kwargs):
        if self.plora is not None:
            gradient_checkpointing_func = self.plora.checkpoint(gradient_checkpointing_func)
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **kwargs)

    def set_attn_implementation(self, *args, **kwargs):
        super().set_attn_implementation(*args, **kwargs)
        self.adapter.set_attn_implementation(self.config._attn_implementation)

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

    @property
    def frame_duration_s(self) -> float:
        """Seconds of audio per encoder frame: turns firing places into times."""
        return frame_duration_s(self.config.speech_config)

    @can_return_tuple
    def get_audio_features(
        self,
        input_features,
        input_features_mask=None,
        num_speech_tokens=None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_token_times: bool = False,
    ) -> BlspKdAudioOutput:
        """Hear audio clips: encoder frames, and the speech tokens that the LLM reads.

        Args:
            input_features (`torch.FloatTensor` of shape (A, ...)): what the encoder's feature extractor makes: log-mel
                (A, num_mel_bins, length) for Whisper, waveforms (A, length), or filter bank frames (A, length, bins).
                Longer than 30 s: encoded in windows, see `speech_windows.py`.
            input_features_mask (`torch.Tensor` of shape (A, length), *optional*): 1 at what belongs to the clip.
            output_hidden_states, output_attentions (`bool`, *optional*): of the encoder, by window; not from encoders
                that take clips one at a time.
            num_speech_tokens (`torch.LongTensor` of shape (A,), *optional*):
                tokens that CIF must fire; omitted, they are predicted. CFormer only.
            output_token_times (`bool`): tell when each token was said. CFormer only.
        """
        # An option that is not given must stay away: None would overrule the encoder's own config.
        wanted = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
        wanted = {name: value for name, value in wanted.items() if value is not None}
        window, time_axis = window_of(self.config.speech_config)
        if input_features.shape[time_axis] == 0:
            raise ValueError(
                f"input_features of shape {tuple(input_features.shape)} hold no frames: axis {time_axis} is time. "
                "Leave out clips without samples, and their placeholders, or pass features as the processor makes them."
            )
        if input_features_mask is None:
            input_features_mask = input_features.new_ones(len(input_features), input_features.shape[time_axis])
        elif not torch.compiler.is_compiling() and not bool((is_heard := input_features_mask.bool().any(1)).all()):
            empty = (~is_heard).nonzero().flatten().tolist()
            raise ValueError(
                f"Audio {empty[0]} of the batch holds no frames: its input_features_mask is zero everywhere. Leave out "
                "clips without samples, and their placeholders."
            )
        windows, window_mask, windows_per_clip = split_into_windows(
            input_features, input_features_mask, window, time_axis
        )
        is_trained = any(parameter.requires_grad for parameter in self.audio_tower.parameters())
        with nullcontext() if is_trained else frozen(self.audio_tower, input_features):
            encoded = encode_speech(self.audio_tower, windows, window_mask, **wanted)
        frames, frame_mask = encoded.last_hidden_state, encoded.frame_mask
        if self.training and self.is_activation_checkpointing and not frames.requires_grad:
            # Reentrant checkpointing gives a layer no gradient unless its input needs one.
            frames.requires_grad_(True)
        adapter_dtype = next(self.adapter.parameters()).dtype
        adapted = self.adapter(frames.to(adapter_dtype), frame_mask, num_speech_tokens, windows_per_clip)
        times = None
        if output_token_times and adapted.alphas is not None:
            times = self._time_tokens(windows, window_mask, frame_mask, windows_per_clip, adapted)
        frame_mask, frames = join_windows(windows_per_clip, frame_mask, frames)
        return BlspKdAudioOutput(
            last_hidden_state=frames,
            pooler_output=adapted.speech_tokens,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
            num_speech_tokens=adapted.num_speech_tokens,
            frame_mask=frame_mask,
            alphas=adapted.alphas,
            alpha_sum=adapted.alpha_sum,
            firing_places=adapted.firing_places,
            token_times=times,
        )

    def _time_tokens(self, windows, window_mask, frame_mask, windows_per_clip, adapted) -> torch.Tensor:
        """Start and end of every speech token: (A, U, 2)."""
        speech_config, options = self.config.speech_config, self.config.timestamps
        _, time_axis = window_of(speech_config)
        frames_per_window = frame_mask.shape[1]
        frame_loudness = loudness(windows, window_mask, time_axis, steps_per_frame(speech_config), frames_per_window)
        frame_mask, frame_loudness = join_windows(windows_per_clip, frame_mask, frame_loudness)
        is_silent = find_silence(frame_loudness, frame_mask, options["silence"]).to(adapted.alphas.device)
        starts_s = frame_starts_s(speech_config, is_silent.shape[1], frames_per_window)
        counts, delay_s = adapted.num_speech_tokens, options["delay_s"]
        return token_times(adapted.alphas, counts, is_silent, starts_s, self.frame_duration_s, delay_s)

    def _hear_prompt(
        self,
        input_ids,
        attention_mask,
        labels,
        input_features,
        input_features_mask,
        num_speech_tokens,
        inputs_embeds=None,
        position_ids=None,
        output_token_times: bool = False,
    ) -> tuple[SpeechPrompt, BlspKdAudioOutput]:
        """Hear the clips of a batch of prompts and give each its positions.

        Args:
            attention_mask (B, L), or (B, P + L) when the prompts follow P positions in a key-value cache.
            inputs_embeds (B, L, D), *optional*: read instead of the embeddings of input_ids.
        """
        audio_token_id = self.config.audio_token_id
        is_placeholder = find_placeholders(input_ids, attention_mask, audio_token_id)
        is_repeated = check_placeholders(is_placeholder, audio_token_id, len(input_features), num_speech_tokens)
        if len(input_features) == 0:
            audio = self._hear_nothing(input_features)
        else:
            audio = self.get_audio_features(
                input_features,
                input_features_mask,
                num_speech_tokens,
                output_token_times=output_token_times,
                return_dict=True,
            )
        prompt = lay_out(
            input_ids,
            attention_mask,
            labels,
            is_placeholder,
            is_repeated,
            audio.pooler_output,
            audio.num_speech_tokens,
            self._harmless_token_id(),
            inputs_embeds,
            position_ids,
        )
        return prompt, audio

    def _hear_nothing(self, input_features) -> BlspKdAudioOutput:
        """What the ears hear in no clip at all, input_features (0, ...).

        They hear zeros, and all of it is cut off. So every process runs the same modules, and every
        parameter has a gradient, of zero: DDP, FSDP and ZeRO-3 wait for both.
        """
        silence = input_features.new_zeros(1, *input_features.shape[1:])
        num_tokens = torch.ones(1, dtype=torch.long, device=silence.device) if self.adapter.one_to_one else None
        audio = self.get_audio_features(silence, num_speech_tokens=num_tokens, return_dict=True)
        return BlspKdAudioOutput(
            **{name: value[:0] for name, value in audio.items() if isinstance(value, torch.Tensor)}
        )

    def _find_in_embeds(self, inputs_embeds) -> torch.LongTensor:
        """Ids that tell placeholders from all else in embedded prompts, (B, L)."""
        embeddings, audio_token_id = self.get_input_embeddings(), self.config.audio_token_id
        if inputs_embeds is None or audio_token_id >= embeddings.weight.shape[0]:
            raise ValueError(
                "Audio needs a prompt: pass input_ids with one placeholder per audio (the processor does)"
                + (f", since the placeholder {audio_token_id} has no embedding." if inputs_embeds is not None else ".")
            )
        placeholder = embeddings(torch.tensor(audio_token_id, device=inputs_embeds.device))
        is_placeholder = (inputs_embeds == placeholder.to(inputs_embeds.dtype)).all(-1)
        return torch.where(is_placeholder, audio_token_id, -1)

    def _check_context(self, prompt: SpeechPrompt, num_new_tokens: int = 0):
        capacity = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        num_positions = prompt.attention_mask.shape[1]
        if capacity is not None and num_positions + num_new_tokens > capacity:
            raise ValueError(
                f"The prompt takes {num_positions} positions ({int(prompt.is_speech.sum(1).max())} of them speech), "
                f"but the LLM's context holds {capacity}, the answer included. Shorten the audio or the text. "
                "A pipeline for speech recognition cuts recordings itself: chunk_length_s=20."
            )

    def _mask_after_cache(self, input_ids, attention_mask, num_past: int):
        """The attention mask of P cached and L new positions, (B, P + L)."""
        if attention_mask is None and num_past == 0:
            return None
        if attention_mask is None and len(input_ids) == 1:
            return input_ids.new_ones(1, num_past + input_ids.shape[1])
        expected = (len(input_ids), num_past + input_ids.shape[1])
        if attention_mask is None or tuple(attention_mask.shape) != expected:
            raise ValueError(
                f"A prompt with audio needs the attention_mask of {num_past} cached and {input_ids.shape[1]} new "
                f"positions, of shape {expected}, but got "
                f"{None if attention_mask is None else tuple(attention_mask.shape)}."
            )
        # As in the LLM alone it may be of any dtype. Half precision cannot count positions beyond 256.
        return attention_mask.long()

    def _check_text_only(self, input_ids, attention_mask):
        if not isinstance(attention_mask, torch.Tensor) or attention_mask.shape != input_ids.shape:
            attention_mask = None  # of a static cache (also one mask per kind of layer), or 4-D
        audio_token_id = self.config.audio_token_id
        check_placeholders(find_placeholders(input_ids, attention_mask, audio_token_id), audio_token_id, num_audios=0)

    def _harmless_token_id(self) -> int:
        """An id inside the vocabulary; its embedding is masked or overwritten wherever it stands."""
        pad_token_id = self.config.get_text_config().pad_token_id
        return 0 if pad_token_id is None else pad_token_id

    def _embed(self, input_ids, is_speech, speech_embeds, text_embeds=None):
        """Embed tokens (unless they are), with speech vectors at speech positions: (B, L) -> (B, L, D)."""
        if text_embeds is None:
            text_embeds = self.get_input_embeddings()(input_ids.masked_fill(is_speech, self._harmless_token_id()))
        return torch.where(is_speech[..., None], speech_embeds.to(text_embeds.dtype), text_embeds)

    def _partial_lora_at(self, is_speech):
        # Also without speech, so that a call never reads under the mask of one around it.
        return nullcontext() if self.plora is None else self.plora.at(is_speech)

    def _distill(
        self, student: dict, teacher: dict, prompts: ComparedPrompts, audio: BlspKdAudioOutput, num_items_in_batch
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Run the LLM as far as the losses need it, and compute them.

        Args:
            student, teacher: what the LLM reads, speech prompts and text prompts.
            num_items_in_batch: see `forward`.

        Returns:
            `tuple`: as from [`distillation_loss`].
        """
        weights = self.config.distillation
        wanted = wanted_losses(weights, self.training, self.adapter.one_to_one)
        student_states = teacher_states = None
        options = {"use_cache": False, "return_dict": True}
        # `base_model` is the LLM without its head: vocabulary products are taken at the compared positions only.
        if wanted & NEED_TEACHER:
            with frozen(self.language_model), self._partial_lora_at(None):
                teacher_states = self.language_model.base_model(**teacher, **options).last_hidden_state
        if wanted & NEED_STUDENT:
            with self._partial_lora_at(prompts.is_speech):
                student_states = self.language_model.base_model(**student, **options).last_hidden_state
        return distillation_loss(
            prompts,
            audio,
            self.language_model,
            weights,
            wanted,
            student_states=student_states,
            teacher_states=teacher_states,
            num_items_in_batch=num_items_in_batch,
        )

    # -- forward ------------------------------------------------------------------------------------------------------

    @can_return_tuple
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
        cache=None,
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
            num_speech_tokens (`torch.LongTensor` of shape (A,), *optional*):
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
            num_items_in_batch (`torch.Tensor` of shape (3,), *optional*):
                [`ItemCounts`] of the whole optimiser step, over all processes. Omitted: those of this batch. Without
                a teacher: the number of labels, as in any causal LM.

        Raises:
            ValueError: placeholders and audios do not fit together, or the distillation inputs do not.
        """
        cache = one_cache(past_key_values, cache)
        if teacher_input_ids is not None and not self.adapter.one_to_one:
            num_speech_tokens = None  # the transcripts' lengths do not bind an adapter of a fixed rate
        num_past = 0 if cache is None else int(cache.get_seq_length())
        audio = None
        if input_features is not None:
            if speech_embeds is not None:
                raise ValueError("input_features go without speech_embeds: the model makes its own.")
            if input_ids is None:
                input_ids = self._find_in_embeds(inputs_embeds)
            prompt, audio = self._hear_prompt(
                input_ids,
                self._mask_after_cache(input_ids, attention_mask, num_past),
                labels,
                input_features,
                input_features_mask,
                num_speech_tokens,
                inputs_embeds,
                position_ids,
            )
            self._check_context(prompt)
            # Without a mask, position_ids may tell that one row holds several prompts (packing).
            is_unmasked = attention_mask is None and position_ids is not None and len(input_ids) == 1
            attention_mask = None if is_unmasked else prompt.attention_mask
            input_ids, position_ids = prompt.input_ids, prompt.position_ids
            labels, is_speech = prompt.labels, prompt.is_speech
            inputs_embeds = self._embed(input_ids, is_speech, prompt.speech_embeds, prompt.text_embeds)
            input_ids = None
        elif is_speech is not None:
            length = (input_ids if inputs_embeds is None else inputs_embeds).shape[1]
            is_speech = cut_out(is_speech, num_past, length)
            if inputs_embeds is None:
                inputs_embeds = self._embed(input_ids, is_speech, cut_out(speech_embeds, num_past, length))
                input_ids = None
        elif input_ids is not None and num_past == 0 and not torch.compiler.is_compiling():
            self._check_text_only(input_ids, attention_mask)

        if teacher_input_ids is not None:
            if audio is None or labels is None:
                raise ValueError("A distillation step needs input_features and labels beside the teacher's inputs.")
            student = {"inputs_embeds": inputs_embeds, "attention_mask": attention_mask, "position_ids": position_ids}
            teacher = {"input_ids": teacher_input_ids, "attention_mask": teacher_attention_mask}
            prompts = ComparedPrompts(labels, is_speech, teacher_input_ids, teacher_is_content, teacher_is_response)
            loss, loss_parts = self._distill(student, teacher, prompts, audio, num_items_in_batch)
            return BlspKdOutputWithPast(loss=loss, loss_parts=loss_parts)
        if num_items_in_batch is not None:
            # A count of labels alone, as from a plain Trainer, stands for response tokens, too.
            response_tokens, *_ = torch.as_tensor(num_items_in_batch).flatten()
            kwargs["num_items_in_batch"] = response_tokens
        with self._partial_lora_at(is_speech):
            outputs = self.language_model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                labels=labels,
                use_cache=use_cache,
                logits_to_keep=logits_to_keep,
                return_dict=True,
                **{CACHE_NAME: cache},
                **kwargs,
            )
        return BlspKdOutputWithPast(
            loss=outputs.loss,
            logits=outputs.logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
        )


BlspKdForCausalLM.register_for_auto_class("AutoModelForCausalLM")
