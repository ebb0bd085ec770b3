"""Continuous integrate-and-fire beside torch_cif and the floor: every input touched once, every output written once.

Sizes are a batch B of clips of T frames (50 per second) and C channels, and 3.3 tokens per second. Leaves out: how
right it is (`tests/test_cif.py`).
"""

import torch

from modeling_blsp_kd.cif import continuous_integrate_and_fire
from modeling_blsp_kd.cif_streaming import stream_integrate_and_fire

from .measure import OURS, Case, peer

SIZES = [(1, 500, 384), (8, 1500, 768), (16, 1500, 1280)]
SMALL_SIZES = [(1, 40, 8), (2, 60, 16)]


def cases(small: bool, device, dtype):
    torch_cif, why_not = peer("torch_cif", "cif_function")
    for size in SMALL_SIZES if small else SIZES:
        for backward in (True, False):
            yield _case(size, backward, torch_cif, why_not, device, dtype)
    # Then the alphas' gradient is computed from centred frames.
    yield _case((SMALL_SIZES if small else SIZES)[1], True, torch_cif, why_not, device, dtype, mean=100.0)
    num_frames, batch_sizes = (20, (1, 2)) if small else (250, (1, 2, 4, 8, 16))
    for batch_size in batch_sizes:
        yield _case((batch_size, num_frames, 384), True, None, None, device, dtype, ("B", batch_size))
    for num_frames in (20, 40) if small else (250, 500, 1000, 2000, 4000):
        yield _case((4, num_frames, 384), True, None, None, device, dtype, ("T", num_frames))
    yield _stream_case(200 if small else 30_000, device, dtype)


def _case(size, backward, torch_cif, why_not, device, dtype, sweep=None, mean=0.0) -> Case:
    batch_size, num_frames, num_channels = size
    num_tokens = max(1, num_frames // 15)
    frames = (torch.randn(size, device=device, dtype=dtype) + mean).requires_grad_(backward)
    # Below 1, as torch_cif wants them even after scaling.
    alphas = (torch.rand(size[:2], device=device) * 2 * num_tokens / num_frames).requires_grad_(backward)
    # Clips from 4/5 of the frames to all of them.
    lengths = torch.linspace(0.8 * num_frames, num_frames, batch_size, device=device).round()
    mask = torch.arange(num_frames, device=device) < lengths[:, None]
    targets = torch.full((batch_size,), num_tokens, device=device)
    direction = torch.randn(batch_size, num_tokens, num_channels, device=device, dtype=dtype)

    def with_gradients(tokens):
        return lambda: torch.autograd.grad(tokens(), (frames, alphas), direction)

    def ours():
        return continuous_integrate_and_fire(frames, alphas, mask, targets).speech_tokens

    def theirs():
        return torch_cif(frames, alphas, padding_mask=~mask, target_lengths=targets)["cif_out"][0]

    def floor():
        outputs = [frames.detach().sum(), torch.ones_like(direction)]
        return [*outputs, torch.ones_like(frames, requires_grad=False)] if backward else outputs

    candidates = {OURS: with_gradients(ours) if backward else ours}
    if torch_cif is not None:
        candidates["torch_cif"] = with_gradients(theirs) if backward else theirs
    return Case(
        name=f"{'forward + backward' if backward else 'forward'} {size}{f', mean {mean:g}' if mean else ''}",
        candidates={**candidates, "read and write floor": floor},
        memory_unit=("input", frames.numel() * frames.element_size()),
        sweep=sweep,
        missing={} if why_not is None else {"torch_cif": why_not},
    )


def _stream_case(num_frames: int, device, dtype) -> Case:
    frames = torch.randn(num_frames, 384, device=device, dtype=dtype)
    alphas = torch.full((num_frames,), 0.07, device=device)
    late = stream_integrate_and_fire(frames, alphas)[2]
    early = stream_integrate_and_fire(frames[:10], alphas[:10])[2]
    return Case(
        name="one more frame of a stream",
        candidates={
            OURS: lambda: stream_integrate_and_fire(frames[:1], alphas[:1], early),
            f"{OURS} after {num_frames} frames": lambda: stream_integrate_and_fire(frames[:1], alphas[:1], late),
        },
        memory_unit=("frame", frames[0].numel() * frames.element_size()),
    )
