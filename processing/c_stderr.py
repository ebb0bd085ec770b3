"""Keeps what libmpg123 prints about damaged mp3 files off the terminal.

libsndfile does not pass on libmpg123's switch for that, and its lines go to the C library's `stderr`. With glibc that
is a variable which programs may set (see "Standard Streams" in its manual). To set it for the time of a call spares
everything that writes to file descriptor 2 by another way: Python, child processes, crash reports. Leaves out: other C
libraries, where the lines stay.
"""

import ctypes
import os
import platform
import threading
from contextlib import contextmanager

_is_glibc = platform.libc_ver()[0] == "glibc"
_lock = threading.Lock()
_num_silencing = 0  # calls, of any thread
if _is_glibc:
    _libc = ctypes.CDLL(None)
    _libc.fopen.restype = ctypes.c_void_p
    _stderr = ctypes.c_void_p.in_dll(_libc, "stderr")
    # Not what `stderr` points to now, since another copy of this file, a model's own, may just have set it.
    _standard = ctypes.addressof(ctypes.c_char.in_dll(_libc, "_IO_2_1_stderr_"))
    _nowhere = _libc.fopen(os.devnull.encode(), b"w")


@contextmanager
def silenced_c_stderr():
    """Drop what C code prints to `stderr` meanwhile, from any thread."""
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
    """In a forked child, whose other threads are gone with their calls."""
    global _num_silencing
    _num_silencing, _stderr.value = 0, _standard
    _lock.release()


if _is_glibc:
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_forget)
