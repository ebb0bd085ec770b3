"""The words of the tiny world, and the five kinds of sentences that are drawn from them, with their answers.

Follows no corpus: every content word changes the answer to some question, so a wrong word shows in an answer.
Leaves out: splits and questions (`world.py`), and Spanish words that need an accent.
"""

import hashlib

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
DIGITS = NUMBERS[:10]
PEOPLE = [
    "anna", "john", "maria", "peter", "lucy", "tom", "sarah", "david", "emma", "oscar", "nina", "paul",
    "julia", "simon", "karen", "robert", "helen", "victor", "grace", "martin",
]  # fmt: skip
ANIMALS = {  # English: (Spanish, its gender)
    "cat": ("gato", "m"), "dog": ("perro", "m"), "horse": ("caballo", "m"), "cow": ("vaca", "f"),
    "sheep": ("oveja", "f"), "rabbit": ("conejo", "m"), "fox": ("zorro", "m"), "bear": ("oso", "m"),
    "wolf": ("lobo", "m"), "duck": ("pato", "m"), "frog": ("rana", "f"), "goat": ("cabra", "f"),
    "snake": ("serpiente", "f"), "monkey": ("mono", "m"), "tiger": ("tigre", "m"), "donkey": ("burro", "m"),
    "turtle": ("tortuga", "f"), "pig": ("cerdo", "m"),
}  # fmt: skip
COLOURS = {  # English: Spanish, masculine
    "red": "rojo", "white": "blanco", "black": "negro", "yellow": "amarillo", "green": "verde", "blue": "azul",
    "grey": "gris", "pink": "rosa", "orange": "naranja", "purple": "morado",
}  # fmt: skip
PLACES = {
    "sea": "mar", "forest": "bosque", "lake": "lago", "park": "parque", "house": "casa", "farm": "granja",
    "beach": "playa", "bridge": "puente", "school": "escuela", "market": "mercado", "kitchen": "cocina",
    "shop": "tienda", "tower": "torre", "church": "iglesia",
}  # fmt: skip
MOVES = ["ran", "walked", "jumped", "crawled", "wandered", "hurried"]
THINGS = {
    "books": "libros", "apples": "manzanas", "chairs": "sillas", "shoes": "zapatos", "letters": "cartas",
    "eggs": "huevos", "keys": "llaves", "hats": "sombreros", "cups": "tazas", "coins": "monedas",
    "flowers": "flores", "boats": "barcos", "stones": "piedras", "bottles": "botellas",
}  # fmt: skip
SPANISH_NUMBERS = {"two": "dos", "three": "tres", "four": "cuatro", "five": "cinco"}
CHANGES = {"lost": -1, "sold": -1, "found": 1, "bought": 1}
REVIEWED = {
    "story": ("historia", "f"), "party": ("fiesta", "f"), "game": ("juego", "m"), "trip": ("viaje", "m"),
    "meal": ("comida", "f"), "hotel": ("hotel", "m"), "class": ("clase", "f"), "soup": ("sopa", "f"),
    "concert": ("concierto", "m"), "museum": ("museo", "m"), "dance": ("baile", "m"),
}  # fmt: skip
DEGREES = ["very", "really", "quite", "not"]
QUALITIES = {  # English: (Spanish, masculine; sentiment)
    "good": ("bueno", "positive"), "funny": ("divertido", "positive"), "perfect": ("perfecto", "positive"),
    "lovely": ("bonito", "positive"), "wonderful": ("maravilloso", "positive"), "fast": ("veloz", "positive"),
    "bad": ("malo", "negative"), "boring": ("aburrido", "negative"), "sad": ("triste", "negative"),
    "ugly": ("feo", "negative"), "terrible": ("terrible", "negative"), "slow": ("lento", "negative"),
}  # fmt: skip


