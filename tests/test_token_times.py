"""The times of tokens and words: the clock of CIF's integral, silence, alignment of text and speech, words."""

import argparse
import itertools
import json
import sys

import numpy as np
import pytest
import soundfile
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast, TextStreamer

from examples.experiments import measure_timestamps
from modeling_blsp_kd.encoder_families import frame_starts_s
from modeling_blsp_kd.token_times import (
    align,
    answer_token_times,
    find_silence,
    loudness,
    text_token_times,
    token_times,
)
from processing import BlspKdProcessor
from tests.helpers.encoders import ENCODERS, model_of, processor_of
from tests.helpers.models import make_config, make_model
from tests.helpers.prompts import SAMPLING_RATE, clip, spoken_prompts

pytestmark = pytest.mark.numerical

RAW = {"delay_s": 0.0, "silence": 0.0}
GREEDY = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
AUDIO = "<|audio|>"


def literal_times(alphas, num_tokens, is_silent, frame_starts, frame_duration, delay):
    """One clip, frame by frame: the weight that CIF gathers a delay later, of frames in which something is said."""

    def gathered(place):
        place = min(max(place, 0.0), len(alphas))
        whole = int(place)
        rest = (place - whole) * alphas[whole] if whole < len(alphas) else 0.0
        return sum(alphas[:whole]) + rest

    shift = delay / frame_duration
    said = [
        0.0 if silent else gathered(frame + 1 + shift) - gathered(frame + shift)
        for frame, silent in enumerate(is_silent)
    ]
    said = [weight * num_tokens / sum(said) for weight in said]
    times = []
    for token in range(num_tokens):
        total, start, end = 0.0, None, None
        for frame, weight in enumerate(said):
            if start is None and total + weight > token + 1e-9:
                start = frame_starts[frame] + frame_duration * max(0.0, (token - total) / weight)
            if end is None and weight > 0 and total + weight >= token + 1 - 1e-9:
                end = frame_starts[frame] + frame_duration * (token + 1 - total) / weight
            total += weight
        times.append([start, end])
    return times


@pytest.mark.parametrize("seed", range(6))
def test_times_are_those_of_a_literal_walk_over_frames(seed):
    rng = np.random.default_rng(seed)
    num_frames, frame_duration = [37, 9, 23], 0.04
    num_tokens = torch.tensor([5, 14, 1])  # also several tokens in one frame
    delay = rng.uniform(-0.2, 0.2)
    alphas, is_silent = torch.zeros(3, 37), torch.ones(3, 37, dtype=torch.bool)
    for row, length in enumerate(num_frames):
        alphas[row, :length] = torch.tensor(rng.random(length) ** 4 + 1e-3)
        is_silent[row, :length] = torch.tensor(rng.random(length) < 0.3)
        is_silent[row, length // 2] = False
    starts = torch.arange(37) * frame_duration
    times = token_times(alphas, num_tokens, is_silent, starts, frame_duration, delay)
    assert times.shape == (3, 14, 2) and times.dtype == torch.float32
    for row, (length, count) in enumerate(zip(num_frames, num_tokens.tolist())):
        arguments = (alphas[row, :length].double().tolist(), count, is_silent[row, :length].tolist())
        expected = literal_times(*arguments, starts.tolist(), frame_duration, delay)
        assert times[row, :count] == pytest.approx(np.array(expected), abs=1e-5)
        assert times[row, count:].isnan().all()
        alone = token_times(
            *(alphas[row : row + 1, :length], num_tokens[row : row + 1], is_silent[row : row + 1, :length]),
            *(starts[:length], frame_duration, delay),
        )
        assert torch.equal(alone[0], times[row, :count])


def test_a_pause_belongs_to_no_token():
    alphas = torch.tensor([[0.5, 0.5, 0.5, 0.5, 0.1, 0.1, 0.1, 0.5, 0.5, 0.1]])
    is_silent = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 0, 0, 1]], dtype=torch.bool)
    times = token_times(alphas, torch.tensor([3]), is_silent, torch.arange(10.0), 1.0, 0.0)
    assert times[0] == pytest.approx(np.array([[0, 2], [2, 4], [7, 9]]))


