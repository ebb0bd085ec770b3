"""A rule for when one has stopped speaking, from loudness and CIF's weights.

It asks for a stretch of silence in which CIF found no further token. Leaves out: what was said, which distinguishes a
pause from an end better than silence does.
"""

from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np

STEP_S = 0.01


@dataclass(frozen=True)
class EndOfSpeech:
    """Says when a turn counts as over.

    Args:
        silence_ms (`int`): for how long it must have been silent.
        below_peak_db (`float`): how far below the loudest 10 ms of the turn silence is.
        max_weight (`float`): CIF's weights of the frames of this silence must sum to less: half a token. They are known
            of encoded chunks only, so this part of the rule lags by up to a chunk.
    """

    silence_ms: int = 700
    below_peak_db: float = 30.0
    max_weight: float = 0.5

    def __post_init__(self):
        for name, unit in (("silence_ms", "milliseconds"), ("below_peak_db", "dB"), ("max_weight", "tokens")):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                raise ValueError(f"end_of_speech option {name} must be above 0 ({unit}), got {value!r}.")

    @classmethod
    def read(cls, given: Any) -> "EndOfSpeech | None":
        """Return the rule that is given as True, False (or None), or a dict of its options; None if there is none.

        Raises:
            ValueError: it is none of these, or an option is unknown or means nothing.
        """
        if given is None or given is False:
            return None
        if not isinstance(given, dict) and given is not True:
            raise ValueError(f"end_of_speech must be True, False or a dict of options, got {given!r}.")
        options = {} if given is True else given
        known = list(cls.__dataclass_fields__)
        if unknown := sorted(map(str, set(options) - set(known))):
            raise ValueError(f"Unknown option(s) {unknown} of end_of_speech. Known: {known}.")
        return cls(**options)


class SilenceWatch:
    """Follows one turn, and tells whether it is over.

    Args:
        rule ([`EndOfSpeech`]).
        rate (`int`): of the samples, Hz.
        frame_duration_s (`float`): of the frames that CIF weighs.
    """

    def __init__(self, rule: EndOfSpeech, rate: int, frame_duration_s: float):
        self.rule, self.frame_duration_s = rule, frame_duration_s
        self._step = round(STEP_S * rate)
        self._rest: np.ndarray = np.zeros(0, np.float32)
        self._num_steps = self._num_frames = 0
        self._peak = 0.0  # power
        self._last_loud = 0  # number of the step after it
        # Weights of the last frames, and of no more than silence can have.
        self._alphas: deque[float] = deque(maxlen=-(-rule.silence_ms // int(1000 * frame_duration_s)))

    def hear(self, samples: np.ndarray):
        """Follow the loudness of the next samples."""
        samples = np.concatenate([self._rest, samples])
        count = len(samples) // self._step
        self._rest = samples[count * self._step :]
        for power in np.square(samples[: count * self._step].reshape(count, self._step)).mean(1).tolist():
            self._num_steps += 1
            self._peak = max(self._peak, power)
            if power > self._peak * 10 ** (-self.rule.below_peak_db / 10):
                self._last_loud = self._num_steps

    def weigh(self, alphas: list[float]):
        """Follow CIF's weights of the next frames."""
        self._num_frames += len(alphas)
        self._alphas.extend(alphas)

    @property
    def is_over(self) -> bool:
        """Return whether the silence is long enough, and CIF found nothing in it."""
        if (self._num_steps - self._last_loud) * STEP_S * 1000 < self.rule.silence_ms:
            return False
        first = self._num_frames - len(self._alphas)
        silent = self._last_loud * STEP_S / self.frame_duration_s
        return sum(alpha for frame, alpha in enumerate(self._alphas, first) if frame >= silent) < self.rule.max_weight
