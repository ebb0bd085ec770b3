"""End the process group before the interpreter: one of its threads that needs the interpreter later aborts the process.

torch, accelerate and the Trainer leave that to the end of each script, which a training that SIGTERM stops does not
reach. Leaves out: starting the group, which is accelerate's part.
"""

import atexit
import gc
import sys

import torch


def end_with_interpreter():
    """Destroy the process group, if one was started, when the interpreter exits. Only the first call counts.

    After an error that nobody caught the group stays as it is: the other processes may not exit, and with NCCL this one
    would wait for them.
    """
    atexit.unregister(_destroy)
    atexit.register(_destroy)


def _destroy():
    is_after_error = hasattr(sys, "last_value")  # set when the traceback of an uncaught error is printed
    if torch.distributed.is_available() and torch.distributed.is_initialized() and not is_after_error:
        gc.collect()  # a wrapped model holds the group, in the cycles of references of a Trainer
        torch.distributed.destroy_process_group()
