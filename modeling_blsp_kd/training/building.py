"""From the options of `examples/train.py` to processor, model, data and trainer.

Everything that options can get wrong fails here, before the first step.
"""

import json
import logging
from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedModel
from transformers.integrations import unset_hf_deepspeed_config

from processing import BlspKdDataCollator, BlspKdProcessor
from processing.chat_templates import read_options
from processing.data_collator import split_prompt
from processing.manifests import read_manifest
from processing.speech_features import with_log_mel_max
from processing.training_rows.clips import check_clips
from processing.training_rows.data_sets import RowsInMemory
from processing.training_rows.loading import evaluation_data, load_rows, training_data
from processing.training_rows.options import DataOptions
from processing.training_rows.responses import add_responses

from ..devices import fast_dtype
from ..distillation_step import NEED_STUDENT, wanted_losses
from ..modeling_blsp_kd import BlspKdForCausalLM
from ..trainer import BlspKdTrainer
from .batch_order import data_seed
from .calibration import calibrate_adapter, calibration_batches
from .command_line import read_backbone_options
from .on_policy import OnPolicyOptions
from .options import TINY_SPEECH_MODEL, Arguments, ModelOptions, encoder_learning_rate

logger = logging.getLogger(__name__)

SPEC_AUGMENT = {"apply_spec_augment": True, "mask_time_prob": 0.05, "mask_time_length": 5, "mask_feature_prob": 0.05}
# For its 25 frames a second: less depth than the defaults, and 6.25 tokens a second from the subsampler.
TINY_ADAPTERS = {"cformer": {"num_pre_layers": 1, "num_post_layers": 2}, "subsampler": {"num_layers": 2}}

# Of speech at full scale, log10 of power; that of Voxtral Realtime.
LOG_MEL_MAX = 1.5


def check_options(model_options: ModelOptions, data_options: DataOptions, args: Arguments) -> None:
    """Refuse options that contradict each other, before any work.

    Raises:
        ValueError: there are such options.
    """
    if model_options.kept_frames and (data_options.speeds or data_options.noise):
        raise ValueError(
            "--kept_frames encodes each clip once, but --speeds and --noise make another clip of it in every epoch. "
            "Leave out the one or the other."
        )
    if model_options.kept_frames and not model_options.freeze_speech_encoder:
        raise ValueError("--kept_frames needs an encoder that stays as it is: add --freeze_speech_encoder true.")
    if model_options.calibrate_adapter and model_options.adapter == "subsampler":
        raise ValueError(
            "--calibrate_adapter starts a cformer at its token count, but a subsampler predicts none. Leave out "
            "--calibrate_adapter, or take --adapter cformer."
        )
    on_policy_options(data_options, args)
    if args.on_policy_share and data_options.kept_teacher:
        raise ValueError(
            "--on_policy_share trains on answers of the student, but --kept_teacher has predictions for given ones "
            "only. Leave out the one or the other."
        )
    started_from = model_options.start_from and Path(model_options.start_from).resolve()
    if started_from and started_from.is_dir() and started_from.is_relative_to(Path(args.output_dir).resolve()):
        raise ValueError(f"--output_dir {args.output_dir} holds the model of --start_from. Give a folder of its own.")
    if data_options.streaming and args.max_steps <= 0:
        raise ValueError("--streaming reads rows without end, so there are no epochs to count. Give --max_steps.")
    if data_options.streaming and args.max_batch_length is not None:
        raise ValueError(
            "--max_batch_length needs the lengths of all rows, which --streaming does not know. Leave out the one or "
            "the other."
        )


def make_trainer(
    model_options: ModelOptions,
    data_options: DataOptions,
    args: Arguments,
    model_class: type[BlspKdForCausalLM] = BlspKdForCausalLM,
) -> tuple[BlspKdTrainer, list[dict], list[dict]]:
    """Build model (of `model_class`), data, and the trainer that trains the one on the other.

    Args:
        data_options: with a manifest or a mixture to train on.

    Returns:
        `tuple`: the trainer, training rows and evaluation rows, all with the LLM's own answers.
    """
    check_options(model_options, data_options, args)
    if data_options.eval_manifest:  # takes seconds; otherwise an error would appear only after the training
        check_clips(read_manifest(data_options.eval_manifest, data_options.allow_outside_paths))
    processor = build_processor(model_options)
    if args.deepspeed_plugin is not None and not args.deepspeed_plugin.zero3_init_flag:
        # TrainingArguments prepares ZeRO-3, which would shard the weights, but the LLM has to answer first.
        unset_hf_deepspeed_config()
    model = build_model(model_options, processor, model_class, args.device)
    if model_options.kept_frames and model.config.streaming is not None:
        raise ValueError(
            "--kept_frames encodes each clip once, but the chunks of a streaming model are drawn anew for each batch. "
            "Leave out --kept_frames."
        )
    warn_of_endless_answers(model, processor)
    train_rows, eval_rows = load_rows(data_options, data_seed(args))
    # As in the paper, the model learns to give the LLM's own answers after speech.
    add_responses(eval_rows, model, processor, data_options.max_response_tokens)
    if reads_responses(model):
        add_responses(train_rows, model, processor, data_options.max_response_tokens)
    elif args.on_policy_share:
        raise ValueError(
            "--on_policy_share has the student answer, but no loss reads its answers. Give response_kl, "
            "end_of_turn_kl or response_ce a weight, or leave out --on_policy_share."
        )
    else:
        for row in train_rows:
            row["response"] = row.get("response") or row["text"]  # the collator needs one, the loss does not
    with args.main_process_first(desc="looking at the clips"):
        train_dataset = training_data(train_rows, data_options, args, processor)
    if isinstance(train_dataset, RowsInMemory) and train_dataset.teacher is not None:
        train_dataset.teacher.check(model, train_dataset.rows)
    collator = BlspKdDataCollator(processor, transcript_bytes=model.config.distillation_options.ctc > 0)
    if model_options.calibrate_adapter and not args.resume_from_checkpoint:
        calibration = calibrate_adapter(model, calibration_batches(train_dataset, collator))
        logger.info("Calibrated the adapter: %s.", calibration)
    trainer = BlspKdTrainer(
        model=model,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=evaluation_data(eval_rows, args.length_column_name) if eval_rows else None,
        data_collator=collator,
        processing_class=processor,
        max_batch_length=args.max_batch_length,
        encoder_learning_rate=encoder_learning_rate(model_options, args),
        non_finite_loss=args.non_finite_loss,
        on_policy=on_policy_options(data_options, args),
    )
    return trainer, train_rows, eval_rows


