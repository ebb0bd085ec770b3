"""One distillation step: what the LLM predicts after speech is compared with what it predicts after the text.

Follows arXiv 2405.19041. Runs inside the model's forward, where sharded weights are gathered. Leaves out: running the
LLM (`modeling_blsp_kd.py`), the formulas (`distillation.py`), and counts over batches and processes
(`training/batch_counts.py`).

Shapes: B prompts, L student and L' teacher length, N audio clips in reading order, D LLM width, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from .ctc import ctc_loss
from .distillation import (
    linear_cross_entropy,
    linear_kl_of_rows,
    predicts_next,
    quantity_loss,
    same_likeliest_token,
)
from .speech_windows import is_within


class ItemCounts(NamedTuple):
    """Numbers of items that losses are means over: of one batch, or of an optimiser step over all processes.

    The Trainer hands them to the model as one tensor, `num_items_in_batch`, in this order.
    """

    response_tokens: torch.Tensor
    content_tokens: torch.Tensor
    clips: torch.Tensor


# What each loss part is a mean over.
LOSS_PARTS = {
    "response_kl": "response_tokens",
    "input_kl": "content_tokens",
    "quantity": "clips",
    "response_ce": "response_tokens",
    "transcript_ce": "content_tokens",
    "ctc": "clips",
}
KL_OF = {"response": "response_kl", "content": "input_kl"}
# Losses that read the LLM's states after the text prompt, and after the speech prompt.
NEED_TEACHER = frozenset(KL_OF.values())
NEED_STUDENT = NEED_TEACHER | {"response_ce"}


def _gathered_weight(module: nn.Module) -> torch.Tensor:
    """Return the weight of embeddings or head.

    accelerate makes each of them a unit of FSDP2, which gathers it in the module's own forward. The losses bypass that
    forward, so they gather it here; FSDP2 frees it again after the backward.
    """
    if isinstance(module, FSDPModule):
        module.unshard()
    return module.weight


@dataclass(frozen=True)
class ComparedPrompts:
    """The positions of speech prompts (the student's) and text prompts (the teacher's) that belong together.

    Args:
        labels (B, L): response tokens of the student, -100 elsewhere.
        is_speech (B, L) bool: speech positions of the student.
        teacher_input_ids (B, L'): the text prompts.
        teacher_is_content, teacher_is_response (B, L') bool: transcript tokens and response tokens of the teacher.
        transcript_bytes (N, S) or None: of the clips, see `ctc.py`.
    """

    labels: torch.LongTensor
    is_speech: torch.BoolTensor
    teacher_input_ids: torch.LongTensor
    teacher_is_content: torch.BoolTensor
    teacher_is_response: torch.BoolTensor
    transcript_bytes: torch.LongTensor | None = None


@dataclass(frozen=True)
class OutputHead:
    """The LLM's output head as the losses take it, and what the LLM does to its logits afterwards.

    Args:
        weight (V, D), bias (V,) or None.
        scale (`float`): factor on the logits (Cohere's logit_scale, Granite's logits_scaling).
        softcap (`float` or None): tanh soft-capping of the logits (Gemma's final_logit_softcapping).
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    scale: float
    softcap: float | None

    @classmethod
    def of(cls, language_model: nn.Module) -> "OutputHead":
        """Read the head of an LLM. Each forward calls this anew, because sharding swaps the weight."""
        head = language_model.get_output_embeddings()
        if head.weight.is_meta:
            raise ValueError("The LLM's output head is offloaded, so the losses cannot read it. Keep it on a device.")
        text_config = language_model.config.get_text_config()
        scale = getattr(text_config, "logit_scale", None) or 1.0
        scale /= getattr(text_config, "logits_scaling", None) or 1.0
        softcap = getattr(text_config, "final_logit_softcapping", None)
        return cls(_gathered_weight(head), getattr(head, "bias", None), scale, softcap)

    @property
    def options(self) -> dict:
        """Return the keyword arguments of [`linear_kl`] and [`linear_cross_entropy`]."""
        return {"lm_head_bias": self.bias, "scale": self.scale, "softcap": self.softcap}


def wanted_losses(weights: dict[str, float], is_training: bool, one_to_one: bool) -> set[str]:
    """Return the names of the losses to compute.

    Training computes what the loss weighs. Evaluation also reports every KL that the adapter allows, and at how many
    response tokens speech and text agree on the likeliest one.
    """
    wanted = {name for name in LOSS_PARTS if weights[name]}
    if not is_training:
        wanted |= {"response_agreement"} | (NEED_TEACHER if one_to_one else {"response_kl"})
    return wanted


def distillation_loss(
    prompts: ComparedPrompts,
    audio: Any,
    language_model: nn.Module,
    weights: dict[str, float],
    wanted: set[str],
    student_states: torch.FloatTensor | None = None,
    teacher_states: torch.FloatTensor | None = None,
    num_items_in_batch: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Weigh and add up the losses of one batch.

    Args:
        prompts ([`ComparedPrompts`]).
        audio ([`BlspKdAudioOutput`]): what encoder and adapter made of the clips.
        language_model (`nn.Module`): its output head and its embeddings are read.
        weights (`dict`): weight of each loss, and `temperature`.
        wanted (`set[str]`): of [`wanted_losses`].
        student_states (B, L, D), teacher_states (B, L', D), *optional*: last hidden states of the LLM after the speech
            prompts and the text prompts, where `wanted` needs them.
        num_items_in_batch (`torch.Tensor` of shape (3,), *optional*): [`ItemCounts`] to divide by. Omitted: those of
            this batch.

    Returns:
        `tuple`: the weighted loss, and its parts by name, each a tensor of sum and count.

    Raises:
        ValueError: speech and text prompts hold different numbers of response or content tokens, or CTC lacks its
            targets.
    """
    predicts_response = predicts_next(prompts.labels != -100)
    teacher_predicts_response = predicts_next(prompts.teacher_is_response)
    _check_same_tokens("response", predicts_response, teacher_predicts_response)
    if audio.alpha_sum is not None:  # one speech token per text token
        _check_same_tokens("content", prompts.is_speech, prompts.teacher_is_content)
    parts: dict[str, torch.Tensor] = {}
    if wanted & NEED_TEACHER:
        compared = {
            "response": (predicts_response, teacher_predicts_response),
            "content": (prompts.is_speech, prompts.teacher_is_content),
        }
        states = {
            name: (student_states[in_student], teacher_states[in_teacher])  # type: ignore[index]  # see `wanted`
            for name, (in_student, in_teacher) in compared.items()
            if KL_OF[name] in wanted
        }
        parts |= _kl_sums(states, OutputHead.of(language_model), weights["temperature"])
    if "quantity" in wanted:
        parts["quantity"] = quantity_loss(audio.alpha_sum, audio.num_speech_tokens)
    if "response_ce" in wanted:
        head = OutputHead.of(language_model)
        targets = prompts.labels[:, 1:][predicts_response[:, :-1]]
        states_of_response = student_states[predicts_response]  # type: ignore[index]  # see `wanted`
        parts["response_ce"] = linear_cross_entropy(states_of_response, targets, head.weight, **head.options)
    if "transcript_ce" in wanted:
        is_token = is_within(audio.num_speech_tokens, audio.pooler_output.shape[1])
        speech_tokens = audio.pooler_output[is_token]
        targets = prompts.teacher_input_ids[prompts.teacher_is_content]
        # The LLM's token embeddings double as the output matrix of the recogniser.
        embeddings = _gathered_weight(language_model.get_input_embeddings())
        parts["transcript_ce"] = linear_cross_entropy(speech_tokens, targets, embeddings)
    num_aligned = None
    if "ctc" in wanted:
        if prompts.transcript_bytes is None:
            raise ValueError(
                "The distillation option ctc needs the bytes of the transcripts, but the batch has no "
                "transcript_bytes. Collate with BlspKdDataCollator(processor, transcript_bytes=True), or set ctc to 0."
            )
        parts["ctc"], num_aligned = ctc_loss(audio.ctc_logits, audio.num_ctc_frames, prompts.transcript_bytes)

    counts = ItemCounts(
        response_tokens=predicts_response.sum(),
        content_tokens=prompts.teacher_is_content.sum(),
        clips=predicts_response.new_tensor(len(audio.num_speech_tokens), dtype=torch.long),
    )
    divisors = counts if num_items_in_batch is None else ItemCounts(*num_items_in_batch.to(prompts.labels.device))
    loss = sum(
        weights[name] * part / getattr(divisors, LOSS_PARTS[name]).clamp(min=1)
        for name, part in parts.items()
        if weights[name]
    )
    loss_parts = {
        name: torch.stack([part.detach().float(), getattr(counts, LOSS_PARTS[name]).float()])
        for name, part in parts.items()
    }
    if "response_agreement" in wanted:
        head = OutputHead.of(language_model)
        same = same_likeliest_token(*states["response"], head.weight, lm_head_bias=head.bias)
        loss_parts["response_agreement"] = torch.stack([same.sum().float(), counts.response_tokens.float()])
    if num_aligned is not None:
        loss_parts["ctc_aligned_share"] = torch.stack([num_aligned.float(), counts.clips.float()])
    if audio.alpha_sum is not None:
        miss = (audio.alpha_sum.detach().round().clamp(min=1) - audio.num_speech_tokens).abs()
        num_clips = counts.clips.float()
        loss_parts["token_count_accuracy"] = torch.stack([(miss == 0).sum().float(), num_clips])
        loss_parts["token_count_error"] = torch.stack([miss.sum(), num_clips])
    return loss, loss_parts


def _kl_sums(
    states: dict[str, tuple[torch.Tensor, torch.Tensor]], head: OutputHead, temperature: float
) -> dict[str, torch.Tensor]:
    """Return the KL of each pair of student and teacher states, summed over its rows.

    All rows go through the vocabulary in one pass.
    """
    student_rows, teacher_rows = (torch.cat(rows) for rows in zip(*states.values()))
    kl = linear_kl_of_rows(student_rows, teacher_rows, head.weight, temperature, **head.options)
    num_rows = [len(rows) for rows, _ in states.values()]
    return {KL_OF[name]: rows.sum() for name, rows in zip(states, kl.split(num_rows))}


def _check_same_tokens(name: str, in_student: torch.BoolTensor, in_teacher: torch.BoolTensor):
    num_student, num_teacher = torch.stack([in_student.sum(), in_teacher.sum()]).tolist()
    if num_student != num_teacher:
        raise ValueError(
            f"Speech and text prompts must hold the same {name} tokens, but hold {num_student} and {num_teacher}. "
            "Build both with BlspKdDataCollator."
        )
