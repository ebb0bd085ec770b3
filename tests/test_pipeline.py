"""Pipelines: every documented input gives the answer of a direct `generate`, and what is bad is refused by name."""

import gc
import http.server
import io
import itertools
import json
import os
import threading
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
import torch
from transformers import LogitsProcessor, LogitsProcessorList, TextIteratorStreamer, pipeline
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.pt_utils import KeyDataset

import processing
from modeling_blsp_kd import BlspKdConfig
from modeling_blsp_kd.configuration_blsp_kd import CUSTOM_PIPELINES
from processing import BlspKdPipeline, BlspKdProcessor, BlspKdSpeechRecognitionPipeline, url_fetching
from processing.pipeline_blsp_kd import _chunks
from processing.publishing.elsewhere import PACKAGES
from tests.helpers.audio_files import StandInDecoder, encode
from tests.helpers.prompts import SAMPLING_RATE, clip
from tests.helpers.shipping import run_python, unshippable
from tests.helpers.spoken_cases import BAD_FILES, INSTRUCTION, base64_of, make_readable_model, make_repository

TASKS = ("audio-text-to-text", "automatic-speech-recognition")
SHORT = {"max_new_tokens": 5}
DURATIONS_S = (0.5, 1.3, 0.9, 2.1)


@pytest.fixture(scope="module")
def model(processor):
    return make_readable_model(processor)


@pytest.fixture(scope="module")
def answers(model, processor):
    return BlspKdPipeline(model=model, processor=processor, task=TASKS[0], instruction=INSTRUCTION, **SHORT)


@pytest.fixture(scope="module")
def recognizes(model, processor):
    return BlspKdSpeechRecognitionPipeline(
        model=model, processor=processor, task=TASKS[1], instruction=INSTRUCTION, **SHORT
    )


@pytest.fixture(scope="module")
def both(answers, recognizes):
    return answers, recognizes


def text_of(result: dict) -> str:
    [text] = result.values()
    return text


def direct(model, processor, waveform, instruction=INSTRUCTION, **options):
    """The answer of the model itself, and the output of `generate`."""
    content = [{"type": "text", "text": instruction}] if instruction else []
    content.append({"type": "audio", "audio": (waveform, SAMPLING_RATE)})
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    output = model.generate(**inputs, **{**SHORT, **options})
    sequences = output if isinstance(output, torch.Tensor) else output.sequences
    return processor.decode(sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True), output


@pytest.fixture(scope="module")
def expected(model, processor):
    """Answers to the clips of `DURATIONS_S`; they differ, so that a mix-up shows."""
    texts = [direct(model, processor, clip(duration_s))[0] for duration_s in DURATIONS_S]
    assert len(set(texts)) == len(texts)
    return texts


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("audio") / "clip.wav"
    path.write_bytes(encode(clip(DURATIONS_S[0])))
    return path


# -- what goes in -----------------------------------------------------------------------------------------------------

WAVEFORM = clip(DURATIONS_S[0])
CONTENTS = encode(WAVEFORM)
DATA_URL = f"data:audio/wav;base64,{base64_of(CONTENTS)}"
CLIPS = {
    "str": str,
    "path": lambda path: path,
    "bytes": lambda path: CONTENTS,
    "bytearray": lambda path: bytearray(CONTENTS),
    "file object": lambda path: io.BytesIO(CONTENTS),
    "data URL": lambda path: DATA_URL,
    "array": lambda path: WAVEFORM,
    "tensor": lambda path: torch.from_numpy(WAVEFORM),
    "list of samples": lambda path: WAVEFORM.tolist(),
    "pair": lambda path: (WAVEFORM, SAMPLING_RATE),
    "stereo pair": lambda path: (np.stack([WAVEFORM, WAVEFORM]), SAMPLING_RATE),
    "dict of array": lambda path: {"array": WAVEFORM, "sampling_rate": SAMPLING_RATE},
    "dict of raw": lambda path: {"raw": WAVEFORM, "sampling_rate": SAMPLING_RATE},
    "dict of path": lambda path: {"path": str(path)},
    "dict of bytes": lambda path: {"bytes": CONTENTS, "path": None},
    "dict of base64": lambda path: {"base64": base64_of(CONTENTS)},
    "dict of data URL": lambda path: {"url": DATA_URL},
    "decoder": lambda path: StandInDecoder(WAVEFORM),
    "memoryview": lambda path: memoryview(CONTENTS),
    "array of bytes": lambda path: np.frombuffer(CONTENTS, np.uint8),
}


@pytest.mark.parametrize("kind", CLIPS)
def test_every_kind_of_clip_gets_the_direct_answer(both, expected, path, kind):
    answers, recognizes = both
    make = CLIPS[kind]
    assert text_of(recognizes(make(path))) == expected[0]
    results = answers([make(path), {"audio": make(path)}], batch_size=2)
    assert [text_of(result) for result in results] == [expected[0]] * 2


