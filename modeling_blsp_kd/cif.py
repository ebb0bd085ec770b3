"""Continuous integrate-and-fire (CIF): turns T weighted frames into U token vectors.

Follows arXiv 1905.11235 with threshold 1; the target-length scaling follows the authors' public code (blsp-emo,
src/modeling_adapter.py at e27b8da). Leaves out: how the weights (alphas) are predicted, see `adapters.py`.

With c_t = alpha_1 + ... + alpha_t, frame t gives token u the overlap of [c_{t-1}, c_t] with [u, u+1]. Sorting the
frame ends c_t together with the whole numbers cuts the integral into at most T + U intervals, each inside exactly one
frame and one token, so the weights are plain differences of neighbours. That holds however many tokens one frame
fires, needs no loop, and gives the exact gradient.
"""

import math
from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable
from torch.linalg import vector_norm
from torch.nn.functional import embedding_bag, pad
from transformers.utils import ModelOutput

from .devices import computes_in_float64


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


def _sum_bags(vectors, index, starts, weights):
    """Weighted sums of neighbouring intervals, row by row.

    Args:
        vectors (B, N, C): what is summed.
        index, weights (B, E): vector and weight of each of E intervals; the sums are in the dtype of the weights.
        starts (B, M): the first interval of each of M bags, which ends where the next begins.

    Returns:
        sums (B, M, C) in the dtype of the vectors.
    """
    if vectors.dtype != weights.dtype:
        sums = vectors.new_empty(*starts.shape, vectors.shape[2])
        for part, *rest in _few_rows_at_a_time(sums, vectors, index, starts, weights):
            part.copy_(_sum_bags(rest[0].to(weights.dtype), *rest[1:]))
        return sums
    return embedding_bag(
        _through_batch(index, vectors.shape[1]),
        vectors.flatten(0, 1),
        _through_batch(starts, index.shape[1]),
        mode="sum",
        per_sample_weights=weights.flatten(),
    ).view(*starts.shape, vectors.shape[2])


def _dot_products(frames, tokens, frame_of, token_of, dtype, are_centred=False):
    """Products of frames with tokens, interval by interval.

    Args:
        frames (B, T, C), tokens (B, U, C).
        frame_of, token_of (B, E): which frame and which token, for each of E intervals.
        dtype: to compute in.
        are_centred: take off the frames of a row what they have in common, by a sample of them.

    Returns:
        the products (B, E).
    """
    if frames.dtype != dtype or are_centred:
        products = torch.empty(frame_of.shape, dtype=dtype, device=frames.device)
        for part, rows, *rest in _few_rows_at_a_time(products, frames, tokens, frame_of, token_of):
            rows, (tokens_of_rows, *intervals) = rows.to(dtype), rest
            if are_centred:
                sample = _through_batch(intervals[0][:, ::16], rows.shape[1])
                rows = rows - embedding_bag(sample.view(len(rows), -1), rows.flatten(0, 1), mode="mean")[:, None]
            part.copy_(_dot_products(rows, tokens_of_rows.to(dtype), *intervals, dtype))
        return products
    frame, token = _through_batch(frame_of, frames.shape[1]), _through_batch(token_of, tokens.shape[1])
    # What autograd itself calls for `embedding_bag`. All else gathers one side first, which costs several times the
    # frames in time and memory. With the bag of each interval at hand, it takes no bag starts.
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        tokens.flatten(0, 1), frames.flatten(0, 1), frame, token[:0], token, 0
    ).view_as(frame_of)


def _through_batch(index, row_length: int):
    """(B, E) numbers within rows -> (B * E,) numbers through the batch, in which a row has `row_length` of them."""
    if index.shape[0] == 1:
        return index[0]  # the time of a single clip goes into the number of operations
    first = torch.arange(0, index.shape[0] * row_length, row_length, device=index.device)
    return (index + first[:, None]).flatten()


def _few_rows_at_a_time(*tensors):
    """For rows that are computed with in float32, or centred: without such a copy of all of them at once."""
    return zip(*(tensor.chunk(8) for tensor in tensors))


