"""The teacher's distributions as they are kept on disk: its top k tokens, and what is left as one bucket, the tail.

Compared are the distributions over these k + 1 buckets, which can only be closer to each other than those over the
vocabulary; with k = V they are the same. docs/losses.md has the formulas and sources. Leaves out: files
(`processing/training_rows/kept_teacher.py`).

Shapes: N rows (token positions), K kept tokens, D LLM width, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from .divergences import compare_
from .fused_kl import GradientInForward

CHUNK_ROWS = 192


class KeptTeacher(NamedTuple):
    """The teacher's distributions at N positions.

    Args:
        ids (`torch.LongTensor` of shape (N, K)): the most likely tokens.
        log_probs (`torch.FloatTensor` of shape (N, K + 1)): their log-probabilities at the temperature of the loss, and
            that of all other tokens together (-inf if there is no other).
    """

    ids: torch.Tensor
    log_probs: torch.Tensor

    @classmethod
    def cat(cls, kept: Sequence["KeptTeacher"]) -> "KeptTeacher":
        return cls(*(torch.cat(parts) for parts in zip(*kept)))

    def at(self, is_there: torch.Tensor) -> "KeptTeacher":
        """Return those at the positions of a mask."""
        return KeptTeacher(self.ids[is_there], self.log_probs[is_there])


@torch.no_grad()
def keep_top(
    hidden: torch.Tensor,
    lm_head_weight: torch.Tensor,
    temperature: float,
    k: int,
    *,
    lm_head_bias: torch.Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> KeptTeacher:
    """Return what is kept of the teacher's distributions, from its last hidden states (N, D); N is at least 1.

    Raises:
        ValueError: k is not between 1 and the size of the vocabulary.
    """
    if not 1 <= k <= len(lm_head_weight):
        raise ValueError(f"k must lie between 1 and {len(lm_head_weight)}, the size of the vocabulary, got {k}.")
    kept = []
    for rows in hidden.split(CHUNK_ROWS):
        logits = nn.functional.linear(rows, lm_head_weight, lm_head_bias).float() * (scale / temperature)
        if softcap is not None:
            softcap_over_t = softcap / temperature
            logits = torch.tanh(logits / softcap_over_t) * softcap_over_t
        log_probs = torch.log_softmax(logits, -1)
        top, ids = log_probs.topk(k)
        kept.append(KeptTeacher(ids, torch.cat([top, _tail_of_(log_probs, ids)], dim=1)))
    return KeptTeacher.cat(kept)


def _tail_of_(log_probs: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return the log-probability of all tokens but those in `ids`: (N, 1). These become -inf in `log_probs` (N, V)."""
    return torch.logsumexp(log_probs.scatter_(1, ids, -torch.inf), dim=1, keepdim=True)


class _LinearKLToKept(GradientInForward):
    """A divergence of each row from the student's hidden states and what is kept of the teacher.

    Like the kernel in `fused_kl.py`: the logits of a chunk of rows become their gradient, in the forward pass.
    """

    @staticmethod
    def forward(
        ctx, student_hidden, ids, log_probs, weight, bias, temperature, scale, softcap, divergence, jsd_beta, chunk_rows
    ):
        needs_grad = ctx.needs_input_grad[0]
        gradient = torch.empty_like(student_hidden) if needs_grad else None
        kl = torch.empty(len(student_hidden), dtype=torch.float32, device=weight.device)
        factor = scale / temperature if softcap is None else scale / softcap
        buffer = student_hidden.new_empty(min(chunk_rows, len(student_hidden)), len(weight))
        for start in range(0, len(student_hidden), chunk_rows):
            rows = slice(start, start + chunk_rows)
            logits = buffer[: len(student_hidden[rows])]
            # With beta = 0 the old contents are not read.
            added, beta = (logits, 0.0) if bias is None else (bias, factor)
            torch.addmm(added, student_hidden[rows], weight.t(), beta=beta, alpha=factor, out=logits)
            logits, slope = logits.float(), None
            if softcap is not None:
                logits = logits.tanh()
                slope = (1 - logits.square()) if needs_grad else None
                logits = logits.mul_(softcap / temperature)
            kl[rows], of_logits = _compare_buckets(logits, ids[rows], log_probs[rows], divergence, jsd_beta, needs_grad)
            if gradient is not None:
                of_logits = of_logits if slope is None else of_logits.mul_(slope)
                gradient[rows] = (of_logits.to(weight.dtype) @ weight).mul_(scale / temperature)
            del logits, slope, of_logits  # before those of the next rows are made
        ctx.save_for_backward(gradient)
        return kl


def kl_to_kept(student_hidden: torch.Tensor, kept: KeptTeacher, *options: Any) -> torch.Tensor:
    """Return what `linear_kl_of_rows` in `distillation.py` returns, whose checked options these are."""
    return _LinearKLToKept.apply(student_hidden, *kept, *options)


def _compare_buckets(logits, ids, log_probs, divergence: str, jsd_beta: float, needs_grad: bool):
    """Return the divergence of each row (rows,), and its gradient over the student's logits (rows, V) or None."""
    student = torch.log_softmax(logits, -1)
    top, tail = student.gather(1, ids), _tail_of_(student, ids)
    has_tail = ids.shape[1] < student.shape[1]
    buckets, teacher = (torch.cat([top, tail], 1), log_probs) if has_tail else (top, log_probs[:, :-1])
    values, gradient = compare_(buckets.clone(), teacher.clone(), divergence, jsd_beta, needs_grad)
    if gradient is None:
        return values, None
    if not has_tail:
        return values, torch.zeros_like(student).scatter_(1, ids, gradient)
    # Tokens of the tail share its gradient as they share its probability.
    of_tail = student.sub_(tail).exp_().mul_(gradient[:, -1:])
    return values, of_tail.scatter_(1, ids, gradient[:, :-1])
