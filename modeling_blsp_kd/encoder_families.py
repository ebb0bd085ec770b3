"""The differences between the families of speech encoders that a model can have, in one table.

Follows the configs of transformers. Everything that depends on a family reads it here; only `speech_encoder.py` also
knows Whisper's class, which it replaces. Leaves out: the feature extractors, which the processor loads by their own
class.

Shapes: W windows of clips, T frames.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from transformers import PreTrainedConfig

from .config_options import require

Length = TypeVar("Length", int, torch.Tensor)
SPEECH_PADDINGS = ("do_not_pad", "max_length")
WINDOW_S = 30.0
SAMPLING_RATE = 16_000
MEL_HOP_S = 0.01


@dataclass(frozen=True)
class EncoderFamily:
    """A family of speech encoders. Callables take the encoder's config.

    Args:
        time_axis (`int`): the axis of the features that is time.
        window (`Callable`): how long `WINDOW_S` of audio is on that axis. Longer clips are cut.
        frame_duration_s (`Callable`): how much audio one encoder frame stands for, in seconds.
        convolutions (`Callable`): kernel, stride and padding of each convolution between features and frames, of
            encoders that do not return the mask of their frames.
        ffn_dim (`str`): the config's name for the inner width of a feed-forward layer.
        is_padded (`bool`): the encoder was pretrained on clips padded to the whole window, so it can be used like that.
        returns_mask (`bool`): the encoder's output has the mask of its frames.
        why_not_causal (`str`): what in features or layers depends on later speech, whatever the attention mask; empty
            if nothing does, so that the encoder can stream.
        prefixes (`tuple[str]`): regular expressions of what stands before the names of the encoder's weights in
            checkpoints of whole models, where transformers does not know it.
    """

    time_axis: int
    window: Callable[..., int]
    frame_duration_s: Callable[..., float]
    convolutions: Callable[..., list[tuple[int, int, int]]] | None = None
    ffn_dim: str = "intermediate_size"
    is_padded: bool = False
    returns_mask: bool = False
    why_not_causal: str = ""
    prefixes: tuple[str, ...] = ()


def _feature_convolutions(config) -> list[tuple[int, int, int]]:
    return [(kernel, stride, 0) for kernel, stride in zip(config.conv_kernel, config.conv_stride)]


def _adapter_convolutions(config, kernel: int) -> list[tuple[int, int, int]]:
    """Return those of the adapter that some checkpoints of a family have after their layers."""
    return [(kernel, config.adapter_stride, kernel // 2)] * (config.num_adapter_layers if config.add_adapter else 0)


HUBERT = EncoderFamily(  # waveforms (W, samples)
    time_axis=1,
    window=lambda config: round(WINDOW_S * SAMPLING_RATE),
    frame_duration_s=lambda config: math.prod(config.conv_stride) / SAMPLING_RATE,
    convolutions=_feature_convolutions,
    why_not_causal="its waveforms are normalised over the clip, and its convolutional positions see later frames",
)
# transformers counts an adapter's frames as those of kernel 1.
WAV2VEC2 = replace(
    HUBERT, convolutions=lambda config: [*_feature_convolutions(config), *_adapter_convolutions(config, kernel=1)]
)
ENCODER_FAMILIES = {
    "whisper": EncoderFamily(  # log-mel (W, num_mel_bins, num_mel_frames)
        time_axis=2,
        window=lambda config: 2 * config.max_source_positions,
        # The position table spans a window, whatever the hop of the feature extractor (which is not in the config).
        frame_duration_s=lambda config: WINDOW_S / config.max_source_positions,
        ffn_dim="encoder_ffn_dim",
        is_padded=True,
        prefixes=(r"^model\.encoder\.", r"^encoder\."),  # the second: of a Whisper without its head
    ),
    "wav2vec2": WAV2VEC2,
    "hubert": HUBERT,
    "wavlm": WAV2VEC2,
    "wav2vec2-bert": EncoderFamily(  # pairs of filter bank frames (W, length, 160)
        time_axis=1,
        window=lambda config: 1499,
        frame_duration_s=lambda config: 2 * MEL_HOP_S,
        convolutions=lambda config: _adapter_convolutions(config, kernel=config.adapter_kernel_size),
        why_not_causal="its filter banks are normalised over the clip",
    ),
    "parakeet_encoder": EncoderFamily(  # log-mel (W, length, num_mel_bins)
        time_axis=1,
        window=lambda config: 3000,
        frame_duration_s=lambda config: MEL_HOP_S * config.subsampling_factor,
        returns_mask=True,
        why_not_causal="its features are normalised over the clip, and its convolutions see later frames in each layer",
    ),
}


def check_padding(padding: Any, config: PreTrainedConfig):
    """Check how clips are padded for an encoder, the config's `speech_padding`.

    Raises:
        ValueError: there is no such padding, or the encoder was not trained with it.
    """
    require(padding in SPEECH_PADDINGS, f"speech_padding must be one of {SPEECH_PADDINGS}", padding)
    if padding == "max_length" and not ENCODER_FAMILIES[config.model_type].is_padded:
        raise ValueError(
            f"speech_padding='max_length' is for Whisper, whose encoder was trained on 30 s; {config.model_type!r} "
            "takes any length. Leave speech_padding at 'do_not_pad'."
        )


def window_of(config: PreTrainedConfig) -> tuple[int, int]:
    """Return the longest input that an encoder takes at once (30 s), and the axis of the features that it lies on."""
    family = ENCODER_FAMILIES[config.model_type]
    return family.window(config), family.time_axis


def frame_duration_s(config: PreTrainedConfig) -> float:
    """Return how much audio one encoder frame stands for, in seconds."""
    return ENCODER_FAMILIES[config.model_type].frame_duration_s(config)


def steps_per_frame(config: PreTrainedConfig) -> int:
    """Return how many steps on the features' time axis one encoder frame stands for."""
    return round(window_of(config)[0] * frame_duration_s(config) / WINDOW_S)


def frame_starts_s(config: PreTrainedConfig, num_frames: int, frames_per_window: int) -> torch.Tensor:
    """Return where each encoder frame begins, in seconds from the start of its clip: (num_frames,).

    The frames may not cover the end of a window (wav2vec 2.0 makes 1499 frames of 20 ms in 30 s), but the next window
    still begins at its own time.

    Args:
        frames_per_window (`int`): how many frames the encoder makes of a whole window.
    """
    frame = torch.arange(num_frames, dtype=torch.float64)
    window = frame // frames_per_window
    return window * WINDOW_S + (frame - window * frames_per_window) * frame_duration_s(config)


def count_frames(config: PreTrainedConfig, length: Length) -> Length:
    """Return the number of frames that an encoder without a frame mask makes of a length on the features' time axis."""
    convolutions = ENCODER_FAMILIES[config.model_type].convolutions
    for kernel, stride, padding in [] if convolutions is None else convolutions(config):
        length = (length + 2 * padding - kernel) // stride + 1
    return length
