"""When each token was said: CIF's running integral read as a clock, and text tokens laid on speech tokens.

Follows arXiv 1905.11235: token u is what the integral gathers between the whole numbers u and u + 1. Leaves out:
grouping tokens to words, which needs a tokenizer (the processor's `word_timestamps`).

Shapes: A clips, T encoder frames, U speech tokens of a clip, J text tokens.
"""

import torch
from torch.nn.functional import pad


def token_times(alphas, num_speech_tokens, frame_starts_s, frame_duration_s: float) -> torch.Tensor:
    """Start and end of every speech token, in seconds from the start of its clip.

    Args:
        alphas (`torch.FloatTensor` of shape (A, T)): unscaled CIF weights, zero at padding.
        num_speech_tokens (`torch.LongTensor` of shape (A,)): tokens that were fired.
        frame_starts_s (`torch.FloatTensor` of shape (T,)): where each frame begins.
        frame_duration_s (`float`).

    Returns:
        (A, U, 2) float32, ascending; NaN past a clip's count.
    """
    integral = pad(alphas.detach().double().cumsum(1), (1, 0))
    # What is said is scaled to the number of tokens; a clip of zeros has nothing to scale.
    scale = num_speech_tokens / integral[:, -1].clamp(min=torch.finfo(integral.dtype).tiny)
    integral = integral * scale[:, None]
    token = torch.arange(int(num_speech_tokens.max()), device=alphas.device)
    bounds = torch.stack([token, token + 1], dim=-1).flatten().double().expand(len(alphas), -1)
    bounds = bounds.minimum(integral[:, -1:]).contiguous()

    frame = torch.searchsorted(integral[:, 1:].contiguous(), bounds)
    before, after = integral.gather(1, frame), integral.gather(1, frame + 1)
    into_frame = ((bounds - before) / (after - before).clamp(min=torch.finfo(integral.dtype).tiny)).clamp(0, 1)
    times = frame_starts_s.to(integral)[frame] + frame_duration_s * into_frame
    is_token = token < num_speech_tokens[:, None]
    return times.unflatten(1, (-1, 2)).masked_fill(~is_token[..., None], torch.nan).float()


def align(similarity) -> torch.LongTensor:
    """Lay J text tokens on U speech tokens in order, where they are most alike in sum.

    With J <= U every text token has a speech token of its own, and speech tokens may be left over; with J > U every
    speech token has at least one text token, and some share one. Equal counts pair off.

    Args:
        similarity (`torch.FloatTensor` of shape (J, U)).

    Returns:
        (J,): the speech token of each text token, ascending.
    """
    num_text, num_speech = similarity.shape
    shares = num_text > num_speech
    similarity = similarity.double().cpu()
    best = similarity.new_full((num_text, num_speech), -torch.inf)
    came_from = torch.zeros(num_text, num_speech, dtype=torch.long)
    for index, gain in enumerate(similarity):
        if index == 0:
            best[0] = gain
            if shares:
                best[0, 1:] = -torch.inf
            continue
        if shares:  # stay, or go on by one
            moved = pad(best[index - 1, :-1], (1, 0), value=-torch.inf)
            before, is_move = torch.stack([best[index - 1], moved]).max(0)
            source = torch.arange(num_speech) - is_move
        else:  # go on by one or more
            before, source = pad(best[index - 1, :-1], (1, 0), value=-torch.inf).cummax(0)
            source = source - 1
        best[index], came_from[index] = before + gain, source
    place = int(best[-1, -1:].argmax()) + num_speech - 1 if shares else int(best[-1].argmax())
    places = [place]
    for index in range(num_text - 1, 0, -1):
        place = int(came_from[index, place])
        places.append(place)
    return torch.tensor(places[::-1])


def text_token_times(places, times) -> torch.Tensor:
    """Start and end of text tokens from those of the speech tokens that they lie on; those that share one divide it.

    Args:
        places (J,): of [`align`].
        times (U, 2): of one clip, of [`token_times`].

    Returns:
        (J, 2).
    """
    num_sharing = torch.bincount(places, minlength=len(times))[places]
    first = torch.searchsorted(places, places)  # the first text token on the same speech token
    turn = torch.arange(len(places)) - first
    start, end = times[places].unbind(-1)
    step = (end - start) / num_sharing
    return torch.stack([start + turn * step, start + (turn + 1) * step], dim=-1)
