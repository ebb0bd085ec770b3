"""Refuse the TrainingArguments that a distillation cannot support, with reasons, before any work begins.

docs/training_arguments.md lists every argument. Arguments that transformers itself refuses are not checked here.
"""

from typing import Any

from accelerate.utils import DistributedType
from transformers import PreTrainedModel, ProcessorMixin, TrainingArguments
from transformers.debug_utils import DebugOption
from transformers.utils import logging

from ..distillation_step import LOSS_PARTS

logger = logging.get_logger(__name__)

# For all other metrics of an evaluation, lower is better.
GREATER_IS_BETTER = ("token_count_accuracy", "response_agreement")


def check_training_arguments(args: TrainingArguments):
    """Refuse arguments that would not have their documented effect.

    Raises:
        ValueError: there are such arguments; the message names all of them with the reasons.
    """
    liger = "Liger's kernels replace parts of models that it knows by type, and it knows none that hears; the losses "
    liger += "here do without full logits already"
    compiled = "a step reads back how many tokens CIF fires, so that it falls into dozens of pieces, of which each is "
    compiled += "compiled anew for other lengths: minutes per step. Compile the LLM's layers instead, whose input is "
    compiled += "regular: for layer in model.language_model.model.layers: layer.compile(dynamic=True)"
    sliced = "accelerate would cut a batch into rows, but its clips are fewer than its rows where rows have no audio"
    reasons = {
        "label_smoothing_factor": args.label_smoothing_factor != 0
        and "a distillation learns the teacher's probabilities, which are soft already; config.distillation has a "
        "temperature",
        "use_liger_kernel": args.use_liger_kernel and liger,
        "liger_kernel_config": args.liger_kernel_config and liger,
        "torch_compile": args.torch_compile and compiled,
        "torch_compile_backend": args.torch_compile_backend and compiled,
        "torch_compile_mode": args.torch_compile_mode and compiled,
        "label_names": args.label_names not in (None, ["labels"])
        and "batches of BlspKdDataCollator have 'labels', and without them an evaluation would have no loss",
        "enable_jit_checkpoint": args.enable_jit_checkpoint
        and "BlspKdTrainer saves on SIGTERM by itself. Leave enable_jit_checkpoint out",
        "train_sampling_strategy": args.train_sampling_strategy == "batch_rebalance"
        and "'batch_rebalance' hands rows to processes in a way of its own, and uneven last batches would no longer be "
        "counted once; 'group_by_length' also keeps padding low",
        "debug": DebugOption.UNDERFLOW_OVERFLOW in args.debug
        and "its hooks take the absolute value of every output, and speech encoders return boolean masks; "
        "non_finite_loss names the step and the parts of the loss",
        "accelerator_config": (args.accelerator_config.split_batches or args.accelerator_config.dispatch_batches)
        and f"with split_batches or dispatch_batches {sliced}",
        "parallelism_config": _parallel_within_a_row(args.parallelism_config)
        and "tensor, context and sequence parallelism were never tried: speech vectors are placed by position in the "
        "whole prompt; DDP, FSDP2 and ZeRO work",
    }
    problems = [f"{name}={getattr(args, name)!r}: {reason}." for name, reason in reasons.items() if reason]
    if args.n_gpu > 1:
        problems.append(
            f"torch.nn.DataParallel over {args.n_gpu} GPUs is not supported. Start one process per GPU: "
            "`accelerate launch --multi_gpu ...` (or set CUDA_VISIBLE_DEVICES to one GPU)."
        )
    if problems:
        raise ValueError("TrainingArguments that BLSP-KD refuses:\n" + "\n".join(problems))


def check_fsdp(plugin: Any):
    """Refuse what FSDP cannot do for a model with partial LoRA.

    Args:
        plugin ([`~accelerate.FullyShardedDataParallelPlugin`]).

    Raises:
        ValueError: FSDP would checkpoint activations by itself.
    """
    if plugin.activation_checkpointing:
        raise ValueError(
            "fsdp_config's activation_checkpointing does not go with partial LoRA: layers are computed again without "
            "the positions of the speech, so partial LoRA would get no gradient. Switch it off and pass "
            "activation_checkpointing=True (TrainingArguments), with which the model gives them to each layer."
        )


