"""Speech recognition: word and token times, and recordings longer than the context in chunks."""

import itertools
import json

import numpy as np
import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from processing import BlspKdProcessor, BlspKdSpeechRecognitionPipeline
from processing.recording_chunks import chunks_of
from tests.helpers.prompts import SAMPLING_RATE, clip
from tests.helpers.spoken_cases import INSTRUCTION
from tests.pipelines.cases import CONTENTS, SHORT, WAVEFORM, chat, clips_of_all_durations, direct, saying

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
    alone = [recognizes(item, return_timestamps="word") for item in clips_of_all_durations()]
    together = recognizes(clips_of_all_durations(), batch_size=3, return_timestamps="word")
    assert [result["text"] for result in together] == [result["text"] for result in alone] == expected
    for result, other in zip(together, alone):
        assert [word["text"] for word in result["chunks"]] == [word["text"] for word in other["chunks"]]
        times, others = ([word["timestamp"] for word in each["chunks"]] for each in (result, other))
        np.testing.assert_allclose(times, others, atol=1e-4)


@pytest.mark.parametrize("num_samples", [1, 99, 100, 101, 250, 1000, 1001])
@pytest.mark.parametrize("length, left, right", [(100, 0, 0), (100, 20, 10), (100, 49, 50), (7, 3, 3)])
@pytest.mark.parametrize("shortest", [1, 5])
def test_chunks_cover_a_recording_once(num_samples, length, left, right, shortest):
    chunks = chunks_of(num_samples, length, left, right, shortest)
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
