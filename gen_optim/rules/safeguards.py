"""Safeguards of the relaxed rule: conditions under which it does not follow its averages."""

from __future__ import annotations

import math

from gen_optim.rules.averages import ParabolaAverages
from gen_optim.rules.parabola import Parabola
from gen_optim.rules.state import ProbeStatus

__all__ = ["ROUNDING", "first_safeguard", "is_below_noise", "is_contradicted", "is_diverging"]

_DIVERGING = 8.0
"""A step diverges if the loss rises by this many times what it usually changes."""

_FEWEST = 3
"""Number of parabolas from which on a usual change is known."""

ROUNDING = 2.0**-20
"""Fraction by which a loss may change because it is rounded in single precision."""

_CONTRADICTED = 1.3
"""A single parabola that calls for a shorter step counts against averages that call for this many times the step."""


def first_safeguard(
    parabola: Parabola,
    parabolas: ParabolaAverages,
    *,
    loss_start: float,
    loss_end: float | None,
    loss_initial: float,
) -> ProbeStatus | None:
    """The status of the first safeguard that fires, in this order; None if none does.

    - ``REVERTED``: the step diverged (:func:`is_diverging`);
    - ``NON_FINITE_PROBE``: the parabola is not finite;
    - ``BELOW_NOISE``: the parabola is no more than rounding (:func:`is_below_noise`).

    ``parabolas`` are averages of earlier ones. ``loss_end`` is None if the step is not taken yet. ``loss_initial`` is
    the loss where training began.
    """
    if loss_end is not None and is_diverging(parabolas, loss_start, loss_end, loss_initial=loss_initial):
        return ProbeStatus.REVERTED
    if not parabola.is_finite:
        return ProbeStatus.NON_FINITE_PROBE
    return ProbeStatus.BELOW_NOISE if is_below_noise(parabola) else None


def is_diverging(parabolas: ParabolaAverages, loss_start: float, loss_end: float, *, loss_initial: float) -> bool:
    """Whether a step must be reverted: its end loss is not finite, or above the initial one and risen unusually far."""
    if not math.isfinite(loss_end):
        return True
    rise = max(_DIVERGING * parabolas.rise, ROUNDING * abs(loss_start))
    return parabolas.count >= _FEWEST and loss_end > loss_initial and loss_end - loss_start > rise


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
