"""`pipeline("audio-text-to-text")` and `pipeline("automatic-speech-recognition")` of a BLSP-KD model.

Follows the inputs and outputs of transformers' pipelines. transformers' own `pipeline("any-to-any")` does not need this
file. Leaves out: prompts without audio, several answers to one prompt.
"""

import threading
from collections.abc import Sized
from itertools import islice
from numbers import Real

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer
from transformers.pipelines.base import ChunkPipeline
from transformers.utils.chat_template_utils import Chat

from .audio_decoding import TooLongError
from .audio_loading import MAX_DURATION_S, SILENCE_PEAK
from .chat_templates import check_options
from .spoken_inputs import as_chat, as_inputs, check_text, load_clip, read_chat, read_input, user_turn

GENERATE_ARGUMENTS = (
    "generation_config",
    "logits_processor",
    "stopping_criteria",
    "prefix_allowed_tokens_fn",
    "assistant_model",
    "streamer",
)
# If the rest of a recording is shorter than this, it becomes part of the chunk before it.
SHORTEST_CHUNK_S = 0.1
# Long recordings are split into chunks, but all their samples are in memory at once: 0.9 GB at 16 kHz.
MAX_RECORDING_S = 4 * 3600.0


class BlspKdPipeline(ChunkPipeline):
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

    _load_processor = True
    _load_tokenizer = False
    _load_feature_extractor = False
    _load_image_processor = False
    _load_video_processor = False
    _pipeline_calls_generate = True
    _default_generation_config = GenerationConfig(max_new_tokens=256)

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.model.config.model_type != "blsp_kd" or self.processor is None:
            raise ValueError(
                f"{type(self).__name__} needs a BLSP-KD model and its processor, got a model of type "
                f"{self.model.config.model_type!r} and {type(self.processor).__name__} as processor."
            )

    def _sanitize_parameters(
        self,
        instruction=None,
        sampling_rate=None,
        allowed_url_prefixes=None,
        chat_template_kwargs=None,
        generate_kwargs=None,
        **generate_options,
    ):
        given = {
            "instruction": instruction,
            "sampling_rate": sampling_rate,
            "allowed_url_prefixes": allowed_url_prefixes,
            "chat_template_kwargs": chat_template_kwargs
            and check_options(chat_template_kwargs, self.processor.chat_template),
        }
        known = {*GENERATE_ARGUMENTS, *(name for name in vars(GenerationConfig()) if not name.startswith("_"))}
        unknown = sorted(set(generate_options) - known)
        if unknown:
            raise ValueError(
                f"Unknown option(s) {unknown} of {type(self).__name__}. It takes {sorted(self._own_options())}, "
                "'batch_size', 'num_workers', 'generate_kwargs' and the arguments of generate, such as "
                "'max_new_tokens'."
            )
        generate_kwargs = generate_kwargs or {}
        twice = sorted(set(generate_kwargs) & set(generate_options))
        if twice:
            raise ValueError(f"{twice} given twice, as option(s) and in generate_kwargs. Give each once.")
        if instruction is not None:
            check_text(instruction, "instruction", self.processor.audio_token)
        if getattr(self, "assistant_model", None) is not None:
            # transformers took it when the pipeline was created, and leaves it to us to pass it on.
            generate_options = {"assistant_model": self.assistant_model, **generate_options}
        preprocess_params = {name: value for name, value in given.items() if value is not None}
        return preprocess_params, {**generate_kwargs, **generate_options}, {}

    def _own_options(self) -> tuple[str, ...]:
        return "instruction", "sampling_rate", "allowed_url_prefixes", "chat_template_kwargs"

    def __call__(self, inputs, **options):
        """Answer one input, a list of inputs, or an iterable of inputs; see the class.

        Raises:
            ValueError, TypeError, FileNotFoundError: an input or option is unusable. If there are several inputs, the
                message names the bad one.
        """
        return super().__call__(as_inputs(inputs), **options)

    def stream(self, inputs, **options):
        """Answer one input piece by piece.

        Generation runs in its own thread. It stops when the generator is closed or deleted. Its errors are raised here.

        Returns:
            a generator of `str`: the pieces of the text, to be joined without a separator.
        """
        preprocess_params, forward_params, _ = self._sanitize_parameters(**options)
        preprocess_params = {**self._preprocess_params, **preprocess_params}
        forward_params = {**self._forward_params, **forward_params}
        self._check_streamable(preprocess_params, forward_params)
        [prompt] = self.preprocess(as_chat(as_inputs(inputs)), **preprocess_params)
        return self._pieces(prompt, forward_params)

    def _check_streamable(self, preprocess_params: dict, forward_params: dict):
        if forward_params.get("streamer") is not None:
            raise ValueError("stream makes a streamer of its own. Call the pipeline itself to use another one.")

    def _pieces(self, prompt: dict, forward_params: dict):
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        is_abandoned, errors = threading.Event(), []
        criteria = [*(forward_params.get("stopping_criteria") or []), _StopsWhen(is_abandoned)]
        forward_params = {**forward_params, "streamer": streamer, "stopping_criteria": StoppingCriteriaList(criteria)}

        def generate():
            try:
                self.forward([prompt], **forward_params)
            except BaseException as error:  # errors of any kind are raised in the caller's thread
                errors.append(error)
            finally:
                streamer.text_queue.put(streamer.stop_signal)

        thread = threading.Thread(target=generate, daemon=True)
        thread.start()
        try:
            yield from (piece for piece in streamer if piece)
        finally:
            is_abandoned.set()
            thread.join()
        if errors:
            raise errors[0]

    # -- one input to prompts -----------------------------------------------------------------------------------------

    def preprocess(
        self, inputs, instruction=None, sampling_rate=None, allowed_url_prefixes=(), chat_template_kwargs=None
    ):
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

    # -- prompts to answers -------------------------------------------------------------------------------------------

    def _forward(self, prompts: list[dict], **generate_kwargs) -> list[dict]:
        """Answer B prompts; each answer is a dict of `tokens` (L,) and, if requested, their `times` (L, 2)."""
        inputs = self.processor.tokenize(
            [prompt["text"] for prompt in prompts],
            padding=True,
            padding_side="left",
            add_special_tokens=False,  # the template wrote them
            return_tensors="pt",
        )
        features = self.processor.pad_features([clip for prompt in prompts for clip in prompt["features"]])
        inputs.update({name: torch.from_numpy(values) for name, values in features.items()})
        options = self._prepare_generate_kwargs(generate_kwargs)
        if self._get_set_generation_params(options).get("num_return_sequences", 1) not in (1, None):
            raise ValueError("A pipeline gives one answer to each input: num_return_sequences must be 1.")
        output = self.model.generate(**inputs.to(self.device), **options)
        num_prompt_tokens = inputs["input_ids"].shape[1]
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        answers = [{"tokens": row[num_prompt_tokens:]} for row in sequences]
        if generate_kwargs.get("return_timestamps"):
            answers = [
                {**answer, "times": times[num_prompt_tokens:]}
                for answer, times in zip(answers, output.token_timestamps)
            ]
        return answers

    def postprocess(self, answers: list[dict]) -> dict:
        return {"generated_text": self._decode(answers[0]["tokens"])}

    def _decode(self, tokens) -> str:
        return self.processor.decode(tokens, skip_special_tokens=True)

    def get_iterator(self, inputs, num_workers, batch_size, preprocess_params, forward_params, postprocess_params):
        # transformers' own method would pad features as if they were text, and would not say which input is bad.
        prompts = _Prompts(inputs, self.preprocess, preprocess_params)
        loader = DataLoader(prompts, batch_size=None, num_workers=min(num_workers, 1), collate_fn=_unchanged)
        numbered, answers = iter(loader), []
        while batch := list(islice(numbered, batch_size)):
            outputs = self.forward([prompt for prompt, _ in batch], **forward_params)
            for output, (_, is_last) in zip(outputs, batch):
                answers.append(output)
                if is_last:
                    yield self.postprocess(answers, **postprocess_params)
                    answers = []

    def save_pretrained(self, save_directory, **kwargs):
        """Save model and processor with their code. transformers' own method would not save the processor."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory, **kwargs)


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

    def _sanitize_parameters(self, return_timestamps=None, chunk_length_s=None, stride_length_s=None, **options):
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
        inputs,
        instruction=None,
        sampling_rate=None,
        allowed_url_prefixes=(),
        chat_template_kwargs=None,
        chunk_length_s=None,
        stride_length_s=None,
    ):
        """Yield the prompts of one recording, one per chunk."""
        if isinstance(inputs, Chat):
            raise TypeError('Speech recognition takes audio, not chats. For these there is "audio-text-to-text".')
        left_s, right_s = _strides(chunk_length_s, stride_length_s)
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
            chunks = _chunks(
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

    def postprocess(self, answers, return_timestamps=False):
        texts, chunks = [], []
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
        tokenizer, tokens, text = self.processor.tokenizer, [], ""
        timed = ~answer["times"].isnan().any(1) & ~torch.isin(answer["tokens"], torch.tensor(tokenizer.all_special_ids))
        said = answer["tokens"][timed].tolist()
        for number, times in enumerate(answer["times"][timed].tolist()):
            # Some tokenizers drop the white space before the first token, so each is decoded after those before it.
            longer = tokenizer.decode(said[: number + 1], clean_up_tokenization_spaces=False)
            start, end = (answer["start_s"] + time for time in times)
            if any(word["timestamp"][0] <= (start + end) / 2 <= word["timestamp"][1] for word in words):
                tokens.append({"text": longer[len(text) :], "timestamp": (start, end)})
            text = longer
        return tokens


def _strides(chunk_length_s, stride_length_s) -> tuple[float, float]:
    """Return a chunk's left and right margin, seconds."""
    if chunk_length_s is None:
        if stride_length_s is not None:
            raise ValueError("stride_length_s is of chunks: give chunk_length_s, too.")
        return 0.0, 0.0
    if not _is_number(chunk_length_s) or not 1 <= chunk_length_s <= MAX_DURATION_S:
        raise ValueError(f"chunk_length_s must be within 1 and {MAX_DURATION_S:g} seconds, got {chunk_length_s!r}.")
    strides = chunk_length_s / 6 if stride_length_s is None else stride_length_s
    strides = (
        (strides, strides) if _is_number(strides) else tuple(strides) if isinstance(strides, (list, tuple)) else ()
    )
    if len(strides) != 2 or not all(_is_number(stride) and stride >= 0 for stride in strides):
        raise ValueError(f"stride_length_s must be seconds, or a pair (left, right) of them, got {stride_length_s!r}.")
    if sum(strides) >= chunk_length_s:
        raise ValueError(f"Strides of {strides} s leave nothing of a chunk of {chunk_length_s} s. Make them shorter.")
    return strides


