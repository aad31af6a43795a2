"""Keeps the memory that the process frees, for its next allocations."""

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
    """Makes glibc give no memory back to the system; with another C library, nothing changes.

    Otherwise a tensor above 32 MB gets new pages each time, and the first writes to them take many times as long as
    the copy itself.
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
