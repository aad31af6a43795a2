"""Safeguards of the relaxed rule: conditions under which it does not follow its averages."""

from __future__ import annotations

import math

from gen_optim.rules.averages import LossAverages, ParabolaAverages
from gen_optim.rules.parabola import Parabola

_DIVERGING = 8.0
"""A step diverges if the loss rises by this many times what it usually changes."""

_EXPLOSION = 10.0
"""A loss has exploded if it is this many mean absolute deviations above the mean loss."""

_FEWEST = 3
"""Number of parabolas from which on their mean change is a usual one."""

ROUNDING = 2.0**-20
"""Fraction by which a loss may change because it is rounded in single precision."""

_CONTRADICTED = 1.3
"""A single parabola that calls for a shorter step counts against averages that call for this many times the step."""


def is_diverging(
    parabolas: ParabolaAverages, loss_start: float, loss_end: float, *, loss_initial: float, descent_initial: float
) -> bool:
    """Whether a step must be reverted: its end loss is not finite, or above the initial one and risen unusually far.

    ``descent_initial`` is the descent that the initial search found, the only known change of the loss at first; 0 if
    it is not known.
    """
    if not math.isfinite(loss_end):
        return True
    usual = parabolas.rise
    if parabolas.count < _FEWEST:
        usual = max(usual, descent_initial) if descent_initial > 0.0 else math.inf
    rise = max(_DIVERGING * usual, ROUNDING * abs(loss_start))
    return loss_end > loss_initial and loss_end - loss_start > rise


def has_exploded(losses: LossAverages, loss: float, *, loss_initial: float) -> bool:
    """Whether a loss is above ``loss_initial``, and far above the mean loss.

    The result does not change if the loss is shifted or scaled, up to its rounding.
    """
    usual = max(losses.deviation, ROUNDING * abs(losses.mean))
    return loss > loss_initial and loss - losses.mean > _EXPLOSION * usual


def is_below_noise(parabola: Parabola) -> bool:
    """Whether rounding alone can produce both slope and curvature of a parabola."""
    return abs(parabola.slope) <= parabola.slope_noise and abs(parabola.curvature) <= parabola.curvature_noise


def is_contradicted(target: float, own_target: float, taken: float, *, is_near_unstable: bool) -> bool:
    """Whether the averages call for a longer step than the one taken, but the last parabola for a shorter one.

    An unstable direction grows by a power from step to step, and the averages show it too late. In noise a single
    parabola contradicts nothing.

    ``target`` is what the averages call for, ``own_target`` what the last parabola does; 0 does not contradict.
    ``taken`` includes the scheduler's factor. If training was unstable not far above, any larger ``target`` is
    contradicted.
    """
    margin = 1.0 if is_near_unstable else _CONTRADICTED
    return 0.0 < own_target < taken and target > margin * taken
