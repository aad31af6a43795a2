"""Averages over probe steps, and what they estimate.

A moving average with ``smoothing`` is the plain mean of its first ``1 / (1 − smoothing)`` values; from then on each
value takes the weight ``1 − smoothing``. A power-law average forgets more slowly the longer a run is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from gen_optim.rules.parabola import Parabola

_CHANGE_WEIGHT = 0.3
"""Least weight of a parabola in the average change of the loss, the unit in which others are averaged."""

_MOST_CHANGES = 2.0
"""Number of average changes as which a parabola counts at most: one step off a saddle would outweigh all others."""

_ASCENDS = 3.0
"""Number of standard errors by which steps must raise the loss in the mean for it not to be noise. With two, a run that
stands still for long would lose its learning rate."""

_EARLIER, RECENT = 2.0, 8.0
"""Exponents of power-law averages of the losses, over about the last half and the last eighth of the steps."""


def _weight_of_next(count: int, smoothing: float) -> float:
    return max(1.0 - smoothing, 1.0 / (count + 1))


def is_settled(count: int, smoothing: float) -> bool:
    """Whether enough values are averaged."""
    return count >= 1.0 / (1.0 - smoothing)


@dataclass(frozen=True)
class LossAverages:
    """Moving averages of the losses at the start of probe steps.

    ``deviation`` is the average of their absolute deviation from ``mean``.
    """

    mean: float = 0.0
    deviation: float = 0.0
    count: int = 0

    def with_loss(self, loss: float, smoothing: float) -> LossAverages:
        """The averages with one more finite loss."""
        weight = _weight_of_next(self.count, smoothing)
        surprise = loss - self.mean if self.count else 0.0
        return LossAverages(
            mean=self.mean + weight * surprise if self.count else loss,
            deviation=self.deviation + weight * (abs(surprise) - self.deviation),
            count=self.count + 1,
        )


@dataclass(frozen=True)
class ParabolaAverages:
    """Moving averages of the parabolas along the steps.

    A step at the learning rate α changes the loss by ``slope · α`` to first order and by ``curvature · α²`` to second
    order. The sum of their absolute values is its change. Slopes and curvatures are averaged in units of the average
    change, so that what was measured while losses were large does not outweigh everything later. The weight of earlier
    ones falls as the learning rate grows, so that what was measured at tiny steps does not either.

    ``rise`` is the average of the absolute difference between the losses at both ends of a step. ``first_order`` is the
    average fraction of the first order in the change, negative for ascending directions, ``first_order_square`` that of
    its square. ``descent`` is the average fraction by which a step lowers the loss, negative if it raises it, and
    ``descent_square`` that of its square. ``weight`` is the sum of the weights in ``slope`` and ``curvature``, in units
    of the last one's. ``lr`` is the learning rate of the last one's step, the scheduler's factor included.
    """

    slope: float = 0.0
    curvature: float = 0.0
    change: float = 0.0
    rise: float = 0.0
    first_order: float = 0.0
    first_order_square: float = 0.0
    descent: float = 0.0
    descent_square: float = 0.0
    count: int = 0
    weight: float = 0.0
    lr: float = 0.0

    def with_parabola(self, parabola: Parabola, lr: float, rise: float, smoothing: float) -> ParabolaAverages:
        """The averages with one more finite parabola; unchanged if its change is 0 or not finite.

        ``lr`` includes the scheduler's factor. ``rise`` is the absolute difference between the losses at the end and
        the start of the step; 0 if unknown.
        """
        first, second = parabola.slope * lr, parabola.curvature * lr * lr
        change = abs(first) + abs(second)
        if not 0.0 < change < math.inf:
            return self
        descent = (first - second / 2.0) / change
        weight = _weight_of_next(self.count, smoothing)
        # A curvature measured along a shorter step is less certain, by the square of the ratio of lengths.
        total = 1.0 + smoothing * self.weight * min(1.0, self.lr / lr) ** 2
        # The unit comes from earlier parabolas: a unit that depends on this one would bias averages of noise.
        unit = max(self.change or change, change / _MOST_CHANGES)

        def average(mean: float, value: float, weight: float = weight) -> float:
            return mean + weight * (value - mean)

        return ParabolaAverages(
            slope=average(self.slope, parabola.slope / unit, 1.0 / total),
            curvature=average(self.curvature, parabola.curvature / unit, 1.0 / total),
            change=average(self.change, change, max(weight, _CHANGE_WEIGHT)),
            rise=average(self.rise, rise),
            first_order=average(self.first_order, first / change),
            first_order_square=average(self.first_order_square, (first / change) ** 2),
            descent=average(self.descent, descent),
            descent_square=average(self.descent_square, descent**2),
            count=self.count + 1,
            weight=total,
            lr=lr,
        )

    def signal_fraction(self, smoothing: float) -> float:
        """The fraction of signal in the slopes, in [0, 1]: 1 if they all agree, 0 if they are pure noise.

        It is the square of the mean first-order fraction over its mean square. The squared mean of ``n`` values of pure
        noise is an n-th of their mean square, which is subtracted.
        """
        count = self._independent(smoothing)
        if count <= 1 or not self.first_order_square:
            return 0.0
        share = self.first_order**2 / self.first_order_square
        return max(0.0, (count * share - 1.0) / (count - 1.0))

    def ascends(self, smoothing: float) -> bool:
        """Whether steps raise the loss, by more than noise does."""
        return self.descent < 0.0 and self._independent(smoothing) * self.descent**2 > _ASCENDS**2 * self.descent_square

    def _independent(self, smoothing: float) -> float:
        """The number of values with equal weights whose mean varies as much as the moving averages."""
        return min(self.count, (1.0 + smoothing) / (1.0 - smoothing))


@dataclass(frozen=True)
class BalanceAverages:
    """Averages of losses at the end of steps, and of what they are above the losses at averaged weights.

    They are power-law averages, about the mean over the last part of the steps so far, whatever their number: with the
    exponent p the value of the s-th of t steps weighs as s^(p − 1). The mean of ln(s / t) is then −1 / p, so that the
    average of a loss that falls like −ln s is the loss at t · e^(−1/p).

    ``earlier`` is over about the last half of the steps, ``recent`` and ``excess`` are over the last eighth. ``step``
    is that of the last loss, ``excess_step`` that of the last excess loss. Steps are counted from ``began`` on.
    """

    began: int = 0
    earlier: float = 0.0
    recent: float = 0.0
    step: int = 0
    excess: float = 0.0
    excess_step: int = 0

    def with_losses(self, loss: float, excess_loss: float | None, step: int) -> BalanceAverages:
        """The averages with the finite loss of a later step, and its excess loss if that is known and finite."""
        averages = replace(
            self,
            earlier=self._average(self.earlier, loss, self.step, step, _EARLIER),
            recent=self._average(self.recent, loss, self.step, step, RECENT),
            step=step,
        )
        if excess_loss is None or not math.isfinite(excess_loss):
            return averages
        excess = self._average(self.excess, excess_loss, self.excess_step, step, RECENT)
        return replace(averages, excess=excess, excess_step=step)

    def _average(self, mean: float, value: float, last: int, step: int, exponent: float) -> float:
        known = (last - self.began) / (step - self.began) if last else 0.0
        return mean + (1.0 - math.pow(known, exponent)) * (value - mean)

    @property
    def count(self) -> int:
        """The number of steps averaged over."""
        return self.step - self.began

    @property
    def gain(self) -> float:
        """How much the loss falls while the number of steps, ``began`` included, grows e-fold; NaN before the first."""
        if not self.count:
            return math.nan
        recent, earlier = (self.began + self.count * math.exp(-1.0 / each) for each in (RECENT, _EARLIER))
        return (self.earlier - self.recent) / math.log(recent / earlier)

    @property
    def ratio(self) -> float:
        """The excess loss over the gain; NaN if no excess loss is known at the last step.

        It is 0 if the average is no better than the present weights, and else infinite without a gain.
        """
        if not self.step or self.excess_step != self.step:
            return math.nan
        if self.excess <= 0.0:
            return 0.0
        return self.excess / self.gain if self.gain > 0.0 else math.inf