@pytest.mark.parametrize("alphas, delay", [([0.0] * 4, 0.0), ([0.4, 0.4, 0.4, 0.4], 5.0)], ids=["no weight", "short"])
def test_tokens_of_a_clip_with_nothing_left_share_its_sound(alphas, delay):
    is_silent = torch.tensor([[False, True, False, False]])
    times = token_times(torch.tensor([alphas]), torch.tensor([3]), is_silent, torch.arange(4.0), 1.0, delay)
    assert times[0].tolist() == [[0, 1], [2, 3], [3, 4]]


def test_a_window_begins_in_time_though_the_frames_before_it_leave_a_rest():
    """Frames were counted on through windows: 1499 of 20 ms in 30 s with wav2vec 2.0, so 20 ms too early per window."""
    whisper = frame_starts_s(make_config().speech_config, 4000, 1500)
    assert whisper.numpy() == pytest.approx(np.arange(4000) * 0.02)
    wav2vec = frame_starts_s(ENCODERS["wav2vec2-layer"][0](), 3500, 1499)
    assert wav2vec[[0, 1, 1498, 1499, 1500, 2998]].tolist() == pytest.approx([0, 0.02, 29.96, 30.0, 30.02, 60.0])


def test_a_whisper_encoder_of_half_the_rate_has_frames_of_double_length():
    """The tiny world's encoder was taken for Whisper's 20 ms, and all its times came out at half."""
    assert make_model().frame_duration_s == 0.02
    assert make_model(speech={"max_source_positions": 750}).frame_duration_s == 0.04


@torch.no_grad()
def test_raw_times_are_the_firing_places():
    model = make_model(timestamps=RAW)
    features = torch.randn(2, 80, 170)
    mask = torch.ones(2, 170)
    mask[1, 90:] = 0
    assert model.get_audio_features(features, mask).token_times is None, "only where they are asked for"
    heard = model.get_audio_features(features, mask, output_token_times=True)
    for row, count in enumerate(heard.num_speech_tokens.tolist()):
        starts, ends = heard.token_times[row, :count].unbind(-1)
        torch.testing.assert_close(ends, heard.firing_places[row, :count] * 0.02)
        assert starts[0] == 0 and torch.equal(starts[1:], ends[:-1])
        assert ends[-1] == pytest.approx([1.70, 0.90][row])


@torch.no_grad()
def test_times_of_a_long_clip_go_on_through_its_windows():
    model = make_model(speech={"max_source_positions": 50}, timestamps={"delay_s": 0.1, "silence": 0.3})
    features, mask = torch.randn(2, 80, 257), torch.ones(2, 257)
    mask[1, 61:] = 0
    heard = model.get_audio_features(features, mask, output_token_times=True)
    alone = model.get_audio_features(features[1:, :, :61], output_token_times=True)
    count = int(heard.num_speech_tokens[1])
    torch.testing.assert_close(heard.token_times[1, :count], alone.token_times[0])
    times = heard.token_times[0]
    assert not times.isnan().any() and (times[:, 0] <= times[:, 1]).all() and (times.flatten().diff() >= 0).all()
    # 30 s are 50 frames.
    assert times[-1, 1] > 2 * 30 and times[-1, 1] <= heard.frame_mask[0].sum() * 0.6 + 1e-4


@pytest.mark.parametrize("name", ["whisper", "wav2vec2-layer", "wav2vec2-bert", "parakeet"])
@torch.no_grad()
def test_the_last_token_of_half_a_minute_and_a_bit_ends_with_the_clip(name, processor):
    model = make_model(timestamps=RAW) if name == "whisper" else model_of(name, timestamps=RAW)
    processor = processor if name == "whisper" else processor_of(name, processor)
    inputs = processor(AUDIO, clip(32.0), sampling_rate=SAMPLING_RATE)
    heard = model.get_audio_features(inputs["input_features"], inputs["input_features_mask"], output_token_times=True)
    # Up to one frame less: encoders of waveforms leave the rest of a clip that fills no frame.
    assert heard.token_times.max() == pytest.approx(32.0, abs=1.1 * model.frame_duration_s)


