"""The search for an initial learning rate along the first direction."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

_FACTOR = 4.0
"""Ratio of successive learning rates."""

_SMALLEST, LARGEST = 1e-36, 1024.0
"""Ends of the search."""


@dataclass(frozen=True)
class InitialSearch:
    """Outcome of :func:`search_initial_lr`.

    Attributes:
        lr: The learning rate of the lowest loss found; None if none lowers the loss.
        learning_rates: All learning rates evaluated, in that order.
        losses: The losses at them.
        is_bounded: Whether the loss has a minimum along the direction, as far as was looked. If not, ``lr`` is that of
            a step as long as the parameters.
    """

    lr: float | None
    learning_rates: tuple[float, ...]
    losses: tuple[float, ...]
    is_bounded: bool = True


def search_initial_lr(evaluate: Callable[[float], float], loss: float, *, rounding: float) -> InitialSearch:
    """Find the first minimum of the loss along a direction by an exponential search at any scale.

    The search divides the learning rate by 4, from 1 down, until the loss descends linearly: the next smaller learning
    rate then has about a quarter of the descent. From there it multiplies by 4 up to the first minimum. A search that
    went up from 1 alone could end in a far basin that training would never reach. The minimum is refined once, at half
    and twice its learning rate.

    Args:
        evaluate: Returns the loss at a learning rate; it may be NaN or infinite.
        loss: The loss at learning rate 0.
        rounding: The relative error of a loss; a smaller descent does not count.

    Returns:
        The learning rate found, and all evaluations.

    Example:
        >>> search_initial_lr(lambda lr: (lr - 0.01) ** 2, 1e-4, rounding=1e-12).lr
        0.0078125
    """
    evaluated: dict[float, float] = {}

    def descent(lr: float) -> float:
        """How far the loss falls; −∞ if it is not finite."""
        if lr not in evaluated:
            evaluated[lr] = evaluate(lr)
        return loss - evaluated[lr] if math.isfinite(evaluated[lr]) else -math.inf

    noise = rounding * abs(loss)
    lr = 1.0
    while lr > _SMALLEST:
        here, below = descent(lr), descent(lr / _FACTOR)
        is_linear = here > noise and 0 < below < 1.25 * here / _FACTOR
        is_silent = max(abs(here), abs(below)) <= noise
        if is_linear or is_silent:
            break
        lr /= _FACTOR

    found: float | None = None
    while lr <= LARGEST:
        if found is None:
            if descent(lr) > noise:
                found = lr
            elif lr >= 1.0 and descent(lr) < -noise:
                break  # above all learning rates of the way down, and the loss rises
        elif descent(lr) > descent(found):
            found = lr
        else:
            break
        lr *= _FACTOR
    if found is not None:
        found = max((found, found / 2.0, found * 2.0), key=descent)
    return InitialSearch(found, tuple(evaluated), tuple(evaluated.values()))
