"""The divergences between the teacher's and the student's next-token distributions, each with its gradient.

Forward and reverse KL, and the generalised Jensen-Shannon divergence of GKD (arXiv 2306.13649); docs/losses.md has the
formulas. Leaves out: hidden states, the vocabulary product and its chunks (`distillation.py`).
"""

import torch

DIVERGENCES = ("forward", "reverse", "jsd")
TINY = torch.finfo(torch.float32).tiny


def check_divergence(divergence: str, jsd_beta: float):
    """Raise a ValueError for a divergence that does not exist.

    Args:
        divergence (`str`): one of `DIVERGENCES`.
        jsd_beta (`float`): weight of the teacher in the mixture, in (0, 1).
    """
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence must be one of {DIVERGENCES}, got {divergence!r}.")
    if not 0 < jsd_beta < 1:
        raise ValueError(
            f"jsd_beta must lie between 0 and 1, got {jsd_beta!r}. At its limits the Jensen-Shannon divergence is 0: "
            "take divergence='forward' or 'reverse'."
        )


def compare_(
    student: torch.Tensor, teacher: torch.Tensor, divergence: str, jsd_beta: float, needs_grad: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the divergence of each row, and its gradient over the logits that the student's softmax takes.

    Args:
        student, teacher (`torch.FloatTensor` of shape (N, V)): log-probabilities in float32, which are overwritten.
        divergence (`str`), jsd_beta (`float`): see [`check_divergence`].
        needs_grad (`bool`): whether to make the gradient.

    Returns:
        `tuple`: (N,) in nats, and (N, V) or None.
    """
    if divergence == "forward":
        teacher_probs = teacher.exp()
        values = torch.linalg.vecdot(teacher_probs, teacher.sub_(student))
        return values, student.exp_().sub_(teacher_probs) if needs_grad else None
    student_probs = student.exp()
    if divergence == "reverse":
        log_ratio = student.sub_(teacher)
        values = own = torch.linalg.vecdot(student_probs, log_ratio)
        factor = 1.0
    else:
        teacher_probs = teacher.exp()
        # Where both probabilities underflow, the logarithm stays finite, so that its product with them is 0, not NaN.
        mixture = torch.lerp(student_probs, teacher_probs, jsd_beta).clamp_min_(TINY).log_()
        log_ratio, factor = student.sub_(mixture), 1 - jsd_beta
        own = torch.linalg.vecdot(student_probs, log_ratio)
        values = jsd_beta * torch.linalg.vecdot(teacher_probs, teacher.sub_(mixture)) + factor * own
    # The mixture depends on the student, too, but what follows from that cancels.
    return values, log_ratio.sub_(own[:, None]).mul_(student_probs).mul_(factor) if needs_grad else None
