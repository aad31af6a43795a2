"""The memory that the process has freed, kept for what it allocates next."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

# Parameters of glibc's mallopt(3), with their defaults.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_DEFAULTS = {_TRIM_THRESHOLD: 128 * 1024, _MMAP_MAX: 65536}
_KEEPING = {_TRIM_THRESHOLD: 2**31 - 1, _MMAP_MAX: 0}


@contextmanager
def keeping_freed_memory() -> Iterator[None]:
    """Have the C library give no memory back to the system, where it is glibc; elsewhere nothing changes.

    Otherwise a tensor above 32 MB is mapped anew each time, and the first writes to its pages take many times as long
    as the copy that they are for.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        yield
        return
    for name, value in _KEEPING.items():
        mallopt(name, value)
    try:
        yield
    finally:
        for name, value in _DEFAULTS.items():
            mallopt(name, value)
