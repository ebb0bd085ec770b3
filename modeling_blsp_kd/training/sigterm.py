"""On SIGTERM, end training where it can be resumed exactly: after a step, with a checkpoint.

In place of transformers' `enable_jit_checkpoint`, which waits for three seconds, can save between a backward pass and
its optimiser step (dropout then differs after a resume), lets each process decide for itself, and lets the script go on
as if training were complete. Leaves out: SIGINT, which stops at once as everywhere.
"""

import functools
import os
import signal
import threading
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class SigtermCallback(TrainerCallback):
    """Ends training on the first SIGTERM that arrives in its context; a second one has its previous effect.

    Attributes:
        received (`bool`): this process got a SIGTERM.
        num_received (`torch.Tensor` or `int`): how many processes had got one when the step began. The trainer sets
            it, so that all processes end at the same step.
        is_ending (`bool`): training ends because of it.
    """

    def __init__(self):
        self.received = self.is_ending = False
        self.num_received: torch.Tensor | int = 0
        self._is_awaited = torch.zeros((), dtype=torch.bool).share_memory_()  # for the workers to see

    def __enter__(self):
        self.received = self.is_ending = False
        self._previous = None
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            self._previous = signal.signal(signal.SIGTERM, self._receive)
            self._is_awaited.fill_(True)
        return self

    def __exit__(self, *error):
        self._is_awaited.fill_(False)
        self._restore()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs
    ) -> TrainerControl:
        if self.received if args.world_size == 1 else int(self.num_received):
            self.is_ending = True
            control.should_save = control.should_training_stop = True
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs
    ) -> TrainerControl:
        if self.is_ending and not float(state.epoch).is_integer():
            # The epoch is not over; what had to be done after the step has been done.
            control.should_log = control.should_evaluate = control.should_save = False
            return control
        return self.on_step_end(args, state, control)  # it may have come during an evaluation

    def protect_workers(self, loader: Any) -> Any:
        """Let a data loader's workers outlive any SIGTERM in this context: clusters send it to all processes at once,
        and the death of a worker would end the training.

        Args:
            loader (`torch.utils.data.DataLoader`): as accelerate prepared it, its workers not yet started.
        """
        inner = loader.base_dataloader  # which starts them
        inner.worker_init_fn = functools.partial(_init_worker, self._is_awaited, inner.worker_init_fn)
        return loader

    def _receive(self, number, frame):
        self.received = True
        self._restore()

    def _restore(self):
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)


def _init_worker(is_protected: torch.Tensor, init, worker_id: int):
    def receive(number, frame):
        if not is_protected:
            os._exit(0)  # as torch has it when the loader's own process sends it

    signal.signal(signal.SIGTERM, receive)
    if init is not None:
        init(worker_id)
