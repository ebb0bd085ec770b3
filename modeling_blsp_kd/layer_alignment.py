"""Alignment inside the LLM: a distance between its hidden states after speech and after the text.

At content positions speech and text stand one to one, so states of any layer can be compared; docs/losses.md has the
formulas and sources. Leaves out: which layers and positions (`distillation_step.py`).
"""

from collections.abc import Sequence

import torch
from torch import nn

DISTANCES = ("cosine", "mse")


def layer_alignment(student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor], distance: str) -> torch.Tensor:
    """Return the distance of hidden states, the mean over layers, summed over rows. Identical states give 0.

    Args:
        student, teacher (`torch.FloatTensor` of shape (N, D) each): one per layer. The teacher gets no gradient.
        distance (`str`): `"cosine"`: 1 - cos(student, teacher); `"mse"`: mean over the width of the squared difference.

    Returns:
        `torch.FloatTensor`: float32 scalar. No row gives a 0 that still has a graph.
    """
    return torch.stack([_distances(*pair, distance).sum() for pair in zip(student, teacher)]).mean()


def _distances(student: torch.Tensor, teacher: torch.Tensor, distance: str) -> torch.Tensor:
    student, teacher = student.float(), teacher.detach().float()
    if distance == "cosine":
        return 1 - nn.functional.cosine_similarity(student, teacher, dim=-1)
    return (student - teacher).square().mean(-1)
