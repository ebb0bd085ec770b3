"""Group words with their times to segments, and write these as subtitles, SubRip or WebVTT.

A segment ends where a sentence or a pause does, or before it is too long to be read at once.
"""

import html
from typing import NamedTuple

# Two lines of the length that subtitles usually have.
MAX_CHARS = 84
MAX_DURATION_S = 7.0
PAUSE_S = 0.8
SENTENCE_ENDS = (".", "!", "?", "。", "！", "？", "…")


class Segment(NamedTuple):
    """A piece of a transcript; seconds from the start of the recording."""

    start: float
    end: float
    text: str


def segments_of(words: list[dict]) -> list[Segment]:
    """Group words to segments.

    Args:
        words (`list[dict]`): `text`, with the white space before it, and `timestamp`, (start, end).
    """
    groups: list[list[dict]] = []
    for word in words:
        if groups and not _ends_before(groups[-1], word):
            groups[-1].append(word)
        else:
            groups.append([word])
    return [
        Segment(group[0]["timestamp"][0], group[-1]["timestamp"][1], "".join(word["text"] for word in group).strip())
        for group in groups
    ]


def _ends_before(group: list[dict], word: dict) -> bool:
    start, end = group[0]["timestamp"][0], group[-1]["timestamp"][1]
    num_chars = sum(len(each["text"]) for each in [*group, word])
    return (
        group[-1]["text"].endswith(SENTENCE_ENDS)
        or word["timestamp"][0] - end > PAUSE_S
        or word["timestamp"][1] - start > MAX_DURATION_S
        or num_chars > MAX_CHARS
    )


def as_srt(segments: list[Segment]) -> str:
    """Return segments in SubRip's format."""
    cues = [
        f"{number}\n{_time(segment.start, ',')} --> {_time(segment.end, ',')}\n{segment.text}\n"
        for number, segment in enumerate(segments, 1)
    ]
    return "\n".join(cues)


def as_vtt(segments: list[Segment]) -> str:
    """Return segments in WebVTT's format."""
    cues = [
        f"{_time(segment.start, '.')} --> {_time(segment.end, '.')}\n{html.escape(segment.text, quote=False)}\n"
        for segment in segments
    ]
    return "\n".join(["WEBVTT\n", *cues])


def _time(seconds: float, point: str) -> str:
    milliseconds = round(1000 * seconds)
    minutes, milliseconds = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{milliseconds // 1000:02}{point}{milliseconds % 1000:03}"
