"""Human speech: digit strings, read sentences, frames that are kept, the analysis of errors, the learning curve."""

import json
import os
import random
import sys
from collections import Counter

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from examples import train
from examples.experiments import make_digit_manifest
from examples.experiments.human_speech import build_sentence_llm, error_analysis, frame_probe, learning_curve, sentences
from examples.experiments.human_speech.build_digit_llm import build_tokenizer, draw_dialogues, held_out_prompts
from examples.experiments.human_speech.digits import (
    DIGITS,
    KINDS,
    MAX_SUMMED,
    draw_question,
    draw_string,
    kinds_of,
    number_in_words,
    split_of,
)
from examples.experiments.human_speech.error_analysis import as_markdown, describe, read_rows
from examples.tiny_world.build_llm import build_model
from processing.training_rows import kept_frames
from processing.training_rows.augmentation import Augmentation
from processing.training_rows.kept_frames import KeptFrames
from tests.helpers.models import make_model
from tests.helpers.prompts import SAMPLING_RATE, clip


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("repeat", "seven zero nine seven"),
        ("reverse", "seven nine zero seven"),
        ("sort", "zero seven seven nine"),
        ("next", "eight one zero eight"),
        ("largest", "nine"),
        ("smallest", "zero"),
        ("sum", "twenty three"),
        ("count", "four"),
        ("first", "seven"),
        ("last", "seven"),
    ],
)
def test_questions_have_the_right_answer(kind, expected):
    assert draw_question("seven zero nine seven".split(), kind, random.Random(0)).answer == expected


def test_occurrences_are_counted_of_digits_that_were_said_and_of_others():
    rng, words = random.Random(0), "two five two".split()
    for question in (draw_question(words, "occurrences", rng) for _ in range(50)):
        (counted,) = [digit for digit in DIGITS if digit in question.instruction.replace(".", "").split()]
        assert question.answer == number_in_words(words.count(counted))
    answers = Counter(draw_question(words, "occurrences", rng).answer for _ in range(300))
    assert set(answers) == {"zero", "one", "two"} and min(answers.values()) > 40


def test_numbers_in_words():
    assert [number_in_words(number) for number in (0, 9, 10, 19, 20, 36, 99)] == [
        "zero", "nine", "ten", "nineteen", "twenty", "thirty six", "ninety nine"
    ]  # fmt: skip
    assert len({number_in_words(number) for number in range(100)}) == 100


def test_strings_stay_in_their_split_and_long_ones_are_not_summed():
    rng = random.Random(3)
    drawn = {split: [draw_string(split, rng) for _ in range(300)] for split in ("train", "validation", "test")}
    for split, strings in drawn.items():
        assert {split_of(words) for words in strings} == {split}
        assert {len(words) for words in strings} == {2, 3, 4, 5, 6}
    everything = [split_of([*words, digit]) for words in drawn["train"] for digit in DIGITS]
    assert 0.03 < everything.count("validation") / len(everything) < 0.07
    assert 0.07 < everything.count("test") / len(everything) < 0.13
    assert all(("sum" in kinds_of(words)) == (len(words) <= MAX_SUMMED) for words in drawn["train"])
    with pytest.raises(ValueError, match="'dev'"):
        draw_string("dev", rng)


def test_runs_count_on_as_often_as_they_should():
    rng = random.Random(0)
    strings = [draw_string("train", rng, min_digits=6, run_share=0.3) for _ in range(600)]
    pairs = [pair for words in strings for pair in zip(words, words[1:])]
    share = np.mean([(DIGITS.index(first) + 1) % 10 == DIGITS.index(second) for first, second in pairs])
    assert abs(share - (0.3 + 0.7 * 0.1)) < 0.03


