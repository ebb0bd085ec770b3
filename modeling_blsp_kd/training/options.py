"""Options of `examples/train.py`: of the model, and `TrainingArguments` with other defaults.

Options of the data are in `processing/training_rows/options.py`.
"""

import logging
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from transformers import TrainingArguments

from .command_line import BACKBONES_HELP, ON_OTHER_REVISION_HELP, read_switch_option
from .parameter_groups import OPTIMIZERS_WITH_OWN_GROUPS
from .supported_arguments import check_training_arguments

logger = logging.getLogger(__name__)

# In a checkout of the repository; an installed wheel has no backbones of its own.
TINY_WORLD = Path(__file__).parents[2] / "examples" / "tiny_world"
TINY_TEXT_MODEL = str(TINY_WORLD / "llm")
TINY_SPEECH_MODEL = str(TINY_WORLD / "speech_encoder")
# Options that a model to train further already decides.
OF_A_MODEL = ("text_model", "speech_model", "adapter", "adapter_options", "calibrate_adapter", "thin")
DEFAULT_STEPS = 2400


@dataclass
class ModelOptions:
    text_model: str = field(default=TINY_TEXT_MODEL, metadata={"help": "Hub id or folder of the LLM."})
    speech_model: str = field(default=TINY_SPEECH_MODEL, metadata={"help": "Hub id or folder of a speech encoder."})
    adapter: str = field(default="cformer", metadata={"help": "Which adapter: cformer or subsampler."})
    adapter_options: str | None = field(
        default=None,
        metadata={
            "help": "JSON options of the adapter, for example '{\"num_pre_layers\": 2}'. If omitted: the defaults of "
            "BlspKdConfig, or for the tiny world's encoder fewer layers (1 + 2, or 2 of the subsampler)."
        },
    )
    chat_template_kwargs: str | None = field(
        default=None,
        metadata={
            "help": "JSON options of the LLM's chat template, for example '{\"enable_thinking\": false}'. They are "
            "saved with the processor. If omitted: none, or those of --start_from."
        },
    )
    transcription_instruction: str | None = field(
        default=None,
        metadata={
            "help": "What asks the LLM for a transcript, saved with the processor. If omitted: 'Repeat the words.', or "
            "that of --start_from."
        },
    )
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "Dtype of the frozen weights: float32, bfloat16, or auto (as the LLM is stored). If omitted: "
            "float32 on a CPU, auto elsewhere. Trained weights are always float32."
        },
    )
    calibrate_adapter: bool = field(
        default=False,
        metadata={
            "help": "Start an untrained CFormer at the token count and the vector size of some training rows. With "
            "Whisper's 50 frames a second this saves some hundred steps."
        },
    )
    plora: str = field(  # read into a bool or a dict
        default="false",
        metadata={
            "help": "Adapt the LLM at speech positions (partial LoRA): true, false, or JSON options, for example "
            "'{\"r\": 8}'.",
            "nargs": "?",
            "const": "true",
        },
    )
    freeze_speech_encoder: bool = field(default=False, metadata={"help": "Train the adapter (and PLoRA) only."})
    start_from: str | None = field(
        default=None,
        metadata={
            "help": "Hub id or folder of a BLSP-KD model to train further. It keeps its backbones, adapter and partial "
            "LoRA (--plora true adds one where there is none); this command decides all else, including what is frozen "
            "and the weights of the losses."
        },
    )
    backbones: str | None = field(default=None, metadata={"help": f"With --start_from. {BACKBONES_HELP}"})
    on_other_revision: str | None = field(
        default=None, metadata={"help": f"With --start_from. {ON_OTHER_REVISION_HELP}"}
    )
    distillation: str = field(
        default="{}", metadata={"help": "JSON loss weights and temperature, for example '{\"input_kl\": 0.5}'."}
    )
    encoder_learning_rate: float | None = field(
        default=None, metadata={"help": "Of the speech encoder; 0.4 of learning_rate if omitted."}
    )
    spec_augment: bool = field(
        default=True, metadata={"help": "Mask bits of the features of an unfrozen encoder (all but Parakeet's)."}
    )
    speech_padding: str = field(
        default="do_not_pad", metadata={"help": "do_not_pad, or max_length: pad each clip to 30 s for Whisper."}
    )
    speech_streaming: str = field(
        default="null",
        metadata={
            "help": "JSON options of a model that can listen while one speaks, for example '{\"chunk_ms\": 640}', or "
            "true for the defaults (docs/streaming.md). If omitted: as --start_from, or a model of whole clips."
        },
    )
    kept_frames: str | None = field(
        default=None,
        metadata={
            "help": "File (safetensors) for the frames of a frozen Whisper encoder: each clip is encoded once, in this "
            "and in later runs."
        },
    )
    thin: bool = field(
        default=False, metadata={"help": "Save only what was trained; checkpoints name the two backbones."}
    )

    def __post_init__(self):
        self.plora = read_switch_option(self.plora, "plora")  # type: ignore[assignment]  # the parser needs str
        defaults = {option.name: option.default for option in fields(self)}
        given = [name for name in OF_A_MODEL if getattr(self, name) != defaults[name]]
        if self.start_from and given:
            raise ValueError(
                f"--start_from {self.start_from} brings its own {', '.join(given)}. Leave out "
                f"{', '.join(f'--{name}' for name in given)}, or --start_from to build a new model."
            )
        if not self.start_from and (self.backbones or self.on_other_revision):
            raise ValueError(
                "--backbones and --on_other_revision are for the thin checkpoint of --start_from. A new model takes "
                "--text_model and --speech_model."
            )


