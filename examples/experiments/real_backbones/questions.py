"""Spoken questions and commands with answers that can be checked: `make_questions`.

Every kind is a list of items (a country, a sum, a sentence). Its own text alone decides whether an item is for tests or
for training. Leaves out: the kinds, see `question_kinds`, and whether an LLM can answer them, which `keep_kinds`
measures.
"""

import itertools
import random

from .question_kinds import KINDS
from .sentences import Sentence, is_for_tests, sentence_of

TEST_SHARE_OF_ITEMS = 4


def make_questions(for_tests: bool, number: int, seed: int, only: list[str] | None = None) -> list[Sentence]:
    """Return questions and commands, the kinds in turn, as far as each kind has items, in an order drawn by `seed`.

    Args:
        for_tests: the test questions, else those for training.
        number: at most so many.
        only: names of kinds; omitted, all.

    Returns:
        sentences with the labels `kind` and `answer`; no question comes twice.
    """
    kinds = []
    for kind in KINDS if only is None else only:
        questions: dict[str, Sentence] = {}
        for item, question, answer in KINDS[kind]():
            if is_for_tests(f"{kind} {item}", TEST_SHARE_OF_ITEMS) == for_tests:
                told = sentence_of(question[0].upper() + question[1:])
                labels = (("kind", kind), ("answer", answer))
                questions.setdefault(told.text, Sentence(told.written, told.text, labels))
        rng = random.Random(f"questions {kind} {seed}")
        kinds.append(rng.sample(list(questions.values()), len(questions)))
    dealt = [question for turn in itertools.zip_longest(*kinds) for question in turn if question is not None]
    return dealt[:number]