BLOCKS = {
    "audio of any kind": lambda path: {"type": "audio", "audio": (WAVEFORM, SAMPLING_RATE)},
    "audio and rate": lambda path: {"type": "audio", "audio": WAVEFORM, "sampling_rate": SAMPLING_RATE},
    "path": lambda path: {"type": "audio", "path": str(path)},
    "url": lambda path: {"type": "audio", "url": DATA_URL},
    "bytes": lambda path: {"type": "audio", "bytes": CONTENTS},
    "base64": lambda path: {"type": "audio", "base64": base64_of(CONTENTS)},
    "array": lambda path: {"type": "audio", "array": WAVEFORM, "sampling_rate": SAMPLING_RATE},
    "path and rate": lambda path: {"type": "audio", "audio": str(path), "sampling_rate": SAMPLING_RATE},
    "dict without its rate": lambda path: {"type": "audio", "audio": {"raw": WAVEFORM}, "sampling_rate": SAMPLING_RATE},
    "row of datasets": lambda path: {"type": "audio", "bytes": CONTENTS, "path": "not there.wav"},
    "decoder": lambda path: {"type": "audio", "audio": StandInDecoder(WAVEFORM)},
    # Of other frameworks.
    "input_audio": lambda path: {
        "type": "input_audio",
        "input_audio": {"data": base64_of(CONTENTS), "format": "wav"},
    },
    "input_audio of a data URL": lambda path: {"type": "input_audio", "input_audio": {"data": DATA_URL}},
    "audio_url": lambda path: {"type": "audio_url", "audio_url": {"url": DATA_URL}},
    "audio_url as text": lambda path: {"type": "audio_url", "audio_url": DATA_URL},
    "audio_url of Qwen2-Audio": lambda path: {"type": "audio", "audio_url": DATA_URL},
    "data": lambda path: {"type": "audio", "data": base64_of(CONTENTS), "mime_type": "audio/wav"},
    "data of bytes": lambda path: {"type": "audio", "data": CONTENTS},
    "input_audio of type audio": lambda path: {"type": "audio", "input_audio": {"data": base64_of(CONTENTS)}},
    "no type": lambda path: {"audio": str(path)},
}


def chat(*blocks, instruction=INSTRUCTION) -> list[dict]:
    return [{"role": "user", "content": [{"type": "text", "text": instruction}, *blocks]}]


@pytest.mark.parametrize("kind", BLOCKS)
def test_every_kind_of_audio_block_gets_the_direct_answer(answers, expected, path, kind):
    messages = chat(BLOCKS[kind](path))
    assert answers(messages) == {"generated_text": expected[0]}
    assert [text_of(result) for result in answers([messages, messages], batch_size=2)] == [expected[0]] * 2


