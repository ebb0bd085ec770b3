"""The on-policy stage: the student answers from speech, and the teacher scores the tokens of the student's answers.

Follows GKD (arXiv 2306.13649) and CORD (arXiv 2601.16547): at inference an LLM goes on from its own tokens, so it is
trained on them, too. The other rows replay the given responses. Leaves out: the divergence, an option of the model, and
rewards for whole answers.

Everything follows from seed, step and rows, so a resumed training gives the same answers. Which rows are answered does
not depend on how they lie in batches and processes; sampled tokens do.

Shapes: B rows, L and L' length of the student's and the teacher's prompts with their responses.
"""

import zlib
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from ..frozen import frozen
from ..row_weights import end_of_turn_ids

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class OnPolicyOptions:
    """Says how the student answers.

    Args:
        share (`float`): of the rows with audio, in (0, 1]; the others keep their responses.
        temperature (`float`): of sampling; 0: the most likely token.
        max_new_tokens (`int`): longest answer. One that is cut there ends without an end of turn.
    """

    share: float
    temperature: float = 1.0
    max_new_tokens: int = 32

    def __post_init__(self):
        if not 0 < self.share <= 1:
            raise ValueError(f"The share of rows that the student answers must lie in (0, 1], got {self.share}.")
        if self.temperature < 0:
            raise ValueError(f"The temperature of the student's answers must be at least 0, got {self.temperature}.")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens of the student's answers must be at least 1, got {self.max_new_tokens}.")


def with_own_answers(
    model: PreTrainedModel, batch: Batch, options: OnPolicyOptions, seed: int, step: int, place: int, in_step: bool
) -> tuple[Batch, torch.Tensor]:
    """Return a batch of [`BlspKdDataCollator`] in which the student has answered its share of the rows.

    Args:
        seed, step: of the training; rows are chosen by them.
        place: which batch of the optimiser step this is, over all processes; with sampling, each has its own numbers.
        in_step: other processes answer at the same time, and each must run the model, even if for nothing.

    Returns:
        `tuple`: the batch, and the number of tokens and of rows that were answered, a float tensor of shape (2,).

    Raises:
        ValueError: the batch brings the teacher's predictions, which are of the given responses.
    """
    if "teacher_top_ids" in batch:
        raise ValueError(
            "On-policy rows need the teacher itself: what was kept of it is of the given responses. Leave out the kept "
            "teacher, or the on-policy share."
        )
    chosen = [
        row for row in _spoken_rows(batch, model.config.audio_token_id) if _draw(batch, row, seed, step) < options.share
    ]
    answers: dict[int, torch.Tensor] = {}
    if chosen or in_step:
        devices = [model.device] if model.device.type == "cuda" else []
        with torch.random.fork_rng(devices), frozen(model):
            torch.manual_seed(zlib.crc32(f"{seed} {step} {place}".encode()))
            answers = dict(zip(chosen, _answer(model, batch, chosen or [0], options)))
    tokens = sum(len(answer) for answer in answers.values())
    answered = torch.tensor([tokens, len(answers)], dtype=torch.float32, device=batch["labels"].device)
    return (_replace_responses(batch, answers) if answers else batch), answered


def _spoken_rows(batch: Batch, audio_token_id: int) -> list[int]:
    """Return the rows that have audio and a response."""
    has_both = (batch["input_ids"] == audio_token_id).any(1) & (batch["labels"] != -100).any(1)
    return has_both.nonzero().flatten().tolist()


def _draw(batch: Batch, row: int, seed: int, step: int) -> float:
    """Return a number in [0, 1) that depends on the contents of a row, the seed and the step."""
    ids = batch["teacher_input_ids"][row][batch["teacher_attention_mask"][row].bool()]
    return zlib.crc32(f"{seed} {step} {ids.tolist()}".encode()) / 2**32