class _Integral(torch.autograd.Function):
    """The integral of the frames over each token.

    The gradient of a frame is the same kind of sum over the tokens that it gave to, and that of a frame's end is how
    much it matters which of two intervals gets more. So either direction reads and writes every frame once, and nothing
    as large as the frames is made but their gradient. (Half-precision frames are converted a few rows at a time, and so
    are frames centred, for the alphas' gradient; that comes first, when the frames' gradient is not there yet.) Small
    clips spend their time on the number of operations, which is why the alphas' gradient is written out too.
    """

    @staticmethod
    def forward(ctx, frames, alphas, frame_ends, closing_frame, alpha_sum, frame_mask, unreadable, are_centred):
        """
        Args:
            alphas (B, T), alpha_sum (B,) or None: see `_integrate`; read by backward only.
            frames (B, T, C), frame_ends (B, T + 1), frame_mask (B, T), unreadable (B,), are_centred: see `_integrate`.
            closing_frame (B, U): the frame that completes each token; T where none does.

        Returns:
            tokens (B, U, C) in the dtype of the frames.
        """
        (batch_size, num_frames, _), num_tokens = frames.shape, closing_frame.shape[1]
        # Every frame end and every whole number ends one interval. Of equals, the whole number comes first.
        interval = torch.arange(num_frames + num_tokens, device=frames.device)
        token_starts = pad(closing_frame + interval[1 : num_tokens + 1], (1, 0))
        token_of = torch.zeros(batch_size, len(interval) + 1, dtype=torch.long, device=frames.device)
        token_of = token_of.scatter_(1, token_starts[:, 1:], 1).cumsum(1)[:, :-1]
        frame_of = (interval - token_of).clamp_(max=num_frames - 1)
        interval_ends = torch.minimum(frame_ends.gather(1, frame_of + 1), token_of + 1)
        widths = torch.diff(interval_ends, prepend=frame_ends[:, :1])
        weights = widths.to(torch.promote_types(frames.dtype, torch.float32))
        if frame_mask is not None:
            # A padded frame has weight zero, but zero times inf or NaN would still poison the row. So another frame is
            # read instead, the one that weighs most.
            heaviest = frame_of.gather(1, widths.argmax(1, keepdim=True))
            frame_of = torch.where(frame_mask.gather(1, frame_of), frame_of, heaviest)
        tokens = _sum_bags(frames, frame_of, token_starts[:, :-1], weights)
        if unreadable is not None:
            tokens[unreadable] = 0.0
        ctx.save_for_backward(frames, frame_ends, closing_frame, alpha_sum, frame_mask, weights, frame_of, token_of)
        ctx.alphas_dtype, ctx.are_centred = alphas.dtype, are_centred
        return tokens

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_tokens):
        frames, frame_ends, closing_frame, alpha_sum, frame_mask, weights, frame_of, token_of = ctx.saved_tensors
        (batch_size, num_frames, _), num_tokens = frames.shape, closing_frame.shape[1]
        grad_tokens = grad_tokens.contiguous()
        frame = torch.arange(num_frames + 1, device=frames.device).expand(batch_size, -1).contiguous()
        frame_starts = frame + torch.searchsorted(closing_frame, frame)
        inside = token_of < num_tokens
        token_of = token_of.clamp(max=num_tokens - 1)
        grad_frames = grad_alphas = None
        if ctx.needs_input_grad[1]:
            grad_weights = _dot_products(
                frames, grad_tokens, frame_of, token_of, weights.dtype, ctx.are_centred
            ).double()
            # Past the last frame, or past the last token, nothing is left to give.
            inside &= torch.arange(token_of.shape[1], device=frames.device) < frame_starts[:, -1:]
            grad_weights = pad(torch.where(inside, grad_weights, 0.0), (1, 1))
            # A frame's end lengthens the interval before it and shortens the one that it starts.
            grad_frame_ends = torch.diff(grad_weights).neg_().gather(1, frame_starts)[:, 1:]
            # An alpha moves its own frame's end and all later ones.
            grad_alphas = grad_frame_ends.flip(1).cumsum(1).flip(1)
            if alpha_sum is not None:
                # And the scale of all.
                ends = frame_ends[:, 1:]
                grad_scale = (grad_frame_ends * ends).sum(1, keepdim=True)
                grad_alphas = (grad_alphas * ends[:, -1:] - grad_scale) / alpha_sum[:, None]
            if frame_mask is not None:
                grad_alphas = torch.where(frame_mask, grad_alphas, 0.0)
            grad_alphas = grad_alphas.to(ctx.alphas_dtype)
        if ctx.needs_input_grad[0]:
            grad_frames = _sum_bags(grad_tokens, token_of, frame_starts[:, :-1], weights)
        return grad_frames, grad_alphas, *[None] * 6


