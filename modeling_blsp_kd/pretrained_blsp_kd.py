"""`BlspKdPreTrainedModel`: joining, loading, saving and freezing a model of speech encoder, adapter, LLM, partial LoRA.

Follows `PreTrainedModel` of transformers, which it tells that a checkpoint may lack its backbones, that its parts may
differ in dtype, and that only the LLM is quantised. Leaves out: how that is done (`thin_checkpoints.py`,
`stored_dtypes.py`, `plora_switching.py`, `backbones.py`), and what the model computes (`modeling_blsp_kd.py`).
"""

import os
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationConfig, PreTrainedModel

from .adapter_options import check_frozen_encoder
from .backbone_names import identify
from .backbones import for_language_model_only, load_audio_tower, load_language_model, without_folder
from .configuration_blsp_kd import BlspKdConfig
from .ctc import CTC_HEAD
from .model_files import check_complete, check_fit, check_folder
from .plora import ADAPTER_NAME, PartialLora, check_parallelism
from .plora_switching import load_as_stored, switch
from .speech_encoder import TrueLengthWhisperEncoder
from .stored_dtypes import convert_frozen, convert_trained, note_dtypes, without_part_dtypes_if_told
from .thin_checkpoints import is_thin, load_thin, trained_names
from .versions import CACHE_NAMES


