"""Count the items of a batch that each part of the loss is divided by, without rows that other batches repeat.

`BlspKdTrainer` takes its batches from [`CountedBatches`]. Leaves out: which rows are in a batch (`batch_order.py`).
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from accelerate.state import GradientState
from transformers import PreTrainedModel

from ..distillation_step import ItemCounts
from ..row_weights import end_of_turn_ids
from .loss_sums import LossSums, add_to
from .on_policy import OnPolicyOptions, with_own_answers
from .sigterm import SigtermCallback

Batch = dict[str, torch.Tensor]


class CountedBatches:
    """The part of `BlspKdTrainer` that fetches the batches of an optimiser step.

    Its rows count once, the student answers those that are on-policy, and the step's items are counted.
    """

    sums: LossSums
    sigterm: SigtermCallback
    on_policy: OnPolicyOptions | None
    # Of the Trainer, whose types are not known here.
    accelerator: Any
    args: Any
    model: Any
    num_last_rows: Any
    state: Any

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | None]:
        self.sums.begin_step()
        batches = [self._without_repeats(batch, self.num_last_rows) for batch in islice(epoch_iterator, num_batches)]
        if not batches:
            return batches, None
        model = self.accelerator.unwrap_model(self.model)
        if self.on_policy is not None:
            batches = [self._on_policy(model, number, batch) for number, batch in enumerate(batches)]
        counts = count_items(batches, device, ends_that_count(model))
        # All processes must end at the same step, so SIGTERM is exchanged together with the counts, at no cost.
        totals = torch.cat([counts, counts.new_tensor([self.sigterm.received])])
        if self.args.world_size > 1:
            totals = self.accelerator.reduce(totals, reduction="sum")
        self.sigterm.num_received = totals[-1]
        return batches, totals[:-1] if self.args.average_tokens_across_devices else counts

    def _on_policy(self, model, number: int, batch: Batch) -> Batch:
        args = self.args
        place = number * args.world_size + args.process_index
        seed, step, in_step = args.seed, self.state.global_step, args.world_size > 1
        batch, answered = with_own_answers(model, batch, self.on_policy, seed, step, place, in_step)  # type: ignore[arg-type]
        add_to(self.sums.step_parts, {"on_policy_answer_tokens": answered.to(args.device)})
        return batch

    def _without_repeats(self, batch: Batch, num_last_rows: int | None = None) -> Batch:
        state, token_id = self.accelerator.gradient_state, self.model.config.audio_token_id
        return without_repeats(batch, state, self.args.process_index, token_id, num_last_rows)


def count_items(batches: list[Batch], device: torch.device, ends: Sequence[int] = ()) -> torch.Tensor:
    """Return the [`ItemCounts`] of the batches of one optimiser step as a tensor of shape (4,).

    Args:
        ends: ids of the tokens that end an answer, if a loss asks for them.
    """
    counts = torch.zeros(len(ItemCounts._fields), dtype=torch.long, device=device)
    for batch in batches:
        labels = batch["labels"][:, 1:]
        of_batch = ItemCounts(
            response_tokens=(labels != -100).sum(),
            content_tokens=batch["teacher_is_content"].sum(),
            clips=torch.tensor(len(batch["input_features"])),
            ends_of_turn=torch.isin(labels, torch.tensor(ends, dtype=torch.long, device=labels.device)).sum(),
        )
        counts += torch.stack([count.to(device) for count in of_batch])  # type: ignore[union-attr]  # all are given
    return counts


def ends_that_count(model: PreTrainedModel) -> list[int]:
    """Return the ids of the tokens that end an answer, or none if no loss of the model asks for them."""
    is_asked = model.config.distillation["end_of_turn_kl"]
    return end_of_turn_ids(model.generation_config.eos_token_id) if is_asked else []


def without_repeats(
    batch: Batch,
    gradient_state: GradientState,
    process_index: int,
    audio_token_id: int,
    num_last_rows: int | None = None,
) -> Batch:
    """Return the batch that has just been fetched, without the rows that other batches have.

    accelerate fills the last batch of each process with rows from the start of the epoch, so that all have as many
    batches of the same size. These rows would count twice.

    Args:
        num_last_rows: how many rows the last batches of all processes have together without them, 0 if they are full.
            Omitted: as accelerate counts.
    """
    num_rows = len(batch["input_ids"])
    remainder = gradient_state.remainder if num_last_rows is None else num_last_rows
    if not gradient_state.end_of_dataloader or remainder <= 0:
        return batch
    num_own = max(0, remainder - process_index * num_rows)
    return batch if num_own >= num_rows else first_rows(batch, num_own, audio_token_id)


def first_rows(batch: Batch, num_rows: int, audio_token_id: int) -> Batch:
    """Return the first rows of a batch of [`BlspKdDataCollator`], and their clips.

    With `num_rows == 0`, return one text-only row that contributes nothing to the loss, because every process must run
    the model.
    """
    num_kept = max(num_rows, 1)
    num_clips = int((batch["input_ids"][:num_rows] == audio_token_id).sum())
    of_clips = ("input_features", "input_features_mask", "num_speech_tokens", "transcript_bytes")
    kept = {name: values[: num_clips if name in of_clips else num_kept] for name, values in batch.items()}
    if num_rows == 0:
        kept["input_ids"], kept["attention_mask"] = kept["teacher_input_ids"], kept["teacher_attention_mask"]
        kept["labels"] = torch.full_like(kept["input_ids"], -100)
        for name in ("teacher_is_content", "teacher_is_response"):
            kept[name] = torch.zeros_like(kept[name])
    return kept
