"""JSONL manifests: one JSON object per line, with audio paths relative to the manifest.

Lines are parsed one by one, so that nothing guesses types (a text that looks like a date stays a text) and errors name
the row. Leaves out: whether the audio can be used, which is known when it is decoded.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from training_data import BadRow
from training_data.sources import OutsideFolderError, audio_path

DEFAULT_INSTRUCTION = "Continue the following text."


def read_manifest(path: str, allow_outside_paths: bool = False, allow_text_only: bool = False) -> list[dict]:
    """All rows of a manifest, with the same fields each (None where a row has none); see [`manifest_rows`]."""
    rows = list(manifest_rows(path, allow_outside_paths, allow_text_only))
    fields = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name) for name in fields} for row in rows]


def manifest_rows(path: str, allow_outside_paths: bool = False, allow_text_only: bool = False) -> Iterator[dict]:
    """Rows of a manifest, one after the other.

    Args:
        allow_outside_paths: audio paths may leave the manifest's folder.
        allow_text_only: rows may say `"audio": null`.

    Returns:
        An iterator over `dict`: a line's fields, with `audio` an absolute path, `instruction` the default one if there
        is none (an empty one stays empty: the content is all of the prompt), and `origin`, which names the row in
        messages.

    Raises:
        ValueError: a line is no JSON object, lacks text or audio, or names audio outside the folder.
    """
    folder = Path(path).parent.absolute()
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            origin = f"{path}, row {number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{origin}: not a line of JSON ({error}): {line[:80]!r}.") from error
            if not isinstance(row, dict):
                raise ValueError(f"{origin}: expected a JSON object, got {line[:80]!r}.")
            row = checked(row, origin, allow_text_only)
            if row.get("audio"):
                try:
                    row["audio"] = str(audio_path(folder, row["audio"], allow_outside_paths))
                except (BadRow, OutsideFolderError) as error:
                    raise ValueError(f"{origin}: {error}") from None
            yield row


def checked(row: dict, origin: str, allow_text_only: bool) -> dict:
    """A row with its instruction and origin.

    Raises:
        ValueError: it lacks text or audio.
    """
    has_text = isinstance(row.get("text"), str) and row["text"].strip()
    # A misspelt name of the field must not make a row of text alone.
    is_text_only = allow_text_only and "audio" in row and row["audio"] is None
    if not has_text or not (row.get("audio") or is_text_only):
        told = {name: value for name, value in row.items() if not isinstance(value, (bytes, dict))}
        hint = ' (a row to train on as text alone says "audio": null)' if allow_text_only else ""
        raise ValueError(f"{origin}: expected 'audio' and 'text'{hint}, got {told}.")
    instruction = row.get("instruction")
    return {**row, "instruction": DEFAULT_INSTRUCTION if instruction is None else instruction, "origin": origin}
