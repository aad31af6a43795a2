"""Writes that an interrupt must not leave half done."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from torch import Tensor

from gen_optim.tensors.foreach import write

__all__ = ["despite_interrupts", "exchanging"]


def despite_interrupts(*writes: Callable[[], object]) -> None:
    """Call functions one after the other; raise an interrupt only when all have been called.

    Args:
        writes: Functions that may be called a second time when the first call was interrupted.
    """
    rest = deque(writes)
    try:
        while rest:
            rest[0]()
            rest.popleft()
    except BaseException:
        for write in rest:
            write()
        raise


def exchanging(left: list[Tensor], right: list[Tensor]) -> list[Callable[[], object]]:
    """Return functions for :func:`despite_interrupts` that exchange the contents of two lists of tensors."""
    held: list[Tensor] = []
    return [
        lambda: held.__setitem__(slice(None), [each.clone() for each in left]),
        lambda: write(left, right),
        lambda: write(right, held),
        held.clear,
    ]