def test_a_word_is_one_token_for_who_loads_the_llm(tmp_path):
    # AutoTokenizer gives a Qwen2 its own tokenizer, whatever was saved.
    saved = build_tokenizer()
    build_model(saved).save_pretrained(tmp_path)
    saved.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    rng = random.Random(0)
    for question, answer in draw_dialogues(300, rng):
        for text in (question["content"], answer["content"]):
            assert tokenizer(text)["input_ids"] == saved(text)["input_ids"]
            assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
        ids = tokenizer(answer["content"], add_special_tokens=False)["input_ids"]
        assert len(ids) == len(answer["content"].split())
        words = question["content"].split("\n")[1].split()
        assert split_of(words) == "train"
    prompts = held_out_prompts("validation", 20, rng)
    assert set(prompts) == set(KINDS) and all(len(asked) == 20 for asked in prompts.values())
    assert all(split_of(text.split("\n")[1].split()) == "validation" for asked in prompts.values() for text, _ in asked)


def test_varied_digits_keep_their_order_and_change_speed_and_loudness(tmp_path):
    """Each digit is a tone of its own pitch, so that they can be told apart in the joined clip."""
    rate, recordings = 8000, []
    for number, pitch in enumerate((500, 1000, 1500)):
        tone = np.sin(2 * np.pi * pitch * np.arange(rate // 2) / rate).astype(np.float32)
        soundfile.write(tmp_path / f"{number}.flac", tone * 0.9, rate)
        recordings.append(tmp_path / f"{number}.flac")
    variation = make_digit_manifest.Variation((0.1, 0.1), of_digits=Augmentation(speeds=[1.25]), quietest_db=12)
    make_digit_manifest.join(recordings, tmp_path / "joined.flac", random.Random(0), variation)
    joined, _ = soundfile.read(tmp_path / "joined.flac")
    assert abs(len(joined) / rate - (4 * 0.1 + 3 * 0.5 / 1.25)) < 0.01
    loudest = []
    for number, pitch in enumerate((500, 1000, 1500)):
        start = round((0.1 + number * (0.1 + 0.4)) * rate)
        digit = joined[start : start + round(0.4 * rate)]
        heard = np.fft.rfft(digit * np.hanning(len(digit)))
        assert abs(np.abs(heard).argmax() * rate / len(digit) - 1.25 * pitch) < 10
        loudest.append(np.abs(digit).max())
    assert max(loudest) <= 0.51 and min(loudest) > 0.5 * 10 ** (-12 / 20) - 0.01 and np.ptp(loudest) > 0.02


def test_kept_frames_are_those_of_the_encoder_and_are_made_once(tmp_path):
    model = make_model().eval()
    tower, num_encoded = model.audio_tower, []
    tower.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(3, tower.config.num_mel_bins, 40, generator=generator)
    mask = torch.arange(40)[None] < torch.tensor([40, 23, 31])[:, None]
    features = features * mask[:, None]
    with torch.no_grad():
        expected = tower(features, mask)
        kept = KeptFrames(tower, tmp_path / "frames.safetensors")
        encode = kept.encode
        kept.encode = lambda features, *args, **options: (
            num_encoded.append(len(features)) or encode(features, *args, **options)
        )
        twice = tower(features[[1, 1], :, :23], mask[[1, 1], :23])  # in one batch, without the padding of another
        assert torch.equal(*twice.last_hidden_state)
        for _ in range(2):
            heard = tower(features, mask)
            assert torch.equal(heard.frame_mask, expected.frame_mask)
            difference = (heard.last_hidden_state - expected.last_hidden_state)[expected.frame_mask]
            assert difference.abs().max() < 5e-3, "float16"
        assert num_encoded == [1, 2]
        # The longest row of a batch is cut off at the end of an epoch that several processes share.
        assert tower(features[1:], mask[1:]).last_hidden_state.shape == expected.last_hidden_state[1:].shape
        kept.save()
        tower.forward = encode
        again = KeptFrames(tower, tmp_path / "frames.safetensors")
        again.encode = None
        assert torch.equal(tower(features, mask).last_hidden_state, heard.last_hidden_state)
        tower.forward = encode
        tower.conv1.bias += 0.1
        assert KeptFrames(tower, tmp_path / "frames.safetensors").identity != kept.identity


def test_two_runs_may_keep_frames_in_one_file_at_once(tmp_path, monkeypatch):
    """Both wrote `frames.unfinished`, and the second to finish found its own gone."""
    monkeypatch.setattr(kept_frames.os, "getpid", iter([1, 2]).__next__)
    towers = [make_model().audio_tower.requires_grad_(False) for _ in range(2)]
    first, second = (KeptFrames(tower, tmp_path / "frames.safetensors") for tower in towers)

    def write_while_the_other_does(frames, path):
        kept_frames.save_file = save_file
        save_file(frames, path)
        second.save()

    monkeypatch.setattr(kept_frames, "save_file", write_while_the_other_does)
    first.frames, second.frames = {"a": torch.zeros(1)}, {"b": torch.zeros(1)}
    first.save()
    assert [path.name for path in tmp_path.iterdir()] == ["frames.safetensors"]
    assert [*load_file(tmp_path / "frames.safetensors")] == ["a"]


def test_an_encoder_that_is_trained_cannot_keep_its_frames(tmp_path):
    tower = make_model().audio_tower
    tower.requires_grad_(True)
    with pytest.raises(ValueError, match="--freeze_speech_encoder"):
        KeptFrames(tower, tmp_path / "frames.safetensors")


def test_clips_that_change_cannot_keep_their_frames(tmp_path, monkeypatch):
    options = ["--kept_frames", str(tmp_path / "frames"), "--speeds", "0.9", "1.1", "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["train.py", *options])
    with pytest.raises(ValueError, match="--speeds and --noise make another clip"):
        train.main()


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--left_out_speaker", "eve"], "'eve' is not among"), (["--test_split", "validation"], "goes with --questions")],
)
def test_options_that_would_do_nothing_are_told(options, message, tmp_path, monkeypatch, capsys):
    soundfile.write(tmp_path / "one.wav", clip(0.3), 8000)
    (tmp_path / "all.jsonl").write_text(json.dumps({"file_name": "one.wav", "text": "one", "speaker": "ann"}) + "\n")
    arguments = ["--recordings", str(tmp_path / "all.jsonl"), "--output", str(tmp_path / "digits"), *options]
    monkeypatch.setattr(sys, "argv", ["make_digit_manifest.py", *arguments])
    with pytest.raises(SystemExit):
        make_digit_manifest.main()
    assert message in capsys.readouterr().err


def write_predictions(folder, rows):
    """Rows of (said, heard, answered from speech, right answer, answered from text)."""
    (folder / "predictions").mkdir(parents=True)
    for system in ("text", "speech"):
        with (folder / "predictions" / f"{system}.jsonl").open("w") as file:
            for number, (said, heard, answered, answer, from_text) in enumerate(rows):
                predicted = {"answers": answered if system == "speech" else from_text, "transcripts": heard}
                line = {"id": str(number), "text": said, "kind": "first", "voice": "ann", "answer": answer}
                file.write(json.dumps({**line, "predicted": predicted}) + "\n")


def test_errors_are_told_apart(tmp_path):
    rows = [
        ("one two three", "one two three", "one", "one", "one"),
        ("one two three", "one two three", "two", "one", "one"),  # heard right, answered wrong
        ("five two three", "nine two three", "nine", "five", "five"),  # misheard
        ("five two", "five", "six", "five", "five"),  # two missed
        ("six", "six eight", "eight", "six", "five"),  # eight made up
    ]
    write_predictions(tmp_path / "one", rows)
    write_predictions(tmp_path / "two", rows)
    group = describe({name: read_rows(tmp_path / name) for name in ("one", "two")})
    assert (
        group["answers"]["all voices"]
        == group["answers"]["ann"]
        == {
            "right": 0.2,
            "heard right, answered wrong": 0.2,
            "count right, digits misheard": 0.2,
            "count wrong": 0.4,
        }
    )
    digits = group["digits"]["all voices"]
    assert digits["digits_said"] == 24 and digits["by_digit"]["five"]["misheard"] == {"nine": 2}
    assert (digits["misheard"], digits["missed"], digits["made_up"]) == (2 / 24, 2 / 24, 2 / 24)
    assert digits["by_digit"]["two"]["missed"] == 2 and digits["by_digit"]["eight"]["made_up"] == 2
    assert group["by_run"]["two"] == {
        "rows": 5,
        "text": 0.8,
        "speech": 0.2,
        "speech_interval": [0.0, pytest.approx(0.6)],
        "share_of_text": 0.25,
    }
    assert group["pooled"] == {**group["by_run"]["two"], "rows": 10}, "two seeds of one clip are no two clips"
    assert group["by_length"]["3"]["rows"] == 6
    assert group["by_length"]["1"]["speech_interval"] is None
    written = as_markdown({"all voices": group})
    assert "| five | 4 | nine 2 | 0 | 0 |" in written
    assert (
        "| ann | 0.200 | 0.200 | 0.200 | 0.400 |" in written and "| ann | 24 | 8.3% | 8.3% | 8.3% | 40.0% |" in written
    )
    (tmp_path / "two" / "predictions" / "text.jsonl").unlink()
    with pytest.raises(ValueError, match="--systems text,speech"):
        read_rows(tmp_path / "two")


def test_evaluations_of_one_name_are_refused(tmp_path, monkeypatch, capsys):
    rows = [("one", "one", "one", "one", "one")]
    folders = [tmp_path / "first" / "evaluation", tmp_path / "second" / "evaluation"]
    for folder in folders:
        write_predictions(folder, rows)
    monkeypatch.setattr(sys, "argv", ["error_analysis.py", "--output", "out", "--evaluations", *map(str, folders)])
    with pytest.raises(SystemExit):
        error_analysis.main()
    assert "told apart by the last part of their names, but these are ['evaluation']" in capsys.readouterr().err


@pytest.fixture
def make_digits(tmp_path, monkeypatch):
    """Training and test rows of strings of digits by ann (held out), bob and cas (seen) and dan (left out)."""
    recordings = []
    for speaker in ("ann", "bob", "cas", "dan"):
        for digit, word in enumerate(DIGITS):
            for take in range(2):
                name = f"{speaker}_{digit}_{take}.flac"
                soundfile.write(tmp_path / name, clip(0.3, seed=digit, rate=8000), 8000)
                recordings.append({"file_name": name, "text": word, "speaker": speaker})
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in recordings))

    def make(*options, names=("train", "test")):
        arguments = ["--recordings", tmp_path / "metadata.jsonl", "--output", tmp_path / "digits"]
        arguments += ["--questions", "digits", "--left_out_speaker", "dan", "--held_out_speakers", "ann"]
        arguments += ["--num_train", 30, "--num_test", 20, *options]
        monkeypatch.setattr(sys, "argv", ["make_digit_manifest.py", *map(str, arguments)])
        make_digit_manifest.main()
        return [[json.loads(line) for line in (tmp_path / "digits" / f"{name}.jsonl").open()] for name in names]

    return make


