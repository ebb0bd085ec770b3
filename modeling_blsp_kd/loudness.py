"""Where a clip is silent, told from the features that its speech encoder takes.

Follows no paper: a frame is silent when it is nearer to the clip's quietest one than to its loudest by a given share.
Leaves out: what else a voice activity detector knows, so loud noise counts as speech.

Shapes: N clips, W windows of clips, T encoder frames.
"""

import torch
from torch import nn

# Whisper's feature extractor clips log10 power at this much below the loudest.
DYNAMIC_RANGE = 8.0


def loudness(
    features: torch.Tensor, features_mask: torch.Tensor, time_axis: int, steps_per_frame: int, num_frames: int
) -> torch.Tensor:
    """Return the logarithmic loudness of encoder frames.

    Args:
        features (W, length), (W, length, bins) or (W, bins, length): waveforms, or logarithmic power in bands.
        features_mask (W, length): 1 at what belongs to the clip.
        time_axis (`int`): the axis that `length` is.
        steps_per_frame (`int`): how much of `length` one encoder frame takes.
        num_frames (`int`): T.

    Returns:
        (W, T) float32. It means something only beside other frames of the same clip; -inf at padding.
    """
    is_waveform = features.ndim == 2
    features = features.detach().float()
    values = features.square() if is_waveform else features.mean(3 - time_axis)
    quietest = 0.0 if is_waveform else -torch.inf
    values = values.masked_fill(~features_mask.bool(), quietest)
    values = nn.functional.pad(values, (0, num_frames * steps_per_frame - values.shape[1]), value=quietest)
    values = values.unflatten(1, (num_frames, steps_per_frame))
    if not is_waveform:
        return values.amax(-1)
    power = values.mean(-1)
    floor = power.amax(1, keepdim=True) * 10**-DYNAMIC_RANGE
    return power.maximum(floor).clamp(min=torch.finfo(power.dtype).tiny).log10()


def find_silence(frame_loudness: torch.Tensor, frame_mask: torch.Tensor, silence: float) -> torch.BoolTensor:
    """Return True where nothing is said, padding included: (N, T).

    Args:
        frame_loudness (N, T): of [`loudness`]; frame_mask (N, T) bool: which frames belong to the clip.
        silence (`float`): how far up from the quietest frame (0) to the loudest (1) of a clip silence reaches.
    """
    quietest = frame_loudness.masked_fill(~frame_mask, torch.inf).amin(1, keepdim=True)
    loudest = frame_loudness.masked_fill(~frame_mask, -torch.inf).amax(1, keepdim=True)
    return (frame_loudness < quietest + silence * (loudest - quietest)) | ~frame_mask
