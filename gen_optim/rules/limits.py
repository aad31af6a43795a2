"""How far the relaxed rule may move the learning rate in one probe step."""

from __future__ import annotations

import math

__all__ = ["CAREFUL_GROWTH", "fall_limit", "growth_limit", "limited_lr"]

_CHANGE = 1.1
"""Largest factor by which the learning rate changes in a probe step: training must show what the last change did."""

_LATER_GROWTH, CAREFUL_GROWTH = 1.05, 1.02
"""Largest factors by which the learning rate grows after the burn-in, and near where training was unstable before.
With momentum 0.9, a learning rate 10 % above the edge of stability multiplies what is unstable by a hundred within
eight steps, one 5 % above by 23, one 2 % above by six: that is seen in time."""

_ANNEALING = 6.0
"""Divided by the number of parabolas: how much further the learning rate falls than it grows in pure noise, where it
does either half of the time. Without a scheduler it then anneals like a power of the number of steps."""


def growth_limit(signal_fraction: float, *, is_burning_in: bool) -> float:
    """The largest factor by which the learning rate grows, at least 1: larger in the burn-in and for clear signals."""
    growth = _CHANGE if is_burning_in else _LATER_GROWTH
    return math.pow(growth, 0.5 + 0.5 * signal_fraction)


def fall_limit(signal_fraction: float, count: int) -> float:
    """The smallest factor by which the learning rate falls, at most 1.

    A clear signal allows the largest change. In pure noise the learning rate falls further than it grows at first,
    which anneals it, and less far in the long run, or it would die of chance.

    Args:
        signal_fraction: Fraction of signal in the slopes.
        count: Number of parabolas averaged.
    """
    in_noise = math.log(_LATER_GROWTH) / 4.0 + _ANNEALING / max(count, 1)
    change = math.log(_CHANGE)
    return math.exp(-(signal_fraction * change + (1.0 - signal_fraction) * min(in_noise, change)))


def limited_lr(lr: float, target: float, *, low: float, high: float, growth: float, fall: float) -> float:
    """The learning rate moved towards a target, unless the target lies in the dead band from ``low`` to ``high``.

    Above the band it grows by ``target / high``, at most by ``growth``. Below it falls by ``target / low``, at least to
    ``fall`` times itself.
    """
    if target > high:
        return lr * min(growth, target / high)
    if target < low:
        return lr * max(fall, target / low)
    return lr
