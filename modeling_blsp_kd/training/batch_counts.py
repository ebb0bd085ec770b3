"""Count the items of a batch that each part of the loss is divided by, without rows that other batches repeat."""

import torch
from accelerate.state import GradientState

from ..distillation_step import ItemCounts

Batch = dict[str, torch.Tensor]


def count_items(batches: list[Batch], device: torch.device) -> torch.Tensor:
    """Return the [`ItemCounts`] of the batches of one optimiser step as a tensor of shape (3,)."""
    counts = torch.zeros(len(ItemCounts._fields), dtype=torch.long, device=device)
    for batch in batches:
        of_batch = ItemCounts(
            response_tokens=(batch["labels"][:, 1:] != -100).sum(),
            content_tokens=batch["teacher_is_content"].sum(),
            clips=torch.tensor(len(batch["input_features"])),
        )
        counts += torch.stack([count.to(device) for count in of_batch])
    return counts


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
