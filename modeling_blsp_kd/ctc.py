"""An auxiliary CTC loss on the frames before CIF, for training only.

CIF learns where tokens end from nothing but their number. CTC (Graves et al., 2006) aligns the frames with the
transcript's characters, as in CIF's own training (arXiv 1905.11235), so the frames know earlier what was said where.
The characters are the UTF-8 bytes of the lower-cased transcript, which need no vocabulary and suit every language.
Leaves out: the head itself, which is part of the CFormer, and dropping it, see `publishing`.

Shapes: N clips, T joined frames, S bytes of the longest transcript.
"""

import torch
from torch import nn

BLANK = 0
NUM_CTC_CLASSES = 1 + 256  # the blank, then each byte
NO_BYTE = -1  # padding of the targets
# What the names of the head's weights begin with. A checkpoint may have them or not, as training went on.
CTC_HEAD = "adapter.ctc_head."


def ctc_loss(
    logits: torch.Tensor, num_frames: torch.Tensor, transcript_bytes: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the negative log-likelihood of the transcripts per byte, summed over clips, and how many clips count.

    A clip with too few frames for its transcript has no alignment. It adds nothing, and does not count. CTC needs a
    frame for each byte, and another between two that are equal.

    Args:
        logits (`torch.FloatTensor` of shape (N, T, 257)): of the blank, and of each byte.
        num_frames (`torch.LongTensor` of shape (N,)): valid ones of the T frames.
        transcript_bytes (`torch.LongTensor` of shape (N, S)): 0 to 255; -1 at padding.

    Returns:
        `tuple`: float32 scalar in nats, and the number of clips that have an alignment, a `torch.LongTensor`. No clip
        gives a 0 that still has a graph.
    """
    is_byte = transcript_bytes != NO_BYTE
    num_bytes = is_byte.sum(1)
    repeats = ((transcript_bytes[:, 1:] == transcript_bytes[:, :-1]) & is_byte[:, 1:]).sum(1)
    has_alignment = (num_bytes > 0) & (num_frames >= num_bytes + repeats)
    logits, num_frames, num_bytes = logits[has_alignment], num_frames[has_alignment], num_bytes[has_alignment]
    if len(logits) == 0:
        return logits.float().sum(), has_alignment.sum()
    targets = transcript_bytes[has_alignment] + 1
    log_probs = logits.float().log_softmax(-1).transpose(0, 1)
    losses = nn.functional.ctc_loss(log_probs, targets, num_frames, num_bytes, blank=BLANK, reduction="none")
    return (losses / num_bytes).sum(), has_alignment.sum()
