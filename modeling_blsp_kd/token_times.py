"""When each token was said: CIF's running integral read as a clock, and text tokens laid on speech tokens.

Follows arXiv 1905.11235: token u is what the integral gathers between the whole numbers u and u + 1. Read like that,
times are biased (arXiv 2301.12343): a token is complete only some time after it was said, and silence gathers weight
too. Leaves out: grouping tokens to words, which needs a tokenizer (the processor's `word_timestamps`).

Shapes: A clips, T encoder frames, U speech tokens of a clip, J text tokens.
"""

import torch
from torch.nn.functional import pad


def token_times(
    alphas, num_speech_tokens, is_silent, frame_starts_s, frame_duration_s: float, delay_s: float
) -> torch.Tensor:
    """Start and end of every speech token, in seconds from the start of its clip.

    What CIF gathers at one time was said `delay_s` before, and nothing is said in silence. So a token that ends at a
    pause ends where it begins, and the next one begins where the pause ends.

    Args:
        alphas (`torch.FloatTensor` of shape (A, T)): unscaled CIF weights, zero at padding.
        num_speech_tokens (`torch.LongTensor` of shape (A,)): tokens that were fired.
        is_silent (`torch.BoolTensor` of shape (A, T)): True where nothing is said, padding included.
        frame_starts_s (`torch.FloatTensor` of shape (T,)): where each frame begins.
        frame_duration_s (`float`).
        delay_s (`float`): how long after the words CIF gathers their weight.

    Returns:
        (A, U, 2) float32, ascending; NaN past a clip's count.
    """
    tiny = torch.finfo(torch.float64).tiny
    num_frames = alphas.shape[1]
    integral = pad(alphas.detach().double().cumsum(1), (1, 0))
    # The integral up to the edges of frames that lie `delay_s` later, between which it is a straight line.
    edge = torch.arange(num_frames + 1, device=alphas.device) + delay_s / frame_duration_s
    edge = edge.double().clamp(0, num_frames)
    frame = edge.long().clamp(max=num_frames - 1)
    integral = torch.lerp(integral[:, frame], integral[:, frame + 1], edge - frame)
    said = integral.diff(dim=1).masked_fill(is_silent, 0.0)
    # Of a clip that is shorter than the delay nothing is left; its tokens share the sound evenly.
    said = torch.where(said.sum(1, keepdim=True) > 0, said, (~is_silent).double())
    integral = pad(said.cumsum(1), (1, 0))
    integral = integral * (num_speech_tokens / integral[:, -1])[:, None]

    token = torch.arange(int(num_speech_tokens.max()), device=alphas.device)
    bounds = torch.stack([token, token + 1]).double().expand(len(alphas), -1, -1)
    # Rounding must not put the end of the last token past the integral's own.
    starts, ends = bounds.minimum(integral[:, -1:, None]).transpose(0, 1).contiguous()
    frame_ends = integral[:, 1:].contiguous()
    # Where the integral rests, a token ends at the first place and the next one begins at the last.
    frames = torch.stack([torch.searchsorted(frame_ends, starts, right=True), torch.searchsorted(frame_ends, ends)], -1)
    frames = frames.clamp(max=num_frames - 1)
    before, after = (integral.gather(1, (frames + step).flatten(1)).view(frames.shape) for step in (0, 1))
    into_frame = ((torch.stack([starts, ends], -1) - before) / (after - before).clamp(min=tiny)).clamp(0, 1)
    times = frame_starts_s.to(integral)[frames] + frame_duration_s * into_frame
    is_token = token < num_speech_tokens[:, None]
    return times.masked_fill(~is_token[..., None], torch.nan).float()


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
