"""Speech that a client is still sending: samples become speech tokens chunk by chunk, as in a session.

`processing/speech_session.py` does the same before an LLM in this process. Leaves out: the protocol (`session.py`).
"""

import numpy as np
import torch

from modeling_blsp_kd import BlspKdForCausalLM
from processing import BlspKdProcessor
from processing.end_of_speech import EndOfSpeech, SilenceWatch
from processing.streaming_features import FeatureStream


class LiveSpeech:
    """The speech of one turn. Not for several threads at once.

    Args:
        model ([`BlspKdForCausalLM`]): a streaming one.
        processor ([`BlspKdProcessor`]): its own.
        sampling_rate (`int`): of the samples, Hz.
        rule ([`EndOfSpeech`], *optional*): tells when the turn is over.

    Raises:
        ValueError: the model reads whole clips.
    """

    def __init__(
        self, model: BlspKdForCausalLM, processor: BlspKdProcessor, sampling_rate: int, rule: EndOfSpeech | None = None
    ):
        self._stream = model.stream_speech()
        self._features = FeatureStream(processor.feature_extractor, sampling_rate)
        self._watch = None if rule is None else SilenceWatch(rule, self._features.rate, model.frame_duration_s)
        self._tokens: list[torch.Tensor] = [self._stream.nothing.speech_tokens.cpu()]

    @property
    def duration_s(self) -> float:
        """Return how many seconds were pushed."""
        return self._features.num_samples / self._features.rate

    @property
    def speech_tokens(self) -> torch.Tensor:
        """Return the speech tokens so far, (U, D), on the CPU."""
        self._tokens = [torch.cat(self._tokens)]
        return self._tokens[0]

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self._tokens))

    @property
    def has_ended(self) -> bool:
        """Return whether one has stopped speaking, by the rule."""
        return self._watch is not None and self.num_tokens > 0 and self._watch.is_over

    def push(self, samples: np.ndarray):
        """Read the next samples, and encode the chunks that they complete.

        Raises:
            TypeError, ValueError: see [`FeatureStream.add`].
        """
        added = self._features.add(samples)
        if self._watch is not None:
            self._watch.hear(added)
        self._encode()

    def finish(self) -> torch.Tensor:
        """Return all speech tokens, (U, D), if the turn ends here.

        Raises:
            ValueError: it is shorter than one analysis window.
        """
        self._features.end_samples()
        self._encode()
        rest = self._stream.finish(torch.from_numpy(self._features.rest()))
        return torch.cat([self.speech_tokens, rest.speech_tokens.cpu()])

    def _encode(self):
        while self._features.num_ready >= (count := self._stream.num_wanted):
            speech = self._stream.push(torch.from_numpy(self._features.frames(count)))
            self._features.take(count)
            self._tokens.append(speech.speech_tokens.cpu())
            if self._watch is not None:
                self._watch.weigh(speech.alphas.tolist())
