"""Clips for tests of audio input: files of all containers, made when they are asked for, and torchcodec's decoder."""

import io
from types import SimpleNamespace

import av
import numpy as np
import soundfile
import torch

from .prompts import SAMPLING_RATE


def tone(frequency_hz=440.0, duration_s=1.0, rate=SAMPLING_RATE):
    time = np.arange(int(duration_s * rate)) / rate
    return (0.5 * np.sin(2 * np.pi * frequency_hz * time)).astype(np.float32)


def encode(waveform, rate=SAMPLING_RATE, format="WAV", subtype="FLOAT") -> bytes:
    """A file by libsndfile; `waveform` of shape (num_samples,) or (num_samples, num_channels)."""
    buffer = io.BytesIO()
    soundfile.write(buffer, waveform, rate, format=format, subtype=subtype)
    return buffer.getvalue()


def encode_by_ffmpeg(waveform, container, codec, rate=SAMPLING_RATE, coded_rate=None, video=False, **options) -> bytes:
    """A file by FFmpeg, of one audio track if `codec` is not None; `waveform` as in `encode`, `options` the muxer's."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container, options=options) as file:
        if video:
            picture = file.add_stream("mpeg4", rate=10, width=16, height=16, pix_fmt="yuv420p")
        if codec is not None:
            layout = "mono" if waveform.ndim == 1 else "stereo"
            track = file.add_stream(codec, rate=coded_rate or rate, layout=layout)
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(np.atleast_2d(waveform.T)), "fltp", layout)
            frame.sample_rate, frame.pts = rate, 0
            context = track.codec_context
            if codec.startswith("wma"):
                context.bit_rate = 64_000  # it has no default
            resampler = av.AudioResampler(context.format.name, layout, context.sample_rate, context.frame_size or None)
            for converted in [*resampler.resample(frame), *resampler.resample(None), None]:
                file.mux(track.encode(converted))
        if video:
            for number in range(10):
                frame = av.VideoFrame.from_ndarray(np.full((24, 16), 128, np.uint8), "yuv420p")
                frame.pts = number
                file.mux(picture.encode(frame))
            file.mux(picture.encode(None))
    return buffer.getvalue()


class StandInDecoder:
    """The public interface of the `AudioDecoder` that rows of `datasets` hold, which is torchcodec's with two keys.

    Args:
        channels: (num_channels, num_samples).
    """

    def __init__(self, channels, rate=SAMPLING_RATE):
        self._channels, self._rate = torch.as_tensor(np.atleast_2d(channels), dtype=torch.float32), rate
        self.metadata = SimpleNamespace(duration_seconds=self._channels.shape[1] / rate, sample_rate=rate)

    def get_all_samples(self):
        return SimpleNamespace(
            data=self._channels,
            sample_rate=self._rate,
            pts_seconds=0.0,
            duration_seconds=self.metadata.duration_seconds,
        )

    def __getitem__(self, key):
        if key == "array":
            return self._channels.mean(0).numpy()
        if key == "sampling_rate":
            return self._rate
        raise KeyError(key)
