"""Continuous integrate-and-fire (CIF): turns T weighted frames into U token vectors.

Follows arXiv 1905.11235 with threshold 1; the target-length scaling follows the authors' public code (blsp-emo,
src/modeling_adapter.py at e27b8da). Leaves out: how the weights (alphas) are predicted, see `adapters.py`; the integral
itself, see `cif_integral.py`; and firing without scaling, see `cif_streaming.py`.

With c_t = alpha_1 + ... + alpha_t, frame t gives token u the overlap of [c_{t-1}, c_t] with [u, u+1].
"""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput

from .cif_integral import have_much_in_common, integrate
from .devices import computes_in_float64


@dataclass
class CifOutput(ModelOutput):
    """The output of `continuous_integrate_and_fire`. B clips, U largest token count, C channels.

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


@computes_in_float64
def continuous_integrate_and_fire(
    hidden_states: torch.Tensor,
    alphas: torch.Tensor,
    frame_mask: torch.Tensor | None = None,
    target_lengths: torch.Tensor | None = None,
) -> CifOutput:
    """Integrate whole utterances and fire a fixed number of tokens from each.

    The alphas of each row are scaled so that they sum to its token count exactly: `target_lengths` (training), or
    max(1, round(sum of alphas)) (inference). Rows do not see each other, nor their padding. Rows whose alphas are
    all zero have nothing to integrate and give zero vectors. For devices without float64, the CPU does it.

    Args:
        hidden_states (`torch.FloatTensor` of shape (B, T, C)): B clips, T frames, C channels. Any float dtype; sums
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
    # All that Python has to know, in the only wait for the device.
    facts = [*torch.aminmax(num_speech_tokens), is_empty.any()]
    if alphas.requires_grad:
        facts.append(have_much_in_common(hidden_states.detach()))
    min_tokens, max_tokens, some_empty, *are_centred = torch.stack(facts).tolist()
    if min_tokens < 1:
        if target_lengths is None:
            raise ValueError(f"Expected finite alphas, but their sums are {alpha_sum.tolist()}.")
        raise ValueError(f"Target lengths must be at least 1, but got {target_lengths.tolist()}.")

    integral = exact_alphas.detach().cumsum(1)
    unscaled_sum = integral[:, -1].masked_fill(is_empty, torch.inf)
    # Divide first: x / x is exactly 1, so rounding neither leaves the last token open nor opens one more. An empty row
    # stays empty.
    integral = integral / unscaled_sum[:, None] * num_speech_tokens[:, None]
    speech_tokens, firing_places = integrate(
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
