"""`BlspKdTrainer`: transformers' Trainer that counts and logs every part of the distillation loss.

The loss itself comes from `BlspKdForCausalLM.forward`; `training/` holds the parts of this class, one per file.
Leaves out: data (`processing/data_collator.py`) and scoring of generated answers (`processing/evaluation/`).
"""

import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from .training.batch_counts import CountedBatches
from .training.batch_order import ExactOrder
from .training.loss_sums import LossSums, Parts, add_to, means_of
from .training.non_finite_steps import stop_or_skip
from .training.on_policy import OnPolicyOptions
from .training.output_head import check_output_head
from .training.parameter_groups import check_groups, optimizer_with_groups
from .training.process_group import end_with_interpreter
from .training.saving import AtomicSaving
from .training.sigterm import SigtermCallback
from .training.supported_arguments import (
    check_fsdp,
    check_length_columns,
    check_non_finite_loss,
    check_parts_of_trainer,
    check_training_arguments,
    correct_direction,
)

logger = logging.get_logger(__name__)


class BlspKdTrainer(AtomicSaving, CountedBatches, ExactOrder):
    """Trains a [`BlspKdForCausalLM`] on batches of [`BlspKdDataCollator`].

    Training and evaluation log the same parts under the same names (with the prefix `eval_` in evaluation):
    `response_kl`, `input_kl`, `quantity` and whatever else the loss weighs, each the mean over its tokens or clips
    since the last log, over all processes; `token_count_accuracy` and `token_count_error` compare predicted with true
    token counts. Evaluation always reports the KLs and `response_agreement`: they measure how well speech and text are
    aligned.

    Takes the arguments of `Trainer`; `processing_class` should be the processor, so that every checkpoint holds it and
    the code of the pipelines; there is a warning if it is none. docs/training_arguments.md lists the effect of each
    field of `TrainingArguments`. Two are set here: columns of rows are never removed (`remove_unused_columns`), since
    the collator knows which it reads, and a step whose loss is not finite is never hidden (`logging_nan_inf_filter`).

    Rows are neither lost nor doubled by a resume or by several processes ([`ExactOrder`]). A checkpoint is there only
    when it is complete, and is verified before it is resumed from (`training/atomic_checkpoints.py`). It holds the sums
    since the last log, too, so that the logged means of a resumed run are those of an uninterrupted one. On SIGTERM the
    step (with several processes: the next one at the latest) and its evaluation are finished, a checkpoint is saved,
    and `train` raises `SystemExit(143)`. The process group ends with the interpreter (`training/process_group.py`).

    Args:
        non_finite_loss (`str`): what becomes of a step whose loss or gradient is NaN or infinite. "stop": an error that
            names the step and the parts of the loss. "skip": no optimiser step, a warning, and an error after ten in a
            row; means are over the other steps, and `non_finite_steps` counts. With fp16, whose scaler finds its scale
            by overflowing, steps are skipped in any case.
        make_card (callable, *optional*): returns the card that `push_to_hub` uploads; omitted, `training/card.py` does.
        encoder_learning_rate (`float`, *optional*): of the speech encoder; omitted, that of `args`.
        on_policy ([`OnPolicyOptions`], *optional*): let the student answer a share of the training rows itself.

    Raises:
        ValueError: an argument cannot do what it says; the message has the reason.
    """

    optimizer_cls_and_kwargs: tuple[type, dict] | None  # of the Trainer, whose types are not known here

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        args: TrainingArguments | None = None,
        *rest,
        non_finite_loss: str = "stop",
        make_card: Callable[[], ModelCard] | None = None,
        encoder_learning_rate: float | None = None,
        on_policy: OnPolicyOptions | None = None,
        **kwargs,
    ):
        if args is not None:
            check_training_arguments(args)
        super().__init__(model, args, *rest, **kwargs)
        end_with_interpreter()
        check_parts_of_trainer(self)
        check_non_finite_loss(non_finite_loss, self.accelerator.distributed_type)
        check_groups(self, encoder_learning_rate)
        self.args.logging_nan_inf_filter = False
        model = self.accelerator.unwrap_model(self.model)
        # FSDP's cpu_ram_efficient_loading gives the weights to one process per node, and to the others later.
        has_no_weights_yet = self.is_fsdp_enabled and model.get_output_embeddings().weight.is_meta
        if not (has_no_weights_yet or is_deepspeed_zero3_enabled()):
            check_output_head(model.language_model)
        if self.is_fsdp_enabled and model.plora is not None:
            check_fsdp(self.accelerator.state.fsdp_plugin)
        # forward divides each part by its own count over the whole optimiser step.
        self.model_accepts_loss_kwargs = True
        self.non_finite_loss, self.make_card = non_finite_loss, make_card
        self.encoder_learning_rate, self.on_policy = encoder_learning_rate, on_policy
        if self.args.metric_for_best_model is not None and self.args.eval_strategy != "no":
            correct_direction(self.args, model, self.eval_dataset)
        self.sums = LossSums(self.args.device)
        self.evaluation_parts: Parts = {}
        self._checkpoint: str | None = None  # that this call of `train` resumes from
        self.sigterm = SigtermCallback()
        for callback in (self.sigterm, _Begin(self)):
            self.add_callback(callback)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs) -> TrainOutput:
        """`Trainer.train`, from a checkpoint that has been verified.

        Raises:
            ValueError: there is no good checkpoint to resume from, or rows lack the length that they are grouped by.
            FloatingPointError: see `non_finite_loss`.
            OSError: a checkpoint could not be written. Those before are intact.
            SystemExit: 143, on SIGTERM.
        """
        if self.args.train_sampling_strategy == "group_by_length":
            check_length_columns(self.args.length_column_name, self.train_dataset, self.eval_dataset)
        self._checkpoint = self.choose_checkpoint(resume_from_checkpoint) if resume_from_checkpoint else None
        with self.sigterm:
            output = super().train(self._checkpoint, *args, **kwargs)
        if self.sigterm.is_ending:
            saved = f"SIGTERM: saved step {self.state.global_step} in {self.args.output_dir}."
            logger.warning(f"{saved} resume_from_checkpoint=True goes on from there.")
            raise SystemExit(128 + signal.SIGTERM)
        if self.sigterm.received:  # after the last step: no longer ours
            signal.raise_signal(signal.SIGTERM)
        return TrainOutput(output.global_step, output.metrics["train_loss"], output.metrics)

    def create_optimizer(self, model: PreTrainedModel | None = None) -> torch.optim.Optimizer:
        if self.encoder_learning_rate is not None and self.optimizer is None:
            grouped = self.model if model is None else model
            self.optimizer_cls_and_kwargs = optimizer_with_groups(grouped, self.args, self.encoder_learning_rate)
        return super().create_optimizer(model)

    def get_train_dataloader(self) -> DataLoader:
        loader = super().get_train_dataloader()
        if self.args.dataloader_persistent_workers:
            # Workers draw their seed from the global generator when they start. A resumed run starts them in another
            # epoch, so the seed is drawn here, before the state of that generator, which dropout uses, is restored.
            seed = torch.empty((), dtype=torch.int64).random_().item()
            loader.base_dataloader.generator = torch.Generator().manual_seed(seed)
        return self.sigterm.protect_workers(loader)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        # With persistent workers the Trainer would use its first loader for all later evaluations: its rows instead of
        # theirs, in an order that differs each time and is lost by a resume.
        persistent_workers, self.args.dataloader_persistent_workers = self.args.dataloader_persistent_workers, False
        try:
            loader = super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_persistent_workers = persistent_workers
        return self.sigterm.protect_workers(loader)

    def compute_loss(self, model: PreTrainedModel, inputs: dict, return_outputs: bool = False, **kwargs) -> Any:
        if not model.training:
            kwargs["num_items_in_batch"] = None  # the Trainer counts labels alone
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        add_to(self.sums.step_parts if model.training else self.evaluation_parts, outputs["loss_parts"])
        if model.training:
            # The factor is 1 if the loss is finite. Otherwise the gradient becomes NaN, and so does its norm in all
            # processes, so they agree without another exchange.
            loss = loss * (0 * loss.detach() + 1)
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.sums.loss += loss
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        # The only wait for the device in an optimiser step. The Trainer's own filter would wait once per batch.
        grad_norm = super()._get_grad_norm(model, grad_norm)
        grad_norm = grad_norm.item() if isinstance(grad_norm, torch.Tensor) else grad_norm
        if grad_norm is None or math.isfinite(grad_norm):
            self.sums.finish_step()
            return grad_norm
        what = f"Step {self.state.global_step + 1}: the gradient's norm is {grad_norm}."
        means = means_of(self.sums.step_parts, self.accelerator)
        stop_or_skip(what, means, self.non_finite_loss, getattr(self.accelerator, "scaler", None), self.sums, model)
        return None

    def log(self, logs: dict[str, float], start_time: float | None = None):
        if "loss" in logs:
            if self.sums.last_logged_step == self.state.global_step:
                return  # all steps since the last log were skipped
            loss = self.accelerator.gather(self.sums.loss.reshape(1)).mean().item()
            # The Trainer's own mean counts steps that were skipped, and not those before a resume.
            logs = {**logs, "loss": self.sums.log(self.state.global_step, loss)}
            logs |= means_of(self.sums.parts, self.accelerator)
            logs |= {"non_finite_steps": self.sums.num_skipped} if self.sums.num_skipped else {}
            self.sums.parts = {}
        if "train_loss" in logs:  # changed in place, as `train` returns these
            logs["train_loss"] = self.sums.mean_of_call(self.state.global_step)
        super().log(logs, start_time)

    def save_own_state(self, checkpoint: Path):
        if not self.args.save_only_model:
            self.sums.save(checkpoint, self.args.process_index)

    def prediction_step(self, model: PreTrainedModel, inputs: dict, prediction_loss_only: bool, **kwargs) -> Any:
        # A distillation step returns no logits; generated answers are scored elsewhere.
        return super().prediction_step(model, self._without_repeats(inputs), prediction_loss_only=True, **kwargs)

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs) -> Any:
        self.evaluation_parts = {}
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        means = means_of(self.evaluation_parts, self.accelerator)
        output.metrics.update({f"{metric_key_prefix}_{name}": mean for name, mean in means.items()})
        weights = self.accelerator.unwrap_model(self.model).config.distillation
        # The Trainer averages batch means; the parts are exact means over the data set, so the loss should be too.
        output.metrics[f"{metric_key_prefix}_loss"] = sum(weights.get(name, 0) * mean for name, mean in means.items())
        return output


class _Begin(TrainerCallback):
    """Does what needs the optimiser and the first step of this run: restore the sums, check the head under ZeRO-3."""

    def __init__(self, trainer: BlspKdTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        trainer = self.trainer
        # Also after an attempt that ran out of memory (`auto_find_batch_size`), whose steps are taken anew.
        trainer.sums = LossSums(args.device, state.global_step)
        if trainer._checkpoint is not None:
            trainer.sums.load(trainer._checkpoint, args.process_index)
        if is_deepspeed_zero3_enabled():  # its sharded weights could not be used before this point
            check_output_head(trainer.accelerator.unwrap_model(trainer.model).language_model)
