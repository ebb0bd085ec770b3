"""The tiny world: what its sentences promise, and that its speech is deterministic and complete."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from transformers import AutoTokenizer

from examples.tiny_world.dataset import make_rows
from examples.tiny_world.espeak import SAMPLING_RATE, synthesize
from examples.tiny_world.make_manifests import write
from examples.tiny_world.sentence_kinds import DIGITS
from examples.tiny_world.speech import HELD_OUT_VOICES, TRAIN_VOICES, make_clips, word_times
from examples.tiny_world.world import KINDS, digit_sentence, questions, sentences, split_of

LLM = Path(__file__).parent.parent / "examples" / "tiny_world" / "llm"


@pytest.mark.long
def test_splits_never_share_a_text():
    train, test = ({sentence.text for sentence in sentences(split, 3000, 0)} for split in ("train", "test"))
    final = {sentence.text for sentence in sentences("final", 600, 0)}
    assert not train & test and not train & final and not test & final
    assert all(split_of(text) == "train" for text in train)


def test_final_sentences_were_never_among_those_that_models_were_compared_on():
    final = {sentence.text for seed in range(3) for sentence in sentences("final", 400, seed)}
    assert len(final) > 600
    for seed in (1, 2, 21, 22):
        compared_on = {sentence.text for sentence in sentences("test", 700 if seed < 3 else 300, seed)}
        assert not final & compared_on
    # The same sentences as before there was a final split, or scores could not be compared with earlier ones.
    digest = hashlib.sha256("\n".join(sentence.text for sentence in sentences("test", 700, 1)).encode()).hexdigest()
    assert digest.startswith("4644aa93f1d64f08")


def test_sentences_are_the_same_for_the_same_seed_and_differ_otherwise():
    first, again, other = (sentences("train", 50, seed) for seed in (1, 1, 2))
    assert [sentence.text for sentence in first] == [sentence.text for sentence in again]
    assert [sentence.text for sentence in first] != [sentence.text for sentence in other]


def test_a_complete_manifest_is_not_written_again(tmp_path):
    """A complete folder that was read-only could not be used."""
    manifest, rows = tmp_path / "test-1.jsonl", [{"audio": str(tmp_path / "a.flac"), "text": "the red cat"}]
    write(manifest, rows)
    file = manifest.stat().st_ino
    write(manifest, rows)
    assert manifest.stat().st_ino == file
    write(manifest, [{**rows[0], "text": "the cat"}])
    assert manifest.stat().st_ino != file and json.loads(manifest.read_text()) == {"audio": "a.flac", "text": "the cat"}


def test_every_kind_is_asked_and_digit_strings_have_their_own():
    asked = {question.kind for sentence in sentences("train", 500, 0) for question in questions(sentence)}
    assert asked == set(KINDS)
    answers = digit_sentence(["seven", "two", "nine"]).answers
    assert answers["repeat"] == "seven two nine" and answers["reverse"] == "nine two seven"
    assert answers["largest"] == "nine" and answers["count"] == "three" and answers["figures"] == "7 2 9"
    assert (answers["first"], answers["last"]) == ("seven", "nine")
    spoken = {
        word for sentence in sentences("train", 500, 0) if sentence.kind == "digits" for word in sentence.text.split()
    }
    assert spoken == set(DIGITS)


def test_a_transcript_has_the_same_tokens_alone_and_in_the_prompt():
    tokenizer = AutoTokenizer.from_pretrained(LLM)
    for sentence in sentences("train", 300, 5):
        for question in questions(sentence)[:2]:
            turn = [{"role": "user", "content": f"{question.instruction}\n{sentence.text}"}]
            prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
            prefix, suffix = prompt.split(sentence.text, 1) if prompt.count(sentence.text) == 1 else (None, None)
            if prefix is None:
                continue
            pieces = [
                tokenizer(piece, add_special_tokens=False)["input_ids"] for piece in (prefix, sentence.text, suffix)
            ]
            assert sum(pieces, []) == tokenizer(prompt, add_special_tokens=False)["input_ids"]


@pytest.mark.long
def test_test_rows_ask_every_kind_equally_often(tmp_path):
    rows = make_rows("test", 2 * len(KINDS), TRAIN_VOICES, 3, tmp_path)
    assert {sum(row["kind"] == kind for row in rows) for kind in KINDS} == {2}
    assert all(split_of(row["text"]) == "test" for row in rows)
    timed = make_rows("test", 2 * len(KINDS), TRAIN_VOICES, 3, tmp_path, with_words=True)
    assert all([word["text"] for word in row["words"]] == row["text"].split() for row in timed)
    assert [{name: row[name] for name in row if name != "words"} for row in timed] == rows
    first = make_rows("test", 2 * len(KINDS), TRAIN_VOICES, 3, tmp_path / "first", with_words=True, limit=5)
    assert [{**row, "audio": str(tmp_path / Path(row["audio"]).name)} for row in first] == timed[:5]
    assert len([*(tmp_path / "first").iterdir()]) == 5, "only their clips are synthesised"


def test_clips_are_the_same_bytes_when_made_again_and_are_not_made_twice(tmp_path):
    texts, voices = ["the red cat", "one two"], [TRAIN_VOICES[0], HELD_OUT_VOICES[0]]
    first = make_clips(texts, voices, 0, tmp_path / "a")
    again = make_clips(texts, voices, 0, tmp_path / "b")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]
    times = [path.stat().st_mtime_ns for path in first]
    assert make_clips(texts, voices, 0, tmp_path / "a") == first
    assert [path.stat().st_mtime_ns for path in first] == times
    info = soundfile.info(first[0])
    assert (info.samplerate, info.channels) == (16_000, 1) and info.duration > 0.5


def test_words_come_in_order_and_fill_the_speech(tmp_path):
    texts = [sentence.text for sentence in sentences("test", 12, 21)]
    voices = [(*TRAIN_VOICES[:2], *HELD_OUT_VOICES)[index % 5] for index in range(12)]
    clips, words = make_clips(texts, voices, 4, tmp_path), word_times(texts, voices, 4)
    assert word_times(texts, voices, 4, num_workers=1) == words
    for text, clip, said in zip(texts, clips, words):
        assert [word["text"] for word in said] == text.split()
        assert all(word["start"] < word["end"] for word in said)
        assert all(word["end"] <= following["start"] for word, following in zip(said, said[1:]))
        samples, _ = soundfile.read(clip)
        # Silence, the speech and silence again, of 0.1 to 0.2 s each.
        loud = np.flatnonzero(np.abs(samples) > 0.01) / SAMPLING_RATE
        assert 0.1 <= said[0]["start"] <= loud[0] + 0.001 and loud[0] < said[0]["start"] + 0.06
        assert said[-1]["end"] == pytest.approx(loud[-1], abs=0.06)
        assert 0.1 <= len(samples) / SAMPLING_RATE - said[-1]["end"] <= 0.23


def test_words_end_at_a_pause():
    (words,) = word_times(["the red cat... ran home"], [TRAIN_VOICES[0]], 0)
    assert [word["text"] for word in words] == ["the", "red", "cat", "ran", "home"]
    pauses = [following["start"] - word["end"] for word, following in zip(words, words[1:])]
    assert pauses[2] > 0.15 and pauses[:2] == [0, 0] and pauses[3] == 0


def test_held_out_voices_are_not_trained_on():
    assert not set(TRAIN_VOICES) & set(HELD_OUT_VOICES)


def test_unknown_voices_and_splits_are_named():
    with pytest.raises(ValueError, match="no voice 'en-us\\+nobody'"):
        synthesize("words", "en-us+nobody")
    with pytest.raises(ValueError, match="2 texts and 1 voices"):
        word_times(["a", "b"], [TRAIN_VOICES[0]], 0)
    with pytest.raises(ValueError, match="splits \\('train', 'test', 'final'\\), but got 'dev'"):
        sentences("dev", 1, 0)
