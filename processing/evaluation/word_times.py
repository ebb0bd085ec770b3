"""Errors of word times, against the times at which the words were said.

Leaves out: statistics of the errors, see `scoring.py` and `examples/experiments/measure_timestamps.py`.
"""

from difflib import SequenceMatcher

from transformers.models.whisper.english_normalizer import BasicTextNormalizer


def errors_of(row: dict, words: list[dict]) -> list[tuple[float, float]]:
    """Return how much too late the right ones of some words start and end, in seconds. Case and punctuation do not
    make a word wrong.

    Args:
        row: with `words`, each with its `text`, `start` and `end` in seconds.
        words: of the model, as in `BlspKdProcessor.word_timestamps`.
    """
    normalize = BasicTextNormalizer()
    said, heard = ([normalize(word["text"]).strip() for word in side] for side in (row["words"], words))
    errors = []
    for match in SequenceMatcher(None, said, heard, autojunk=False).get_matching_blocks():
        for index in range(match.size):
            truth, (start, end) = row["words"][match.a + index], words[match.b + index]["timestamp"]
            errors.append((start - truth["start"], end - truth["end"]))
    return errors
