"""`pipeline("audio-text-to-text")` and `pipeline("automatic-speech-recognition")` of a BLSP-KD model.

Follows the inputs and outputs of transformers' pipelines. transformers' own `pipeline("any-to-any")` does not need this
file. Leaves out: prompts without audio, several answers to one prompt.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from transformers.utils.chat_template_utils import Chat

from .audio_decoding import TooLongError
from .audio_loading import MAX_DURATION_S, SILENCE_PEAK
from .recording_chunks import SHORTEST_CHUNK_S, chunks_of, strides_of
from .spoken_inputs import load_clip, read_chat, read_input, user_turn
from .spoken_pipeline import SpokenInputPipeline
from .word_timestamps import tokens_with_times

# Long recordings are split into chunks, but all their samples are in memory at once: 0.9 GB at 16 kHz.
MAX_RECORDING_S = 4 * 3600.0


class BlspKdPipeline(SpokenInputPipeline):
    """Pipeline of the task "audio-text-to-text": answers spoken input.

    ```python
    pipe = pipeline("audio-text-to-text", model="org/name", trust_remote_code=True)
    pipe("question.wav", instruction="Name the animal.", max_new_tokens=32)
    # {"generated_text": "lion"}
    ```

    One input is

    - a clip: a path, `bytes`, a data URL, `(array, sampling_rate)`, an array, or a dict of `"array"` (or `"raw"`) and
      `"sampling_rate"`, of `"path"`, `"bytes"`, `"base64"` or `"url"`; see [`load_audio`];
    - `{"audio": clip, "instruction": text}`, or `"text"` for `"instruction"`;
    - a chat: a list of messages with `"role"` and `"content"`, whose audio blocks hold a clip:
      `{"type": "audio", "path": ...}`, with any of the keys above, or with `"audio"` for any kind of clip.

    One input gives one result, and a list of inputs gives a list. Generators, datasets and other iterables give a
    generator.

    Options, given when the pipeline is created or called:

    - `instruction`: what to do with the clip. By default the clip is the whole prompt.
    - `sampling_rate`: of bare arrays, Hz; defaults to the model's.
    - `allowed_url_prefixes`: URLs are refused unless they begin with one of these.
    - `chat_template_kwargs`: options of the LLM's chat template, such as `{"enable_thinking": False}`. They override
      the options saved with the processor.
    - `batch_size`; `num_workers` (1 decodes clips ahead, in a separate process); `streamer`; `generate_kwargs`.
    - all arguments of `generate` by name; `max_new_tokens` defaults to 256.
    """

    def preprocess(
        self,
        inputs: Any,
        instruction: str | None = None,
        sampling_rate: int | None = None,
        allowed_url_prefixes: list[str] | tuple[str, ...] = (),
        chat_template_kwargs: dict | None = None,
    ) -> Iterable[dict]:
        """Return the prompt of one input: a list of one dict of `text` and `features`, the input of `_forward`."""
        if isinstance(inputs, Chat):
            messages, clips = read_chat(inputs, self.processor.audio_token)
        else:
            clip, instruction, sampling_rate = read_input(
                inputs, instruction, sampling_rate, self.processor.audio_token
            )
            messages, clips = user_turn(instruction), [clip]
        rate = self.processor.feature_extractor.sampling_rate
        waveforms = [load_clip(clip, rate, sampling_rate, allowed_url_prefixes) for clip in clips]
        return [self._as_prompt(messages, waveforms, chat_template_kwargs)]

    def _as_prompt(self, messages: list[dict], waveforms: list[np.ndarray], chat_template_kwargs: dict | None) -> dict:
        rate = self.processor.feature_extractor.sampling_rate
        options = chat_template_kwargs or {}
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True, **options)
        self.processor.check_unicode([text])
        clips = [self.processor.extract_features([(waveform, rate)]) for waveform in waveforms]
        return {"text": text, "features": [clip["input_features"][0] for clip in clips]}

    def postprocess(self, answers: list[dict]) -> dict:
        return {"generated_text": self._decode(answers[0]["tokens"])}


class BlspKdSpeechRecognitionPipeline(BlspKdPipeline):
    """Pipeline of the task "automatic-speech-recognition": transcribes speech.

    ```python
    pipe = pipeline("automatic-speech-recognition", model="org/name", trust_remote_code=True)
    pipe("lecture.mp3", return_timestamps="word", chunk_length_s=20)
    # {"text": "the lion ran", "chunks": [{"text": "the", "timestamp": (0.31, 0.42)}, ...]}
    ```

    Accepts clips, as [`BlspKdPipeline`] does, and `{"audio": clip}`. Options in addition to those of
    [`BlspKdPipeline`]:

    - `instruction`: overrides `processor.transcription_instruction`.
    - `return_timestamps`: `"word"` (or True) or `"token"`; seconds from the start of the recording.
    - `chunk_length_s` (seconds): splits recordings into chunks of this length, which the LLM transcribes one by one, or
      `batch_size` at a time. It is required beyond ten minutes, and useful for recordings longer than those that the
      LLM was trained to repeat. Recordings may last four hours. Silent chunks are skipped.
    - `stride_length_s` (seconds, or a pair): how far a chunk's left and right margins overlap its neighbours; a sixth
      of its length by default. A chunk keeps the words whose middle, by their timestamps, lies between its margins, so
      that one of two neighbouring chunks contains a word at the cut completely. With 0 all words are kept.
    """

    def _sanitize_parameters(self, *, return_timestamps=None, chunk_length_s=None, stride_length_s=None, **options):
        preprocess_params, forward_params, postprocess_params = super()._sanitize_parameters(**options)
        if return_timestamps not in (None, False, True, "word", "token"):
            raise ValueError(f"return_timestamps must be 'word' (or True) or 'token', got {return_timestamps!r}.")
        if return_timestamps is not None:
            forward_params["return_timestamps"] = bool(return_timestamps)
            postprocess_params["return_timestamps"] = "word" if return_timestamps is True else return_timestamps
        if chunk_length_s is not None:
            preprocess_params["chunk_length_s"] = chunk_length_s
        if stride_length_s is not None:
            preprocess_params["stride_length_s"] = stride_length_s
        return preprocess_params, forward_params, postprocess_params

    def _own_options(self):
        return *super()._own_options(), "return_timestamps", "chunk_length_s", "stride_length_s"

    def _check_streamable(self, preprocess_params, forward_params):
        super()._check_streamable(preprocess_params, forward_params)
        if forward_params.get("return_timestamps") or preprocess_params.get("chunk_length_s") is not None:
            raise ValueError("stream gives the text of one clip as it comes: no return_timestamps, no chunk_length_s.")

    def preprocess(
        self,
        inputs: Any,
        instruction: str | None = None,
        sampling_rate: int | None = None,
        allowed_url_prefixes: list[str] | tuple[str, ...] = (),
        chat_template_kwargs: dict | None = None,
        chunk_length_s: float | None = None,
        stride_length_s: float | list | tuple | None = None,
    ) -> Iterator[dict]:
        """Yield the prompts of one recording, one per chunk."""
        if isinstance(inputs, Chat):
            raise TypeError('Speech recognition takes audio, not chats. For these there is "audio-text-to-text".')
        left_s, right_s = strides_of(chunk_length_s, stride_length_s)
        clip, instruction, sampling_rate = read_input(inputs, instruction, sampling_rate, self.processor.audio_token)
        messages = user_turn(instruction or self.processor.transcription_instruction)
        rate = self.processor.feature_extractor.sampling_rate
        max_duration_s = MAX_DURATION_S if chunk_length_s is None else MAX_RECORDING_S
        try:
            waveform = load_clip(clip, rate, sampling_rate, allowed_url_prefixes, max_duration_s)
        except TooLongError as error:
            if chunk_length_s is not None:
                raise
            raise TooLongError(
                f"{error} Or have the pipeline do it: chunk_length_s=20 takes recordings of up to "
                f"{MAX_RECORDING_S / 3600:g} hours."
            ) from None
        chunks = [(0, len(waveform), -np.inf, np.inf)]
        if chunk_length_s is not None:
            chunks = chunks_of(
                len(waveform),
                *(round(seconds * rate) for seconds in (chunk_length_s, left_s, right_s, SHORTEST_CHUNK_S)),
            )
            loud = [chunk for chunk in chunks if np.abs(waveform[chunk[0] : chunk[1]]).max() >= SILENCE_PEAK]
            chunks = loud or chunks[:1]
        for start, stop, keep_from, keep_to in chunks:
            prompt = self._as_prompt(messages, [waveform[start:stop]], chat_template_kwargs)
            keeps_s = (keep_from / rate, keep_to / rate) if left_s + right_s and len(chunks) > 1 else None
            yield {**prompt, "start_s": start / rate, "keeps_s": keeps_s}

    def _forward(self, prompts, return_timestamps=False, **generate_kwargs):
        # The times decide which words of chunks with margins are kept.
        return_timestamps = return_timestamps or any(prompt["keeps_s"] is not None for prompt in prompts)
        answers = super()._forward(prompts, return_timestamps=return_timestamps, **generate_kwargs)
        return [
            {**answer, "start_s": prompt["start_s"], "keeps_s": prompt["keeps_s"]}
            for answer, prompt in zip(answers, prompts)
        ]

    def postprocess(self, answers: list[dict], return_timestamps: bool | str = False) -> dict:
        texts: list[str] = []
        chunks: list[dict] = []
        for answer in answers:
            if "times" not in answer:
                texts.append(self._decode(answer["tokens"]).strip())
                continue
            words = self._kept_words(answer)
            units = self._tokens_of(answer, words) if return_timestamps == "token" else words
            if chunks and units and not units[0]["text"].startswith(" "):
                units[0]["text"] = " " + units[0]["text"]
            chunks += units
            is_whole = answer["keeps_s"] is None
            text = self._decode(answer["tokens"]) if is_whole else "".join(word["text"] for word in words)
            texts.append(text.strip())
        result = {"text": " ".join(text for text in texts if text)}
        return {**result, "chunks": chunks} if return_timestamps else result

    def _kept_words(self, answer: dict) -> list[dict]:
        """Return the words whose middle is in the chunk's own part, with their times in the recording."""
        start_s = answer["start_s"]
        words = [
            {"text": word["text"], "timestamp": tuple(start_s + time for time in word["timestamp"])}
            for word in self.processor.word_timestamps(answer["tokens"], answer["times"])
        ]
        if answer["keeps_s"] is None:
            return words
        keep_from, keep_to = answer["keeps_s"]
        return [word for word in words if keep_from <= sum(word["timestamp"]) / 2 < keep_to]

    def _tokens_of(self, answer: dict, words: list[dict]) -> list[dict]:
        """Return the tokens of the kept words, with their times in the recording."""
        tokens = []
        for token in tokens_with_times(self.processor.tokenizer, answer["tokens"], answer["times"]):
            start, end = (answer["start_s"] + time for time in token["timestamp"])
            if any(word["timestamp"][0] <= (start + end) / 2 <= word["timestamp"][1] for word in words):
                tokens.append({"text": token["text"], "timestamp": (start, end)})
        return tokens
