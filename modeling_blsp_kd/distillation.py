"""The losses of BLSP-KD as pure functions: KL from hidden states, cross-entropy, quantity loss.

Follows arXiv 2405.19041 and its authors' public code, with the one-step shift that the code lacks: the distribution
that predicts token j stands at position j - 1. Leaves out: other divergences than the paper's (`divergences.py`), and
which positions are compared (`distillation_step.py`).

All sums run over rows (token positions), all softmaxes are float32. Callers divide by the token count of the whole
optimiser step, which keeps the loss the same under gradient accumulation and several processes. N rows, D LLM width,
V vocabulary.
"""

import torch
from torch import nn

from .divergences import check_divergence
from .fused_kl import fused_kl
from .kept_teacher import KeptTeacher, kl_to_kept

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


def linear_kl_of_rows(
    student_hidden: torch.Tensor,
    teacher_hidden: torch.Tensor | KeptTeacher,
    lm_head_weight: torch.Tensor,
    temperature: float = 2.0,
    *,
    lm_head_bias: torch.Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    divergence: str = "forward",
    jsd_beta: float = 0.5,
    chunk_rows: int | None = None,
) -> torch.Tensor:
    """[`linear_kl`] of each row by itself, so that rows of several losses go through the vocabulary in one pass.

    Of the teacher there may also be the distributions that were kept, at the same temperature.

    Returns:
        `torch.FloatTensor` of shape (N,): float32, in nats.
    """
    teacher, width = teacher_hidden, student_hidden.shape[1:]
    teacher_shape = (len(teacher.ids), *width) if isinstance(teacher, KeptTeacher) else tuple(teacher.shape)
    if student_hidden.shape != teacher_shape or student_hidden.shape[-1] != lm_head_weight.shape[-1]:
        raise ValueError(
            "Expected student and teacher hidden states of one shape (N, D) and a head of shape (V, D), but got "
            f"{tuple(student_hidden.shape)}, {teacher_shape} and {tuple(lm_head_weight.shape)}."
        )
    check_divergence(divergence, jsd_beta)
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
    student_hidden = student_hidden.to(dtype)
    weight = lm_head_weight.detach().to(dtype)
    bias = None if lm_head_bias is None else lm_head_bias.detach().to(dtype)
    tile_rows = max(1, TILE_SIZE // len(weight)) if device == "cpu" else chunk_rows
    options = (temperature, scale, softcap, divergence, jsd_beta)
    # Autocast would leave the products, which write into a buffer, as they are, and round the sums over the vocabulary.
    with torch.autocast(device, enabled=False):
        if isinstance(teacher, KeptTeacher):
            return kl_to_kept(student_hidden, teacher, weight, bias, *options, chunk_rows)
        return fused_kl(student_hidden, teacher.detach().to(dtype), weight, bias, *options, chunk_rows, tile_rows)


def linear_kl(
    student_hidden: torch.Tensor,
    teacher_hidden: torch.Tensor,
    lm_head_weight: torch.Tensor,
    temperature: float = 2.0,
    *,
    lm_head_bias: torch.Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    divergence: str = "forward",
    jsd_beta: float = 0.5,
    reduction: str = "mean",
    chunk_rows: int | None = None,
) -> torch.Tensor:
    """Return the KL(teacher || student) of the next-token distributions, or another divergence, from hidden states.

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
        divergence (`str`): `"forward"`: KL(teacher || student); `"reverse"`: KL(student || teacher); `"jsd"`: with
            m = beta * teacher + (1 - beta) * student, beta * KL(teacher || m) + (1 - beta) * KL(student || m).
        jsd_beta (`float`): beta, in (0, 1).
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
        divergence=divergence,
        jsd_beta=jsd_beta,
        chunk_rows=chunk_rows,
    ).sum()
    return total / max(student_hidden.shape[0], 1) if reduction == "mean" else total


def same_likeliest_token(
    student_hidden: torch.Tensor,
    teacher_hidden: torch.Tensor | KeptTeacher,
    lm_head_weight: torch.Tensor,
    *,
    lm_head_bias: torch.Tensor | None = None,
    chunk_rows: int = MOST_CHUNK_ROWS,
) -> torch.BoolTensor:
    """Tell for each of N rows whether student and teacher predict the same next token, greedily: (N,) bool.

    Scale and soft-capping of the logits change no ranking, so they are left out. Arguments are those of
    [`linear_kl_of_rows`].
    """
    weight = lm_head_weight.detach()
    bias = None if lm_head_bias is None else lm_head_bias.detach()

    def likeliest(hidden: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(hidden.detach().to(weight.dtype), weight, bias).argmax(-1)

    is_kept = isinstance(teacher_hidden, KeptTeacher)
    same = torch.zeros(len(student_hidden), dtype=torch.bool, device=student_hidden.device)
    for start in range(0, len(same), chunk_rows):
        rows = slice(start, start + chunk_rows)
        of_teacher = teacher_hidden.ids[rows, 0] if is_kept else likeliest(teacher_hidden[rows])
        same[rows] = likeliest(student_hidden[rows]) == of_teacher
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
