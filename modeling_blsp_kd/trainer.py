"""`BlspKdTrainer`: transformers' Trainer that counts and logs every part of the distillation loss.

The loss itself comes from `BlspKdForCausalLM.forward`. It adds to the Trainer what keeps faults from passing silently.
Leaves out: data (see `processing/data_collator.py`) and scoring of generated answers (see `examples/`).
"""

import json
import math
import os
import shutil
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, broadcast_object_list
from huggingface_hub import ModelCard
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, ProcessorMixin, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging

from .distillation_step import ItemCounts
from .training.atomic_checkpoints import ASIDE, choose_checkpoint, move_into_place, remove_old
from .training.batch_order import ExactOrder
from .training.card import card_of_training
from .training.output_head import check_output_head
from .training.parameter_groups import OPTIMIZERS_WITH_OWN_GROUPS, optimizer_with_groups
from .training.sigterm import TerminationNotice
from .training.supported_arguments import (
    best_metric_is_greater,
    check_fsdp,
    check_training_arguments,
    evaluation_metrics,
)

logger = logging.get_logger(__name__)

# Skipping that many steps in a row is no accident any more.
MAX_SKIPPED_IN_A_ROW = 10


class BlspKdTrainer(ExactOrder):
    """Trains a [`BlspKdForCausalLM`] on batches of [`BlspKdDataCollator`].

    Training and evaluation log the same parts under the same names (with the prefix `eval_` in evaluation):
    `response_kl`, `input_kl`, `quantity` and whatever else the loss weighs, each the mean over its tokens or clips
    since the last log, over all processes; `token_count_accuracy` and `token_count_error` compare predicted with true
    token counts. Evaluation always reports the KLs: they measure how well speech and text are aligned.

    Takes the arguments of `Trainer`; `processing_class` should be the processor, so that every checkpoint holds it and
    the code of the pipelines; there is a warning if it is none.
    docs/training_arguments.md tells what becomes of each field of `TrainingArguments`. Two are set here: columns of
    rows are never removed (`remove_unused_columns`), since the collator knows which it reads, and a step whose loss is
    not finite is never hidden (`logging_nan_inf_filter`).

    Rows are neither lost nor doubled by a resume or by several processes ([`ExactOrder`]).

    A checkpoint is there only when it is complete (`training/atomic_checkpoints.py`), and is verified before it is
    resumed from. It holds the sums since the last log too, so that the logged means of a resumed run are those of an
    uninterrupted one. On SIGTERM the step (with several processes: the next one at the latest) and its evaluation are
    finished, a checkpoint is saved, and `train` raises `SystemExit(143)`.

    Args:
        non_finite_loss (`str`): what becomes of a step whose loss or gradient is NaN or infinite. "stop": an error that
            names the step and the parts of the loss. "skip": no optimiser step, a warning, and an error after ten in a
            row; means are over the other steps, and `non_finite_steps` counts. With fp16, whose scaler finds its scale
            by overflowing, steps are skipped in any case.
        make_card (callable, *optional*): returns the [`ModelCard`] that `push_to_hub` uploads; omitted, one of what
            the Trainer knows (`training/card.py`).

        encoder_learning_rate (`float`, *optional*): of the speech encoder; omitted, that of `args`.

    Raises:
        ValueError: an argument cannot do what it says; the message has the reason.
    """

    # Of the Trainer, whose types are not known here:
    _tr_loss: torch.Tensor
    _globalstep_last_logged: int
    optimizer_cls_and_kwargs: tuple[type, dict] | None

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        args: TrainingArguments | None = None,
        *rest,
        non_finite_loss: str = "stop",
        make_card: Callable[[], ModelCard] | None = None,
        encoder_learning_rate: float | None = None,
        **kwargs,
    ):
        if args is not None:
            check_training_arguments(args)
        super().__init__(model, args, *rest, **kwargs)
        for name in ("compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"BlspKdTrainer takes no {name}: the loss comes from the model's forward, and a distillation step "
                    "returns no logits. Generate answers and score them afterwards, as examples/evaluate.py does."
                )
        if non_finite_loss not in ("stop", "skip"):
            raise ValueError(f"non_finite_loss must be 'stop' or 'skip', got {non_finite_loss!r}.")
        if non_finite_loss == "skip" and self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            raise ValueError(
                "DeepSpeed takes its optimiser step before the gradient's norm is known, so non_finite_loss='skip' "
                "cannot prevent it. Use 'stop'."
            )
        if not isinstance(self.processing_class, ProcessorMixin):
            logger.warning(
                "Without the processor as processing_class, checkpoints hold neither it nor the code of the pipelines "
                "that their config names. Pass processing_class=processor, or save the processor beside the model: "
                "processor.save_pretrained(folder)."
            )
        if encoder_learning_rate is not None and not (self.optimizer is self.optimizer_cls_and_kwargs is None):
            raise ValueError(
                "encoder_learning_rate groups the parameters of the optimiser of TrainingArguments, and optimizers or "
                "optimizer_cls_and_kwargs bring their own groups. Pass the one or the other."
            )
        if encoder_learning_rate is not None and self.args.optim in OPTIMIZERS_WITH_OWN_GROUPS:
            raise ValueError(
                f"optim={self.args.optim.value!r} takes its own groups of parameters, so encoder_learning_rate cannot "
                "group them by learning rate. Use another optimiser, or leave encoder_learning_rate out."
            )
        self.encoder_learning_rate = encoder_learning_rate
        self.args.remove_unused_columns = self.args.logging_nan_inf_filter = False
        model = self.accelerator.unwrap_model(self.model)
        # FSDP's cpu_ram_efficient_loading gives the weights to one process per node, and to the others later.
        has_no_weights_yet = self.is_fsdp_enabled and model.get_output_embeddings().weight.is_meta
        if not (has_no_weights_yet or is_deepspeed_zero3_enabled()):
            check_output_head(model.language_model)
        if self.is_fsdp_enabled and model.plora is not None:
            check_fsdp(self.accelerator.state.fsdp_plugin)
        # forward divides each part by its own count over the whole optimiser step.
        self.model_accepts_loss_kwargs = True
        self._loss_parts: dict[str, dict[str, torch.Tensor]] = {"train": {}, "eval": {}}
        self._step_parts: dict[str, torch.Tensor] = {}
        self.non_finite_loss, self.make_card = non_finite_loss, make_card
        self._non_finite_steps = self._skipped_in_a_row = 0
        if self.args.metric_for_best_model is not None and self.args.eval_strategy != "no":
            self._choose_direction(model)
        self._is_writing_aside = False
        self._notice = TerminationNotice()
        self._notices: torch.Tensor = None  # how many processes had a notice when the step began
        self._is_terminating = False

    def _check_lengths(self):
        """Look for the column of lengths, of which an evaluation would else find only after training that it lacks."""
        several = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval_dataset": self.eval_dataset}
        for name, dataset in {"train_dataset": self.train_dataset, **several}.items():
            columns = getattr(dataset, "column_names", None)
            if columns is not None and hasattr(dataset, "__len__") and self.args.length_column_name not in columns:
                raise ValueError(
                    f"train_sampling_strategy='group_by_length' needs the column {self.args.length_column_name!r} in "
                    f"{name}, for example seconds of audio, but it has {columns}."
                )

    def _choose_direction(self, model):
        """Set whether a greater value of the metric for the best model is better, unless the user did.

        TrainingArguments assume so of every name that does not end in "loss", and would keep the model of the worst KL.
        """
        name, given = self.args.metric_for_best_model, self.args.greater_is_better
        datasets = list(self.eval_dataset) if isinstance(self.eval_dataset, dict) else []
        is_greater = best_metric_is_greater(name, evaluation_metrics(model), datasets)
        if given and not is_greater and not name.endswith("loss"):  # True may be what they assumed
            logger.warning(f"The best model is that of the lowest {name}: greater_is_better is False.")
            self.args.greater_is_better = False

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs) -> Any:
        """`Trainer.train`, from a checkpoint that has been verified.

        Raises:
            ValueError: there is no good checkpoint to resume from, or rows lack the length that they are grouped by.
            FloatingPointError: see `non_finite_loss`.
            OSError: a checkpoint could not be written. Those before are intact.
            SystemExit: 143, on SIGTERM.
        """
        if self.args.train_sampling_strategy == "group_by_length":
            self._check_lengths()
        if resume_from_checkpoint:
            resume_from_checkpoint = self._choose_checkpoint(resume_from_checkpoint)
        self._is_terminating = False
        with self._notice:
            output = super().train(resume_from_checkpoint, *args, **kwargs)
        if self._is_terminating:
            logger.warning(
                f"SIGTERM: saved step {self.state.global_step} in {self.args.output_dir}. resume_from_checkpoint=True "
                "goes on from there."
            )
            raise SystemExit(128 + signal.SIGTERM)
        if self._notice.came:
            signal.raise_signal(signal.SIGTERM)  # after the last step: no longer ours
        return output

    def create_optimizer(self, model: PreTrainedModel | None = None) -> torch.optim.Optimizer:
        if self.encoder_learning_rate is not None and self.optimizer is None:
            grouped = self.model if model is None else model
            self.optimizer_cls_and_kwargs = optimizer_with_groups(grouped, self.args, self.encoder_learning_rate)
        return super().create_optimizer(model)

    def get_train_dataloader(self) -> DataLoader:
        # Sums of an attempt that ran out of memory (`auto_find_batch_size`) are of steps that are taken anew.
        self._loss_parts["train"], self._step_parts = {}, {}
        self._non_finite_steps = self._skipped_in_a_row = 0
        loader = super().get_train_dataloader()
        if self.args.dataloader_persistent_workers:
            # They draw their seed when they start, in the first epoch of an uninterrupted run and another one of a
            # resumed run: so here instead, before the generator that dropout goes on with is restored.
            seed = torch.empty((), dtype=torch.int64).random_().item()
            loader.base_dataloader.generator = torch.Generator().manual_seed(seed)
        return self._notice.spare_workers(loader)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        # With persistent workers the Trainer keeps the first loader: later evaluations would get its rows, whatever
        # they ask for, and in another order each time, which a resume forgets.
        persistent_workers, self.args.dataloader_persistent_workers = self.args.dataloader_persistent_workers, False
        try:
            loader = super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_persistent_workers = persistent_workers
        return self._notice.spare_workers(loader)

    def _prepare_for_training(self, *args, **kwargs):
        prepared = super()._prepare_for_training(*args, **kwargs)
        if is_deepspeed_zero3_enabled():  # whose shares of weights could not be run before
            check_output_head(self.accelerator.unwrap_model(self.model).language_model)
        return prepared

    def _choose_checkpoint(self, resume_from) -> str:
        """The main process verifies, so that a checkpoint is read once, and all resume from or fail at the same."""
        chosen: list[Any] = [None, None]
        if self.is_world_process_zero():
            try:
                chosen[0] = choose_checkpoint(resume_from, self.args.output_dir)
            except ValueError as error:
                chosen[1] = str(error)
        broadcast_object_list(chosen)
        if chosen[1]:
            raise ValueError(chosen[1])
        return chosen[0]

    def get_batch_samples(self, epoch_iterator: Iterable, *args, **kwargs) -> Any:
        self._loss_before_step = self._tr_loss.clone()
        return super().get_batch_samples(map(self._without_repeats, epoch_iterator), *args, **kwargs)

    def _without_repeats(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The batch that has just been fetched, without the rows that other batches have.

        accelerate fills the last batch of each process with rows from the start of the epoch, so that all have as many
        batches of the same size. These rows would count twice.
        """
        state, num_rows = self.accelerator.gradient_state, len(batch["input_ids"])
        if not state.end_of_dataloader or state.remainder <= 0:
            return batch
        num_own = max(0, state.remainder - self.args.process_index * num_rows)
        return batch if num_own >= num_rows else _first_rows(batch, num_own, self.model.config.audio_token_id)

    def _get_num_items_in_batch(self, batch_samples, device):
        """Return the [`ItemCounts`] of one optimiser step as a tensor of shape (3,)."""
        if not batch_samples:
            return None
        counts = torch.zeros(len(ItemCounts._fields), dtype=torch.long, device=device)
        for batch in batch_samples:
            of_batch = ItemCounts(
                response_tokens=(batch["labels"][:, 1:] != -100).sum(),
                content_tokens=batch["teacher_is_content"].sum(),
                clips=torch.tensor(len(batch["input_features"])),
            )
            counts += torch.stack([count.to(device) for count in of_batch])
        # Notices of SIGTERM travel with the counts, at no cost: all processes must end at the same step.
        totals = torch.cat([counts, counts.new_tensor([self._notice.came])])
        if self.args.world_size > 1:
            totals = self.accelerator.reduce(totals, reduction="sum")
        *_, self._notices = totals
        return totals[:-1] if self.args.average_tokens_across_devices else counts

    def compute_loss(
        self,
        model: PreTrainedModel,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        _add_to(self._step_parts if model.training else self._loss_parts["eval"], outputs["loss_parts"])
        if model.training:
            # Times 1, unless the loss is not finite: then its gradient is NaN, and so is the norm in all processes,
            # which need no further exchange to agree on it.
            loss = loss * (0 * loss.detach() + 1)
        return (loss, outputs) if return_outputs else loss

    def _get_grad_norm(self, model, grad_norm=None):
        grad_norm = super()._get_grad_norm(model, grad_norm)
        # The one time per optimiser step that the device is waited for. The Trainer's filter does it per batch.
        grad_norm = grad_norm.item() if isinstance(grad_norm, torch.Tensor) else grad_norm
        step_parts, self._step_parts = self._step_parts, {}
        if grad_norm is None or math.isfinite(grad_norm):
            _add_to(self._loss_parts["train"], step_parts)
            self._skipped_in_a_row = 0
            return grad_norm
        parts = ", ".join(f"{name} {mean:.4g}" for name, mean in self._means(step_parts).items())
        problem = f"Step {self.state.global_step + 1}: the gradient's norm is {grad_norm}. Its loss: {parts}."
        scaler = getattr(self.accelerator, "scaler", None)
        if self.non_finite_loss == "stop" and scaler is None:
            raise FloatingPointError(
                f"{problem} Weights and checkpoints are those of the step before. Look at the data of this step, or "
                "lower the learning rate, or pass non_finite_loss='skip'."
            )
        self._non_finite_steps += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
            raise FloatingPointError(f"{problem} It is number {MAX_SKIPPED_IN_A_ROW} in a row to be skipped.")
        logger.warning(f"{problem} Skipped ({self._non_finite_steps} so far).")
        if scaler is None:
            model.zero_grad()  # an optimiser leaves parameters without gradients as they are; a scaler steps for itself
        self._tr_loss = self._loss_before_step
        self._globalstep_last_logged += 1  # the logged loss is the mean over the other steps
        return None

    def _collected_means(self, stage: str) -> dict[str, float]:
        """Means of all parts since the last call, over all processes."""
        collected, self._loss_parts[stage] = self._loss_parts[stage], {}
        return self._means(collected)

    def _means(self, collected: dict[str, torch.Tensor]) -> dict[str, float]:
        if not collected:
            return {}
        totals = self.accelerator.reduce(torch.stack(list(collected.values())), reduction="sum").tolist()
        return {name: total / max(count, 1) for name, (total, count) in zip(collected, totals)}

    def log(self, logs: dict[str, float], start_time: float | None = None):
        if "loss" in logs:
            logs = {**logs, **self._collected_means("train")}
            if self._non_finite_steps:
                logs["non_finite_steps"] = self._non_finite_steps
        super().log(logs, start_time)

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        if self._is_terminating and not float(self.state.epoch).is_integer():
            return  # called at the end of an epoch, which is not over
        notices = self._notice.came if self.args.world_size == 1 else self._notices.item()
        if notices:
            self._is_terminating = True
            self.control.should_save = self.control.should_training_stop = True
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _get_output_dir(self, trial):
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, ASIDE) if self._is_writing_aside else folder

    def _push_from_checkpoint(self, checkpoint_folder):
        if self._is_writing_aside:
            return
        if self.is_world_process_zero() and self.args.hub_strategy != HubStrategy.END:
            # The Trainer takes weights and configs along, but without its code nobody can load them.
            for file in Path(checkpoint_folder).glob("*.py"):
                shutil.copy(file, self.args.output_dir)
            self.create_model_card()
        super()._push_from_checkpoint(checkpoint_folder)

    def create_model_card(self, *args, **kwargs):
        """Write the card of the model to `output_dir`; what `Trainer.create_model_card` takes has no say in it."""
        if self.is_world_process_zero():
            card = self.make_card() if self.make_card else card_of_training(self)
            card.save(Path(self.args.output_dir, "README.md"))

    def _save_checkpoint(self, model, trial):
        folder = Path(self._get_output_dir(trial))
        aside, final = folder / ASIDE, folder / f"checkpoint-{self.state.global_step}"
        written = aside / final.name
        if self.args.should_save:
            shutil.rmtree(aside, ignore_errors=True)  # of a run that was killed while writing
        self.accelerator.wait_for_everyone()
        self._is_writing_aside = True
        try:
            super()._save_checkpoint(model, trial)
            if self.state.best_model_checkpoint == str(written):
                self.state.best_model_checkpoint = str(final)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self.state.save_to_json(str(written / "trainer_state.json"))
                move_into_place(written, final)
                # Only now, when the new one is complete.
                keep = {str(final), str(self.state.best_model_checkpoint)}
                remove_old(folder, aside, self.args.save_total_limit, keep)
        except Exception as error:
            shutil.rmtree(aside, ignore_errors=True)
            free = shutil.disk_usage(folder).free / 2**20
            raise OSError(
                f"{final} could not be written: {error} ({free:.0f} MiB are free there). Earlier checkpoints are "
                "intact. Make room, then go on with resume_from_checkpoint=True."
            ) from error
        finally:
            self._is_writing_aside = False
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        sums = {
            "loss": self._tr_loss.item(),
            "parts": {name: sum_and_count.tolist() for name, sum_and_count in self._loss_parts["train"].items()},
            "last_logged_step": self._globalstep_last_logged,
            "non_finite_steps": self._non_finite_steps,
            "skipped_in_a_row": self._skipped_in_a_row,
        }
        # As JSON, floats are exact.
        Path(output_dir, f"loss_sums_{self.args.process_index}.json").write_text(json.dumps(sums) + "\n")

    def _load_rng_state(self, checkpoint):
        super()._load_rng_state(checkpoint)
        file = Path(checkpoint, f"loss_sums_{self.args.process_index}.json")
        if not file.exists():
            logger.warning(f"{file} does not exist: the first means that are logged leave out the steps before.")
            return
        sums, device = json.loads(file.read_text()), self.args.device
        self._tr_loss = torch.tensor(sums["loss"], device=device)
        self._loss_before_step = self._tr_loss.clone()
        self._total_loss_scalar = -sums["loss"]  # `train_loss` is the mean of this call's steps
        self._loss_parts["train"] = {name: torch.tensor(part, device=device) for name, part in sums["parts"].items()}
        self._globalstep_last_logged = sums["last_logged_step"]
        self._non_finite_steps, self._skipped_in_a_row = sums["non_finite_steps"], sums["skipped_in_a_row"]

    def prediction_step(
        self,
        model: PreTrainedModel,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> Any:
        # A distillation step returns no logits; generated answers are scored elsewhere.
        inputs = self._without_repeats(inputs)
        return super().prediction_step(model, inputs, prediction_loss_only=True, ignore_keys=ignore_keys)

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs) -> Any:
        self._loss_parts["eval"] = {}
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        means = self._collected_means("eval")
        output.metrics.update({f"{metric_key_prefix}_{name}": mean for name, mean in means.items()})
        weights = self.accelerator.unwrap_model(self.model).config.distillation
        # The Trainer averages batch means; the parts are exact means over the data set, so the loss should be too.
        output.metrics[f"{metric_key_prefix}_loss"] = sum(weights.get(name, 0) * mean for name, mean in means.items())
        return output


def _first_rows(batch: dict[str, torch.Tensor], num_rows: int, audio_token_id: int) -> dict[str, torch.Tensor]:
    """The first rows of a batch of [`BlspKdDataCollator`], and their clips.

    Of none is left what counts nothing, a row of text without a response: every process has to run the model.
    """
    num_kept = max(num_rows, 1)
    num_clips = int((batch["input_ids"][:num_rows] == audio_token_id).sum())
    of_clips = ("input_features", "input_features_mask", "num_speech_tokens")
    kept = {name: values[: num_clips if name in of_clips else num_kept] for name, values in batch.items()}
    if num_rows == 0:
        kept["input_ids"], kept["attention_mask"] = kept["teacher_input_ids"], kept["teacher_attention_mask"]
        kept["labels"] = torch.full_like(kept["input_ids"], -100)
        for name in ("teacher_is_content", "teacher_is_response"):
            kept[name] = torch.zeros_like(kept[name])
    return kept


def _add_to(collected: dict[str, torch.Tensor], parts: dict[str, torch.Tensor]):
    for name, sum_and_count in parts.items():
        collected[name] = collected.get(name, 0) + sum_and_count
