"""The kinds of spoken questions and commands, as templates over the items of `question_items.json`.

Kinds that begin with "told" ask for what was said a moment before. Those of `_with` are commands whose answer is to
have a word in it. Leaves out: which items are for tests, see `questions`.
"""

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from .sentences import is_for_tests, number_in_words

ITEMS = json.loads(Path(__file__).with_name("question_items.json").read_text(encoding="utf-8"))

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


def _told_what() -> Items:
    for name, (past, verb), thing in itertools.product(
        ITEMS["first names"], ITEMS["plain verbs"].items(), ITEMS["objects"]
    ):
        if is_for_tests(f"keep {name} {past} {thing}", 8):  # there are thousands
            yield f"{name} {past} {thing}", f"{name} {past} {thing}. what did {name} {verb}?", thing.split()[-1]


def _told_who() -> Items:
    for name, past, thing in itertools.product(ITEMS["first names"], ITEMS["plain verbs"], ITEMS["objects"]):
        if is_for_tests(f"keep {name} {past} {thing}", 8):
            yield f"{name} {past} {thing}", f"{name} {past} {thing}. who {past} {thing}?", name


def _told_where() -> Items:
    for animal, place in itertools.product(ITEMS["animals"], ITEMS["places"]):
        yield f"{animal} {place}", f"the {animal} is {place}. where is the {animal}?", place.split()[-1]


def _told_color() -> Items:
    for thing, color in itertools.product(ITEMS["belongings"], ITEMS["paint colors"]):
        yield f"{color} {thing}", f"the {thing} is {color}. what color is the {thing}?", color


def _told_number() -> Items:
    for number, things in itertools.product(range(2, 21), ITEMS["countable"]):
        told = f"there are {number_in_words(number)} {things} on the table"
        yield f"{number} {things}", f"{told}. how many {things} are there?", str(number)


def _told_name() -> Items:
    for name in ITEMS["first names"]:
        yield name, f"my name is {name}. what is my name?", name
        yield name, f"hello, my name is {name}. do you remember my name?", name


def _who_was() -> Items:
    for person in ITEMS["famous people"]:
        for template in ("who was {}?", "tell me about {}."):
            yield person, template.format(person), person.split()[-1]


def _with(name: str, *templates: str) -> Callable[[], Items]:
    """Return commands whose answer is to have a word in it; in a template `{a}` is the word with its article."""
    return lambda: (
        (word, template.format(word, a=f"{_article(word)} {word}"), word)
        for word in ITEMS[name]
        for template in templates
    )


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
    "told what": _told_what,
    "told who": _told_who,
    "told where": _told_where,
    "told color": _told_color,
    "told number": _told_number,
    "told name": _told_name,
    "person": _who_was,
    "sentence with": _with(
        "nouns", "use the word {} in a sentence.", "write a sentence with the word {}.", "make a sentence about {a}."
    ),
    "definition": _with("nouns", "what is {a}?", "explain what {a} is.", "define the word {}."),
    "poem": _with("nouns", "write a poem about {a}.", "write a short poem about the {}."),
    "topic": _with("topics", "tell me about {}.", "what do you know about {}?"),
}
