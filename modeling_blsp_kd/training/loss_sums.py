"""The sums behind the means that a training logs: the loss, its parts, and the steps that were left out.

They belong to one process, and are kept in each checkpoint, so that the means of a resumed run are those of an
uninterrupted one.
"""

import json
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers.utils import logging

logger = logging.get_logger(__name__)

Parts = dict[str, torch.Tensor]  # name -> (sum, count)


class LossSums:
    """Sums since the last log.

    Args:
        device (`torch.device`): where the loss is computed.
        step (`int`): the optimiser step at which training begins or goes on.

    Attributes:
        loss (`torch.Tensor`): sum of the losses of the steps since the last log, scalar.
        parts (`dict`): name -> sum and count of each part of the loss over these steps.
        step_parts (`dict`): the same of the step that is not yet finished.
        last_logged_step (`int`): later by one for each step that was skipped since, so that means leave it out.
        num_skipped, num_skipped_in_a_row (`int`): steps with a loss or gradient that was not finite.
    """

    def __init__(self, device: torch.device, step: int = 0):
        self.loss = torch.tensor(0.0, device=device)
        self.parts: Parts = {}
        self.step_parts: Parts = {}
        self.first_step = self.last_logged_step = step
        self.num_skipped = self.num_skipped_in_a_row = 0
        self._logged_loss = 0.0  # of this call of `train`
        self._loss_before_step = self.loss.clone()

    def begin_step(self):
        self._loss_before_step = self.loss.clone()

    def finish_step(self):
        """Count the step in the means."""
        add_to(self.parts, self.step_parts)
        self.step_parts, self.num_skipped_in_a_row = {}, 0

    def skip_step(self):
        """Leave the step out of the means."""
        self.loss, self.step_parts = self._loss_before_step, {}
        self.last_logged_step += 1
        self.num_skipped += 1
        self.num_skipped_in_a_row += 1

    def log(self, step: int, loss: float) -> float:
        """Begin new sums, and return the mean loss of the steps since the last log.

        Args:
            step: the current one.
            loss: `self.loss`, averaged over all processes.
        """
        mean = loss / (step - self.last_logged_step)
        self._logged_loss += loss
        self.loss = torch.zeros_like(self.loss)
        self.last_logged_step = step
        return mean

    def mean_of_call(self, step: int) -> float:
        """Return the mean loss of the steps of this call of `train`, up to the current one."""
        return (self._logged_loss + self.loss.item()) / max(step - self.first_step, 0.001)

    def save(self, checkpoint: str | Path, process_index: int):
        """Write the sums of this process into a checkpoint, as JSON, in which floats are exact."""
        sums = {
            "loss": self.loss.item(),
            "parts": {name: sum_and_count.tolist() for name, sum_and_count in self.parts.items()},
            "last_logged_step": self.last_logged_step,
            "non_finite_steps": self.num_skipped,
            "skipped_in_a_row": self.num_skipped_in_a_row,
        }
        _file(checkpoint, process_index).write_text(json.dumps(sums) + "\n")

    def load(self, checkpoint: str | Path, process_index: int):
        """Go on with the sums of a checkpoint; warn if it has none."""
        file = _file(checkpoint, process_index)
        if not file.exists():
            logger.warning(f"{file} does not exist: the first means that are logged leave out the steps before.")
            return
        sums, device = json.loads(file.read_text()), self.loss.device
        self.loss = torch.tensor(sums["loss"], device=device)
        self._logged_loss = -sums["loss"]  # of steps before this call
        self.parts = {name: torch.tensor(part, device=device) for name, part in sums["parts"].items()}
        self.last_logged_step = sums["last_logged_step"]
        self.num_skipped, self.num_skipped_in_a_row = sums["non_finite_steps"], sums["skipped_in_a_row"]
        self.begin_step()


def add_to(collected: Parts, parts: Parts):
    """Add sums and counts of one batch or step to those collected before, in place."""
    for name, sum_and_count in parts.items():
        collected[name] = collected.get(name, 0) + sum_and_count


def means_of(collected: Parts, accelerator: Accelerator) -> dict[str, float]:
    """Return the mean of each part over all processes."""
    if not collected:
        return {}
    totals = accelerator.reduce(torch.stack(list(collected.values())), reduction="sum").tolist()
    return {name: total / max(count, 1) for name, (total, count) in zip(collected, totals)}


def _file(checkpoint: str | Path, process_index: int) -> Path:
    return Path(checkpoint, f"loss_sums_{process_index}.json")