def test_a_conversation_with_two_clips_in_two_turns(answers, model, processor):
    blocks = [{"type": "audio", "audio": (clip(duration_s), SAMPLING_RATE)} for duration_s in DURATIONS_S[:2]]
    conversation = [
        *chat(blocks[0]),
        {"role": "assistant", "content": "the red cat"},
        {"role": "user", "content": [blocks[1]]},
    ]
    before = repr(conversation)
    inputs = processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=True, return_dict=True)
    output = model.generate(**inputs, **SHORT)
    assert answers(conversation)["generated_text"] == processor.decode(
        output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    assert repr(conversation) == before, "the caller's chat was changed"


def test_without_an_instruction_the_clip_is_the_whole_turn(model, processor):
    pipe = BlspKdPipeline(model=model, processor=processor)
    waveform = clip(1.7)
    assert text_of(pipe((waveform, SAMPLING_RATE), **SHORT)) == direct(model, processor, waveform, None)[0]


@pytest.mark.parametrize("key", ["instruction", "text"])
def test_an_inputs_own_instruction_comes_first(answers, model, processor, key):
    own = direct(model, processor, WAVEFORM, "the river")[0]
    assert own != direct(model, processor, WAVEFORM)[0]
    assert text_of(answers({"audio": CONTENTS, key: "the river"})) == own
    assert text_of(answers(CONTENTS, instruction="the river")) == own


def test_the_rate_of_bare_arrays_can_be_told(answers, expected):
    slow = soundfile.read(io.BytesIO(encode(clip(0.8, rate=8_000), 8_000)), dtype="float32")[0]
    assert text_of(answers(slow, sampling_rate=8_000)) == text_of(answers((slow, 8_000)))
    assert text_of(answers({"audio": slow, "sampling_rate": 8_000})) == text_of(answers((slow, 8_000)))


# -- many inputs ------------------------------------------------------------------------------------------------------


class TorchDataset(torch.utils.data.Dataset):
    def __len__(self):
        return len(DURATIONS_S)

    def __getitem__(self, index):
        return clip(DURATIONS_S[index]), SAMPLING_RATE


class TorchStream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return (TorchDataset()[index] for index in range(len(DURATIONS_S)))


def rows():
    return [{"audio": {"bytes": encode(clip(duration_s)), "path": None}} for duration_s in DURATIONS_S]


MANY = {
    "list": lambda: [TorchDataset()[index] for index in range(len(DURATIONS_S))],
    "generator": lambda: (TorchDataset()[index] for index in range(len(DURATIONS_S))),
    "iterator": lambda: map(TorchDataset().__getitem__, range(len(DURATIONS_S))),
    "torch data set": TorchDataset,
    "torch stream": TorchStream,
    "KeyDataset": lambda: KeyDataset(rows(), "audio"),
    "rows of datasets": lambda: datasets.Dataset.from_list(rows()),
    "column of datasets": lambda: datasets.Dataset.from_list(rows())["audio"],
    "KeyDataset of datasets": lambda: KeyDataset(datasets.Dataset.from_list(rows()), "audio"),
    "stream of datasets": lambda: datasets.Dataset.from_list(rows()).to_iterable_dataset(),
}


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("kind", MANY)
def test_many_inputs_of_mixed_lengths(both, expected, kind, batch_size):
    for pipe in both:
        results = pipe(MANY[kind](), batch_size=batch_size)
        assert isinstance(results, list) == (kind == "list")
        assert [text_of(result) for result in results] == expected


def test_prompts_of_different_lengths_and_numbers_of_clips_share_a_batch(answers, path):
    blocks = [{"type": "audio", "audio": (clip(duration_s), SAMPLING_RATE)} for duration_s in DURATIONS_S]
    inputs = [
        chat(*blocks[1:3], instruction="repeat the words and then"),
        chat(blocks[0], instruction="cat"),
        chat(blocks[3], instruction="repeat the words and then the red cat ran to the river"),
    ]
    alone = [answers(messages) for messages in inputs]
    assert answers(inputs, batch_size=3) == alone
    assert len({text_of(result) for result in alone}) == 3


def test_clips_can_be_decoded_ahead_in_another_process(answers, expected):
    results = answers(TorchDataset(), num_workers=1, batch_size=2)
    assert [text_of(result) for result in results] == expected


def test_a_stream_is_consumed_as_it_is_answered(answers):
    taken = []

    def clips():
        for index in itertools.count():
            taken.append(index)
            yield TorchDataset()[index % 4]

    results = answers(clips(), batch_size=2)
    next(results), next(results)
    assert len(taken) <= 4


def test_batches_are_real(answers, model, monkeypatch):
    sizes = []
    generate = model.generate
    monkeypatch.setattr(
        model, "generate", lambda **inputs: sizes.append(len(inputs["input_ids"])) or generate(**inputs)
    )
    answers(MANY["list"](), batch_size=3)
    assert sizes == [3, 1]


def test_no_inputs_give_no_results(answers):
    assert answers(iter(())) == []


# -- options ----------------------------------------------------------------------------------------------------------


def test_options_of_generate_reach_it(answers, model, processor):
    for options in ({"max_new_tokens": 3}, {"num_beams": 2}, {"repetition_penalty": 5.0}):
        wanted = direct(model, processor, WAVEFORM, **options)[0]
        assert text_of(answers(CONTENTS, **options)) == wanted
        assert text_of(answers(CONTENTS, generate_kwargs=options)) == wanted
        made = BlspKdPipeline(model=model, processor=processor, instruction=INSTRUCTION, **{**SHORT, **options})
        assert text_of(made(CONTENTS)) == wanted
    assert len({direct(model, processor, WAVEFORM, max_new_tokens=count)[0] for count in (3, 8)}) == 2


def test_an_assistant_given_when_the_pipeline_is_made_assists(model, processor, expected):
    """transformers takes it out of the options, and nobody passed it on."""
    assistant, calls = make_readable_model(processor), []
    assistant.register_forward_hook(lambda *_: calls.append(1))
    made = BlspKdPipeline(model=model, processor=processor, instruction=INSTRUCTION, assistant_model=assistant, **SHORT)
    assert text_of(made(CONTENTS)) == expected[0]
    assert calls


BAD_OPTIONS = {
    "unknown": ({"beams": 2}, r"Unknown option\(s\) \['beams'\] of BlspKd\w+\. It takes \['allowed_url_prefixes'"),
    "twice": ({"max_new_tokens": 3, "generate_kwargs": {"max_new_tokens": 4}}, r"\['max_new_tokens'\] given twice"),
    "negative": ({"max_new_tokens": -1}, "`max_new_tokens` must be greater than 0, but is -1"),
    "instruction of type int": ({"instruction": 7}, "The instruction must be a string, got <class 'int'>"),
    "empty instruction": ({"instruction": " "}, "The instruction is empty. Leave it out instead"),
    "placeholder": ({"instruction": "a <|audio|>"}, r"The instruction holds the audio placeholder '<\|audio\|>'"),
    "several answers": ({"num_return_sequences": 2, "num_beams": 2}, "num_return_sequences must be 1"),
    "prefix as string": (
        {"allowed_url_prefixes": "https://a/"},
        "must be a list or tuple of strings, got 'https://a/'",
    ),
}


@pytest.mark.parametrize("kind", BAD_OPTIONS)
def test_bad_options_are_refused(both, expected, kind):
    options, message = BAD_OPTIONS[kind]
    source = "https://b/c.wav" if "allowed_url_prefixes" in options else CONTENTS
    for pipe in both:
        with pytest.raises((ValueError, TypeError), match=message):
            pipe(source, **options)
        assert text_of(pipe(CONTENTS)) == expected[0]


def test_the_wrong_model_is_refused(model):
    with pytest.raises(ValueError, match="BlspKdPipeline needs a BLSP-KD model and its processor, got a model of type"):
        BlspKdPipeline(model=model.language_model)
    with pytest.raises(ValueError, match="'blsp_kd' and NoneType as processor"):
        BlspKdPipeline(model=model)


# -- streaming --------------------------------------------------------------------------------------------------------


class Says(LogitsProcessor):
    """Makes the model say given tokens in turn, and tells at which of them it is."""

    def __init__(self, processor, text):
        self.tokens = itertools.cycle(processor.tokenizer(text, add_special_tokens=False)["input_ids"])
        self.num_said = 0

    def __call__(self, input_ids, scores):
        self.num_said += 1
        forced = torch.full_like(scores, -torch.inf)
        forced[:, next(self.tokens)] = 0.0
        return forced


def saying(processor, text=" the red cat ran", number=8):
    says = Says(processor, text)
    return says, {"logits_processor": LogitsProcessorList([says]), "max_new_tokens": number}


def test_stream_gives_the_text_in_pieces(both, processor, expected):
    for pipe in both:
        assert "".join(pipe.stream(CONTENTS)) == expected[0]
        _, options = saying(processor)
        pieces = list(pipe.stream(CONTENTS, **options))
        assert len(pieces) > 3 and all(pieces)
        assert "".join(pieces).strip() == text_of(pipe(CONTENTS, **saying(processor)[1])).strip()


def test_a_streamer_can_be_given(both, processor, expected):
    for pipe in both:
        streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        result = pipe(CONTENTS, streamer=streamer)
        assert "".join(streamer) == text_of(result) == expected[0]


def test_an_abandoned_stream_stops(answers, processor):
    """A thread that nobody reads from would generate to the end, and keep its memory and its core until then."""
    num_threads = threading.active_count()
    says, options = saying(processor, number=200)
    stream = answers.stream(CONTENTS, **options)
    next(stream)
    stream.close()
    assert threading.active_count() == num_threads
    assert says.num_said < 200


def test_an_unread_stream_starts_no_thread(answers):
    num_threads = threading.active_count()
    stream = answers.stream(CONTENTS)
    assert threading.active_count() == num_threads
    del stream


def test_errors_in_the_streams_thread_reach_the_caller(answers, processor, expected):
    class Fails(LogitsProcessor):
        def __call__(self, input_ids, scores):
            raise KeyError("out of words")

    with pytest.raises(KeyError, match="out of words"):
        list(answers.stream(CONTENTS, logits_processor=LogitsProcessorList([Fails()])))
    with pytest.raises(ValueError, match="cannot be decoded"):
        answers.stream(b"noise")  # at once, before anything is read
    assert "".join(answers.stream(CONTENTS)) == expected[0]


def test_what_cannot_be_streamed_is_refused(recognizes, processor):
    for options in ({"return_timestamps": True}, {"chunk_length_s": 5}):
        with pytest.raises(ValueError, match="stream gives the text of one clip as it comes: no return_timestamps"):
            recognizes.stream(CONTENTS, **options)
    with pytest.raises(ValueError, match="stream makes a streamer of its own"):
        recognizes.stream(CONTENTS, streamer=TextIteratorStreamer(processor.tokenizer))


# -- speech recognition -----------------------------------------------------------------------------------------------


def test_the_processor_tells_how_to_ask_for_a_transcript(model, backbones, tmp_path):
    processor = BlspKdProcessor.from_backbones(*backbones, transcription_instruction="the red river")
    processor.save_pretrained(tmp_path)
    restored = BlspKdProcessor.from_pretrained(tmp_path)
    assert restored.transcription_instruction == "the red river"
    pipe = BlspKdSpeechRecognitionPipeline(model=model, processor=restored, **SHORT)
    wanted = direct(model, processor, WAVEFORM, "the red river")[0]
    assert pipe(CONTENTS) == {"text": wanted.strip()}
    assert pipe(CONTENTS, instruction=INSTRUCTION)["text"] == direct(model, processor, WAVEFORM)[0].strip()
    assert wanted != direct(model, processor, WAVEFORM)[0]


def test_processors_saved_before_there_was_a_transcription_instruction_load(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "processor_config.json").read_text())
    del config["transcription_instruction"]
    (tmp_path / "processor_config.json").write_text(json.dumps(config))
    assert BlspKdProcessor.from_pretrained(tmp_path).transcription_instruction == "Repeat the words."