@pytest.mark.long
def test_manifest_of_digit_questions_leaves_a_speaker_out_and_varies_training_clips(make_digits, tmp_path):
    variation = ("--speeds", 0.8, 1.2, "--noise", "white", "--synthetic_share", 0.5)
    train, test = make_digits("--test_split", "validation", *variation)
    assert {row["voice"] for row in train[:15]} == {"bob", "cas"}
    assert all(row["voice"].startswith("espeak") for row in train[15:])
    assert Counter(row["voice"] for row in test) == {"ann": 10, "bob": 5, "cas": 5}
    for rows, split in ((train, "train"), (test, "validation")):
        for row in rows:
            assert split_of(row["text"].split()) == split
            assert soundfile.info(tmp_path / "digits" / row["audio"]).samplerate == 8000
    assert 3 < sum(row["kind"] == "repeat" for row in train) < 27


@pytest.mark.long
def test_speakers_held_out_in_turn_share_the_training_clips_of_the_others(make_digits, tmp_path):
    speakers = ("ann", "bob", "cas")
    names = [f"{part}_{speaker}" for speaker in speakers for part in ("train_without", "test")]
    manifests = make_digits("--synthetic_share", 0.2, "--held_out_speakers", *speakers, names=names)
    for held_out, train_rows, test_rows in zip(speakers, manifests[::2], manifests[1::2]):
        others = [speaker for speaker in speakers if speaker != held_out]
        voices = Counter(row["voice"] for row in train_rows if not row["voice"].startswith("espeak"))
        assert voices == {speaker: 12 for speaker in others} and len(train_rows) == 30
        assert Counter(row["voice"] for row in test_rows) == {held_out: 10, **{speaker: 5 for speaker in others}}
        assert len({row["audio"] for row in train_rows + test_rows}) == 50
        for row in train_rows + test_rows:
            assert soundfile.info(tmp_path / "digits" / row["audio"]).samplerate == 8000
    everything = [row for train_rows in manifests[::2] for row in train_rows]
    assert len({row["audio"] for row in everything}) == len({json.dumps(row) for row in everything}) == 3 * 12 + 6


