"""`BlspKdConfig`: a speech encoder, an LLM, an adapter between them, partial LoRA and the distillation losses.

Defaults follow arXiv 2405.19041 and the authors' public code. Everything is checked together when the config is made;
the parts themselves take plain numbers. Leaves out: training arguments, which belong to the Trainer.
"""

import copy
import difflib
import math
import os
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
from transformers.utils import logging

from .encoder_families import ENCODER_FAMILIES
from .model_files import CHECK_CONFIG, explained

logger = logging.get_logger(__name__)

MODEL_TYPE = "blsp_kd"


@dataclass(frozen=True)
class CFormerOptions:
    """Options of `adapter={"type": "cformer", ...}`.

    Args:
        num_pre_layers, num_post_layers (`int`): transformer layers before and after CIF, at least 0. With none before
            and no joined frames, CIF's weights are a channel of the encoder's own frames: train the encoder along.
        num_attention_heads (`int`, *optional*): must divide the encoder width; omitted: the encoder's own.
        ffn_dim (`int`, *optional*): omitted: the encoder's own.
        dropout (`float`): in [0, 1).
        frame_stride (`int`): encoder frames that are joined to one for the pre-CIF layers, at least 1. Their cost falls
            in proportion; CIF integrates all frames as before.
        attention_window (`int`, *optional*): joined frames, at least 1. The pre-CIF layers attend within stretches of
            this length, which begin half a stretch earlier in every other layer, so that their cost grows with the
            length of a clip, not with its square. Omitted: they attend to the whole clip (at most 30 s).
    """

    num_pre_layers: int = 4
    num_post_layers: int = 4
    num_attention_heads: int | None = None
    ffn_dim: int | None = None
    dropout: float = 0.0
    frame_stride: int = 1
    attention_window: int | None = None


@dataclass(frozen=True)
class SubsamplerOptions:
    """Options of `adapter={"type": "subsampler", ...}`.

    Args:
        num_layers (`int`): stride-2 convolutions; three make 6.25 tokens/s of 50 frames/s.
        kernel_size (`int`): odd.
        bottleneck_dim (`int`): width of the bottleneck.
    """

    num_layers: int = 3
    kernel_size: int = 5
    bottleneck_dim: int = 512


@dataclass(frozen=True)
class PartialLoraOptions:
    """Options of `plora={...}`, named as in `peft.LoraConfig`.

    Args:
        r (`int`): rank, at least 1.
        lora_alpha (`int`): the update is scaled by `lora_alpha / r`.
        lora_dropout (`float`): in [0, 1).
        target_modules (`str` or `list[str]`): `"all-linear"`: all attention and MLP projections.
    """

    r: int = 16
    lora_alpha: int = 16
    lora_dropout: float = 0.05
    target_modules: Any = "all-linear"


@dataclass(frozen=True)
class DistillationOptions:
    """Weights of the losses, at least 0 each (0: not computed in training), and the temperature of the KLs.

    Args:
        response_kl (`float`): KL over response tokens.
        input_kl (`float`, *optional*): KL over content positions; needs one token per text token. Omitted: 1 with
            the CFormer, 0 with the subsampler.
        quantity (`float`, *optional*): CIF's token count. Omitted: as `input_kl`.
        response_ce (`float`): cross-entropy of the response (the BLSP baseline).
        transcript_ce (`float`): cross-entropy of the transcript read off the speech tokens (ASR).
        temperature (`float`): above 0; no temperature^2 factor follows.
    """

    response_kl: float = 1.0
    input_kl: float | None = None
    quantity: float | None = None
    response_ce: float = 0.0
    transcript_ce: float = 0.0
    temperature: float = 2.0


@dataclass(frozen=True)
class TimestampOptions:
    """How CIF's integral is read as a clock, see `token_times.py`.

    Args:
        delay_s (`float`): how long after the words CIF gathers their weight, seconds.
            `examples/experiments/measure_timestamps.py` fits it.
        silence (`float`): in [0, 1): frames are silent up to this share of the way from the quietest frame of a clip to
            its loudest; 0: none is.
    """

    delay_s: float = 0.1
    silence: float = 0.3


