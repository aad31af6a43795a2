"""Writes that an interrupt must not leave half done."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial

from torch import Tensor

from gen_optim.tensors.foreach import write

__all__ = ["despite_interrupts", "exchange"]


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


def exchange(left: list[Tensor], right: list[Tensor], then: Callable[[], object]) -> None:
    """Exchange the contents of two lists of tensors and call ``then``: all of it or, if interrupted early, nothing."""
    held = [each.clone() for each in left]
    despite_interrupts(partial(write, left, right), partial(write, right, held), then)
