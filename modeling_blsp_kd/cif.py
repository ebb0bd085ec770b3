"""Continuous integrate-and-fire (CIF): turns T weighted frames into U token vectors.

Follows arXiv 1905.11235 with threshold 1; the target-length scaling follows the authors' public code (blsp-emo,
src/modeling_adapter.py at e27b8da). Leaves out: how the weights (alphas) are predicted, see `adapters.py`.

With c_t = alpha_1 + ... + alpha_t, frame t gives token u the overlap of [c_{t-1}, c_t] with [u, u+1]. Sorting the
frame ends c_t together with the whole numbers cuts the integral into at most T + U intervals, each inside exactly one
frame and one token, so the weights are plain differences of neighbours. That holds however many tokens one frame
fires, needs no loop, and gives the exact gradient.
"""

from dataclasses import dataclass

import torch
from torch.nn.functional import embedding_bag, pad
from transformers.utils import ModelOutput


@dataclass
class CifOutput(ModelOutput):
    """What `continuous_integrate_and_fire` returns. B batch, U = largest token count, C channels.

    Args:
        speech_tokens (`torch.FloatTensor` of shape (B, U, C)): in the dtype of the frames; zero past a row's count.
        num_speech_tokens (`torch.LongTensor` of shape (B,)): tokens fired per row.
        alpha_sum (`torch.FloatTensor` of shape (B,)): sum of the unscaled alphas, the predicted token count.
        firing_places (`torch.FloatTensor` of shape (B, U)):
            where token u is complete, in frames from the start of the clip (2.25 is a quarter into the third frame);
            -1 past a row's count.
    """

    speech_tokens: torch.FloatTensor | None = None
    num_speech_tokens: torch.LongTensor | None = None
    alpha_sum: torch.FloatTensor | None = None
    firing_places: torch.FloatTensor | None = None


def _integrate(hidden_states, frame_ends, num_tokens: int):
    """Integrate frames between whole numbers.

    Args:
        hidden_states (B, T, C): frames.
        frame_ends (B, T + 1), float64: the integral before the first frame and after every frame.
        num_tokens: U, how many whole-number bins to fill.

    Returns:
        tokens (B, U, C) in the dtype of the frames, summed in float32, and firing places (B, U).
    """
    batch_size, num_frames, num_channels = hidden_states.shape
    bin_ends = torch.arange(1, num_tokens + 1, dtype=frame_ends.dtype, device=frame_ends.device)
    bin_ends = bin_ends.expand(batch_size, -1).contiguous()

    # Cut the integral at every frame end and every whole number. Stable, frame ends first: a frame that ends exactly
    # on a whole number closes its token.
    edges, order = torch.cat([frame_ends[:, 1:], bin_ends], dim=1).sort(dim=1, stable=True)
    widths = torch.diff(edges, dim=1, prepend=frame_ends[:, :1])
    closes_frame = order < num_frames
    frame_of = closes_frame.cumsum(1) - closes_frame.long()
    token_of = torch.arange(edges.shape[1], device=edges.device) - frame_of
    # Past the last frame, or past the last token, nothing is left to give.
    inside = (frame_of < num_frames) & (token_of < num_tokens)
    weights = torch.where(inside, widths, 0.0).to(torch.float32)

    # The intervals of one token are neighbours, so a token is one bag of weighted frames.
    row = torch.arange(batch_size, device=edges.device)[:, None]
    frame_index = (row * num_frames + frame_of.clamp(max=num_frames - 1)).flatten()
    tokens_before = torch.arange(num_tokens, device=edges.device).expand(batch_size, -1).contiguous()
    bag_starts = (row * edges.shape[1] + torch.searchsorted(token_of, tokens_before)).flatten()
    tokens = embedding_bag(
        frame_index,
        hidden_states.reshape(batch_size * num_frames, num_channels).float(),
        bag_starts,
        mode="sum",
        per_sample_weights=weights.flatten(),
    )
    tokens = tokens.view(batch_size, num_tokens, num_channels).to(hidden_states.dtype)

    ends = frame_ends.detach()
    frame = torch.searchsorted(ends[:, 1:].contiguous(), bin_ends).clamp(max=num_frames - 1)
    start, stop = ends.gather(1, frame), ends.gather(1, frame + 1)
    into_frame = ((bin_ends - start) / (stop - start).clamp(min=torch.finfo(ends.dtype).tiny)).clamp(0, 1)
    return tokens, (frame + into_frame).float()


def _frame_ends(alphas):
    """(B, T) alphas -> (B, T + 1) running integral in float64, from 0."""
    # float64 costs nothing on (B, T) scalars and keeps a boundary exact after thousands of frames.
    return pad(alphas.double().cumsum(1), (1, 0))


