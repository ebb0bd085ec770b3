"""Run a training step of the real model without its weights, and measure its memory.

Runs forward, backward and AdamW on tensors that have a shape but no contents (torch's `FakeTensorMode`), and adds up
the tensors that are alive. Leaves out: operations (`step_operations.py`), and what a GPU's kernels need inside.
"""

import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from .. import distillation
from ..modeling_blsp_kd import BlspKdForCausalLM

FAKE = FakeTensorMode(allow_non_fake_inputs=True)
aten = torch.ops.aten
PRODUCTS = (aten.mm, aten.addmm, aten.bmm)


class FakeNumbers(TorchDispatchMode):
    """Compute with fake numbers and real indices: the end of a sequence decides shapes, the value of a weight does not.

    Integers and masks that come from no fake number are computed as usual. Where the model branches on its numbers
    (CIF: is an alpha sum 0, do the frames have much in common?), the answer is no.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # more frequent than all other operations together
        if func in (aten.eq.Scalar, aten.gt.Tensor) and isinstance(args[0], FakeTensor):
            return torch.zeros(args[0].shape, dtype=torch.bool)
        tensors = [*tensors_in((args, kwargs))]
        # Without a tensor and a dtype among the arguments, only `arange` may make integers.
        may_be_integer = tensors or func.overloadpacket is aten.arange
        dtype = kwargs.get("dtype") or (torch.int64 if may_be_integer else torch.get_default_dtype())
        if not dtype.is_floating_point and not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            output = func(*args, **kwargs)
            if not any(tensor.is_floating_point() for tensor in tensors_in(output)):
                return output
        if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
            args = (args[0], [place for index in args[1] for place in self._places(index)], *args[2:])
        with FAKE:
            return func(*args, **kwargs)

    @staticmethod
    def _places(index) -> tuple:
        """Return the indices that a mask selects, because their number is a shape."""
        is_mask = index is not None and index.dtype == torch.bool and not isinstance(index, FakeTensor)
        return index.nonzero(as_tuple=True) if is_mask else (index,)


class LiveBytes(TorchDispatchMode):
    """Add up the tensors that are alive while operations run inside it, and keep the largest sum.

    Args:
        on_gpu (`bool`): on a CPU, torch's half-precision products sum up in a float32 copy of their result.
    """

    def __init__(self, on_gpu: bool):
        super().__init__()
        self.on_gpu = on_gpu
        self.held = self.peak = 0
        self.sizes: dict[int, int] = {}

    def hold(self, tensor: torch.Tensor):
        storage = tensor.untyped_storage()
        if id(storage) not in self.sizes:  # torch keeps one object for a storage while it is alive
            self.sizes[id(storage)] = storage.nbytes()
            self.held += storage.nbytes()
            self.peak = max(self.peak, self.held)
            weakref.finalize(storage, self._release, id(storage))

    def _release(self, storage: int):
        self.held -= self.sizes.pop(storage)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in tensors_in(output):
            self.hold(tensor)
            if not self.on_gpu and func.overloadpacket in PRODUCTS and tensor.element_size() == 2:
                self.peak = max(self.peak, self.held + 2 * tensor.nbytes)
        return output


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors among an operation's arguments or results."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(item)


def without_contents(build: Callable[[], BlspKdForCausalLM]) -> BlspKdForCausalLM:
    """Return the model that `build` makes, with weights that take no memory.

    It is built on the meta device. Then its weights become fake tensors of a CPU, because attention runs other
    operations on meta tensors.
    """
    with torch.device("meta"):
        model = build()
    made = {}
    for module in model.modules():
        options = {"recurse": False, "remove_duplicate": False}
        for name, tensor in [*module.named_parameters(**options), *module.named_buffers(**options)]:
            if tensor not in made:  # tied weights stay tied
                with FAKE:
                    made[tensor] = torch.empty_like(tensor, device="cpu")
                if isinstance(tensor, nn.Parameter):
                    made[tensor] = nn.Parameter(made[tensor], requires_grad=tensor.requires_grad)
            setattr(module, name, made[tensor])
    return model


def training_step(model: PreTrainedModel, batch: dict, bf16: bool, accumulates: bool) -> torch.optim.Optimizer:
    """Run forward, backward and AdamW as in any step but the first: AdamW's moments exist.

    Args:
        accumulates (`bool`): gradients of the batches before exist, too.
    """
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], fused=True)
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    if not accumulates:
        optimizer.zero_grad()
    with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
        loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


@dataclass
class Memory:
    """Bytes of a training step on one GPU without sharding.

    Args:
        weights, gradients, optimizer (`int`): of parameters with buffers, of all gradients, of AdamW's moments.
        activations (`int`): the rest of the peak: tensors saved for backward, temporary ones, buffers of the losses.
            With a single batch per step, not all gradients exist at the peak, so activations are a little more.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def peak(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


def peak_memory(model: PreTrainedModel, batch: dict, bf16: bool, accumulates: bool, on_gpu: bool) -> Memory:
    """Return the memory of [`training_step`].

    Args:
        model: from [`without_contents`].
        batch (`dict`): as from the collator; of `input_features` only the shape matters.
        on_gpu (`bool`): the KL computes the probabilities of all rows of a chunk at once, as on a GPU; see also
            [`LiveBytes`].
    """
    live = LiveBytes(on_gpu)
    for tensor in (*model.parameters(), *model.buffers()):
        live.hold(tensor)
    weights = live.held
    tile_size = sys.maxsize if on_gpu else distillation.TILE_SIZE
    with patch.object(distillation, "TILE_SIZE", tile_size), FakeNumbers(), live:
        optimizer = training_step(model, with_fake_features(batch), bf16, accumulates)
    gradients = sum(parameter.nbytes for parameter in optimizer.param_groups[0]["params"])
    moments = sum(tensor.nbytes for state in optimizer.state.values() for tensor in state.values())
    return Memory(weights, gradients, moments, activations=live.peak - weights - gradients - moments)


def with_fake_features(batch: dict) -> dict:
    """Return a batch whose features have no contents."""
    return {**batch, "input_features": FAKE.from_tensor(batch["input_features"])}