@pytest.mark.long
def test_synthesizers_share_the_synthetic_strings_in_equal_parts(make_digits, tmp_path, monkeypatch):
    soundfile.write(tmp_path / "spoken.wav", np.pad(clip(0.3), 4000), SAMPLING_RATE)
    program = tmp_path / "flite"  # stands in for the real one: says the same whatever it is asked
    program.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\nfor last; do :; done\ncp {tmp_path}/spoken.wav "$last"\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    train, _ = make_digits("--synthetic_share", 0.8, "--synthesizers", "espeak-ng", "flite")
    assert Counter(row["voice"].split()[0] for row in train) == {"bob": 3, "cas": 3, "espeak-ng": 12, "flite": 12}
    assert {row["voice"] for row in train[18:]} == {"flite awb", "flite kal", "flite rms", "flite slt"}
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == len(set(calls)) == 4 * 10 * 20, "another speed and pitch each time"
    takes = [soundfile.info(path).duration for path in (tmp_path / "digits" / "synthetic").glob("flite_awb_*.flac")]
    assert len(takes) == 200 and max(takes) < 0.4, "without silence at the ends"


def test_missing_flite_is_told(make_digits, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RuntimeError, match="apt-get install flite"):
        make_digits("--synthetic_share", 0.5, "--synthesizers", "flite")


