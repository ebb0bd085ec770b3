"""CIF that fires at the threshold: a token is the same however the clip goes on, so frames may still arrive.

Follows arXiv 1905.11235 with threshold 1. Nothing is scaled, since the sum of the weights is not known before the end,
where a residue of at least 0.5 fires once more, divided by its weight. So a clip has max(1, round(sum)) tokens, as many
as with scaling. Leaves out: scaling to a number of tokens, see `cif.py`.

Shapes: B clips, T frames of a clip or of a chunk, U tokens that they complete, C channels.
"""

from dataclasses import dataclass

import torch

from .cif import CifOutput
from .cif_integral import integrate
from .devices import computes_in_float64


@computes_in_float64
def integrate_and_fire_at_threshold(
    hidden_states: torch.Tensor, alphas: torch.Tensor, frame_mask: torch.Tensor
) -> CifOutput:
    """Integrate whole utterances without scaling.

    Args:
        hidden_states (`torch.FloatTensor` of shape (B, T, C)): frames.
        alphas (`torch.FloatTensor` of shape (B, T)): their weights, not negative.
        frame_mask (`torch.BoolTensor` of shape (B, T)): True at valid frames.

    Returns:
        [`CifOutput`]; a residue that fires is complete at the end of its clip.

    Raises:
        ValueError: the weights are not finite.
    """
    integral = torch.where(frame_mask, alphas, 0.0).double().cumsum(1)
    alpha_sum = integral[:, -1]
    if not bool(alpha_sum.isfinite().all()):
        raise ValueError(f"Expected finite alphas, but their sums are {alpha_sum.tolist()}.")
    num_whole = alpha_sum.detach().floor()
    residue = alpha_sum - num_whole
    fires = (residue >= 0.5) | (num_whole == 0)
    num_speech_tokens = (num_whole + fires).long()
    # One bin more than fired holds the token that stays open.
    speech_tokens, firing_places = integrate(
        hidden_states,
        alphas,
        integral.detach(),
        int(num_whole.max()) + 1,
        frame_mask=frame_mask,
        unreadable=alpha_sum == 0,
    )
    speech_tokens = speech_tokens[:, : int(num_speech_tokens.max())]
    token = torch.arange(speech_tokens.shape[1], device=alphas.device)
    is_residue = fires[:, None] & (token == num_whole[:, None])
    weight = torch.where(is_residue & (residue > 0)[:, None], residue[:, None], 1.0)
    is_token = token < num_speech_tokens[:, None]
    places = torch.where(is_residue, frame_mask.sum(1, keepdim=True), firing_places[:, : len(token)])
    return CifOutput(
        speech_tokens=torch.where(is_token[..., None], (speech_tokens / weight[..., None]), 0.0).to(hidden_states),
        num_speech_tokens=num_speech_tokens,
        alpha_sum=alpha_sum.float(),
        firing_places=torch.where(is_token, places, -1.0).float(),
    )


@dataclass
class CifStreamState:
    """The state of a stream between two chunks: the open token and the place in the stream.

    Args:
        partial_token (`torch.FloatTensor` of shape (C,)): weighted sum of the open token so far.
        partial_weight (`float`): its weight so far, in [0, 1).
        num_frames (`int`): frames seen.
    """

    partial_token: torch.FloatTensor
    partial_weight: float = 0.0
    num_frames: int = 0


@computes_in_float64
def stream_integrate_and_fire(
    hidden_states: torch.Tensor, alphas: torch.Tensor, state: CifStreamState | None = None
) -> tuple[torch.Tensor, torch.Tensor, CifStreamState]:
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
    tokens, firing_places = integrate(
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


def flush_stream(state: CifStreamState, must_fire: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """End a stream: a residue of at least 0.5 fires once more, divided by its weight.

    Args:
        state ([`CifStreamState`]): what the last chunk returned.
        must_fire (`bool`): fire any residue, since nothing has fired in the stream and a clip has at least one token.

    Returns:
        `tuple`: tokens of shape (1, C) and places of shape (1,), or (0, C) and (0,) when the residue is smaller.
    """
    fires = int(state.partial_weight >= 0.5 or must_fire)
    token = state.partial_token[None] / (state.partial_weight or 1.0)
    place = token.new_full((1,), float(state.num_frames))
    return token[:fires], place[:fires]
