"""Weighted mixtures of manifests and data sets, in memory or streamed.

`datasets.interleave_datasets` draws the source of each row by its weight; an epoch ends when every source has been read
to its end ("all_exhausted"), and shorter ones begin anew until then. Leaves out: transcripts without a response under
streaming, which `make_training_data.py` answers ahead of time.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml
from datasets import Audio, Dataset, Features, IterableDataset, Value, interleave_datasets, load_dataset

from processing.manifests import checked, manifest_rows, read_manifest

# What streamed rows consist of; a mixture's sources must agree on it.
FEATURES = Features(
    {
        **{name: Value("string") for name in ("text", "instruction", "response", "voice", "origin")},
        "duration": Value("float64"),
        "audio": {"bytes": Value("binary"), "path": Value("string")},
    }
)


@dataclass
class Source:
    """One entry of a mixture: a manifest, or a data set of the Hub (or a folder of parquet files).

    Args:
        manifest (`str`, *optional*): path; in a mixture, relative to its file.
        dataset (`str`, *optional*): Hub id or folder whose rows have `audio` (embedded), `text` and `response`.
        config, split, revision (`str`, *optional*): of the data set.
        weight (`float`): share of its rows, in relation to the other sources' weights.

    Raises:
        ValueError: not one of manifest and dataset, or a weight that is none.
    """

    manifest: str | None = None
    dataset: str | None = None
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    weight: float = 1.0

    def __post_init__(self):
        if bool(self.manifest) == bool(self.dataset):
            raise ValueError(f"expected either 'manifest' or 'dataset', got {self.manifest!r} and {self.dataset!r}")
        if not isinstance(self.weight, (int, float)) or not 0 < self.weight < math.inf:
            raise ValueError(f"expected a weight above 0, got {self.weight!r}")


def read_mixture(path: str) -> list[Source]:
    """Return the sources of a YAML list such as `[{manifest: a.jsonl, weight: 3}, {dataset: me/rows, weight: 1}]`.

    Raises:
        ValueError: an entry is not understood.
    """
    entries = yaml.safe_load(Path(path).read_text())
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path}: expected a list of sources, each with 'manifest' or 'dataset', got {entries!r}.")
    sources = []
    for number, entry in enumerate(entries, start=1):
        try:
            source = Source(**entry)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}, source {number} ({entry}): {error}.") from error
        if source.manifest:
            source.manifest = str(Path(path).parent / source.manifest)
        sources.append(source)
    return sources


def read_sources(sources: list[Source], seed: int, allow_outside_paths: bool) -> list[dict]:
    """Return all rows of one epoch; rows that a mixture repeats are the same objects."""
    if names := [source.dataset for source in sources if source.dataset]:
        raise ValueError(f"The rows of {', '.join(names)} hold audio and are not read into memory: add --streaming.")
    tables = [read_manifest(str(source.manifest), allow_outside_paths, allow_text_only=True) for source in sources]
    if len(tables) == 1:
        return tables[0]
    places = [
        Dataset.from_dict({"source": [number] * len(table), "row": range(len(table))})
        for number, table in enumerate(tables)
    ]
    mixed = _interleave(places, sources, seed)
    return [tables[source][row] for source, row in zip(mixed["source"], mixed["row"])]


def stream_sources(sources: list[Source], seed: int, shuffle_buffer: int, allow_outside_paths: bool) -> IterableDataset:
    """Return a stream of rows with the fields of `FEATURES`, shuffled by `seed` and epoch (`set_epoch`).

    Never more than `shuffle_buffer` rows are in memory.
    """
    streams = [_stream(source, allow_outside_paths) for source in sources]
    mixed = streams[0] if len(streams) == 1 else _interleave(streams, sources, seed)
    return mixed.shuffle(seed=seed, buffer_size=shuffle_buffer)


def _interleave(parts, sources: list[Source], seed: int):
    total = sum(source.weight for source in sources)
    probabilities = [source.weight / total for source in sources]
    return interleave_datasets(parts, probabilities, seed=seed, stopping_strategy="all_exhausted")


def _stream(source: Source, allow_outside_paths: bool) -> IterableDataset:
    if source.manifest:
        options = {"path": source.manifest, "allow_outside_paths": allow_outside_paths}
        return IterableDataset.from_generator(_streamed_manifest, features=FEATURES, gen_kwargs=options)
    name, options = source.dataset, {"split": source.split, "revision": source.revision}
    rows = load_dataset(name, source.config, streaming=True, **options)
    columns = rows.column_names or list(next(iter(rows)))
    if missing := {"audio", "text", "response"} - set(columns):
        raise ValueError(f"{name} has no column {sorted(missing)}, only {sorted(columns)}. Rename its columns.")
    return rows.cast_column("audio", Audio(decode=False)).map(
        _of_dataset, with_indices=True, fn_kwargs={"name": name}, remove_columns=columns, features=FEATURES
    )


def _streamed_manifest(path: str, allow_outside_paths: bool) -> Iterator[dict]:
    for row in manifest_rows(path, allow_outside_paths, allow_text_only=True):
        yield _with_features({**row, "audio": {"bytes": None, "path": row.get("audio")}})


def _of_dataset(row: dict, index: int, name: str) -> dict:
    origin = f"{name}, row {index}"
    audio = row["audio"] or {"bytes": None, "path": None}
    if audio["path"] and not audio["bytes"]:
        raise ValueError(f"{origin}: expected embedded audio, got the path {audio['path']!r}. Make a manifest of it.")
    used = {name: row[name] for name in FEATURES if name in row}
    return _with_features(checked({**used, "audio": audio}, origin, allow_text_only=True))


def _with_features(row: dict) -> dict:
    """Return a row with the fields of `FEATURES` alone.

    Raises:
        ValueError: it has no response, which would be made here if all rows were in memory.
    """
    if not row.get("response"):
        raise ValueError(
            f"{row['origin']}: streamed rows need a 'response', the LLM's own answer. "
            "examples/make_training_data.py writes manifests that have it."
        )
    return {name: row.get(name) for name in FEATURES}