def _parallel_within_a_row(config) -> bool:
    return config is not None and any(getattr(config, f"{kind}_size", 1) > 1 for kind in ("tp", "cp", "sp"))


def best_metric_is_greater(name: str, metrics: set[str], dataset_names: list[str]) -> bool:
    """Return whether a greater value of a metric is better.

    Args:
        name: `metric_for_best_model`, with or without `eval_`.
        metrics: the names that an evaluation reports, without `eval_`.
        dataset_names: the names of the evaluation sets; empty if there is only one.

    Raises:
        ValueError: an evaluation does not report this metric.
    """
    bare = name.removeprefix("eval_")
    known = {f"{dataset}_{metric}": metric for dataset in dataset_names for metric in metrics}
    known = known or {metric: metric for metric in metrics}
    if bare not in known:
        raise ValueError(
            f"metric_for_best_model={name!r} is none of the metrics that an evaluation of this model reports: "
            f"{', '.join(f'eval_{metric}' for metric in sorted(known))}."
        )
    return known[bare] in GREATER_IS_BETTER


def evaluation_metrics(model: PreTrainedModel) -> set[str]:
    """Return the names of the metrics that an evaluation of a model reports, without `eval_`."""
    weights = model.config.distillation
    metrics = {"loss", "response_kl", "response_agreement"} | {name for name in LOSS_PARTS if weights[name]}
    if model.adapter.one_to_one:
        metrics |= {"input_kl", "token_count_accuracy", "token_count_error"}
    return metrics


def check_length_columns(column: str, train_dataset: Any, eval_dataset: Any):
    """Check that data sets have the column of lengths; an evaluation would find only after training that it is missing.

    Raises:
        ValueError: a data set has columns, and this one is not among them.
    """
    several = eval_dataset if isinstance(eval_dataset, dict) else {"eval_dataset": eval_dataset}
    for name, dataset in {"train_dataset": train_dataset, **several}.items():
        columns = getattr(dataset, "column_names", None)
        if columns is not None and hasattr(dataset, "__len__") and column not in columns:
            raise ValueError(
                f"train_sampling_strategy='group_by_length' needs the column {column!r} in "
                f"{name}, for example seconds of audio, but it has {columns}."
            )


def check_parts_of_trainer(trainer: Any):
    """Refuse losses and metrics of logits, which a distillation does not return, and warn without a processor.

    Raises:
        ValueError: the trainer was given such a function.
    """
    for name in ("compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics"):
        if getattr(trainer, name) is not None:
            raise ValueError(
                f"BlspKdTrainer takes no {name}: the loss comes from the model's forward, and a distillation step "
                "returns no logits. Generate answers and score them afterwards, as examples/evaluate.py does."
            )
    if not isinstance(trainer.processing_class, ProcessorMixin):
        logger.warning(
            "Without the processor as processing_class, checkpoints hold neither it nor the code of the pipelines "
            "that their config names. Pass processing_class=processor, or save the processor beside the model: "
            "processor.save_pretrained(folder)."
        )


def check_non_finite_loss(policy: str, distributed_type: DistributedType):
    """Refuse a policy for losses that are not finite which cannot be kept.

    Raises:
        ValueError: it is unknown, or DeepSpeed cannot skip a step.
    """
    if policy not in ("stop", "skip"):
        raise ValueError(f"non_finite_loss must be 'stop' or 'skip', got {policy!r}.")
    if policy == "skip" and distributed_type == DistributedType.DEEPSPEED:
        raise ValueError(
            "DeepSpeed takes its optimiser step before the gradient's norm is known, so non_finite_loss='skip' "
            "cannot prevent it. Use 'stop'."
        )


def correct_direction(args: TrainingArguments, model: PreTrainedModel, eval_dataset: Any):
    """Set whether a greater value of the metric for the best model is better, unless the user did.

    TrainingArguments assume so of every name that does not end in "loss", and would keep the model of the worst KL.
    """
    name, given = args.metric_for_best_model, args.greater_is_better
    datasets = list(eval_dataset) if isinstance(eval_dataset, dict) else []
    is_greater = best_metric_is_greater(name, evaluation_metrics(model), datasets)
    if given and not is_greater and not name.endswith("loss"):  # True may be what they assumed
        logger.warning(f"The best model is that of the lowest {name}: greater_is_better is False.")
        args.greater_is_better = False
