"""The systems that are compared, and what they predict for rows.

- text: the LLM reads the gold transcript; the upper bound for the systems that read audio.
- speech: the BLSP-KD model gets the clip.
- blind: the LLM gets the instruction alone; what can be guessed without the clip.
- cascade: a recogniser transcribes the clip, and the LLM reads the transcript.

All four get the same instruction. The LLM is the model's own, with partial LoRA off wherever there is no audio. Leaves
out: scores, see `scoring.py`.
"""

from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedConfig

from modeling_blsp_kd.distillation_step import LOSS_PARTS
from processing import BlspKdDataCollator
from processing.spoken_inputs import user_turn

from .answering import answer, answer_rows
from .recognition import Recognizer, transcribe
from .word_times import errors_of

SYSTEMS = ("text", "speech", "blind", "cascade")
TASKS = ("answers", "transcripts", "translation", "alignment")
KEPT = ("id", "text", "instruction", "answer", "translation", "kind", "voice", "voice_group")


def names_of(known: tuple[str, ...]) -> Callable[[str], tuple[str, ...]]:
    """Return a reader, for argparse, of names that are separated by commas, into the order in which they are known."""

    def read(text: str) -> tuple[str, ...]:
        given = text.split(",")
        if not set(given) <= set(known):
            raise ArgumentTypeError(f"expected some of {','.join(known)}, got {text!r}")
        return tuple(name for name in known if name in given)

    return read


@contextmanager
def paper_losses(config: PreTrainedConfig) -> Iterator[None]:
    """Measure the paper's KL(teacher || student), the mean over all tokens, whatever a model was trained with."""
    given = config.distillation
    weights = {name: value for name, value in given.items() if name in LOSS_PARTS or name == "temperature"}
    try:
        config.distillation = {**weights, "layer_alignment": 0.0, "ctc": 0.0}
        yield
    finally:
        config.distillation = given


