"""Pipelines: every documented input gives the answer of a direct `generate`, and what is bad is refused by name."""

import io
import itertools
import threading

import datasets
import numpy as np
import pytest
import soundfile
import torch
from transformers import LogitsProcessor, LogitsProcessorList, TextIteratorStreamer
from transformers.pipelines.pt_utils import KeyDataset

from processing import BlspKdPipeline
from tests.helpers.audio_files import StandInDecoder, encode
from tests.helpers.prompts import SAMPLING_RATE, clip
from tests.helpers.spoken_cases import INSTRUCTION, base64_of, make_readable_model
from tests.pipelines.cases import (
    CONTENTS,
    DATA_URL,
    DURATIONS_S,
    SHORT,
    WAVEFORM,
    chat,
    clips_of_all_durations,
    direct,
    saying,
    text_of,
)

# -- what goes in -----------------------------------------------------------------------------------------------------

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
    "list": clips_of_all_durations,
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
    answers(clips_of_all_durations(), batch_size=3)
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
