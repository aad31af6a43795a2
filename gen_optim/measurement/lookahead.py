"""Measuring the loss along the base optimizer's step: by probes, by differentiation, or to find a start."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from numbers import Real

import torch
from torch import Tensor

from gen_optim.closures.losses import Loss, rounding_of
from gen_optim.distributed import Ranks
from gen_optim.measurement.double_backward import slope_and_curvature, twice_differentiable_kernels
from gen_optim.measurement.interpolation import Move
from gen_optim.rules.initial_search import StartSearch, search_start
from gen_optim.rules.parabola import Parabola, fit_parabola

__all__ = [
    "MODES",
    "Line",
    "Measurement",
    "Mode",
    "check_mode",
    "check_tolerance",
    "differentiate",
    "probe_around",
    "search",
    "searched_lr",
]


def check_tolerance(value: object) -> float:
    """Return the relative error of a loss in machine epsilons, if it is one.

    Raises:
        ValueError: If it is not a finite number of at least 0.
    """
    number = math.nan if isinstance(value, bool) or not isinstance(value, Real) else float(value)
    if 0.0 <= number < math.inf:
        return number
    raise ValueError(f"tolerance must be a finite number of at least 0, got {value!r}")


@dataclass(frozen=True)
class Line:
    """The loss along one step of the base optimizer, ready to be evaluated.

    Attributes:
        move: The step.
        lr: Its learning rate.
        here: The loss where it began, as the closure returned it; None where that has to be evaluated.
        call: Evaluates the loss where the parameters are.
        call_with_graph: Likewise, with a graph.
        read: Turns losses into numbers to be minimised, averaged over the ranks, all at once: one transfer from the
            device.
        tolerance: Relative error of a loss, in units of rounding.
        computed_in: Dtypes in which losses are computed, besides their own.
        ranks: The processes that measure together. What fails on one of them is raised by ``read``.
    """

    move: Move
    lr: float
    here: Loss | None
    call: Callable[[], Loss]
    call_with_graph: Callable[[], Tensor]
    read: Callable[[Sequence[Loss]], list[float]]
    tolerance: float
    computed_in: Collection[torch.dtype] = ()
    ranks: Ranks = field(default_factory=Ranks)

    def evaluate(self, multiple: float) -> Loss:
        """The loss at a multiple of the step."""
        if multiple == 0.0 and self.here is not None:
            return self.here
        self.move.write(multiple)
        return self.ranks.attempt(self.call, instead=math.nan)

    def read_with_rounding(self, losses: Sequence[Loss]) -> tuple[tuple[float, ...], float]:
        """Losses as numbers, and their relative error.

        That is averaged over the ranks too, since judgements depend on it, and a closure may return a tensor on one
        rank and a plain number on another.
        """
        *numbers, rounding = self.read([*losses, self.tolerance * rounding_of(losses, self.computed_in)])
        return tuple(numbers), abs(rounding)  # under ``maximize`` numbers that are read change their sign


@dataclass(frozen=True)
class Measurement:
    """The loss along the direction, as a probe step saw it.

    Attributes:
        learning_rates: Where it was evaluated.
        losses: The losses there.
        raw: The one where the present step begins, as the closure returned it.
        loss: The one where the measured step begins, as a number to be minimised.
        found: The parabola through them, or the outcome of the start's search.
        arrival: The loss where the measured step has led; None where it has not been taken yet.
    """

    learning_rates: tuple[float, ...]
    losses: tuple[float, ...]
    raw: Loss
    loss: float
    found: Parabola | StartSearch
    arrival: float | None = None

    @property
    def parabola(self) -> Parabola:
        """The parabola; NaN where a start was searched."""
        return self.found if isinstance(self.found, Parabola) else Parabola(self.loss, math.nan, math.nan)

    @property
    def optimal_lr(self) -> float | None:
        """The learning rate of the lowest loss, None where there is none."""
        return self.found.optimal_lr if isinstance(self.found, Parabola) else self.found.lr


def probe_around(line: Line) -> Measurement:
    """Approximate GeN: a parabola through the losses at −lr, 0 and +lr (Bu and Xu, arXiv:2407.02772, section 3)."""
    ahead = line.evaluate(1.0)  # first: the parameters are there
    here = line.evaluate(0.0)
    raw = [line.evaluate(-1.0), here, ahead]
    learning_rates, (losses, rounding) = (-line.lr, 0.0, line.lr), line.read_with_rounding(raw)
    parabola = fit_parabola(learning_rates, losses, rounding=rounding)
    return Measurement(learning_rates, losses, here, losses[1], parabola)


def differentiate(line: Line) -> Measurement:
    """Exact GeN: slope and curvature where the step began, by double backward (arXiv:2407.02772, section 2)."""
    line.move.write(0.0)

    def derivatives() -> tuple[Loss, Loss, Loss]:
        loss = line.call_with_graph()
        return loss.detach(), *slope_and_curvature(loss, *line.move.step())

    again, *found = line.ranks.attempt(derivatives, instead=(math.nan,) * 3)
    here = again if line.here is None else line.here
    value, slope, curvature = line.read([here, *found])
    return Measurement((0.0,), (value,), here, value, Parabola(value, slope / line.lr, curvature / line.lr / line.lr))


def search(line: Line) -> Measurement:
    """Look along the first step for where the loss is lowest; where it is not finite, nowhere."""
    here = line.evaluate(0.0)
    (loss,), rounding = line.read_with_rounding([here])
    if not math.isfinite(loss):
        return Measurement((0.0,), (loss,), here, loss, StartSearch(None, (), ()))
    found = search_start(
        lambda multiple: line.read([line.evaluate(multiple)])[0],
        loss,
        rounding=rounding,
        largest=_REACH,
    )
    learning_rates = tuple(multiple * line.lr for multiple in found.learning_rates)
    # Beyond its reach the step is too short to tell the direction from the rounding of the parameters.
    is_out_of_reach = found.lr is not None and found.lr >= _REACH and line.lr < searched_lr(-1)
    lr = None if found.lr is None or is_out_of_reach else found.lr * line.lr
    return Measurement(
        (0.0, *learning_rates), (loss, *found.losses), here, loss, StartSearch(lr, learning_rates, found.losses)
    )


_REACH = 1024.0
"""Up to which multiple of a step a start is searched along it."""


def searched_lr(failures: int) -> float:
    """The learning rate of the base optimizer's step along which a start is searched.

    It is large because the direction is read off as a difference of parameters, whose rounding would drown that of a
    small step; and larger after each search that found nothing, in case the gradients are so small, in a cycle of
    seven.

    Args:
        failures: How many searches have found nothing; −1 stands for the largest.
    """
    return _REACH ** (failures % 7)


@dataclass(frozen=True)
class Mode:
    """A way to measure.

    Attributes:
        measure: Measures slope and curvature along the step that is about to be taken; None where the step before is
            looked back at instead.
        kernels: Around all calls of the closure in a probe step.
    """

    measure: Callable[[Line], Measurement] | None
    kernels: Callable[[], AbstractContextManager[None]] = nullcontext


MODES = {
    "lookback": Mode(None),
    "approximate": Mode(probe_around),
    "exact": Mode(differentiate, twice_differentiable_kernels),
}
"""Modes by the name that ``GeNOptimizer(mode=...)`` takes."""


def check_mode(name: object) -> None:
    """Refuse what is no mode.

    Raises:
        ValueError: Names those that there are.
    """
    if name not in list(MODES):
        raise ValueError(f"mode must be one of {', '.join(map(repr, MODES))}, got {name!r}")
