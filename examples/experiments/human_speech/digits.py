"""The text of digit strings, and questions that each have exactly one answer.

Unlike sentences, strings follow no grammar, so a wrong digit cannot be corrected from its neighbours.
Leaves out: speech (`../make_digit_manifest.py`).
"""

import hashlib
import random

from ...tiny_world.sentence_kinds import DIGITS
from ...tiny_world.world import Question

MAX_DIGITS = 6
MAX_SUMMED = 4
"""Sums are asked of strings up to this length; a longer string has more sums that no training shows."""
INSTRUCTIONS = {
    "repeat": ("Repeat the words.", "Say it again.", "Write down what was said."),
    "reverse": ("Reverse the digits.", "Say the digits backwards."),
    "sort": ("Sort the digits.", "Say the digits from the smallest to the largest."),
    "next": ("Name the next digit of each.", "What comes after each digit?"),
    "largest": ("Name the largest digit.", "Which digit is the largest?"),
    "smallest": ("Name the smallest digit.", "Which digit is the smallest?"),
    "sum": ("Add up the digits.", "What is the sum of the digits?"),
    "count": ("Count the digits.", "How many digits are there?"),
    "occurrences": ("Count the digit {}.", "How many times was {} said?"),
    "first": ("Name the first digit.", "Which digit comes first?"),
    "last": ("Name the last digit.", "Which digit comes last?"),
}
KINDS = tuple(INSTRUCTIONS)
SPLITS = ("train", "validation", "test")
_TEENS = "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()


def number_in_words(number: int) -> str:
    """Return a number from 0 to 99 in words, without a hyphen."""
    if number < 20:
        return (DIGITS + _TEENS)[number]
    tens, ones = divmod(number, 10)
    return _TENS[tens - 2] + (f" {DIGITS[ones]}" if ones else "")


def split_of(words: list[str]) -> str:
    """Return the split of a string of digits, by a hash that does not change between runs or machines.

    About 5 % of the strings are "validation", on which choices are made, and 10 % are "test". The ten strings of one
    digit are all "train".
    """
    place = hashlib.sha256(" ".join(words).encode()).digest()[0]
    if len(words) == 1 or place >= 39:
        return "train"
    return "validation" if place < 13 else "test"


def draw_string(split: str, rng: random.Random, min_digits=2, max_digits=MAX_DIGITS, run_share=0.0) -> list[str]:
    """Draw a string of one split, its length first.

    Args:
        split: one of `SPLITS`.
        min_digits, max_digits: lengths, each as likely as the others.
        run_share: probability that a digit counts on from the one before it; otherwise every digit is as likely.

    Raises:
        ValueError: there is no such split.
    """
    if split not in SPLITS:
        raise ValueError(f"Digit strings have the splits {SPLITS}, but got {split!r}. Choose one of them.")
    while True:
        digits: list[int] = []
        for _ in range(rng.randint(min_digits, max_digits)):
            counts_on = digits and rng.random() < run_share
            digits.append((digits[-1] + 1) % 10 if counts_on else rng.randrange(10))
        words = [DIGITS[digit] for digit in digits]
        if split_of(words) == split:
            return words


def draw_question(words: list[str], kind: str, rng: random.Random) -> Question:
    """Draw a question of one kind about a string; half of the kind "occurrences" are about a digit that was said."""
    instruction = rng.choice(INSTRUCTIONS[kind])
    if kind != "occurrences":
        return Question(kind, instruction, _answer(words, kind))
    counted = rng.choice(words if rng.random() < 0.5 else DIGITS)
    return Question(kind, instruction.format(counted), number_in_words(words.count(counted)))


def kinds_of(words: list[str]) -> list[str]:
    """Return the kinds of questions that suit a string."""
    return [kind for kind in KINDS if kind != "sum" or len(words) <= MAX_SUMMED]


def _answer(words, kind):
    digits = [DIGITS.index(word) for word in words]
    match kind:
        case "repeat":
            return " ".join(words)
        case "reverse":
            return " ".join(reversed(words))
        case "sort":
            return " ".join(DIGITS[digit] for digit in sorted(digits))
        case "next":  # after nine comes zero
            return " ".join(DIGITS[(digit + 1) % 10] for digit in digits)
        case "largest":
            return DIGITS[max(digits)]
        case "smallest":
            return DIGITS[min(digits)]
        case "sum":
            return number_in_words(sum(digits))
        case "count":
            return number_in_words(len(words))
        case "first":
            return words[0]
        case "last":
            return words[-1]