def continuous_integrate_and_fire(hidden_states, alphas, frame_mask=None, target_lengths=None) -> CifOutput:
    """Integrate whole utterances and fire a fixed number of tokens from each.

    The alphas of each row are scaled so that they sum to its token count exactly: `target_lengths` (training), or
    max(1, round(sum of alphas)) (inference). Rows do not see each other, nor their padding. Rows whose alphas are
    all zero have nothing to integrate and give zero vectors.

    Args:
        hidden_states (`torch.FloatTensor` of shape (B, T, C)): B batch, T frames, C channels. Any float dtype; sums
            are float32.
        alphas (`torch.FloatTensor` of shape (B, T)): weight of each frame, not negative.
        frame_mask (`torch.BoolTensor` of shape (B, T), *optional*): True at valid frames. Omitted: all.
        target_lengths (`torch.LongTensor` of shape (B,), *optional*): token counts U, at least 1 each.

    Returns:
        [`CifOutput`]; differentiable with respect to `hidden_states` and `alphas`.

    Raises:
        ValueError: shapes do not fit together, or there is no frame.
    """
    if hidden_states.ndim != 3 or alphas.shape != hidden_states.shape[:2] or alphas.shape[1] == 0:
        raise ValueError(
            "Expected hidden_states of shape (B, T, C) and alphas of shape (B, T) with T >= 1, but got "
            f"{tuple(hidden_states.shape)} and {tuple(alphas.shape)}."
        )
    if frame_mask is not None:
        if frame_mask.shape != alphas.shape:
            raise ValueError(
                f"Expected frame_mask of shape {tuple(alphas.shape)} (that of alphas), got {tuple(frame_mask.shape)}."
            )
        alphas = alphas.masked_fill(~frame_mask.bool(), 0.0)
        # A padded frame has weight zero, but zero times inf or NaN would still poison the row.
        hidden_states = hidden_states.masked_fill(~frame_mask.bool()[..., None], 0.0)

    alpha_sum = alphas.double().sum(1)
    if target_lengths is None:
        num_speech_tokens = alpha_sum.detach().round().clamp(min=1).long()
    else:
        if target_lengths.shape != alpha_sum.shape:
            raise ValueError(
                f"Expected one target length per row, shape {tuple(alpha_sum.shape)}, but got "
                f"{tuple(target_lengths.shape)}."
            )
        num_speech_tokens = target_lengths.long()
    max_tokens = int(num_speech_tokens.max())
    if target_lengths is not None and int(num_speech_tokens.min()) < 1:
        raise ValueError(f"Target lengths must be at least 1, but got {target_lengths.tolist()}.")

    is_empty = alpha_sum == 0
    scale = torch.where(is_empty, 0.0, num_speech_tokens / torch.where(is_empty, 1.0, alpha_sum))
    frame_ends = _frame_ends(alphas.double() * scale[:, None])
    # Rounding must not leave the last token open (or open one more): the last edge is the count itself.
    frame_ends = torch.where(
        (frame_ends == frame_ends[:, -1:]) & ~is_empty[:, None],
        num_speech_tokens[:, None].to(frame_ends.dtype),
        frame_ends,
    )
    speech_tokens, firing_places = _integrate(hidden_states, frame_ends, max_tokens)
    is_token = torch.arange(max_tokens, device=alphas.device) < num_speech_tokens[:, None]
    return CifOutput(
        speech_tokens=speech_tokens,
        num_speech_tokens=num_speech_tokens,
        alpha_sum=alpha_sum.float(),
        firing_places=torch.where(is_token, firing_places, -1.0),
    )


@dataclass
class CifStreamState:
    """What streaming CIF carries from one chunk to the next: the open token and the place in the stream.

    Args:
        partial_token (`torch.FloatTensor` of shape (C,)): weighted sum of the open token so far.
        partial_weight (`float`): its weight so far, in [0, 1).
        num_frames (`int`): frames seen.
    """

    partial_token: torch.FloatTensor
    partial_weight: float = 0.0
    num_frames: int = 0


def stream_integrate_and_fire(hidden_states, alphas, state: CifStreamState | None = None):
    """Integrate the next chunk of one stream, without scaling, and fire every token that it completes.

    Args:
        hidden_states (`torch.FloatTensor` of shape (T, C)): the next T frames.
        alphas (`torch.FloatTensor` of shape (T,)): their weights.
        state ([`CifStreamState`], *optional*): what the last chunk returned. Omitted at the start.

    Returns:
        `tuple`: tokens (U, C), their firing places (U,) in frames since the start of the stream, and the next state.
    """
    if hidden_states.ndim != 2 or alphas.shape != hidden_states.shape[:1]:
        raise ValueError(
            f"Expected frames of shape (T, C) and alphas of shape (T,), but got {tuple(hidden_states.shape)} and "
            f"{tuple(alphas.shape)}."
        )
    if state is None:
        state = CifStreamState(partial_token=hidden_states.new_zeros(hidden_states.shape[1], dtype=torch.float32))
    if alphas.shape[0] == 0:
        return hidden_states[:0], alphas[:0].float(), state
    frame_ends = _frame_ends(alphas[None]) + state.partial_weight
    total = float(frame_ends[0, -1])
    num_fired = int(total)
    # One bin more than fired holds the token that stays open.
    tokens, firing_places = _integrate(hidden_states[None].float(), frame_ends, num_fired + 1)
    tokens = torch.cat([tokens[0, :1] + state.partial_token, tokens[0, 1:]])
    next_state = CifStreamState(
        partial_token=tokens[num_fired],
        partial_weight=total - num_fired,
        num_frames=state.num_frames + alphas.shape[0],
    )
    return tokens[:num_fired].to(hidden_states.dtype), firing_places[0, :num_fired] + state.num_frames, next_state


def flush_stream(state: CifStreamState):
    """End a stream: a residue of at least 0.5 fires once more, divided by its weight.

    Returns:
        `tuple`: tokens of shape (1, C) and places of shape (1,), or (0, C) and (0,) when the residue is smaller.
    """
    fires = int(state.partial_weight >= 0.5)
    token = state.partial_token[None] / max(state.partial_weight, 0.5)
    place = token.new_full((1,), float(state.num_frames))
    return token[:fires], place[:fires]
