"""Read ASR data in blocks of consecutive rows: JSONL manifests, parquet with embedded audio, data sets of the Hub.

`load_audio` of this package decodes the audio, so torchcodec is not needed. Leaves out: data sets of the Hub whose
audio is not embedded in them.
"""

import hashlib
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.parquet
from datasets import Audio, load_dataset

from processing.audio_decoding import audio_info
from processing.audio_loading import load_audio
from processing.manifests import BadRow, OutsideFolderError, audio_path, manifest_lines, parse_line
from processing.speech_features import ANALYSIS_WINDOW_S

from .options import SourceOptions

SAMPLING_RATE = 16_000
IDENTITY_BYTES = 16 * 2**20


class ManifestSource:
    """A manifest with one JSON object per line; audio is a path, relative to the manifest.

    Raises:
        ValueError: a path leaves the manifest's folder and `allow_outside` is False. All lines are checked here, so
            that this error does not come after hours.
    """

    place_name, first_place = "line", 1

    def __init__(self, path: str, audio_column: str = "audio", allow_outside: bool = False, limit: int | None = None):
        self.path, self.audio_column, self.allow_outside, self.limit = Path(path), audio_column, allow_outside, limit
        self.folder = self.path.parent.absolute()
        self.num_rows = 0
        for index, line in enumerate(self._lines()):
            self.num_rows += 1
            try:
                audio_path(self.folder, self.parse(line).get(audio_column), allow_outside)
            except BadRow:
                continue  # `RowMaker` rejects this row
            except OutsideFolderError as error:
                raise ValueError(f"{path}, line {index + 1}: {error}") from None

    def identity(self) -> dict:
        """Return what tells this data from other data."""
        return {"manifest": file_identity(self.path)}

    def blocks(self, size: int) -> Iterator[tuple[int, list[bytes]]]:
        """Return an iterator over (number, lines) of blocks; `parse` parses a line."""
        return enumerate(_in_blocks(self._lines(), size))

    def parse(self, line: bytes) -> dict:
        return parse_line(line)

    def audio(self, row: dict) -> Path:
        return audio_path(self.folder, row.get(self.audio_column), self.allow_outside)

    def _lines(self):
        return manifest_lines(self.path, self.limit)


class DatasetSource:
    """Parquet files, or a data set of the Hub; rows are streamed, and audio is embedded bytes.

    In local parquet files, audio may also be a path, relative to the first file.

    Args:
        name: a Hub id or folder, or "parquet".
        options: for `load_dataset`.
    """

    place_name, first_place = "index", 0

    def __init__(
        self, name: str, audio_column: str = "audio", allow_outside: bool = False, limit: int | None = None, **options
    ):
        self.name, self.audio_column, self.allow_outside, self.limit = name, audio_column, allow_outside, limit
        self.files = [Path(file) for file in options.get("data_files") or []]
        self.folder = self.files[0].parent.absolute() if self.files else None
        self.options = {key: value for key, value in options.items() if value is not None}
        rows = load_dataset(name, streaming=True, **self.options)
        if rows.features is not None and audio_column not in rows.features:
            raise ValueError(
                f"{name} has no column {audio_column!r}, only {sorted(rows.features)}: see --audio_column."
            )
        self.rows = rows.cast_column(audio_column, Audio(decode=False))
        self.num_rows = self._count()

    def _count(self) -> int | None:
        """Return the number of rows if it is known without reading them."""
        if self.files:
            count = sum(pyarrow.parquet.read_metadata(file).num_rows for file in self.files)
        else:
            split = (self.rows.info.splits or {}).get(self.options["split"])
            count = (split.num_examples or None) if split else None
        known = [number for number in (count, self.limit) if number is not None]
        return min(known, default=None)

    def identity(self) -> dict:
        """Return what tells this data from other data."""
        if self.files:
            return {"parquet": [file_identity(file) for file in self.files]}
        if os.path.isdir(self.name):
            files = sorted(Path(self.name).rglob("*.parquet"))
            return {"dataset": Path(self.name).name, **self.options, "files": [file_identity(file) for file in files]}
        return {"dataset": self.name, **self.options}

    def blocks(self, size: int) -> Iterator[tuple[int, list[dict]]]:
        return enumerate(_in_blocks(islice(self.rows, self.limit), size))

    def parse(self, row: dict) -> dict:
        return row

    def audio(self, row: dict) -> Path | bytes:
        audio = row.get(self.audio_column) or {}
        if audio.get("bytes"):
            return audio["bytes"]
        if self.folder is None:
            raise BadRow(f"column {self.audio_column!r} holds no audio: expected embedded bytes")
        return audio_path(self.folder, audio.get("path"), self.allow_outside)


def open_source(options: SourceOptions) -> ManifestSource | DatasetSource:
    """Open the source that `options` name; see there for errors."""
    common: dict[str, Any] = {
        "audio_column": options.audio_column,
        "allow_outside": options.allow_outside_paths,
        "limit": options.limit,
    }
    if options.manifest:
        return ManifestSource(options.manifest, **common)
    if options.parquet:
        return DatasetSource("parquet", data_files=options.parquet, split="train", **common)
    return DatasetSource(
        str(options.dataset), config=options.config, split=options.split, revision=options.revision, **common
    )


def check_audio(audio: Path | bytes, max_duration_s: float) -> tuple[float, str]:
    """Decode a whole clip, as training will.

    Returns:
        `tuple[float, str]`: the duration in seconds and the format (`flac`, `wav`, ...).

    Raises:
        BadRow: the clip is missing, damaged, empty, silent, too short or too long.
    """
    try:
        num_samples = len(load_audio(audio, SAMPLING_RATE, max_duration_s=max_duration_s))
        kind = audio_info(audio).format
    except (OSError, ValueError, TypeError) as error:
        raise BadRow(f"audio: {error}") from error
    if num_samples < ANALYSIS_WINDOW_S * SAMPLING_RATE:
        raise BadRow(f"audio: too short, {num_samples / SAMPLING_RATE:.4f} s, expected {ANALYSIS_WINDOW_S} s or more")
    return round(num_samples / SAMPLING_RATE, 3), kind


def file_identity(path: Path) -> dict:
    """Return name, size, and a checksum of the first and last 16 MiB, which change when the file does."""
    with path.open("rb") as file:
        checksum = hashlib.sha256(file.read(IDENTITY_BYTES))
        size = file.seek(0, os.SEEK_END)
        file.seek(max(IDENTITY_BYTES, size - IDENTITY_BYTES))
        checksum.update(file.read())
    return {"name": path.name, "bytes": size, "sha256": checksum.hexdigest()}


def _in_blocks(rows, size: int):
    rows = iter(rows)
    while block := list(islice(rows, size)):
        yield block
