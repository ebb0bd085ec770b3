"""Layers with partial LoRA, and the call of a model in which they look up where speech stands.

The mask belongs to the call and not to the model, so that threads, nested calls and several models do not see each
other's. Leaves out: putting the layers into an LLM (`plora.py`).

Shapes: B prompts, L their length, S speech positions among all B * L, D and D' widths.
"""

import functools
import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

# PEFT's name of these weights. Not its "default", which a LoRA of the user's own takes.
ADAPTER_NAME = "plora"


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


class _PartialLoraLayer:
    """The changed part of a PEFT layer. The class is changed and not the object, because replicas share its methods.

    Attributes:
        partial_lora ([`PartialLora`]).
        peft_class (`type`): the unchanged class.
    """

    partial_lora: Any
    peft_class: type
    # Of the PEFT layer:
    base_layer: nn.Module
    lora_A: nn.ModuleDict
    lora_B: nn.ModuleDict
    lora_dropout: nn.ModuleDict
    scaling: dict[str, float]

    def forward(self, x, *args, **kwargs):
        # PEFT's own bookkeeping around the base layer takes as long as a small matrix product.
        run = self.base_layer if len(self.lora_A) == 1 else super().forward  # type: ignore[misc]  # PEFT's
        result = run(x, *args, **kwargs)
        call = current_call(self.partial_lora)
        if call is None or call.is_speech is None:
            return result
        return self._add_update(x, result, call.is_speech, call.rows)

    def _add_update(self, x, result, is_speech: torch.BoolTensor, rows: SpeechRows | None) -> torch.Tensor:
        """Add the update at the speech positions; it is computed at these only.

        Args:
            x (B, L, D), result (B, L, D'): input of the layer, and its output without the update.
        """
        if x.shape[:-1] != is_speech.shape:
            raise ValueError(
                f"Partial LoRA was given the speech mask of a {tuple(is_speech.shape)} batch, but a layer saw "
                f"hidden states of shape {tuple(x.shape)}. Layers that regroup tokens (experts of a mixture) "
                "cannot take it: name the other layers in `plora['target_modules']`."
            )
        scale = self.scaling[ADAPTER_NAME]
        if rows is None:
            # Filled, not multiplied: 0 times inf at a text position would be NaN.
            update = self._update(x).masked_fill(~is_speech[..., None], 0.0)
            return result + scale * update.to(result.dtype)
        x, flat = x.flatten(0, 1), result.flatten(0, 1)
        has_gradient = torch.is_grad_enabled()
        # Compiled code would be compiled again for every other run.
        run = None if has_gradient or torch.compiler.is_compiling() else rows.run
        if run is not None:
            flat[run].add_(self._update(x[run]).to(result.dtype), alpha=scale)
            return flat.view_as(result)
        index = rows.index.to(x.device)
        update = self._update(x.index_select(0, index)).to(result.dtype)
        # In place where no gradient flows: a copy of the result would cost more than the update.
        add = flat.index_add if has_gradient else flat.index_add_
        return add(0, index, update, alpha=scale).view_as(result)

    def _update(self, x) -> torch.Tensor:
        lora_a, lora_b = self.lora_A[ADAPTER_NAME], self.lora_B[ADAPTER_NAME]
        return lora_b(lora_a(self.lora_dropout[ADAPTER_NAME](x.to(lora_a.weight.dtype))))

    def set_adapter(self, names, *args, **kwargs):
        # When an adapter is deleted, PEFT activates those that are left. Only `PartialLora.at` switches partial LoRA.
        others = [name for name in ([names] if isinstance(names, str) else names) if name != ADAPTER_NAME]
        super().set_adapter(others, *args, **kwargs)  # type: ignore[misc]  # PEFT's

    def merge(self, *args, **kwargs):
        raise NotImplementedError(
            "Partial LoRA cannot be merged into the LLM: it applies at speech positions only, and merged weights would "
            "change the LLM at text positions too. Keep it unmerged; text and decoding steps skip it at no cost. To "
            "take a LoRA of your own off again, use PEFT's delete_adapter."
        )

    # What PEFT calls to merge or to unload a layer; both would lose partial LoRA.
    unload_and_optionally_merge_module = merge

    def __reduce__(self):
        # The class is made at run time, so that pickle cannot find it by its name.
        return _new_layer, (self.peft_class,), self.__getstate__()


@functools.cache
def with_partial_lora(peft_class: type) -> type[nn.Module]:
    return type(f"Partial{peft_class.__name__}", (_PartialLoraLayer, peft_class), {"peft_class": peft_class})


def _new_layer(peft_class: type) -> nn.Module:
    return object.__new__(with_partial_lora(peft_class))
