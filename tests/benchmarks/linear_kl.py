"""The distillation loss from hidden states, forward and backward, beside peers and the three products in it.

N tokens, D LLM width, V vocabulary. All compute KL(teacher || student) at temperature 2, or what their name says, and
the gradient with respect to the student's hidden states; peers also make one for the head where they know no frozen
head. Leaves out: how right it is (`tests/test_distillation.py`).
"""

from functools import partial

import torch
from torch.nn.functional import kl_div, linear, log_softmax

from modeling_blsp_kd.distillation import linear_kl, linear_kl_of_rows
from modeling_blsp_kd.kept_teacher import keep_top

from .measure import OURS, Case, peer

PEERS = ("full logits", "TRL GKD", "Liger")
# The largest takes minutes already with one of them.
SIZES = {(512, 896, 151_936): PEERS, (2048, 896, 151_936): PEERS[:1], (512, 4096, 151_936): PEERS}
SMALL_SIZES = {(24, 16, 500): PEERS}


def cases(small: bool, device, dtype):
    for size, peers in (SMALL_SIZES if small else SIZES).items():
        yield _case(size, peers, device, dtype)
    for num_tokens in (8, 16) if small else (64, 128, 256, 512, 1024):
        yield _case((num_tokens, 256, 500 if small else 32_000), (), device, dtype, ("tokens", num_tokens))
    for vocab_size in (250, 500) if small else (8_000, 16_000, 32_000, 64_000, 128_000):
        yield _case((16 if small else 256, 256, vocab_size), (), device, dtype, ("vocabulary", vocab_size))


def _case(size, peers, device, dtype, sweep=None) -> Case:
    num_tokens, width, vocab_size = size
    student = torch.randn(num_tokens, width, device=device, dtype=dtype, requires_grad=True)
    teacher = torch.randn(num_tokens, width, device=device, dtype=dtype)
    weight = torch.randn(vocab_size, width, device=device, dtype=dtype) / width**0.5

    def gradient_of(loss):
        return lambda: torch.autograd.grad(loss(), student)

    def naive():
        logits = [linear(states, weight).float() / 2 for states in (student, teacher)]
        student_log_probs, teacher_log_probs = (log_softmax(each, -1) for each in logits)
        return kl_div(student_log_probs, teacher_log_probs, log_target=True, reduction="sum")

    candidates = {OURS: gradient_of(lambda: linear_kl(student, teacher, weight, reduction="sum"))}
    if peers:
        for name, divergence in (("reverse KL", "reverse"), ("Jensen-Shannon", "jsd")):
            candidates[name] = gradient_of(
                partial(linear_kl, student, teacher, weight, reduction="sum", divergence=divergence)
            )
        kept = keep_top(teacher, weight, 2.0, 32)
        candidates["teacher's top 32"] = gradient_of(lambda: linear_kl_of_rows(student, kept, weight).sum())
    missing = {}
    if "full logits" in peers:
        candidates["full logits"] = gradient_of(naive)
    if "TRL GKD" in peers:
        trl, missing["TRL GKD"] = peer("trl.experimental.gkd", "GKDTrainer")
        if trl is not None:
            candidates["TRL GKD"] = gradient_of(
                lambda: trl.generalized_jsd_loss(
                    linear(student, weight)[None], linear(teacher, weight)[None], beta=0, temperature=2, reduction="sum"
                )
            )
    if "Liger" in peers:
        liger, missing["Liger"] = peer("liger_kernel.chunked_loss", "LigerFusedLinearJSDLoss")
        if liger is not None:
            liger_loss = liger(
                weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, temperature=2.0, compiled=False, chunk_size=128
            )
            labels = torch.zeros(num_tokens, dtype=torch.long, device=device)
            candidates["Liger"] = gradient_of(lambda: liger_loss(student, weight, teacher, weight, labels))
    logits = torch.empty(num_tokens, vocab_size, device=device, dtype=dtype)
    gradient = torch.empty(num_tokens, width, device=device, dtype=dtype)

    def three_products():
        for states in (teacher, student.detach()):
            torch.mm(states, weight.t(), out=logits)
        torch.mm(logits, weight, out=gradient)

    return Case(
        name=f"forward + backward {size}",
        candidates={**candidates, "three products": three_products},
        memory_unit=("full float32 logits", 4 * num_tokens * vocab_size),
        sweep=sweep,
        missing={name: reason for name, reason in missing.items() if reason is not None},
    )
