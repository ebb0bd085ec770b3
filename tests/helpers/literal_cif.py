"""CIF as it is defined, a loop over frames: what the fast one is compared with."""

import torch


def literal_tokens(frames, alphas, num_tokens):
    """One row, by the definition: integrate frame by frame, split a frame where the integral reaches a whole number."""
    tokens = [torch.zeros(frames.shape[1], dtype=frames.dtype) for _ in range(num_tokens)]
    integral = torch.zeros((), dtype=alphas.dtype)
    for frame, alpha in zip(frames, alphas):
        left = alpha
        while float(left) > 0:
            token = int(torch.floor(integral.detach() + 1e-12))
            if token >= num_tokens:
                break
            room = (token + 1) - integral
            taken = torch.minimum(left, room)
            tokens[token] = tokens[token] + taken * frame
            integral = integral + taken
            left = left - taken
            if float(left) <= 1e-12:
                break
    return torch.stack(tokens)


def literal_cif(frames, alphas, mask, target_lengths):
    """All rows, each on its own, unpadded, in float64."""
    rows = []
    for row_frames, row_alphas, row_mask, target in zip(frames, alphas, mask, target_lengths.tolist()):
        row_frames, row_alphas = row_frames[row_mask], row_alphas[row_mask]
        total = row_alphas.sum()
        scaled = row_alphas * (target / total) if total.item() else row_alphas
        rows.append(literal_tokens(row_frames, scaled, target))
    return rows
