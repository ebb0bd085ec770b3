"""Sentences to be spoken, from plain text files or JSONL manifests: split, numbers in words, odd ones refused.

A sentence has two forms: `written`, with capitals and punctuation, is what a synthesizer says; `text` is small letters
and apostrophes, as people's transcripts are. Leaves out: abbreviations, decimals, and languages other than English.
"""

import hashlib
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path

from processing.manifests import read_objects

ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
TITLES = {"Mr": "Mister", "Mrs": "Missus", "Dr": "Doctor", "Prof": "Professor"}
SAME_CHARACTERS = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "—": ", ", "–": ", ", "…": "."})
TEST_SHARE = 100  # one sentence in so many is kept for tests


@dataclass(frozen=True)
class Sentence:
    """What is said: `written` by the synthesizer, `text` in the manifest; `labels` are further fields of its row."""

    written: str
    text: str
    labels: tuple[tuple[str, str], ...] = ()


class Refused(ValueError):
    """Raised when a sentence is not fit to be spoken; the message is the reason."""


def read_sentences(path: Path, min_words: int, max_words: int) -> tuple[list[Sentence], Counter]:
    """Return the different sentences of a file, and how many were refused, by reason.

    Args:
        path: a manifest (`.jsonl`, field `text`), or plain text whose paragraphs end at blank lines or lines of "%".
    """
    sentences: dict[str, Sentence] = {}
    refused: Counter = Counter()
    for written in _written(path):
        try:
            sentence = sentence_of(written, min_words, max_words)
        except Refused as error:
            refused[str(error)] += 1
        else:
            sentences.setdefault(sentence.text, sentence)
    return list(sentences.values()), refused


def sentence_of(written: str, min_words: int = 1, max_words: int = 10_000) -> Sentence:
    """Return both forms of a sentence.

    Raises:
        Refused: it has characters, abbreviations or numbers that can be read in several ways, or another length.
    """
    written = re.sub(r"\s+", " ", written.translate(SAME_CHARACTERS).replace("--", ", "))
    written = re.sub(r'["_*]|(?<!\w)\'(?!\w)', "", written).strip(" -,;:")
    written = re.sub(r"\b(Mrs?|Dr|Prof)\.", lambda match: TITLES[match[1]], written)
    written = re.sub(r"(?<![\w.,$#/-])\d{1,4}(?![\w/-]|[.,]\d)", lambda match: number_in_words(int(match[0])), written)
    written = re.sub(r" +([,.;:!?])", r"\1", written)
    if not re.fullmatch(r"[A-Za-z' ,.;:!?-]*", written):
        raise Refused("characters")
    if re.search(r"\b[A-Z]{2,}\b|\.\w|\b[A-Za-z]\.|\b(St|vs|etc|Rev|Gen|Jr|Sr|Inc|Ltd|No)\.", written):
        raise Refused("abbreviation")
    words = plain_words(written)
    if not min_words <= len(words) <= max_words:
        raise Refused("length")
    if any(not re.search("[aeiouy]", word) or len(word) > 18 for word in words):
        raise Refused("not a word")
    written = re.sub(r"([,.;:!?])[,.;:!?]+", r"\1", written)
    return Sentence(written if written[-1] in ".!?" else f"{written.rstrip(' ,;:-')}.", " ".join(words))


def plain_words(text: str) -> list[str]:
    """Return the words of a text in small letters, with the apostrophes inside them and without other marks."""
    words = [word.strip("'") for word in re.findall(r"[a-z']+", text.lower())]
    return [word for word in words if word]


def number_in_words(number: int) -> str:
    """Return a number from 0 to 9999 in words; 1100 to 1999 are read as years.

    Raises:
        ValueError: the number is outside.
    """
    if not 0 <= number <= 9999:
        raise ValueError(f"Numbers from 0 to 9999 are read, got {number}.")
    if number < 20:
        return ONES[number]
    if number < 100:
        return TENS[number // 10 - 2] + (f" {ONES[number % 10]}" if number % 10 else "")
    if 1100 <= number < 2000:
        rest = number % 100
        end = "hundred" if rest == 0 else f"oh {ONES[rest]}" if rest < 10 else number_in_words(rest)
        return f"{number_in_words(number // 100)} {end}"
    size, name = (1000, "thousand") if number >= 1000 else (100, "hundred")
    rest = number % size
    return f"{ONES[number // size]} {name}" + (f" {number_in_words(rest)}" if rest else "")


def is_for_tests(text: str, share: int = TEST_SHARE) -> bool:
    """Return whether a text is kept for tests, which depends on nothing else: no other source or seed moves it."""
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % share == 0


def in_turns(sources: Iterable[list], rng: random.Random) -> list:
    """Return the entries of all sources, each source shuffled, the sources in turn."""
    shuffled = [rng.sample(source, len(source)) for source in sources]
    return [entry for entry in chain(*zip_longest(*shuffled)) if entry is not None]


def _written(path: Path) -> Iterator[str]:
    if path.suffix == ".jsonl":
        yield from (row["text"] for _, row in read_objects(path))
        return
    paragraphs = re.split(r"\n\s*\n|\n%\n", path.read_text(encoding="utf-8", errors="replace"))
    for paragraph in paragraphs:
        # What follows "--" at the start of a line names the author.
        paragraph = re.sub(r"\n\s*--.*", "", paragraph, flags=re.DOTALL)
        yield from re.split(r'(?<=[.!?])["\')]*\s+(?=["\'(]*[A-Z])', paragraph)