# How alike two names must be for one to be a typing error of the other: "lora" is one of plora, and pad_token_id, which
# many configs have, is none of audio_token_id.
TYPING_ERROR = 0.85
# What transformers adds to any config beyond its declared fields.
GENERAL_OPTIONS = {
    "_attn_implementation",
    "_commit_hash",
    "_experts_implementation",
    "_name_or_path",
    "attn_implementation",
    "experts_implementation",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "quantization_config",
    "tie_word_embeddings",
    "torch_dtype",
    "use_cache",
}
CHECKED_OPTIONS = (
    "adapter",
    "plora",
    "distillation",
    "timestamps",
    "freeze_speech_encoder",
    "speech_padding",
    "audio_token_id",
    "backbones",
    "part_dtypes",
)
ADAPTERS = {"cformer": CFormerOptions, "subsampler": SubsamplerOptions}
SPEECH_ENCODERS = tuple(ENCODER_FAMILIES)
SPEECH_PADDINGS = ("do_not_pad", "max_length")
BACKBONES = ("audio_tower", "language_model")
# Where `pipeline` finds the code of its tasks, which the processor saves beside itself.
CUSTOM_PIPELINES = {
    "audio-text-to-text": {"impl": "pipeline_blsp_kd.BlspKdPipeline", "pt": ["AutoModelForCausalLM"]},
    "automatic-speech-recognition": {
        "impl": "pipeline_blsp_kd.BlspKdSpeechRecognitionPipeline",
        "pt": ["AutoModelForCausalLM"],
    },
}


def _options(options_class, given: dict, where: str):
    _require(isinstance(given, dict), f"The options of {where} must be a dict", given)
    known = [field.name for field in fields(options_class)]
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise _unknown(unknown, known, where)
    return options_class(**given)


def _unknown(names, known, where: str) -> ValueError:
    meant = [close for name in names for close in _look_alikes(name, known)]
    hint = f" Did you mean {' and '.join(meant)}?" if meant else ""
    return ValueError(f"Unknown option(s) {names} in {where}. Known: {known}.{hint}")


def _look_alikes(name: str, known) -> list[str]:
    return difflib.get_close_matches(name, known, n=1, cutoff=TYPING_ERROR)


def _require(condition: bool, expected: str, got):
    if not condition:
        raise ValueError(f"{expected}, got {got!r:.200}.")


