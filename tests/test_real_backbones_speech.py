"""Speech for real backbones: texts, questions, clips that survive a kill, and nothing held out in training."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from examples.experiments.real_backbones import clips, make_speech
from examples.experiments.real_backbones.people import split_people
from examples.experiments.real_backbones.questions import KINDS, make_questions
from examples.experiments.real_backbones.sentences import (
    Refused,
    is_for_tests,
    number_in_words,
    plain_words,
    read_sentences,
    sentence_of,
)
from examples.experiments.real_backbones.synthesizers import (
    SYNTHESIZERS,
    Espeak,
    MissingSynthesizer,
    open_synthesizer,
)
from examples.tiny_world.espeak import phonemes
from processing.manifests import read_manifest

ROOT = Path(__file__).parent.parent
# Voices of Kokoro and Piper, which are too large to fetch for a test: TTS_ASSETS names the folder.
ASSETS = Path(os.environ["TTS_ASSETS"]) if "TTS_ASSETS" in os.environ else None
NAMES = "tom anna peter clara simon emma".split()
THINGS = (
    "a red ball,the old house,seven birds,some cold milk,a long letter,the green door,his new boat,my own book".split(
        ","
    )
)
NOVEL = "\n\n".join(
    f"{name.capitalize()} saw {thing} near the river in {1800 + number}."
    for number, (name, thing) in enumerate((name, thing) for name in NAMES for thing in THINGS * 6)
)


@pytest.fixture
def recordings(tmp_path):
    """Six speakers with a sentence and a digit each."""
    folder = tmp_path / "recordings"
    folder.mkdir()
    lines = []
    for speaker in range(6):
        for number, text in enumerate((f"THE {NAMES[speaker].upper()} LINE IS HERE", "SEVEN")):
            name = f"{speaker}-{number}.wav"
            soundfile.write(folder / name, np.sin(np.arange(8000) / 9) * 0.1, 8000)
            lines.append({"file_name": name, "text": text, "speaker": str(speaker), "seconds": 1.0})
    path = folder / "metadata.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def arguments(tmp_path, recordings, monkeypatch):
    text = tmp_path / "novel.txt"
    text.write_text(NOVEL)
    # One sentence in a hundred would be none of so few.
    monkeypatch.setattr("examples.experiments.real_backbones.sentences.is_for_tests.__defaults__", (4,))
    return [f"--people={recordings}", "--text", str(text), "--synthesizers", "espeak-ng", "--num_test_sentences=3"]


def synthesizer_or_skip(name):
    try:
        return open_synthesizer(name, ASSETS)
    except MissingSynthesizer as error:
        pytest.skip(str(error))


# Texts


@pytest.mark.parametrize(
    ("number", "words"),
    [(0, "zero"), (40, "forty"), (99, "ninety nine"), (100, "one hundred"), (1005, "one thousand five"),
     (1805, "eighteen oh five"), (1900, "nineteen hundred"), (1999, "nineteen ninety nine"),
     (2023, "two thousand twenty three")],
)  # fmt: skip
def test_numbers_are_read_in_words(number, words):
    assert number_in_words(number) == words


def test_a_sentence_has_a_written_and_a_plain_form():
    sentence = sentence_of("“Mr. Smith's 3 well-known dogs,” he said -- in 1905")
    assert sentence.written == "Mister Smith's three well-known dogs, he said, in nineteen oh five."
    assert sentence.text == "mister smith's three well known dogs he said in nineteen oh five"
    assert sentence_of(sentence.written) == sentence


@pytest.mark.parametrize(
    ("written", "reason"),
    [("it cost $5 today", "characters"), ("in 1,000 years", "characters"), ("the USA won it", "abbreviation"),
     ("it is 3.5 miles", "characters"), ("see e.g. this", "abbreviation"), ("two words", "length"),
     ("the brrr sound here", "not a word"), ("a café in Paris", "characters")],
)  # fmt: skip
def test_odd_sentences_are_refused_with_a_reason(written, reason):
    with pytest.raises(Refused, match=reason):
        sentence_of(written, min_words=3)


def test_a_text_file_is_split_into_different_sentences(tmp_path):
    path = tmp_path / "cookies"
    path.write_text(
        "The first line\ngoes on. A second one is here!\n%\nThe First line goes on.\n\t\t-- Some Author\n%\n5% of it.\n"
    )
    sentences, refused = read_sentences(path, 3, 20)
    assert [sentence.text for sentence in sentences] == ["the first line goes on", "a second one is here"]
    assert refused == {"characters": 1}


def test_a_manifest_is_a_source_of_text_too(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "one of the rows"}) + "\n")
    assert [sentence.text for sentence in read_sentences(path, 1, 9)[0]] == ["one of the rows"]


# Questions


def test_questions_have_kinds_and_answers_and_none_is_in_both_sets():
    test, train = make_questions(True, 10**6, 0), make_questions(False, 10**6, 0)
    assert len(test) >= 300 and len(train) >= 2000
    for questions in (test, train):
        labels = [dict(question.labels) for question in questions]
        assert {label["kind"] for label in labels} == set(KINDS) and len(KINDS) >= 10
        assert all(plain_words(label["answer"]) or label["answer"].isdigit() for label in labels)
        assert len({question.text for question in questions}) == len(questions)
    assert not {question.text for question in test} & {question.text for question in train}
    assert make_questions(True, 50, 0) == make_questions(True, 50, 0) != make_questions(True, 50, 1)
    some = make_questions(True, 50, 0, only=["told who", "capital"])
    assert {dict(question.labels)["kind"] for question in some} == {"told who", "capital"}


def test_the_first_test_questions_are_of_all_kinds():
    kinds = [dict(question.labels)["kind"] for question in make_questions(True, 400, 0)]
    assert len(set(kinds)) == len(KINDS) and min(map(kinds.count, kinds)) >= 8


@pytest.mark.parametrize(
    ("kind", "question", "answer"),
    [("addition", "What is two plus three?", "5"), ("capital", "What is the capital of France?", "Paris"),
     ("calendar", "Which month comes after December?", "January"), ("spelling", "Spell the word fish.", "f i s h"),
     ("series", "What comes next? Monday, Tuesday, Wednesday.", "Thursday"),
     ("saying", "Finish this saying: better late than!", "never"),
     ("yes or no", "Is a dog an animal? answer yes or no.", "yes"),
     ("told where", "The cat is under the table. where is the cat?", "table"),
     ("told number", "There are seven birds on the table. how many birds are there?", "7"),
     ("definition", "What is an elephant?", "elephant"),
     ("last word", "What is the last word of this sentence? the king lost the key.", "key")],
)  # fmt: skip
def test_answers_are_right(kind, question, answer):
    asked = {one.written: dict(one.labels) for tests in (True, False) for one in make_questions(tests, 10**6, 0)}
    assert asked[question] == {"kind": kind, "answer": answer}


# People


def test_speakers_are_held_out_by_the_seed_alone():
    rows = [{"voice": f"people/{speaker}", "text": "x"} for speaker in range(16) for _ in range(2)]
    splits = split_people(rows, seed=0)
    voices = {name: {row["voice"] for row in part} for name, part in splits.items()}
    assert {name: len(part) for name, part in voices.items()} == {"train": 12, "choices": 2, "final": 2}
    assert not voices["train"] & (voices["choices"] | voices["final"]) and not voices["choices"] & voices["final"]
    assert split_people(rows[::-1], seed=0)["final"] == splits["final"][::-1]
    assert split_people(rows, seed=1) != splits
    with pytest.raises(ValueError, match="held out, but 3 speak"):
        split_people(rows[:6], seed=0)


# Synthesizers and clips


@pytest.mark.parametrize("name", SYNTHESIZERS)
def test_a_synthesizer_speaks_as_told(name):
    synthesizer = synthesizer_or_skip(name)
    plan = clips.plan_clip(synthesizer, "The river is cold today.", "the river is cold today", "key 1")
    assert plan == clips.plan_clip(synthesizer, "The river is cold today.", "the river is cold today", "key 1")
    assert plan != clips.plan_clip(synthesizer, "The river is cold today.", "the river is cold today", "key 2")
    samples, rate, _ = synthesizer.say(plan["written"], plan["settings"])
    again, _, _ = synthesizer.say(plan["written"], plan["settings"])
    if name != "piper":  # its noise has no seed
        np.testing.assert_array_equal(samples, again)
    finished = clips.finish_speech(samples, rate, plan, longest_s=20)
    before, after = (round(seconds * 16_000) for seconds in plan["padding_s"])
    level = 20 * np.log10(np.sqrt(np.mean(finished[before : len(finished) - after] ** 2)))
    assert level == pytest.approx(plan["loudness_db"], abs=0.5) or np.abs(finished).max() == pytest.approx(0.99)


def test_phonemes_follow_the_accent_and_keep_punctuation():
    assert phonemes("Well, is the car here?", "en-us") == "wˈɛl, ɪz ðə kˈɑːɹ hˈɪɹ?"
    assert phonemes("the car.", "en-gb-x-rp") == "ðə kˈɑː."
    assert phonemes("...", "en-us") == "..."
    with pytest.raises(ValueError, match="no voice 'klingonese'"):
        phonemes("word", "klingonese")


def test_espeak_tells_when_it_says_each_word(tmp_path):
    plan = clips.plan_clip(open_synthesizer(Espeak.name), "Seven birds, I think.", "seven birds i think", "key")
    [(_, result)] = clips.make_clips([plan], tmp_path, None, num_workers=1, longest_s=30)
    words = result["words"]
    assert [word["text"] for word in words] == ["seven", "birds", "i", "think"]
    assert words[0]["start"] >= plan["padding_s"][0] and words[-1]["end"] <= result["duration"]
    assert all(word["start"] < word["end"] for word in words)


@pytest.mark.parametrize(
    ("samples", "reason"),
    [(np.zeros(0), "empty"), (np.zeros(16_000), "silent"), (np.full(16_000, np.nan), "not finite"),
     (np.ones(16_000 * 31), "too long"), (np.ones(16_000 * 12), "does not fit"), (np.ones(8_000), "does not fit")],
)  # fmt: skip
def test_bad_speech_is_refused(samples, reason):
    plan = {"text": "these are four words and some", "loudness_db": -20.0, "padding_s": [0.1, 0.1]}
    with pytest.raises(clips.BadSpeech, match=reason):
        clips.finish_speech(samples.astype(np.float32), 16_000, plan, longest_s=30)


def test_a_missing_synthesizer_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(MissingSynthesizer, match="apt-get install flite"):
        SYNTHESIZERS["flite"]()
    with pytest.raises(MissingSynthesizer, match="--assets"):
        SYNTHESIZERS["kokoro"]()
    with pytest.raises(MissingSynthesizer, match="lacks model.onnx"):
        SYNTHESIZERS["kokoro"](tmp_path)
    with pytest.raises(ValueError, match="no synthesizer 'parrot'"):
        open_synthesizer("parrot")


def test_a_line_cut_short_by_a_kill_does_not_spoil_the_ledger(tmp_path):
    ledger = clips.Ledger(tmp_path / "clips.jsonl")
    ledger.add("clips/a.flac", {"refused": "silent"})
    with ledger.path.open("ab") as file:
        file.write(b'\n{"clip": "clips/b.fl')
    ledger.add("clips/c.flac", {"refused": "empty"})
    assert clips.Ledger(ledger.path).results == {
        "clips/a.flac": {"refused": "silent"},
        "clips/c.flac": {"refused": "empty"},
    }


# The script


@pytest.mark.long
def test_what_is_held_out_is_not_in_training(arguments, tmp_path):
    held_out = ["--held_out=flite"] if "flite" in present() else []
    make_speech.main([*arguments, *held_out, f"--output={tmp_path / 'data'}", "--rows=20", "--num_test_questions=4"])
    manifests = {path.stem: read_manifest(path) for path in (tmp_path / "data").glob("*.jsonl") if path.stem != "clips"}
    people = {name: manifests[f"{name}_people"] for name in ("train", "choices", "final")}
    assert {name: len(rows) for name, rows in people.items()} == {"train": 2, "choices": 2, "final": 2}
    train = manifests["train_synthetic"] + people["train"]
    assert len(manifests["train_synthetic"]) == 20
    texts, voices = {row["text"] for row in train}, {row["voice"] for row in train}
    for name in ("choices_people", "final_people", "test_word_times", *(["test_synthesizer"] if held_out else [])):
        assert manifests[name] and not texts & {row["text"] for row in manifests[name]}
        assert name == "test_word_times" or not voices & {row["voice"] for row in manifests[name]}
    assert all(row["words"] for row in manifests["test_word_times"])
    if held_out:
        assert len(manifests["test_synthesizer"]) == 7
        assert all(row["voice"].startswith("flite/") for row in manifests["test_synthesizer"])
    for row in train:
        info = soundfile.info(row["audio"])
        assert (info.samplerate, info.channels, info.format) == (16_000, 1, "FLAC")
        assert info.duration == pytest.approx(row["duration"], abs=0.001)
        assert row["answer"] and row["kind"] and (row["instruction"] or row["kind"] in KINDS)


@pytest.mark.long
def test_a_run_that_was_killed_goes_on_and_gives_the_same(arguments, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = [*arguments, "--rows=30", "--num_test_questions=0", "--workers=2"]
    command = [sys.executable, "-m", make_speech.__name__, *options, f"--output={killed}"]
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and len(list(killed.glob("clips/*/*/*.flac"))) < 12 and run.poll() is None:
        time.sleep(0.02)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    done = {path: path.stat().st_mtime_ns for path in killed.glob("clips/*/*/*.flac")}
    assert not (killed / "train_synthetic.jsonl").exists() or len(read_manifest(killed / "train_synthetic.jsonl")) == 30
    # The subprocess has the real share of tests, so this compares runs of the same kind.
    for folder in (killed, whole):
        subprocess.run([*command[:-1], f"--output={folder}"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    assert (killed / "train_synthetic.jsonl").read_bytes() == (whole / "train_synthetic.jsonl").read_bytes()
    for path in whole.glob("clips/*/*/*.flac"):
        assert path.read_bytes() == (killed / path.relative_to(whole)).read_bytes()
    remade = sum(path.stat().st_mtime_ns != made for path, made in done.items())
    assert len(done) >= 12 and remade <= 6  # those whose line was not in the ledger yet
    assert not list(killed.rglob("*.unfinished")) or remade


def test_a_synthesizer_that_fails_again_and_again_stops_the_run(arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(Espeak, "say", lambda *_: (np.zeros(16_000, dtype=np.float32), 16_000, None))
    with pytest.raises(RuntimeError, match="refused.*silent"):
        make_speech.main([*arguments, f"--output={tmp_path / 'data'}", "--rows=30"])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [(["--synthesizers", "espeak-ng", "--held_out", "espeak-ng"], "cannot be both"),
     (["--synthesizers", "espeak-ng=much"], "NAME=SHARE"), (["--synthesizers", "espeak-ng=0"], "above 0")],
)  # fmt: skip
def test_options_that_contradict_each_other_are_refused(wrong, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        make_speech.parse([f"--output={tmp_path}", "--text", "a.txt", "--rows=1", *wrong])
    assert re.search(message, capsys.readouterr().err)


def present():
    names = []
    for name in SYNTHESIZERS:
        try:
            open_synthesizer(name)
        except MissingSynthesizer:
            continue
        names.append(name)
    return names


def test_texts_for_tests_depend_on_nothing_else():
    kept = [text for text in (f"sentence number {number}" for number in range(4000)) if is_for_tests(text)]
    assert 20 <= len(kept) <= 60
