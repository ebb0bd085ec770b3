"""SIGTERM, noted while training and acted upon where training can be resumed exactly.

In place of transformers' `enable_jit_checkpoint`, which waits for three seconds, can save between a backward pass and
its optimiser step (dropout then differs after a resume), lets each process decide for itself, and lets the script go on
as if training were complete. Leaves out: SIGINT, which stops at once as everywhere.
"""

import functools
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import torch


class TerminationNotice:
    """Context in which a first SIGTERM sets `came`; a second one does what it would have done without."""

    def __init__(self):
        self.came = False
        self._is_awaited = torch.zeros((), dtype=torch.bool).share_memory_()  # for the workers to see

    def __enter__(self):
        self.came, self._previous = False, None
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            self._previous = signal.signal(signal.SIGTERM, self._note)
            self._is_awaited.fill_(True)
        return self

    def __exit__(self, *error):
        self._is_awaited.fill_(False)
        self._restore()

    def spare_workers(self, loader: Any) -> Iterator[None]:
        """Let a data loader's workers outlive any SIGTERM in this context: clusters send it to all processes at once,
        and a worker that dies of it takes the training along.

        Args:
            loader (`torch.utils.data.DataLoader`): as accelerate prepared it, its workers not yet started.
        """
        inner = loader.base_dataloader  # which starts them
        inner.worker_init_fn = functools.partial(_init_worker, self._is_awaited, inner.worker_init_fn)
        return loader

    def _note(self, number, frame):
        self.came = True
        self._restore()

    def _restore(self):
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)


def _init_worker(is_spared: torch.Tensor, init, worker_id: int):
    def note(number, frame):
        if not is_spared:
            os._exit(0)  # as torch has it when the loader's own process sends it

    signal.signal(signal.SIGTERM, note)
    if init is not None:
        init(worker_id)
