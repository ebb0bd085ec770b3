"""Suppress the messages that libmpg123 prints about damaged mp3 files.

libmpg123 can be told to be quiet, but libsndfile has no option for it, and the messages go to the C library's `stderr`.
With glibc `stderr` is a variable that programs may set (see "Standard Streams" in its manual). Setting it during a call
does not affect other writers to file descriptor 2, such as Python, child processes and crash reports. With other C
libraries the messages remain.
"""

import ctypes
import os
import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_is_glibc = platform.libc_ver()[0] == "glibc"
_lock = threading.Lock()
_num_silencing = 0  # how many calls, in all threads, suppress messages now
if _is_glibc:
    _libc = ctypes.CDLL(None)
    _libc.fopen.restype = ctypes.c_void_p
    _stderr = ctypes.c_void_p.in_dll(_libc, "stderr")
    # Not the current value of `stderr`: another copy of this file, shipped with a model, may have changed it.
    _standard = ctypes.addressof(ctypes.c_char.in_dll(_libc, "_IO_2_1_stderr_"))
    _nowhere = _libc.fopen(os.devnull.encode(), b"w")


@contextmanager
def silenced_c_stderr() -> Iterator[None]:
    """Discard what C code in any thread prints to `stderr` inside this context."""
    if not _is_glibc:
        yield
        return
    _count(1)
    try:
        yield
    finally:
        _count(-1)


def _count(change: int):
    global _num_silencing
    with _lock:
        _num_silencing += change
        _stderr.value = _nowhere if _num_silencing else _standard


def _forget():
    """Reset the state in a forked child, where the other threads and their calls do not exist."""
    global _num_silencing
    _num_silencing, _stderr.value = 0, _standard
    _lock.release()


if _is_glibc:
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_forget)
