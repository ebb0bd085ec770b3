"""SIGTERM, noted while training and acted upon where training can be resumed exactly.

In place of transformers' `enable_jit_checkpoint`, which waits for three seconds, can save between a backward pass and
its optimiser step (dropout then differs after a resume), lets each process decide for itself, and lets the script go on
as if training were complete. Leaves out: SIGINT, which stops at once as everywhere.
"""

import signal
import threading


class TerminationNotice:
    """Context in which a first SIGTERM sets `came`; a second one does what it would have done without."""

    def __init__(self):
        self.came = False

    def __enter__(self):
        self.came, self._previous = False, None
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            self._previous = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *error):
        self._restore()

    def _note(self, number, frame):
        self.came = True
        self._restore()

    def _restore(self):
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
