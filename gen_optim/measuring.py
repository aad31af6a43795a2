"""Measuring the loss along the base optimizer's direction.

``evaluate`` is the loss at a multiple of the base optimizer's step, as the closure returned it; ``read`` turns such
losses into numbers, all at once, so that a measurement costs one transfer from the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gen_optim.control import StartSearch, search_start
from gen_optim.evaluating import Loss, rounding_of
from gen_optim.quadratic import Parabola, fit_parabola

__all__ = ["Measurement", "measure_start", "probe_around"]


@dataclass(frozen=True)
class Measurement:
    """The loss along the direction, as a probe step saw it.

    Attributes:
        learning_rates: Where it was evaluated.
        losses: The losses there.
        loss: The one at learning rate 0.
        found: The parabola through them, or the outcome of the start's search.
    """

    learning_rates: tuple[float, ...]
    losses: tuple[float, ...]
    loss: float
    found: Parabola | StartSearch

    @property
    def parabola(self) -> Parabola:
        """The parabola; NaN where a start was searched."""
        return self.found if isinstance(self.found, Parabola) else Parabola(self.loss, math.nan, math.nan)

    @property
    def optimal_lr(self) -> float | None:
        """The learning rate of the lowest loss, None where there is none."""
        return self.found.optimal_lr if isinstance(self.found, Parabola) else self.found.lr


def probe_around(
    evaluate: Callable[[float], Loss],
    read: Callable[[Sequence[Loss]], list[float]],
    *,
    lr: float,
    here: Loss,
    tolerance: float,
) -> Measurement:
    """Approximate GeN: a parabola through the losses at −lr, 0 and +lr (Bu and Xu, arXiv:2407.02772, section 3).

    Args:
        evaluate: The loss at a multiple of the step.
        read: Turns losses into numbers.
        lr: The learning rate of the step.
        here: The loss where the step began.
        tolerance: Relative error of a loss in machine epsilons of its dtype.
    """
    raw = [evaluate(-1.0), here, evaluate(1.0)]
    learning_rates, losses = (-lr, 0.0, lr), tuple(read(raw))
    parabola = fit_parabola(learning_rates, losses, rounding=tolerance * rounding_of(raw))
    return Measurement(learning_rates, losses, losses[1], parabola)


def measure_start(
    evaluate: Callable[[float], Loss],
    read: Callable[[Sequence[Loss]], list[float]],
    *,
    lr: float,
    here: Loss,
    tolerance: float,
) -> Measurement:
    """Search along the first direction for where the loss is lowest; arguments as in :func:`probe_around`."""
    [loss] = read([here])
    if not math.isfinite(loss):
        return Measurement((0.0,), (loss,), loss, StartSearch(None, (), ()))
    search = search_start(
        lambda learning_rate: read([evaluate(learning_rate / lr)])[0], loss, rounding=tolerance * rounding_of([here])
    )
    return Measurement((0.0, *search.learning_rates), (loss, *search.losses), loss, search)
