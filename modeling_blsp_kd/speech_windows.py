"""Split long clips into windows that are encoded separately, and join them again before CIF integrates the clip.

Every attention layer (encoder, CFormer) sees one window at a time, so memory grows with the length of a clip, not with
its square, and every window is like a training clip. Leaves out: encoding (`speech_encoder.py`).

Shapes: N clips, W windows (all windows of the first clip, then of the second, ...), G rows of a new grouping.
"""

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence


def check_mask(features: torch.Tensor, features_mask: torch.Tensor, time_axis: int) -> torch.Tensor:
    """Return the mask of clips (all ones if omitted), and check that every clip has frames.

    Args:
        features (N, ..., length, ...), features_mask (N, length), *optional*: what an encoder takes.
        time_axis (`int`): the axis of features that `length` is.

    Raises:
        ValueError: a clip has no frames.
    """
    if features.shape[time_axis] == 0:
        raise ValueError(
            f"input_features of shape {tuple(features.shape)} hold no frames: axis {time_axis} is time. Leave out "
            "clips without samples, and their placeholders, or pass features as the processor makes them."
        )
    if features_mask is None:
        return features.new_ones(len(features), features.shape[time_axis])
    if not torch.compiler.is_compiling() and not bool((has_frames := features_mask.bool().any(1)).all()):
        empty = (~has_frames).nonzero().flatten().tolist()
        raise ValueError(
            f"Audio {empty[0]} of the batch holds no frames: its input_features_mask is zero everywhere. Leave out "
            "clips without samples, and their placeholders."
        )
    return features_mask


def split_into_windows(
    features: torch.Tensor, features_mask: torch.Tensor, window: int, time_axis: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Cut clips into windows, the last window of a clip shorter.

    Args:
        features (N, ..., length, ...), features_mask (N, length): what an encoder takes.
        window (`int`): longest length at once.
        time_axis (`int`): the axis of features that `length` is.

    Returns:
        `tuple`: features and mask of W windows, and the number of windows of each clip, (N,). If all clips fit into one
        window, they come back as they are, with None.
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


def regroup(values: torch.Tensor, mask: torch.Tensor, group_sizes: torch.Tensor) -> torch.Tensor:
    """Take the valid items of all rows in order and lay them out in rows of other lengths.

    Args:
        values (rows, length, ...), mask (rows, length) bool: items, and which of them are valid.
        group_sizes (G,): how many items each new row takes; together as many as are valid.

    Returns:
        (G, max(group_sizes), ...), zero-padded.
    """
    return pad_sequence(values[mask].split(group_sizes.tolist()), batch_first=True)


def join_windows(windows_per_clip: torch.Tensor | None, mask: torch.Tensor, *values) -> tuple[torch.Tensor, ...]:
    """Lay the valid items of each clip's windows end to end.

    Args:
        windows_per_clip (`torch.LongTensor` of shape (N,), *optional*): omitted, every window is a clip.
        mask (W, length) bool: which items of the windows are valid.
        values (W, length, ...): the items, any number of tensors.

    Returns:
        `tuple`: the mask and the values of the N clips.
    """
    if windows_per_clip is None:
        return mask, *values
    lengths = per_clip(mask.sum(1), windows_per_clip)
    joined = [regroup(items, mask, lengths) for items in values]
    return is_within(lengths, joined[0].shape[1]), *joined


def is_within(lengths: torch.Tensor, length: int) -> torch.BoolTensor:
    """Return True at the first `lengths` places of each row: (G,) to (G, length)."""
    return torch.arange(length, device=lengths.device) < lengths[:, None]


def per_clip(window_values: torch.Tensor, windows_per_clip: torch.Tensor) -> torch.Tensor:
    """Sum a value of each window over the windows of a clip: (W,) and (N,) to (N,)."""
    clip = torch.arange(len(windows_per_clip), device=window_values.device).repeat_interleave(windows_per_clip)
    return window_values.new_zeros(len(windows_per_clip)).index_add(0, clip, window_values)


def tokens_per_window(
    firing_places: torch.Tensor, is_token: torch.Tensor, frames_per_window: torch.Tensor, windows_per_clip: torch.Tensor
) -> torch.LongTensor:
    """Count the tokens that are complete in each window.

    Args:
        firing_places (N, U), is_token (N, U) bool: in frames from the start of the clip, and which are valid.
        frames_per_window (W,), windows_per_clip (N,).

    Returns:
        (W,); a token that is complete exactly at a border belongs to the window before it.
    """
    frames_per_clip = per_clip(frames_per_window, windows_per_clip)
    clip_start = frames_per_clip.cumsum(0) - frames_per_clip
    # Borders are whole numbers, so counting whole frames is exact.
    last_frame = firing_places.ceil().clamp(max=frames_per_clip[:, None]).long() + clip_start[:, None]
    window = torch.searchsorted(frames_per_window.cumsum(0), last_frame[is_token])
    return torch.bincount(window, minlength=len(frames_per_window))
