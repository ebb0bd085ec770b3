"""The text of the tiny world: sentences in three splits, and questions that each have exactly one answer.

Follows no corpus; `sentence_kinds.py` has the words and the kinds of sentences.
Leaves out: speech (`speech.py`), and stochastic answers.
"""

import functools
import hashlib
import random
from dataclasses import dataclass, field

from .sentence_kinds import SENTENCE_KINDS, digit_answers

INSTRUCTIONS = {
    "repeat": ("Repeat the words.", "Say it again.", "Write down what was said."),
    "animal": ("Name the animal.", "Which animal is it?"),
    "colour": ("Name the colour.", "What colour is it?"),
    "place": ("Name the place.", "Where did it go?"),
    "person": ("Name the person.", "Who is it about?"),
    "thing": ("Name the thing.", "Which thing is it about?"),
    "action": ("Name the action.", "What happened?"),
    "calculate": ("Calculate the result.", "How much is it?"),
    "sentiment": ("Name the sentiment.", "Is it positive or negative?"),
    "spanish": ("Give the key words in Spanish.", "Which are the key words in Spanish?"),
    "reverse": ("Reverse the digits.", "Say the digits backwards."),
    "largest": ("Name the largest digit.", "Which digit is the largest?"),
    "first": ("Name the first digit.", "Which digit comes first?"),
    "last": ("Name the last digit.", "Which digit comes last?"),
    "count": ("Count the digits.", "How many digits are there?"),
    "figures": ("Write the digits as figures.",),
}
KINDS = tuple(INSTRUCTIONS)
"""Every kind of question."""
SPLITS = ("train", "test", "final")
# Seeds and numbers of the test sentences that were drawn to score the LLM, the encoder, the default run and the
# timestamps, and for the clips that are kept. They hold all 116 held-out sums.
_LOOKED_AT = {1: 1500, 2: 750, 3: 200, 21: 300, 22: 300}


@dataclass(frozen=True)
class Sentence:
    """A sentence that somebody says.

    Args:
        text: lower-case words between single spaces, no punctuation.
        kind: "movement", "possession", "opinion", "sum" or "digits".
        answers: question kind -> its answer, for each kind that this sentence can answer.
    """

    text: str
    kind: str
    answers: dict[str, str] = field(hash=False, compare=False)


@dataclass(frozen=True)
class Question:
    """A question about a sentence, in typed text, and its only right answer.

    Args:
        kind: one of `KINDS`.
        instruction: one wording of that kind.
        answer: lower-case words (or figures) without punctuation.
    """

    kind: str
    instruction: str
    answer: str


def sentences(split: str, num: int, seed: int) -> list[Sentence]:
    """Draw sentences of one split; a text belongs to the same split whatever the seed.

    About nine tenths of all texts are "train". The rest is "test", what models are compared on while they are made,
    and "final", what no choice was ever made on. A text comes twice only after its kind has run out of new ones (of the
    smallest, "sum", the train split has about 1,170 texts, the test split 116, and the final split none).

    Raises:
        ValueError: `split` is none of `SPLITS`.
    """
    if split not in SPLITS:
        raise ValueError(f"The tiny world has the splits {SPLITS}, but got {split!r}. Choose one of them.")
    return _draw(split, num, seed, lambda text: split_of(text) == split)


def split_of(text: str) -> str:
    """Return the split that a sentence's text belongs to, by a hash that does not change between runs or machines."""
    if not _is_held_out(text):
        return "train"
    return "final" if hashlib.sha256(text.encode()).digest()[1] >= 128 and text not in _looked_at() else "test"


def _is_held_out(text):
    return hashlib.sha256(text.encode()).digest()[0] < 26


@functools.cache
def _looked_at():
    """Return held-out texts that the project's models were compared on before there was a final split."""
    draws = [_draw("test", num, seed, _is_held_out) for seed, num in _LOOKED_AT.items()]
    return frozenset(sentence.text for drawn in draws for sentence in drawn)


def _draw(split, num, seed, belongs):
    rng = random.Random(f"sentences {split} {seed}")
    kinds = {name: kind for name, kind in SENTENCE_KINDS.items() if (split, name) != ("final", "sum")}
    seen: set[str] = set()
    drawn: list[Sentence] = []
    run_out: set[str] = set()
    while len(drawn) < num:
        (kind,) = rng.choices(list(kinds), [share for _, share in kinds.values()])
        draw, _ = kinds[kind]
        num_tries = 0
        while True:
            text, answers = draw(rng)
            if not belongs(text):
                continue
            num_tries += 1
            if text not in seen or num_tries > 200 or kind in run_out:
                break
        if num_tries > 200 and split == "final":
            # Looking for new ones again and again would take minutes. The other splits do, and stay as they are.
            run_out.add(kind)
        seen.add(text)
        drawn.append(Sentence(text, kind, {"repeat": text, **answers}))
    return drawn


def questions(sentence: Sentence) -> list[Question]:
    """Return all questions that the sentence can answer: every kind that applies, in every wording."""
    return [
        Question(kind, instruction, answer)
        for kind, answer in sentence.answers.items()
        for instruction in INSTRUCTIONS[kind]
    ]


def digit_sentence(words: list[str]) -> Sentence:
    """Return the sentence that a string of spoken digits makes.

    Args:
        words: two to six of `DIGITS`.
    """
    text = " ".join(words)
    return Sentence(text, "digits", {"repeat": text, **digit_answers(words)})
