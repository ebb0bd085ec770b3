"""Handle an optimiser step whose loss or gradient is NaN or infinite: raise an error, or skip the step."""

from typing import Any

import torch
from transformers.utils import logging

from .loss_sums import LossSums

logger = logging.get_logger(__name__)

# So many skipped steps in a row are not an accident.
MAX_SKIPPED_IN_A_ROW = 10


def stop_or_skip(
    what: str, means: dict[str, float], policy: str, scaler: Any, sums: LossSums, model: torch.nn.Module
) -> None:
    """Leave out the step whose gradients have just been computed.

    Args:
        what: names the step and the gradient's norm.
        means: of the parts of its loss, over all processes.
        policy: "stop" or "skip".
        scaler: of fp16, or None. It finds its scale by overflowing, so it skips steps in any case, by itself.
        sums, model: of the training.

    Raises:
        FloatingPointError: the policy is to stop, or too many steps in a row were skipped.
    """
    problem = f"{what} Its loss: {', '.join(f'{name} {mean:.4g}' for name, mean in means.items())}."
    if policy == "stop" and scaler is None:
        raise FloatingPointError(
            f"{problem} Weights and checkpoints are those of the step before. Look at the data of this step, or "
            "lower the learning rate, or pass non_finite_loss='skip'."
        )
    sums.skip_step()
    if sums.num_skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
        raise FloatingPointError(f"{problem} It is number {MAX_SKIPPED_IN_A_ROW} in a row to be skipped.")
    logger.warning(f"{problem} Skipped ({sums.num_skipped} so far).")
    if scaler is None:
        model.zero_grad()  # an optimiser leaves parameters without gradients as they are; a scaler steps for itself
