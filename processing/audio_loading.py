"""Audio from anywhere (path, bytes, base64, array) to mono float32 at the rate that the speech encoder wants.

Decoding is libsndfile's (wav, flac, ogg/opus, mp3), resampling is soxr's. Leaves out: URLs (`url_fetching.py`), video
containers, and features, which the feature extractor makes.
"""

import base64
import binascii
import io
import os
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import soundfile
import soxr

# Quieter than three steps of 16-bit audio: a muted microphone, not speech.
SILENCE_PEAK = 1e-4
MAX_DURATION_S = 600.0
MAX_CHANNELS = 8
# Files are mixed and resampled piece by piece: many channels of a high rate would take many times the result's memory.
BLOCK_FRAMES = 65_536


def load_audio(
    audio, sampling_rate: int, source_rate: int | None = None, max_duration_s: float = MAX_DURATION_S
) -> np.ndarray:
    """Load one clip.

    Args:
        audio: one of
            - `str` or `os.PathLike`: an audio file;
            - `str` that begins with `data:`: a data URL, `data:audio/wav;base64,...`;
            - `bytes`, or an object whose `read()` returns them: the contents of an audio file;
            - `dict`: `{"array", "sampling_rate"}` (or `"raw"` for `"array"`), `{"base64"}`, or `{"bytes"}` and/or
              `{"path"}`, as in `datasets`;
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
        audio, source_rate = _of_dict(audio, source_rate)
    elif isinstance(audio, tuple) and len(audio) == 2 and np.ndim(audio[1]) == 0 and np.ndim(audio[0]) > 0:
        audio, source_rate = audio
    if isinstance(audio, str) and audio.startswith("data:"):
        audio = _of_base64(_after_comma(audio))
    elif hasattr(audio, "read") and not isinstance(audio, os.PathLike):
        audio = audio.read()
        if not isinstance(audio, bytes):
            raise TypeError(f"Expected an audio file opened in binary mode ('rb'), but reading it gave {type(audio)}.")

    if isinstance(audio, (str, os.PathLike, bytes, bytearray)):
        name, source = _open(audio)
        blocks, source_rate = _decode(source, name, max_duration_s)
    else:
        waveform, name = _as_float(audio), "the audio array"
        blocks = [waveform.mean(axis=1) if waveform.ndim == 2 else waveform]
        source_rate = sampling_rate if source_rate is None else source_rate
    if not isinstance(source_rate, (int, np.integer)) or not 1000 <= source_rate <= 768_000:
        raise ValueError(
            f"The sampling rate of {name} must be a whole number of Hz (1000 to 768000), got {source_rate!r}."
        )
    return _join(blocks, int(source_rate), sampling_rate, name, max_duration_s)


def _of_dict(audio: dict, source_rate):
    """What an audio dict holds, and the rate of its array."""
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
    try:
        # Line breaks are usual in base64; anything else that is not of its alphabet is an error.
        return base64.b64decode("".join(text.split()) if isinstance(text, str) else text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"The base64 audio ({len(text)} characters) is not valid base64: {error}.") from error


def _join(blocks, source_rate: int, sampling_rate: int, name: str, max_duration_s: float) -> np.ndarray:
    """Check and resample mono blocks, and join them."""
    resampler = None
    if source_rate != sampling_rate:
        resampler = soxr.ResampleStream(source_rate, sampling_rate, 1, dtype="float32")
    num_samples, peak, pieces = 0, 0.0, [np.zeros(0, np.float32)]
    for block in blocks:
        num_samples += len(block)
        if num_samples / source_rate > max_duration_s:
            raise ValueError(_too_long(name, num_samples / source_rate, max_duration_s))
        if not np.isfinite(block).all():
            raise ValueError(f"{name} holds NaN or infinite samples. Expected finite floats, usually within [-1, 1].")
        peak = max(peak, np.abs(block).max(initial=0.0))
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
    if not np.isfinite(waveform).all():  # finite samples near the limit of float32, which resampling adds up
        raise ValueError(f"{name} is too loud to resample: a sample of {peak:g}. Expected floats within [-1, 1].")
    return waveform


def _too_long(name, duration_s, max_duration_s) -> str:
    return (
        f"{name} lasts {duration_s:.2f} s, but a clip may last at most {max_duration_s:g} s. Split it into shorter "
        "clips."
    )


def _open(audio) -> tuple[str, Path | io.BytesIO]:
    """The name of a file or its bytes, for messages, and what libsndfile reads."""
    if isinstance(audio, (bytes, bytearray)):
        return f"the audio of {len(audio)} bytes", io.BytesIO(bytes(audio))
    name = str(audio)
    if "://" in name:
        raise ValueError(f"Audio is read from files, not from URLs, got {name!r}. Download it first.")
    try:
        exists = Path(audio).is_file()
    except ValueError:  # a null byte
        exists = False
    except OSError as error:
        raise FileNotFoundError(f"{name[:100]!r}... cannot be an audio file: {error.strerror}.") from error
    if not exists:
        raise FileNotFoundError(f"Audio file not found: {name!r}.")
    return name, Path(audio)


def _decode(source, name: str, max_duration_s: float):
    """The mono blocks of a file, float32, read as they are asked for, and its rate."""
    with _naming(name):
        file = soundfile.SoundFile(source)
    # Asked of the header first, so that an absurd length is refused before it is read.
    if file.channels > MAX_CHANNELS or file.frames / file.samplerate > max_duration_s:
        file.close()
        if file.channels > MAX_CHANNELS:
            raise ValueError(f"{name} has {file.channels} channels. Expected at most {MAX_CHANNELS}.")
        raise ValueError(_too_long(name, file.frames / file.samplerate, max_duration_s))

    def blocks():
        with file, _naming(name):
            for block in file.blocks(BLOCK_FRAMES, dtype="float32", always_2d=True):
                yield block.mean(axis=1)

    return blocks(), file.samplerate


@contextmanager
def _naming(name: str):
    """Turn libsndfile's errors into ones that name the clip and say what is expected."""
    try:
        yield
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
    if waveform.ndim not in (1, 2) or (waveform.ndim == 2 and waveform.shape[1] > MAX_CHANNELS):
        raise ValueError(
            f"Expected one clip of shape (samples,) or with up to {MAX_CHANNELS} channels, got an array of shape "
            f"{waveform.shape}."
        )
    return waveform.astype(np.float32)
