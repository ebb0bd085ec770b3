"""Where speech stands during a call of a model: what layers with partial LoRA look up while the call runs.

Follows no paper. The mask belongs to the call and not to the model, so that threads, nested calls and several models do
not see each other's. Leaves out: the update itself (`plora.py`).

Shapes: B prompts, L their length, S speech positions among all B * L.
"""

import threading
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SpeechRows:
    """The speech positions of a call, as numbers among all B * L positions.

    Args:
        index (`torch.LongTensor` of shape (S,)): S speech positions, ascending.
        run (`slice` or None): the same, if they are neighbours, as those of the one clip of one prompt are.
    """

    index: torch.LongTensor
    run: slice | None

    @classmethod
    def of(cls, is_speech: torch.BoolTensor | None) -> "SpeechRows | None":
        """Return them, or None in a graph that is compiled, whose sizes may not depend on data."""
        if is_speech is None or torch.compiler.is_compiling():
            return None
        index = is_speech.flatten().nonzero().squeeze(1)
        if len(index) == 0:
            return cls(index, slice(0))
        first, last = index[[0, -1]].tolist()
        return cls(index, slice(first, last + 1) if last - first == len(index) - 1 else None)


class Call:
    """A call of one model. While it is entered, layers of that model look up here where speech stands.

    Each thread has its own calls. Calls may be left in any order, and in another thread than they were entered in.

    Args:
        plora ([`PartialLora`]): whose layers it is for.
        is_speech (`torch.BoolTensor` of shape (B, L), *optional*): None: no speech.
        rows ([`SpeechRows`], *optional*): None: go by `is_speech`.
    """

    def __init__(self, plora: object, is_speech: torch.BoolTensor | None, rows: SpeechRows | None):
        self.plora, self.is_speech, self.rows = plora, is_speech, rows
        self.outer: Call | None = None

    def __enter__(self):
        self.outer = _innermost_call()
        _here.call = self

    def __exit__(self, *error):
        # A call that is not the innermost, or that another thread entered, stays in that chain but belongs to no model.
        self.plora = self.is_speech = self.rows = None
        _here.call = _innermost_call()


class _Here(threading.local):
    """The calls that this thread is inside of. This is no ContextVar, because torch.compile cannot trace one.

    Attributes:
        call ([`Call`], *optional*): the innermost.
    """

    def __init__(self):
        self.call: Call | None = None


_here = _Here()


def _innermost_call() -> Call | None:
    call = _here.call
    while call is not None and call.plora is None:
        call = call.outer
    return call


def current_call(plora: object) -> Call | None:
    """Return the innermost call for the layers of `plora` that the current thread is inside of."""
    call = _here.call
    while call is not None and call.plora is not plora:
        call = call.outer
    return call
