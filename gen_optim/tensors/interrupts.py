"""What an interrupt must not leave half done."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from torch import Tensor

from gen_optim.tensors.foreach import write


class Unfinished:
    """Calls that end what a step has begun: they put back what it has changed, or complete it.

    A ``finally`` alone is not enough, because an interrupt may arrive on its first line; nor is ``with``, because one
    may arrive between the ends of two contexts. A call is known here before anything is changed, and forgotten when it
    has returned. :meth:`finish` calls what is left when a step fails, so every call must do no harm when repeated.

    Example:
        >>> unfinished = Unfinished()
        >>> with unfinished.ending_with(lambda: print("put back")):
        ...     print("changed")
        changed
        put back
        >>> unfinished.finish()  # nothing is left
    """

    def __init__(self) -> None:
        self._calls: list[Callable[[], object]] = []

    def add(self, call: Callable[[], object]) -> None:
        """Add a call, before what it ends is begun."""
        self._calls.append(call)

    def drop(self, call: Callable[[], object]) -> None:
        """Forget a call that has been made."""
        self._calls.remove(call)

    @contextmanager
    def ending_with(self, call: Callable[[], object]) -> Iterator[None]:
        """Make a call when the context ends."""
        self.add(call)
        try:
            yield
        finally:
            if call in self._calls:  # else it was made by finish(), and this generator is only now collected
                despite_interrupts(call)
                self.drop(call)

    def do(self, call: Callable[[], object]) -> None:
        """Make a call that must come to its end."""
        self.add(call)
        despite_interrupts(call)
        self.drop(call)

    def finish(self) -> None:
        """Make the calls that are left, the last one first, even if one of them fails."""
        if self._calls:
            call = self._calls[-1]
            try:
                call()
            finally:
                self.drop(call)
                self.finish()

    def forget(self) -> None:
        """Forget what is left: a new step begins."""
        self._calls.clear()


def despite_interrupts(*writes: Callable[[], object]) -> None:
    """Call functions in order; raise an interrupt only when all have been called, the interrupted one again."""
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