@pytest.fixture
def read_sentences_of(tmp_path, monkeypatch):
    """Manifests of ten speakers of four sentences of 6 to 9 seconds and a word each."""
    recordings = []
    for speaker in "abcdefghij":
        for number in range(5):
            name = f"{speaker}{number}.flac"
            soundfile.write(tmp_path / name, clip(0.3), SAMPLING_RATE)
            text = "WELL" if number == 4 else f"IT'S {speaker} AND {DIGITS[number]}".upper()
            recordings.append({"file_name": name, "text": text, "speaker": speaker, "seconds": 6.0 + number})
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in recordings))

    def make(*options):
        arguments = ["--recordings", tmp_path / "all.jsonl", "--output", tmp_path / "sentences", *options]
        monkeypatch.setattr(sys, "argv", ["sentences.py", *map(str, arguments)])
        sentences.main()
        return {
            path.stem: [json.loads(line) for line in path.open()] for path in (tmp_path / "sentences").glob("*.jsonl")
        }

    return make


def test_sentences_hold_speakers_out_and_small_sets_lie_in_large_ones(read_sentences_of, tmp_path):
    manifests = read_sentences_of("--minutes", 1.5, 1, "--longest_s", 8.5)
    assert set(manifests) == {"train_1", "train_1.5", "train", "validation", "test"}
    voices = {name: {row["voice"] for row in rows} for name, rows in manifests.items()}
    assert [len(voices[name]) for name in ("train", "validation", "test")] == [5, 2, 3]
    assert len(voices["train"] | voices["validation"] | voices["test"]) == 10
    assert voices["train_1"] == voices["train"], "speakers in turn"
    assert manifests["train_1"] == manifests["train_1.5"][: len(manifests["train_1"])]
    assert manifests["train_1.5"] == manifests["train"][: len(manifests["train_1.5"])]
    for minutes in (1, 1.5):
        seconds = sum(row["duration"] for row in manifests[f"train_{minutes}"])
        assert 60 * minutes - 8 < seconds <= 60 * minutes
    for row in manifests["train"]:
        assert row["text"] == row["answer"] == row["text"].lower() and row["duration"] <= 8
        assert (tmp_path / "sentences" / row["audio"]).is_file()
    assert {row["instruction"] for row in manifests["test"]} == {"Repeat the words."}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num_test_speakers", "9"], "11 speakers are to be held out, but 10 speak"),
        (["--minutes", "30"], "to be below the 2.5 that there are, got 30"),
    ],
)
def test_sentences_that_there_are_not_are_told(read_sentences_of, options, message, capsys):
    with pytest.raises(SystemExit):
        read_sentences_of(*options)
    assert message in capsys.readouterr().err