@pytest.mark.parametrize("name", ["whisper", "wav2vec2-layer", "hubert-group", "wav2vec2-bert", "parakeet"])
@torch.no_grad()
def test_nothing_is_said_in_silence(name, processor):
    """In a clip with silence around the sound, and one after it for 30 s of padding."""
    model = make_model() if name == "whisper" else model_of(name)
    processor = processor if name == "whisper" else processor_of(name, processor)
    rng = np.random.default_rng(0)
    quiet = [0.001 * rng.standard_normal(SAMPLING_RATE).astype(np.float32) for _ in range(2)]
    surrounded = np.concatenate([quiet[0][:8000], clip(1.0), quiet[1]])
    inputs = processor(AUDIO * 2, [surrounded, clip(4.0, seed=1)], sampling_rate=SAMPLING_RATE)
    heard = model.get_audio_features(inputs["input_features"], inputs["input_features_mask"], output_token_times=True)
    times = heard.token_times[0, : int(heard.num_speech_tokens[0])]
    # One frame, and what it hears around itself.
    assert times.min() == pytest.approx(0.5, abs=0.11) and times.max() == pytest.approx(1.5, abs=0.11)


def test_loudness_does_not_hear_padding():
    mel = torch.tensor([[[-1.0, 0.5, 1.0, 1.0, 0.0, 0.0, 9.0, 9.0]]]).expand(1, 3, 8)
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0]])
    heard = loudness(mel, mask, 2, 2, 4)
    assert heard.tolist() == [[0.5, 1.0, 0.0, -torch.inf]]
    is_silent = find_silence(torch.tensor([[0.5, 1.0, 0.0, 0.9]]), torch.tensor([[True, True, True, False]]), 0.3)
    assert is_silent.tolist() == [[False, False, True, True]]
    waveform = torch.tensor([[1.0, -1.0, 0.1, 0.1, 0.0, 0.0, 7.0]])
    assert loudness(waveform, torch.tensor([[1, 1, 1, 1, 1, 1, 0]]), 1, 2, 3)[0].tolist() == pytest.approx([0, -2, -8])


# -- text on speech ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_text, num_speech", [(1, 1), (1, 5), (5, 1), (4, 4), (3, 6), (6, 3), (5, 4), (4, 5)])
@pytest.mark.parametrize("seed", range(3))
def test_alignment_is_the_best_of_all(num_text, num_speech, seed):
    similarity = torch.randn(num_text, num_speech, generator=torch.Generator().manual_seed(seed))
    places = align(similarity)
    ways = itertools.combinations_with_replacement(range(num_speech), num_text)
    if num_text <= num_speech:
        ways = [way for way in ways if len(set(way)) == num_text]
    else:
        ways = [way for way in ways if len(set(way)) == num_speech]
    best = max(ways, key=lambda way: sum(similarity[text, speech].item() for text, speech in enumerate(way)))
    assert tuple(places.tolist()) == best


def test_text_tokens_on_one_speech_token_divide_its_time():
    times = torch.tensor([[0.0, 1.0], [2.0, 5.0], [6.0, 7.0]])
    speech = torch.eye(3)
    text = 2.0 * speech[[0, 1, 1, 1, 2]]
    assert text_token_times(text, speech, times).tolist() == [[0, 1], [2, 3], [3, 4], [4, 5], [6, 7]]
    assert text_token_times(text[[1, 4]], speech, times).tolist() == [[2, 5], [6, 7]]


