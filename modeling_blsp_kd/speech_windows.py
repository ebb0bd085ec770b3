"""Long clips in windows: cut, encoded like clips of their own, and joined again before CIF integrates over all of it.

What attends (encoder, CFormer layers) sees one window at a time, so memory grows with the length of a clip, not with
its square, and every window is like a training clip. Leaves out: encoding itself (`speech_encoder.py`).

Shapes: A clips, N windows (all windows of the first clip, then of the second, ...).
"""

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence


def split_into_windows(features, features_mask, window: int, time_axis: int):
    """Cut clips into windows, the last window of a clip shorter.

    Args:
        features (A, ..., length, ...), features_mask (A, length): what an encoder takes.
        window (`int`): longest length at once.
        time_axis (`int`): the axis of features that `length` is.

    Returns:
        `tuple`: features and mask of N windows, and the number of windows of each clip, (A,). Clips that all fit into
        one window come back as they are, with None.
    """
    length = features.shape[time_axis]
    if length <= window:
        return features, features_mask, None
    missing = -length % window
    padding = (0, 0) * (features.ndim - 1 - time_axis) + (0, missing)
    # `unfold` puts the inside of a window last; it belongs where the time axis was, and the windows beside the clips.
    windows = nn.functional.pad(features, padding).unfold(time_axis, window, window)
    windows = windows.movedim(-1, time_axis + 1).movedim(time_axis, 1).flatten(0, 1)
    mask = nn.functional.pad(features_mask, (0, missing)).unflatten(1, (-1, window))
    is_used = mask.bool().any(-1)
    return windows[is_used.flatten()], mask[is_used], is_used.sum(1)


def regroup(values, mask, group_sizes) -> torch.Tensor:
    """Take the valid items of all rows in order and lay them out in rows of other lengths.

    Args:
        values (N, length, ...), mask (N, length) bool: rows of items, and which of them are valid.
        group_sizes (G,): how many items each new row takes; together as many as are valid.

    Returns:
        (G, max(group_sizes), ...), zero-padded.
    """
    return pad_sequence(values[mask].split(group_sizes.tolist()), batch_first=True)


def is_within(lengths, length: int) -> torch.BoolTensor:
    """True at the first `lengths` places of each row: (G,) to (G, length)."""
    return torch.arange(length, device=lengths.device) < lengths[:, None]


def per_clip(window_values, windows_per_clip) -> torch.Tensor:
    """Sum a value of each window over the windows of a clip: (N,) and (A,) to (A,)."""
    clip = torch.arange(len(windows_per_clip), device=window_values.device).repeat_interleave(windows_per_clip)
    return window_values.new_zeros(len(windows_per_clip)).index_add(0, clip, window_values)


def tokens_per_window(firing_places, is_token, frames_per_window, windows_per_clip) -> torch.LongTensor:
    """How many tokens are complete in each window.

    Args:
        firing_places (A, U), is_token (A, U) bool: in frames from the start of the clip; which are valid.
        frames_per_window (N,), windows_per_clip (A,).

    Returns:
        (N,); a token that is complete exactly at a border belongs to the window before it.
    """
    frames_per_clip = per_clip(frames_per_window, windows_per_clip)
    clip_start = frames_per_clip.cumsum(0) - frames_per_clip
    # Borders are whole numbers, so counting whole frames is exact.
    last_frame = firing_places.ceil().clamp(max=frames_per_clip[:, None]).long() + clip_start[:, None]
    window = torch.searchsorted(frames_per_window.cumsum(0), last_frame[is_token])
    return torch.bincount(window, minlength=len(frames_per_window))
