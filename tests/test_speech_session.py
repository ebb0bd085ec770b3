"""Sessions: speech in pieces gives what the whole clip gives, and interruptions and errors leave no trace."""

import threading

import numpy as np
import pytest
import soxr
import torch
from transformers import StoppingCriteria

from processing import BlspKdProcessor
from tests.helpers.models import SMALL_CFORMER, make_model, vector_tolerance
from tests.helpers.prompts import SAMPLING_RATE, clip

pytestmark = pytest.mark.numerical

STREAMING = {"chunk_ms": 320, "look_ahead_ms": 80, "left_context_ms": 640}
GREEDY = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
INSTRUCTION = "repeat the words"


@pytest.fixture(scope="module")
def listener(backbones):
    return BlspKdProcessor.from_backbones(*backbones, global_log_mel_max=1.5)


def streaming_model(streaming=None, family="llama", **options):
    options = {"adapter": {**SMALL_CFORMER, "num_pre_layers": 2}, "speech": {"encoder_layers": 2}, **options}
    text = {"max_position_embeddings": 4096, **options.pop("text", {})}
    model = make_model(family, streaming={**STREAMING, **(streaming or {})}, text=text, **options)
    # As trained: a token or so per second of speech, not one per two frames.
    model.adapter.shift_alpha_logits(-2.5)
    return model


@pytest.fixture(scope="module")
def model():
    return streaming_model()


def pieces(samples, size):
    sizes = [size] if isinstance(size, int) else size
    start, index = 0, 0
    while start < len(samples):
        yield samples[start : start + sizes[index % len(sizes)]]
        start, index = start + sizes[index % len(sizes)], index + 1


def listen_to(session, samples, size=1600):
    heard = [session.push(piece) for piece in pieces(samples, size)]
    return heard


def turns(*content):
    """A chat in which the user speaks (clips) and the assistant answers (texts)."""
    return [
        {"role": "assistant", "content": each}
        if isinstance(each, str)
        else {"role": "user", "content": [{"type": "text", "text": INSTRUCTION}, {"type": "audio", "audio": each}]}
        for each in content
    ]


def offline(model, processor, *content, **options):
    """What `generate` answers to whole clips."""
    inputs = processor.apply_chat_template(
        turns(*content),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        processor_kwargs={"sampling_rate": SAMPLING_RATE},
    )
    output = model.generate(**inputs, **{**GREEDY, **options})
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def features(model, processor, samples):
    with torch.no_grad():
        return model.get_audio_features(**_tensors(processor.extract_features([samples], SAMPLING_RATE)))


def _tensors(arrays):
    return {name: torch.from_numpy(values) for name, values in arrays.items()}


def streamed(model, processor, samples, size, chunk_ms=None, sampling_rate=None):
    """All that a clip in pieces gives: vectors, places and alphas."""
    session = processor.listen(model, sampling_rate=sampling_rate, chunk_ms=chunk_ms)
    heard = listen_to(session, samples, size)
    session._features.end_samples()
    speech = session._stream.nothing
    for each in [*heard, session._listen(), session._stream.finish(torch.from_numpy(session._features.rest()))]:
        speech += each
    return speech


