"""From rows to rows with features: decode, augment, extract; bad clips are errors, or are skipped and listed.

Runs in the data loader's workers, ahead of the model. The result depends only on the row and the epoch, so
neither the number of workers nor a resume changes it. Leaves out: tokens and padding (`processing/data_collator.py`).
"""

import hashlib
import json
import os
import zlib
from pathlib import Path

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from processing.audio_decoding import audio_info
from processing.audio_loading import load_audio
from processing.processing_blsp_kd import BlspKdProcessor
from processing.speech_features import ANALYSIS_WINDOW_S

from .augmentation import Augmentation

SAMPLING_RATE = 16_000


class BadClipError(ValueError):
    """Raised when the audio of one row cannot be used; the message names row and file."""

    def __init__(self, message: str):  # one argument, so that it survives the way from a worker
        super().__init__(message)


def audio_name(row: dict) -> str | None:
    """Return the file of a row's audio, or what is known of it; None for a row of text only."""
    audio = row.get("audio")
    if isinstance(audio, dict):
        return audio["path"] or (f"{len(audio['bytes'])} embedded bytes" if audio["bytes"] else None)
    return audio


SKIP = "Mend or remove the row, or pass --skip_bad_audio true to train without it."
MEND = "Mend or remove the row: an evaluation leaves none out."


def bad_clip(row: dict, error: Exception, advice: str = SKIP) -> BadClipError:
    # The feature extractor gets one clip at a time, so its count says nothing.
    reason = str(error).replace("Audio 0 of the batch: ", "").replace("Audio 0 of the batch", "the clip")
    return BadClipError(
        f"{row.get('origin') or 'A training row'} (audio {audio_name(row)!r}, text {row['text']!r}): {reason} {advice}"
    )


def check_clips(rows: list[dict]):
    """Decode the clips of an evaluation, so that a bad one is found before training.

    Raises:
        BadClipError: one of them is missing, damaged, empty, silent, too short or too long.
    """
    for row in tqdm(rows, desc="looking at the clips of the evaluation", mininterval=1):
        try:
            length_s = len(load_audio(row["audio"], SAMPLING_RATE)) / SAMPLING_RATE
            if length_s < ANALYSIS_WINDOW_S:
                raise ValueError(f"It is too short: {length_s:.4f} s, expected {ANALYSIS_WINDOW_S} s or more.")
        except (OSError, TypeError, ValueError) as error:
            raise bad_clip(row, error, MEND) from error


def duration_s(row: dict) -> float:
    """Return the seconds of audio: the row's own `duration`, or the file's according to its header; 0 without audio.

    Raises:
        BadClipError: there is no such file, or none that can be decoded.
    """
    if audio_name(row) is None:
        return 0.0
    if row.get("duration") is not None:
        return row["duration"]
    audio = row["audio"]
    if isinstance(audio, dict):
        audio = audio["bytes"] or audio["path"]
    try:
        return audio_info(audio).duration_s
    except (OSError, ValueError) as error:
        raise bad_clip(row, error) from error


def lengths(rows: list[dict], tokenizer: PreTrainedTokenizerBase, seconds_per_token: float) -> list[float]:
    """Return the length by which rows are grouped: seconds of audio, plus some for each token of the three texts.

    Raises:
        BadClipError: see [`duration_s`].
    """
    seconds = [duration_s(row) for row in rows]
    if not seconds_per_token:
        return seconds
    texts = [f"{row['instruction']}\n{row['text']}\n{row['response']}" for row in rows]
    tokens = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [length + seconds_per_token * len(ids) for length, ids in zip(seconds, tokens)]


class SkippedClips:
    """A file of the rows that were left out, one JSON object per line. Every process and worker appends to it.

    A row that is read again, in a later epoch or after a resume, is listed again until [`~SkippedClips.finish`].
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def add(self, row: dict, error: Exception):
        entry = {"origin": row.get("origin"), "audio": audio_name(row), "reason": str(error)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        try:
            os.write(file, (json.dumps(entry) + "\n").encode())  # one write, so that lines of others stay whole
        finally:
            os.close(file)

    def finish(self) -> int:
        """Leave each row in the file once, and return the number of rows."""
        if not self.path.exists():
            return 0
        lines = sorted(set(self.path.read_text().splitlines()))
        self.path.write_text("".join(f"{line}\n" for line in lines))
        return len(lines)


class ClipFeatures:
    """Makes the features of training rows.

    Args:
        processor ([`BlspKdProcessor`]).
        augmentation ([`Augmentation`], *optional*).
        skipped ([`SkippedClips`], *optional*): leave out rows whose audio cannot be used and note them here; omitted,
            the first one is an error.
        keep (`bool`): keep each clip's features in memory (some 30 kB per second of speech), which is that of a data
            loader worker where there is one. Not with augmentation.
        seed (`int`): of the augmentation.
    """

    def __init__(
        self,
        processor: BlspKdProcessor,
        augmentation: Augmentation | None = None,
        skipped: SkippedClips | None = None,
        keep: bool = False,
        seed: int = 0,
    ):
        self.processor, self.augmentation, self.skipped, self.seed = processor, augmentation, skipped, seed
        self.kept: dict[str | bytes | None, np.ndarray] | None = {} if keep and not augmentation else None

    def __call__(self, rows: list[dict]) -> list[dict]:
        """Return rows that have `input_features` in the place of `audio`, or `audio` None if they are text only.

        Raises:
            BadClipError: audio that cannot be used; with `skipped`, only if no row of the batch is left.
        """
        extracted = []
        for row in rows:
            fields = {name: value for name, value in row.items() if name not in ("audio", "epoch")}
            if audio_name(row) is None:
                extracted.append({**fields, "audio": None})
                continue
            try:
                extracted.append({**fields, "input_features": self._features(row)})
            except (OSError, TypeError, ValueError) as error:
                bad = bad_clip(row, error)
                if self.skipped is None:
                    raise bad from None
                self.skipped.add(row, bad)
        if not extracted and self.skipped is not None:
            raise BadClipError(
                f"No clip of a batch of {len(rows)} can be used, which is more than --skip_bad_audio is for. Use "
                f"larger batches, or mend the data. They are listed in {self.skipped.path}."
            )
        return extracted

    def _features(self, row: dict) -> np.ndarray:
        # Embedded clips have no name, or one that others have, too.
        embedded = row["audio"]["bytes"] if isinstance(row["audio"], dict) else None
        key = hashlib.blake2b(embedded).digest() if embedded else audio_name(row)
        if self.kept is not None and key in self.kept:
            return self.kept[key]
        rate = self.processor.feature_extractor.sampling_rate
        waveform = load_audio(row["audio"], rate)
        if self.augmentation:
            identity = zlib.crc32(f"{row.get('origin')} {audio_name(row)}".encode())
            generator = np.random.default_rng([self.seed, row["epoch"], identity])
            waveform = self.augmentation(waveform, rate, generator)
        features = self.processor.extract_features([(waveform, rate)])["input_features"][0]
        if self.kept is not None:
            self.kept[key] = features
        return features
