"""Round products as CPUs may that this one cannot imitate: in a way of its own for each shape of the operands.

A kernel chooses by shapes in which order it sums, so results of equal calls are equal to the last bit, and those of
unequal calls are only close. Each product is changed within the bound of any order of summation, eps * (|A| @ |B|), by
numbers that depend on the shapes. Laws that say "bit for bit" must bear it, and tolerances must.
Leaves out: other operations (their differences are smaller), compiled graphs, backward passes of convolutions and
attention.
"""

import zlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
PRODUCTS = (aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.mv, aten.convolution)
ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu.default


class OtherRounding(TorchDispatchMode):
    """Products of float32 and float64 are rounded otherwise while this is on."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if function is ATTENTION:
            # A mean of values: theirs is the size that counts.
            query, key, value, *others = args
            self.change_(result[0], args, lambda: function(query, key, value.abs(), *others, **kwargs)[0])
        elif function.overloadpacket in PRODUCTS:
            others = {name: value for name, value in kwargs.items() if name != "out"}
            sizes = [value.abs() if isinstance(value, torch.Tensor) else value for value in args]
            self.change_(result, args, lambda: function.overloadpacket(*sizes, **others))
        return result

    def change_(self, result, operands, bound):
        if result.is_meta or result.dtype not in (torch.float32, torch.float64):
            return
        shapes = [tuple(operand.shape) for operand in operands if isinstance(operand, torch.Tensor)]
        generator = torch.Generator().manual_seed(zlib.crc32(repr(shapes).encode()))
        noise = torch.rand(result.shape, generator=generator, dtype=result.dtype) * 2 - 1
        change = noise * bound() * torch.finfo(result.dtype).eps
        result.add_(torch.where(change.isfinite(), change, 0.0))  # masks may be added, of -inf
