"""Spoken questions and commands with answers that can be checked, by templates: `make_questions`.

Every kind is a list of items (a country, a sum, a sentence). Its own text alone decides whether an item is for tests or
for training. Leaves out: whether an LLM can answer them; `evaluate.py` measures that.
"""

import itertools
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from .sentences import Sentence, is_for_tests, number_in_words, sentence_of

TEST_SHARE_OF_ITEMS = 4

ITEMS = json.loads(Path(__file__).with_name("question_items.json").read_text(encoding="utf-8"))


def make_questions(for_tests: bool, number: int, seed: int) -> list[Sentence]:
    """Return questions and commands, the kinds in turn, as far as each kind has items, in an order drawn by `seed`.

    Args:
        for_tests: the test questions, else those for training.
        number: at most so many.

    Returns:
        sentences with the labels `kind` and `answer`; no question comes twice.
    """
    kinds = []
    for kind, items in KINDS.items():
        questions: dict[str, Sentence] = {}
        for item, question, answer in items():
            if is_for_tests(f"{kind} {item}", TEST_SHARE_OF_ITEMS) == for_tests:
                told = sentence_of(question[0].upper() + question[1:])
                labels = (("kind", kind), ("answer", answer))
                questions.setdefault(told.text, Sentence(told.written, told.text, labels))
        rng = random.Random(f"questions {kind} {seed}")
        kinds.append(rng.sample(list(questions.values()), len(questions)))
    dealt = [question for turn in itertools.zip_longest(*kinds) for question in turn if question is not None]
    return dealt[:number]


# An item, a question or command about it, and the answer.
Items = Iterator[tuple[str, str, str]]


def _table(name: str, *templates: str) -> Callable[[], Items]:
    """Return the items of a table, each with every template."""
    return lambda: (
        (item, template.format(item), answer) for item, answer in ITEMS[name].items() for template in templates
    )


def _sums() -> Items:
    for first, second in itertools.product(range(1, 21), repeat=2):
        words = f"{number_in_words(first)} plus {number_in_words(second)}"
        for template in ("what is {}?", "how much is {}?"):
            yield words, template.format(words), str(first + second)


def _differences() -> Items:
    for first, second in itertools.product(range(2, 21), range(1, 20)):
        if second < first:
            words = f"{number_in_words(first)} minus {number_in_words(second)}"
            yield words, f"what is {words}?", str(first - second)


def _products() -> Items:
    for first, second in itertools.product(range(1, 13), repeat=2):
        words = f"{number_in_words(first)} times {number_in_words(second)}"
        yield words, f"what is {words}?", str(first * second)


def _next_numbers() -> Items:
    for number in range(1, 100):
        yield str(number), f"what number comes after {number_in_words(number)}?", str(number + 1)


def _calendar() -> Items:
    for names, unit in ((ITEMS["days"], "day of the week"), (ITEMS["months"], "month")):
        for place, name in enumerate(names):
            yield f"after {name}", f"which {unit} comes after {name}?", names[(place + 1) % len(names)]
            yield f"before {name}", f"which {unit} comes before {name}?", names[place - 1]


def _continents() -> Items:
    for continent, countries in ITEMS["continents"].items():
        for country in countries:
            yield country, f"on which continent is {country}?", continent
            yield country, f"which continent is {country} in?", continent


def _spoken_sentences() -> Iterator[str]:
    for subject, verb, thing in itertools.product(ITEMS["subjects"], ITEMS["verbs"], ITEMS["objects"]):
        yield f"{subject} {verb} {thing}"


def _repeat() -> Items:
    for sentence in _spoken_sentences():
        yield sentence, f"repeat after me: {sentence}.", sentence


def _last_word() -> Items:
    for sentence in _spoken_sentences():
        yield sentence, f"what is the last word of this sentence? {sentence}.", sentence.split()[-1]


def _first_word() -> Items:
    words = ITEMS["words"]
    for (place, first), (other, second) in itertools.permutations(enumerate(words), 2):
        third = words[(place + other) % len(words)]
        if third not in (first, second):
            three = f"{first}, {second}, {third}"
            yield three, f"tell me the first of these words: {three}.", first


def _say_word() -> Items:
    for word in ITEMS["words"]:
        for template in ("say the word {}.", "please say {}.", "answer with one word: {}."):
            yield word, template.format(word), word


def _spelling() -> Items:
    for word in sorted({*ITEMS["short_words"], *ITEMS["words"]}):
        yield word, f"spell the word {word}.", " ".join(word)
        yield word, f"how do you spell {word}?", " ".join(word)


def _yes_no() -> Items:
    for (group, members), other in itertools.product(ITEMS["members"].items(), ITEMS["members"]):
        # A penguin is an animal, too, so that is not asked.
        if {group, other} == {"animal", "bird"}:
            continue
        for member in members:
            answer = "yes" if group == other else "no"
            # Eight kinds of "no" for one "yes" would let "no" win.
            if group == other or is_for_tests(f"keep {member} {other}", len(ITEMS["members"]) - 1):
                yield (
                    f"{member} {other}",
                    f"is {_thing(member, group)} {_article(other)} {other}? answer yes or no.",
                    answer,
                )


def _series() -> Items:
    for names in (ITEMS["days"], ITEMS["months"]):
        for place, name in enumerate(names):
            three = ", ".join(names[(place + step) % len(names)] for step in range(3))
            for template in ("what comes next? {}.", "continue this list: {}."):
                yield f"{name} and so on", template.format(three), names[(place + 3) % len(names)]


def _thing(member: str, group: str) -> str:
    return member if group in ("color", "country", "metal") else f"{_article(member)} {member}"


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


KINDS: dict[str, Callable[[], Items]] = {
    "addition": _sums,
    "subtraction": _differences,
    "multiplication": _products,
    "next number": _next_numbers,
    "capital": _table(
        "capitals", "what is the capital of {}?", "tell me the capital of {}.", "name the capital city of {}."
    ),
    "continent": _continents,
    "language": _table("languages", "what language do people speak in {}?", "which language is spoken in {}?"),
    "opposite": _table("opposites", "what is the opposite of {}?", "tell me the opposite of the word {}."),
    "calendar": _calendar,
    "color": _table("colors", "what color is {}?", "tell me the color of {}."),
    "unit": _table("units", "how many {}?", "tell me how many {}."),
    "spanish": _table("spanish", "how do you say {} in Spanish?", "translate the word {} into Spanish."),
    "french": _table("french", "how do you say {} in French?", "translate the word {} into French."),
    "past": _table("past", "what is the past tense of {}?", "what is the past tense of the verb {}?"),
    "plural": _table("plurals", "what is the plural of {}?", "tell me the plural of the word {}."),
    "repeat after me": _repeat,
    "first word": _first_word,
    "last word": _last_word,
    "say": _say_word,
    "spelling": _spelling,
    "yes or no": _yes_no,
    "country": _table("countries", "in which country is {}?", "which country is the city of {} in?"),
    "currency": _table("currencies", "what is the currency of {}?", "what money do people use in {}?"),
    "profession": _table("professions", "what do you call a person who {}?", "name the profession: a person who {}."),
    "saying": _table("sayings", "finish this saying: {}!", "how does this saying end: {}?"),
    "young": _table("young", "what is a baby {} called?", "what do you call a young {}?"),
    "author": _table("authors", "who wrote {}?", "tell me who wrote {}."),
    "symbol": _table("symbols", "what is the chemical symbol for {}?", "tell me the chemical symbol of {}."),
    "series": _series,
    "fact": _table("facts", "{}?", "tell me, {}?"),
}
