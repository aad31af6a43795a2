"""Where to start: the learning rate that the loss along the first direction calls for. Numbers only, no tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["StartSearch", "search_start"]


@dataclass(frozen=True)
class StartSearch:
    """Outcome of :func:`search_start`.

    Attributes:
        lr: The learning rate of the lowest loss found; None where none lowers the loss.
        learning_rates: All that were evaluated, in that order.
        losses: The losses there.
    """

    lr: float | None
    learning_rates: tuple[float, ...]
    losses: tuple[float, ...]


def search_start(
    evaluate: Callable[[float], float],
    loss: float,
    *,
    rounding: float,
    factor: float = 4.0,
    largest: float = 1e9,
    smallest: float = 1e-16,
) -> StartSearch:
    """Search exponentially for the first minimum of the loss along a direction, knowing no scale.

    From learning rate 1 it walks down by ``factor`` to where the loss descends linearly (there a ``factor``-th of the
    learning rate has about a ``factor``-th of the descent), then takes the first minimum above. A walk that only
    compared losses from 1 on could settle in a far basin that no step of training would ever reach. The minimum is
    refined once, at half and twice the learning rate.

    Args:
        evaluate: The loss at a learning rate; NaN and infinity are allowed.
        loss: The loss at learning rate 0.
        rounding: The relative error of a loss; a smaller descent does not count.
        factor: Ratio between successive learning rates.
        largest: Upper end of the search.
        smallest: Lower end of the search.

    Returns:
        The learning rate found, and all evaluations.

    Example:
        >>> search_start(lambda lr: (lr - 0.01) ** 2, 1e-4, rounding=1e-12).lr
        0.0078125
    """
    evaluated: dict[float, float] = {}

    def descent(lr: float) -> float:
        """How far the loss falls; infinitely little where it is not finite."""
        if lr not in evaluated:
            evaluated[lr] = evaluate(lr)
        return loss - evaluated[lr] if math.isfinite(evaluated[lr]) else -math.inf

    noise = rounding * abs(loss)
    lr = 1.0
    while lr > smallest:
        here, below = descent(lr), descent(lr / factor)
        is_linear = here > noise and 0 < below < 1.25 * here / factor
        is_silent = max(abs(here), abs(below)) <= noise
        if is_linear or is_silent:
            break
        lr /= factor

    found: float | None = None
    while lr <= largest:
        if found is None:
            if descent(lr) > noise:
                found = lr
            elif lr >= 1.0 and descent(lr) < -noise:
                break  # beyond all that was walked down, and it rises
        elif descent(lr) > descent(found):
            found = lr
        else:
            break
        lr *= factor
    if found is not None:
        found = max((found, found / 2.0, found * 2.0), key=descent)
    return StartSearch(found, tuple(evaluated), tuple(evaluated.values()))
