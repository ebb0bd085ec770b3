"""Attention limited to blocks, so that what follows a block of frames does not change it.

Frames attend to all frames of their own block and to a left context before it, as in U2++ (arXiv 2106.05642). With a
look-ahead a block also sees copies of the frames after it, as in Emformer (arXiv 2010.10759): only that block sees
them, so the look-ahead does not grow with the number of layers. Leaves out: blocks that arrive one by one.

Shapes: W windows of clips, T frames, T' = T and the copies, H width.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.masking_utils import create_bidirectional_mask


@dataclass(frozen=True)
class Blocks:
    """Divides frames into blocks, counted from the start of a window; all in frames.

    Args:
        chunk (`int`): length of a block.
        left_context (`int`, *optional*): frames before its block that a frame sees. Omitted: all of the window.
        look_ahead (`int`): frames after its block that a frame sees.
    """

    chunk: int
    left_context: int | None = None
    look_ahead: int = 0

    def joined(self, stride: int) -> "Blocks":
        """Return the blocks of frames that are joined `stride` to one, without look-ahead."""
        left_context = None if self.left_context is None else self.left_context // stride
        return Blocks(self.chunk // stride, left_context)

    def copied_frames(self, num_frames: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return which frames are copied, and the block that sees each copy: twice (T' - T,).

        Copies of frames past the last one are numbered T and more.
        """
        block = torch.arange((num_frames - 1) // self.chunk, device=device)  # the last one has nothing after it
        copies = (block[:, None] + 1) * self.chunk + torch.arange(self.look_ahead, device=device)
        return copies.flatten(), block.repeat_interleave(self.look_ahead)

    def check_outputs(self, wanted: Iterable[str]):
        """Raise an error if hidden states or attentions are wanted, among which the copies for look-ahead would be."""
        if self.look_ahead and (names := sorted(wanted)):
            raise ValueError(f"{names} cannot be given with streaming['look_ahead_ms'] > 0. Set it to 0 for them.")

    def is_visible(self, num_frames: int, device: torch.device) -> torch.BoolTensor:
        """Return which frames and copies (the second axis) each of them attends to: (T', T')."""
        frame = torch.arange(num_frames, device=device)
        copies, block_of_copy = self.copied_frames(num_frames, device)
        block = torch.cat([frame // self.chunk, block_of_copy])
        place = torch.cat([frame, copies])
        is_copy = torch.arange(len(block), device=device) >= num_frames
        is_seen = place < (block[:, None] + 1) * self.chunk
        if self.left_context is not None:
            is_seen &= place >= block[:, None] * self.chunk - self.left_context
        return torch.where(is_copy, (block == block[:, None]) & (place < num_frames), is_seen)


# Every token is its own block and sees all before it.
CAUSAL = Blocks(chunk=1)


def with_attention_mask(
    config: Any, hidden_states: torch.Tensor, mask: torch.Tensor, blocks: Blocks | None = None
) -> tuple[torch.Tensor, Any]:
    """Return what layers take: frames, with copies after them where blocks look ahead, and their attention mask.

    Args:
        config (`PreTrainedConfig`): of the layers; it names their implementation of attention.
        hidden_states (W, T, H), mask (W, T) bool: frames, and which of them are valid.
        blocks ([`Blocks`], *optional*): omitted, frames attend to all valid frames of their window.

    Returns:
        `tuple`: frames (W, T', H), of which the first T are those given, and the mask in the form that the
        implementation takes.

    Raises:
        ValueError: the implementation takes no mask of blocks.
    """
    if blocks is None:
        return hidden_states, create_bidirectional_mask(config, hidden_states, mask)
    check_attention(config)
    num_frames, device = hidden_states.shape[1], hidden_states.device
    copies, _ = blocks.copied_frames(num_frames, device)
    copies = copies.clamp(max=num_frames - 1)
    hidden_states = torch.cat([hidden_states, hidden_states[:, copies]], dim=1)
    mask = torch.cat([mask, mask[:, copies]], dim=1)
    # Padding may see nothing else, and softmax over nothing is NaN. It sees itself, and nobody reads it.
    is_itself = torch.eye(hidden_states.shape[1], dtype=torch.bool, device=device)
    visible = blocks.is_visible(num_frames, device) & mask[:, None] | is_itself
    attention_mask = create_bidirectional_mask(
        config, hidden_states, None, and_mask_function=lambda row, head, query, key: visible[row, query, key]
    )
    return hidden_states, attention_mask


def check_attention(config: Any):
    """Raise an error if layers use an implementation of attention that takes no mask of blocks."""
    if "flash" in str(config._attn_implementation):
        raise ValueError(
            f"A streaming model limits attention to blocks, which {config._attn_implementation!r} cannot do. Load it "
            "with attn_implementation='sdpa'."
        )