def _is_count(value, at_least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= at_least


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -math.inf < value < math.inf


def _is_share(value) -> bool:
    return _is_number(value) and 0 <= value < 1


def _is_text(value) -> bool:
    return isinstance(value, str) and value != ""


class BlspKdConfig(PreTrainedConfig):
    """Configuration of [`BlspKdForCausalLM`].

    Args:
        speech_config (`PreTrainedConfig` or `dict`): of the speech encoder; one of the model types
            `SPEECH_ENCODERS`.
        text_config (`PreTrainedConfig` or `dict`): of the LLM; any type that `AutoModelForCausalLM` knows.
        adapter (`str` or `dict`): `"cformer"` or `"subsampler"`, or a dict of `type` and the options of
            [`CFormerOptions`] or [`SubsamplerOptions`].
        plora (`bool` or `dict`): partial LoRA off, on, or on with [`PartialLoraOptions`].
        distillation (`dict`, *optional*): [`DistillationOptions`].
        timestamps (`dict`, *optional*): [`TimestampOptions`].
        freeze_speech_encoder (`bool`): keep the encoder as it is. The LLM is always frozen.
        speech_padding (`str`): `"do_not_pad"`: encode each clip on its true length; `"max_length"` (Whisper only):
            pad it to 30 seconds of silence that the encoder hears, as in its pretraining.
        audio_token_id (`int`, *optional*): id of the one placeholder that stands for an audio in a prompt. It may lie
            outside the LLM's vocabulary, since it is never embedded. Omitted: the model takes text only.
        backbones (`dict`, *optional*): makes checkpoints thin: they hold only what was trained, and the rest is
            fetched from here. For each of `audio_tower` and `language_model`: `name_or_path` (Hub id or folder) and
            `revision` (commit, or checksum of a folder's weights). Set by `from_backbones(thin=True)`.
        part_dtypes (`dict`, *optional*): of a full checkpoint whose parts differ in dtype: the name of the dtype of
            `audio_tower`, `adapter`, `language_model` and `plora`. Set by `save_pretrained`.
        custom_pipelines (`dict`, *optional*): further tasks than `CUSTOM_PIPELINES`, in the same form.

    Raises:
        ValueError: a misspelt or contradictory option, or an unknown one in a dict of options. Other unknown options of
            the config itself are warned of: transformers, too, passes and saves options, and new versions new ones.
    """

    model_type = MODEL_TYPE
    sub_configs_defaults: ClassVar = {
        "speech_config": SubConfigSpec(AutoConfig, "whisper"),
        "text_config": SubConfigSpec(AutoConfig, "llama"),
    }
    # Tasks that an installed package has registered its own pipelines for, so that no code beside weights is needed.
    registered_tasks: ClassVar[tuple[str, ...]] = ()

    speech_config: Any = None
    text_config: Any = None
    adapter: Any = "cformer"
    plora: Any = False
    distillation: Any = None
    timestamps: Any = None
    freeze_speech_encoder: bool = True
    speech_padding: str = "do_not_pad"
    audio_token_id: int | None = None
    backbones: Any = None
    part_dtypes: Any = None
    auto_map: Any = None
    custom_pipelines: Any = None

    def __post_init__(self, **kwargs):
        known = [name for name in self.__annotations__ if name != "sub_configs_defaults"]
        unknown = sorted(set(kwargs) - GENERAL_OPTIONS)
        misspelt = [name for name in unknown if _look_alikes(name, known)]
        if misspelt:
            raise _unknown(misspelt, known, "BlspKdConfig")
        if unknown:
            # No error: another version of transformers may know them, and then its files must be readable.
            logger.warning_once(
                f"Unknown option(s) {unknown} in BlspKdConfig have no effect, and are not saved. Known: {known}."
            )
        # Copies, because building a model sets the attention of the config's parts: an LLM that is passed to the model
        # with its own config would lose its attention.
        for name in self.sub_configs_defaults:
            given = getattr(self, name)
            _require(given is None or isinstance(given, (dict, PreTrainedConfig)), f"{name} must be a config", given)
            setattr(self, name, copy.deepcopy(given))
        with explained("The config, or speech_config or text_config in it, is wrong", CHECK_CONFIG):
            super().__post_init__(**kwargs)
        _require(
            self.speech_config.model_type in SPEECH_ENCODERS,
            f"speech_config must be of a model type among {SPEECH_ENCODERS}",
            self.speech_config.model_type,
        )
        self.adapter = self._checked_adapter()
        self.plora = self._checked_plora()
        self.distillation = self._checked_distillation()
        self.timestamps = self._checked_timestamps()
        _require(
            self.audio_token_id is None or _is_count(self.audio_token_id, 0),
            "audio_token_id must be a token id of at least 0",
            self.audio_token_id,
        )
        _require(
            isinstance(self.freeze_speech_encoder, bool),
            "freeze_speech_encoder must be True or False",
            self.freeze_speech_encoder,
        )
        self._check_speech_encoder()
        if self.backbones is not None:
            _require(
                isinstance(self.backbones, dict)
                and set(self.backbones) == set(BACKBONES)
                and all(
                    isinstance(backbone, dict)
                    and set(backbone) == {"name_or_path", "revision"}
                    and all(map(_is_text, backbone.values()))
                    for backbone in self.backbones.values()
                ),
                f"backbones must be None, or give name_or_path and revision (text) of each of {BACKBONES}",
                self.backbones,
            )
        _require(
            self.part_dtypes is None
            or isinstance(self.part_dtypes, dict)
            and set(self.part_dtypes.values()) <= {"float64", "float32", "bfloat16", "float16"},
            "part_dtypes must be None, or give names of floating point dtypes",
            self.part_dtypes,
        )
        self.tie_word_embeddings = getattr(self.text_config.get_text_config(), "tie_word_embeddings", False)
        if self.auto_map is None:
            model = "modeling_blsp_kd.BlspKdForCausalLM"
            self.auto_map = {
                "AutoConfig": "configuration_blsp_kd.BlspKdConfig",
                "AutoModel": model,
                "AutoModelForCausalLM": model,
                "AutoModelForMultimodalLM": model,
            }
        _require(
            self.custom_pipelines is None or isinstance(self.custom_pipelines, dict),
            "custom_pipelines must be None, or give the code of each task",
            self.custom_pipelines,
        )
        pipelines = {**CUSTOM_PIPELINES, **(self.custom_pipelines or {})}
        self.custom_pipelines = {task: code for task, code in pipelines.items() if task not in self.registered_tasks}

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> tuple[dict, dict]:
        with explained(f"The config of {pretrained_model_name_or_path} cannot be read"):
            config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        # For a missing file transformers gives an empty dict, which would stand for its defaults.
        if not isinstance(config_dict, dict) or not config_dict:
            raise OSError(
                f"{pretrained_model_name_or_path} has no config.json, or none with options. Name the folder or "
                "repository of a BLSP-KD model, as save_pretrained writes it."
            )
        return config_dict, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs) -> "BlspKdConfig":
        # transformers sets options given at loading after the config is made, past the checks.
        given = {name: kwargs.pop(name) for name in CHECKED_OPTIONS if name in kwargs}
        return super().from_dict({**config_dict, **given}, **kwargs)

    def to_dict(self) -> dict:
        # Libraries set attributes of their own on configs. In a file they would be unknown options.
        unknown = set(self.__dict__) - set(self.__class__.__dataclass_fields__) - GENERAL_OPTIONS
        known = {name: value for name, value in super().to_dict().items() if name not in unknown}
        return {**known, "custom_pipelines": {**CUSTOM_PIPELINES, **self.custom_pipelines}}

    def _check_speech_encoder(self):
        model_type = self.speech_config.model_type
        _require(
            self.speech_padding in SPEECH_PADDINGS,
            f"speech_padding must be one of {SPEECH_PADDINGS}",
            self.speech_padding,
        )
        if self.speech_padding == "max_length" and not ENCODER_FAMILIES[model_type].is_padded:
            raise ValueError(
                f"speech_padding='max_length' is for Whisper, whose encoder was trained on 30 s; {model_type!r} takes "
                "any length. Leave speech_padding at 'do_not_pad'."
            )

    def _checked_adapter(self) -> dict:
        given = {"type": self.adapter} if isinstance(self.adapter, str) else self.adapter
        kind = given.get("type") if isinstance(given, dict) else given
        _require(
            isinstance(kind, str) and kind in ADAPTERS,
            f"adapter must be one of {sorted(ADAPTERS)}, or a dict whose 'type' is",
            kind,
        )
        given = {name: value for name, value in given.items() if name != "type"}
        options = asdict(_options(ADAPTERS[str(kind)], given, f"the {kind} adapter"))
        if kind == "cformer":
            encoder = self.speech_config
            if options["num_attention_heads"] is None:
                options["num_attention_heads"] = encoder.num_attention_heads
            if options["ffn_dim"] is None:
                options["ffn_dim"] = getattr(encoder, ENCODER_FAMILIES[encoder.model_type].ffn_dim)
            for name in ("num_pre_layers", "num_post_layers"):
                _require(
                    _is_count(options[name], 0),
                    f"adapter option {name} must be an integer of at least 0",
                    options[name],
                )
            width, heads = encoder.hidden_size, options["num_attention_heads"]
            _require(
                _is_count(heads, 1) and width % heads == 0,
                f"adapter option num_attention_heads must divide the encoder width {width}",
                heads,
            )
            for name in ("ffn_dim", "frame_stride"):
                _require(
                    _is_count(options[name], 1),
                    f"adapter option {name} must be an integer of at least 1",
                    options[name],
                )
            _require(
                options["attention_window"] is None or _is_count(options["attention_window"], 1),
                "adapter option attention_window must be None or an integer of at least 1",
                options["attention_window"],
            )
            _require(_is_share(options["dropout"]), "adapter option dropout must lie in [0, 1)", options["dropout"])
        else:
            for name in ("num_layers", "bottleneck_dim"):
                _require(_is_count(options[name], 1), f"adapter option {name} must be at least 1", options[name])
            _require(
                _is_count(options["kernel_size"], 1) and options["kernel_size"] % 2 == 1,
                "adapter option kernel_size must be odd",
                options["kernel_size"],
            )
        return {"type": kind, **options}

    def _checked_plora(self) -> dict | None:
        if self.plora is None or self.plora is False:
            return None
        given = {} if self.plora is True else self.plora
        _require(isinstance(given, dict), "plora must be True, False or a dict of options", given)
        if given.get("use_dora"):
            raise ValueError(
                "plora does not support use_dora: DoRA rescales the LLM's own weights, at text positions too."
            )
        if given.get("lora_bias") or given.get("bias", "none") != "none":
            raise ValueError(
                "plora does not support lora_bias: a bias after B is added at every position, text included."
            )
        options = asdict(_options(PartialLoraOptions, given, "plora"))
        _require(_is_count(options["r"], 1), "plora option r must be an integer of at least 1", options["r"])
        alpha, dropout, targets = options["lora_alpha"], options["lora_dropout"], options["target_modules"]
        _require(_is_number(alpha) and alpha > 0, "plora option lora_alpha must be above 0", alpha)
        _require(_is_share(dropout), "plora option lora_dropout must lie in [0, 1)", dropout)
        _require(
            _is_text(targets) or (isinstance(targets, (list, tuple)) and bool(targets) and all(map(_is_text, targets))),
            "plora option target_modules must be a name or a list of names",
            targets,
        )
        return options

    def _checked_distillation(self) -> dict:
        given = {} if self.distillation is None else self.distillation
        options = asdict(_options(DistillationOptions, given, "distillation"))
        one_to_one = self.adapter["type"] == "cformer"
        for name in ("input_kl", "quantity"):
            if options[name] is None:
                options[name] = float(one_to_one)
        for name, value in options.items():
            _require(_is_number(value) and value >= 0, f"distillation option {name} must be at least 0", value)
        _require(options["temperature"] > 0, "distillation option temperature must be above 0", options["temperature"])
        if not one_to_one:
            for name in ("input_kl", "quantity", "transcript_ce"):
                if options[name]:
                    raise ValueError(
                        f"distillation option {name}={options[name]} needs one speech token per text token, which the "
                        "subsampler adapter does not make. Set it to 0, or use adapter='cformer'."
                    )
        return options

    def _checked_timestamps(self) -> dict:
        options = asdict(_options(TimestampOptions, {} if self.timestamps is None else self.timestamps, "timestamps"))
        delay_s, silence = options["delay_s"], options["silence"]
        _require(
            _is_number(delay_s) and -1 <= delay_s <= 1,
            "timestamps option delay_s must lie in [-1, 1] (seconds)",
            delay_s,
        )
        _require(_is_share(silence), "timestamps option silence must lie in [0, 1)", silence)
        return options


BlspKdConfig.register_for_auto_class()
# `transformers serve` and the any-to-any pipeline look in this table of names, and nowhere else, whether a model takes
# audio; a class from a repository enters it only so (`AutoModelForMultimodalLM.register` does not write to it).
MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[MODEL_TYPE] = "BlspKdForCausalLM"
