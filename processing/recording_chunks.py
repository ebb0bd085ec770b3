"""Split a long recording into chunks with margins, so that a word at a cut is complete in one of two neighbours.

Follows `chunk_length_s` and `stride_length_s` of transformers' speech recognition pipelines.
"""

from numbers import Real

import numpy as np

from .audio_loading import MAX_DURATION_S

# If the rest of a recording is shorter than this, it becomes part of the chunk before it.
SHORTEST_CHUNK_S = 0.1


def strides_of(chunk_length_s: float | None, stride_length_s: float | tuple | list | None) -> tuple[float, float]:
    """Return a chunk's left and right margin, seconds.

    Raises:
        ValueError: the chunk is too short or too long, the margins leave nothing of it, or there are margins alone.
    """
    if chunk_length_s is None:
        if stride_length_s is not None:
            raise ValueError("stride_length_s is of chunks: give chunk_length_s, too.")
        return 0.0, 0.0
    if not _is_number(chunk_length_s) or not 1 <= chunk_length_s <= MAX_DURATION_S:
        raise ValueError(f"chunk_length_s must be within 1 and {MAX_DURATION_S:g} seconds, got {chunk_length_s!r}.")
    given = chunk_length_s / 6 if stride_length_s is None else stride_length_s
    strides = tuple(given) if isinstance(given, (list, tuple)) else (given, given)
    if len(strides) != 2 or not all(_is_number(stride) and stride >= 0 for stride in strides):
        raise ValueError(f"stride_length_s must be seconds, or a pair (left, right) of them, got {stride_length_s!r}.")
    left_s, right_s = strides
    if left_s + right_s >= chunk_length_s:
        raise ValueError(f"Strides of {strides} s leave nothing of a chunk of {chunk_length_s} s. Make them shorter.")
    return left_s, right_s


def _is_number(value) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and bool(np.isfinite(value))


def chunks_of(
    num_samples: int, length: int, left: int, right: int, shortest: int
) -> list[tuple[int, int, float, float]]:
    """Return start and stop of each chunk, and the range in which its words are kept, in samples.

    These ranges follow each other without a gap, and those of the first and last chunk are open at the ends.

    Args:
        num_samples: of the recording.
        length: of a chunk, with its margins `left` and `right`.
        shortest: a shorter rest becomes part of the chunk before it.
    """
    chunks = []
    for start in range(0, num_samples, length - left - right):
        stop = start + length if start + length + shortest <= num_samples else num_samples
        is_last = stop == num_samples
        chunks.append((start, stop, start + left if start else -np.inf, np.inf if is_last else stop - right))
        if is_last:
            break
    return chunks
