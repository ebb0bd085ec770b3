"""Compute the input features of a speech encoder from clips, and pad them to one length.

Works with the feature extractors of Whisper (log-mel), wav2vec2 (waveforms) and w2v-BERT (filter bank frames).
"""

import numpy as np
from transformers import VoxtralRealtimeFeatureExtractor, WhisperFeatureExtractor
from transformers.feature_extraction_utils import FeatureExtractionMixin
from transformers.utils import logging

from .audio_loading import knows_rate, load_audio

logger = logging.get_logger(__name__)

# Longer clips are encoded window by window. Their features are also computed by window, because feature extractors
# normalise over a clip.
WINDOW_S = 30
ANALYSIS_WINDOW_S = 0.025


def features_of_clips(
    feature_extractor: FeatureExtractionMixin, clips: list, sampling_rate: int | None = None
) -> list[np.ndarray]:
    """Return the features of each clip, on its true length; see [`~BlspKdProcessor.extract_features`].

    Raises:
        FileNotFoundError, TypeError, ValueError: a clip is unusable (see [`load_audio`]) or too short; the message says
            which one.
    """
    rate = feature_extractor.sampling_rate
    if sampling_rate is None and any(not knows_rate(clip) for clip in clips):
        logger.warning_once(
            f"Audio arrays came without a sampling_rate and are taken as {rate} Hz. Pass sampling_rate=... (or "
            "(array, rate) pairs) to be sure."
        )
    features = []
    for index, clip in enumerate(clips):
        try:
            waveform = load_audio(clip, rate, sampling_rate)
        except (FileNotFoundError, TypeError, ValueError) as error:
            raise type(error)(f"Audio {index} of the batch: {error}") from error
        if len(waveform) < ANALYSIS_WINDOW_S * rate:
            raise ValueError(
                f"Audio {index} of the batch is too short: {len(waveform) / rate:.4f} s, expected at least one "
                f"analysis window of {ANALYSIS_WINDOW_S:.3f} s."
            )
        features.append(_features_of(feature_extractor, waveform))
    return features


def _features_of(feature_extractor: FeatureExtractionMixin, waveform: np.ndarray) -> np.ndarray:
    """Compute one clip's features, without padding."""
    rate, time_axis = feature_extractor.sampling_rate, _time_axis(feature_extractor)
    name = feature_extractor.model_input_names[0]
    by_window: list[np.ndarray] = []
    for window in np.split(waveform, range(WINDOW_S * rate, len(waveform), WINDOW_S * rate)):
        # The rest of a long clip may be shorter than a frame needs; the frames of some encoders need two windows.
        shortest = 2 * int(ANALYSIS_WINDOW_S * rate) if by_window or time_axis == 0 else 0
        window = np.pad(window, (0, max(0, shortest - len(window))))
        made = feature_extractor(
            window, sampling_rate=rate, padding="do_not_pad", truncation=False, return_tensors="np"
        )
        values = np.asarray(made[name])[0]
        if "attention_mask" in made and time_axis == 0:
            values = values[: int(np.asarray(made["attention_mask"])[0].sum())]
        by_window.append(values)
    return np.concatenate(by_window, axis=time_axis)


def _time_axis(feature_extractor: FeatureExtractionMixin) -> int:
    """Return the time axis of one clip's features: the last for log-mel, the first for waveforms and frames."""
    return 1 if isinstance(feature_extractor, (WhisperFeatureExtractor, VoxtralRealtimeFeatureExtractor)) else 0


def with_log_mel_max(
    feature_extractor: FeatureExtractionMixin, log_mel_max: float | None
) -> VoxtralRealtimeFeatureExtractor:
    """Return Whisper's log-mel with a floor of 8 below a fixed maximum, instead of below the loudest frame of the clip.

    So a frame does not depend on what follows it, which streaming needs. transformers has it for Voxtral Realtime.

    Args:
        feature_extractor ([`WhisperFeatureExtractor`]): the filter bank to keep; a Voxtral Realtime one, too.
        log_mel_max (`float`): the maximum, log10 of power.

    Raises:
        ValueError: there is no such form of this feature extractor.
    """
    is_log_mel = isinstance(feature_extractor, (WhisperFeatureExtractor, VoxtralRealtimeFeatureExtractor))
    if not is_log_mel or getattr(feature_extractor, "dither", False):
        raise ValueError(
            "global_log_mel_max is for log-mel features of Whisper without dither, got "
            f"{type(feature_extractor).__name__}. Use a Whisper encoder, or leave it out."
        )
    names = ("feature_size", "sampling_rate", "hop_length", "n_fft", "padding_value")
    return VoxtralRealtimeFeatureExtractor(
        **{name: getattr(feature_extractor, name) for name in names},
        win_length=feature_extractor.n_fft,
        global_log_mel_max=log_mel_max,
    )


def padded_features(feature_extractor: FeatureExtractionMixin, features: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Zero-pad the features of clips to the longest; see [`~BlspKdProcessor.extract_features`]."""
    time_axis = _time_axis(feature_extractor)
    lengths = [clip.shape[time_axis] for clip in features]
    mask = np.zeros((len(features), max(lengths)), dtype=np.int64)
    padded = []
    for index, (clip, length) in enumerate(zip(features, lengths)):
        mask[index, :length] = 1
        widths = [(0, 0)] * clip.ndim
        widths[time_axis] = (0, max(lengths) - length)
        padded.append(np.pad(clip, widths))
    return {"input_features": np.stack(padded).astype(np.float32), "input_features_mask": mask}