def _answer(model: PreTrainedModel, batch: Batch, rows: list[int], options: OnPolicyOptions) -> list[torch.Tensor]:
    """Return the tokens that the student answers, up to the end of its turn, for each of the rows."""
    is_audio = (batch["input_ids"] == model.config.audio_token_id).any(1)
    starts = [_response_start(batch["labels"][row] != -100) for row in rows]
    prompts = [batch["input_ids"][row, :start] for row, start in zip(rows, starts)]
    pad_id = model.config.get_text_config().pad_token_id or 0
    input_ids = pad_sequence(prompts, batch_first=True, padding_value=pad_id, padding_side="left")
    ones = [torch.ones_like(prompt) for prompt in prompts]
    clips = (is_audio.cumsum(0) - 1)[rows][is_audio[rows]]
    features = {}
    if len(clips):
        names = ["input_features", "input_features_mask", *(["num_speech_tokens"] if model.adapter.one_to_one else [])]
        features = {name: batch[name][clips] for name in names}
    output = model.generate(
        input_ids=input_ids,
        attention_mask=pad_sequence(ones, batch_first=True, padding_side="left"),
        **features,
        max_new_tokens=options.max_new_tokens,
        do_sample=options.temperature > 0,
        temperature=options.temperature or 1.0,
        # From the student's distribution itself, whatever the LLM's generation config says.
        **{"top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "num_beams": 1},
    )[:, input_ids.shape[1] :]
    ends = torch.tensor(end_of_turn_ids(model.generation_config.eos_token_id), device=output.device)
    is_end = torch.isin(output, ends)
    # Up to the first end of turn, and with it.
    is_answer = is_end.cumsum(1) - is_end.long() == 0
    return [tokens[mask] for tokens, mask in zip(output, is_answer)]


def _response_start(is_response: torch.Tensor) -> int:
    """Return where a response begins in a row (L,); its end if there is none."""
    return int(is_response.long().argmax()) if is_response.any() else len(is_response)


def _replace_responses(batch: Batch, answers: dict[int, torch.Tensor]) -> Batch:
    """Return a batch with other responses in some rows."""
    made: dict[str, list[torch.Tensor]] = {name: [] for name in ("input_ids", "labels", "teacher_ids", "is_response")}
    for row in range(len(batch["input_ids"])):
        of_row = {}
        for ids, mask, is_response in (
            ("input_ids", "attention_mask", batch["labels"][row] != -100),
            ("teacher_input_ids", "teacher_attention_mask", batch["teacher_is_response"][row]),
        ):
            valid = batch[mask][row].bool()
            tokens, is_response = batch[ids][row][valid], is_response[valid]
            if row in answers:
                start = _response_start(is_response)
                tokens = torch.cat([tokens[:start], answers[row]])
                is_response = torch.arange(len(tokens), device=tokens.device) >= start
            of_row[ids] = tokens, is_response
        (student, in_student), (teacher, in_teacher) = of_row.values()
        made["input_ids"].append(student)
        made["labels"].append(student.masked_fill(~in_student, -100))
        made["teacher_ids"].append(teacher)
        made["is_response"].append(in_teacher)

    def pad(rows: list[torch.Tensor], value: int = 0) -> torch.Tensor:
        return pad_sequence(rows, batch_first=True, padding_value=value)

    teacher_mask = pad([torch.ones_like(row) for row in made["teacher_ids"]])
    # The transcript stands before the response, so its places stay.
    is_content = batch["teacher_is_content"][:, : teacher_mask.shape[1]]
    is_content = torch.nn.functional.pad(is_content, (0, teacher_mask.shape[1] - is_content.shape[1]))
    return {
        **batch,
        "input_ids": pad(made["input_ids"]),
        "attention_mask": pad([torch.ones_like(row) for row in made["input_ids"]]),
        "labels": pad(made["labels"], -100),
        "teacher_input_ids": pad(made["teacher_ids"]),
        "teacher_attention_mask": teacher_mask,
        "teacher_is_content": is_content,
        "teacher_is_response": pad(made["is_response"]),
    }