def test_sentences_of_one_file_name_or_too_long_are_errors(read_sentences_of, tmp_path):
    with pytest.raises(ValueError, match="no sentence of up to 2 s"):
        read_sentences_of("--longest_s", 2)
    row = {"file_name": "again/a0.flac", "text": "TWO WORDS", "speaker": "a", "seconds": 3.0}
    with (tmp_path / "all.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match="one name in several folders"):
        read_sentences_of()


def test_words_to_repeat_are_read_and_shuffled():
    words = [f"w{number}" for number in range(200)]
    num_in_order = 0
    for question, answer in build_sentence_llm.draw_dialogues(400, words, random.Random(0)):
        said = question["content"].split("\n")[1]
        assert said == answer["content"] and 1 <= len(said.split()) <= build_sentence_llm.MAX_WORDS
        num_in_order += said in " ".join(words) and len(said.split()) > 1
    assert 160 < num_in_order < 240
    said = {
        question["content"].split("\n")[1]
        for question, _ in build_sentence_llm.draw_dialogues(400, ["a", "b"], random.Random(0))
    }
    assert said == {"a", "b", "a a", "a b", "b a", "b b"}, "few words, the last one too"


def write_evaluation(folder, minutes, wer, manifest=True):
    folder.mkdir()
    rows = [{"duration": 30.0}] * (2 * minutes)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    score = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 9}
    wer = {"value": wer, "low": wer - 0.1, "high": wer + 0.1, "n": 9}
    alignment = {name: score for _, task, name, _, _ in learning_curve.SCORES if task == "alignment"}
    systems = {
        "speech": {"transcripts": {"wer": wer, "cer": score}, "alignment": alignment},
        "text": {"transcripts": {"wer": {**score, "value": 0.125}}},
    }
    settings = {"data": "test.jsonl", "train_manifest": str(folder / "train.jsonl") if manifest else None}
    (folder / "results.json").write_text(json.dumps({"settings": settings, "systems": systems}))


def test_learning_curve_has_a_point_per_evaluation_and_the_change_with_each_doubling(tmp_path, monkeypatch):
    for minutes, wer in ((20, 0.6), (5, 0.9), (10, 0.75)):
        write_evaluation(tmp_path / f"{minutes}", minutes, wer)
    evaluations = [str(tmp_path / f"{minutes}") for minutes in (20, 5, 10)]
    arguments = ["--evaluations", *evaluations, "--output", str(tmp_path / "curve")]
    monkeypatch.setattr(sys, "argv", ["learning_curve.py", *arguments])
    learning_curve.main()
    curve = json.loads((tmp_path / "curve/learning_curve.json").read_text())
    assert [(point["minutes"], point["sentences"]) for point in curve["points"]] == [(5, 10), (10, 20), (20, 40)]
    assert curve["per_doubling"]["wer"] == pytest.approx(-0.15) and abs(curve["per_doubling"]["cer"]) < 1e-9
    table = (tmp_path / "curve/learning_curve.md").read_text()
    assert "| 10 | 20 | 75.0 [65.0, 85.0] |" in table and "| -15.0 |" in table and "WER is 12.5 %" in table
    assert (tmp_path / "curve/learning_curve.png").stat().st_size > 1000
    write_evaluation(tmp_path / "unknown", 3, 0.5, manifest=False)
    with pytest.raises(ValueError, match="Evaluate with --train_manifest"):
        learning_curve.read_point(tmp_path / "unknown")
    results = json.loads((tmp_path / "5/results.json").read_text())
    del results["systems"]["text"]
    (tmp_path / "5/results.json").write_text(json.dumps(results))
    with pytest.raises(ValueError, match=r"lacks the systems \['text'\]"):
        learning_curve.read_point(tmp_path / "5")


