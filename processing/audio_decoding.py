"""Decode an audio file into mono blocks.

libsndfile decodes wav, flac, ogg/opus and mp3. FFmpeg decodes the formats of phones and browsers: m4a, mp4, webm, aac,
amr. It comes with PyAV, which is optional: `pip install av`. `audio_containers.py` recognises the format of a file, and
`audio_loading.py` resamples and checks the samples.
"""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile

from .audio_containers import MAGIC_BYTES, Container, container_of
from .c_stderr import silenced_c_stderr

try:
    import av
except ImportError:
    av = None
# Damaged files also make FFmpeg seek to offsets that no file can have, which raises an OverflowError.
FFMPEG_ERRORS = (OSError, OverflowError, *([av.FFmpegError] if av else []))

MAX_CHANNELS = 8
# Files are mixed down and resampled block by block: many channels at a high rate would need many times the memory of
# the result.
BLOCK_FRAMES = 65_536
# How much shorter than its header says a file may be: encoders pad and trim by a few of their own frames.
MISSING_S = 0.25


OF_FFMPEG = {".m4a", ".mp4", ".mov", ".3gp", ".webm", ".mka", ".mkv", ".aac", ".amr", ".wma"}
SUFFIXES = {f".{name.lower()}" for name in soundfile.available_formats()} | {".opus"} | (OF_FFMPEG if av else set())


class TooLongError(ValueError):
    """Raised when a clip lasts longer than its caller accepts."""


class AudioInfo(NamedTuple):
    duration_s: float
    format: str


def audio_info(audio: str | os.PathLike | bytes) -> AudioInfo:
    """Return duration and format of an audio file (a path or `bytes`), read from its header or its packets.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not decodable.
    """
    name, source = _open(audio)
    with _demuxed(source, name) as file:
        return file.info()


@contextmanager
def decoded(audio: str | os.PathLike | bytes, max_duration_s: float) -> Iterator[tuple[str, Iterator[np.ndarray], int]]:
    """Open an audio file (a path or `bytes`) to read it block by block.

    Returns:
        a context manager that gives the file's name for messages, an iterator over its mono float32 blocks, and its
        rate, Hz.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not decodable, of more than `MAX_CHANNELS` channels, or ([`TooLongError`]) longer than
            `max_duration_s` by its header.
    """
    name, source = _open(audio)
    with _demuxed(source, name) as file:
        if file.num_channels > MAX_CHANNELS:
            raise ValueError(f"{name} has {file.num_channels} channels. Expected at most {MAX_CHANNELS}.")
        # The header is checked first, so that a file with an absurd length is refused before it is read.
        if file.promised_s is not None and file.promised_s > max_duration_s:
            raise too_long(name, file.promised_s, max_duration_s)
        yield name, file.blocks(), file.rate


def too_long(name: str, duration_s: float, max_duration_s: float) -> TooLongError:
    return TooLongError(
        f"{name} lasts {duration_s:.2f} s, but a clip may last at most {max_duration_s:g} s. Split it into shorter "
        "clips."
    )


def full_scale(samples: np.ndarray) -> np.ndarray:
    """Scale integers to floats by their type, as libsndfile does; return floats unchanged.

    The smallest integer of the type becomes -1. The middle of an unsigned type becomes 0.
    """
    if not np.issubdtype(samples.dtype, np.integer):
        return samples
    limits = np.iinfo(samples.dtype)
    half_range = (float(limits.max) - limits.min + 1) / 2
    return (samples - (limits.min + half_range)) / half_range


def _open(audio) -> tuple[str, Path | io.BytesIO]:
    """Return the name of a file or its bytes, for messages, and what can be read."""
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


@contextmanager
def _demuxed(source: Path | io.BytesIO, name: str):
    """Open a file with the library that can read it, and make errors name the clip and the expected formats."""
    with io.BytesIO(source.getbuffer()) if isinstance(source, io.BytesIO) else source.open("rb") as start:
        container = container_of(start.read(MAGIC_BYTES))
    file: _SoundFile | _FFmpegFile
    try:
        if container is None or container.is_of_libsndfile:
            try:
                with silenced_c_stderr():
                    file = _SoundFile(soundfile.SoundFile(source))
            except soundfile.LibsndfileError:
                if av is None or container is None or container.demuxer is None:
                    raise
                file = _FFmpegFile(source, container, name)
        elif av is None:
            raise ValueError(
                f"{name} is of the format {container.name}, which needs FFmpeg: pip install av. Or convert it to wav, "
                "flac, ogg/opus or mp3."
            )
        else:
            file = _FFmpegFile(source, container, name)
        with file:
            yield file
    except soundfile.LibsndfileError as error:
        raise ValueError(_undecodable(name, error.error_string)) from error
    except FFMPEG_ERRORS as error:
        raise ValueError(_undecodable(name, getattr(error, "strerror", None) or str(error))) from error


