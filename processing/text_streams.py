"""Stream the text of an answer: generate in a thread of its own, and stop it when nobody reads any longer.

Follows transformers' `TextIteratorStreamer`, which passes on pieces of text but not the errors of the thread.
"""

import threading
from collections.abc import Callable, Iterator

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer


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
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    is_abandoned, errors = threading.Event(), []
    criteria = [*(forward_params.get("stopping_criteria") or []), _StopsWhen(is_abandoned)]
    forward_params = {**forward_params, "streamer": streamer, "stopping_criteria": StoppingCriteriaList(criteria)}

    def generate():
        try:
            forward([prompt], **forward_params)
        except BaseException as error:  # errors of any kind are raised in the caller's thread
            errors.append(error)
        finally:
            streamer.text_queue.put(streamer.stop_signal)

    thread = threading.Thread(target=generate, daemon=True)
    thread.start()
    try:
        yield from (piece for piece in streamer if piece)
    finally:
        is_abandoned.set()
        thread.join()
    if errors:
        raise errors[0]


class _StopsWhen(StoppingCriteria):
    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), self.event.is_set(), dtype=torch.bool, device=input_ids.device)