@torch.no_grad()
def test_a_word_that_is_spoken_of_gets_its_own_time(processor):
    """Answers that hold other tokens than were said: each lies where the speech is its embedding."""
    model = make_model()
    inputs = spoken_prompts(processor, durations_s=(1.3,))
    heard = model.get_audio_features(inputs["input_features"], inputs["input_features_mask"], output_token_times=True)
    count = int(heard.num_speech_tokens[0])
    assert count > 6
    said = torch.arange(100, 100 + count)
    heard.pooler_output[0, :count] = model.get_input_embeddings()(said)
    settings = {"eos_token_id": [2], "pad_token_id": 0}
    for answer, places in (
        (said, range(count)),
        (torch.cat([said[[2, 5]], torch.tensor([2])]), [2, 5, None]),
        (torch.tensor([2, 0, 0]), [None] * 3),
    ):
        embed = model.get_input_embeddings()
        times = answer_token_times(embed, answer[None], heard, torch.tensor([True]), settings)[0]
        for time, place in zip(times, places):
            if place is None:
                assert time.isnan().all()
            else:
                assert torch.equal(time, heard.token_times[0, place])


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
@torch.no_grad()
def test_generate_tells_when_each_token_was_said(options, processor):
    model = make_model(plora=True)
    prompts = ["repeat<|audio|>", "the cat ran", "<|audio|>and the words"]
    audio = [clip(0.5, seed=0), clip(1.7, seed=1)]
    inputs = processor(text=prompts, audio=audio, sampling_rate=SAMPLING_RATE)
    prompt_length = inputs["input_ids"].shape[1]
    torch.manual_seed(0)
    plain = model.generate(**inputs, **{**GREEDY, **options})
    torch.manual_seed(0)
    output = model.generate(**inputs, **{**GREEDY, **options}, return_timestamps=True)
    assert torch.equal(output.sequences, plain)
    times = output.token_timestamps
    assert times.shape == (*output.sequences.shape, 2) and times.is_floating_point()
    assert times[:, :prompt_length].isnan().all()
    num_answers = len(plain) // 3
    for row, answer in enumerate(times[:, prompt_length:]):
        if row // num_answers == 1:
            assert answer.isnan().all(), "no audio"
            continue
        duration = [0.5, None, 1.7][row // num_answers]
        is_end = torch.isin(output.sequences[row, prompt_length:], torch.tensor([0, 2]))
        assert torch.equal(answer.isnan().all(-1), is_end)
        said = answer[~is_end]
        assert (said >= 0).all() and (said <= duration + 0.02).all()
        assert (said.flatten().diff() >= 0).all(), "in order, and none ends before it begins"


@torch.no_grad()
def test_timestamps_of_a_batch_are_those_of_single_rows(processor):
    model = make_model(plora=True)
    batch = spoken_prompts(processor, durations_s=(0.4, 1.1, 2.3))
    length = batch["input_ids"].shape[1]
    together = model.generate(**batch, **GREEDY, return_timestamps=True).token_timestamps[:, length:]
    for row in range(3):
        num_mel = int(batch["input_features_mask"][row].sum())
        alone = {name: value[row : row + 1] for name, value in batch.items()}
        alone["input_features"] = alone["input_features"][..., :num_mel]
        alone["input_features_mask"] = alone["input_features_mask"][:, :num_mel]
        expected = model.generate(**alone, **GREEDY, return_timestamps=True).token_timestamps[0, length:]
        torch.testing.assert_close(together[row], expected, equal_nan=True)


@torch.no_grad()
def test_timestamps_while_streaming_from_embeddings_and_after_a_cache(processor, capsys):
    model = make_model(text={"vocab_size": 301})
    inputs = spoken_prompts(processor, durations_s=(0.9,))
    length = inputs["input_ids"].shape[1]
    expected = model.generate(**inputs, **GREEDY, return_timestamps=True)
    streamed = model.generate(**inputs, **GREEDY, return_timestamps=True, streamer=TextStreamer(processor.tokenizer))
    torch.testing.assert_close(streamed.token_timestamps, expected.token_timestamps, rtol=0, atol=0, equal_nan=True)

    embeds = {**inputs, "inputs_embeds": model.get_input_embeddings()(inputs["input_ids"])}
    del embeds["input_ids"]
    embedded = model.generate(**embeds, **GREEDY, return_timestamps=True)
    answer = expected.token_timestamps[:, length:]
    torch.testing.assert_close(embedded.token_timestamps, answer, rtol=0, atol=0, equal_nan=True)

    first = model.generate(input_ids=torch.tensor([[1, 5, 6]]), **GREEDY, return_dict_in_generate=True)
    turn = torch.cat([first.sequences[:, -1:], inputs["input_ids"]], dim=1)
    mask = torch.cat([first.past_key_values.attention_mask, torch.ones_like(turn)], dim=1)
    later = model.generate(
        **{**inputs, "input_ids": turn, "attention_mask": mask},
        past_key_values=first.past_key_values,
        **GREEDY,
        return_timestamps=True,
    )
    assert later.token_timestamps.shape == (1, turn.shape[1] + 6, 2)
    assert not later.token_timestamps[:, -6:].isnan().all()

    whole = torch.cat([expected.sequences, torch.tensor([[5, 6, 7]])], dim=1)
    conversation = {**inputs, "input_ids": whole, "attention_mask": torch.ones_like(whole)}
    fresh = model.generate(**conversation, **GREEDY, return_timestamps=True)
    cached = model.generate(**conversation, **GREEDY, return_timestamps=True, past_key_values=expected.past_key_values)
    torch.testing.assert_close(cached.token_timestamps, fresh.token_timestamps, equal_nan=True)


def test_what_has_no_timestamps_is_named(processor):
    model = make_model()
    inputs = processor(text=AUDIO * 2, audio=[clip(0.4), clip(0.5)], sampling_rate=SAMPLING_RATE)
    with pytest.raises(ValueError, match="prompts with one audio each, but a prompt here has several"):
        model.generate(**inputs, **GREEDY, return_timestamps=True)
    with pytest.raises(ValueError, match="needs the audio: pass input_features"):
        model.generate(torch.tensor([[3, 4]]), **GREEDY, return_timestamps=True)
    model = make_model(adapter={"type": "subsampler", "bottleneck_dim": 8})
    with pytest.raises(ValueError, match="which the subsampler adapter does not make"):
        model.generate(**spoken_prompts(processor), **GREEDY, return_timestamps=True)
    heard = model.get_audio_features(torch.randn(1, 80, 50), output_token_times=True)
    assert heard.token_times is None


@pytest.mark.parametrize(
    "options, message",
    [
        ({"delay_s": 2}, r"delay_s must lie in \[-1, 1\] \(seconds\), got 2"),
        ({"silence": 1.0}, r"silence must lie in \[0, 1\), got 1.0"),
        ({"shift": 0.1}, r"Unknown option\(s\) \['shift'\] in timestamps"),
    ],
)
def test_timestamp_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        make_config(timestamps=options)


def test_timestamp_options_are_saved_and_may_be_given_when_loading(tmp_path):
    config = make_config(timestamps={"delay_s": 0.2})
    assert config.timestamps == {"delay_s": 0.2, "silence": 0.3}
    config.save_pretrained(tmp_path)
    assert type(config).from_pretrained(tmp_path).timestamps == config.timestamps
    assert type(config).from_pretrained(tmp_path, timestamps=RAW).timestamps == RAW


# -- words ------------------------------------------------------------------------------------------------------------


def seconds(num_tokens):
    """Token i lasts from i to i + 0.5."""
    start = torch.arange(float(num_tokens))
    return torch.stack([start, start + 0.5], dim=1)


def test_words_are_grouped_from_tokens_that_split_characters(processor):
    text = "the réd  ça, 猫 ran.\n“words”!"
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert any("\N{REPLACEMENT CHARACTER}" in processor.decode(token_id) for token_id in ids)
    words = processor.word_timestamps(torch.tensor(ids), seconds(len(ids)))
    assert [word["text"] for word in words] == ["the", " réd", "  ça,", " 猫", " ran.", "\n“words”!"]
    assert "".join(word["text"] for word in words) == text
    assert words[0]["timestamp"][0] == 0 and words[-1]["timestamp"][1] == len(ids) - 0.5
    for word, following in itertools.pairwise(words):
        assert word["timestamp"][1] == following["timestamp"][0] - 0.5  # the token before
    for word in words:
        start, end = (int(second) for second in word["timestamp"])
        assert processor.decode(ids[start : end + 1]) == word["text"]


def test_words_of_a_tokenizer_that_marks_spaces_in_front(processor):
    """Sentencepiece drops the space of whatever is decoded first, so words decoded alone would join."""
    pieces = ["<unk>", "▁the", "▁r", "ed", "▁", "c", "at", "<0xC3>", "<0xA9>", AUDIO]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    words = BlspKdProcessor(processor.feature_extractor, tokenizer).word_timestamps(
        torch.tensor([1, 2, 3, 4, 5, 6, 7, 8]), seconds(8)
    )
    assert [word["text"] for word in words] == ["the", " red", " caté"]
    assert [word["timestamp"] for word in words] == [(0, 0.5), (1, 2.5), (3, 7.5)]


@torch.no_grad()
def test_words_of_a_generated_row(processor):
    model = make_model()
    inputs = spoken_prompts(processor, durations_s=(0.9, 0.5))
    length = inputs["input_ids"].shape[1]
    output = model.generate(**inputs, do_sample=False, max_new_tokens=12, return_timestamps=True)
    for sequence, times in zip(output.sequences, output.token_timestamps):
        words = processor.word_timestamps(sequence, times)
        text = processor.decode(sequence[length:], skip_special_tokens=True)
        assert "".join(word["text"] for word in words) == text.rstrip()
        assert all(word["timestamp"][0] <= word["timestamp"][1] for word in words)
    special = processor.tokenizer.convert_tokens_to_ids("<|user|>")
    assert processor.word_timestamps([special, 2], [[0.0, 1.0], [float("nan")] * 2]) == []


def test_words_need_one_row_of_tokens_and_their_times(processor):
    with pytest.raises(ValueError, match=r"takes one row.*\(1, 3\) and \(3, 2\)"):
        processor.word_timestamps(torch.ones(1, 3, dtype=torch.long), torch.zeros(3, 2))


# -- the command that measures ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_delay_that_made_the_times_is_found_and_measured_as_exact(processor, tmp_path, monkeypatch, capsys):
    model = make_model(timestamps={"delay_s": 0.16})
    train, test = [], []
    for index in range(3):
        audio = f"{index}.wav"
        soundfile.write(tmp_path / audio, clip(0.9 + 0.3 * index, seed=index), SAMPLING_RATE)
        ids = processor.tokenizer("the red cat ran")["input_ids"]
        features = processor.extract_features([str(tmp_path / audio)])
        features = {name: torch.as_tensor(values) for name, values in features.items()}
        counts = torch.tensor([len(ids)])
        heard = model.get_audio_features(**features, num_speech_tokens=counts, output_token_times=True)
        words = processor.word_timestamps(ids, heard.token_times[0])
        train.append({"audio": audio, "text": "the red cat ran", "voice": "a", "words": words})

        block = {"type": "audio", "path": str(tmp_path / audio)}
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "text", "text": "say"}, block]}],
            **{"add_generation_prompt": True, "tokenize": True, "return_dict": True},
        )
        output = model.generate(**inputs, do_sample=False, max_new_tokens=9, return_timestamps=True)
        words = processor.word_timestamps(output.sequences[0], output.token_timestamps[0])
        test.append({"audio": audio, "text": "what it says", "voice": "ab"[index % 2], "words": words})
    for name, rows in (("train", train), ("test", test)):
        for row in rows:
            row["words"] = [
                {"text": word["text"].strip(), "start": word["timestamp"][0], "end": word["timestamp"][1]}
                for word in row["words"]
            ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    model.config.timestamps = {"delay_s": 0.0, "silence": 0.3}
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    arguments = {
        "--model": tmp_path / "model",
        "--train_manifest": tmp_path / "train.jsonl",
        "--eval_manifest": tmp_path / "test.jsonl",
        "--instruction": "say",
        "--max_new_tokens": 9,
        "--results": tmp_path / "results.json",
    }
    arguments = [str(argument) for pair in arguments.items() for argument in pair]
    monkeypatch.setattr(sys, "argv", ["measure_timestamps.py", *arguments, "--save"])
    measure_timestamps.main()

    assert json.loads((tmp_path / "model" / "config.json").read_text())["timestamps"]["delay_s"] == 0.16
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["errors_ms"]) == {"seen voices", "held out voices"}
    for by_name in results["errors_ms"].values():
        assert by_name["corrected"]["words_right"] == by_name["raw"]["words_right"] == 1.0
        assert by_name["corrected"]["both"]["percentile_90"] < 1 < by_name["raw"]["both"]["median"]
    assert "delay 0.16 s, fitted on 3 training clips" in capsys.readouterr().out


