"""The default rule: a relaxed learning rate from averaged slopes and curvatures. Numbers only, no tensors.

One step's best learning rate is slope / curvature, and following it is too cautious for a whole run: where training
stands still at α, the expected change of the loss, −slope · α + curvature · α² / 2, is zero, so that slope / curvature
is exactly α / 2. The noise shrinks with α, slope / curvature halves again, and so on (the short-horizon bias of Wu et
al., 2018). A multiple κ of it with 1 < κ < 2 holds the learning rate as long as steps descend on average, and lowers
it when they stop (relaxed steepest descent: Raydan and Svaiter, 2002; the edge of stability: Roulet et al.,
arXiv:2407.06183). For that, slope and curvature have to be of another batch than the gradient's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from gen_optim.rules.base import ControlState, Decision, ProbeStatus, PublishedRule, check_option, is_whole
from gen_optim.rules.initial_search import StartSearch
from gen_optim.rules.parabola import Parabola

__all__ = ["RelaxedRule"]

_CHANGE = 1.1
"""Factor by which the learning rate changes at most in a probe step: training has to show what the last change did."""

_LATER_GROWTH, _CAREFUL_GROWTH = 1.05, 1.02
"""Factors by which it grows at most after the burn-in, and near where training was unstable before. With momentum 0.9,
a learning rate 10 % above the edge of stability multiplies what is unstable by a hundred within eight steps, one 5 %
above by 23, one 2 % above by six: that is seen in time."""

_ANNEALING = 6.0
"""Divided by the number of parabolas, how much further the learning rate falls than it grows in pure noise, where it
does either half of the time: without a horizon it anneals like a power of the number of steps."""

_NEAR = 0.5
"""From which fraction of the learning rate at which it was unstable growth is careful."""

_CERTAIN, _FAR = 0.9, 4.0
"""Above this agreement, and this many times below what is called for, growth is limited by nothing but how soon
instability would show: it is careful, but at every step."""

_CREDIBLE, _CONTRADICTED = 0.5, 1.3
"""Above this agreement a single parabola counts against the averages when they call for this many times the learning
rate, and it for less than that: what makes a step unstable grows by a power from step to step, and is in the averages
too late."""

_ASTRAY = 8.0
"""A step has gone astray when the loss rises by this many times what it usually changes."""

_FEW = 3
"""Below this many parabolas nothing is usual."""

_SOON = 0.3
"""Weight of a parabola in the average of how much the loss changes, which others are measured by."""

_MOST = 2.0
"""So many usual changes of the loss count at most in an average: one step off a saddle would outweigh all others."""

_RISEN = 0.5
"""Growth ends where the mean loss is above its lowest by this many mean absolute deviations of the losses (a mean of
them varies by about a third of one), and the learning rate falls from twice that on."""

_NORMAL = 1.25
"""The standard deviation of normal noise over its mean absolute deviation."""

_STATUSES = {0.0: ProbeStatus.NO_MINIMUM, math.inf: ProbeStatus.CONCAVE}
"""What it is called when the averages call for this."""

_ROUNDING = 2.0**-20
"""A loss may rise by this fraction because it is rounded in single precision; that is no explosion."""


@dataclass(frozen=True, kw_only=True)
class RelaxedRule(PublishedRule):
    """A multiple κ of mean slope / mean curvature, from a start found in the loss itself, safe where steps go astray.

    In the order in which a training run meets it:

    - a start taken from the loss itself (``initial_search``); training begins at ``start_fraction`` of the learning
      rate found, because the first gradient points down an untypically steep slope and no momentum is built up yet;
    - a burn-in: the first ``burn_in`` probe steps follow each other at every step;
    - slope and curvature are averaged, each relative to how much the loss changes in a step at the time (or what was
      measured when losses were large would count for ever), and with less weight the more the learning rate has grown
      since (or what was measured when it was tiny would); the learning rate moves towards κ times their ratio by at
      most 10 % a probe step;
    - how far to trust them is told by the parabolas themselves: the share of their agreement among all there is in
      their slopes, 1 without noise and 0 where slopes are nothing but noise. Growth is faster where they agree; in
      pure noise the learning rate falls further than it grows at first, which anneals it, and less far in the long
      run, or it would die of chance;
    - it does not grow where the mean loss has risen, and falls where that has risen far;
    - a scheduler's factor f and this rule must not shrink the same thing twice. In pure noise the learning rate is
      raised only where the target lies above α itself, and lowered only where it lies below the step taken, α · f:
      the horizon anneals the noise, and what the estimate says about that is not followed. Without noise there is
      nothing to anneal, and the target is followed from both sides. While the mean loss is lower than ever, the
      learning rate does not fall under a scheduler;
    - nor is chance to anneal under a scheduler: where slopes are noise, so is their mean, but what all steps have
      achieved shows in the trend of the loss, and what that says about the mean slope counts by how much better it is
      known;
    - where the parabolas agree without noise and call for far more, it grows by 2 % and is probed at every step; and
      where the averages call for more but the last step was too long by its own parabola, the learning rate falls and
      is probed again at the next step: a direction has become unstable that the averages do not know yet;
    - a step that led to a loss far above the one where it began, on the same batch, is taken back, and the learning
      rate cut by ``max_change``; a loss that exploded cuts it too;
    - from half of where it was unstable the learning rate grows by 2 % a probe step.

    Attributes:
        relaxation: κ, in [1, 2).
        start_fraction: Fraction of the learning rate found by the start's search at which training begins.
        burn_in: Number of probe steps at the beginning that follow each other at every step.
        explosion: The loss has exploded when it is above the loss where training began and above its own moving
            average by this many times its mean absolute deviation; ``inf`` turns that off.
    """

    relaxation: float = 1.8
    start_fraction: float = 0.03
    burn_in: int = 50
    explosion: float = 10.0

    def __post_init__(self) -> None:
        """Check every option.

        Raises:
            ValueError: Names the option, what was expected and what came.
        """
        super().__post_init__()
        check_option("relaxation", self.relaxation, "in [1, 2)", 1 <= self.relaxation < 2)
        check_option("start_fraction", self.start_fraction, "in (0, 1]", 0 < self.start_fraction <= 1)
        check_option("burn_in", self.burn_in, "a whole number of at least 0", is_whole(self.burn_in, least=0))
        check_option("explosion", self.explosion, "above 0", self.explosion > 0)

    def needs_start(self, state: ControlState) -> bool:
        """Whether the next probe step searches for a start instead of fitting a parabola."""
        return not state.started

    def start(self, state: ControlState, loss: float, search: StartSearch) -> Decision:
        """Turn the start's search into a learning rate; one that found none keeps it."""
        if search.lr is None:
            return Decision(self._probed(state, state.lr, loss, ProbeStatus.START_FAILED), ProbeStatus.START_FAILED)
        begun = self._probed(state, self.start_fraction * search.lr, loss, ProbeStatus.STARTED)
        return Decision(replace(begun, started=True, loss_start=loss), ProbeStatus.STARTED)

    def steps_to_next_probe(self, probes: int, status: ProbeStatus) -> int:
        """The distance to the next probe step after ``probes`` of them, the last of which concluded ``status``."""
        is_urgent = status in (
            ProbeStatus.START_FAILED,
            ProbeStatus.EXPLODED,
            ProbeStatus.NON_FINITE_PROBE,
            ProbeStatus.TAKEN_BACK,
            ProbeStatus.GROWING,
            ProbeStatus.UNSTABLE,
        )
        return 1 if is_urgent or probes < self.burn_in else self.period

    def judge(
        self, state: ControlState, loss: float, parabola: Parabola, *, factor: float, arrival: float | None
    ) -> Decision:
        """What a parabola at a finite loss calls for."""
        if arrival is not None and self._went_astray(state, loss, arrival):
            return self._cut(state, loss, ProbeStatus.TAKEN_BACK)
        if self._has_exploded(state, loss):
            return self._cut(state, loss, ProbeStatus.EXPLODED)
        if not parabola.is_finite:
            return self._cut(state, loss, ProbeStatus.NON_FINITE_PROBE)
        if abs(parabola.slope) <= parabola.slope_noise and abs(parabola.curvature) <= parabola.curvature_noise:
            return self._below_noise(state, loss, parabola, factor, is_taken=arrival is not None)
        state = self._average(state, parabola, state.lr * factor, 0.0 if arrival is None else abs(arrival - loss))
        lr, status = self._relaxed(state, parabola, factor)
        lr_unstable = state.lr if status is ProbeStatus.UNSTABLE else state.lr_unstable
        return Decision(self._probed(replace(state, factor=factor, lr_unstable=lr_unstable), lr, loss, status), status)

    def _below_noise(
        self, state: ControlState, loss: float, parabola: Parabola, factor: float, *, is_taken: bool
    ) -> Decision:
        """What to do where the losses differ by their rounding: nothing, or go further while the gradient says so.

        Looking back, the slope where the step has led comes from the gradients, without the rounding of losses.
        """
        far_slope = parabola.curvature * state.lr * factor - parabola.slope
        if not (is_taken and far_slope < 0.0):
            return Decision(self._probed(state, state.lr, loss, ProbeStatus.BELOW_NOISE), ProbeStatus.BELOW_NOISE)
        lr = state.lr * self._growth(state)
        return Decision(self._probed(state, lr, loss, ProbeStatus.CONCAVE), ProbeStatus.CONCAVE)

    def _average(self, state: ControlState, parabola: Parabola, lr: float, rise: float) -> ControlState:
        """The state with a parabola in its averages, and what the loss has changed along the step at ``lr``."""
        first, second = parabola.slope * lr, parabola.curvature * lr * lr
        change = abs(first) + abs(second)
        if not 0.0 < change < math.inf:
            return state
        weight = max(1.0 - self.smoothing, 1.0 / (state.parabola_count + 1))
        # A curvature measured at a smaller learning rate is that of a shorter step, and less certain by its square.
        total = 1.0 + self.smoothing * state.parabola_weight * min(1.0, state.lr_measured / lr) ** 2
        # What a parabola counts is fixed before it is measured, so that averages of noise stay unbiased, up to a limit.
        unit = max(state.change_mean or change, change / _MOST)

        def average(mean: float, value: float, weight: float = weight) -> float:
            return mean + weight * (value - mean)

        return replace(
            state,
            slope_mean=average(state.slope_mean, parabola.slope / unit, 1.0 / total),
            curvature_mean=average(state.curvature_mean, parabola.curvature / unit, 1.0 / total),
            change_mean=average(state.change_mean, change, max(weight, _SOON)),
            rise_mean=average(state.rise_mean, rise),
            agreement_mean=average(state.agreement_mean, first / change),
            agreement_square=average(state.agreement_square, (first / change) ** 2),
            parabola_count=state.parabola_count + 1,
            parabola_weight=total,
            lr_measured=lr,
        )

    def _relaxed(self, state: ControlState, parabola: Parabola, factor: float) -> tuple[float, ProbeStatus]:
        """The learning rate that the averages and the last parabola in them call for, and why."""
        if factor == 0.0:  # no step, and nothing to compare with
            return state.lr, ProbeStatus.FITTED
        agreement = self.agreement(state)
        low, high = state.lr * factor, state.lr * factor**agreement
        # Without a scheduler it is the noise in the slopes that anneals.
        slope = self._slope(state, low, agreement) if factor < 1.0 else state.slope_mean
        target = self._target(slope, state.curvature_mean)
        status = _STATUSES.get(target, ProbeStatus.FITTED)
        # What the agreement of a handful says is chance.
        knows = not self._is_burning_in(state) and state.parabola_count >= self._usual_count
        is_near_unstable = 0.0 < _NEAR * state.lr_unstable < state.lr
        own = self._target(parabola.slope, parabola.curvature)
        contradicted = (1.0 if is_near_unstable else _CONTRADICTED) * high
        if knows and agreement > _CREDIBLE and 0.0 < own < low and target > contradicted:
            return state.lr * max(self._fall(state, agreement), own / low), ProbeStatus.UNSTABLE

        risen = state.loss_mean - state.loss_lowest if self._is_settled(state) else 0.0
        growth = self._growth(state) ** (0.5 + 0.5 * agreement)
        if risen > _RISEN * state.loss_deviation:
            growth = 1.0
        elif is_near_unstable:
            growth = min(growth, _CAREFUL_GROWTH)
        elif knows and agreement > _CERTAIN and target > _FAR * high:
            growth, status = _CAREFUL_GROWTH, ProbeStatus.GROWING
        if risen > 2.0 * _RISEN * state.loss_deviation:
            target = 0.0
        if target > high:
            # What the scheduler has taken off since is not growth: without noise it is the step that grows so much.
            growth *= max(1.0, state.factor / factor) ** agreement
            return state.lr * min(growth, target / high), status
        # The horizon will lower it, and there is no hurry while the loss gets lower than ever.
        waits = factor < 1.0 and self._is_settled(state) and state.loss_mean <= state.loss_lowest
        if target < low and not waits:
            return state.lr * max(self._fall(state, agreement), target / low), status
        return state.lr, status

    def _slope(self, state: ControlState, lr: float, agreement: float) -> float:
        """The mean slope along steps at ``lr``: of the parabolas, and of what all steps between them have achieved.

        A step lowers the loss by slope · lr − curvature · lr² / 2, and the changes of all steps add up to the trend of
        the loss, which noise hides much less than it hides the slope along a single step. The two estimates are
        weighted by the inverses of their variances; where parabolas agree, they have the say.
        """
        if not (self._is_settled(state) and min(state.curvature_mean, state.step_square) > 0.0):
            return state.slope_mean
        variance = (state.agreement_square - state.agreement_mean**2) / self._equal_weights(state.parabola_count)
        if variance <= 0.0:
            return state.slope_mean
        error = _NORMAL * state.loss_deviation / math.sqrt(self._equal_weights(state.loss_count) * state.step_square)
        descent = -state.step_loss / state.step_square
        achieved = descent / state.change_mean / lr + state.curvature_mean * lr / 2.0
        share = (1.0 - agreement) * variance / (variance + (error / state.change_mean) ** 2)
        return state.slope_mean + share * (achieved - state.slope_mean)

    def _equal_weights(self, count: int) -> float:
        """The number of equal weights with the variance of a moving average of so many values."""
        return min(count, (1.0 + self.smoothing) / (1.0 - self.smoothing))

    def _target(self, slope: float, curvature: float) -> float:
        """What a slope and a curvature call for: κ times the lowest point, 0 uphill, infinity on concave descent."""
        if slope <= 0.0:
            return 0.0
        return self.relaxation * slope / curvature if curvature > 0.0 else math.inf

    def _is_burning_in(self, state: ControlState) -> bool:
        return state.probes < self.burn_in

    def _growth(self, state: ControlState) -> float:
        """The factor by which the learning rate grows at most, where nothing speaks against it."""
        return _CHANGE if self._is_burning_in(state) else _LATER_GROWTH

    def _fall(self, state: ControlState, agreement: float) -> float:
        """The factor by which the learning rate falls at most.

        In pure noise, where nothing tells whether it is too low, it falls further than it grows at first, which
        anneals it, and less far in the long run, or it would die of chance. That it is too high does show.
        """
        in_noise = math.log(_LATER_GROWTH) / 4.0 + _ANNEALING / max(state.parabola_count, 1)
        change = math.log(_CHANGE)
        return math.exp(-(agreement * change + (1.0 - agreement) * min(in_noise, change)))

    def agreement(self, state: ControlState) -> float:
        """The share of what slopes have in common among all there is in them, in [0, 1].

        Of ``n`` slopes that are nothing but noise, the squared mean is still the n-th part of the mean square, which
        is taken off.
        """
        count = self._equal_weights(state.parabola_count)
        if count <= 1 or not state.agreement_square:
            return 0.0
        share = state.agreement_mean**2 / state.agreement_square
        return max(0.0, (count * share - 1.0) / (count - 1.0))

    def _cut(self, state: ControlState, loss: float, status: ProbeStatus) -> Decision:
        """The learning rate cut, and averages that do not call for the old one again at once."""
        lr = state.lr / self.max_change
        allowed = max(state.curvature_mean, 0.0) * lr / self.relaxation
        state = replace(state, slope_mean=min(state.slope_mean, allowed), lr_unstable=state.lr)
        return Decision(self._probed(state, lr, loss, status), status)

    def _went_astray(self, state: ControlState, loss: float, arrival: float) -> bool:
        """Whether a step has led up so far that it must be taken back."""
        if not math.isfinite(arrival):
            return True
        rise = max(_ASTRAY * state.rise_mean, _ROUNDING * abs(loss))
        return state.parabola_count >= _FEW and arrival > state.loss_start and arrival - loss > rise

    def _is_settled(self, state: ControlState) -> bool:
        """Whether the averages of losses are of enough of them."""
        return state.loss_count >= self._usual_count

    @property
    def _usual_count(self) -> float:
        """How many values an average is of, about."""
        return 1.0 / (1.0 - self.smoothing)

    def _has_exploded(self, state: ControlState, loss: float) -> bool:
        # A shift or a scaling of the loss changes nothing here.
        surprise = loss - state.loss_mean
        usual = max(state.loss_deviation, _ROUNDING * abs(state.loss_mean))
        return self._is_settled(state) and loss > state.loss_start and surprise > self.explosion * usual
