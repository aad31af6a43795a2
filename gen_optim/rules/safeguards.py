"""Safeguards of the relaxed rule: conditions under which it does not follow its averages."""

from __future__ import annotations

import math

from gen_optim.rules.averages import LossAverages, ParabolaAverages
from gen_optim.rules.parabola import Parabola

_UNUSUAL = 8.0
"""A step raises the loss unusually far if that rises by this many times what it usually changes."""

_EXPLOSION = 10.0
"""A loss has exploded if it is this many mean absolute deviations above the mean loss. From 9 on, one that stays at a
higher level is noticed once."""

ROUNDING = 2.0**-20
"""Fraction by which a loss may change because it is rounded in single precision."""


def rises_unusually(parabolas: ParabolaAverages, loss_start: float, loss_end: float, *, descent_initial: float) -> bool:
    """Whether a step has raised the loss unusually far: on the same batch, noise does not.

    Before the first parabola ``descent_initial``, the descent that the initial search found, is the only known change
    of the loss; 0 if it is not known.
    """
    usual = parabolas.rise if parabolas.count else descent_initial or math.inf
    return loss_end - loss_start > max(_UNUSUAL * usual, ROUNDING * abs(loss_start))


def is_diverging(
    parabolas: ParabolaAverages, loss_start: float, loss_end: float, *, loss_initial: float, descent_initial: float
) -> bool:
    """Whether a step must be reverted: its end loss is not finite, or above the initial one and risen unusually far."""
    if not math.isfinite(loss_end):
        return True
    return loss_end > loss_initial and rises_unusually(parabolas, loss_start, loss_end, descent_initial=descent_initial)


def has_exploded(losses: LossAverages, loss: float, *, loss_initial: float) -> bool:
    """Whether a loss is above ``loss_initial``, and far above the mean loss.

    The result does not change if the loss is shifted or scaled, up to its rounding.
    """
    usual = max(losses.deviation, ROUNDING * abs(losses.mean))
    return loss > loss_initial and loss - losses.mean > _EXPLOSION * usual


def is_below_noise(parabola: Parabola) -> bool:
    """Whether rounding alone can produce both slope and curvature of a parabola."""
    return abs(parabola.slope) <= parabola.slope_noise and abs(parabola.curvature) <= parabola.curvature_noise


def is_contradicted(target: float, own_target: float, taken: float) -> bool:
    """Whether the averages call for a longer step than the one taken, but the last parabola for a shorter one.

    An unstable direction grows by a power from step to step, and the averages show it too late. In noise a single
    parabola contradicts nothing.

    ``target`` is what the averages call for, ``own_target`` what the last parabola does; 0 does not contradict.
    ``taken`` includes the scheduler's factor.
    """
    return 0.0 < own_target < taken < target
