"""Load audio of any kind (path, bytes, base64, array) as mono float32 at the rate of the speech encoder.

Decodes files with `audio_decoding.py` and resamples with soxr. `url_fetching.py` fetches URLs.
"""

import base64
import binascii
import os
from typing import Any

import numpy as np
import soxr

from .audio_containers import MAGIC_BYTES, container_of
from .audio_decoding import MAX_CHANNELS, decoded, full_scale, too_long

# Below about three steps of 16-bit audio there is no speech, only a muted microphone.
SILENCE_PEAK = 1e-4
MAX_DURATION_S = 600.0
# 30 dB above full scale. Recordings may exceed 1 a little; larger values are integers that were converted to floats.
LOUDEST_PEAK = 32.0


def load_audio(
    audio: Any, sampling_rate: int, source_rate: int | None = None, max_duration_s: float = MAX_DURATION_S
) -> np.ndarray:
    """Load one clip.

    Args:
        audio: one of
            - `str` or `os.PathLike`: an audio file;
            - `str` that begins with `data:`: a data URL, `data:audio/wav;base64,...`;
            - `bytes`, `memoryview`, or an object whose `read()` returns bytes: the contents of an audio file; also a
              uint8 array that begins like an audio file;
            - `dict`: `{"array", "sampling_rate"}` (or `"raw"` for `"array"`), `{"base64"}` (a data URL, too), or
              `{"bytes"}` and/or `{"path"}`, as in `datasets`;
            - `(array, sampling_rate)`;
            - torchcodec's `AudioDecoder`, which rows of `datasets` hold;
            - an array (numpy, torch, list) at `source_rate`: 1-D, or 2-D with the channels as its shorter side. Floats
              are within [-1, 1]. Integers use the full scale of their type; 64-bit integers are refused, because a
              list of integers has no sample width.
        sampling_rate (`int`): rate of the result, Hz.
        source_rate (`int`, *optional*): rate of a bare array, Hz; defaults to `sampling_rate`.
        max_duration_s (`float`): longest accepted clip, seconds.

    Returns:
        `np.ndarray`: mono, float32, shape (num_samples,).

    Raises:
        FileNotFoundError: no such file.
        ValueError: not decodable, empty, silent, not finite, out of range, longer than `max_duration_s`, or with an
            invalid rate or shape.
        TypeError: none of the kinds above.
    """
    if isinstance(audio, dict):
        audio, source_rate = _of_dict(audio, source_rate)
    elif isinstance(audio, tuple) and len(audio) == 2 and np.ndim(audio[1]) == 0 and np.ndim(audio[0]) > 0:
        audio, source_rate = audio
    elif hasattr(audio, "get_all_samples"):
        audio, source_rate = _of_decoder(audio, max_duration_s)
    if isinstance(audio, str) and audio.startswith("data:"):
        audio = _of_base64(audio)
    elif hasattr(audio, "read") and not isinstance(audio, os.PathLike):
        audio = audio.read()
        if not isinstance(audio, bytes):
            raise TypeError(f"Expected an audio file opened in binary mode ('rb'), but reading it gave {type(audio)}.")
    elif _is_bytes(audio):
        audio = audio.tobytes()
    if not isinstance(audio, (str, os.PathLike, bytes, bytearray)):
        audio = _as_array(audio)
        audio = audio.tobytes() if _holds_file(audio) else audio

    if isinstance(audio, np.ndarray):
        waveform, name = _as_float(audio), "the audio array"
        mono = waveform.mean(axis=1) if waveform.ndim == 2 else waveform
        return _join([mono], sampling_rate if source_rate is None else source_rate, sampling_rate, name, max_duration_s)
    with decoded(audio, max_duration_s) as (name, blocks, source_rate):
        return _join(blocks, source_rate, sampling_rate, name, max_duration_s)


def knows_rate(audio: Any) -> bool:
    """Return whether a clip includes its sampling rate; all kinds except arrays do."""
    if isinstance(audio, dict):
        is_array = any(audio.get(key) is not None for key in ("array", "raw"))
        return not is_array or audio.get("sampling_rate") is not None
    if str(getattr(audio, "dtype", None)) in ("uint8", "torch.uint8"):
        return _holds_file(_as_array(audio))
    is_file = isinstance(audio, (str, bytes, bytearray, os.PathLike)) or hasattr(audio, "read") or _is_bytes(audio)
    return is_file or hasattr(audio, "get_all_samples") or (isinstance(audio, tuple) and len(audio) == 2)


def _is_bytes(audio) -> bool:
    return isinstance(audio, memoryview) and audio.itemsize == 1


def _holds_file(samples: np.ndarray) -> bool:
    """Return whether an array holds the contents of an audio file rather than samples."""
    is_bytes = samples.dtype == np.uint8 and samples.ndim == 1
    return is_bytes and container_of(samples[:MAGIC_BYTES].tobytes()) is not None


def _of_decoder(decoder, max_duration_s: float):
    """Return the samples and the rate of torchcodec's `AudioDecoder`, which rows of `datasets` hold."""
    duration_s = getattr(getattr(decoder, "metadata", None), "duration_seconds", None)
    if duration_s is not None and duration_s > max_duration_s:
        raise too_long("the audio of the decoder", duration_s, max_duration_s)
    try:
        samples = decoder.get_all_samples()
    except RuntimeError as error:
        raise ValueError(f"The audio of {type(decoder).__name__} cannot be decoded: {error}") from error
    return samples.data.T, samples.sample_rate


