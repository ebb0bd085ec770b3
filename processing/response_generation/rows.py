"""Make the training rows of a block of source rows: check, ask, answer, and reject what training cannot use.

Every reject says where its row is in the source, and why it was rejected.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from processing.chat_templates import is_in_thought
from processing.manifests import BadRow
from processing.processing_blsp_kd import BlspKdProcessor
from processing.spoken_inputs import user_turn

from .engines import Answer, TransformersEngine, VllmEngine
from .normalisers import NORMALISERS
from .options import AnswerOptions, RowOptions, SourceOptions
from .sources import DatasetSource, ManifestSource, check_audio
from .templates import Instruction, choose
from .unfinished import Unfinished


class Prompt(NamedTuple):
    """A prompt for the LLM, and what becomes a training row with its answer."""

    row_index: int  # of the source row
    source_row: dict
    audio: Path | bytes
    audio_format: str
    row: dict
    token_ids: list[int]


@dataclass
class RowMaker:
    """Make the training rows of blocks of source rows.

    Args:
        max_prompt_tokens: longer prompts are rejected; the LLM's positions may allow fewer than `row_options` do.
        unfinished: where embedded audio is written.
    """

    source: ManifestSource | DatasetSource
    templates: list[Instruction]
    processor: BlspKdProcessor
    engine: TransformersEngine | VllmEngine
    unfinished: Unfinished
    source_options: SourceOptions
    row_options: RowOptions
    answer_options: AnswerOptions
    max_prompt_tokens: int

    def make(self, first_index: int, block: list) -> tuple[list[dict], list[dict]]:
        """Return the training rows and the rejects of a block, both in the order of its rows."""
        prompts, rejects = self._prompts(first_index, block)
        rows, places = [], {}
        answers: list[Answer] = []
        if prompts:
            answers = self.engine.answer([each.token_ids for each in prompts], [each.row["seed"] for each in prompts])
        for prompt, answer in zip(prompts, answers):
            if fault := self._fault(prompt.token_ids, answer.text):
                error = BadRow(f"answer: that of the LLM to template {prompt.row['template']!r} {fault}")
                rejects.append(self._reject(prompt.row_index, prompt.source_row, error))
                continue
            if prompt.row_index not in places:
                places[prompt.row_index] = self._place(prompt)
            made = {"audio": places[prompt.row_index], "response": answer.text, "finished": answer.is_finished}
            rows.append({**prompt.row, **made})
        return rows, sorted(rejects, key=lambda reject: reject[self.source.place_name])

    def _prompts(self, first_index: int, block: list) -> tuple[list[Prompt], list[dict]]:
        """Return the prompts of a block, and the rejects among its rows."""
        prompts, rejects = [], []
        how_many, seed = self.row_options.templates_per_row, self.answer_options.seed
        for index, raw in enumerate(block, start=first_index):
            source_row = {}
            try:
                source_row = self.source.parse(raw)
                audio, audio_format, common = self._prepare(source_row)
            except BadRow as error:
                rejects.append(self._reject(index, source_row, error))
                continue
            for template in choose(self.templates, how_many, seed, index):
                try:
                    row, token_ids = self._ask(index, source_row, common, template)
                except BadRow as error:
                    rejects.append(self._reject(index, source_row, error))
                else:
                    prompts.append(Prompt(index, source_row, audio, audio_format, row, token_ids))
        return prompts, rejects

    def _prepare(self, source_row: dict) -> tuple[Path | bytes, str, dict]:
        """Return a source row's audio, its format, and the fields that all training rows made of it share."""
        source_text = source_row.get(self.source_options.text_column)
        if not isinstance(source_text, str) or not source_text.strip():
            raise BadRow(f"text: expected some in {self.source_options.text_column!r}, got {source_text!r}")
        text = NORMALISERS[self.row_options.normaliser](source_text)
        if not text:
            raise BadRow(f"text: nothing is left of {source_text!r}")
        audio = self.source.audio(source_row)
        duration, audio_format = check_audio(audio, self.row_options.max_duration_s)
        kept = {name: source_row[name] for name in self.row_options.keep if source_row.get(name) is not None}
        return audio, audio_format, {**kept, "text": text, "duration": duration, "source_text": source_text}

    def _ask(self, index: int, source_row: dict, common: dict, template: Instruction) -> tuple[dict, list[int]]:
        """Return a training row without its answer, and the token ids of its prompt."""
        instruction = template.fill(source_row)
        if self.processor.audio_token in instruction + common["text"]:
            raise BadRow(f"text: holds the audio placeholder {self.processor.audio_token!r}")
        name = source_row.get("id")
        key = f"{self.answer_options.seed}/{index}/{template.name}"
        row = {
            "id": f"{index if name is None else name}-{template.name}",
            "audio": None,
            **common,
            "instruction": instruction,
            "response": None,
            "template": template.name,
            "seed": int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") >> 1,
            "engine": self.answer_options.engine,
        }
        try:
            json.dumps(row, ensure_ascii=False, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise BadRow(f"cannot be written as JSON: {error}") from error
        conversation = user_turn(instruction, {"type": "text", "text": row["text"]})
        prompt = self.processor.apply_chat_template(conversation, add_generation_prompt=True)
        token_ids = self.processor.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        if len(token_ids) > self.max_prompt_tokens:
            raise BadRow(f"text: too long, the prompt has {len(token_ids)} tokens, at most {self.max_prompt_tokens}")
        return row, token_ids

    def _fault(self, prompt: list[int], answer: str) -> str | None:
        """Return what makes an answer useless for training, if anything does."""
        if not answer:
            return "is empty"
        if self.processor.audio_token in answer:
            return "holds the audio placeholder"
        if is_in_thought(self.processor.decode(prompt) + answer):
            return (
                "ends within a thought. Raise --max_new_tokens, or have the LLM not think, for example with "
                "--chat_template_kwargs '{\"enable_thinking\": false}'"
            )
        return None

    def _place(self, prompt: Prompt) -> str:
        """Return the path of a row's audio, relative to the output; embedded audio becomes a file."""
        path = prompt.audio
        if isinstance(path, bytes):
            path = self.unfinished.keep_audio(prompt.row_index, path, prompt.audio_format)
        folder = self.unfinished.output.parent
        place = os.path.relpath(path, folder)
        if os.path.realpath(folder / place) != os.path.realpath(path):  # ".." after a symbolic link leads elsewhere
            place = os.path.relpath(os.path.realpath(path), os.path.realpath(folder))
        return Path(place).as_posix()

    def _reject(self, index: int, source_row: dict, error: BadRow) -> dict:
        audio = source_row.get(self.source_options.audio_column)
        return {
            self.source.place_name: index + self.source.first_place,
            "reason": printable(error),
            "audio": printable(audio.get("path") if isinstance(audio, dict) else audio),
            "text": printable(source_row.get(self.source_options.text_column)),
        }


def printable(value: Any) -> str | None:
    """Return text that can be written as UTF-8, whatever a bad row holds."""
    return None if value is None else str(value).encode(errors="backslashreplace").decode()
