"""Times of tokens: CIF's running integral read as a clock that stops in silence, and text tokens aligned to speech.

Follows arXiv 1905.11235: token u is what the integral gathers between the whole numbers u and u + 1. Read like that,
times are biased (arXiv 2301.12343): a token is complete only some time after it was said, and silence gathers weight
too. A frame is silent when it is nearer to the clip's quietest one than to its loudest by a given share, so loud noise
counts as speech. Leaves out: grouping tokens to words, which needs a tokenizer (the processor's `word_timestamps`).

Shapes: N clips, W windows of clips, T encoder frames, U speech tokens of a clip, J text tokens; B prompts, R answers.
"""

import torch
from torch import nn
from torch.nn.functional import cosine_similarity, pad
from transformers.utils import ModelOutput

from .devices import computes_in_float64

# Whisper's feature extractor clips log10 power at this much below the loudest.
DYNAMIC_RANGE = 8.0


@computes_in_float64
def token_times(
    alphas: torch.Tensor,
    num_speech_tokens: torch.Tensor,
    is_silent: torch.Tensor,
    frame_starts_s: torch.Tensor,
    frame_duration_s: float,
    delay_s: float,
) -> torch.Tensor:
    """Return start and end of every speech token, in seconds from the start of its clip.

    What CIF gathers at one time was said `delay_s` before, and nothing is said in silence. So a token that ends at a
    pause ends where it begins, and the next one begins where the pause ends.

    Args:
        alphas (`torch.FloatTensor` of shape (N, T)): unscaled CIF weights, zero at padding.
        num_speech_tokens (`torch.LongTensor` of shape (N,)): tokens that were fired.
        is_silent (`torch.BoolTensor` of shape (N, T)): True where nothing is said, padding included.
        frame_starts_s (`torch.FloatTensor` of shape (T,)): where each frame begins.
        frame_duration_s (`float`).
        delay_s (`float`): how long after the words CIF gathers their weight.

    Returns:
        (N, U, 2) float32, ascending; NaN past a clip's count.
    """
    tiny = torch.finfo(torch.float64).tiny
    num_frames = alphas.shape[1]
    integral = pad(alphas.detach().double().cumsum(1), (1, 0))
    # The integral up to the edges of frames that lie `delay_s` later, between which it is a straight line.
    edge = torch.arange(num_frames + 1, dtype=torch.float64, device=alphas.device) + delay_s / frame_duration_s
    edge = edge.clamp(0, num_frames)
    frame = edge.long().clamp(max=num_frames - 1)
    integral = torch.lerp(integral[:, frame], integral[:, frame + 1], edge - frame)
    said = integral.diff(dim=1).masked_fill(is_silent, 0.0)
    # If a clip is shorter than the delay, no weight is left, and its tokens share the sound evenly.
    said = torch.where(said.sum(1, keepdim=True) > 0, said, (~is_silent).double())
    integral = pad(said.cumsum(1), (1, 0))
    integral = integral * (num_speech_tokens / integral[:, -1])[:, None]

    token = torch.arange(int(num_speech_tokens.max()), device=alphas.device)
    bounds = torch.stack([token, token + 1]).double().expand(len(alphas), -1, -1)
    # Rounding must not put the end of the last token past the integral's own.
    starts, ends = bounds.minimum(integral[:, -1:, None]).transpose(0, 1).contiguous()
    frame_ends = integral[:, 1:].contiguous()
    # Where the integral does not grow, a token ends at the first place, and the next one begins at the last.
    frames = torch.stack([torch.searchsorted(frame_ends, starts, right=True), torch.searchsorted(frame_ends, ends)], -1)
    frames = frames.clamp(max=num_frames - 1)
    before, after = (integral.gather(1, (frames + step).flatten(1)).view(frames.shape) for step in (0, 1))
    into_frame = ((torch.stack([starts, ends], -1) - before) / (after - before).clamp(min=tiny)).clamp(0, 1)
    times = frame_starts_s.to(integral)[frames] + frame_duration_s * into_frame
    is_token = token < num_speech_tokens[:, None]
    return times.masked_fill(~is_token[..., None], torch.nan).float()