@pytest.mark.parametrize("instruction", [None, "", " ", 7, "repeat <|audio|>"])
def test_a_bad_transcription_instruction_is_refused(backbones, instruction):
    with pytest.raises(ValueError, match="transcription_instruction must be a non-empty string without the audio"):
        BlspKdProcessor.from_backbones(*backbones, transcription_instruction=instruction)


def timed(model, processor, waveform, **options):
    """Tokens and times of a direct answer."""
    _, output = direct(model, processor, waveform, return_timestamps=True, **options)
    return output.sequences[0], output.token_timestamps[0]


@pytest.mark.parametrize("wanted", ["word", True])
def test_word_timestamps_are_those_of_generate(recognizes, model, processor, wanted):
    words = processor.word_timestamps(*timed(model, processor, WAVEFORM, **saying(processor)[1]))
    assert len(words) > 3
    result = recognizes(CONTENTS, return_timestamps=wanted, **saying(processor)[1])
    assert result["chunks"] == words
    assert result["text"] == "".join(word["text"] for word in words).strip()


def test_token_timestamps_are_those_of_generate(recognizes, model, processor):
    tokens, times = timed(model, processor, WAVEFORM, **saying(processor)[1])
    is_said = ~times.isnan().any(1)
    result = recognizes(CONTENTS, return_timestamps="token", **saying(processor)[1])
    assert [chunk["timestamp"] for chunk in result["chunks"]] == [tuple(pair) for pair in times[is_said].tolist()]
    pieces = [processor.tokenizer.decode([token]) for token in tokens[is_said]]
    assert [chunk["text"].strip() for chunk in result["chunks"]] == [piece.strip() for piece in pieces]
    assert "".join(chunk["text"] for chunk in result["chunks"]).strip() == result["text"]


def test_timestamps_of_a_batch_are_those_of_one(recognizes, expected):
    alone = [recognizes(item, return_timestamps="word") for item in MANY["list"]()]
    together = recognizes(MANY["list"](), batch_size=3, return_timestamps="word")
    assert [result["text"] for result in together] == [result["text"] for result in alone] == expected
    for result, other in zip(together, alone):
        assert [word["text"] for word in result["chunks"]] == [word["text"] for word in other["chunks"]]
        times, others = ([word["timestamp"] for word in each["chunks"]] for each in (result, other))
        np.testing.assert_allclose(times, others, atol=1e-4)


@pytest.mark.parametrize("num_samples", [1, 99, 100, 101, 250, 1000, 1001])
@pytest.mark.parametrize("length, left, right", [(100, 0, 0), (100, 20, 10), (100, 49, 50), (7, 3, 3)])
@pytest.mark.parametrize("shortest", [1, 5])
def test_chunks_cover_a_recording_once(num_samples, length, left, right, shortest):
    chunks = _chunks(num_samples, length, left, right, shortest)
    assert chunks[0][0] == 0 and chunks[-1][1] == num_samples
    assert chunks[0][2] == -np.inf and chunks[-1][3] == np.inf
    for start, stop, keep_from, keep_to in chunks:
        assert min(shortest, num_samples) <= stop - start < length + shortest
        assert max(keep_from, 0) < min(keep_to, num_samples)
        assert keep_from in (-np.inf, start + left) and keep_to in (np.inf, stop - right)
    for (*_, keep_to), (_, _, keep_from, _) in itertools.pairwise(chunks):
        assert keep_to == keep_from


