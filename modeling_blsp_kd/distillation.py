"""The losses of BLSP-KD as pure functions: forward KL from hidden states, cross-entropy, quantity loss.

Follows arXiv 2405.19041 and its authors' public code, with the one-step shift that the code lacks: the distribution
that predicts token j stands at position j - 1. Leaves out: which positions are compared, see `distillation_step.py`.

All sums run over rows (token positions), all softmaxes are float32. Callers divide by the token count of the whole
optimiser step, which keeps the loss the same under gradient accumulation and several processes. N rows, D LLM width,
V vocabulary.
"""

import torch
from torch import nn
from torch.autograd.function import once_differentiable

# Logits that go through the softmax together on a CPU: 1 MB in float32, which memory allocators hand out again, while
# larger blocks come as new pages each time. An accelerator takes large tiles better.
TILE_SIZE = 2**18
# Larger products are faster, above all for wide LLMs, but their logits take memory. With few rows and a small LLM this
# matters, so a chunk there is a fifth of the rows, or takes as much memory as a sixth of the output head.
FEWEST_CHUNK_ROWS, MOST_CHUNK_ROWS = 32, 192


def predicts_next(selected: torch.Tensor) -> torch.Tensor:
    """Move a mask of tokens to the positions that predict them: (B, L) bool -> (B, L) bool, one step to the left.

    A token at position 0 has no predictor and drops out.
    """
    return nn.functional.pad(selected[:, 1:], (0, 1), value=False)


def postprocess_logits(logits: torch.Tensor, scale: float = 1.0, softcap: float | None = None) -> torch.Tensor:
    """Apply what some LLMs apply after the output head: `softcap * tanh(scale * logits / softcap)`, in float32."""
    logits = logits.float()
    if scale != 1.0:
        logits = logits * scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    return logits


class _LinearKL(torch.autograd.Function):
    """KL(teacher || student) of each row from hidden states, with the gradient made in the forward pass.

    Rows are taken in chunks. Their logits, student's and teacher's from one product, fill a buffer that serves all
    chunks. Then tiles that fit into a cache become probabilities, and the gradient of the logits takes their place.
    """

    @staticmethod
    def forward(ctx, student_hidden, teacher_hidden, weight, bias, temperature, scale, softcap, chunk_rows):
        num_rows, vocab_size = student_hidden.shape[0], weight.shape[0]
        needs_grad = ctx.needs_input_grad[0]
        gradient = torch.empty_like(student_hidden) if needs_grad else None
        kl = torch.empty(num_rows, dtype=torch.float32, device=weight.device)
        buffer = student_hidden.new_empty(2 * min(chunk_rows, num_rows), vocab_size)
        # Factors on all logits cost nothing inside the products.
        factor = scale / temperature if softcap is None else scale / softcap
        tile_rows = max(1, TILE_SIZE // vocab_size) if weight.device.type == "cpu" else chunk_rows
        for start in range(0, num_rows, chunk_rows):
            rows = slice(start, start + chunk_rows)
            hidden = torch.cat([student_hidden[rows], teacher_hidden[rows]])
            logits = buffer[: len(hidden)]
            # With beta = 0 the old contents are not read.
            added, beta = (logits, 0.0) if bias is None else (bias, factor)
            torch.addmm(added, hidden, weight.t(), beta=beta, alpha=factor, out=logits)
            student, teacher = logits.chunk(2)
            for tile in zip(student.split(tile_rows), teacher.split(tile_rows), kl[rows].split(tile_rows)):
                _compare_logits_(*tile, None if softcap is None else softcap / temperature, needs_grad)
            if gradient is not None:
                torch.addmm(gradient[rows], student, weight, beta=0.0, alpha=scale / temperature, out=gradient[rows])
        ctx.save_for_backward(gradient)
        return kl

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_kl):
        (gradient,) = ctx.saved_tensors
        return ((gradient * grad_kl[:, None]).to(gradient.dtype), *[None] * 7)


def _compare_logits_(student, teacher, kl, softcap: float | None, needs_grad: bool):
    """Write the KL of each row to `kl` (rows,), and the gradient over the student's logits (rows, V).

    The logits have been divided by the temperature; with a softcap they are softcap * tanh of what is given.
    """
    gradient_of = student
    student, teacher = student.float(), teacher.float()
    if softcap is not None:
        student, teacher = student.tanh(), teacher.tanh()
        slope = 1 - student.square()
        student, teacher = student.mul_(softcap), teacher.mul_(softcap)
    student, teacher = torch.log_softmax(student, -1), torch.log_softmax(teacher, -1)
    teacher_probs = teacher.exp()
    kl.copy_(torch.linalg.vecdot(teacher_probs, teacher.sub_(student)))
    if needs_grad:
        gradient = student.exp_().sub_(teacher_probs)
        gradient_of.copy_(gradient if softcap is None else gradient.mul_(slope))


