"""The default rule: a multiple of mean slope / mean curvature.

The learning rate slope / curvature is the best for one step, and too small for a whole run. When training no longer
makes progress at α, the expected change of the loss, −slope · α + curvature · α² / 2, is zero, so slope / curvature is
α / 2. At half the learning rate the noise is smaller, slope / curvature halves again, and so on (the short-horizon bias
of Wu et al., 2018). A multiple κ of it with 1 < κ < 2 keeps the learning rate while steps descend on average, and
lowers it when they stop (relaxed steepest descent: Raydan and Svaiter, 2002; the edge of stability: Roulet et al.,
arXiv:2407.06183). This requires slope and curvature of another batch than that of the gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar

from gen_optim.rules.averages import LossAverages, ParabolaAverages, slope_with_trend
from gen_optim.rules.base import Rule
from gen_optim.rules.initial_search import InitialSearch
from gen_optim.rules.limits import CAREFUL_GROWTH, fall_limit, growth_limit, limited_lr
from gen_optim.rules.parabola import Parabola
from gen_optim.rules.safeguards import first_safeguard, is_contradicted
from gen_optim.rules.state import Decision, ProbeStatus, RuleState

__all__ = ["RelaxedRule", "RelaxedState"]

_NEAR = 0.5
"""Fraction of the learning rate at which training was unstable, from which on growth is careful."""

_CERTAIN, _FAR = 0.9, 4.0
"""Above this signal fraction, and this many times below the target, growth is careful but happens at every step: only
the time in which instability shows limits it."""

_RISEN = 0.5
"""Growth ends if the mean loss is above its lowest value by this many mean absolute deviations of the losses (a mean of
them varies by about a third of one), and the learning rate falls from twice that on."""

_STATUSES = {0.0: ProbeStatus.NO_MINIMUM, math.inf: ProbeStatus.CONCAVE}
"""The statuses of these targets."""

_URGENT = frozenset(
    {
        ProbeStatus.START_FAILED,
        ProbeStatus.EXPLODED,
        ProbeStatus.NON_FINITE_PROBE,
        ProbeStatus.REVERTED,
        ProbeStatus.GROWING,
        ProbeStatus.UNSTABLE,
    }
)
"""The statuses after which the next step is a probe step."""


@dataclass(frozen=True)
class RelaxedState(RuleState):
    """What the relaxed rule remembers.

    Attributes:
        started: Whether an initial learning rate was found.
        loss_initial: The loss where training began.
        loss: Averages of the losses at the start of probe steps.
        parabola: Averages of the parabolas.
        factor: The scheduler's factor at the last of those parabolas.
        lr_unstable: The learning rate at which training was last unstable; 0 if it never was.
        lr_initial: The learning rate at which training began.
        lr_borne: The largest learning rate of a step, with its factor, that training was seen to bear.
        factor_last: The scheduler's factor in the last step.
    """

    started: bool = False
    loss_initial: float = 0.0
    loss: LossAverages = field(default_factory=LossAverages)
    parabola: ParabolaAverages = field(default_factory=ParabolaAverages)
    factor: float = 1.0
    lr_unstable: float = 0.0
    lr_initial: float = 0.0
    lr_borne: float = 0.0
    factor_last: float = 1.0


@dataclass(frozen=True, kw_only=True)
class RelaxedRule(Rule):
    """Moves the learning rate towards κ · mean slope / mean curvature, from an initial value found by a search.

    In the order in which a training run meets it:

    - **Initial search.** Training begins at ``start_fraction`` of the best learning rate along the first direction. The
      first gradient has an untypically large slope, and no momentum is built up yet.
    - **Burn-in.** The first ``burn_in`` steps are all probe steps.
    - **Safeguards** (:mod:`gen_optim.rules.safeguards`). A step that raised the loss far above its start, on the same
      batch, is reverted. After that, and after a loss that exploded or is not finite at a probe, the learning rate is
      cut by ``max_change``. A parabola that is no more than rounding changes nothing.
    - **Averages** (:mod:`gen_optim.rules.averages`). Slopes and curvatures are averaged in units of the average change
      of the loss, with less weight the more the learning rate has grown since. The signal fraction is the part of the
      slopes that is not noise.
    - **Target.** κ · mean slope / mean curvature. Under a scheduler, the mean slope of noisy parabolas is estimated
      from the trend of the loss too, or chance would anneal the learning rate. If the averages call for more but the
      last step was too long by its own parabola, the learning rate falls: a direction has become unstable that the
      averages do not show yet.
    - **Limits** (:mod:`gen_optim.rules.limits`). The learning rate changes by at most 10 % per probe step. It grows
      faster if slopes agree. In pure noise it falls further than it grows at first, which anneals it. It does not grow
      if the mean loss has risen, and falls if that has risen far. Near a learning rate that was unstable it grows by
      2 %. If slopes agree and the target is far above, it grows by 2 % at every step.
    - **Dead band.** A scheduler with factor f and this rule must not both anneal the same noise. In pure noise the
      learning rate grows only if the target is above α, and falls only if it is below the step taken, α · f. Without
      noise there is nothing to anneal, and the target is followed from both sides. Under a scheduler the learning rate
      does not fall while the mean loss is at its lowest.

    Args:
        period: Number of steps from one probe step to the next, after the burn-in.
        lr_min: Lower limit of the learning rate.
        lr_max: Upper limit of the learning rate.
        smoothing: Weight of earlier values in moving averages, in [0, 1).
        max_change: Factor by which safeguards cut the learning rate, above 1.
        start_fraction: Fraction of the learning rate found by the search at which training begins, in (0, 1].
        burn_in: Number of probe steps at the beginning that follow each other at every step.
        relaxation: κ, in [1, 2).
        explosion: Number of mean absolute deviations above the mean loss, and above the loss where training began,
            from which on the loss has exploded; ``inf`` disables this safeguard.

    Raises:
        ValueError: If an option is out of range.

    Example:
        >>> rule = RelaxedRule(start_fraction=0.1)
        >>> search = InitialSearch(lr=0.5, learning_rates=(0.5,), losses=(1.0,))
        >>> decision = rule.decide(rule.initial_state(lr=1e-3), search, loss_start=2.0)
        >>> decision.status, decision.state.lr
        (<ProbeStatus.STARTED: 'started'>, 0.05)
    """

    smoothing: float = 0.9
    max_change: float = 2.0
    start_fraction: float = 0.03
    burn_in: int = 50
    relaxation: float = 1.8
    explosion: float = 10.0

    state_type: ClassVar[type[RuleState]] = RelaxedState

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: If an option is out of range.
        """
        super().__post_init__()
        self.check_option("smoothing", "in [0, 1)", lambda value: 0 <= value < 1)
        self.check_option("max_change", "a finite number above 1", lambda value: 1 < value < math.inf)
        self.check_option("start_fraction", "in (0, 1]", lambda value: 0 < value <= 1)
        self.check_option(
            "burn_in", "a whole number of at least 0", lambda value: isinstance(value, int) and value >= 0
        )
        self.check_option("relaxation", "in [1, 2)", lambda value: 1 <= value < 2)
        self.check_option("explosion", "above 0", lambda value: value > 0)

    def needs_search(self, state: RelaxedState) -> bool:
        """Whether the next probe step searches for an initial learning rate: until one was found."""
        return not state.started

    def before_step(self, state: RelaxedState, factor: float) -> RelaxedState:
        """The state for a step under the scheduler's ``factor``.

        If the factor rises, what was learned at a small factor must not make the step larger than training was seen to
        bear. So α · factor is at most that, that of the last step, or the initial α times a factor of at most 1.
        """
        if factor == state.factor_last or factor == 0.0:
            return state
        lr = state.lr
        if state.started and factor > state.factor_last:
            lr = min(
                lr, max(state.lr_borne / factor, lr * state.factor_last / factor, state.lr_initial / max(factor, 1.0))
            )
        return replace(state, lr=lr, factor_last=factor)

    def set_lr(self, state: RelaxedState, lr: float) -> RelaxedState:
        """The state after a manual value was written: averages are forgotten, with no new search or burn-in."""
        return replace(
            state,
            lr=lr,
            loss=LossAverages(),
            parabola=ParabolaAverages(),
            factor=1.0,
            lr_unstable=0.0,
            lr_initial=lr,
            lr_borne=0.0,
        )

    def decide(
        self,
        state: RelaxedState,
        found: Parabola | InitialSearch,
        *,
        loss_start: float,
        loss_end: float | None = None,
        factor: float = 1.0,
    ) -> Decision:
        """Choose the learning rate after a probe step; see :meth:`Rule.decide`."""
        if not math.isfinite(loss_start):
            return Decision(self.skip(state), ProbeStatus.NON_FINITE_LOSS)
        if isinstance(found, InitialSearch):
            return self._start(state, found, loss_start)
        if loss_end is not None:  # the step measured was taken at the last factor
            factor = min(factor, state.factor_last)

        fired = first_safeguard(
            found,
            state.parabola,
            state.loss,
            loss_start=loss_start,
            loss_end=loss_end,
            loss_initial=state.loss_initial,
            explosion=self.explosion,
            smoothing=self.smoothing,
        )
        if fired is ProbeStatus.BELOW_NOISE:
            return self._below_noise(state, found, loss_start, factor, is_taken=loss_end is not None)
        if fired is not None:
            return self._cut(state, loss_start, fired)

        rise = 0.0 if loss_end is None else abs(loss_end - loss_start)
        parabolas = state.parabola.with_parabola(found, state.lr * factor, rise, self.smoothing)
        state = replace(state, parabola=parabolas)
        lr, status = self._next_lr(state, found, factor)
        if status is ProbeStatus.UNSTABLE:
            state = replace(state, lr_unstable=state.lr, lr_borne=min(state.lr_borne, lr * factor))
        else:
            state = replace(state, lr_borne=max(state.lr_borne, state.lr * factor))
        return self._decided(replace(state, factor=factor), lr, loss_start, status)

    def _next_lr(self, state: RelaxedState, last: Parabola, factor: float) -> tuple[float, ProbeStatus]:
        """The learning rate that the averages and the last parabola in them call for, and why."""
        if factor == 0.0:  # no step, and nothing to compare with
            return state.lr, ProbeStatus.FITTED
        losses, parabolas, lr = state.loss, state.parabola, state.lr
        signal = parabolas.signal_fraction(self.smoothing)
        # The dead band: from the step taken to α in pure noise; it vanishes without noise, and without a scheduler.
        low, high = lr * factor, lr * factor**signal

        # The target. Without a scheduler, the noise in the slopes anneals the learning rate.
        slope = slope_with_trend(parabolas, losses, low, self.smoothing) if factor < 1.0 else parabolas.slope
        target = self._target(slope, parabolas.curvature)
        status = _STATUSES.get(target, ProbeStatus.FITTED)
        is_burning_in = state.probes < self.burn_in
        # The signal fraction of a few parabolas is chance.
        is_signal_known = not is_burning_in and parabolas.is_settled(self.smoothing)
        is_near_unstable = 0.0 < _NEAR * state.lr_unstable < lr
        fall = fall_limit(signal, parabolas.count)
        own = self._target(last.slope, last.curvature)
        if is_signal_known and is_contradicted(
            target, own, lr_low=low, lr_high=high, signal_fraction=signal, is_near_unstable=is_near_unstable
        ):
            return lr * max(fall, own / low), ProbeStatus.UNSTABLE

        # The limits of growth and fall.
        growth = growth_limit(signal, is_burning_in=is_burning_in)
        if losses.has_risen(_RISEN, self.smoothing):
            growth = 1.0
        elif is_near_unstable:
            growth = min(growth, CAREFUL_GROWTH)
        elif is_signal_known and signal > _CERTAIN and target > _FAR * high:
            growth, status = CAREFUL_GROWTH, ProbeStatus.GROWING
        if losses.has_risen(2.0 * _RISEN, self.smoothing):
            target = 0.0
        # Without noise the limit is that of the step, lr · factor: what the scheduler took off since does not count.
        growth *= max(1.0, state.factor / factor) ** signal
        # The scheduler lowers the step anyway, so the learning rate need not fall while the mean loss is at its lowest.
        if factor < 1.0 and losses.is_settled(self.smoothing) and losses.mean <= losses.lowest:
            fall = 1.0
        return limited_lr(lr, target, low=low, high=high, growth=growth, fall=fall), status

    def _target(self, slope: float, curvature: float) -> float:
        """κ · slope / curvature; 0 for an ascending direction, infinity for a descending one without a minimum."""
        if slope <= 0.0:
            return 0.0
        return self.relaxation * slope / curvature if curvature > 0.0 else math.inf

    def _start(self, state: RelaxedState, search: InitialSearch, loss: float) -> Decision:
        """Begin training at a fraction of the learning rate that the search found, if it found one."""
        if search.lr is None:
            return self._decided(state, state.lr, loss, ProbeStatus.START_FAILED)
        lr = self.start_fraction * search.lr
        state = replace(state, started=True, loss_initial=loss, lr_initial=lr)
        return self._decided(state, lr, loss, ProbeStatus.STARTED)

    def _below_noise(
        self, state: RelaxedState, parabola: Parabola, loss: float, factor: float, *, is_taken: bool
    ) -> Decision:
        """Keep the learning rate, or grow it if the gradient at the end of the step still descends.

        If the step is taken already, the slope at its end comes from the gradient, without the rounding of losses.
        """
        end_slope = parabola.slope - parabola.curvature * state.lr * factor
        if not (is_taken and end_slope > 0.0):
            return self._decided(state, state.lr, loss, ProbeStatus.BELOW_NOISE)
        growth = growth_limit(1.0, is_burning_in=state.probes < self.burn_in)
        return self._decided(state, state.lr * growth, loss, ProbeStatus.CONCAVE)

    def _cut(self, state: RelaxedState, loss: float, status: ProbeStatus) -> Decision:
        """Cut the learning rate, and the mean slope so that the averages do not call for the old one at once."""
        lr = state.lr / self.max_change
        slope = max(state.parabola.curvature, 0.0) * lr / self.relaxation
        state = replace(
            state,
            parabola=state.parabola.with_slope_at_most(slope),
            lr_unstable=state.lr,
            lr_borne=min(state.lr_borne, lr * state.factor_last),
        )
        return self._decided(state, lr, loss, status)

    def _decided(self, state: RelaxedState, lr: float, loss: float, status: ProbeStatus) -> Decision:
        """The decision for a learning rate, with the loss at the start of the step averaged."""
        state = replace(state, loss=state.loss.with_loss(loss, state.step + 1, self.smoothing))
        is_urgent = status in _URGENT or state.probes + 1 < self.burn_in
        return Decision(self.after_probe(state, lr, steps_to_next=1 if is_urgent else self.period), status)