@pytest.mark.parametrize("batch_size", [1, 3])
def test_chunks_keep_the_words_whose_middle_is_theirs(recognizes, model, processor, batch_size):
    """Against the definition: chunk by chunk with the model itself."""
    recording = clip(4.3, seed=5)
    options = {"max_new_tokens": 8}
    kept, num_dropped = [], 0
    # 2 s with margins of 0.4 and 0.2 s: steps of 1.4 s
    parts = [(0, 2, -1, 1.8), (1.4, 3.4, 1.8, 3.2), (2.8, 4.3, 3.2, 9)]
    for start_s, stop_s, from_s, to_s in parts:
        samples = recording[round(start_s * SAMPLING_RATE) : round(stop_s * SAMPLING_RATE)]
        tokens, times = timed(model, processor, samples, **saying(processor)[1])
        for word in processor.word_timestamps(tokens, times):
            word_start, word_end = (start_s + time for time in word["timestamp"])
            if from_s <= (word_start + word_end) / 2 < to_s:
                kept.append((word["text"].strip(), word_start, word_end))
            else:
                num_dropped += 1
    assert num_dropped > 0 and len(kept) > 6

    class SaysAnew(LogitsProcessor):
        """Says the same in each chunk, wherever it stands in a batch."""

        def __call__(self, input_ids, scores):
            number = self.number = getattr(self, "number", -1) + 1
            words = processor.tokenizer(" the red cat ran", add_special_tokens=False)["input_ids"]
            forced = torch.full_like(scores, -torch.inf)
            forced[:, words[number % 8 % len(words)]] = 0.0
            return forced

    result = recognizes(
        (recording, SAMPLING_RATE),
        chunk_length_s=2,
        stride_length_s=(0.4, 0.2),
        return_timestamps="word",
        batch_size=batch_size,
        logits_processor=LogitsProcessorList([SaysAnew()]),
        **options,
    )
    assert [word["text"].strip() for word in result["chunks"]] == [text for text, _, _ in kept]
    np.testing.assert_allclose([word["timestamp"] for word in result["chunks"]], [pair[1:] for pair in kept], atol=1e-4)
    assert result["text"] == " ".join(text for text, _, _ in kept)
    assert "".join(word["text"] for word in result["chunks"]).strip() == result["text"]


def test_chunks_without_margins_are_answered_one_by_one(recognizes, model, processor):
    recording = clip(2.5, seed=6)
    parts = [recording[:SAMPLING_RATE], recording[SAMPLING_RATE : 2 * SAMPLING_RATE], recording[2 * SAMPLING_RATE :]]
    wanted = [direct(model, processor, part)[0].strip() for part in parts]
    for batch_size in (1, 2, 5):
        result = recognizes((recording, SAMPLING_RATE), chunk_length_s=1, stride_length_s=0, batch_size=batch_size)
        assert result == {"text": " ".join(wanted)}


def test_a_rest_too_short_to_be_heard_is_not_a_chunk(recognizes):
    """A recording one sample longer than its chunks ended in 'Audio 0 of the batch is too short'."""
    recording = (clip(2.0 + 1 / SAMPLING_RATE, seed=6), SAMPLING_RATE)
    assert recognizes(recording, chunk_length_s=1, stride_length_s=0)["text"].count(" ") >= 1


def test_chunks_of_several_recordings_share_batches(recognizes):
    recordings = [(clip(duration_s, seed=7), SAMPLING_RATE) for duration_s in (2.5, 0.7, 1.2)]
    options = {"chunk_length_s": 1, "return_timestamps": "word"}
    alone = [recognizes(recording, **options) for recording in recordings]
    together = recognizes(recordings, batch_size=4, **options)
    assert [result["text"] for result in together] == [result["text"] for result in alone]


def test_token_times_of_chunks_are_those_of_the_kept_words(recognizes, processor):
    recording = (clip(3.2, seed=8), SAMPLING_RATE)
    options = {"chunk_length_s": 2, "generate_kwargs": saying(processor, " the red", 8)[1]}
    options["generate_kwargs"].pop("max_new_tokens")
    words = recognizes(recording, return_timestamps="word", **options)
    tokens = recognizes(recording, return_timestamps="token", **options)
    assert tokens["text"] == words["text"] != ""
    assert "".join(token["text"] for token in tokens["chunks"]).split() == words["text"].split()