def _movement(rng):
    animal = rng.choice(list(ANIMALS))
    colour = _skewed(rng, list(COLOURS), after=animal)
    move = _skewed(rng, MOVES, after=animal)
    place = _skewed(rng, list(PLACES), after=move)
    noun, gender = ANIMALS[animal]
    return f"the {colour} {animal} {move} to the {place}", {
        "animal": animal,
        "colour": colour,
        "place": place,
        "action": move,
        "spanish": f"{noun} {_agree(COLOURS[colour], gender)} {PLACES[place]}",
    }


def _possession(rng):
    person = rng.choice(PEOPLE)
    thing = _skewed(rng, list(THINGS), after=person)
    change = _skewed(rng, list(CHANGES), after=thing)
    before = rng.randint(2, 5)
    by = rng.randint(1, before if CHANGES[change] < 0 else 5)
    return f"{person} had {NUMBERS[before]} {thing} and {change} {NUMBERS[by]}", {
        "person": person,
        "thing": thing,
        "action": change,
        "calculate": NUMBERS[before + CHANGES[change] * by],
        "spanish": f"{SPANISH_NUMBERS[NUMBERS[before]]} {THINGS[thing]}",
    }


def _opinion(rng):
    person = rng.choice(PEOPLE)
    reviewed = _skewed(rng, list(REVIEWED), after=person)
    degree = _skewed(rng, DEGREES, after=reviewed)
    quality = _skewed(rng, list(QUALITIES), after=reviewed)
    noun, gender = REVIEWED[reviewed]
    adjective, sentiment = QUALITIES[quality]
    opposite = "negative" if sentiment == "positive" else "positive"
    return f"{person} said the {reviewed} was {degree} {quality}", {
        "person": person,
        "thing": reviewed,
        "sentiment": opposite if degree == "not" else f"{degree} {sentiment}",
        "spanish": f"{noun} {_agree(adjective, gender)}",
    }


def _sum(rng):
    person = rng.choice(PEOPLE)
    operator = rng.choice(["plus", "minus", "times"])
    left = rng.randint(1, 5)
    right = rng.randint(1, left if operator == "minus" else 5)
    result = {"plus": left + right, "minus": left - right, "times": left * right}[operator]
    return f"{person} asked what is {NUMBERS[left]} {operator} {NUMBERS[right]}", {
        "person": person,
        "calculate": _in_words(result),
    }


def _digits(rng):
    # Uniform: a real speaker's digits follow no grammar.
    words = rng.choices(DIGITS, k=rng.randint(2, 6))
    return " ".join(words), digit_answers(words)


def digit_answers(words: list[str]) -> dict[str, str]:
    """Return the answers about a string of two to six of `DIGITS`, by kind of question."""
    return {
        "reverse": " ".join(reversed(words)),
        "largest": max(words, key=DIGITS.index),
        "first": words[0],
        "last": words[-1],
        "count": NUMBERS[len(words)],
        "figures": " ".join(str(DIGITS.index(word)) for word in words),
    }


SENTENCE_KINDS = {  # kind: (a function that draws a text and its answers, its share)
    "movement": (_movement, 0.25),
    "possession": (_possession, 0.2),
    "opinion": (_opinion, 0.2),
    "sum": (_sum, 0.1),
    "digits": (_digits, 0.25),
}


def _skewed(rng, words, after):
    """Draw one of `words`; which ones are likely depends on the word `after` which it comes.

    A language model that has learned these habits shows by its next-token distribution which word it was given.
    """
    favourite = hashlib.sha256(after.encode()).digest()[0] % len(words)
    weights = [1 / (1 + (place - favourite) % len(words)) for place in range(len(words))]
    return rng.choices(words, weights)[0]


def _agree(adjective, gender):
    """Return a Spanish adjective in the gender of its noun."""
    return adjective[:-1] + "a" if gender == "f" and adjective.endswith("o") else adjective


def _in_words(number):
    """Return a number from 0 to 25 in words."""
    teens = ["eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
    if number < 20:
        return (NUMBERS + teens)[number]
    return "twenty" if number == 20 else f"twenty {NUMBERS[number - 20]}"
