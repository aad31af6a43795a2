"""The ways to choose a learning rate, each as steps whose cost can be measured."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from torch import Tensor
from torch.optim import Optimizer

from benchmarks import paper_authors
from benchmarks.cost.cases import Case
from benchmarks.paper_authors import ParabolaOfTheAuthors
from gen_optim import GeNOptimizer, PublishedRule

FORWARDS = {"lookback": 1, "approximate": 2}
"""The forward passes that these cannot do without, at each probe step."""


class Method(Protocol):
    """A way to choose a learning rate, in use."""

    def period(self) -> float:
        """Takes the steps from one probe to the next and returns the seconds spent on the learning rate."""


class _Regular(PublishedRule):
    """The published rule with exactly ``period`` steps from one probe step to the next."""

    def after_probe(self, state: Any, lr: float, *, steps_to_next: int | None = None) -> Any:
        """Returns the state after a probe step."""
        return super().after_probe(state, lr, steps_to_next=self.period)


class Wrapped:
    """A GeNOptimizer. The time of the closure's first call and of the base optimizer's step does not count.

    Its probe steps follow each other as closely as they can. Looking back takes two steps: one that keeps its start
    point, and one that looks back.

    Args:
        case: What to train.
        base: The base optimizer.
        mode: How to measure.
        counts_forwards: Whether the forward passes of probes count.

    Attributes:
        on_others: Called with True before what does not count, and with False after it.
    """

    def __init__(self, case: Case, base: Optimizer, mode: str, *, counts_forwards: bool = True) -> None:
        self._case, self._counts_forwards = case, counts_forwards
        self._steps = 2 if mode == "lookback" else 1
        self._optimizer = GeNOptimizer(base, mode=mode, rule=_Regular(period=self._steps), average=False)
        self._began = self._others = 0.0
        self.on_others: Callable[[bool], object] = bool
        # Not by its hooks: those after a step wait for the probes.
        base.step = partial(self._base_step, base.step)  # type: ignore[assignment, method-assign]
        for _ in range(2):  # after which periods of looking back end with a probe
            self._optimizer.step(self._closure)

    def _base_step(self, step: Callable[[], object]) -> None:
        self._enter()
        step()
        self._leave()

    def _enter(self) -> None:
        self.on_others(True)
        self._began = time.perf_counter()

    def _leave(self) -> None:
        self._others += time.perf_counter() - self._began
        self.on_others(False)

    def _closure(self) -> Tensor:
        counts = self._counts_forwards and self._optimizer.is_probing
        if not counts:
            self._enter()
        self._optimizer.zero_grad()
        loss = self._case.loss()
        loss.backward()  # type: ignore[no-untyped-call]
        if not counts:
            self._leave()
        return loss

    def period(self) -> float:
        """Takes one or two steps."""
        self._others = 0.0
        began = time.perf_counter()
        for _ in range(self._steps):
            self._optimizer.step(self._closure)
        total = time.perf_counter() - began
        record = self._optimizer.last_probe
        assert record is not None, "one of them was a probe step"
        return total - self._others


class PaperAuthors:
    """Their package, between ``backward()`` and ``step()``."""

    def __init__(self, case: Case, base: Optimizer) -> None:
        self._case, self._base = case, base
        self._parabola = ParabolaOfTheAuthors(case.model, lambda _: case.loss(), itertools.repeat(None))

    def period(self) -> float:
        """Takes one step."""
        self._base.zero_grad()
        self._case.loss().backward()  # type: ignore[no-untyped-call]
        began = time.perf_counter()
        self._parabola.set_lr(self._base)
        seconds = time.perf_counter() - began
        self._base.step()
        return seconds


class Bare:
    """The base optimizer alone."""

    def __init__(self, case: Case, base: Optimizer) -> None:
        self._case, self._base = case, base

    def period(self) -> float:
        """Takes one step, which spends nothing on the learning rate."""
        self._base.zero_grad()
        self._case.loss().backward()  # type: ignore[no-untyped-call]
        self._base.step()
        return 0.0


def methods(case: Case, make: Callable[[Any], Optimizer], *, exact: bool = True) -> dict[str, Callable[[], Method]]:
    """Returns makers of the ways to compare, by name; those of other packages if they are installed.

    Args:
        case: What they train.
        make: Makes the base optimizer.
        exact: Whether to include exact modes.
    """
    modes = [*FORWARDS, *(["exact"] if exact else [])]

    def wrapped(mode: str) -> Callable[[], Method]:
        return lambda: Wrapped(case, make(case.parameters), mode)

    found = {mode: wrapped(mode) for mode in modes}
    if paper_authors.is_installed():
        found[paper_authors.TITLE] = lambda: PaperAuthors(case, make(case.parameters))
    return found
