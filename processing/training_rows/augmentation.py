"""Speed perturbation and noise for training clips.

Speeds as in Ko et al., 2015 (pitch and tempo change together), resampled by soxr, which audio loading needs anyway.
Random numbers come from the caller. Leaves out: masking of features (SpecAugment), which the speech encoder does.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import soxr

from processing.audio_decoding import SUFFIXES
from processing.audio_loading import load_audio


@dataclass
class Augmentation:
    """Changes a waveform.

    Args:
        speeds (`list[float]`): one is drawn for each clip; 1.1 makes it 10 % shorter. Empty: clips keep their speed.
        noise (`str`, *optional*): `"white"`, or a folder of recordings, one of which is drawn and cut to length.
        noise_snr_db (`list[float]`): lowest and highest ratio of the power of clip and noise, dB.
        noise_share (`float`): share of the clips that get noise.

    Raises:
        ValueError: a value is out of range, or the folder has no recordings.
    """

    speeds: list[float] = field(default_factory=list)
    noise: str | None = None
    noise_snr_db: list[float] = field(default_factory=lambda: [5.0, 25.0])
    noise_share: float = 0.5

    def __post_init__(self):
        if not all(0.5 <= speed <= 2 for speed in self.speeds):
            raise ValueError(f"--speeds must be between 0.5 and 2, got {self.speeds}.")
        if len(self.noise_snr_db) != 2 or self.noise_snr_db[0] > self.noise_snr_db[1]:
            raise ValueError(f"--noise_snr_db takes the lowest and the highest ratio, got {self.noise_snr_db}.")
        if not 0 <= self.noise_share <= 1:
            raise ValueError(f"--noise_share must be from 0 to 1, got {self.noise_share}.")
        self.recordings = []
        if self.noise and self.noise != "white":
            self.recordings = sorted(path for path in Path(self.noise).rglob("*") if path.suffix.lower() in SUFFIXES)
            if not self.recordings:
                raise ValueError(f"--noise must be white or a folder of audio files, and {self.noise!r} has none.")

    def __bool__(self):
        return bool(self.speeds or self.noise)

    def __call__(self, waveform: np.ndarray, sampling_rate: int, generator: np.random.Generator) -> np.ndarray:
        """Return the changed clip, float32 (num_samples,); the same generator state gives the same clip."""
        if self.speeds:
            speed = generator.choice(self.speeds)
            if speed != 1:
                waveform = soxr.resample(waveform, speed * sampling_rate, sampling_rate)
        if self.noise and generator.random() < self.noise_share:
            noise = self._noise(len(waveform), sampling_rate, generator)
            snr_db = generator.uniform(*self.noise_snr_db)
            scale = np.sqrt(np.mean(waveform**2) / np.mean(noise**2) / 10 ** (snr_db / 10))
            waveform = waveform + np.float32(scale) * noise
        return waveform

    def _noise(self, num_samples: int, sampling_rate: int, generator) -> np.ndarray:
        if not self.recordings:
            return generator.standard_normal(num_samples, dtype=np.float32)
        recording = load_audio(self.recordings[generator.integers(len(self.recordings))], sampling_rate)
        start = generator.integers(max(1, len(recording) - num_samples + 1))
        # A short recording is repeated.
        return np.resize(recording[start:], num_samples)