def test_long_recordings_need_chunks_and_their_silence_is_skipped(recognizes, model, processor):
    recording = np.zeros(601 * SAMPLING_RATE, np.float32)
    recording[-SAMPLING_RATE // 2 :] = clip(0.5)
    advice = "chunk_length_s=20 takes recordings of up to 4 hours"
    with pytest.raises(ValueError, match=rf"lasts 601\.00 s, but a clip may last at most 600 s.* {advice}"):
        recognizes((recording, SAMPLING_RATE))
    result = recognizes((recording, SAMPLING_RATE), chunk_length_s=20, stride_length_s=0)
    assert result["text"] == direct(model, processor, recording[600 * SAMPLING_RATE :])[0].strip()
    with pytest.raises(
        ValueError, match=r"lasts 14401\.00 s, but a clip may last at most 14400 s\. Split it .* clips\.$"
    ):
        recognizes((np.ones(14_401_000, np.int8), 1000), chunk_length_s=20)


def test_what_does_not_fit_the_context_may_be_cut(recognizes):
    """The error for long audio did not tell of the option that is made for it."""
    with pytest.raises(ValueError, match="but the LLM's context holds 256.* cuts recordings itself: chunk_length_s=20"):
        recognizes((clip(60.0), SAMPLING_RATE))


BAD_RECOGNITION = {
    "char": ({"return_timestamps": "char"}, r"return_timestamps must be 'word' \(or True\) or 'token', got 'char'"),
    "short chunks": ({"chunk_length_s": 0.5}, r"chunk_length_s must be within 1 and 600 seconds, got 0\.5"),
    "long chunks": ({"chunk_length_s": 601}, "chunk_length_s must be within 1 and 600 seconds, got 601"),
    "chunks of text": ({"chunk_length_s": "20"}, "chunk_length_s must be within 1 and 600 seconds, got '20'"),
    "wide margins": ({"chunk_length_s": 2, "stride_length_s": 1}, r"Strides of \(1, 1\) s leave nothing of a chunk"),
    "negative margin": ({"chunk_length_s": 2, "stride_length_s": -1}, "stride_length_s must be seconds, or a pair"),
    "three margins": ({"chunk_length_s": 2, "stride_length_s": (0, 0, 0)}, "stride_length_s must be seconds"),
    "margins alone": ({"stride_length_s": 1}, "stride_length_s is of chunks: give chunk_length_s, too"),
}


@pytest.mark.parametrize("kind", BAD_RECOGNITION)
def test_bad_options_of_recognition_are_refused(recognizes, answers, expected, kind):
    options, message = BAD_RECOGNITION[kind]
    with pytest.raises(ValueError, match=message):
        recognizes(CONTENTS, **options)
    assert recognizes(CONTENTS)["text"] == expected[0].strip()
    with pytest.raises(ValueError, match=r"Unknown option\(s\)"):
        answers(CONTENTS, **options)


def test_recognition_takes_no_chats(recognizes, path):
    with pytest.raises(TypeError, match='Speech recognition takes audio, not chats. .*"audio-text-to-text"'):
        recognizes(chat({"type": "audio", "path": str(path)}))


# -- what is refused --------------------------------------------------------------------------------------------------

AUDIO_BLOCK = {"type": "audio", "audio": (WAVEFORM, SAMPLING_RATE)}
BAD_INPUTS = {
    **BAD_FILES,
    "None": (None, "There is nothing to hear: expected a clip, a chat, or several of them, got None"),
    "empty list": ([], r"There is nothing to hear: .* got \[\]"),
    "int": (7, "shape|Expected audio"),
    "nested lists": ([["a.wav"]], "Expected audio as a path, bytes, dict"),
    "strings array": (np.array(["a", "b"]), "Expected audio as a path, bytes, dict"),
    "missing file": ("nowhere.wav", "Audio file not found: 'nowhere.wav'"),
    "folder": (Path(__file__).parent, "Audio file not found"),
    "bare base64": (base64_of(CONTENTS), r"cannot be an audio file: File name too long"),
    "rate of 0": ((WAVEFORM, 0), "whole number of Hz .* got 0"),
    "negative rate": ((WAVEFORM, -16_000), "whole number of Hz .* got -16000"),
    "rate of text": ({"array": WAVEFORM, "sampling_rate": "16k"}, "whole number of Hz .* got '16k'"),
    "array of 20 channels": (np.full((400, 20), 0.5), r"got an array of shape \(400, 20\)"),
    "dict without audio": (
        {"sampling_rate": 16_000},
        "An audio dict needs 'array', 'raw', 'bytes', 'base64' or 'path'",
    ),
    "bad base64": ({"base64": "no!"}, "is not valid base64"),
    "bad data URL": ("data:audio/wav,abc", "Expected a data URL"),
    "http": ("http://localhost:9/a.wav", r"Fetching 'http://localhost:9/a\.wav' is not allowed.*allowed_url_prefixes"),
    "https in a dict": ({"url": "https://a.org/a.wav"}, "Fetching 'https://a.org/a.wav' is not allowed"),
    "https as a path": ({"path": "https://a.org/a.wav"}, "Audio is read from files, not from URLs"),
    "file URL": (f"file://{__file__}", "Fetching 'file://.*' is not allowed"),
    "ftp": ("ftp://a.org/a.wav", "Fetching 'ftp://a.org/a.wav' is not allowed"),
    "unknown field": ({"audio": CONTENTS, "transcript": "a"}, r"but this one also has \['transcript'\]"),
    "instruction twice": ({"audio": CONTENTS, "text": "a", "instruction": "b"}, "either 'instruction' or 'text'"),
    "placeholder": ({"audio": CONTENTS, "text": "<|audio|>"}, "The instruction holds the audio placeholder"),
    "instruction of bytes": (
        {"audio": CONTENTS, "text": b"a"},
        "The instruction must be a string, got <class 'bytes'>",
    ),
}
BAD_CHATS = {
    "without audio": ([{"role": "user", "content": "hello"}], "The chat holds no audio. Give at least one block"),
    "unknown block": (
        chat({"type": "image", "path": "a.png"}),
        "of type 'text', 'audio', 'audio_url' or 'input_audio', got {'type'",
    ),
    "block without audio": (chat(AUDIO_BLOCK, {"type": "audio"}), r"The audio block {'type': 'audio'} holds no audio"),
    "audio under another name": (
        chat({"type": "audio", "file": "a.wav"}),
        r"The audio block {'type': 'audio', 'file': 'a.wav'} holds no audio\. Write {'type': 'audio', 'audio': clip}",
    ),
    "audio twice": (
        chat({**AUDIO_BLOCK, "url": DATA_URL}),
        r"(?s)The audio block {'type': 'audio', .* holds audio under \['audio', 'url'\]\. Leave one of them",
    ),
    "input_audio without data": (
        chat({"type": "input_audio", "input_audio": {"id": "a"}}),
        "The audio block {'type': 'input_audio', .*} holds no audio",
    ),
    "audio_url that is not allowed": (
        chat({"type": "audio_url", "audio_url": {"url": "https://a.org/a.wav"}}),
        "Fetching 'https://a.org/a.wav' is not allowed",
    ),
    "block of text": (chat("a.wav"), "A block of a message is a dict of type"),
    "content of None": ([{"role": "user", "content": None}], "content of a message is a string or a list of blocks"),
    "message without role": ([*chat(AUDIO_BLOCK), {"content": "a"}], "must have a 'role' and 'content' key"),
    "placeholder": (chat(AUDIO_BLOCK, instruction="<|audio|>"), "The text of a block holds the audio placeholder"),
    "no text": (chat({"type": "text"}), "The text of a block must be a string, got <class 'NoneType'>"),
    "bad file": (chat({"type": "audio", "path": "nowhere.wav"}), "Audio file not found: 'nowhere.wav'"),
    "input_audio of a URL": (chat({"type": "input_audio", "input_audio": {"data": "http://a"}}), "not valid base64"),
}
ERRORS = (ValueError, TypeError, FileNotFoundError)


@pytest.mark.parametrize("kind", BAD_INPUTS)
def test_bad_input_is_refused_and_the_next_clip_answered(both, expected, kind):
    inputs, message = BAD_INPUTS[kind]
    for pipe in both:
        with pytest.raises(ERRORS, match=message):
            pipe(inputs)
        assert text_of(pipe(CONTENTS)) == expected[0]


@pytest.mark.parametrize("kind", BAD_CHATS)
def test_a_bad_chat_is_refused_and_the_next_clip_answered(answers, expected, kind):
    inputs, message = BAD_CHATS[kind]
    with pytest.raises(ERRORS, match=message):
        answers(inputs)
    assert text_of(answers(CONTENTS)) == expected[0]


@pytest.mark.parametrize("kind", ["text", "silence"])
def test_a_bad_file_is_named(answers, tmp_path, kind):
    path = tmp_path / "speech.wav"
    path.write_bytes(BAD_FILES[kind][0])
    with pytest.raises(ValueError, match=r"speech\.wav (cannot be decoded|is silent)"):
        answers(path)


@pytest.mark.parametrize("batch_size, num_workers", [(1, 0), (2, 0), (2, 1)])
def test_of_many_inputs_the_bad_one_is_named(answers, expected, batch_size, num_workers):
    def clips():
        yield from MANY["list"]()[:2]
        yield b"noise"
        yield CONTENTS

    results = answers(clips(), batch_size=batch_size, num_workers=num_workers)
    assert [text_of(result) for result in itertools.islice(results, 2)] == expected[:2]
    with pytest.raises(ValueError, match="Input 2: the audio of 5 bytes cannot be decoded"):
        next(results)


def resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's account of memory")
def test_bad_input_leaves_no_memory_behind(answers):
    def round_of_errors():
        for inputs, _ in [*BAD_INPUTS.values(), *BAD_CHATS.values()]:
            with pytest.raises(ERRORS):
                answers(inputs)
        answers(CONTENTS)

    round_of_errors()
    before = resident_bytes()
    for _ in range(3):
        round_of_errors()
    # The clip that is too long alone takes 38 MB while it is read.
    assert resident_bytes() - before < 8 * 2**20


# -- URLs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def web():
    """A server on loopback: `/clips/` is for everybody, `/secret/` is not."""

    class Handler(http.server.BaseHTTPRequestHandler):
        asked = []

        def do_GET(self):
            self.asked.append(self.path)
            target = {"/clips/moved.wav": "/clips/a.wav", "/clips/out.wav": "/secret/a.wav"}.get(self.path)
            if target:
                self.send_response(302)
                self.send_header("Location", target)
                self.end_headers()
            elif self.path.endswith("a.wav"):
                self.send_response(200)
                self.end_headers()
                self.wfile.write(CONTENTS)
            else:
                self.send_error(404)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/", Handler.asked
    server.shutdown()
    server.server_close()
    thread.join()


def test_urls_are_fetched_where_that_is_allowed(both, expected, web):
    root, _ = web
    allowed = {"allowed_url_prefixes": [f"{root}clips/"]}
    for pipe in both:
        for name in ("a.wav", "moved.wav"):
            assert text_of(pipe(f"{root}clips/{name}", **allowed)) == expected[0]
            assert text_of(pipe({"url": f"{root}clips/{name}"}, **allowed)) == expected[0]
    assert text_of(both[0](chat({"type": "audio", "url": f"{root}clips/a.wav"}), **allowed)) == expected[0]


@pytest.mark.parametrize(
    "name",
    [
        "secret/a.wav",
        "clips/../secret/a.wav",
        "clips/%2e%2e/secret/a.wav",
        "clips/%2E%2E%5Csecret/a.wav",
        "clips/out.wav",
    ],
)
def test_urls_elsewhere_are_not_fetched(answers, web, name):
    root, asked = web
    with pytest.raises(ValueError, match="Fetching '.*' is not allowed"):
        answers(root + name, allowed_url_prefixes=[f"{root}clips/"])
    assert not any("secret" in path for path in asked)


def test_a_url_that_is_not_there_is_an_error(answers, web):
    root, _ = web
    with pytest.raises(ValueError, match=r"clips/none\.mp3' cannot be fetched: HTTP Error 404"):
        answers(f"{root}clips/none.mp3", allowed_url_prefixes=[root])


def test_a_large_file_is_not_fetched_to_its_end(answers, web, monkeypatch):
    root, _ = web
    monkeypatch.setattr(url_fetching, "MAX_BYTES", 1000)
    with pytest.raises(ValueError, match=r"a\.wav' holds more than 1000 bytes"):
        answers(f"{root}clips/a.wav", allowed_url_prefixes=[root])


def test_a_slow_server_is_given_up(answers, web, monkeypatch):
    root, _ = web
    monkeypatch.setattr(url_fetching, "TIMEOUT_S", -1.0)
    with pytest.raises(ValueError, match=r"a\.wav' was not fetched within -1 s"):
        answers(f"{root}clips/a.wav", allowed_url_prefixes=[root])


@pytest.mark.parametrize("prefix", ["", "https://", "https://host", "host/", "ftp://host/", "file:///"])
def test_a_prefix_without_a_whole_host_is_refused(answers, prefix):
    """`https://host` would also have allowed `https://host.elsewhere.org`."""
    with pytest.raises(ValueError, match="An allowed URL prefix looks like 'https://host/'"):
        answers("https://host.elsewhere.org/a.wav", allowed_url_prefixes=[prefix])


# -- from a repository ------------------------------------------------------------------------------------------------


def test_the_task_without_a_pipeline_of_transformers_is_registered(answers, expected, processor, model, tmp_path):
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    pipe = pipeline("audio-text-to-text", model=tmp_path, device="cpu")
    assert type(pipe) is BlspKdPipeline
    assert text_of(pipe(CONTENTS, instruction=INSTRUCTION, **SHORT)) == expected[0]


def test_stock_pipelines_stay_as_they_are():
    """Registering our speech recognition would have taken Whisper's pipeline away wherever this package is imported."""
    impl = PIPELINE_REGISTRY.check_task("automatic-speech-recognition")[1]["impl"]
    assert "AutomaticSpeechRecognitionPipeline" in str(impl)
    assert PIPELINE_REGISTRY.check_task("any-to-any")[1]["impl"] is not BlspKdPipeline


@pytest.fixture(scope="module")
def repository(tmp_path_factory, processor):
    return make_repository(tmp_path_factory.mktemp("repository") / "small-blsp_kd.1", processor)


def test_a_saved_pipeline_is_complete(answers, repository, expected, tmp_path, monkeypatch):
    """transformers' `Pipeline.save_pretrained` leaves the processor out, and one of the two pipelines."""
    monkeypatch.setattr(BlspKdConfig, "registered_tasks", ())  # as where the package is not installed
    answers.save_pretrained(tmp_path / "installed")
    loaded = pipeline("automatic-speech-recognition", model=str(repository), trust_remote_code=True, device="cpu")
    loaded.save_pretrained(tmp_path / "loaded")
    for name, task in itertools.product(("installed", "loaded"), TASKS):
        folder = str(tmp_path / name)
        pipe = pipeline(task, model=folder, trust_remote_code=True, device="cpu", instruction=INSTRUCTION, **SHORT)
        assert type(pipe).__module__.startswith("transformers_modules")
        assert text_of(pipe(CONTENTS)) == expected[0]


def test_the_files_of_pipelines_can_travel_alone(repository):
    names = {path.name for path in repository.glob("*.py")}
    assert {"pipeline_blsp_kd.py", "audio_decoding.py", "chat_audio.py", "spoken_inputs.py", "url_fetching.py"} <= names
    for path in repository.glob("*.py"):
        assert unshippable(path.read_text()) == [], path.name


def test_any_to_any_is_transformers_own(repository, expected, path):
    pipe = pipeline("any-to-any", model=str(repository), trust_remote_code=True, device="cpu")
    assert type(pipe).__module__ == "transformers.pipelines.any_to_any"
    messages = chat({"type": "audio", "path": str(path)})
    options = {**SHORT, "return_full_text": False}
    assert [result["generated_text"] for result in pipe(text=messages, **options)] == [expected[0]]
    several = pipe(text=[messages, chat({"type": "audio", "audio": clip(DURATIONS_S[1])})], **options)
    assert [result["generated_text"] for [result] in several] == expected[:2]


# Runs in a process of its own, that cannot import this package nor reach a network.
CHILD = f"""
import json, runpy, sys


class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {PACKAGES!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)


def watch(event, args):
    if event in ("socket.connect", "socket.getaddrinfo"):
        raise OSError("no network in this test")


sys.meta_path.insert(0, NotInstalled())
sys.addaudithook(watch)
repository, audio, handler_file = sys.argv[1:]
from transformers import pipeline

EndpointHandler = runpy.run_path(handler_file)["EndpointHandler"]

instruction, short = {INSTRUCTION!r}, {SHORT!r}
content = [{{"type": "text", "text": instruction}}, {{"type": "audio", "path": audio}}]
texts = {{}}
for task in ("audio-text-to-text", "automatic-speech-recognition"):
    pipe = pipeline(task, model=repository, trust_remote_code=True)
    texts[task] = list(pipe(audio, instruction=instruction, **short).values())[0]
pipe = pipeline("any-to-any", model=repository, trust_remote_code=True)
result = pipe(text=[{{"role": "user", "content": content}}], return_full_text=False, **short)
texts["any-to-any"] = result[0]["generated_text"]
handler = EndpointHandler(repository)
contents = open(audio, "rb").read()
answer = handler({{"inputs": contents, "parameters": {{**short, "instruction": instruction}}}})
texts["handler"] = answer["generated_text"]
texts["transcript"] = handler({{"inputs": contents, "parameters": short}})["text"]
assert not set({PACKAGES!r}) & set(sys.modules)
print(json.dumps(texts))
"""


def test_pipelines_and_handler_agree_where_the_package_is_not_installed(
    repository, path, expected, model, processor, tmp_path
):
    handler = Path(processing.__file__).parent / "publishing" / "handler.py"
    output = run_python(CHILD, repository, path, handler, folder=tmp_path, HF_HUB_OFFLINE="1")
    texts = json.loads(output.splitlines()[-1])
    transcript = direct(model, processor, WAVEFORM, processor.transcription_instruction)[0].strip()
    assert texts == {
        **dict.fromkeys((*TASKS, "any-to-any", "handler"), expected[0]),
        "transcript": transcript,
    }


def test_the_table_of_pipelines_names_what_exists():
    for task, entry in CUSTOM_PIPELINES.items():
        module, name = entry["impl"].split(".")
        assert getattr(getattr(processing, module), name).__doc__.count(f'"{task}"') >= 1