def test_errors_are_those_of_words_that_are_right():
    words = [{"text": text, "start": float(place), "end": place + 0.5} for place, text in enumerate("a b c d".split())]
    heard = [{"text": text, "timestamp": (start, start + 1)} for text, start in ((" a", 0.1), (" c", 2.2), (" d", 2.9))]
    errors = np.array(measure_timestamps.errors_of({"words": words}, heard))
    assert errors == pytest.approx(np.array([[0.1, 0.6], [0.2, 0.7], [-0.1, 0.4]]))
    summary = measure_timestamps.summarise(errors, 0.75)
    assert summary["start"] == pytest.approx({"median": 100, "percentile_90": 180, "bias": 100})
    assert measure_timestamps.summarise(np.empty((0, 2)), 0.0)["both"]["median"] is None


def test_a_manifest_without_words_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"audio": "a.wav", "text": "a"}\n')
    manifest = str(tmp_path / "a.jsonl")
    options = argparse.Namespace(train_manifest=manifest, eval_manifest=manifest, allow_outside_paths=False)
    with pytest.raises(ValueError, match="no 'words' with their 'text', 'start' and 'end'"):
        measure_timestamps.load_rows(options)
    options.eval_manifest = None
    with pytest.raises(ValueError, match="Give both --train_manifest and --eval_manifest"):
        measure_timestamps.load_rows(options)