def linear_kl_of_rows(
    student_hidden: torch.Tensor,
    teacher_hidden: torch.Tensor,
    lm_head_weight: torch.Tensor,
    temperature: float = 2.0,
    *,
    lm_head_bias: torch.Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk_rows: int | None = None,
) -> torch.Tensor:
    """[`linear_kl`] of each row by itself, so that rows of several losses go through the vocabulary in one pass.

    Returns:
        `torch.FloatTensor` of shape (N,): float32, in nats.
    """
    if student_hidden.shape != teacher_hidden.shape or student_hidden.shape[-1] != lm_head_weight.shape[-1]:
        raise ValueError(
            "Expected student and teacher hidden states of one shape (N, D) and a head of shape (V, D), but got "
            f"{tuple(student_hidden.shape)}, {tuple(teacher_hidden.shape)} and {tuple(lm_head_weight.shape)}."
        )
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, got {temperature}.")
    if torch.is_grad_enabled() and lm_head_weight.requires_grad:
        raise ValueError(
            "linear_kl gives no gradient to the output head, but lm_head_weight.requires_grad is True. The LLM is "
            "the teacher: freeze it (requires_grad_(False)), and adapt it with partial LoRA instead."
        )
    if chunk_rows is None:
        num_rows, width = student_hidden.shape
        chunk_rows = min(max(-(-num_rows // 5), -(-width // 12), FEWEST_CHUNK_ROWS), MOST_CHUNK_ROWS)
    device, dtype = lm_head_weight.device.type, student_hidden.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    student_hidden, teacher_hidden = student_hidden.to(dtype), teacher_hidden.detach().to(dtype)
    weight = lm_head_weight.detach().to(dtype)
    bias = None if lm_head_bias is None else lm_head_bias.detach().to(dtype)
    # Autocast would leave the products, which write into a buffer, as they are, and round the sums over the vocabulary.
    with torch.autocast(device, enabled=False):
        return _LinearKL.apply(student_hidden, teacher_hidden, weight, bias, temperature, scale, softcap, chunk_rows)


def linear_kl(
    student_hidden: torch.Tensor,
    teacher_hidden: torch.Tensor,
    lm_head_weight: torch.Tensor,
    temperature: float = 2.0,
    *,
    lm_head_bias: torch.Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    reduction: str = "mean",
    chunk_rows: int | None = None,
) -> torch.Tensor:
    """Return the forward KL(teacher || student) of the next-token distributions, straight from hidden states.

    Both distributions are softmax(logits / temperature); there is no temperature^2 factor, as in the authors' public
    code. Identical rows give 0. No row gives a 0 that still has a graph. Differentiable once, with respect to
    `student_hidden` only: the output head belongs to the teacher and must be frozen.

    Args:
        student_hidden (`torch.FloatTensor` of shape (N, D)): last hidden states after the speech prompt.
        teacher_hidden (`torch.FloatTensor` of shape (N, D)): the same positions after the text prompt.
        lm_head_weight (`torch.FloatTensor` of shape (V, D)): the LLM's output head.
        temperature (`float`): above 0.
        lm_head_bias (`torch.FloatTensor` of shape (V,), *optional*).
        scale (`float`): factor on the logits (Cohere, Granite).
        softcap (`float`, *optional*): tanh soft-capping of the logits (Gemma-2).
        reduction (`str`): `"mean"` or `"sum"` over the rows.
        chunk_rows (`int`, *optional*):
            rows whose logits exist at one time, student's and teacher's each. Omitted: 32 to 192.

    Returns:
        `torch.FloatTensor`: float32 scalar, in nats.

    Raises:
        ValueError: shapes or options do not fit, or the head asks for a gradient.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}.")
    total = linear_kl_of_rows(
        student_hidden,
        teacher_hidden,
        lm_head_weight,
        temperature,
        lm_head_bias=lm_head_bias,
        scale=scale,
        softcap=softcap,
        chunk_rows=chunk_rows,
    ).sum()
    return total / max(student_hidden.shape[0], 1) if reduction == "mean" else total


def same_likeliest_token(
    student_hidden: torch.Tensor,
    teacher_hidden: torch.Tensor,
    lm_head_weight: torch.Tensor,
    *,
    lm_head_bias: torch.Tensor | None = None,
    chunk_rows: int = MOST_CHUNK_ROWS,
) -> torch.BoolTensor:
    """Tell for each of N rows whether student and teacher predict the same next token, greedily: (N,) bool.

    Scale and soft-capping of the logits change no ranking, so they are left out. Arguments are those of [`linear_kl`].
    """
    weight = lm_head_weight.detach()
    bias = None if lm_head_bias is None else lm_head_bias.detach()
    same = torch.zeros(len(student_hidden), dtype=torch.bool, device=student_hidden.device)
    for start in range(0, len(same), chunk_rows):
        rows = slice(start, start + chunk_rows)
        student, teacher = (
            nn.functional.linear(hidden[rows].detach().to(weight.dtype), weight, bias).argmax(-1)
            for hidden in (student_hidden, teacher_hidden)
        )
        same[rows] = student == teacher
    return same


def linear_cross_entropy(
    hidden: torch.Tensor,
    targets: torch.Tensor,
    weight: torch.Tensor,
    *,
    lm_head_bias: torch.Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> torch.Tensor:
    """Return the cross-entropy of target tokens from hidden states, summed over rows. Its minimum is 0.

    Args:
        hidden (`torch.FloatTensor` of shape (N, D)): states that predict the targets.
        targets (`torch.LongTensor` of shape (N,)): token ids.
        weight (`torch.FloatTensor` of shape (V, D)): output head (or token embeddings).
        lm_head_bias, scale, softcap: as in [`linear_kl`].

    Returns:
        `torch.FloatTensor`: float32 scalar, in nats. No row gives a 0 that still has a graph.
    """
    bias = None if lm_head_bias is None else lm_head_bias.to(hidden.dtype)
    logits = nn.functional.linear(hidden, weight.to(hidden.dtype), bias)
    return nn.functional.cross_entropy(postprocess_logits(logits, scale, softcap), targets, reduction="sum")


def quantity_loss(alpha_sum: torch.Tensor, num_tokens: torch.Tensor) -> torch.Tensor:
    """Return |sum of unscaled alphas - U| / U, summed over clips: CIF learns to fire once per transcript token.

    Args:
        alpha_sum (`torch.FloatTensor` of shape (N,)): predicted token counts of N clips.
        num_tokens (`torch.LongTensor` of shape (N,)): true ones, at least 1.
    """
    return ((alpha_sum - num_tokens).abs() / num_tokens).sum()
