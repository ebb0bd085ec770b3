"""Streaming CIF: fires tokens while frames arrive, for clips that are not over yet.

Follows arXiv 1905.11235 with threshold 1. Nothing is scaled, since the sum of the weights is not known before the end.
Leaves out: whole clips, see `cif.py`; and encoders that stream, so `BlspKdForCausalLM` does not use it.

Shapes: T frames of a chunk, U tokens that it completes, C channels.
"""

from dataclasses import dataclass

import torch

from .cif_integral import integrate
from .devices import computes_in_float64


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


def flush_stream(state: CifStreamState) -> tuple[torch.Tensor, torch.Tensor]:
    """End a stream: a residue of at least 0.5 fires once more, divided by its weight.

    Returns:
        `tuple`: tokens of shape (1, C) and places of shape (1,), or (0, C) and (0,) when the residue is smaller.
    """
    fires = int(state.partial_weight >= 0.5)
    token = state.partial_token[None] / max(state.partial_weight, 0.5)
    place = token.new_full((1,), float(state.num_frames))
    return token[:fires], place[:fires]