def text_token_times(text_embeds: torch.Tensor, speech_embeds: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
    """Return start and end of the text tokens that one clip's speech tokens were turned into.

    Speech tokens stand where the embeddings of the transcript would stand, so a text token is looked for where its
    embedding is most like the speech. The text may have more or fewer tokens than the speech.

    Args:
        text_embeds (J, D), speech_embeds (U, D): what the LLM reads.
        times (U, 2): of [`token_times`].

    Returns:
        (J, 2), ascending; text tokens that share a speech token divide its time.
    """
    speech_embeds = speech_embeds.float()
    text_embeds = text_embeds.to(speech_embeds)
    places = align(cosine_similarity(text_embeds[:, None], speech_embeds, dim=-1)).to(times.device)
    num_sharing = torch.bincount(places, minlength=len(times))[places]
    turn = torch.arange(len(places), device=times.device) - torch.searchsorted(places, places)
    start, end = times[places].unbind(-1)
    step = (end - start) / num_sharing
    return torch.stack([start + turn * step, start + (turn + 1) * step], dim=-1)


def align(similarity: torch.Tensor) -> torch.LongTensor:
    """Align J text tokens to U speech tokens in order, so that the sum of their similarities is largest.

    With J <= U every text token has a speech token of its own, and speech tokens may be left over; with J > U every
    speech token has at least one text token, and some share one. Equal counts pair off.

    Args:
        similarity (`torch.FloatTensor` of shape (J, U)).

    Returns:
        (J,): the speech token of each text token, ascending.
    """
    num_text, num_speech = similarity.shape
    shares = num_text > num_speech
    similarity = similarity.cpu().double()  # it is small, and the loop reads single numbers
    never = similarity.new_full((1,), -torch.inf)
    # The best sum of the text tokens so far, by the speech token that the last of them lies on.
    best = similarity[0].clone()
    if shares:
        best[1:] = -torch.inf
    came_from = []
    for gain in similarity[1:]:
        moved = torch.cat([never, best[:-1]])
        if shares:  # stay, or go on by one
            best, is_move = torch.stack([best, moved]).max(0)
            came_from.append(torch.arange(num_speech) - is_move)
        else:  # go on by one or more
            best, place = moved.cummax(0)
            came_from.append(place - 1)
        best = best + gain
    places = [num_speech - 1 if shares else int(best.argmax())]
    for source in reversed(came_from):
        places.append(int(source[places[-1]]))
    return torch.tensor(places[::-1])


def loudness(
    features: torch.Tensor, features_mask: torch.Tensor, time_axis: int, steps_per_frame: int, num_frames: int
) -> torch.Tensor:
    """Return the logarithmic loudness of encoder frames.

    Args:
        features (W, length), (W, length, bins) or (W, bins, length): waveforms, or logarithmic power in bands.
        features_mask (W, length): 1 at what belongs to the clip.
        time_axis (`int`): the axis that `length` is.
        steps_per_frame (`int`): how much of `length` one encoder frame takes.
        num_frames (`int`): T.

    Returns:
        (W, T) float32. It is comparable only within one clip; -inf at padding.
    """
    is_waveform = features.ndim == 2
    features = features.detach().float()
    values = features.square() if is_waveform else features.mean(3 - time_axis)
    quietest = 0.0 if is_waveform else -torch.inf
    values = values.masked_fill(~features_mask.bool(), quietest)
    values = pad(values, (0, num_frames * steps_per_frame - values.shape[1]), value=quietest)
    values = values.unflatten(1, (num_frames, steps_per_frame))
    if not is_waveform:
        return values.amax(-1)
    power = values.mean(-1)
    floor = power.amax(1, keepdim=True) * 10**-DYNAMIC_RANGE
    return power.maximum(floor).clamp(min=torch.finfo(power.dtype).tiny).log10()


def find_silence(frame_loudness: torch.Tensor, frame_mask: torch.Tensor, silence: float) -> torch.BoolTensor:
    """Return True where nothing is said, padding included: (N, T).

    Args:
        frame_loudness (N, T): of [`loudness`]; frame_mask (N, T) bool: which frames belong to the clip.
        silence (`float`): how far up from the quietest frame (0) to the loudest (1) of a clip silence reaches.
    """
    quietest = frame_loudness.masked_fill(~frame_mask, torch.inf).amin(1, keepdim=True)
    loudest = frame_loudness.masked_fill(~frame_mask, -torch.inf).amax(1, keepdim=True)
    return (frame_loudness < quietest + silence * (loudest - quietest)) | ~frame_mask


def answer_token_times(
    embed: nn.Module,
    answers: torch.LongTensor,
    audio: ModelOutput,
    has_audio: torch.BoolTensor,
    settings: dict,
) -> torch.Tensor:
    """Return when the tokens of R answers were said: (R, L', 2), NaN where nothing is.

    Args:
        embed (`nn.Module`): the LLM's embeddings.
        answers (R, L'): R / B of each prompt.
        audio ([`BlspKdAudioOutput`]): of the prompts that have one, in their order.
        has_audio (B,).
        settings (`dict`): `eos_token_id` and `pad_token_id` of this call.
    """
    ends = [torch.as_tensor(ids).flatten().tolist() for ids in settings.values() if ids is not None]
    is_said = ~torch.isin(answers, answers.new_tensor(sum(ends, [])))
    clip_of = torch.where(has_audio, has_audio.cumsum(0) - 1, -1).repeat_interleave(len(answers) // len(has_audio))
    times = torch.full((*answers.shape, 2), torch.nan, device=answers.device)
    for row, clip in enumerate(clip_of.tolist()):
        if clip < 0 or not bool(is_said[row].any()):
            continue
        count = int(audio.num_speech_tokens[clip])
        said = embed(answers[row, is_said[row]])
        of_tokens = text_token_times(said, audio.pooler_output[clip, :count], audio.token_times[clip, :count])
        times[row, is_said[row]] = of_tokens.to(times)
    return times