def reads_responses(model: BlspKdForCausalLM) -> bool:
    """Return whether a loss of training reads the LLM's states, and so the responses; else there is no need for any."""
    wanted = wanted_losses(model.config.distillation, is_training=True, one_to_one=model.adapter.one_to_one)
    return bool(wanted & NEED_STUDENT)


def on_policy_options(data_options: DataOptions, args: Arguments) -> OnPolicyOptions | None:
    """Return how the student answers rows itself, or None if it does not."""
    if not args.on_policy_share:
        return None
    return OnPolicyOptions(args.on_policy_share, args.on_policy_temperature, data_options.max_response_tokens)


def build_processor(options: ModelOptions) -> BlspKdProcessor:
    """Return the processor of the model that options describe."""
    given = read_options(options.chat_template_kwargs)
    if options.transcription_instruction is not None:
        given["transcription_instruction"] = options.transcription_instruction
    log_mel_max = LOG_MEL_MAX if json.loads(options.speech_streaming) else None
    if not options.start_from:
        given["global_log_mel_max"] = log_mel_max
        return BlspKdProcessor.from_backbones(options.speech_model, options.text_model, **given)
    processor = BlspKdProcessor.from_pretrained(options.start_from, **given)
    if log_mel_max is not None:
        processor.feature_extractor = with_log_mel_max(processor.feature_extractor, log_mel_max)
    return processor


def build_model(
    options: ModelOptions,
    processor: BlspKdProcessor,
    model_class: type[BlspKdForCausalLM] = BlspKdForCausalLM,
    device: torch.device | str | None = None,
) -> BlspKdForCausalLM:
    """Return the model (of `model_class`) that options describe, with its frozen weights in the dtype of `device`."""
    dtype = fast_dtype(options.dtype, device)
    training = {
        "freeze_speech_encoder": options.freeze_speech_encoder,
        "speech_padding": options.speech_padding,
        "distillation": json.loads(options.distillation),
    }
    streaming = json.loads(options.speech_streaming)
    if streaming is not None:
        training["streaming"] = streaming
    if options.start_from:
        given = read_backbone_options(options)
        backbones = given.pop("backbones", None)
        config = model_class.config_class.from_pretrained(options.start_from, **training, backbones=backbones)
        if options.plora and not config.plora:
            config.plora = options.plora
        if hasattr(config.speech_config, "apply_spec_augment"):
            config.speech_config.update(SPEC_AUGMENT if options.spec_augment else {"apply_spec_augment": False})
        # As stored, so that weights that are trained further are not rounded to the dtype of the rest.
        model = model_class.from_pretrained(options.start_from, config=config, **given)
        model.upcast_trained().cast_frozen(dtype)
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


def warn_of_endless_answers(model: PreTrainedModel, processor: BlspKdProcessor):
    """Warn if answers are trained to end with a token that generation does not stop at.

    Raises:
        ValueError: a loss counts only tokens at which it stops.
    """
    [ids] = processor.tokenize([split_prompt(processor, None, "yes")[2]], add_special_tokens=False)["input_ids"]
    ends = model.generation_config.eos_token_id
    if ids[-1] not in (ends if isinstance(ends, list) else [ends]):
        if model.config.distillation["end_of_turn_kl"]:
            raise ValueError(
                f"end_of_turn_kl counts the tokens at which generation stops, {ends}, but answers end with {ids[-1]}. "
                "Add it to eos_token_id of the LLM's generation_config.json, or set end_of_turn_kl to 0."
            )
        logger.warning(
            "Answers are trained to end with %r (token %s), but generation of this LLM stops at %s: add it to "
            "eos_token_id of the LLM's generation_config.json, or its answers may go on.",
            processor.tokenizer.convert_ids_to_tokens(ids[-1]),
            ids[-1],
            ends,
        )
