"""Audio from anywhere (path, bytes, array) to mono float32 at the rate that the speech encoder wants.

Decoding is libsndfile's (wav, flac, ogg/opus, mp3), resampling is soxr's. Leaves out: URLs, video containers, and
features, which the feature extractor makes.
"""

import io
import os
from pathlib import Path

import numpy as np
import soundfile
import soxr

# Quieter than three steps of 16-bit audio: a muted microphone, not speech.
SILENCE_PEAK = 1e-4
MAX_DURATION_S = 600.0


def load_audio(
    audio, sampling_rate: int, source_rate: int | None = None, max_duration_s: float = MAX_DURATION_S
) -> np.ndarray:
    """Load one clip.

    Args:
        audio: one of
            - `str` or `os.PathLike`: an audio file;
            - `bytes`: the contents of one;
            - `dict`: `{"array", "sampling_rate"}`, or `{"bytes"}` and/or `{"path"}`, as in `datasets`;
            - `(array, sampling_rate)`;
            - an array (numpy, torch, list) of `source_rate`: 1-D, or 2-D with the channels as its shorter side;
              integers are taken as full scale of their type.
        sampling_rate (`int`): rate of the result, Hz.
        source_rate (`int`, *optional*): rate of a bare array, Hz. Omitted: it already has `sampling_rate`.
        max_duration_s (`float`): longest clip accepted, seconds.

    Returns:
        `np.ndarray`: mono, float32, shape (num_samples,).

    Raises:
        FileNotFoundError: no such file.
        ValueError: not decodable, empty, silent, not finite, longer than `max_duration_s`, or of a bad rate or shape.
        TypeError: none of the kinds above.
    """
    if isinstance(audio, dict):
        if audio.get("array") is not None:
            audio, source_rate = audio["array"], audio.get("sampling_rate", source_rate)
        elif audio.get("bytes") is not None:
            audio = audio["bytes"]
        elif audio.get("path") is not None:
            audio = audio["path"]
        else:
            raise ValueError(f"An audio dict needs 'array', 'bytes' or 'path', but has {sorted(audio)}.")
    elif isinstance(audio, tuple) and len(audio) == 2 and np.ndim(audio[1]) == 0 and np.ndim(audio[0]) > 0:
        audio, source_rate = audio

    if isinstance(audio, (str, os.PathLike, bytes, bytearray)):
        waveform, source_rate, name = _decode(audio, max_duration_s)
    else:
        waveform, name = _as_float(audio), "the audio array"
        source_rate = sampling_rate if source_rate is None else source_rate
    if not isinstance(source_rate, (int, np.integer)) or not 1000 <= source_rate <= 768_000:
        raise ValueError(
            f"The sampling rate of {name} must be a whole number of Hz (1000 to 768000), got {source_rate!r}."
        )
    if waveform.ndim == 2:
        waveform = waveform.mean(axis=1)

    duration_s = waveform.shape[0] / source_rate
    if waveform.shape[0] == 0:
        raise ValueError(f"{name} is empty (0 samples). Remove it, or record it again.")
    if duration_s > max_duration_s:
        raise ValueError(_too_long(name, duration_s, max_duration_s))
    if not np.isfinite(waveform).all():
        raise ValueError(f"{name} holds NaN or infinite samples. Expected finite floats, usually within [-1, 1].")
    if np.abs(waveform).max() < SILENCE_PEAK:
        raise ValueError(
            f"{name} is silent: {duration_s:.2f} s with no sample above {SILENCE_PEAK:g} of full scale. Expected "
            "speech; check the recording and its gain."
        )
    if source_rate != sampling_rate:
        waveform = soxr.resample(waveform, source_rate, sampling_rate)
    return np.ascontiguousarray(waveform, dtype=np.float32)


def _too_long(name, duration_s, max_duration_s) -> str:
    return (
        f"{name} lasts {duration_s:.2f} s, but a clip may last at most {max_duration_s:g} s. Split it into shorter "
        "clips."
    )


def _decode(audio, max_duration_s):
    """Decode a file or its bytes: (num_samples, num_channels) float32, its rate, and its name for messages."""
    if isinstance(audio, (bytes, bytearray)):
        name, source = f"the audio of {len(audio)} bytes", io.BytesIO(bytes(audio))
    else:
        name, source = str(audio), Path(audio)
        if "://" in name:
            raise ValueError(f"Audio is read from files, not from URLs, got {name!r}. Download it first.")
        if not source.is_file():
            raise FileNotFoundError(f"Audio file not found: {name!r}.")
    try:
        with soundfile.SoundFile(source) as file:
            # Asked of the header first, so that an absurd length is refused before it is read.
            if file.frames / file.samplerate > max_duration_s:
                raise ValueError(_too_long(name, file.frames / file.samplerate, max_duration_s))
            return file.read(dtype="float32", always_2d=True), file.samplerate, name
    except soundfile.LibsndfileError as error:
        raise ValueError(
            f"{name} cannot be decoded: {error.error_string.rstrip('.')}. Expected wav, flac, ogg/opus or mp3; is it "
            "damaged, or another format?"
        ) from error


def _as_float(audio) -> np.ndarray:
    """Array-like samples to float32, (num_samples,) or (num_samples, num_channels)."""
    if hasattr(audio, "detach"):
        audio = audio.detach().cpu().numpy()
    try:
        waveform = np.asarray(audio)
        numeric = np.issubdtype(waveform.dtype, np.integer) or np.issubdtype(waveform.dtype, np.floating)
    except ValueError:
        numeric = False
    if not numeric:
        raise TypeError(
            f"Expected audio as a path, bytes, dict, (array, sampling_rate) or an array of numbers, got {type(audio)}."
        )
    if np.issubdtype(waveform.dtype, np.integer):
        # As libsndfile scales files: -1 is the smallest number of the type, 0 is the middle of an unsigned one.
        limits = np.iinfo(waveform.dtype)
        half_range = (float(limits.max) - limits.min + 1) / 2
        waveform = (waveform - (limits.min + half_range)) / half_range
    if waveform.ndim == 2 and waveform.shape[0] < waveform.shape[1]:
        waveform = waveform.T
    if waveform.ndim not in (1, 2) or (waveform.ndim == 2 and waveform.shape[1] > 8):
        raise ValueError(
            f"Expected one clip of shape (samples,) or with up to 8 channels, got an array of shape {waveform.shape}."
        )
    return waveform.astype(np.float32)