@dataclass
class Systems:
    """Predicts for batches of rows, whose `audio` is a clip as in `load_audio`.

    Args:
        model, processor: a BLSP-KD model. With `answers` the model may be None, unless `alignment` is among the tasks
            or the model itself is the recogniser.
        tasks: of `TASKS`. A row takes part in those that it has the fields for.
        recognizer: of the cascade, see `load_recognizer`; the model itself if omitted. Several come as a dict by the
            names of their systems, see `name_cascades`.
        translation_instruction: what to ask where a row has a translation.
        max_new_tokens: longest answer.
        answers: returns the answers to chats, given their greatest length; of the model if omitted.
    """

    model: Any
    processor: Any
    tasks: tuple[str, ...] = TASKS
    recognizer: Any = None
    translation_instruction: str | None = None
    max_new_tokens: int = 64
    answers: Callable[[list[list[dict]], int], list[str]] | None = None
    collator: BlspKdDataCollator = field(init=False)
    recognizers: dict[str, Any] = field(init=False)

    def __post_init__(self):
        if self.model is not None:
            self.model.eval()
        self.collator = BlspKdDataCollator(self.processor)
        if self.recognizer is None:
            self.recognizer = Recognizer(lambda clips: transcribe(self.model, self.processor, clips), self.model)
        several = isinstance(self.recognizer, dict)
        self.recognizers = self.recognizer if several else {"cascade": self.recognizer}

    def predict(self, system: str, rows: list[dict]) -> list[dict]:
        """Return what a system predicts: for each row its fields but the audio, and

        - `predicted`: a text for each task; of the cascade always its transcript;
        - `alignment` (speech): for each part of the distillation loss its sum and count in this row;
        - `word_errors_s` and `num_words` (speech, rows with `words`): how much too late words start and end.
        """
        is_cascade = system in self.recognizers
        if is_cascade:
            transcripts = self.recognizers[system]([row["audio"] for row in rows])
            contents: list[dict | None] = [{"type": "text", "text": transcript} for transcript in transcripts]
        else:
            contents = [self._content(system, row) for row in rows]
        # A row whose question asks for the transcript or the translation is asked once.
        asked = [self._instructions(row) for row in rows]
        if is_cascade:
            for of_row in asked:
                of_row.pop("transcripts", None)
        distinct = list(dict.fromkeys((index, text) for index, of_row in enumerate(asked) for text in of_row.values()))
        turns = [
            user_turn(None, {"type": "text", "text": instruction or ""})
            if contents[index] is None
            else user_turn(instruction, contents[index])
            for index, instruction in distinct
        ]
        if self.answers is None:
            answers = answer(self.model, self.processor, turns, self.max_new_tokens, batch_size=len(rows))
        else:
            answers = self.answers(turns, self.max_new_tokens)
        answer_to = dict(zip(distinct, answers))
        lines = []
        for index, (row, of_row) in enumerate(zip(rows, asked)):
            predicted = {task: answer_to[index, instruction] for task, instruction in of_row.items()}
            if is_cascade:
                predicted["transcripts"] = transcripts[index]
            lines.append({**{name: row[name] for name in KEPT if name in row}, "predicted": predicted})
        if system == "speech" and "alignment" in self.tasks:
            self._align(rows, lines)
        return lines

    def _content(self, system: str, row: dict) -> dict | None:
        if system == "blind":
            return None
        is_heard = system == "speech"
        return {"type": "audio", "audio": row["audio"]} if is_heard else {"type": "text", "text": row["text"]}

    def _instructions(self, row: dict) -> dict[str, str | None]:
        """Return the questions about a row, by task."""
        instructions = {}
        if "answers" in self.tasks and "answer" in row:
            instructions["answers"] = row.get("instruction")
        if "transcripts" in self.tasks:
            instructions["transcripts"] = self.processor.transcription_instruction
        if "translation" in self.tasks and "translation" in row:
            if not self.translation_instruction:
                raise ValueError(
                    f"Row {row['id']} has a translation to compare with. Tell what to ask for: "
                    '--translation_instruction "Translate into German.", or leave the task out.'
                )
            instructions["translation"] = self.translation_instruction
        return instructions

    def _align(self, rows: list[dict], lines: list[dict]):
        """Add to the lines of `speech` the KLs between the LLM's predictions after speech and after the text."""
        unanswered = [row for row in rows if not row.get("response")]
        made = answer_rows(
            self.model, self.processor, unanswered, "text", max_new_tokens=self.max_new_tokens, description=None
        )
        responses = {row["id"]: response for row, response in zip(unanswered, made)}
        timed = [index for index, row in enumerate(rows) if row.get("words") and self.model.adapter.one_to_one]
        for index, errors in zip(timed, self._word_errors([rows[index] for index in timed])):
            lines[index] |= {"word_errors_s": errors, "num_words": len(rows[index]["words"])}
        for row, line in zip(rows, lines):
            response = row.get("response") or responses[row["id"]]
            if not response.strip():
                continue  # the LLM has nothing to say to this text, so there is nothing to compare
            # One row at a time, since the loss sums over its batch and intervals need each row's share.
            batch = self.collator([{**row, "response": response}])
            with torch.inference_mode(), paper_losses(self.model.config):
                parts = self.model(**{name: values.to(self.model.device) for name, values in batch.items()}).loss_parts
            line["alignment"] = {name: part.tolist() for name, part in parts.items()}

    @torch.inference_mode()
    def _word_errors(self, rows: list[dict]) -> list[list]:
        if not rows:
            return []
        instruction = self.processor.transcription_instruction
        inputs = self.processor.apply_chat_template(
            [user_turn(instruction, {"type": "audio", "audio": row["audio"]}) for row in rows],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
        ).to(self.model.device)
        output = self.model.generate(
            **inputs, max_new_tokens=self.max_new_tokens, do_sample=False, return_timestamps=True
        )
        return [
            errors_of(row, self.processor.word_timestamps(sequence, times))
            for row, sequence, times in zip(rows, output.sequences, output.token_timestamps)
        ]