def _undecodable(name: str, reason: str) -> str:
    more = "m4a, mp4, webm, aac and amr" + ("" if av else ", with FFmpeg (pip install av)")
    return (
        f"{name} cannot be decoded: {reason.rstrip('.')}. Expected wav, flac, ogg/opus or mp3 ({more}); is it damaged, "
        "or another format?"
    )


class _SoundFile:
    """A file that libsndfile reads."""

    def __init__(self, file: soundfile.SoundFile):
        self.file = file
        self.num_channels, self.rate = file.channels, file.samplerate
        self.promised_s = file.frames / file.samplerate

    def __enter__(self):
        return self

    def __exit__(self, *error):
        with silenced_c_stderr():
            self.file.close()

    def info(self) -> AudioInfo:
        return AudioInfo(self.promised_s, self.file.format.lower())

    def blocks(self) -> Iterator[np.ndarray]:
        # Not `SoundFile.blocks`, because it seeks, and libsndfile cannot seek in GSM 6.10 and G.721.
        while True:
            with silenced_c_stderr():
                block = self.file.read(BLOCK_FRAMES, dtype="float32", always_2d=True)
            if len(block) == 0:
                return
            yield block.mean(axis=1)


class _FFmpegFile:
    """The first audio track of a file that FFmpeg reads.

    FFmpeg receives the container's name and the contents instead of a path. If it guessed the container, it would also
    accept playlists, which name other files and addresses.
    """

    def __init__(self, source: Path | io.BytesIO, container: Container, name: str):
        self.format, self.name = container.name, name
        self.source = source.open("rb") if isinstance(source, Path) else source
        try:
            self.source.seek(0)
            self.file = av.open(
                self.source,
                format=container.demuxer,
                options={"protocol_whitelist": "none"},
                metadata_errors="replace",
            )
            if not self.file.streams.audio:
                raise ValueError(f"{name} is a {container.name} file without an audio track.")
            self.track = self.file.streams.audio[0]
            if self.track.codec_context is None:
                raise ValueError(_undecodable(name, "its codec is not known"))
            self.num_channels, self.rate = self.track.codec_context.channels, self.track.codec_context.sample_rate
            self.promised_s = self._promised_s()
        except BaseException:
            self.source.close()
            raise

    def _promised_s(self) -> float | None:
        """Return the duration in the header, or None if there is none: browsers write webm before they know it."""
        if self.track.duration:
            return float(self.track.duration * self.track.time_base)
        return self.file.duration / av.time_base if self.file.duration else None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()
        self.source.close()

    def info(self) -> AudioInfo:
        if self.promised_s is not None:
            return AudioInfo(self.promised_s, self.format)
        packets = [packet for packet in self.file.demux(self.track) if packet.pts is not None]
        end = max((packet.pts + (packet.duration or 0) for packet in packets), default=0)
        return AudioInfo(float(end * self.track.time_base), self.format)

    def blocks(self) -> Iterator[np.ndarray]:
        num_samples = 0
        for frame in self.file.decode(self.track):
            if frame.sample_rate != self.rate or frame.layout.nb_channels != self.num_channels:
                raise ValueError(
                    f"{self.name} changes from {self.rate} Hz and {self.num_channels} channel(s) to "
                    f"{frame.sample_rate} Hz and {frame.layout.nb_channels}. Convert it to wav first."
                )
            samples = full_scale(frame.to_ndarray())
            samples = samples.T if frame.format.is_planar else samples.reshape(-1, self.num_channels)
            num_samples += len(samples)
            yield samples.mean(axis=1).astype(np.float32)
        # FFmpeg stops without an error at the end of a truncated file.
        promised_s = self.promised_s if self.format in ("mp4", "webm") and len(self.file.streams) == 1 else None
        if promised_s is not None and num_samples / self.rate < promised_s - MISSING_S:
            raise ValueError(_undecodable(self.name, f"it holds {num_samples / self.rate:.2f} of {promised_s:.2f} s"))
