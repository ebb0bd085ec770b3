"""Convert the notation of a corpus's transcripts to ordinary text.

LibriSpeech is in capitals without punctuation, GigaSpeech (arXiv 2106.06909) spells punctuation as tags, and Common
Voice has stray quotes. Leaves out: capitals of names, numbers and abbreviations, which no rule finds.
"""

import re
import unicodedata

from processing.manifests import BadRow

PUNCTUATION_TAGS = {"<COMMA>": ",", "<PERIOD>": ".", "<QUESTIONMARK>": "?", "<EXCLAMATIONPOINT>": "!"}
NOT_SPEECH_TAGS = ("<SIL>", "<MUSIC>", "<NOISE>", "<OTHER>")
QUOTES = {'"': '"', "“": "”", "„": "“", "«": "»"}
PRONOUN_I = re.compile(r"\bi(?=$|[\s,;:.?!]|['’](?:m|ll|ve|d)\b)")
SENTENCE_START = re.compile(r"(?:^|(?<=[.?!]\s))\W*\w")


def as_it_is(text: str) -> str:
    """Strip white space at the ends, and reduce it to single spaces elsewhere."""
    return " ".join(text.split())


def librispeech(text: str) -> str:
    """Convert `HE SAID I'LL GO` to `He said I'll go`. Text that has lower-case letters keeps its case.

    No full stop is added: LibriSpeech cuts its utterances at pauses, often within a sentence.
    """
    return sentence_case(as_it_is(text))


def gigaspeech(text: str) -> str:
    """Convert `YES <COMMA> I DO <PERIOD>` to `Yes, I do.`

    Raises:
        BadRow: a tag says that this is no speech, or is not one of GigaSpeech's.
    """
    words: list[str] = []
    for word in text.split():
        if word in NOT_SPEECH_TAGS:
            raise BadRow(f"no speech: the transcript holds {word}")
        if word in PUNCTUATION_TAGS:
            words[-1:] = ["".join(words[-1:]) + PUNCTUATION_TAGS[word]]
        elif re.fullmatch(r"<\w+>", word):
            raise BadRow(f"unknown tag {word} in the transcript, expected one of {[*PUNCTUATION_TAGS]}")
        else:
            words.append(word)
    return sentence_case(" ".join(words))


def common_voice(text: str) -> str:
    """Convert `"Where is it going"` to `Where is it going.`: remove the quotes around it, and add a full stop.

    Scripts without spaces between words (Chinese, Japanese) end sentences in other ways and get no full stop.
    """
    text = as_it_is(text.replace('""', '"'))
    # Remove only a pair around the whole text: not those of '"Yes" and "no"'.
    if len(text) > 1 and QUOTES.get(text[0]) == text[-1] and not {text[0], text[-1]} & set(text[1:-1]):
        text = text[1:-1].strip()
    if text and text[-1].isalnum() and unicodedata.east_asian_width(text[-1]) not in ("W", "F"):
        text += "."
    return text


def sentence_case(text: str) -> str:
    """Lower text that is all in capitals, except for the start of sentences and the pronoun I."""
    if text != text.upper():
        return text
    text = PRONOUN_I.sub("I", text.lower())
    return SENTENCE_START.sub(lambda match: match.group().upper(), text)


NORMALISERS = {
    "none": as_it_is,
    "librispeech": librispeech,
    "gigaspeech": gigaspeech,
    "common_voice": common_voice,
}
