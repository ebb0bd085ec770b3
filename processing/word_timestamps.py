"""Group the times of generated tokens: the words of an answer, or its tokens, each with start and end in seconds.

Follows the `chunks` of transformers' speech recognition pipelines. `generate` computes the times of tokens.
"""

import re
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase


def words_with_times(tokenizer: PreTrainedTokenizerBase, token_ids: Any, token_timestamps: Any) -> list[dict]:
    """Return the words of one answer with their times; see [`~BlspKdProcessor.word_timestamps`].

    Raises:
        ValueError: there is not one pair of times per token.
    """
    token_ids, token_timestamps = torch.as_tensor(token_ids).cpu(), torch.as_tensor(token_timestamps).cpu()
    if token_ids.ndim != 1 or token_timestamps.shape != (len(token_ids), 2):
        raise ValueError(
            "word_timestamps takes one row: token_ids of shape (L,) and token_timestamps of shape (L, 2), but got "
            f"{tuple(token_ids.shape)} and {tuple(token_timestamps.shape)}."
        )
    added = tokenizer.added_tokens_decoder.items()
    special = [token_id for token_id, token in added if token.special]  # what decoding skips
    is_said = ~token_timestamps.isnan().any(1) & ~torch.isin(token_ids, torch.tensor(special))
    times = token_timestamps[is_said].tolist()
    pieces = _decode_in_pieces(tokenizer, token_ids[is_said].tolist())
    ends = np.cumsum([len(text) for text, _ in pieces])
    words = []
    for word in re.finditer(r"\s*\S+", "".join(text for text, _ in pieces)):
        first, last = (int(np.searchsorted(ends, place, side="right")) for place in (word.start(), word.end() - 1))
        of_word = times[pieces[first][1].start : pieces[last][1].stop]
        words.append({"text": word.group(), "timestamp": (of_word[0][0], of_word[-1][1])})
    return words


def _decode_in_pieces(tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> list[tuple[str, slice]]:
    """Decode tokens one by one, or several together if they share a character; return pairs of text and slice."""

    def decode(ids):
        return tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    pieces, context, start = [], 0, 0
    for stop in range(1, len(token_ids) + 1):
        # Some tokenizers drop the white space before the first token, so each is decoded after the one before.
        before, text = decode(token_ids[context:start]), decode(token_ids[context:stop])
        if text.endswith("\N{REPLACEMENT CHARACTER}") and stop < len(token_ids):
            continue
        pieces.append((text[len(before) :], slice(start, stop)))
        context, start = start, stop
    return pieces


def tokens_with_times(
    tokenizer: PreTrainedTokenizerBase, token_ids: torch.Tensor, token_timestamps: torch.Tensor
) -> list[dict]:
    """Return the tokens of one answer that have a time and are not special, in the form of `words_with_times`.

    Args:
        token_ids (`torch.LongTensor` of shape (L,)), token_timestamps (`torch.FloatTensor` of shape (L, 2), seconds).
    """
    timed = ~token_timestamps.isnan().any(1) & ~torch.isin(token_ids, torch.tensor(tokenizer.all_special_ids))
    said, tokens, text = token_ids[timed].tolist(), [], ""
    for number, (start, end) in enumerate(token_timestamps[timed].tolist()):
        # Some tokenizers drop the white space before the first token, so each is decoded after those before it.
        longer = tokenizer.decode(said[: number + 1], clean_up_tokenization_spaces=False)
        tokens.append({"text": longer[len(text) :], "timestamp": (start, end)})
        text = longer
    return tokens