class BlspKdPreTrainedModel(PreTrainedModel):
    """The base of [`BlspKdForCausalLM`], which builds the four parts from the config; `plora` may be None."""

    audio_tower: PreTrainedModel
    adapter: nn.Module
    language_model: PreTrainedModel
    plora: PartialLora | None

    config_class = BlspKdConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("audio", "text")
    supports_gradient_checkpointing = True
    _no_split_modules: list[str] | set[str] = ["WhisperEncoderLayer"]
    _skip_keys_device_placement = list(CACHE_NAMES)
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # Only `BlspKdTrainer` counts the items of each loss part; a plain Trainer must take the means as they are.
    accepts_loss_kwargs = False

    @classmethod
    def from_backbones(
        cls,
        speech_model: str | os.PathLike,
        text_model: str | os.PathLike,
        *,
        audio_token_id: int,
        dtype: torch.dtype | str = "auto",
        speech_kwargs: dict | None = None,
        text_kwargs: dict | None = None,
        thin: bool = False,
        **config_options,
    ) -> "BlspKdPreTrainedModel":
        """Join two pretrained backbones with a new adapter.

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
        if config.freeze_speech_encoder:
            check_frozen_encoder(config.adapter_options)
        model = cls(config, audio_tower=audio_tower, language_model=language_model)
        model.upcast_trained()
        if language_model.can_generate():
            model.generation_config = GenerationConfig.from_dict(language_model.generation_config.to_dict())
        return model.eval()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, *args, on_other_revision: str = "warn", **kwargs
    ) -> Any:
        """Load a checkpoint, full or thin; see `PreTrainedModel.from_pretrained` for all arguments.

        Each part comes in the dtype that it was saved in, so that trained float32 weights beside a half-precision LLM
        are not rounded; an explicit `dtype` is that of all. Quantisation is for the LLM: speech encoder, adapter and
        partial LoRA keep their precision.

        Of the config's fields that may be given here, `plora` also puts partial LoRA on a model without it (it changes
        nothing until it is trained), or takes it off (`False`), leaving the LLM as it was. `backbones` says where those
        of a thin checkpoint are: a dict of "audio_tower" and "language_model", one or both, each a Hub id, a folder, or
        a dict of `name_or_path` and `revision`.

        Args:
            on_other_revision (`str`): "warn" or "error", if a backbone is not of the revision in training. One that the
                checkpoint itself asks for by its revision must be of that.

        Raises:
            OSError: a file is missing or cannot be read.
            ValueError: a file is broken, or weights or backbones do not fit the config, or lack what it asks for.
        """
        files = {name: kwargs[name] for name in ("subfolder", "variant") if name in kwargs}
        check_folder(pretrained_model_name_or_path, **files)
        kwargs, plora, is_switched = load_as_stored(cls.config_class, pretrained_model_name_or_path, kwargs)
        is_full = not is_thin(cls.config_class, pretrained_model_name_or_path, **kwargs)
        if is_full:
            kwargs = without_part_dtypes_if_told(kwargs)
            if kwargs.get("quantization_config") is not None:
                kwargs["quantization_config"] = for_language_model_only(kwargs["quantization_config"])
            result = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        else:
            result = load_thin(cls, pretrained_model_name_or_path, *args, on_other_revision=on_other_revision, **kwargs)
        model = result[0] if isinstance(result, tuple) else result
        if is_switched:
            names = switch(model, plora, pretrained_model_name_or_path)
            if isinstance(result, tuple):
                result[1]["unexpected_keys" if plora is None else "missing_keys"].update(names)
        if is_full:
            # transformers makes every loaded parameter trainable, so freezing has to be repeated.
            model.freeze_backbones()
            model.config.part_dtypes = None  # the loaded weights now have these dtypes
        model._skip_backbones_on_save()
        if model.plora is not None:
            check_parallelism(model.config)
        return result

    @staticmethod
    def _finalize_model_loading(model, load_config, loading_info):
        name_or_path = load_config.pretrained_model_name_or_path
        # transformers would first allocate weights that do not fit, however large, and its error names no weight.
        if not load_config.ignore_mismatched_sizes:
            misfits = [(name, tuple(stored), tuple(own)) for name, stored, own in loading_info.mismatched_keys]
            check_fit(name_or_path, misfits)
        loading_info = PreTrainedModel._finalize_model_loading(model, load_config, loading_info)
        # Partial LoRA without weights changes nothing, and an auxiliary CTC head may begin in any stage of training.
        missing = {name for name in loading_info.missing_keys if f".{ADAPTER_NAME}." not in name}
        missing = {name for name in missing if not name.startswith(CTC_HEAD)}
        if name_or_path is not None:  # callers who pass a state dict know what is in it
            check_complete(name_or_path, missing)
        if "audio_tower.embed_positions.weight" in missing:
            model.audio_tower.initialize_positions()  # transformers has called `initialize_weights` of the whole alone
        return loading_info

    def save_pretrained(self, save_directory: str | os.PathLike, *args, full: bool = False, **kwargs):
        """Save a checkpoint; see `PreTrainedModel.save_pretrained` for the other arguments.

        Args:
            full (`bool`): save the backbones too, though the model was built with `thin=True`.

        Raises:
            ValueError: the backbones cannot be saved, because only the LLM was quantised.
        """
        backbones = self.config.backbones
        if full:
            self.config.backbones = None
        try:
            self._skip_backbones_on_save()
            note_dtypes(self, kwargs.get("state_dict"))
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self.config.backbones, self.config.part_dtypes = backbones, None
            self._skip_backbones_on_save()

    def resize_token_embeddings(self, *args, **kwargs) -> Any:
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
        # The LLM's own rule has just filled LoRA's B with noise instead of zeros. `init` leaves loaded weights alone.
        if self.plora is not None:
            self.plora.initialize()

    def freeze_backbones(self):
        """Freeze the LLM (never its partial LoRA) and, if the config says so, the speech encoder."""
        self.language_model.requires_grad_(False)
        self.audio_tower.requires_grad_(not self.config.freeze_speech_encoder)
        if isinstance(self.audio_tower, TrueLengthWhisperEncoder):
            # A table of sinusoids, which is never trained.
            self.audio_tower.embed_positions.requires_grad_(False)
        if self.plora is not None:
            for parameter in self.plora.parameters:
                parameter.requires_grad_(True)
        self._skip_backbones_on_save()

    def upcast_trained(self) -> "BlspKdPreTrainedModel":
        """Convert trained weights to float32, as optimisers need it, and return the model."""
        convert_trained(self, torch.float32)
        return self

    def cast_frozen(self, dtype: torch.dtype | str) -> "BlspKdPreTrainedModel":
        """Make what is frozen `dtype` ("auto": leave it), except a quantised LLM, and return the model."""
        if dtype != "auto":
            convert_frozen(self, getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        return self

    def merge_and_unload(self, *args, **kwargs):
        """Raise an error, always: partial LoRA applies at speech positions only."""
        if self.plora is None:
            raise ValueError("There is nothing to merge: this model was built with plora off.")
        self.plora.layers[0].merge()

    def _set_gradient_checkpointing(self, enable=True, gradient_checkpointing_func=checkpoint, **kwargs):
        if self.plora is not None:
            gradient_checkpointing_func = self.plora.keep_mask_in_recomputation(gradient_checkpointing_func)
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **kwargs)

    def set_attn_implementation(self, *args, **kwargs):
        super().set_attn_implementation(*args, **kwargs)
        self.adapter.set_attn_implementation(self.config._attn_implementation)
