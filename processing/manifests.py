"""Read JSONL manifests: one JSON object per line, in UTF-8, with audio paths relative to the manifest.

Lines are parsed one by one, so that no reader guesses types (a text that looks like a date stays a text) and errors
name the row. The audio is not opened here; errors in it appear when it is decoded.
"""

import codecs
import json
import math
import os
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

DEFAULT_INSTRUCTION = "Continue the following text."
TEXTS = ("instruction", "response")
# Numbers are also accepted as labels: speaker 3, answer 7.
LABELS = ("id", "answer", "translation", "kind", "voice", "voice_group")
# UTF-32 comes first, because its mark begins with that of UTF-16.
OTHER_ENCODINGS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


class BadRow(ValueError):
    """Raised when a row is invalid; the message gives the reason."""


class OutsideFolderError(ValueError):
    """Raised when a path leaves the folder of the data."""


def manifest_lines(path: str | Path, limit: int | None = None) -> Iterator[bytes]:
    """Yield the lines of a manifest, including blank ones, without the byte order mark that some editors write.

    Raises:
        ValueError: the file begins with the mark of an encoding other than UTF-8.
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
    """Parse one line into a row.

    Raises:
        BadRow: the line is not a JSON object in UTF-8.
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
    """Return the rows of any JSONL file, each with its origin ("path, row number") for messages. Skip blank lines.

    Raises:
        ValueError: a line is not a JSON object in UTF-8.
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
        allow_text_only: rows may have `"audio": null`.

    Returns:
        An iterator over `dict`: a line's fields, with `audio` as an absolute path, `duration` as a float, labels
        (`voice`, `answer`, ...) as strings, and `origin`, which names the row in messages. A missing `instruction`
        becomes the default one; an empty one stays empty, so that the prompt is the content alone.

    Raises:
        ValueError: a line is not a JSON object, lacks text or audio, has a field of another type, or names audio
            outside the folder.
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
    """Check a row, and return it with its instruction, its origin, and its fields in their proper types.

    Raises:
        ValueError: the row lacks text or audio, or a field has another type.
    """
    has_text = isinstance(row.get("text"), str) and row["text"].strip()
    # A misspelt field name must not make a text-only row.
    is_text_only = allow_text_only and "audio" in row and row["audio"] is None
    if not has_text or not (row.get("audio") or is_text_only):
        told = {name: value for name, value in row.items() if not isinstance(value, (bytes, dict))}
        hint = ' (a row to train on as text alone says "audio": null)' if allow_text_only else ""
        raise ValueError(f"{origin}: expected 'audio' and 'text'{hint}, got {told}.")
    typed: dict[str, Any] = {}
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


def seconds(name: str, value: Any) -> float:
    """Convert a time in seconds, given as a number or as a string that holds one ("3.2"), to a float.

    Raises:
        BadRow: the value is neither, negative, or not finite.
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
    """Convert the times of words to floats. Return other forms unchanged; code that needs times checks them."""
    if not isinstance(words, list) or not all(isinstance(word, dict) for word in words):
        return words
    times = ("start", "end")
    return [{**word, **{name: seconds(name, word[name]) for name in times if name in word}} for word in words]


def audio_path(folder: Path, name: Any, allow_outside: bool) -> Path:
    """Return the path of a row's audio.

    Raises:
        BadRow: `name` is not a path.
        OutsideFolderError: the path leaves `folder`, directly or through a symbolic link, and `allow_outside` is False.
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
