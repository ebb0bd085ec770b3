"""Give an LLM ears, from (audio, transcript) pairs.

    accelerate launch examples/train.py
    accelerate launch examples/train.py --text_model Qwen/Qwen2.5-0.5B-Instruct --speech_model openai/whisper-small \\
        --train_manifest train.jsonl --eval_manifest eval.jsonl --output_dir outputs/mine
    accelerate launch examples/train.py examples/recipes/whisper_small_qwen2.5_1.5b.yaml --seed 2
    accelerate launch examples/train.py --resume_from_checkpoint true  # again and again, until it is done
    accelerate launch examples/train.py --start_from outputs/mine --train_manifest more.jsonl --output_dir outputs/more

Without arguments it uses the two tiny backbones of `examples/tiny_world` and speech that it synthesises on first use.
A manifest has one JSON object per line: `audio` (a path, relative to the manifest; null in a training row of text
alone), `text` (what is said) and optionally `instruction`, `response` (the LLM's answer; made here if absent),
`duration` (seconds; omitted, the file is asked), `answer` and `kind` (to score with) and `voice`. A mixture is a YAML
list of manifests and data sets, each with a `weight`. All other options are those of `transformers.TrainingArguments`
(docs/training_arguments.md tells of each). A recipe is a YAML file of any of them, which options after it override.

Leaves in the output folder: the model with its processor, `results.json` (what was measured, and on what it was
trained; written after each part, so that what fails late takes nothing along), the clips of three evaluation rows,
checkpoints.
"""

import json
import logging
import os
import shutil
import sys
import time
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
import transformers
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from huggingface_hub import ModelCard
from transformers import AutoConfig, HfArgumentParser, TrainingArguments, set_seed
from transformers.integrations import unset_hf_deepspeed_config
from transformers.trainer_pt_utils import get_parameter_names
from transformers.training_args import OptimizerNames

from modeling_blsp_kd import BlspKdForCausalLM, BlspKdTrainer
from modeling_blsp_kd.devices import fast_dtype
from modeling_blsp_kd.training.batch_order import data_seed
from modeling_blsp_kd.training.command_line import HelpFormatter, unfold_recipe
from modeling_blsp_kd.training.supported_arguments import check_training_arguments
from processing import BlspKdDataCollator, BlspKdProcessor
from processing.chat_templates import is_in_thought, read_options
from processing.data_collator import split_prompt
from processing.evaluation.answering import accuracy, answer_rows
from processing.manifests import read_manifest
from processing.publishing.card import make_card
from processing.publishing.facts import describe_parts
from processing.spoken_inputs import user_turn
from processing.training_rows.clips import check_clips, duration_s
from processing.training_rows.kept_frames import KeptFrames
from processing.training_rows.loading import SKIPPED_FILE, training_data, training_sources
from processing.training_rows.mixtures import read_sources
from processing.training_rows.options import DataOptions

TINY_TEXT_MODEL = str(Path(__file__).parent / "tiny_world" / "llm")
TINY_SPEECH_MODEL = str(Path(__file__).parent / "tiny_world" / "speech_encoder")
REPORTED = ("token_count_accuracy", "token_count_error", "response_kl", "input_kl")
SPEC_AUGMENT = {"apply_spec_augment": True, "mask_time_prob": 0.05, "mask_time_length": 5, "mask_feature_prob": 0.05}
# What a model that is trained further brings with it.
OF_A_MODEL = ("text_model", "speech_model", "adapter", "adapter_options", "plora", "thin")
# For its 25 frames a second: less depth than the defaults, and 6.25 tokens a second from the subsampler.
TINY_ADAPTERS = {"cformer": {"num_pre_layers": 1, "num_post_layers": 2}, "subsampler": {"num_layers": 2}}
NUM_SAMPLES = 3
VOICE_GROUPS = ("seen_voices", "held_out_voices", "unnamed_voices")
DEFAULT_STEPS = 2400
NOT_DECAYING = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]  # as in the Trainer
OPTIMIZERS_WITH_OWN_GROUPS = tuple(
    name for name in OptimizerNames if name.value.startswith(("galore", "apollo", "lomo", "adalomo"))
)


