"""Clips from files to features: the input of `examples/train.py` beside `datasets` with WhisperFeatureExtractor.

The others decode with soundfile, too (the decoder of `datasets` needs FFmpeg), and are used as their documentation
shows: clip by clip, padded to 30 s as is the default, or on the true length. Leaves out: how long training waits for
its data (`training_profile.py`).
"""

import tempfile
from pathlib import Path

import numpy as np
import soundfile
from datasets import Audio, Dataset
from transformers import WhisperFeatureExtractor

from processing import BlspKdProcessor
from processing.training_rows.augmentation import Augmentation
from processing.training_rows.clips import ClipFeatures

from .measure import OURS, Case

EXAMPLES = Path(__file__).parents[2] / "examples"
RATE = 16_000


def cases(small: bool, device, dtype):
    backbones = [str(EXAMPLES / "tiny_world" / name) for name in ("speech_encoder", "llm")]
    processor = BlspKdProcessor.from_backbones(*backbones)
    extractor = WhisperFeatureExtractor(feature_size=processor.feature_extractor.feature_size)
    num_clips = 2 if small else 32
    with tempfile.TemporaryDirectory() as folder:
        for duration_s in (1,) if small else (3, 10, 30):
            rows = _write_clips(Path(folder), num_clips, duration_s)
            dataset = Dataset.from_dict({"audio": [row["audio"] for row in rows]})
            dataset = dataset.cast_column("audio", Audio(decode=False))
            changes = Augmentation(speeds=[0.9, 1.1], noise="white", noise_share=1.0)
            yield Case(
                name=f"{num_clips} FLAC clips of {duration_s} s",
                candidates={
                    OURS: _hears(ClipFeatures(processor), rows),
                    "with speeds and noise": _hears(ClipFeatures(processor, changes), rows),
                    "datasets + WhisperFeatureExtractor": _reads(dataset, extractor, {}),
                    "the same, on true length": _reads(dataset, extractor, {"padding": "do_not_pad"}),
                },
                memory_unit=("MiB", 2**20),
            )


def _write_clips(folder: Path, num_clips: int, duration_s: float) -> list[dict]:
    generator = np.random.default_rng(0)
    rows = []
    for index in range(num_clips):
        # Noise that swells and fades, about as hard to compress as speech.
        time = np.arange(round(duration_s * RATE)) / RATE
        waveform = 0.1 * generator.standard_normal(len(time)) * np.sin(2 * np.pi * 2 * time) ** 2
        path = folder / f"{duration_s}_{index}.flac"
        soundfile.write(path, waveform, RATE)
        rows.append({"audio": str(path), "text": "words", "epoch": 0})
    return rows


def _hears(hear: ClipFeatures, rows: list[dict]):
    return lambda: hear(rows)


def _reads(dataset: Dataset, extractor: WhisperFeatureExtractor, options: dict):
    def read():
        for row in dataset:
            waveform, rate = soundfile.read(row["audio"]["path"], dtype="float32")
            extractor(waveform, sampling_rate=rate, return_tensors="np", **options)

    return read