def _have_much_in_common(frames):
    """Whether the frames' mean over time outweighs what sets them apart, by a sample of the time; () bool.

    Padding is not left out: it can make a wrong guess, which costs time or digits, but nothing else.
    """
    sample = frames[:, :: max(2, frames.shape[1] // 16)].float()
    return vector_norm(sample.sum(1)) * math.sqrt(2 / sample.shape[1]) > vector_norm(sample)


def _integrate(
    hidden_states,
    alphas,
    integral,
    num_tokens,
    start=0.0,
    alpha_sum=None,
    frame_mask=None,
    unreadable=None,
    are_centred=False,
):
    """Integrate frames between whole numbers.

    Args:
        hidden_states (B, T, C), alphas (B, T): what gradients are given to.
        integral (B, T), float64: the integral after every frame. It does not fall, and ends at `num_tokens` at most.
        num_tokens: U, how many whole-number bins to fill.
        start: the integral before the first frame.
        alpha_sum (B,), optional: what was scaled to a whole number in the integral; infinite for nothing. Omitted, the
            integral is not scaled.
        frame_mask (B, T) bool, optional: frames that may be read. The others add nothing to the integral.
        unreadable (B,) bool, optional: rows with no such frame, if there are any. Their tokens are zero.
        are_centred: compute the alphas' gradient from what sets the frames of a row apart. That takes longer, but what
            all have in common then adds no error. Only if scaled: then alphas do not matter to that.

    Returns:
        tokens (B, U, C) in the dtype of the frames, summed in float32 (float64 if they are); firing places (B, U),
        float64, which mean nothing where a token stays open.
    """
    bin_ends = torch.arange(1, num_tokens + 1, dtype=integral.dtype, device=integral.device)
    bin_ends = bin_ends.expand(hidden_states.shape[0], -1).contiguous()
    closing_frame = torch.searchsorted(integral, bin_ends)
    frame_ends = pad(integral, (1, 0), value=start)
    tokens = _Integral.apply(
        hidden_states, alphas, frame_ends, closing_frame, alpha_sum, frame_mask, unreadable, are_centred
    )

    frame = closing_frame.clamp(max=hidden_states.shape[1] - 1)
    before, after = frame_ends.gather(1, frame), integral.gather(1, frame)
    return tokens, frame + (bin_ends - before) / (after - before)


@computes_in_float64
def continuous_integrate_and_fire(hidden_states, alphas, frame_mask=None, target_lengths=None) -> CifOutput:
    """Integrate whole utterances and fire a fixed number of tokens from each.

    The alphas of each row are scaled so that they sum to its token count exactly: `target_lengths` (training), or
    max(1, round(sum of alphas)) (inference). Rows do not see each other, nor their padding. Rows whose alphas are
    all zero have nothing to integrate and give zero vectors. For devices without float64, the CPU does it.

    Args:
        hidden_states (`torch.FloatTensor` of shape (B, T, C)): B batch, T frames, C channels. Any float dtype; sums
            are float32 at least.
        alphas (`torch.FloatTensor` of shape (B, T)): weight of each frame, not negative.
        frame_mask (`torch.BoolTensor` of shape (B, T), *optional*): True at valid frames. Omitted: all.
        target_lengths (`torch.LongTensor` of shape (B,), *optional*): token counts U, at least 1 each.

    Returns:
        [`CifOutput`]; differentiable with respect to `hidden_states` and `alphas`.

    Raises:
        ValueError: shapes do not fit together, there is no frame, or a count cannot be predicted from NaN or inf.
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
        frame_mask = frame_mask.bool()
    # float64 costs nothing on (B, T) scalars and keeps a boundary exact after thousands of frames.
    exact_alphas = (alphas if frame_mask is None else torch.where(frame_mask, alphas, 0.0)).double()
    alpha_sum = exact_alphas.sum(1)
    if target_lengths is None:
        num_speech_tokens = alpha_sum.detach().round().clamp(min=1).long()
    else:
        if target_lengths.shape != alpha_sum.shape:
            raise ValueError(
                f"Expected one target length per row, shape {tuple(alpha_sum.shape)}, but got "
                f"{tuple(target_lengths.shape)}."
            )
        num_speech_tokens = target_lengths.long()
    is_empty = alpha_sum == 0
    # The one wait for the device.
    facts = [*torch.aminmax(num_speech_tokens), is_empty.any()]
    if alphas.requires_grad:
        facts.append(_have_much_in_common(hidden_states.detach()))
    min_tokens, max_tokens, some_empty, *are_centred = torch.stack(facts).tolist()
    if min_tokens < 1:
        if target_lengths is None:
            raise ValueError(f"Expected finite alphas, but their sums are {alpha_sum.tolist()}.")
        raise ValueError(f"Target lengths must be at least 1, but got {target_lengths.tolist()}.")

    integral = exact_alphas.detach().cumsum(1)
    unscaled_sum = integral[:, -1].masked_fill(is_empty, torch.inf)
    # Divided first: x / x is exactly 1, so rounding neither leaves the last token open nor opens one more. An empty row
    # stays empty.
    integral = integral / unscaled_sum[:, None] * num_speech_tokens[:, None]
    speech_tokens, firing_places = _integrate(
        hidden_states,
        alphas,
        integral,
        max_tokens,
        alpha_sum=unscaled_sum,
        frame_mask=frame_mask,
        unreadable=is_empty if some_empty and frame_mask is not None else None,
        are_centred=any(are_centred),
    )
    is_token = torch.arange(max_tokens, device=alphas.device) < num_speech_tokens[:, None]
    return CifOutput(
        speech_tokens=speech_tokens,
        num_speech_tokens=num_speech_tokens,
        alpha_sum=alpha_sum.float(),
        firing_places=torch.where(is_token, firing_places, -1.0).float(),
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


@computes_in_float64
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
    sum_dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    if state is None:
        state = CifStreamState(partial_token=hidden_states.new_zeros(hidden_states.shape[1], dtype=sum_dtype))
    if alphas.shape[0] == 0:
        return hidden_states[:0], alphas[:0].float(), state
    integral = alphas[None].detach().double().cumsum(1) + state.partial_weight
    total = float(integral[0, -1])
    num_fired = int(total)
    # One bin more than fired holds the token that stays open.
    tokens, firing_places = _integrate(
        hidden_states[None].to(sum_dtype), alphas[None], integral, num_fired + 1, start=state.partial_weight
    )
    tokens = torch.cat([tokens[0, :1] + state.partial_token, tokens[0, 1:]])
    next_state = CifStreamState(
        partial_token=tokens[num_fired],
        partial_weight=total - num_fired,
        num_frames=state.num_frames + alphas.shape[0],
    )
    firing_places = firing_places[0, :num_fired] + state.num_frames
    return tokens[:num_fired].to(hidden_states.dtype), firing_places.float(), next_state


def flush_stream(state: CifStreamState):
    """End a stream: a residue of at least 0.5 fires once more, divided by its weight.

    Returns:
        `tuple`: tokens of shape (1, C) and places of shape (1,), or (0, C) and (0,) when the residue is smaller.
    """
    fires = int(state.partial_weight >= 0.5)
    token = state.partial_token[None] / max(state.partial_weight, 0.5)
    place = token.new_full((1,), float(state.num_frames))
    return token[:fires], place[:fires]
