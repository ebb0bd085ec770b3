"""CIF's integral of frames between whole numbers, with its gradient: a fused kernel out of torch's own operations.

Follows `cif.py`, which defines what is computed: frame t gives token u the overlap of [c_{t-1}, c_t] with [u, u+1],
where c_t = alpha_1 + ... + alpha_t. Sorting the frame ends c_t together with the whole numbers cuts the integral into
at most T + U intervals, each inside exactly one frame and one token, so the weights are plain differences of
neighbours. That holds however many tokens one frame fires, needs no loop, and gives the exact gradient. Leaves out: how
many tokens there are (`cif.py`, `cif_streaming.py`).

Shapes: B clips, T frames, U tokens, C channels, E = T + U intervals.
"""

import math

import torch
from torch.autograd.function import once_differentiable
from torch.linalg import vector_norm
from torch.nn.functional import embedding_bag, pad


def _sum_bags(vectors, index, starts, weights):
    """Sum the weighted vectors of neighbouring intervals, row by row.

    Args:
        vectors (B, N, C): what is summed.
        index, weights (B, E): vector and weight of each of E intervals; the sums are in the dtype of the weights.
        starts (B, M): the first interval of each of M bags, which ends where the next begins.

    Returns:
        (B, M, C): the sums, in the dtype of the vectors.
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
    """Multiply frames with tokens, interval by interval.

    Args:
        frames (B, T, C), tokens (B, U, C).
        frame_of, token_of (B, E): which frame and which token, for each of E intervals.
        dtype: to compute in.
        are_centred: subtract from the frames of a row their mean, estimated from a sample of them.

    Returns:
        (B, E): the dot products.
    """
    if frames.dtype != dtype or are_centred:
        products = torch.empty(frame_of.shape, dtype=dtype, device=frames.device)
        chunks = _few_rows_at_a_time(products, frames, tokens, frame_of, token_of)
        for part, rows, tokens_of_rows, frame_of_rows, token_of_rows in chunks:
            rows = rows.to(dtype)
            if are_centred:
                sample = _through_batch(frame_of_rows[:, ::16], rows.shape[1])
                rows = rows - embedding_bag(sample.view(len(rows), -1), rows.flatten(0, 1), mode="mean")[:, None]
            part.copy_(_dot_products(rows, tokens_of_rows.to(dtype), frame_of_rows, token_of_rows, dtype))
        return products
    frame, token = _through_batch(frame_of, frames.shape[1]), _through_batch(token_of, tokens.shape[1])
    # Autograd calls this for `embedding_bag`. Any other way gathers frames or tokens per interval first, which costs
    # several times the frames in time and memory. We pass the bag of each interval, so it needs no bag starts.
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        tokens.flatten(0, 1), frames.flatten(0, 1), frame, token[:0], token, 0
    ).view_as(frame_of)


def _through_batch(index, row_length: int):
    """Turn indices within rows, (B, E), into indices of the flattened batch, (B * E,); rows are `row_length` long."""
    if index.shape[0] == 1:
        return index[0]  # for a single clip the number of operations decides the time
    first = torch.arange(0, index.shape[0] * row_length, row_length, device=index.device)
    return (index + first[:, None]).flatten()


def _few_rows_at_a_time(*tensors):
    """Split into chunks of rows, so that only one chunk at a time is copied to float32 (or centred)."""
    return zip(*(tensor.chunk(8) for tensor in tensors))


class _Integral(torch.autograd.Function):
    """Integrate the frames over each token.

    The gradient of a frame is again a weighted sum, over the tokens that the frame contributed to. The gradient of a
    frame's end is the difference between the two intervals that it separates. So forward and backward each read and
    write every frame once, and only the frames' gradient is as large as the frames. Half-precision frames are converted
    a few rows at a time. So are centred frames, which the alphas' gradient needs; that gradient is computed first,
    while the frames' gradient does not exist yet. For small clips the number of operations decides the time, which is
    why the alphas' gradient is written out too.
    """

    @staticmethod
    def forward(ctx, frames, alphas, frame_ends, closing_frame, alpha_sum, frame_mask, unreadable, are_centred):
        """
        Args:
            alphas (B, T), alpha_sum (B,) or None: see [`integrate`]; only backward reads them.
            frames (B, T, C), frame_ends (B, T + 1), frame_mask (B, T), unreadable (B,), are_centred: see [`integrate`].
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
            # A padded frame has weight zero, but zero times inf or NaN would still poison the row. So the frame that
            # weighs most is read instead.
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
            # Intervals past the last frame or past the last token have no gradient.
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


def have_much_in_common(frames: torch.Tensor) -> bool:
    """Tell whether the frames' mean over time is larger than their deviation from it, estimated from a sample; () bool.

    The sample includes padding. That can make the guess wrong, which costs time or digits but nothing else.
    """
    sample = frames[:, :: max(2, frames.shape[1] // 16)].float()
    return vector_norm(sample.sum(1)) * math.sqrt(2 / sample.shape[1]) > vector_norm(sample)


def integrate(
    hidden_states: torch.Tensor,
    alphas: torch.Tensor,
    integral: torch.Tensor,
    num_tokens: int,
    start: float = 0.0,
    alpha_sum: torch.Tensor | None = None,
    frame_mask: torch.Tensor | None = None,
    unreadable: torch.Tensor | None = None,
    are_centred: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Integrate frames between whole numbers.

    Args:
        hidden_states (B, T, C), alphas (B, T): these receive gradients.
        integral (B, T), float64: the integral after every frame. It never falls, and ends at `num_tokens` at most.
        num_tokens: U, how many whole-number bins to fill.
        start: the integral before the first frame.
        alpha_sum (B,), optional: the sum of the alphas, which the integral scaled to a whole number; infinite for rows
            without weight. Omitted, the integral is not scaled.
        frame_mask (B, T) bool, optional: frames that may be read. The others add nothing to the integral.
        unreadable (B,) bool, optional: rows with no such frame, if there are any. Their tokens are zero.
        are_centred: compute the alphas' gradient from the frames minus their mean. That takes longer, but then a large
            mean adds no rounding error. Only for scaled integrals, in which the mean does not depend on the alphas.

    Returns:
        `tuple`: tokens (B, U, C) in the dtype of the frames, summed in float32 (float64 if they are); and firing places
        (B, U), float64, meaningless where a token stays open.
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
