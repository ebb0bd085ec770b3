"""Rows to evaluate on: from a manifest or a data set of the Hub, one at a time.

A row has `id`, `audio` and `text` (what is said), and where known `instruction`, `answer` (gold), `translation` (gold),
`response` (the LLM's own answer), `words` (when each was said), `kind`, `voice` and `voice_group`. Leaves out: decoding
by `datasets`, which would need torchcodec; clips stay bytes or paths until a system reads them.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Audio, load_dataset

from processing.manifests import DEFAULT_INSTRUCTION, read_manifest

# Data sets are recognised by their columns, since the same one is on the Hub under several names. The first schema that
# fits is used. Each maps our fields to its columns.
SCHEMAS = {
    "CoVoST-2 or MuST-C": {
        "id": "id",
        "text": "sentence",
        "translation": "translation",
        "voice": "client_id",
    },
    "Common Voice": {"id": "path", "text": "sentence", "voice": "client_id"},
    "LibriSpeech": {"id": "id", "text": "text", "voice": "speaker_id"},
    # The clip is the whole question, so there is no instruction.
    "VoiceBench with references": {"text": "prompt", "answer": "reference"},
    "VoiceBench": {"text": "prompt"},
}
OF_AN_INSTRUCTION = ("answer", "response")
FIELDS = ("instruction", "answer", "translation", "response", "words", "kind", "voice", "voice_group")


def open_rows(options: Any, default: Callable | None = None) -> tuple[str, int | None, Iterator[dict]]:
    """Open the data that options name.

    Args:
        options: with `manifest`, `train_manifest`, `allow_outside_paths`, `dataset`, `config`, `split`, `streaming` and
            `limit`, and where wanted `kinds` and `instruction`, see `examples/evaluate.py`.
        default: what to take if they name neither a manifest nor a data set: given the options, it returns a name and
            a list of rows.

    Returns:
        the data's name (that changes when the data does), the number of its rows where known, and the rows.

    Raises:
        ValueError: options contradict each other, or name no data.
    """
    if options.manifest and options.dataset:
        raise ValueError("Give --manifest or --dataset, not both.")
    if options.train_manifest and not options.manifest:
        raise ValueError("--train_manifest tells which voices of a --manifest were seen, but there is none.")
    if not options.dataset and (options.config or options.streaming):
        raise ValueError("--config and --streaming are of a --dataset, but there is none.")
    if options.manifest:
        with open(options.manifest, "rb") as file:
            name = f"{Path(options.manifest).name} sha256:{hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"
        rows: Iterable[dict] = manifest_rows(options.manifest, options.train_manifest, options.allow_outside_paths)
    elif options.dataset:
        name = " ".join(filter(None, (options.dataset, options.config, options.split)))
        rows = hub_rows(options.dataset, options.config, options.split, options.streaming)
    elif default is not None:
        name, rows = default(options)
    else:
        raise ValueError("There is no data to evaluate on. Give --manifest or --dataset.")
    kinds, instruction = (getattr(options, wish, None) for wish in ("kinds", "instruction"))
    if kinds:
        rows, name = of_kinds(rows, kinds), f"{name}, of the kinds {', '.join(kinds)}"
    if instruction is not None:
        rows, name = asked(rows, instruction), f"{name}, asked {instruction!r}"
    total = min(len(rows), options.limit or len(rows)) if isinstance(rows, list) else options.limit
    return name, total, check_rows(islice(rows, options.limit))


def of_kinds(rows: Iterable[dict], kinds: list[str]) -> Iterable[dict]:
    """Return the rows of some kinds; a stream stays one.

    Raises:
        ValueError: a list has no row of one of the kinds.
    """
    if not isinstance(rows, list):
        return (row for row in rows if row.get("kind") in kinds)
    there = {row["kind"] for row in rows if row.get("kind")}
    if lacking := sorted(set(kinds) - there):
        raise ValueError(
            f"No row is of the kind {', '.join(lacking)}. There are: {', '.join(sorted(there)) or 'none'}."
        )
    return [row for row in rows if row.get("kind") in kinds]


def asked(rows: Iterable[dict], instruction: str) -> Iterable[dict]:
    """Return rows with another instruction. What was right for their own one, `answer` and `response`, is left out."""
    made = (
        {name: value for name, value in {**row, "instruction": instruction}.items() if name not in OF_AN_INSTRUCTION}
        for row in rows
    )
    return list(made) if isinstance(rows, list) else made


def check_rows(rows: Iterable[dict]) -> Iterator[dict]:
    """Check rows, and yield each with an id and the known fields.

    Raises:
        ValueError: a row has no audio or no text, or two rows have the same id.
    """
    seen = set()
    for number, row in enumerate(rows, start=1):
        row_id = str(number if row.get("id") is None else row["id"])
        if row.get("audio") is None or not isinstance(row.get("text"), str) or not row["text"].strip():
            told = {name: value for name, value in row.items() if name != "audio"}
            raise ValueError(
                f"Row {number} (id {row_id}) needs 'audio' and a non-empty 'text', got "
                f"{'no audio' if row.get('audio') is None else 'audio'} and {told}. Mend it, or take it out."
            )
        if row_id in seen:
            raise ValueError(f"Row {number} has the id {row_id!r} of an earlier row. Ids must differ.")
        seen.add(row_id)
        known = {name: row[name] for name in FIELDS if row.get(name) not in (None, "", [])}
        yield {"id": row_id, "audio": row["audio"], "text": row["text"].strip(), **known}


def manifest_rows(path: str, train_manifest: str | None = None, allow_outside_paths: bool = False) -> list[dict]:
    """Return the rows of a JSONL manifest; a training manifest tells which voices were seen."""
    rows = read_manifest(path, allow_outside_paths)
    if train_manifest:
        seen = {row.get("voice") for row in read_manifest(train_manifest, allow_outside_paths, allow_text_only=True)}
        rows = [{**row, "voice_group": voice_group(row.get("voice") in seen)} for row in rows]
    return rows


def voice_group(is_seen: bool) -> str:
    return "seen voices" if is_seen else "held out voices"


def hub_rows(name: str, config: str | None, split: str | None, streaming: bool) -> Iterator[dict]:
    """Return the rows of a data set of the Hub (or of a folder of parquet files), by one of `SCHEMAS`."""
    if not split:
        raise ValueError(f"--dataset {name} needs a --split, such as test.")
    dataset = load_dataset(name, config, split=split, streaming=streaming)
    columns = dataset.column_names
    if columns is None:  # a stream that declares none: what they hold comes as it is
        columns = list(next(iter(dataset)))
    elif "audio" in columns:
        dataset = dataset.cast_column("audio", Audio(decode=False))
    schema = schema_of(columns)
    return (map_row(row, schema) for row in dataset)


def schema_of(columns: Iterable[str]) -> str:
    """Return the name of the first schema whose columns are all there."""
    for name, columns_of in SCHEMAS.items():
        if {"audio", *columns_of.values()} <= set(columns):
            return name
    known = "; ".join(f"{name}: {', '.join(['audio', *columns_of.values()])}" for name, columns_of in SCHEMAS.items())
    raise ValueError(
        f"The data set's columns {sorted(columns)} fit none that are known ({known}). Rename its columns, or write its "
        "rows to a manifest."
    )


def map_row(row: dict, schema: str) -> dict:
    """Convert a row of a schema to one of ours."""
    mapped = {field: row[column] for field, column in SCHEMAS[schema].items()}
    mapped["audio"] = row["audio"]
    if mapped.get("voice") is not None:
        mapped["voice"] = str(mapped["voice"])
    if isinstance(mapped["text"], str) and mapped["text"].isupper():
        mapped["text"] = mapped["text"].lower()  # LibriSpeech; capitals are no text that an LLM knows
    if not schema.startswith("VoiceBench"):
        mapped["instruction"] = DEFAULT_INSTRUCTION
    return mapped
