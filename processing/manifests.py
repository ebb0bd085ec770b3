"""JSONL manifests: one JSON object per line, in UTF-8, with audio paths relative to the manifest.

Lines are parsed one by one, so that nothing guesses types (a text that looks like a date stays a text) and errors name
the row. Leaves out: whether the audio can be used, which is known when it is decoded.
"""

import codecs
import json
import math
import os
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path

DEFAULT_INSTRUCTION = "Continue the following text."
TEXTS = ("instruction", "response")
# A number is a label, too: a speaker 3, an answer 7.
LABELS = ("id", "answer", "translation", "kind", "voice", "voice_group")
# UTF-32 first: its mark begins with that of UTF-16.
OTHER_ENCODINGS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


class BadRow(ValueError):
    """One row is unusable; the message says why."""


class OutsideFolderError(ValueError):
    """A path leaves the folder of the data."""


def manifest_lines(path: str | Path, limit: int | None = None) -> Iterator[bytes]:
    """Yield the lines of a manifest, also blank ones, without the byte order mark that some editors write first.

    Raises:
        ValueError: the file begins with the mark of another encoding than UTF-8.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(islice(file, limit)):
            if number == 0:
                for mark, encoding in OTHER_ENCODINGS.items():
                    if line.startswith(mark):
                        raise ValueError(
                            f"{path} is {encoding}, but a manifest is UTF-8. Convert it: iconv -f {encoding} -t UTF-8."
                        )
                line = line.removeprefix(codecs.BOM_UTF8)
            yield line


def parse_line(line: bytes) -> dict:
    """Return the row of one line.

    Raises:
        BadRow: it is no JSON object in UTF-8.
    """
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRow(
            f"not a line of JSON in UTF-8: byte {error.start + 1} is {line[error.start]:#04x}. If the file is Latin-1: "
            "iconv -f ISO-8859-1 -t UTF-8"
        ) from error
    except (ValueError, RecursionError) as error:
        raise BadRow(f"not a line of JSON ({error}): {line[:80].decode('utf-8', 'replace')!r}") from error
    if not isinstance(row, dict):
        raise BadRow(f"expected a JSON object, got {str(row)[:80]!r}")
    return row


def read_objects(path: str | Path) -> list[tuple[str, dict]]:
    """Return the rows of any JSONL file, each with its origin ("path, row number") for messages; blank lines are none.

    Raises:
        ValueError: a line is no JSON object in UTF-8.
    """
    return list(_objects(path))


def _objects(path: str | Path) -> Iterator[tuple[str, dict]]:
    for number, line in enumerate(manifest_lines(path), start=1):
        if not line.strip():
            continue
        origin = f"{path}, row {number}"
        try:
            yield origin, parse_line(line)
        except BadRow as error:
            raise ValueError(f"{origin}: {error}.") from error


def read_manifest(path: str | Path, allow_outside_paths: bool = False, allow_text_only: bool = False) -> list[dict]:
    """Return all rows of a manifest, with the same fields each (None where a row has none); see [`manifest_rows`]."""
    rows = list(manifest_rows(path, allow_outside_paths, allow_text_only))
    fields = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name) for name in fields} for row in rows]


def manifest_rows(path: str | Path, allow_outside_paths: bool = False, allow_text_only: bool = False) -> Iterator[dict]:
    """Yield the rows of a manifest, one after the other.

    Args:
        allow_outside_paths: audio paths may leave the manifest's folder.
        allow_text_only: rows may say `"audio": null`.

    Returns:
        An iterator over `dict`: a line's fields, with `audio` an absolute path, `instruction` the default one if there
        is none (an empty one stays empty: the content is all of the prompt), `duration` a float, labels (`voice`,
        `answer`, ...) strings, and `origin`, which names the row in messages.

    Raises:
        ValueError: a line is no JSON object, lacks text or audio, has a field of another type, or names audio outside
            the folder.
    """
    folder = Path(path).parent.absolute()
    for origin, row in _objects(path):
        row = checked(row, origin, allow_text_only)
        if row.get("audio"):
            try:
                row["audio"] = str(audio_path(folder, row["audio"], allow_outside_paths))
            except (BadRow, OutsideFolderError) as error:
                raise ValueError(f"{origin}: {error}") from None
        yield row


def checked(row: dict, origin: str, allow_text_only: bool) -> dict:
    """Return a row with its instruction, its origin, and the types that its fields should have.

    Raises:
        ValueError: it lacks text or audio, or a field has another type.
    """
    has_text = isinstance(row.get("text"), str) and row["text"].strip()
    # A misspelt name of the field must not make a row of text alone.
    is_text_only = allow_text_only and "audio" in row and row["audio"] is None
    if not has_text or not (row.get("audio") or is_text_only):
        told = {name: value for name, value in row.items() if not isinstance(value, (bytes, dict))}
        hint = ' (a row to train on as text alone says "audio": null)' if allow_text_only else ""
        raise ValueError(f"{origin}: expected 'audio' and 'text'{hint}, got {told}.")
    typed = {}
    try:
        for name in TEXTS:
            if not isinstance(row.get(name), (str, type(None))):
                raise BadRow(f"expected a string as {name!r}, got {row[name]!r}")
        for name in LABELS:
            typed |= {name: _label(name, row[name])} if name in row else {}
        if row.get("duration") is not None:
            typed["duration"] = seconds("duration", row["duration"])
        if row.get("words") is not None:
            typed["words"] = _words(row["words"])
    except BadRow as error:
        raise ValueError(f"{origin}: {error}.") from None
    instruction = row.get("instruction")
    return {
        **row,
        **typed,
        "instruction": DEFAULT_INSTRUCTION if instruction is None else instruction,
        "origin": origin,
    }


def seconds(name: str, value) -> float:
    """Return a time in seconds, given as a number or as a string of one ("3.2").

    Raises:
        BadRow: it is neither, negative, or not finite.
    """
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 <= number < math.inf:
        raise BadRow(f"expected seconds as {name!r}, a number of 0 or more, got {value!r}")
    return number


def _label(name: str, value) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    raise BadRow(f"expected a string as {name!r}, got {value!r}")


def _words(words):
    """Words with their times in seconds; what has another form is left to those who want times."""
    if not isinstance(words, list) or not all(isinstance(word, dict) for word in words):
        return words
    times = ("start", "end")
    return [{**word, **{name: seconds(name, word[name]) for name in times if name in word}} for word in words]


def audio_path(folder: Path, name, allow_outside: bool) -> Path:
    """Return where the audio of a row lies.

    Raises:
        BadRow: `name` is no path.
        OutsideFolderError: it leaves `folder`, by itself or through a symbolic link, and `allow_outside` is not set.
    """
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise BadRow(f"expected the path of an audio file, got {name!r}")
    try:
        os.fsencode(name)
    except UnicodeEncodeError:  # JSON can hold half a surrogate pair
        raise BadRow(f"expected the path of an audio file, got {name!r}, which no file can be called") from None
    path = folder / name
    if not allow_outside and not Path(os.path.realpath(path)).is_relative_to(_real(folder)):
        raise OutsideFolderError(
            f"the audio path {name!r} leaves the folder of the data. Move the audio into it, or, if you trust the "
            "data, pass --allow_outside_paths."
        )
    return path


@lru_cache(maxsize=64)
def _real(folder: Path) -> str:
    return os.path.realpath(folder)
