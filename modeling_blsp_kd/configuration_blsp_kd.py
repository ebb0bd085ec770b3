"""`BlspKdConfig`: a speech encoder, an LLM, an adapter between them, partial LoRA and the distillation losses.

Defaults follow arXiv 2405.19041 and the authors' public code. Everything is checked together when the config is made,
and again when an option is assigned; the parts themselves take plain numbers. Leaves out: the options inside `adapter`,
`distillation`, `streaming`, `plora` and `timestamps` (`adapter_options.py`, `distillation_options.py`,
`streaming_options.py`, `config_options.py`), and training arguments, which belong to the Trainer.
"""

import copy
import os
from dataclasses import asdict, fields
from typing import Any, ClassVar

from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
from transformers.utils import logging

from .adapter_options import CFormerOptions, SubsamplerOptions, read_adapter
from .backbone_names import check_backbones, with_other_names
from .config_options import (
    PartialLoraOptions,
    TimestampOptions,
    check_part_dtypes,
    check_spelling,
    is_count,
    read_plora,
    require,
)
from .distillation_options import DistillationOptions
from .encoder_families import ENCODER_FAMILIES, check_padding
from .model_files import CHECK_CONFIG, check_config, explained
from .streaming_options import StreamingOptions, read_streaming

logger = logging.get_logger(__name__)

