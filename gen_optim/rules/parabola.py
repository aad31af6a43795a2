"""The second-order model of the loss along a direction, and its fit.

Along a direction ω the loss ``g(α) = L(θ − αω)`` is modelled to second order as

    g(α) ≈ g(0) − slope · α + curvature · α² / 2,

with ``slope = −g′(0)`` (positive if the direction descends) and ``curvature = g″(0)``. If the curvature is positive,
the minimum ``slope / curvature`` is the optimal learning rate of the generalized Newton's method (Bu and Xu, ICLR 2025,
arXiv:2407.02772, eq. 5).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Parabola:
    """A second-order model of the loss along a direction.

    Attributes:
        value: The loss at learning rate 0.
        slope: ``−g′(0)``, in units of the loss per unit of learning rate.
        curvature: ``g″(0)``, in units of the loss per squared unit of learning rate.
        slope_noise: The largest absolute slope that rounding alone can produce.
        curvature_noise: The largest absolute curvature that rounding alone can produce.

    Example:
        >>> parabola = Parabola(value=1.0, slope=2.0, curvature=4.0)
        >>> parabola.optimal_lr
        0.5
        >>> parabola.predict(0.5)
        0.5
    """

    value: float
    slope: float
    curvature: float
    slope_noise: float = 0.0
    curvature_noise: float = 0.0

    @property
    def is_finite(self) -> bool:
        """Whether value, slope and curvature are all finite."""
        return all(map(math.isfinite, (self.value, self.slope, self.curvature)))

    @property
    def optimal_lr(self) -> float | None:
        """The minimum, ``slope / curvature``; None if there is none (curvature ≤ 0, or not finite).

        It is negative if the direction ascends.
        """
        if not self.is_finite or self.curvature <= 0:
            return None
        optimum = self.slope / self.curvature
        return optimum if math.isfinite(optimum) else None

    def predict(self, learning_rate: float) -> float:
        """The loss of the model at ``learning_rate``."""
        return self.value - self.slope * learning_rate + 0.5 * self.curvature * learning_rate * learning_rate


def fit_parabola(learning_rates: Sequence[float], losses: Sequence[float], *, rounding: float = 0.0) -> Parabola:
    """Fit a parabola to losses along a direction by least squares.

    Through three points it is the interpolation. At −α, 0, +α that is

        slope = (g(−α) − g(α)) / 2α,    curvature = (g(−α) − 2 g(0) + g(α)) / α²

    (Bu and Xu, arXiv:2407.02772, section 3). The fit is linear in the losses. An error of at most
    ``rounding · max|loss|`` in each loss changes a coefficient by at most that times the sum of its absolute weights.
    For the points above, the noise of the curvature is ``4 · rounding · max|g| / α²``.

    Args:
        learning_rates: The learning rates of the points, in any order; at least three distinct finite numbers.
        losses: The losses at them, in the same order. If one is NaN or infinite, all coefficients are NaN.
        rounding: The relative error of a loss, such as a few times the machine epsilon of its dtype.

    Returns:
        The parabola, with the noise that ``rounding`` implies.

    Raises:
        ValueError: If the lengths differ, or if fewer than three distinct finite learning rates are given.

    Example:
        >>> parabola = fit_parabola([-1.0, 0.0, 1.0], [4.0, 1.0, 0.0])
        >>> round(parabola.slope, 12), round(parabola.curvature, 12)
        (2.0, 2.0)
    """
    points = np.asarray(learning_rates, dtype=np.float64)
    values = np.asarray(losses, dtype=np.float64)
    if points.shape != values.shape or points.ndim != 1:
        raise ValueError(
            f"learning_rates and losses must be as many: got {points.size} learning rates and {values.size} losses"
        )
    if not np.isfinite(points).all() or np.unique(points).size < 3:
        raise ValueError(
            f"learning_rates must hold at least three distinct finite numbers to fix a parabola, got {points.tolist()}"
        )
    if not np.isfinite(values).all():
        return Parabola(math.nan, math.nan, math.nan)

    # In units of the largest learning rate and relative to the loss nearest to 0, the fit neither over- nor underflows,
    # and a constant added to the loss changes the value alone.
    unit = float(np.abs(points).max())
    origin = values[np.abs(points).argmin()]
    scaled = points / unit
    weights = np.linalg.pinv(np.stack([np.ones_like(scaled), -scaled, 0.5 * scaled**2], axis=1))
    with np.errstate(over="ignore", invalid="ignore"):
        value, slope, curvature = (weights @ (values - origin)).tolist()
        noise = rounding * float(np.abs(values).max()) * np.abs(weights).sum(axis=1)
        _, slope_noise, curvature_noise = noise.tolist()
    return Parabola(
        value=origin.item() + value,
        slope=slope / unit,
        curvature=curvature / unit / unit,
        slope_noise=slope_noise / unit,
        curvature_noise=curvature_noise / unit / unit,
    )