def assert_same_speech(speech, audio):
    assert len(speech.speech_tokens) == int(audio.num_speech_tokens)
    torch.testing.assert_close(speech.speech_tokens, audio.pooler_output[0], **vector_tolerance(audio))
    torch.testing.assert_close(speech.alphas, audio.alphas[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(speech.firing_places, audio.firing_places[0], rtol=1e-5, atol=1e-3)


# -- speech tokens ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [7, 160, [1, 3000, 0, 481], 10**6])
@pytest.mark.parametrize("duration_s", [0.03, 0.32, 2.0431])
def test_any_pieces_give_the_vectors_of_the_whole_clip(model, listener, duration_s, size):
    samples = clip(duration_s)
    assert_same_speech(streamed(model, listener, samples, size), features(model, listener, samples))


def test_single_samples_give_the_vectors_of_the_whole_clip(model, listener):
    samples = clip(0.5)
    assert_same_speech(streamed(model, listener, samples, 1), features(model, listener, samples))


@pytest.mark.parametrize(
    "streaming, options",
    [
        ({"look_ahead_ms": 0}, {}),
        ({"left_context_ms": None, "look_ahead_ms": 300}, {}),
        ({"left_context_ms": 0}, {}),
        ({"chunk_ms": 20, "look_ahead_ms": 0, "training_chunk_ms": [20]}, {}),
        ({"chunk_ms": None}, {}),
        ({"look_ahead_ms": 40}, {"adapter": {**SMALL_CFORMER, "frame_stride": 2, "num_post_layers": 2}}),
        ({}, {"adapter": {**SMALL_CFORMER, "num_pre_layers": 0, "num_post_layers": 0, "frame_stride": 4}}),
        ({}, {"adapter": {**SMALL_CFORMER, "output": "expected_embedding"}}),
    ],
)
def test_vectors_are_the_same_for_every_kind_of_blocks(listener, streaming, options):
    model, samples = streaming_model(streaming, **options), clip(1.5)
    assert_same_speech(streamed(model, listener, samples, 1111), features(model, listener, samples))


def test_a_model_listens_in_other_chunks_than_its_own(model, listener):
    speech = streamed(model, listener, clip(1.5), 500, chunk_ms=160)
    model.config.streaming = {**STREAMING, "chunk_ms": 160}
    assert_same_speech(speech, features(model, listener, clip(1.5)))
    model.config.streaming = STREAMING


@pytest.mark.parametrize("rest_s", [0.0, 0.01, 0.03, 3.3])
def test_vectors_are_the_same_beyond_thirty_seconds(model, listener, rest_s):
    """Windows begin anew; the rest of a clip may be shorter than an analysis window."""
    samples = clip(30.0 + rest_s)
    assert_same_speech(streamed(model, listener, samples, 16_000), features(model, listener, samples))


@pytest.mark.parametrize("rate", [8_000, 44_100])
def test_samples_of_any_rate_are_resampled_as_whole_clips(model, listener, rate):
    samples = soxr.resample(clip(1.2), SAMPLING_RATE, rate).astype(np.float32)
    audio = model.get_audio_features(**_tensors(listener.extract_features([samples], rate)))
    assert_same_speech(streamed(model, listener, samples, 333, sampling_rate=rate), audio)


def test_integers_of_16_bits_are_samples(model, listener):
    samples = (clip(0.7) * 32768).astype(np.int16)
    assert_same_speech(
        streamed(model, listener, samples, 700), features(model, listener, samples.astype(np.float32) / 32768)
    )


def test_what_fired_is_not_changed_by_what_follows(model, listener):
    """What is complete 320 + 80 + 12.5 ms before a change, at the latest, is the same bit for bit."""
    samples, other, changed = clip(3.0), clip(3.0), 32_000
    other[changed:] = 0.5 * np.sin(np.arange(len(other) - changed))
    speech, speech_of_other = (streamed(model, listener, each, 1600) for each in (samples, other))
    settled = (changed / SAMPLING_RATE - 0.4125) / model.frame_duration_s
    count = int((speech.firing_places < settled).sum())
    assert count >= 2
    assert torch.equal(speech.speech_tokens[:count], speech_of_other.speech_tokens[:count])
    assert not torch.allclose(speech.alphas, speech_of_other.alphas)


# -- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("plora", [False, True])
def test_answers_are_those_to_whole_clips_turn_by_turn(listener, family, plora):
    model = streaming_model(family=family, plora=plora)
    first, second = clip(1.7), clip(0.9, seed=1)
    session = listener.listen(model, instruction=INSTRUCTION)
    listen_to(session, first)
    num_before = session.num_cached
    assert session.num_speech_tokens > 2
    assert "".join(session.answer(**GREEDY)) == offline(model, listener, first)
    assert session.num_cached > num_before
    answer = session.messages[-1]["content"]
    listen_to(session, second, 999)
    assert "".join(session.answer(**GREEDY)) == offline(model, listener, first, answer, second)
    assert [message["role"] for message in session.messages] == ["user", "assistant"] * 2


def test_what_was_said_is_in_the_cache_when_speech_ends(model, listener):
    session = listener.listen(model, instruction=INSTRUCTION)
    before = session.num_cached
    assert before > 0 and session.expected_next() != []
    listen_to(session, clip(6.0))
    assert session.num_cached == before + session.num_speech_tokens
    # All but the last chunk and its look-ahead.
    places = features(model, listener, clip(6.0)).firing_places[0]
    assert session.num_speech_tokens == int((places <= 300 - 300 % 16).sum()) > 4
    shares = [share for _, share in session.expected_next(300)]
    assert sum(shares) == pytest.approx(1.0, abs=1e-4) and shares == sorted(shares, reverse=True)


def test_the_instruction_may_change_while_one_speaks(model, listener):
    session = listener.listen(model, instruction="name the river")
    listen_to(session, clip(1.0))
    session.instruction = INSTRUCTION
    listen_to(session, clip(0.4, seed=1))
    samples = np.concatenate([clip(1.0), clip(0.4, seed=1)])
    assert "".join(session.answer(**GREEDY)) == offline(model, listener, samples)


def test_interrupted_answers_keep_what_was_said(model, listener):
    session = listener.listen(model, instruction=INSTRUCTION)
    listen_to(session, clip(1.2))
    assert session.interrupt() is None
    third_token = threading.Event()
    told = StopsAfter(3, third_token, hold=threading.Event())
    answer = session.answer(do_sample=False, max_new_tokens=200, min_new_tokens=200, stopping_criteria=[told])
    assert third_token.wait(60)
    session.push(clip(0.5, seed=2)[:3000])  # waits
    assert session.num_speech_tokens > 0 and session.messages == []
    threading.Timer(0.2, told.hold.set).start()
    session.interrupt()
    text = "".join(answer)
    whole = offline(model, listener, clip(1.2), max_new_tokens=200, min_new_tokens=200)
    assert text and whole.startswith(text) and text != whole
    assert session.messages[-1] == {"role": "assistant", "content": text}
    assert session.num_speech_tokens == 0
    session.push(clip(0.5, seed=2)[3000:])
    assert "".join(session.answer(**GREEDY)) == offline(model, listener, clip(1.2), text, clip(0.5, seed=2))


class StopsAfter(StoppingCriteria):
    """Never stops, but tells when some tokens were generated, and then waits."""

    def __init__(self, count, event, hold):
        self.count, self.event, self.hold = count, event, hold

    def __call__(self, input_ids, scores, **kwargs):
        self.count -= 1
        if self.count == 0:
            self.event.set()
            self.hold.wait(60)
        return torch.zeros(len(input_ids), dtype=torch.bool)


class Fails(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        raise RuntimeError("out of memory")


def test_a_failed_answer_leaves_the_turn_open(model, listener):
    session = listener.listen(model, instruction=INSTRUCTION)
    samples = clip(1.6)
    listen_to(session, samples[:12_345])
    num_tokens = session.num_speech_tokens
    with pytest.raises(RuntimeError, match="out of memory"):
        list(session.answer(**GREEDY, stopping_criteria=[Fails()]))
    for options, message in [
        ({"num_beams": 2}, "one answer at a time, but num_beams is 2"),
        ({"attention_mask": 1}, "the session's own"),
        ({"streamer": 1}, "streams by itself"),
    ]:
        with pytest.raises(ValueError, match=message):
            session.answer(**options)
    assert session.messages == [] and session.num_speech_tokens == num_tokens
    listen_to(session, samples[12_345:])
    assert "".join(session.answer(**GREEDY)) == offline(model, listener, samples)


@pytest.mark.parametrize("part", ["audio_tower.layers.1", "adapter.post_layers.0", "language_model.model.layers.1"])
def test_a_failed_push_loses_nothing(model, listener, part):
    session, samples = listener.listen(model, instruction=INSTRUCTION), clip(1.6)
    layer, calls = model.get_submodule(part), []

    def fail(*_):
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError("no memory for a layer")

    hook = layer.register_forward_pre_hook(fail)
    failed = 0
    for piece in pieces(samples, 1600):
        try:
            session.push(piece)
        except MemoryError:
            failed += 1
    hook.remove()
    assert failed == 1
    assert "".join(session.answer(**GREEDY)) == offline(model, listener, samples)


@pytest.mark.parametrize(
    "samples, error, message",
    [
        ([1, 2], TypeError, "floats within .* or as int16, got int64"),
        (np.zeros((4, 2), np.float32), ValueError, "one channel"),
        ([0.0, np.nan], ValueError, "NaN or infinite"),
        ([3000.0], ValueError, "far too loud"),
    ],
)
def test_samples_that_are_none_are_refused_and_not_kept(model, listener, samples, error, message):
    session = listener.listen(model)
    with pytest.raises(error, match=message):
        session.push(samples)
    assert session._features.num_samples == 0
    with pytest.raises(ValueError, match="too little speech to answer: 0.0000 s"):
        session.answer()


def test_a_conversation_beyond_the_context_is_an_error_until_it_is_reset(listener):
    model = streaming_model(text={"max_position_embeddings": 40})
    session = listener.listen(model)
    with pytest.raises(ValueError, match=r"context holds 40.*reset\(\)"):
        listen_to(session, clip(30.0), 16_000)
    session.reset()
    listen_to(session, clip(0.5))
    assert "".join(session.answer(do_sample=False, max_new_tokens=2, min_new_tokens=2))


def test_sessions_of_one_model_do_not_meet(model, listener):
    clips = [clip(1.1 + 0.3 * index, seed=index) for index in range(3)]
    sessions = [listener.listen(model, instruction=INSTRUCTION) for _ in clips]
    for row in range(20):
        for session, samples in zip(sessions, clips):
            session.push(samples[row * 1600 : (row + 1) * 1600])
    answers = [session.answer(**GREEDY) for session in sessions]  # three threads
    assert ["".join(answer) for answer in answers] == [offline(model, listener, samples) for samples in clips]


# -- end of speech ----------------------------------------------------------------------------------------------------


def speech_then_silence(speech_s=1.0, silence_s=1.0, noise=1e-3):
    rng = np.random.default_rng(0)
    silence = (noise * rng.standard_normal(int(silence_s * SAMPLING_RATE))).astype(np.float32)
    return np.concatenate([clip(speech_s), silence])


@pytest.mark.parametrize(
    "rule, noise, ends_at_s",
    [
        ({"silence_ms": 300, "max_weight": 99}, 1e-3, 1.3),
        ({"silence_ms": 700, "max_weight": 99}, 1e-3, 1.7),
        ({"silence_ms": 300, "max_weight": 99, "below_peak_db": 70}, 1e-3, None),  # noise 50 dB down is loud
        ({"silence_ms": 700, "max_weight": 0.01}, 1e-3, None),  # CIF gathers weight in noise
    ],
)
def test_speech_ends_after_a_silence_without_tokens(model, listener, rule, noise, ends_at_s):
    session = listener.listen(model, end_of_speech=rule)
    samples, ended = speech_then_silence(noise=noise), None
    for index, piece in enumerate(pieces(samples, 160)):
        session.push(piece)
        if ended is None and session.has_ended:
            ended = (index + 1) * 0.01
    assert ended == (None if ends_at_s is None else pytest.approx(ends_at_s, abs=0.021))


def test_the_next_turn_has_an_end_of_its_own_and_hears_what_waited(model, listener):
    session = listener.listen(model, end_of_speech={"silence_ms": 300, "max_weight": 99})
    session.push(speech_then_silence())
    assert session.has_ended
    held = StopsAfter(1, threading.Event(), hold=threading.Event())
    answer = session.answer(**GREEDY, stopping_criteria=[held])
    session.push(speech_then_silence(1.0, 0.2))
    held.hold.set()
    assert "".join(answer) and not session.has_ended
    session.push(speech_then_silence(0.01, 0.15)[160:])
    assert session.has_ended


def test_without_speech_nothing_ends(model, listener):
    session = listener.listen(model, end_of_speech=True)
    assert not session.has_ended
    with pytest.raises(ValueError, match="end_of_speech=True"):
        _ = listener.listen(model).has_ended
    for given, message in [(3, "True, False or a dict"), ({"silence": 1}, "Unknown"), ({"silence_ms": 0}, "above 0")]:
        with pytest.raises(ValueError, match=message):
            listener.listen(model, end_of_speech=given)


def test_reset_begins_anew(model, listener):
    greeting = [{"role": "system", "content": "the red cat"}]
    session = listener.listen(model, instruction=INSTRUCTION, messages=greeting)
    answers = []
    for _ in range(2):
        listen_to(session, clip(0.8))
        answers.append("".join(session.answer(**GREEDY)))
        assert session.messages[:1] == greeting and len(session.messages) == 3
        session.push(clip(0.3, seed=5))
        session.reset()
        assert session.messages == greeting and session.num_speech_tokens == 0
    assert answers[0] == answers[1]


def test_models_and_processors_of_whole_clips_are_refused(model, processor, listener):
    with pytest.raises(ValueError, match="depend on the whole clip"):
        processor.listen(model)
    with pytest.raises(ValueError, match="reads whole clips"):
        listener.listen(make_model())
    with pytest.raises(ValueError, match="multiple of 20 ms"):
        listener.listen(model, chunk_ms=330)
    with pytest.raises(ValueError, match="training mode"):
        listener.listen(streaming_model().train())
    with pytest.raises(ValueError, match="Give text only"):
        listener.listen(model, messages=turns(clip(0.1)))
    with pytest.raises(ValueError, match="audio placeholder"):
        listener.listen(model, instruction="<|audio|>")


def test_memory_does_not_grow_with_the_speech(model, listener):
    """What is kept between blocks, beside the LLM's cache, is that of the left context and of one chunk."""
    session = listener.listen(model)
    sizes = []
    for index in range(40):
        session.push(clip(1.0, seed=index))
        kept = [
            session._stream._state.mel,
            *sum(session._stream._state.encoder + session._stream._state.before_cif, ()),
        ]
        sizes.append(sum(each.untyped_storage().nbytes() for each in kept) + session._features._samples.nbytes)
    assert max(sizes[2:20]) == max(sizes[20:])
    assert max(sizes) < 120_000
