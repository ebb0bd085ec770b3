"""The kernel of the KLs: from hidden states to a divergence of each row and its gradient, without all logits at once.

Leaves out: checks and sizes of chunks and tiles (`distillation.py`), and the divergences (`divergences.py`). N rows, D
LLM width, V vocabulary.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .divergences import compare_


def fused_kl(student_hidden: torch.Tensor, teacher_hidden: torch.Tensor, *options: Any) -> torch.Tensor:
    """Return what `linear_kl_of_rows` in `distillation.py` returns, whose checked options these are."""
    return _LinearKL.apply(student_hidden, teacher_hidden, *options)


class GradientInForward(torch.autograd.Function):
    """A value of each row, whose forward pass saves the gradient over its first argument, the rows."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_values: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return ((gradient * grad_values[:, None]).to(gradient.dtype), *[None] * (len(ctx.needs_input_grad) - 1))


class _LinearKL(GradientInForward):
    """A divergence of each row from hidden states, with the gradient made in the forward pass.

    Rows are taken in chunks. Their logits, student's and teacher's from one product, fill a buffer that serves all
    chunks. Then tiles that fit into a cache become probabilities, and the gradient of the logits takes their place.
    """

    @staticmethod
    def forward(
        ctx,
        student_hidden,
        teacher_hidden,
        weight,
        bias,
        temperature,
        scale,
        softcap,
        divergence,
        jsd_beta,
        chunk_rows,
        tile_rows,
    ):
        num_rows, vocab_size = student_hidden.shape[0], weight.shape[0]
        needs_grad = ctx.needs_input_grad[0]
        gradient = torch.empty_like(student_hidden) if needs_grad else None
        kl = torch.empty(num_rows, dtype=torch.float32, device=weight.device)
        buffer = student_hidden.new_empty(2 * min(chunk_rows, num_rows), vocab_size)
        # Factors on all logits cost nothing inside the products.
        factor = scale / temperature if softcap is None else scale / softcap
        for start in range(0, num_rows, chunk_rows):
            rows = slice(start, start + chunk_rows)
            hidden = torch.cat([student_hidden[rows], teacher_hidden[rows]])
            logits = buffer[: len(hidden)]
            # With beta = 0 the old contents are not read.
            added, beta = (logits, 0.0) if bias is None else (bias, factor)
            torch.addmm(added, hidden, weight.t(), beta=beta, alpha=factor, out=logits)
            student, teacher = logits.chunk(2)
            for tile in zip(student.split(tile_rows), teacher.split(tile_rows), kl[rows].split(tile_rows)):
                _compare_logits_(
                    *tile, None if softcap is None else softcap / temperature, divergence, jsd_beta, needs_grad
                )
            if gradient is not None:
                torch.addmm(gradient[rows], student, weight, beta=0.0, alpha=scale / temperature, out=gradient[rows])
        ctx.save_for_backward(gradient)
        return kl


def _compare_logits_(
    student, teacher, values, softcap: float | None, divergence: str, jsd_beta: float, needs_grad: bool
):
    """Write the divergence of each row to `values` (rows,), and the gradient over the student's logits (rows, V).

    The logits have been divided by the temperature; with a softcap they are softcap * tanh of what is given.
    """
    gradient_of = student
    student, teacher = student.float(), teacher.float()
    if softcap is not None:
        student, teacher = student.tanh(), teacher.tanh()
        slope = 1 - student.square()
        student, teacher = student.mul_(softcap), teacher.mul_(softcap)
    student, teacher = torch.log_softmax(student, -1), torch.log_softmax(teacher, -1)
    of_rows, gradient = compare_(student, teacher, divergence, jsd_beta, needs_grad)
    values.copy_(of_rows)
    if gradient is not None:
        gradient_of.copy_(gradient if softcap is None else gradient.mul_(slope))
