"""The ways to choose a learning rate that are compared, each as steps of which the cost can be told."""

from __future__ import annotations

import contextlib
import io
import itertools
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Protocol

from torch import Tensor
from torch.optim import Optimizer

from benchmarks.cost.cases import Case
from gen_optim import GeNOptimizer

FORWARDS = {"lookback": 1, "approximate": 2}
"""The forward passes that these cannot do without, at each probe step."""

PEER = "gen-optim 0.1.1"


class Method(Protocol):
    """A way to choose a learning rate, in use."""

    def period(self) -> float:
        """Take the steps between one probe and the next, and return the seconds spent on the learning rate."""


class Wrapped:
    """A GeNOptimizer, of which the closure's first call and the base optimizer's step do not count.

    Its probe steps follow each other as closely as they can. Looking back takes two steps: one that keeps where it
    began, and one that looks back.

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
        self._optimizer = GeNOptimizer(base, mode=mode, rule="published", period=self._steps)
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
        """Take one or two steps."""
        self._others = 0.0
        began = time.perf_counter()
        for _ in range(self._steps):
            self._optimizer.step(self._closure)
        total = time.perf_counter() - began
        record = self._optimizer.last_probe
        assert record is not None, "one of them was a probe step"
        return total - self._others


class PaperAuthors:
    """Their package: ``lr_parabola`` between ``backward()`` and ``step()``."""

    def __init__(self, case: Case, base: Optimizer) -> None:
        self._case, self._base = case, base
        self._choose: Callable[..., Any] = import_module("GeN").lr_parabola

    def period(self) -> float:
        """Take one step."""
        self._base.zero_grad()
        self._case.loss().backward()  # type: ignore[no-untyped-call]
        batches = itertools.repeat((self._case.inputs, self._case.targets))
        began = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            self._choose(
                self._case.model,
                self._base,
                criterion=self._case.criterion,
                tr_iter=batches,
                device="cpu",
                task="image_cls",
                lr_factor=[-1, 0, 1],
            )
        seconds = time.perf_counter() - began
        self._base.step()
        return seconds


class Bare:
    """The base optimizer alone."""

    def __init__(self, case: Case, base: Optimizer) -> None:
        self._case, self._base = case, base

    def period(self) -> float:
        """Take one step, which spends nothing on the learning rate."""
        self._base.zero_grad()
        self._case.loss().backward()  # type: ignore[no-untyped-call]
        self._base.step()
        return 0.0


def methods(case: Case, make: Callable[[Any], Optimizer], *, exact: bool = True) -> dict[str, Callable[[], Method]]:
    """The makers of the ways to compare, by name; others than this package's where they are installed.

    Args:
        case: What they train.
        make: Makes the base optimizer.
        exact: Whether to include exact modes.
    """
    modes = [*FORWARDS, *(["exact"] if exact else [])]

    def wrapped(mode: str) -> Callable[[], Method]:
        return lambda: Wrapped(case, make(case.parameters), mode)

    found = {mode: wrapped(mode) for mode in modes}
    if find_spec("GeN") is not None:
        found[PEER] = lambda: PaperAuthors(case, make(case.parameters))
    return found