@dataclass
class ModelOptions:
    text_model: str = field(default=TINY_TEXT_MODEL, metadata={"help": "Hub id or folder of the LLM."})
    speech_model: str = field(default=TINY_SPEECH_MODEL, metadata={"help": "Hub id or folder of a speech encoder."})
    adapter: str = field(default="cformer", metadata={"help": "cformer or subsampler."})
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
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "Of the frozen weights: float32, bfloat16, or auto, as the LLM is stored. If omitted: float32 on a "
            "CPU, auto elsewhere. What is trained is float32."
        },
    )
    plora: bool = field(default=False, metadata={"help": "Adapt the LLM at speech positions (partial LoRA)."})
    freeze_speech_encoder: bool = field(default=False, metadata={"help": "Train the adapter (and PLoRA) only."})
    start_from: str | None = field(
        default=None,
        metadata={
            "help": "Hub id or folder of a BLSP-KD model to train further. Backbones, adapter and partial LoRA are its "
            "own; all else, also what is frozen and how losses weigh, is as this command says."
        },
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
        default="do_not_pad", metadata={"help": "do_not_pad, or max_length: Whisper hears each clip padded to 30 s."}
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
        defaults = {option.name: option.default for option in fields(self)}
        given = [name for name in OF_A_MODEL if getattr(self, name) != defaults[name]]
        if self.start_from and given:
            raise ValueError(
                f"--start_from {self.start_from} brings its own {', '.join(given)}. Leave out "
                f"{', '.join(f'--{name}' for name in given)}, or --start_from to build a new model."
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
        check_training_arguments(self)  # before any work, the making of data included
        if self.optim in OPTIMIZERS_WITH_OWN_GROUPS:
            raise ValueError(
                f"--optim {self.optim.value} takes its own groups of parameters, but train.py groups them by learning "
                "rate (--encoder_learning_rate). Use another optimiser, or BlspKdTrainer in code of your own."
            )


def main():
    parser = HfArgumentParser(
        (ModelOptions, DataOptions, Arguments), description=__doc__, formatter_class=HelpFormatter
    )
    model_options, data_options, args = parser.parse_args_into_dataclasses(unfold_recipe(sys.argv[1:]))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    set_seed(args.seed)
    args.resume_from_checkpoint = where_to_resume(args)
    is_launched = args.world_size > 1 or "ACCELERATE_MIXED_PRECISION" in os.environ
    if args.device.type == "cpu" and (is_launched or "OMP_NUM_THREADS" not in os.environ):
        # `accelerate launch` allows one thread per process, and would leave the other cores idle. What a user sets
        # for a single process stands.
        torch.set_num_threads(max(1, os.cpu_count() // args.world_size))
    if model_options.kept_frames and (data_options.speeds or data_options.noise):
        raise ValueError(
            "--kept_frames encodes each clip once, but --speeds and --noise make another clip of it in every epoch. "
            "Leave out the one or the other."
        )
    started_from = model_options.start_from and Path(model_options.start_from).resolve()
    if started_from and started_from.is_dir() and started_from.is_relative_to(Path(args.output_dir).resolve()):
        raise ValueError(f"--output_dir {args.output_dir} holds the model of --start_from. Give a folder of its own.")
    start = time.time()
    stages_before = stages_of(model_options.start_from) if model_options.start_from else []
    trainer, _, eval_rows = make_trainer(model_options, data_options, args)
    model, processor = trainer.model, trainer.processing_class
    kept_frames = KeptFrames(model.audio_tower, model_options.kept_frames) if model_options.kept_frames else None
    results = {}
    trainer.make_card = lambda: model_card(trainer, results)
    training_start = time.time()
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    results["train_seconds"] = round(time.time() - training_start, 1)
    results["training"] = describe_training(trainer, model_options, data_options, eval_rows, stages_before)
    trainer.accelerator.wait_for_everyone()  # they may still note skipped rows
    if data_options.skip_bad_audio and trainer.is_world_process_zero():
        results["skipped_rows"] = trainer.train_dataset.hear.skipped.finish()
        print(f"{results['skipped_rows']} training rows with bad audio were skipped: {args.output_dir}/{SKIPPED_FILE}")
    if kept_frames is not None and trainer.is_world_process_zero():
        kept_frames.save()
    trainer.save_model(_internal_call=True)  # what is pushed has results and samples, too
    write_results(results, trainer)
    if eval_rows:
        alignment = trainer.evaluate()
        results |= {name: alignment[f"eval_{name}"] for name in REPORTED if f"eval_{name}" in alignment}
        write_results(results, trainer)
        samples, scored = eval_rows[:NUM_SAMPLES], [row for row in eval_rows if row.get("answer") is not None]
        # In all processes, of which each may hold only a share of the weights.
        asked = list({id(row): row for row in [*samples, *scored]}.values())
        spoken = answer_rows(model, processor, asked, "audio", max_new_tokens=data_options.max_response_tokens)
        answers = {id(row): answer for row, answer in zip(asked, spoken)}
        results |= score(scored, [answers[id(row)] for row in scored], trainer.train_dataset.voices)
        results["total_seconds"] = round(time.time() - start, 1)
        write_results(results, trainer)
        if trainer.is_world_process_zero():
            print_results(results)
            for row in samples:
                print(f"\n{row['audio']}\n  says    {row['text']!r}")
                print(f"  asked   {row.get('instruction')!r}\n  answers {answers[id(row)]!r}")
            results["samples"] = keep_samples(samples, Path(args.output_dir))
            for row, sample in zip(samples, results["samples"]):
                sample["output"] = answers[id(row)]
        write_results(results, trainer)
    if args.push_to_hub:
        trainer.push_to_hub()


def where_to_resume(args: Arguments) -> str | bool:
    """`--resume_from_checkpoint true` may stand in a command from its first start on."""
    given = args.resume_from_checkpoint or "false"
    if given.lower() != "true":
        return False if given.lower() == "false" else given
    if any(Path(args.output_dir).glob("checkpoint-*")):
        return True
    logging.info("No checkpoint in %s yet: training starts anew.", args.output_dir)
    return False


def make_trainer(
    model_options: ModelOptions, data_options: DataOptions, args: Arguments, model_class=BlspKdForCausalLM
):
    """Model (of `model_class`), data and what trains the one on the other.

    Returns:
        `tuple`: the trainer, training rows and evaluation rows, all with the LLM's own answers.
    """
    if data_options.streaming and args.max_steps <= 0:
        raise ValueError("--streaming reads rows without end, so there are no epochs to count. Give --max_steps.")
    if data_options.eval_manifest:  # seconds; a fault would else be known only when all has been trained
        check_clips(read_manifest(data_options.eval_manifest, data_options.allow_outside_paths))
    processor = build_processor(model_options)
    if args.deepspeed_plugin is not None and not args.deepspeed_plugin.zero3_init_flag:
        # TrainingArguments asks for shares of the weights all the same, but the LLM is to answer first.
        unset_hf_deepspeed_config()
    model = build_model(model_options, processor, model_class, args.device)
    warn_of_endless_answers(model, processor)
    with args.main_process_first(desc="making the data"):
        train_rows, eval_rows = load_rows(data_options, data_seed(args))
    # As in the method, the LLM's own answers are what it learns to give after speech.
    for rows in (train_rows, eval_rows):
        # A mixture repeats rows, as the same objects.
        unanswered = list({id(row): row for row in rows if not row.get("response")}.values())
        answers = [None] * len(unanswered)
        if model.device.type != "meta":  # FSDP's cpu_ram_efficient_loading gives the others their weights later
            answers = answer_rows(model, processor, unanswered, "text", max_new_tokens=data_options.max_response_tokens)
        if answers:  # torch cannot send an empty list
            broadcast_object_list(answers)
        for row, answer in zip(unanswered, answers):
            row["response"] = answer
        if empty := [row for row in unanswered if not row["response"]]:
            raise ValueError(
                f"The LLM answers {len(empty)} of {len(unanswered)} prompts with nothing, so there is nothing to learn "
                f"from, first {empty[0].get('origin', empty[0])}. Look at what it answers to text (its chat template? "
                "its tokenizer?), give these rows a 'response', or leave them out, as make_training_data.py does."
            )
        opened = processor.apply_chat_template(user_turn(None), add_generation_prompt=True)
        if thinking := [row for row in unanswered if is_in_thought(opened + row["response"])]:
            raise ValueError(
                f"{len(thinking)} of {len(unanswered)} answers of the LLM end within a thought, so nothing after it "
                f"would be learnt, first {thinking[0].get('origin', thinking[0])}. Have the LLM not think, for example "
                "with --chat_template_kwargs '{\"enable_thinking\": false}', or raise --max_response_tokens."
            )
    with args.main_process_first(desc="looking at the clips"):
        train_dataset = training_data(train_rows, data_options, args, processor)
    trainer = BlspKdTrainer(
        model=model,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=make_dataset(eval_rows, args.length_column_name) if eval_rows else None,
        data_collator=BlspKdDataCollator(processor),
        processing_class=processor,
        optimizer_cls_and_kwargs=optimizer_and_options(model, model_options, args),
        non_finite_loss=args.non_finite_loss,
    )
    return trainer, train_rows, eval_rows


def build_processor(options: ModelOptions) -> BlspKdProcessor:
    given = read_options(options.chat_template_kwargs)
    if options.start_from:
        return BlspKdProcessor.from_pretrained(options.start_from, **given)
    return BlspKdProcessor.from_backbones(options.speech_model, options.text_model, **given)


def build_model(options: ModelOptions, processor, model_class=BlspKdForCausalLM, device=None) -> BlspKdForCausalLM:
    dtype = fast_dtype(options.dtype, device)
    training = {
        "freeze_speech_encoder": options.freeze_speech_encoder,
        "speech_padding": options.speech_padding,
        "distillation": json.loads(options.distillation),
    }
    if options.start_from:
        config = model_class.config_class.from_pretrained(options.start_from, **training)
        if hasattr(config.speech_config, "apply_spec_augment"):
            config.speech_config.update(SPEC_AUGMENT if options.spec_augment else {"apply_spec_augment": False})
        # As stored, so that what goes on being trained is not rounded by the dtype of the rest.
        model = model_class.from_pretrained(options.start_from, config=config).upcast_trained().cast_frozen(dtype)
        if options.freeze_speech_encoder and any(each.requires_grad for each in model.audio_tower.parameters()):
            raise ValueError(
                f"The encoder of {options.start_from}, a thin checkpoint, was trained; frozen, it would be missing in "
                "the next. Train it on, or start from a full checkpoint: model.save_pretrained(folder, full=True)."
            )
        return model
    speech_config = AutoConfig.from_pretrained(options.speech_model)
    if options.spec_augment and hasattr(speech_config, "apply_spec_augment"):
        speech_config.update(SPEC_AUGMENT)
    adapter_options = json.loads(options.adapter_options) if options.adapter_options else {}
    if options.adapter_options is None and options.speech_model == TINY_SPEECH_MODEL:
        adapter_options = TINY_ADAPTERS.get(options.adapter, {})
    return model_class.from_backbones(
        options.speech_model,
        options.text_model,
        audio_token_id=processor.audio_token_id,
        speech_kwargs={"config": speech_config},
        dtype=dtype,
        adapter={"type": options.adapter, **adapter_options},
        plora=options.plora,
        thin=options.thin,
        **training,
    )


def warn_of_endless_answers(model, processor):
    """Warn if answers are trained to end with a token that generation does not stop at."""
    [ids] = processor.tokenize([split_prompt(processor, None, "yes")[2]], add_special_tokens=False)["input_ids"]
    ends = model.generation_config.eos_token_id
    if ids[-1] not in (ends if isinstance(ends, list) else [ends]):
        logging.warning(
            "Answers are trained to end with %r (token %s), but generation of this LLM stops at %s: add it to "
            "eos_token_id of the LLM's generation_config.json, or its answers may go on.",
            processor.tokenizer.convert_ids_to_tokens(ids[-1]),
            ids[-1],
            ends,
        )


def load_rows(options: DataOptions, seed: int) -> tuple[list[dict], list[dict]]:
    """Training rows (none if they are streamed) and evaluation rows, each from manifests or from the tiny world."""
    eval_rows = read_manifest(options.eval_manifest, options.allow_outside_paths) if options.eval_manifest else []
    if options.streaming:
        return [], eval_rows
    if sources := training_sources(options):
        return read_sources(sources, seed, options.allow_outside_paths), eval_rows
    # Imported here: synthesis needs espeakng-loader, which a manifest does not.
    from tiny_world.dataset import make_rows
    from tiny_world.speech import HELD_OUT_VOICES, TRAIN_VOICES

    train_rows = make_rows("train", options.num_utterances, TRAIN_VOICES, 0, options.cache_dir, repeat_share=0.5)
    if not options.eval_manifest:
        eval_rows = [
            row
            for seed, voices in enumerate((TRAIN_VOICES, HELD_OUT_VOICES), start=1)
            for row in make_rows("test", options.num_eval_utterances, voices, seed, options.cache_dir)
        ]
    return train_rows, eval_rows


def make_dataset(rows: list[dict], length_column: str = "length") -> Dataset:
    """Rows to evaluate on: what the collator reads, and the length that batches are grouped by."""
    read = ("audio", "text", "instruction", "response")
    return Dataset.from_list(
        [{**{name: row.get(name) for name in read}, length_column: duration_s(row)} for row in rows]
    )


def optimizer_and_options(model, options: ModelOptions, args: Arguments) -> tuple[type, dict]:
    """The Trainer's optimiser, with a learning rate of its own for the pretrained encoder.

    Not yet made, as FSDP wants it. As in the Trainer, neither biases nor norms decay.
    """
    optimizer_class, optimizer_options = BlspKdTrainer.get_optimizer_cls_and_kwargs(args, model)
    of_encoder = {id(parameter) for parameter in model.audio_tower.parameters()}
    decaying = get_parameter_names(model, [torch.nn.LayerNorm], NOT_DECAYING) if args.weight_decay else []
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((id(parameter) in of_encoder, name in decaying), []).append(parameter)
    return optimizer_class, {
        **optimizer_options,
        "params": [
            {
                "params": parameters,
                "weight_decay": args.weight_decay if decays else 0.0,
                **({"lr": encoder_learning_rate(options, args)} if is_encoder else {}),
            }
            for (is_encoder, decays), parameters in sorted(groups.items(), key=lambda group: group[0])
        ],
    }


def encoder_learning_rate(options: ModelOptions, args: Arguments) -> float:
    given = options.encoder_learning_rate
    return 0.4 * args.learning_rate if given is None else given


def score(rows, spoken, seen_voices) -> dict:
    """Score the answers to rows that say which is right.

    Returns:
        `dict`: `num_scored`, and the accuracy of the LLM on the gold transcript and of the model on speech, for seen,
        for held-out and for unnamed voices; empty if there is no row.
    """
    if not rows:
        return {}
    results = {"num_scored": len(rows)}
    for name, given in (("text_accuracy", [row["response"] for row in rows]), ("speech_accuracy", spoken)):
        by_voices = {voices: [] for voices in VOICE_GROUPS}
        for row, text in zip(rows, given):
            voice = row.get("voice")
            voices = "seen_voices" if voice in seen_voices else "held_out_voices"
            by_voices["unnamed_voices" if voice is None else voices].append((row, text))
        results[name] = {voices: accuracy(*zip(*pairs))["all"] for voices, pairs in by_voices.items() if pairs}
        results[name]["by_kind"] = accuracy(rows, given)["by_kind"]
    return results


def stages_of(model: str) -> list[dict] | None:
    """How a model was trained, each stage as `describe_training` tells it, first to last; None if not recorded."""
    results = Path(model, "results.json")
    last = json.loads(results.read_text()).get("training") if results.is_file() else None
    if last is None:
        return None
    before = last.pop("before", [])  # absent: an older record
    return None if before is None else [*before, last]


def describe_training(trainer, model_options, data_options, eval_rows, stages_before: list[dict] | None) -> dict:
    """Settings and data of this run, for the model card. Hub ids are named, folders of this machine are not."""
    args, is_frozen = trainer.args, model_options.freeze_speech_encoder

    def public_name(name: str) -> str | None:
        own = {TINY_TEXT_MODEL: "examples/tiny_world/llm", TINY_SPEECH_MODEL: "examples/tiny_world/speech_encoder"}
        return own.get(name, None if os.path.isdir(name) else name)

    def describe(num_rows: int, voices: set, manifest: str | None) -> dict:
        return {
            "source": Path(manifest).name if manifest else "tiny world",
            "rows": num_rows,
            "voices": len(voices - {None, ""}) or None,
        }

    data, eval_voices = trainer.train_dataset, {row.get("voice") for row in eval_rows}
    made_from = {part: public_name(getattr(model_options, part)) for part in ("text_model", "speech_model")}
    if model_options.start_from is not None:
        made_from = {part: stages_before[-1][part] if stages_before else None for part in made_from}
    return {
        **made_from,
        "started_from": model_options.start_from and public_name(model_options.start_from),
        "before": stages_before,
        "data": describe(data.num_rows, data.voices, data_options.train_manifest or data_options.train_mixture),
        "evaluation": describe(len(eval_rows), eval_voices, data_options.eval_manifest) if eval_rows else None,
        "steps": trainer.state.global_step,
        "batch_size": trainer.state.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "learning_rate": args.learning_rate,
        "encoder_learning_rate": None if is_frozen else encoder_learning_rate(model_options, args),
        "schedule": args.lr_scheduler_type.value,
        "warmup_steps": args.get_warmup_steps(trainer.state.max_steps),
        "seed": args.seed,
        "device": args.device.type,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def keep_samples(rows: list[dict], folder: Path) -> list[dict]:
    """Copy clips beside the model, as examples to publish it with; their paths are relative to its folder."""
    (folder / "samples").mkdir(exist_ok=True)
    samples = []
    for number, row in enumerate(rows, start=1):
        name = f"samples/{number}{Path(row['audio']).suffix}"
        shutil.copyfile(row["audio"], folder / name)
        samples.append({"audio": name, **{key: row.get(key) for key in ("text", "instruction", "answer")}})
    return samples


def model_card(trainer, results: dict) -> ModelCard:
    """What is pushed as README.md: the card that publish.py makes, without what only it measures."""
    model, samples = trainer.accelerator.unwrap_model(trainer.model), results.get("samples", [])
    return make_card(
        {
            "name": trainer.hub_model_id,
            "parts": describe_parts(model, results.get("training"), {}),
            "thin": model.config.backbones is not None,
            "memory": None,
            "losses": model.config.distillation,
            "results": results,
            "samples": samples,
            "licence": None,
            "languages": None,
            "datasets": None,
        }
    )


def write_results(results: dict, trainer: BlspKdTrainer):
    if trainer.is_world_process_zero():
        Path(trainer.args.output_dir, "results.json").write_text(json.dumps(results, indent=2) + "\n")


def print_results(results: dict):
    text, speech = (results.get(name, {"by_kind": {}}) for name in ("text_accuracy", "speech_accuracy"))
    if "num_scored" in results:
        print(f"\n{'answers correct (exact match)':32} {'text':>8} {'speech':>8} {'ratio':>8}")
    else:
        print("\nNo row of the evaluation has an 'answer', so no answers are scored.")
    lines = {name.replace("_", " "): (text[name], speech[name]) for name in text if name != "by_kind"}
    lines |= {f"  {kind}": (text["by_kind"][kind], speech["by_kind"][kind]) for kind in text["by_kind"]}
    for name, (upper, reached) in lines.items():
        print(f"{name:32} {upper:8.3f} {reached:8.3f} {reached / upper if upper else float('nan'):8.3f}")
    for name in REPORTED:
        if name in results:
            print(f"{name.replace('_', ' '):32} {results[name]:8.4f}")
    print(f"{'training took':32} {results['train_seconds']:8.0f} s, everything {results['total_seconds']:.0f} s")


if __name__ == "__main__":
    main()