@dataclass
class Arguments(TrainingArguments):
    """TrainingArguments with defaults that suit the tiny world.

    Steps end training, 2,400 of them, unless `num_train_epochs` is given and `max_steps` is not.
    """

    output_dir: str = "outputs/default"
    per_device_train_batch_size: int = 32
    per_device_eval_batch_size: int = 64
    learning_rate: float = 1e-3
    adam_beta2: float = 0.98
    max_steps: int = field(
        default=-1, metadata={"help": "Optimiser steps; 2400 if neither this nor num_train_epochs is given."}
    )
    num_train_epochs: float | None = field(
        default=None, metadata={"help": "Passes over the training rows, unless max_steps is given."}
    )
    warmup_steps: float = 100
    lr_scheduler_type: str = "cosine"
    logging_steps: float = 50
    save_steps: float = 600
    save_total_limit: int | None = 2
    train_sampling_strategy: str = "group_by_length"
    dataloader_num_workers: int = 1  # reads ahead, so that the model does not wait
    dataloader_persistent_workers: bool = True  # and still has the features that it keeps in the next epoch
    dataloader_pin_memory: bool = torch.cuda.is_available()
    remove_unused_columns: bool = False
    seed: int = 1
    max_batch_length: float | None = field(
        default=None,
        metadata={
            "help": "Padded seconds of a batch (rows times the longest), instead of per_device_train_batch_size rows; "
            "--seconds_per_token adds the text."
        },
    )
    on_policy_share: float = field(
        default=0.0,
        metadata={
            "help": "Share of the training rows with audio that the student answers itself in each step (at most "
            "--max_response_tokens); the teacher scores its tokens. The others keep their responses."
        },
    )
    on_policy_temperature: float = field(
        default=1.0, metadata={"help": "Of sampling the student's own answers; 0: the most likely tokens."}
    )
    non_finite_loss: str = field(
        default="stop", metadata={"help": "stop or skip: what becomes of a step whose loss or gradient is NaN or inf."}
    )

    def __post_init__(self):
        self.dataloader_persistent_workers &= self.dataloader_num_workers > 0  # DataLoader refuses none that persist
        if self.max_steps <= 0 and self.num_train_epochs is None:
            self.max_steps = DEFAULT_STEPS
        if self.num_train_epochs is None:
            self.num_train_epochs = TrainingArguments.num_train_epochs
        super().__post_init__()
        check_training_arguments(self)  # before any work, also before making data
        if self.optim in OPTIMIZERS_WITH_OWN_GROUPS:
            raise ValueError(
                f"--optim {self.optim.value} takes its own groups of parameters, but train.py groups them by learning "
                "rate (--encoder_learning_rate). Use another optimiser, or BlspKdTrainer in code of your own."
            )


def where_to_resume(args: Arguments) -> str | bool:
    """Return what to resume from; `--resume_from_checkpoint true` is allowed before there is any checkpoint."""
    given = args.resume_from_checkpoint or "false"
    if given.lower() != "true":
        return False if given.lower() == "false" else given
    if any(Path(args.output_dir).glob("checkpoint-*")):
        return True
    logger.info("No checkpoint in %s yet: training starts anew.", args.output_dir)
    return False


def encoder_learning_rate(options: ModelOptions, args: Arguments) -> float:
    """Return the learning rate of the speech encoder."""
    given = options.encoder_learning_rate
    return 0.4 * args.learning_rate if given is None else given
