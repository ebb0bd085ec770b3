"""Rows of the tiny world for training and evaluation: one clip, its transcript, and one question about it.

Follows BLSP-KD's need for (audio, transcript) pairs; the answers are there to score with, the losses never see them.
Leaves out: reading the audio, which is the data collator's work.
"""

import random
from collections import Counter
from pathlib import Path

from .speech import make_clips, word_times
from .world import KINDS, Sentence, questions, sentences


def make_rows(
    split: str,
    num_utterances: int,
    voices: tuple[str, ...] | list[str],
    seed: int,
    cache_dir: str | Path,
    repeat_share: float | None = None,
    with_words: bool = False,
    limit: int | None = None,
) -> list[dict]:
    """Draw sentences, synthesise them, and ask one question about each.

    Args:
        split: "train", "test" or "final"; no sentence is in two of them. Choices may look at "test"; "final" is for
            what is reported at the end.
        num_utterances: number of rows.
        voices: who speaks, in turn, for instance `speech.TRAIN_VOICES`.
        seed: the same seed gives the same rows.
        cache_dir: folder of the clips; those that it already holds are not made again.
        repeat_share: share of rows, 0 to 1, whose question is "repeat"; the others ask any other kind that suits their
            sentence. Omitted: every kind is asked equally often (give or take one row), which is right for a test set.
        with_words: add the times of words as `words`; the clips are synthesised once more for it.
        limit: return only the first rows, and synthesise only their clips; omitted, all.

    Returns:
        list of dict with the keys `audio` (path of a 16 kHz FLAC file), `text`, `voice`, `sentence_kind`, `kind`,
        `instruction` and `answer`, all strings, in random order; and `words` if asked for.

    Raises:
        ValueError: `repeat_share` is not a share, or there is no voice.
    """
    if repeat_share is not None and not 0 <= repeat_share <= 1:
        raise ValueError(f"repeat_share is a share from 0 to 1, but got {repeat_share}. Omit it to balance all kinds.")
    if not voices:
        raise ValueError("make_rows needs at least one voice, but got none. See TRAIN_VOICES in speech.py.")
    rng = random.Random(f"rows {split} {seed}")
    if repeat_share is None:
        asked = _balanced(split, num_utterances, seed, rng)
    else:
        asked = [
            (sentence, "repeat" if rng.random() < repeat_share else rng.choice(_other_kinds(sentence)))
            for sentence in sentences(split, num_utterances, seed)
        ]
    speakers = [voices[index % len(voices)] for index in range(num_utterances)]
    rows = []
    for (sentence, kind), speaker in zip(asked, speakers, strict=True):
        question = rng.choice([question for question in questions(sentence) if question.kind == kind])
        rows.append(
            {
                "text": sentence.text,
                "voice": speaker,
                "sentence_kind": sentence.kind,
                "kind": question.kind,
                "instruction": question.instruction,
                "answer": question.answer,
            }
        )
    # A clip's sound follows from its number, which is the place of its row before the shuffle.
    numbered = list(enumerate(rows))
    rng.shuffle(numbered)
    numbers, rows = [number for number, _ in numbered[:limit]], [row for _, row in numbered[:limit]]
    said = ([row["text"] for row in rows], [row["voice"] for row in rows], seed)
    rows = [{"audio": str(clip), **row} for clip, row in zip(make_clips(*said, cache_dir, numbers=numbers), rows)]
    if with_words:
        for row, words in zip(rows, word_times(*said, numbers=numbers), strict=True):
            row["words"] = words
    return rows


def _other_kinds(sentence: Sentence) -> list[str]:
    return [kind for kind in sentence.answers if kind != "repeat"]


def _balanced(split, num_utterances, seed, rng):
    """Return (sentence, kind) pairs with each kind equally often; a sentence gets the kind that is missing most."""
    missing = Counter(KINDS[index % len(KINDS)] for index in range(num_utterances))
    pairs = []
    for sentence in sentences(split, 8 * num_utterances + 200, seed):
        suitable = [kind for kind in sentence.answers if missing[kind] > 0]
        if suitable:
            kind = max(suitable, key=lambda kind: missing[kind])
            missing[kind] -= 1
            pairs.append((sentence, kind))
        if len(pairs) == num_utterances:
            break
    rng.shuffle(pairs)  # else some voices would speak a kind more often than others
    return pairs