def _of_dict(audio: dict, source_rate):
    """Return the clip in an audio dict, and its rate if it is an array."""
    for key in ("array", "raw"):
        if audio.get(key) is not None:
            return audio[key], audio.get("sampling_rate", source_rate)
    if audio.get("bytes") is not None:
        return audio["bytes"], source_rate
    if audio.get("base64") is not None:
        return _of_base64(audio["base64"]), source_rate
    if audio.get("path") is not None:
        return audio["path"], source_rate
    raise ValueError(
        f"An audio dict needs 'array', 'raw', 'bytes', 'base64' or 'path', but has {sorted(map(str, audio))}."
    )


def _after_comma(data_url: str) -> str:
    header, comma, contents = data_url.partition(",")
    if not comma or not header.endswith(";base64"):
        raise ValueError(f"Expected a data URL 'data:audio/wav;base64,...', got one that begins {data_url[:40]!r}.")
    return contents


def _of_base64(text) -> bytes:
    if not isinstance(text, (str, bytes)):
        raise TypeError(f"Expected base64 audio as a string, got {type(text)}.")
    if isinstance(text, str) and text.startswith("data:"):
        text = _after_comma(text)
    try:
        # Line breaks are common in base64. Other characters outside its alphabet are errors.
        return base64.b64decode("".join(text.split()) if isinstance(text, str) else text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"The base64 audio ({len(text)} characters) is not valid base64: {error}.") from error


def _join(blocks, source_rate: int, sampling_rate: int, name: str, max_duration_s: float) -> np.ndarray:
    """Check, resample and concatenate mono blocks."""
    if not isinstance(source_rate, (int, np.integer)) or not 1000 <= source_rate <= 768_000:
        raise ValueError(
            f"The sampling rate of {name} must be a whole number of Hz (1000 to 768000), got {source_rate!r}."
        )
    source_rate, resampler = int(source_rate), None
    pieces: list[np.ndarray] = [np.zeros(0, np.float32)]
    if source_rate != sampling_rate:
        resampler = soxr.ResampleStream(source_rate, sampling_rate, 1, dtype="float32")
    num_samples, peak = 0, 0.0
    for block in blocks:
        num_samples += len(block)
        if num_samples / source_rate > max_duration_s:
            raise too_long(name, num_samples / source_rate, max_duration_s)
        if not np.isfinite(block).all():
            raise ValueError(f"{name} holds NaN or infinite samples. Expected finite floats, usually within [-1, 1].")
        peak = max(peak, np.abs(block).max(initial=0.0))
        if peak > LOUDEST_PEAK:
            raise ValueError(
                f"{name} is far too loud: a sample of {peak:g}. Expected floats within [-1, 1]. If these are integers "
                "that were made floats, divide them by the full scale of their type, 32768 for 16 bits."
            )
        pieces.append(block if resampler is None else resampler.resample_chunk(block))
    if num_samples == 0:
        raise ValueError(f"{name} is empty (0 samples). Remove it, or record it again.")
    if peak < SILENCE_PEAK:
        raise ValueError(
            f"{name} is silent: {num_samples / source_rate:.2f} s with no sample above {SILENCE_PEAK:g} of full scale. "
            "Expected speech; check the recording and its gain."
        )
    if resampler is not None:
        pieces.append(resampler.resample_chunk(np.zeros(0, np.float32), last=True))
    waveform = np.concatenate(pieces)
    if len(waveform) == 0:
        raise ValueError(
            f"{name} is too short: {num_samples} sample(s) of {source_rate} Hz are none at {sampling_rate}."
        )
    return waveform


def _as_array(audio) -> np.ndarray:
    """Return array-like samples as an array of numbers."""
    if hasattr(audio, "detach"):
        audio = audio.detach().cpu()
        audio = (audio.float() if audio.is_floating_point() else audio).numpy()  # numpy has no bfloat16
    try:
        samples = np.asarray(audio)
        if np.issubdtype(samples.dtype, np.integer) or np.issubdtype(samples.dtype, np.floating):
            return samples
    except ValueError:  # rows of different lengths
        pass
    raise TypeError(
        "Expected audio as a path, bytes, dict, (array, sampling_rate), AudioDecoder or an array of numbers, got "
        f"{type(audio)}."
    )


def _as_float(samples: np.ndarray) -> np.ndarray:
    """Return samples as float32, (num_samples,) or (num_samples, num_channels)."""
    if samples.size == 0 and samples.ndim == 2:
        samples = samples.reshape(0, 1)  # no samples of some channels, on whichever side
    if samples.ndim == 2 and 0 < samples.shape[0] < samples.shape[1]:
        samples = samples.T
    if samples.ndim not in (1, 2) or (samples.ndim == 2 and samples.shape[1] > MAX_CHANNELS):
        raise ValueError(
            f"Expected one clip of shape (samples,) or with up to {MAX_CHANNELS} channels, got an array of shape "
            f"{samples.shape}."
        )
    _check_full_scale(samples)
    return full_scale(samples).astype(np.float32)


def _check_full_scale(samples: np.ndarray):
    """Refuse integers whose full scale is not clear.

    Raises:
        ValueError: the type of the integers is wider than their values suggest.
    """
    if not np.issubdtype(samples.dtype, np.integer) or samples.dtype.itemsize < 4:
        return
    lowest, highest = int(samples.min(initial=0)), int(samples.max(initial=0))
    # Audio has at most 32 bits per sample. Zeros of a signed type are silence at any width. int32 that would be silent
    # holds narrower samples: 16 bits, or the sum of two channels of 16 bits.
    if lowest == highest or (samples.dtype == np.int32 and max(-lowest, highest) > SILENCE_PEAK * 2**31):
        return
    raise ValueError(
        f"the audio array holds {samples.dtype} numbers from {lowest} to {highest}, and their full scale is not clear. "
        "Give 16-bit samples as int16, np.asarray(samples, dtype=np.int16), 32-bit samples as int32, or floats within "
        "[-1, 1]."
    )