@pytest.mark.numerical
@pytest.mark.parametrize("num_frames", [1, 3, 4, 10])
def test_parts_of_frames_are_means_of_consecutive_ones_and_none_is_empty(num_frames):
    frames = torch.randn(num_frames, 5, generator=torch.Generator().manual_seed(0))
    parts = frame_probe.pool_parts(frames).view(frame_probe.NUM_PARTS, 5)
    if num_frames == 10:
        expected = [frames[0:2].mean(0), frames[2:5].mean(0), frames[5:8].mean(0), frames[8:10].mean(0)]
        torch.testing.assert_close(parts, torch.stack(expected))
    else:
        chosen = {1: [0, 0, 0, 0], 3: [0, 1, 2, 2], 4: [0, 1, 2, 3]}[num_frames]
        torch.testing.assert_close(parts, frames[chosen])


@pytest.mark.long
def test_probe_is_scored_on_a_voice_that_it_has_not_heard():
    """Ann and bob say digits alike; cas says each as another one, which only his own recordings can tell."""

    def heard(shift, seed):
        digits = torch.arange(10).repeat(40)
        noise = torch.randn(400, 20, generator=torch.Generator().manual_seed(seed))
        rows = 0.3 * noise
        rows[torch.arange(400), (digits + shift) % 10] += 3
        rows[:, 10:] += 3 * (shift > 0)
        return rows, digits

    people = {"ann": heard(0, 1), "bob": heard(0, 2), "cas": heard(1, 3)}
    ann, cas = (frame_probe.compare(name, people, [], num_seeds=1)["accuracies"] for name in ("ann", "cas"))
    assert ann["others"][0] > 0.9
    assert cas["others"][0] < 0.1 and cas["others_and_own_half"][0] > 0.9


@pytest.mark.long
def test_probe_without_means_hears_a_voice_that_is_only_moved():
    """Dan says digits as the others do, but all his frames lie where a three of theirs does."""

    def heard(offset, seed):
        digits = torch.arange(10).repeat(40)
        rows = 0.3 * torch.randn(400, 10, generator=torch.Generator().manual_seed(seed))
        rows[torch.arange(400), digits] += 3
        rows[:, 3] += offset
        return rows, digits

    people = {"ann": heard(0, 1), "bob": heard(0, 2), "dan": heard(30, 3)}
    dan = frame_probe.compare("dan", people, [[heard(0, 4), heard(0, 5)]], num_seeds=1)["accuracies"]
    assert dan["others_and_synthetic"][0] < 0.3 and dan["without_means"][0] > 0.95


@pytest.mark.long
def test_probe_of_recordings_writes_a_row_per_speaker(make_digits, backbones, tmp_path, monkeypatch):
    make_digits()  # for the recordings
    arguments = ["--recordings", tmp_path / "metadata.jsonl", "--speech_model", backbones[0], "--num_seeds", 1]
    monkeypatch.setattr(frame_probe, "SYNTHESIZERS", {"espeak-ng": None})
    monkeypatch.setattr(frame_probe, "synthesize_recordings", lambda *_: few_recordings(tmp_path))
    monkeypatch.setattr(sys, "argv", ["frame_probe.py", *map(str, arguments), "--output", str(tmp_path / "out")])
    frame_probe.main()
    results = json.loads((tmp_path / "out/frame_probe.json").read_text())
    assert set(results["speakers"]) == {"ann", "bob", "cas", "dan"}
    for row in results["speakers"].values():
        assert row["recordings"] == 20 and set(row["accuracies"]) == {
            "others",
            "others_and_synthetic",
            "without_means",
            "others_and_own_half",
        }
    assert (tmp_path / "out/frame_probe.md").read_text().count("| 20 |") == 4


def few_recordings(folder):
    return {"voice": {word: [folder / f"ann_{digit}_0.flac"] for digit, word in enumerate(DIGITS)}}