def _is_number(value) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and np.isfinite(value)


def _chunks(num_samples: int, length: int, left: int, right: int, shortest: int) -> list[tuple[int, int, float, float]]:
    """Return start and stop of each chunk, and the range in which its words are kept, in samples.

    These ranges follow each other without a gap, and those of the first and last chunk are open at the ends.
    """
    chunks = []
    for start in range(0, num_samples, length - left - right):
        stop = start + length if start + length + shortest <= num_samples else num_samples
        is_last = stop == num_samples
        chunks.append((start, stop, start + left if start else -np.inf, np.inf if is_last else stop - right))
        if is_last:
            return chunks


class _Prompts(IterableDataset):
    """The prompts of all inputs in order, each with a flag that marks the last one of its input."""

    def __init__(self, inputs, preprocess, params: dict):
        self.inputs, self.preprocess, self.params = inputs, preprocess, params

    def __iter__(self):
        is_sized = isinstance(self.inputs, Sized)
        # By index, because torch's map-style datasets need not be iterable.
        items = (self.inputs[index] for index in range(len(self.inputs))) if is_sized else self.inputs
        names_inputs = not is_sized or len(self.inputs) > 1
        for index, item in enumerate(items):
            held = None
            try:
                for prompt in self.preprocess(as_chat(item), **self.params):
                    if held is not None:
                        yield held, False
                    held = prompt
            except (FileNotFoundError, TypeError, ValueError) as error:
                if not names_inputs:
                    raise
                raise type(error)(f"Input {index}: {error}") from error
            yield held, True


class _StopsWhen(StoppingCriteria):
    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), self.event.is_set(), dtype=torch.bool, device=input_ids.device)


def _unchanged(item):
    # The default `collate_fn` would convert numpy arrays to tensors.
    return item
