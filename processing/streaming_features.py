"""Log-mel features of speech that goes on: samples of any rate in pieces of any size, features as of the whole clip.

A mel frame is final when the samples of its analysis window are there. Resamples with soxr, whose stream does not
depend on the pieces. Leaves out: features of whole clips, and the fixed maximum that makes this possible
(`speech_features.py`).
"""

from typing import Any

import numpy as np
import soxr
from transformers import VoxtralRealtimeFeatureExtractor
from transformers.feature_extraction_utils import FeatureExtractionMixin

from .audio_loading import LOUDEST_PEAK
from .speech_features import ANALYSIS_WINDOW_S, WINDOW_S


class FeatureStream:
    """The samples of clips that follow each other, and the features of the current one.

    Args:
        feature_extractor ([`VoxtralRealtimeFeatureExtractor`]): log-mel with a fixed maximum.
        sampling_rate (`int`, *optional*): of the samples, Hz; omitted, that of the feature extractor.

    Raises:
        ValueError: the features depend on the loudest frame of the clip, or the rate is none.
    """

    def __init__(self, feature_extractor: FeatureExtractionMixin, sampling_rate: int | None = None):
        if not isinstance(feature_extractor, VoxtralRealtimeFeatureExtractor):
            raise ValueError(
                f"The features of {type(feature_extractor).__name__} depend on the whole clip. To listen, a processor "
                "needs log-mel with a fixed maximum, from_backbones(..., global_log_mel_max=1.5), and a model that was "
                "trained on it."
            )
        self.feature_extractor, self.rate = feature_extractor, feature_extractor.sampling_rate
        sampling_rate = self.rate if sampling_rate is None else sampling_rate
        if not isinstance(sampling_rate, (int, np.integer)) or not 1000 <= sampling_rate <= 768_000:
            raise ValueError(f"sampling_rate must be a whole number of Hz (1000 to 768000), got {sampling_rate!r}.")
        self.source_rate = int(sampling_rate)
        self._hop, half = feature_extractor.hop_length, feature_extractor.n_fft // 2
        # From the centre of a frame to the end of its analysis window, and of its hop, without which there is no frame.
        self._reach = max(half, self._hop)
        # Frames at the left edge of a stretch whose analysis window it would cut.
        self._margin = -(-half // self._hop)
        self._samples: np.ndarray = np.zeros(0, np.float32)
        self._resampler: Any = None
        self._begin_clip()

    def _begin_clip(self):
        self._window = 0  # how many windows of 30 s are complete
        self._dropped = 0  # samples of the window that are no longer kept
        self._frame = 0  # frames of the window that were taken

    @property
    def num_samples(self) -> int:
        """Return how many samples at the feature extractor's rate are there of the clip."""
        return self._window * WINDOW_S * self.rate + self._dropped + len(self._samples)

    def add(self, samples: Any) -> np.ndarray:
        """Append samples of one channel, (num_samples,): floats within [-1, 1], or int16.

        Returns:
            `np.ndarray`: what was appended, at the feature extractor's rate.

        Raises:
            TypeError: they are neither.
            ValueError: they are not finite, far too loud, or of several channels. Nothing is appended then.
        """
        samples = np.asarray(samples)
        is_int16 = samples.dtype == np.int16
        if not is_int16 and not np.issubdtype(samples.dtype, np.floating):
            raise TypeError(f"Expected samples as floats within [-1, 1] or as int16, got {samples.dtype}.")
        if samples.ndim != 1:
            raise ValueError(
                f"Expected samples of one channel, of shape (num_samples,), got {samples.shape}. Take the mean of the "
                "channels first."
            )
        if not np.isfinite(samples).all():
            raise ValueError("The samples hold NaN or infinite values. Expected finite floats, usually within [-1, 1].")
        samples = samples.astype(np.float32) / (32768 if is_int16 else 1)
        if (peak := np.abs(samples).max(initial=0.0)) > LOUDEST_PEAK:
            raise ValueError(
                f"The samples are far too loud: {peak:g}. Expected floats within [-1, 1]. Give 16-bit samples as int16."
            )
        if self.source_rate != self.rate:
            if self._resampler is None:
                self._resampler = soxr.ResampleStream(self.source_rate, self.rate, 1, dtype="float32")
            samples = self._resampler.resample_chunk(samples)
        self._samples = np.concatenate([self._samples, samples])
        return samples

    def end_samples(self):
        """Append what the resampler holds back. What is added afterwards follows after silence, as for it."""
        if self._resampler is not None:
            rest = self._resampler.resample_chunk(np.zeros(0, np.float32), last=True)
            self._samples, self._resampler = np.concatenate([self._samples, rest]), None

    @property
    def num_ready(self) -> int:
        """Return how many frames of the window are final and were not taken."""
        window, num_samples = WINDOW_S * self.rate, self._dropped + len(self._samples)
        if num_samples >= window:
            return window // self._hop - self._frame
        num_final = max(0, (num_samples - self._reach) // self._hop + 1)
        return 0 if num_final < 2 else num_final - self._frame  # one frame alone is shorter than its edges

    def frames(self, count: int) -> np.ndarray:
        """Return the next frames of the window, (bins, count), without taking them; `num_ready` at most."""
        window, stop = WINDOW_S * self.rate, self._frame + count
        end = min(self._hop * (stop - 1) + self._reach, window)
        return self._extract(self._samples[: end - self._dropped], count)

    def take(self, count: int):
        """Take the next frames, so that their samples need not be kept."""
        self._frame += count
        window = WINDOW_S * self.rate
        if self._frame == window // self._hop:
            self._samples = self._samples[window - self._dropped :]
            self._window, self._dropped, self._frame = self._window + 1, 0, 0
            return
        first = self._hop * max(0, self._frame - self._margin)
        self._samples, self._dropped = self._samples[first - self._dropped :], first

    def rest(self) -> np.ndarray:
        """Return all frames that are left if the clip ends here, (bins, count), without taking them.

        Raises:
            ValueError: the clip is shorter than one analysis window.
        """
        if self.num_samples < ANALYSIS_WINDOW_S * self.rate:
            raise ValueError(
                f"There is too little speech to answer: {self.num_samples / self.rate:.4f} s, expected at least one "
                f"analysis window of {ANALYSIS_WINDOW_S:.3f} s."
            )
        samples = self._samples
        if self._window and 0 < self._dropped + len(samples) < 2 * int(ANALYSIS_WINDOW_S * self.rate):
            # As for whole clips: the rest of a long clip may be shorter than a frame needs.
            samples = np.pad(samples, (0, 2 * int(ANALYSIS_WINDOW_S * self.rate) - len(samples)))
        return self._extract(samples, (self._dropped + len(samples)) // self._hop - self._frame)

    def after(self, num_samples: int) -> np.ndarray:
        """Return what was added after the first `num_samples` of the clip."""
        return self._samples[len(self._samples) - (self.num_samples - num_samples) :]

    def end_clip(self, num_samples: int):
        """Begin the next clip with what was added after the first `num_samples` of this one."""
        self._samples = self.after(num_samples)
        self._begin_clip()

    def _extract(self, samples: np.ndarray, count: int) -> np.ndarray:
        """Return `count` frames from the next one on, of samples of the window that begin where they are kept."""
        skipped = self._frame - self._dropped // self._hop
        if count <= 0:
            return np.zeros((self.feature_extractor.feature_size, 0), np.float32)
        made = self.feature_extractor(
            samples, sampling_rate=self.rate, padding="do_not_pad", truncation=False, return_tensors="np"
        )
        return np.asarray(made["input_features"])[0][:, skipped : skipped + count]
