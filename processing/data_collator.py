"""`BlspKdDataCollator`: collate (audio, transcript, instruction, response) rows into teacher and student batches.

Follows arXiv 2405.19041: both prompts are instruction + content; the content is the transcript for the teacher and the
audio for the student. The rows must already have responses, which the LLM itself should have generated.
"""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import ProcessorMixin

from .spoken_inputs import user_turn
from .teacher_distributions import lay_out

# A stand-in for the answer, to find out what a template writes around it. No template treats this character specially.
ANSWER = "\ue000"


@dataclass
class BlspKdDataCollator:
    """Collates rows into the inputs of a distillation step.

    Each row is a mapping with

    - `audio`: a clip as in [`load_audio`]; or `input_features`, the precomputed features of one clip. If it is None,
      the row is text only. Then teacher and student read the same prompt, so the KL is 0 while they are the same LLM,
      and only `response_ce` learns from the row. Its response tokens still count in the means;
    - `text`: the transcript;
    - `response`: the LLM's answer to instruction and text;
    - `instruction` (optional): what to do with the content;
    - `kept_teacher` (optional, in all rows of a batch or in none): what the teacher predicts, see
      `teacher_distributions.py`.

    The student's prompt is tokenised as at inference, with the placeholder in it. The teacher's prompt has the tokens
    of the transcript instead (CIF learns to fire that number of tokens), and is otherwise the same. The transcript and
    the response have the ids that they have within the whole text, see [`continue_ids`].

    Args:
        processor ([`BlspKdProcessor`]).
        transcript_bytes (`bool`): add the characters of the transcripts, which the distillation option `ctc` needs.
    """

    processor: Any
    transcript_bytes: bool = False

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """Collate B rows into right-padded batches; L is the length of the student's prompt, L' of the teacher's.

        Returns:
            `dict` of `input_ids`, `attention_mask`, `labels` (B, L); `teacher_input_ids`, `teacher_attention_mask`,
            `teacher_is_content`, `teacher_is_response` (B, L'); `input_features`, `input_features_mask`;
            `num_speech_tokens` (N,), the transcripts' token counts of the N rows with audio; on demand
            `transcript_bytes` (N, S), the UTF-8 bytes of these transcripts in lower case, -1 at padding; of rows with
            `kept_teacher` also `teacher_top_ids` (B, L', K) and `teacher_top_log_probs` (B, L', K + 1). The features
            of a batch without any have the shape (0, ...).

        Raises:
            ValueError: a row lacks a field or has an invalid one; the message gives the row's index in the batch.
        """
        pieces = self._tokenize(rows)
        audio_token_id = self.processor.audio_token_id
        for index, row in enumerate(rows):
            if "audio" not in row and "input_features" not in row:  # a misspelt name must not make a text-only row
                raise ValueError(
                    f"Row {index} of the batch has no 'audio' (its fields: {sorted(row)}). A row of text only says so "
                    "with audio=None."
                )
        is_spoken = [is_spoken_row(row) for row in rows]
        student = [
            (prefix, [audio_token_id] if spoken else content, suffix, response)
            for (prefix, content, suffix, response), spoken in zip(pieces, is_spoken)
        ]
        input_ids, attention_mask, _, is_response = self._join(student)
        spoken_rows = [row for row, spoken in zip(rows, is_spoken) if spoken]
        of_teacher = self._text_prompts(pieces, is_spoken)
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": input_ids.masked_fill(~is_response, -100),
            **of_teacher,
            **lay_out([row.get("kept_teacher") for row in rows], of_teacher),
            "num_speech_tokens": torch.tensor(
                [len(content) for (_, content, _, _), spoken in zip(pieces, is_spoken) if spoken], dtype=torch.long
            ),
            **(transcript_bytes(spoken_rows) if self.transcript_bytes else {}),
            **self._features(spoken_rows),
        }

    def text_prompts(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """Return the teacher's inputs alone, which need no audio: those of the batch that begin with `teacher_`."""
        return self._text_prompts(self._tokenize(rows), [is_spoken_row(row) for row in rows])

    def _text_prompts(self, pieces, is_spoken: list[bool]) -> dict[str, torch.Tensor]:
        input_ids, attention_mask, is_content, is_response = self._join(pieces)
        return {
            "teacher_input_ids": input_ids,
            "teacher_attention_mask": attention_mask,
            "teacher_is_content": is_content & torch.tensor(is_spoken)[:, None],
            "teacher_is_response": is_response,
        }

    def _tokenize(self, rows: list[dict]) -> list[tuple[list[int], list[int], list[int], list[int]]]:
        """Return each row's token ids: before the content, content, between content and response, response."""
        processor = self.processor
        for index, row in enumerate(rows):
            self._check(index, row)
        texts = [split_prompt(processor, row.get("instruction"), row["response"].strip()) for row in rows]
        prompts = [f"{prefix}{processor.audio_token}{suffix}" for prefix, suffix, _ in texts]
        prompt_ids = processor.tokenize(prompts, add_special_tokens=False)["input_ids"]
        places = [ids.index(processor.audio_token_id) for ids in prompt_ids]
        prefix_ids = [ids[:place] for ids, place in zip(prompt_ids, places)]
        contents = continue_ids(
            processor, [prefix for prefix, _, _ in texts], prefix_ids, [row["text"].strip() for row in rows]
        )
        responses = continue_ids(processor, prompts, prompt_ids, [response for _, _, response in texts])
        suffix_ids = [ids[place + 1 :] for ids, place in zip(prompt_ids, places)]
        return list(zip(prefix_ids, contents, suffix_ids, responses))

    def _check(self, index: int, row: dict):
        for field in ("text", "response"):
            if not isinstance(row.get(field), str) or not row[field].strip():
                raise ValueError(
                    f"Row {index} of the batch needs a non-empty string {field!r}, got {row.get(field)!r} "
                    f"(row: { {key: row[key] for key in row if key not in ('audio', 'input_features')} })."
                )
        if self.processor.audio_token in f"{row.get('instruction')} {row['text']} {row['response']}":
            raise ValueError(
                f"Row {index} of the batch holds the audio placeholder {self.processor.audio_token!r} in its "
                "instruction, text or response. Remove it: the collator places it."
            )

    def _join(self, pieces):
        """Concatenate the four pieces of each row, pad, and mark content and response."""
        pad_token_id = self.processor.tokenizer.pad_token_id
        ids = [torch.tensor([*prefix, *content, *suffix, *response]) for prefix, content, suffix, response in pieces]
        lengths = torch.tensor([len(row) for row in ids])[:, None]
        position = torch.arange(int(lengths.max()))
        content_start = torch.tensor([len(prefix) for prefix, _, _, _ in pieces])[:, None]
        content_stop = torch.tensor([len(prefix) + len(content) for prefix, content, _, _ in pieces])[:, None]
        response_start = lengths - torch.tensor([len(response) for _, _, _, response in pieces])[:, None]
        return (
            pad_sequence(ids, batch_first=True, padding_value=pad_token_id),
            (position < lengths).long(),
            (position >= content_start) & (position < content_stop),
            (position >= response_start) & (position < lengths),
        )

    def _features(self, rows) -> dict[str, torch.Tensor]:
        """Return the features of the rows with audio, (N, ...)."""
        if not rows:
            # Zero clips, but in the shape of real features, because the trainer counts clips by the first axis.
            tone = {"array": np.sin(np.arange(8_000, dtype=np.float32)), "sampling_rate": 16_000}
            features = self.processor.extract_features([tone])
            return {name: torch.from_numpy(values)[:0] for name, values in features.items()}
        if all(row.get("input_features") is not None for row in rows):
            features = self.processor.pad_features([np.asarray(row["input_features"]) for row in rows])
        else:
            features = self.processor.extract_features([row["audio"] for row in rows])
        return {name: torch.from_numpy(values) for name, values in features.items()}


def transcript_bytes(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Return the UTF-8 bytes of the rows' transcripts, lower-cased, because capitals cannot be told from speech."""
    texts = [torch.tensor([*row["text"].strip().lower().encode()], dtype=torch.long) for row in rows]
    # No row gives the shape (0, 0).
    padded = pad_sequence(texts, batch_first=True, padding_value=-1) if texts else torch.empty(0, 0, dtype=torch.long)
    return {"transcript_bytes": padded}


def is_spoken_row(row: dict) -> bool:
    """Return whether a row has audio, or the features of audio."""
    return row.get("audio") is not None or row.get("input_features") is not None


def split_prompt(processor: ProcessorMixin, instruction: str | None, response: str) -> tuple[str, str, str]:
    """Render one dialogue with the LLM's chat template and cut it around the content.

    Returns:
        `tuple[str, str, str]`: the text before the content, the text between content and response, and the response
        from where the LLM begins to answer, with the token that ends its turn.
    """
    question = user_turn(instruction)
    prompt = processor.apply_chat_template(question, add_generation_prompt=True)
    prefix, suffix = prompt.split(processor.audio_token)
    dialogue = processor.apply_chat_template([*question, {"role": "assistant", "content": ANSWER}])
    start, _, end = dialogue.rpartition(ANSWER)
    # Finished turns may have text between prompt and answer. The LLM generates it if it is white space (Llama 2), but
    # not if it is anything else, such as an empty thought.
    gap = start.removeprefix(prompt) if start.startswith(prompt) else ""
    gap = "" if gap.strip() else gap
    return prefix, suffix, f"{gap}{response}{_end_of_turn(processor.tokenizer, end)}"


def _end_of_turn(tokenizer, text: str) -> str:
    """Return the text that a template writes after an answer, up to the first special token, which ends generation.

    Some templates write more after this token (Phi-3: a line break and another token). If a template writes no special
    token (GLM-4, whose turns end where the next begins), return the tokenizer's EOS.
    """
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    found = re.search("|".join(re.escape(token) for token in sorted(special, key=len, reverse=True)), text)
    if found:
        return text[: found.end()]
    if tokenizer.eos_token is None:
        raise ValueError(
            f"Neither the chat template nor the tokenizer tells what ends an answer: after it stands {text!r:.80}, "
            "without a special token, and the tokenizer has no eos_token. Set it."
        )
    return tokenizer.eos_token


def continue_ids(
    processor: ProcessorMixin, contexts: list[str], context_ids: list[list[int]], texts: list[str]
) -> list[list[int]]:
    """Return the token ids of texts that follow contexts with given ids.

    Context and text are tokenised together, and the ids of the context are removed, because SentencePiece tokenizers
    write a "▁" before a text that stands alone, but not within a line. Sometimes the tokenizer would merge the last
    token of the context with the text. Then the context keeps its ids, which are the prompt at inference, and the text
    gets the ids that it has at the start of a line, or else after a special token.
    """
    wholes = processor.tokenize([before + text for before, text in zip(contexts, texts)], add_special_tokens=False)[
        "input_ids"
    ]
    continued = []
    for whole, ids, text in zip(wholes, context_ids, texts):
        if whole[: len(ids)] != ids:
            for border in ("\n", processor.audio_token):
                ids, whole = processor.tokenize([border, border + text], add_special_tokens=False)["input_ids"]
                if whole[: len(ids)] == ids:
                    break
        continued.append(whole[len(ids) :])
    return continued
