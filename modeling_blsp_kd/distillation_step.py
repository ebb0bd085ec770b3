"""One distillation step: what the LLM predicts after speech is compared with what it predicts after the text.

Follows arXiv 2405.19041. Runs inside the model's forward, where sharded weights are gathered. Leaves out: running the
LLM (`llm_outputs.py`), the formulas (`distillation.py`), and counts over batches and processes
(`training/batch_counts.py`).

Shapes: B prompts, L student and L' teacher length, N audio clips in reading order, D LLM width, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from .ctc import ctc_loss
from .distillation import (
    linear_cross_entropy,
    linear_kl_of_rows,
    predicts_next,
    quantity_loss,
    same_likeliest_token,
)
from .kept_teacher import KeptTeacher
from .layer_alignment import layer_alignment
from .llm_outputs import LlmStates, OutputHead, gathered_weight
from .row_weights import end_of_turn_ids, sum_of_answers
from .speech_windows import is_within


class ItemCounts(NamedTuple):
    """Numbers of items that losses are means over: of one batch, or of an optimiser step over all processes.

    The Trainer hands them to the model as one tensor, `num_items_in_batch`, in this order. Only `end_of_turn_kl` reads
    `ends_of_turn`, so without it the tensor may end before.
    """

    response_tokens: torch.Tensor
    content_tokens: torch.Tensor
    clips: torch.Tensor
    ends_of_turn: torch.Tensor | None = None


# What each loss part is a mean over.
LOSS_PARTS = {
    "response_kl": "response_tokens",
    "input_kl": "content_tokens",
    "quantity": "clips",
    "response_ce": "response_tokens",
    "transcript_ce": "content_tokens",
    "ctc": "clips",
    "end_of_turn_kl": "ends_of_turn",
    "layer_alignment": "content_tokens",
}
ALWAYS_EVALUATED = frozenset({"response_kl", "input_kl"})
KLS = ALWAYS_EVALUATED | {"end_of_turn_kl"}
# Losses that read the LLM's states after the text prompt, and after the speech prompt.
NEED_TEACHER = KLS | {"layer_alignment"}
NEED_STUDENT = NEED_TEACHER | {"response_ce"}


@dataclass(frozen=True)
class ComparedPrompts:
    """The positions of speech prompts (the student's) and text prompts (the teacher's) that belong together.

    Args:
        labels (B, L): response tokens of the student, -100 elsewhere.
        is_speech (B, L) bool: speech positions of the student.
        teacher_input_ids (B, L'): the text prompts.
        teacher_is_content, teacher_is_response (B, L') bool: transcript tokens and response tokens of the teacher.
        transcript_bytes (N, S) or None: of the clips, see `ctc.py`.
        eos_token_id: of the LLM's generation config.
        kept_teacher (B, L', K) or None: what is kept on disk of the teacher's predictions.
    """

    labels: torch.LongTensor
    is_speech: torch.BoolTensor
    teacher_input_ids: torch.LongTensor
    teacher_is_content: torch.BoolTensor
    teacher_is_response: torch.BoolTensor
    transcript_bytes: torch.LongTensor | None = None
    eos_token_id: int | list[int] | None = None
    kept_teacher: KeptTeacher | None = None

    def passes(self, wanted: set[str]) -> tuple[bool, bool]:
        """Return whether losses need the LLM to read the text prompts, and the speech prompts."""
        read_from_disk = frozenset() if self.kept_teacher is None else KLS
        return bool(wanted & NEED_TEACHER - read_from_disk), bool(wanted & NEED_STUDENT)


def wanted_losses(weights: dict[str, Any], is_training: bool, one_to_one: bool) -> set[str]:
    """Return the names of the losses to compute.

    Training computes what the loss weighs. Evaluation also reports every KL that the adapter allows, and at how many
    response tokens speech and text agree on the likeliest one.
    """
    wanted = {name for name in LOSS_PARTS if weights[name]}
    if not is_training:
        wanted |= {"response_agreement"} | (ALWAYS_EVALUATED if one_to_one else {"response_kl"})
    return wanted


def distillation_loss(
    prompts: ComparedPrompts,
    audio: Any,
    language_model: nn.Module,
    weights: dict[str, Any],
    wanted: set[str],
    student_states: LlmStates | None = None,
    teacher_states: LlmStates | None = None,
    num_items_in_batch: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Weigh and add up the losses of one batch.

    Args:
        prompts ([`ComparedPrompts`]).
        audio ([`BlspKdAudioOutput`]): what encoder and adapter made of the clips.
        language_model (`nn.Module`): its output head and its embeddings are read.
        weights (`dict`): weight of each loss, and all else of [`DistillationOptions`].
        wanted (`set[str]`): of [`wanted_losses`].
        student_states, teacher_states ([`LlmStates`], *optional*): of the LLM after the speech prompts and the text
            prompts, where `wanted` needs them.
        num_items_in_batch (`torch.Tensor` of shape (3,) or (4,), *optional*): [`ItemCounts`] to divide by.
            Omitted: those of this batch.

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
    kept = prompts.kept_teacher
    is_end = torch.zeros_like(predicts_response)
    if "end_of_turn_kl" in wanted:
        ends = torch.tensor(end_of_turn_ids(prompts.eos_token_id), device=prompts.labels.device)
        is_end = predicts_next(torch.isin(prompts.labels, ends))
    if wanted & KLS:
        compared = {}
        if wanted & {"response_kl", "end_of_turn_kl"}:
            compared["response"] = (predicts_response, teacher_predicts_response)
        if "input_kl" in wanted:
            compared["content"] = (prompts.is_speech, prompts.teacher_is_content)
        states = {
            name: (
                student_states.last[in_student],  # type: ignore[union-attr]  # see `wanted`
                teacher_states.last[in_teacher] if kept is None else kept.at(in_teacher),  # type: ignore[union-attr]
            )
            for name, (in_student, in_teacher) in compared.items()
        }
        kls = _kl_of_rows(states, OutputHead.of(language_model), weights)
        if "response_kl" in wanted:
            parts["response_kl"] = sum_of_answers(kls["response"], predicts_response.sum(1), weights)
        if "input_kl" in wanted:
            parts["input_kl"] = kls["content"].sum()
        if "end_of_turn_kl" in wanted:
            parts["end_of_turn_kl"] = kls["response"][is_end[predicts_response]].sum()
    if "layer_alignment" in wanted:
        parts["layer_alignment"] = layer_alignment(
            [layer[prompts.is_speech] for layer in student_states.layers],  # type: ignore[union-attr]  # see `wanted`
            [layer[prompts.teacher_is_content] for layer in teacher_states.layers],  # type: ignore[union-attr]
            weights["alignment_distance"],
        )
    if "quantity" in wanted:
        parts["quantity"] = quantity_loss(audio.alpha_sum, audio.num_speech_tokens)
    if "response_ce" in wanted:
        head = OutputHead.of(language_model)
        targets = prompts.labels[:, 1:][predicts_response[:, :-1]]
        states_of_response = student_states.last[predicts_response]  # type: ignore[union-attr]  # see `wanted`
        parts["response_ce"] = linear_cross_entropy(states_of_response, targets, head.weight, **head.options)
    if "transcript_ce" in wanted:
        token_states = audio.token_states[is_within(audio.num_speech_tokens, audio.token_states.shape[1])]
        targets = prompts.teacher_input_ids[prompts.teacher_is_content]
        # The LLM's token embeddings double as the output matrix of the recogniser.
        embeddings = gathered_weight(language_model.get_input_embeddings())
        parts["transcript_ce"] = linear_cross_entropy(token_states, targets, embeddings)
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
        ends_of_turn=is_end.sum(),
    )
    divisors = counts if num_items_in_batch is None else ItemCounts(*num_items_in_batch.to(prompts.labels.device))
    if divisors.ends_of_turn is None and "end_of_turn_kl" in wanted:
        raise ValueError(
            f"The distillation option end_of_turn_kl needs num_items_in_batch with {len(ItemCounts._fields)} counts, "
            f"{ItemCounts._fields}, but got {len(num_items_in_batch)}."  # type: ignore[arg-type]
        )
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


def _kl_of_rows(
    states: dict[str, tuple[torch.Tensor, Any]], head: OutputHead, weights: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """Return the KL of each row of each pair of the student's states and the teacher's, or what is kept of these.

    All rows go through the vocabulary in one pass.
    """
    of_student, of_teacher = zip(*states.values())
    student_rows = torch.cat(of_student)
    teacher_rows = KeptTeacher.cat(of_teacher) if isinstance(of_teacher[0], KeptTeacher) else torch.cat(of_teacher)
    options = {"divergence": weights["divergence"], "jsd_beta": weights["jsd_beta"], **head.options}
    kl = linear_kl_of_rows(student_rows, teacher_rows, head.weight, weights["temperature"], **options)
    return dict(zip(states, kl.split([len(rows) for rows, _ in states.values()])))


def _check_same_tokens(name: str, in_student: torch.BoolTensor, in_teacher: torch.BoolTensor):
    num_student, num_teacher = torch.stack([in_student.sum(), in_teacher.sum()]).tolist()
    if num_student != num_teacher:
        raise ValueError(
            f"Speech and text prompts must hold the same {name} tokens, but hold {num_student} and {num_teacher}. "
            "Build both with BlspKdDataCollator."
        )