MODEL_TYPE = "blsp_kd"
WRITTEN_FOR_ANY_CONFIG = frozenset(PreTrainedConfig().to_dict())
# Other options that transformers accepts for any config. Names that begin with an underscore are internal to it.
GENERAL_OPTIONS = {
    "attn_implementation",
    "experts_implementation",
    "name_or_path",
    "num_labels",
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
    "streaming",
    "freeze_speech_encoder",
    "speech_padding",
    "audio_token_id",
    "backbones",
    "part_dtypes",
)
SPEECH_ENCODERS = tuple(ENCODER_FAMILIES)
# Where `pipeline` finds the code of its tasks, which the processor saves beside itself.
CUSTOM_PIPELINES = {
    "audio-text-to-text": {"impl": "pipeline_blsp_kd.BlspKdPipeline", "pt": ["AutoModelForCausalLM"]},
    "automatic-speech-recognition": {
        "impl": "pipeline_blsp_kd.BlspKdSpeechRecognitionPipeline",
        "pt": ["AutoModelForCausalLM"],
    },
}


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
        streaming (`bool` or `dict`): on: a model that can listen while one speaks, see [`StreamingOptions`].
        freeze_speech_encoder (`bool`): keep the encoder as it is. The LLM is always frozen.
        speech_padding (`str`): `"do_not_pad"`: encode each clip on its true length; `"max_length"` (Whisper only):
            pad it to 30 seconds with silence that the encoder attends to, as in its pretraining.
        audio_token_id (`int`, *optional*): id of the one placeholder that stands for an audio in a prompt. It may lie
            outside the LLM's vocabulary, since it is never embedded. Omitted: the model takes text only.
        backbones (`dict`, *optional*): makes checkpoints thin: they hold only what was trained, and the rest is
            fetched from here. For each of `audio_tower` and `language_model`: `name_or_path` (Hub id or folder) and
            `revision` (commit, or checksum of a folder's weights), see `backbone_names.py`. Set by
            `from_backbones(thin=True)`; `from_pretrained(..., backbones=...)` names other places.
        part_dtypes (`dict`, *optional*): of a full checkpoint whose parts differ in dtype: the name of the dtype of
            `audio_tower`, `adapter`, `language_model` and `plora`. Set by `save_pretrained`.
        custom_pipelines (`dict`, *optional*): further tasks than `CUSTOM_PIPELINES`, in the same form.

    Options are stored as plain dicts. Assigning one (`config.plora = {"r": 4}`) checks and completes it as here. What
    is changed inside a stored dict (`config.plora["r"] = 4`) is checked when the model reads it.

    Raises:
        ValueError: a misspelt or contradictory option, or an unknown one in a dict of options. Other unknown options of
            the config itself give a warning: transformers passes and saves some of its own, and new versions add more.
    """

    model_type = MODEL_TYPE
    sub_configs_defaults: ClassVar = {
        "speech_config": SubConfigSpec(AutoConfig, "whisper"),
        "text_config": SubConfigSpec(AutoConfig, "llama"),
    }
    # Tasks that an installed package has registered its own pipelines for, so that no code beside weights is needed.
    registered_tasks: ClassVar[tuple[str, ...]] = ()

    speech_config: PreTrainedConfig = None
    text_config: PreTrainedConfig = None
    adapter: str | dict[str, Any] = "cformer"
    plora: bool | dict[str, Any] | None = False
    distillation: dict[str, Any] | None = None
    timestamps: dict[str, Any] | None = None
    streaming: bool | dict[str, Any] | None = False
    freeze_speech_encoder: bool = True
    speech_padding: str = "do_not_pad"
    audio_token_id: int | None = None
    backbones: dict[str, dict[str, str]] | None = None
    part_dtypes: dict[str, str] | None = None
    auto_map: dict[str, str] | None = None
    custom_pipelines: dict[str, Any] | None = None

    def __post_init__(self, **kwargs):
        known, unknown = own_options(), sorted(set(kwargs) - GENERAL_OPTIONS - WRITTEN_FOR_ANY_CONFIG)
        check_spelling(unknown, known, "BlspKdConfig")
        if unknown := [name for name in unknown if not name.startswith("_")]:
            # Not an error, because files that another version of transformers wrote must remain readable.
            logger.warning_once(
                f"Unknown option(s) {unknown} in BlspKdConfig have no effect, and are not saved. Known: {known}."
            )
        # Copies, because building a model sets the attention of the config's parts: an LLM that is passed to the model
        # with its own config would lose its attention.
        for name in self.sub_configs_defaults:
            given = getattr(self, name)
            require(given is None or isinstance(given, (dict, PreTrainedConfig)), f"{name} must be a config", given)
            setattr(self, name, copy.deepcopy(given))
        with explained("The config, or speech_config or text_config in it, is wrong", CHECK_CONFIG):
            super().__post_init__(**kwargs)
        require(
            self.speech_config.model_type in SPEECH_ENCODERS,
            f"speech_config must be of a model type among {SPEECH_ENCODERS}",
            self.speech_config.model_type,
        )
        self.__dict__.update(self._checked({name: getattr(self, name) for name in CHECKED_OPTIONS}))
        self.tie_word_embeddings = getattr(self.text_config.get_text_config(), "tie_word_embeddings", False)
        if self.auto_map is None:
            model = "modeling_blsp_kd.BlspKdForCausalLM"
            models = dict.fromkeys(("AutoModel", "AutoModelForCausalLM", "AutoModelForMultimodalLM"), model)
            self.auto_map = {"AutoConfig": "configuration_blsp_kd.BlspKdConfig", **models}
        require(
            self.custom_pipelines is None or isinstance(self.custom_pipelines, dict),
            "custom_pipelines must be None, or give the code of each task",
            self.custom_pipelines,
        )
        pipelines = {**CUSTOM_PIPELINES, **(self.custom_pipelines or {})}
        self.custom_pipelines = {task: code for task, code in pipelines.items() if task not in self.registered_tasks}
        self.is_checked = True  # completely; from now on each assignment is checked

    def __setattr__(self, name: str, value: Any):
        if name in CHECKED_OPTIONS and "is_checked" in self.__dict__:
            others = {other: getattr(self, other) for other in CHECKED_OPTIONS if other != name}
            value = self._checked({**others, name: value})[name]
        super().__setattr__(name, value)

    def _checked(self, given: dict[str, Any]) -> dict[str, Any]:
        """Return the values of `CHECKED_OPTIONS` as they are stored, or raise an error for one that means nothing."""
        adapter = read_adapter(given["adapter"], self.speech_config)
        plora = read_plora(given["plora"])
        distillation = DistillationOptions.read({} if given["distillation"] is None else given["distillation"])
        llm = self.text_config.get_text_config()
        timestamps = TimestampOptions.read({} if given["timestamps"] is None else given["timestamps"])
        streaming = read_streaming(given["streaming"])
        if streaming is not None:
            streaming.check_model(self.speech_config, adapter, given["speech_padding"])
        checked = {
            "adapter": {"type": adapter.type, **asdict(adapter)},
            "plora": None if plora is None else asdict(plora),
            "distillation": asdict(distillation.for_adapter(adapter.one_to_one).for_llm(llm.num_hidden_layers)),
            "timestamps": asdict(timestamps),
            "streaming": None if streaming is None else asdict(streaming),
        }
        token_id, padding, freeze = given["audio_token_id"], given["speech_padding"], given["freeze_speech_encoder"]
        is_id = token_id is None or is_count(token_id, 0)
        require(is_id, "audio_token_id must be a token id of at least 0", token_id)
        require(isinstance(freeze, bool), "freeze_speech_encoder must be True or False", freeze)
        check_padding(padding, self.speech_config)
        check_backbones(given["backbones"])
        check_part_dtypes(given["part_dtypes"])
        return {**copy.deepcopy(given), **checked}

    @property
    def adapter_options(self) -> CFormerOptions | SubsamplerOptions:
        return read_adapter(self.adapter, self.speech_config)

    @property
    def plora_options(self) -> PartialLoraOptions | None:
        return read_plora(self.plora)

    @property
    def distillation_options(self) -> DistillationOptions:
        return DistillationOptions.read(self.distillation).for_adapter(self.adapter_options.one_to_one)

    @property
    def timestamp_options(self) -> TimestampOptions:
        return TimestampOptions.read(self.timestamps)

    @property
    def streaming_options(self) -> StreamingOptions | None:
        return read_streaming(self.streaming)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> tuple[dict, dict]:
        with explained(f"The config of {pretrained_model_name_or_path} cannot be read"):
            config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        check_config(pretrained_model_name_or_path, config_dict)
        return config_dict, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs) -> "BlspKdConfig":
        # transformers sets options given at loading after the config is made, past the checks, and drops unknown ones.
        check_spelling(set(kwargs) - GENERAL_OPTIONS - WRITTEN_FOR_ANY_CONFIG, own_options(), "BlspKdConfig")
        given = {name: kwargs.pop(name) for name in CHECKED_OPTIONS if name in kwargs}
        if (others := given.pop("backbones", None)) is not None:
            given["backbones"] = with_other_names(config_dict.get("backbones"), others)
        return super().from_dict({**config_dict, **given}, **kwargs)

    def to_dict(self) -> dict:
        # Libraries set attributes of their own on configs. In a file they would be unknown options.
        known = GENERAL_OPTIONS | WRITTEN_FOR_ANY_CONFIG | {field.name for field in fields(self)}
        unknown = set(self.__dict__) - known
        written = {name: value for name, value in super().to_dict().items() if name not in unknown}
        return {**written, "custom_pipelines": {**CUSTOM_PIPELINES, **(self.custom_pipelines or {})}}


def own_options() -> list[str]:
    """Return the names of the options that other configs of transformers do not have."""
    return [field.name for field in fields(BlspKdConfig) if field.name not in PreTrainedConfig.__dataclass_fields__]


BlspKdConfig.register_for_auto_class()
# `transformers serve` and the any-to-any pipeline look in this table of names, and nowhere else, whether a model takes
# audio; a class from a repository enters it only so (`AutoModelForMultimodalLM.register` does not write to it).
MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[MODEL_TYPE] = "BlspKdForCausalLM"
