"""Run a frozen module inside a model that is trained: without gradients of its own and without dropout.

The speech encoder, the teacher's pass of the LLM and the demo use it. The model decides which
parameters are frozen.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def frozen(module: nn.Module, *inputs: torch.Tensor) -> Iterator[None]:
    """Run a frozen module: without dropout in any mode, and without gradients unless one of its inputs needs them.

    This is not inference mode: FSDP2 keeps the weights that it gathers there, and may not write to them in the
    student's forward.
    """
    was_training = [child for child in module.modules() if child.training]
    if was_training:
        module.eval()
    needs_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    try:
        with torch.set_grad_enabled(needs_gradient):
            yield
    finally:
        for child in was_training:
            child.training = True
