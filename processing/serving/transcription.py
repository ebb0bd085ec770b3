"""Transcribe a recording: encode it, ask the engine to repeat it, and time the words of its answer.

Follows the speech recognition pipeline, whose chunks and words these are. Leaves out: the forms of the result
(`transcript_forms.py`).
"""

import asyncio
from typing import NamedTuple

import torch

from processing import BlspKdSpeechRecognitionPipeline
from processing.spoken_inputs import user_turn

from .clip_cache import EncodedClip
from .errors import BadRequest, EngineRefused, EngineUnreachable
from .front import Front
from .speech_parts import key_of

# Chunks of one recording that are encoded, and asked about, at the same time.
CHUNKS_AT_ONCE = 8


class Transcript(NamedTuple):
    """Holds what is said in a recording.

    Args:
        words (`list[dict]`, *optional*): `text`, with the white space before it, and `timestamp`, seconds;
            None if not asked for.
        num_prompt_tokens, num_answer_tokens (`int`): of all chunks, as the engine counts them.
    """

    text: str
    words: list[dict] | None
    num_prompt_tokens: int
    num_answer_tokens: int


class Transcriber:
    """Transcribes recordings of a front's clients."""

    def __init__(self, front: Front):
        self.front = front
        # Its `preprocess` and `postprocess`; the model here does not generate.
        self.pipeline = BlspKdSpeechRecognitionPipeline(model=front.encoder.model, processor=front.processor)

    async def transcribe(self, contents: bytes, temperature: float = 0.0, with_words: bool = False) -> Transcript:
        """Transcribe an audio file.

        Raises:
            BadRequest: it is unusable, or the model cannot time words.
            ServingError: see [`Front.encode`] and [`Engine.ask`].
        """
        if with_words and not self.front.encoder.tells_times:
            raise BadRequest("This model cannot tell when words are said. Ask for response_format 'json' or 'text'.")
        chunks = await asyncio.to_thread(self._chunks_of, contents)
        answers, usages = [], []
        for start in range(0, len(chunks), CHUNKS_AT_ONCE):
            group = chunks[start : start + CHUNKS_AT_ONCE]
            clips = await self.front.encode_features({chunk["key"]: chunk["read_features"] for chunk in group})
            asked = [self._answer(chunk, clips[chunk["key"]], temperature, with_words) for chunk in group]
            for answer, usage in await asyncio.gather(*asked):
                answers.append(answer)
                usages.append(usage)
        result = self.pipeline.postprocess(answers, return_timestamps="word" if with_words else False)
        return Transcript(
            result["text"],
            result.get("chunks"),
            sum(usage.get("prompt_tokens", 0) for usage in usages),
            sum(usage.get("completion_tokens", 0) for usage in usages),
        )

    def _chunks_of(self, contents: bytes) -> list[dict]:
        """Return the chunks of a recording, each with its key, a reader of its features, and its place."""
        key, chunk_length_s = key_of(contents), self.front.settings.chunk_length_s
        if chunk_length_s is None:
            whole = {"key": key, "read_features": lambda: self.front.read_features(contents)}
            return [{**whole, "start_s": 0.0, "keeps_s": None}]
        try:
            prompts = list(self.pipeline.preprocess(contents, chunk_length_s=chunk_length_s))
        except (ValueError, TypeError) as error:
            raise BadRequest(str(error), "file") from error
        return [
            {
                "key": key if len(prompts) == 1 else f"{key}:{chunk_length_s}:{number}",
                "read_features": lambda features=prompt["features"][0]: features,
                "start_s": prompt["start_s"],
                "keeps_s": prompt["keeps_s"],
            }
            for number, prompt in enumerate(prompts)
        ]

    async def _answer(self, chunk: dict, clip: EncodedClip, temperature: float, with_words: bool) -> tuple[dict, dict]:
        """Return the answer to a chunk in the form that the pipeline takes, and the engine's usage."""
        [turn] = user_turn(self.front.processor.transcription_instruction)
        content = [{**block, "key": chunk["key"]} if block["type"] == "audio" else block for block in turn["content"]]
        body = {"temperature": temperature, "return_token_ids": True}
        messages = [{**turn, "content": content}]
        response = await self.front.engine.ask(self.front.request_to_engine(body, messages, {chunk["key"]: clip}))
        if response.status_code != 200:
            raise EngineRefused(response.status_code, response.content)
        completion = response.json()
        token_ids = completion["choices"][0].get("token_ids")
        if token_ids is None:
            raise EngineUnreachable("The engine returns no token_ids, which the times of words need. Update it.")
        answer = {"tokens": torch.tensor(token_ids, dtype=torch.long)}
        answer |= {"start_s": chunk["start_s"], "keeps_s": chunk["keeps_s"]}
        if with_words or chunk["keeps_s"] is not None:
            answer["times"] = self.front.encoder.word_times(token_ids, clip)
        return answer, completion.get("usage") or {}
