"""What the teacher predicts, as rows bring it from disk, in the layout of a batch.

Leaves out: how it is made and found (`training_rows/kept_teacher.py`), and how a loss reads it.

Shapes: B rows, L' length of the longest text prompt, K kept tokens, P compared positions of a row.
"""

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class KeptDistributions:
    """Holds what the teacher predicts at the P compared positions of one row, in their order.

    Args:
        input_ids (length,): the text prompt that it read.
        top_ids (P, K): the most likely tokens.
        top_log_probs (P, K + 1): their log-probabilities, and that of all others together.
    """

    input_ids: np.ndarray
    top_ids: np.ndarray
    top_log_probs: np.ndarray


def compared_positions(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return where teacher and student are compared, (B, L') bool: at the transcript, and one before response tokens.

    Args:
        batch (`dict`): with `teacher_is_content` and `teacher_is_response`.
    """
    return batch["teacher_is_content"] | torch.nn.functional.pad(batch["teacher_is_response"][:, 1:], (0, 1))


def lay_out(kept: list[KeptDistributions | None], batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return `teacher_top_ids` (B, L', K) and `teacher_top_log_probs` (B, L', K + 1), or nothing if no row has any.

    Raises:
        ValueError: only some rows have any, or they are of other prompts.
    """
    present = [each for each in kept if each is not None]
    if not present:
        return {}
    if len(present) < len(kept):
        raise ValueError(
            f"{len(present)} of {len(kept)} rows of the batch bring what the teacher predicts. All must, or none."
        )
    is_compared = compared_positions(batch)
    prompts = zip(batch["teacher_input_ids"].numpy(), batch["teacher_attention_mask"].numpy().astype(bool))
    for index, (of_row, (ids, mask)) in enumerate(zip(present, prompts)):
        if not np.array_equal(ids[mask], of_row.input_ids) or len(of_row.top_ids) != int(is_compared[index].sum()):
            raise ValueError(
                f"Row {index} of the batch brings what the teacher predicts after other tokens than this processor "
                "makes of it. Keep the teacher anew, with the same tokenizer and chat template."
            )
    laid_out = {}
    for name, values in (
        ("teacher_top_ids", [each.top_ids.astype(np.int64) for each in present]),
        ("teacher_top_log_probs", [each.top_log_probs for each in present]),
    ):
        joined = torch.from_numpy(np.concatenate(values))
        laid_out[name] = joined.new_zeros(*is_compared.shape, joined.shape[1])
        laid_out[name][is_compared] = joined
    return laid_out
