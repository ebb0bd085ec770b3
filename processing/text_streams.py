"""Stream the text of an answer: generate in a thread of its own, and stop it when nobody reads any longer.

Follows transformers' `TextIteratorStreamer`, which passes on pieces of text but not the errors of the thread.
"""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer


class TextStream:
    """The pieces of an answer, an iterator. The thread that generates it starts at once.

    Args:
        generate: called with `streamer` and `stopping_criteria`.
        tokenizer: decodes the tokens.
        stopping_criteria: further ones.
    """

    def __init__(self, generate: Callable, tokenizer: PreTrainedTokenizerBase, stopping_criteria: Any = None):
        self._streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._is_stopped = threading.Event()
        self._errors: list[BaseException] = []
        criteria = StoppingCriteriaList([*(stopping_criteria or []), _StopsWhen(self._is_stopped)])

        def run():
            try:
                generate(streamer=self._streamer, stopping_criteria=criteria)
            except BaseException as error:  # errors of any kind are raised in the caller's thread
                self._errors.append(error)
            finally:
                self._streamer.text_queue.put(self._streamer.stop_signal)

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        """Return the next piece that is not empty.

        Raises:
            Exception: of any kind, raised by `generate`.
        """
        for piece in self._streamer:
            if piece:
                return piece
        self._streamer.text_queue.put(self._streamer.stop_signal)  # so that it ends again when it is asked again
        self._thread.join()
        if self._errors:
            raise self._errors.pop()
        raise StopIteration

    def stop(self):
        """Stop after the token that is being generated, and wait for it. What was generated can still be read."""
        self._is_stopped.set()
        self._thread.join()


def pieces_of(
    forward: Callable, prompt: dict, forward_params: dict, tokenizer: PreTrainedTokenizerBase
) -> Iterator[str]:
    """Yield the pieces of the answer to a prompt. The thread starts with the first piece.

    Args:
        forward: generates for a list of prompts, with `forward_params` as keyword arguments.
        prompt: the only prompt.
        forward_params: may have further `stopping_criteria`.
        tokenizer: decodes the tokens.

    Raises:
        Exception: of any kind, raised by `forward`.
    """

    def generate(**options):
        forward([prompt], **{**forward_params, **options})

    stream = TextStream(generate, tokenizer, forward_params.get("stopping_criteria"))
    try:
        yield from stream
    finally:
        stream.stop()


class _StopsWhen(StoppingCriteria):
    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), self.event.is_set(), dtype=torch.bool, device=input_ids.device)
