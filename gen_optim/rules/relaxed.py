"""The default rule: find the scale of the learning rate, then balance what noise costs with what training gains.

The learning rate slope / curvature is the best for one step, and too small for a whole run. When training no longer
makes progress at α, the expected change of the loss, −slope · α + curvature · α² / 2, is zero, so slope / curvature is
α / 2. At half the learning rate the noise is smaller, slope / curvature halves again, and so on (the short-horizon bias
of Wu et al., 2018). Any fixed multiple of slope / curvature below 2 ends there too, only later. So the rule follows the
parabolas while the learning rate grows into its range, and as long as their slopes agree. In noise it compares
what noise costs with what training gains.

Slope and curvature must be of another batch than that of the gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar

from gen_optim.rules.averages import RECENT, BalanceAverages, LossAverages, ParabolaAverages, is_settled
from gen_optim.rules.base import Rule
from gen_optim.rules.initial_search import InitialSearch
from gen_optim.rules.parabola import Parabola
from gen_optim.rules.safeguards import has_exploded, is_below_noise, is_contradicted, is_diverging, rises_unusually
from gen_optim.rules.state import Decision, ProbeStatus, RuleState

_GROWTH, _FALL = 1.1, 0.8
"""Largest changes of the learning rate in a probe step of the burn-in: training must show what the last one did. The
balance does not let it grow faster either."""

_LATER_CHANGE, _CAREFUL_GROWTH = 0.05, 1.02
"""Largest relative change that slopes call for after the burn-in, and the largest growth near where training was
unstable: from the learning rate on that a cut left. With momentum 0.9, a learning rate 10 % above the edge of stability
multiplies what is unstable by a hundred within eight steps, one 5 % above by 23, one 2 % above by six: that is seen in
time."""

_AGREE = 0.5
"""Signal fraction from which on slopes agree."""

_CERTAIN = 0.9
"""Signal fraction from which on growth is careful but happens at every step: only the time in which instability shows
limits it. A single parabola is certain too: if it contradicts the averages, the fall is that of the burn-in."""

_STEEPEST_FALL, _STEEPEST_GROWTH = 0.5, 1.0
"""Largest exponents p of the corrections by the balance, t^(−p) and t^p."""

_LATENESS = 3
"""Exponent of the factor: while a schedule has taken little off, the balance is nearly that without a scheduler."""

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

    ``loss`` averages the losses at the start of probe steps, ``loss_initial`` is that where training began, and
    ``descent_initial`` is how far the initial search saw it fall. ``lr_unstable`` is where training was last unstable,
    0 if it never was, ``lr_initial`` where it began, or the last value that was written.
    ``lr_borne`` is the largest learning rate, with its factor, of a measured step that was not unstable.
    ``has_diverged`` is whether a loss has risen unusually far, ``has_failed`` whether a probed loss was not finite.
    ``factor`` is the scheduler's at the last parabola, ``factor_last`` in the last step.
    """

    started: bool = False
    loss_initial: float = 0.0
    descent_initial: float = 0.0
    loss: LossAverages = field(default_factory=LossAverages)
    parabola: ParabolaAverages = field(default_factory=ParabolaAverages)
    lr_unstable: float = 0.0
    lr_initial: float = 0.0
    lr_borne: float = 0.0
    has_diverged: bool = False
    has_failed: bool = False
    factor: float = 1.0
    factor_last: float = 1.0
    balance: BalanceAverages = field(default_factory=BalanceAverages)


@dataclass(frozen=True, kw_only=True)
class RelaxedRule(Rule):
    """Finds the scale of the learning rate from parabolas, and then holds it, or corrects it by the averaged weights.

    In the order in which a training run meets it:

    - **Initial search.** Training begins at ``start_fraction`` of the best learning rate along the first direction. The
      first gradient has an untypically large slope, and no momentum is built up yet.
    - **Burn-in.** The first ``burn_in`` steps are all probe steps. The learning rate follows κ · mean slope / mean
      curvature, by at most 10 % up and 20 % down at each. κ = 2 − the signal fraction, the part of the slopes that is
      not noise. Without noise, κ = 1 gives the minimum of the parabola. In pure noise, κ = 2 gives the learning rate at
      which steps no longer descend: what noise adds to the curvature averages out over a run. Once training was
      unstable, it grows to half the learning rate of then at most.
    - **Restart.** What too high a learning rate does to a network may stay, dead units for example. So if a loss rose
      unusually far in the burn-in, training restarts when that is over, at the learning rate found: the parameters
      return to their first values, and the base optimizer's state is cleared. It does not restart if a probed loss was
      not finite: the first steps might lead there again.
    - **Balance.** While slopes are mostly noise, they do not tell whether the learning rate is too high. Two other
      quantities do. The excess loss is the loss at the present weights minus that at their average: what noise costs.
      The gain is how much the loss falls while the number of steps grows e-fold. At a higher learning rate the excess
      loss is larger and the gain smaller. If their ratio is above ``balance``, the learning rate falls like a power of
      the steps; if it is below, it grows. Under a scheduler the ratio may be as large as its factor, once that has
      fallen; while it is close to 1, the rule acts nearly as without a scheduler. While steps raise the loss on
      average, the learning rate falls by 5 % at every step.
    - **Hold.** If the excess loss is not known, the learning rate stays as it is under a scheduler, whose factor does
      the annealing, and falls like t^(−1/8) without one.
    - **Agreement.** If slopes agree and call for more, the learning rate grows by up to 5 % per probe step, unless the
      ratio is too high; without a scheduler, what they call for is annealed too. If the averages call for more, but the
      last step was too long by its own parabola, it falls by up to 5 %: a direction has become unstable that the
      averages do not show yet. Near there slopes and balance let it grow by 2 %.
    - **No noise.** If there is next to no noise, it grows by 2 % at every step, to what slopes call for in spite of a
      scheduler, falls by up to 20 % where it is unstable, and by up to 5 % if a step is longer than ``relaxation``
      times the lowest point.
    - **Safeguards** (:mod:`gen_optim.rules.safeguards`). After a step that raised the loss unusually far, on the same
      batch, the learning rate falls by up to 20 %, and the next step is a probe step. If the loss is above the first
      one then, the step is reverted. After that, after a loss that exploded, and after a probe that is not finite, the
      learning rate is cut by ``max_change``. A parabola that is no more than rounding changes nothing.

    Args:
        period: Mean number of steps from one probe step to the next, after the burn-in.
        lr_min: Lower limit of the learning rate.
        lr_max: Upper limit of the learning rate.
        smoothing: Weight of earlier values in moving averages, in [0, 1).
        max_change: Factor by which safeguards cut the learning rate, above 1.
        start_fraction: Fraction of the learning rate found by the search at which training begins, in (0, 1].
        burn_in: Number of probe steps at the beginning that follow each other at every step.
        relaxation: Multiple of the lowest point above which a step is too long if slopes agree, in [1, 2].
        balance: Ratio of the excess loss to the gain at which the learning rate is right without a scheduler, above 0.
        annealing: Exponent p of the fall t^(−p) without a scheduler if the excess loss is not known, in [0, 1].

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
    start_fraction: float = 0.1
    burn_in: int = 50
    relaxation: float = 1.8
    balance: float = 0.3
    annealing: float = 0.125

    state_type: ClassVar[type[RuleState]] = RelaxedState

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_option("smoothing", "in [0, 1)", lambda value: 0 <= value < 1)
        self.check_option("max_change", "a finite number above 1", lambda value: 1 < value < math.inf)
        self.check_option("start_fraction", "in (0, 1]", lambda value: 0 < value <= 1)
        self.check_option(
            "burn_in", "a whole number of at least 0", lambda value: isinstance(value, int) and value >= 0
        )
        self.check_option("relaxation", "in [1, 2]", lambda value: 1 <= value <= 2)
        self.check_option("balance", "a finite number above 0", lambda value: 0 < value < math.inf)
        self.check_option("annealing", "in [0, 1]", lambda value: 0 <= value <= 1)

    def needs_search(self, state: RelaxedState) -> bool:
        """Whether the next probe step searches for an initial learning rate: until one was found."""
        return not state.started

    def needs_excess_loss(self, state: RelaxedState) -> bool:
        """Whether the next decision makes use of the excess loss: when the first steps are over."""
        return state.started and state.step + 1 >= self._transient

    def may_restart(self, state: RelaxedState) -> bool:
        """Whether training may have to restart: until the burn-in is over or a probed loss was not finite."""
        return state.probes < self.burn_in and not state.has_failed

    def restart(self, state: RelaxedState) -> RelaxedState | None:
        """The state to restart with at the end of a burn-in in which a loss has risen unusually far; else None."""
        if state.probes != self.burn_in or not state.has_diverged or state.has_failed:
            return None
        return replace(state, loss=LossAverages(), balance=BalanceAverages())

    def before_step(self, state: RelaxedState, factor: float) -> RelaxedState:
        """The state for a step under the scheduler's ``factor``.

        If the factor rises, what was learned at a small factor must not make the step larger than training was seen to
        bear. So α · factor is at most the largest of that, of the last step's, and of the initial α times the factor or
        1, whichever is smaller.
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
            has_diverged=False,
            has_failed=False,
            balance=BalanceAverages(),
        )

    def decide(
        self,
        state: RelaxedState,
        found: Parabola | InitialSearch,
        *,
        loss_start: float,
        loss_end: float | None = None,
        excess_loss: float | None = None,
        factor: float = 1.0,
    ) -> Decision:
        """Choose the learning rate after a probe step; see :meth:`Rule.decide`."""
        if not math.isfinite(loss_start):
            return Decision(self.skip(state), ProbeStatus.NON_FINITE_LOSS)
        if isinstance(found, InitialSearch):
            return self._start(state, found, loss_start)
        # Looking back, the step measured was taken at the last factor.
        measured = factor if loss_end is None else state.factor_last
        factor = min(factor, measured)

        # The first safeguard that fires, by the averages of earlier probe steps.
        initial, descent = state.loss_initial, state.descent_initial
        if loss_end is not None and is_diverging(
            state.parabola, loss_start, loss_end, loss_initial=initial, descent_initial=descent
        ):
            return self._cut(state, loss_start, ProbeStatus.REVERTED, is_finite=math.isfinite(loss_end))
        if is_settled(state.loss.count, self.smoothing) and has_exploded(state.loss, loss_start, loss_initial=initial):
            return self._cut(state, loss_start, ProbeStatus.EXPLODED, is_finite=True)
        if not found.is_finite:
            return self._cut(state, loss_start, ProbeStatus.NON_FINITE_PROBE, is_finite=False)
        if is_below_noise(found):
            return self._below_noise(state, found, loss_start, measured, is_taken=loss_end is not None)

        rises = loss_end is not None and rises_unusually(state.parabola, loss_start, loss_end, descent_initial=descent)
        state = self._with_losses(state, loss_start, loss_end, excess_loss)
        rise = 0.0 if loss_end is None else abs(loss_end - loss_start)
        taken = state.lr * measured
        state = replace(state, parabola=state.parabola.with_parabola(found, taken, rise, self.smoothing))
        lr, status = self._next_lr(state, found, factor, rises=rises)
        if status is ProbeStatus.UNSTABLE:
            state = replace(state, lr_unstable=state.lr, lr_borne=min(state.lr_borne, lr * factor))
        else:
            state = replace(state, lr_borne=max(state.lr_borne, taken))
        return self._decided(replace(state, factor=factor), lr, loss_start, status)

    def _next_lr(
        self, state: RelaxedState, last: Parabola, factor: float, *, rises: bool = False
    ) -> tuple[float, ProbeStatus]:
        """The learning rate that the averages and the last parabola in them call for, and why.

        ``rises`` is whether the last step has raised the loss unusually far.
        """
        if factor == 0.0:  # no step, and nothing to compare with
            return state.lr, ProbeStatus.FITTED
        lr, parabolas = state.lr, state.parabola
        taken, signal = lr * factor, parabolas.signal_fraction(self.smoothing)
        target = _target(2.0 - signal, parabolas.slope, parabolas.curvature)
        status = _STATUSES.get(target, ProbeStatus.FITTED)
        lr_cut = state.lr_unstable / self.max_change
        if state.probes < self.burn_in:
            highest = max(lr, lr_cut) if lr_cut else math.inf
            return min(lr * min(max(target / taken, _FALL), _GROWTH), highest), status
        own = _target(self.relaxation, last.slope, last.curvature)
        if rises:
            return lr * max(_FALL, own / taken), ProbeStatus.UNSTABLE
        is_near_unstable = 0.0 < lr_cut < lr
        is_certain = signal > _CERTAIN
        correction = self._correction(state, factor)
        in_noise = lr * (self._annealing_to_next(state, factor) if correction is None else correction)
        if is_near_unstable:
            in_noise = min(in_noise, lr * _CAREFUL_GROWTH)
        if not is_certain and parabolas.ascends(self.smoothing):  # which shows before the balance does
            return min(in_noise, lr * (1.0 - _LATER_CHANGE)), ProbeStatus.UNSTABLE
        if not (is_settled(parabolas.count, self.smoothing) and signal > _AGREE):
            return in_noise, status

        if is_contradicted(target, own, taken):
            return lr * max(_FALL if is_certain else 1.0 - _LATER_CHANGE, own / taken), ProbeStatus.UNSTABLE
        target *= self._annealing(self.burn_in, state.step, factor)
        if is_certain:
            return self._next_lr_without_noise(state, target, factor, status, is_near_unstable=is_near_unstable)
        # In noise smaller steps call for larger ones, so what the scheduler takes off is not made up for.
        if target <= lr or (correction is not None and correction < 1.0):
            return in_noise, status
        return lr * min(_CAREFUL_GROWTH if is_near_unstable else 1.0 + _LATER_CHANGE, target / lr), status

    def _next_lr_without_noise(
        self, state: RelaxedState, target: float, factor: float, status: ProbeStatus, *, is_near_unstable: bool
    ) -> tuple[float, ProbeStatus]:
        """The learning rate if slopes are certain: α · factor, the length of the step, approaches the target."""
        taken = state.lr * factor
        if target > taken:
            growth = _CAREFUL_GROWTH * max(1.0, state.factor / factor)
            return state.lr * min(growth, target / taken), status if is_near_unstable else ProbeStatus.GROWING
        longest = _target(self.relaxation, state.parabola.slope, state.parabola.curvature)
        change = min(max(1.0 - _LATER_CHANGE, longest / taken), self._annealing_to_next(state, factor))
        return state.lr * change, status

    def _annealing_to_next(self, state: RelaxedState, factor: float) -> float:
        return self._annealing(state.step, state.step + self.period, factor)

    def _annealing(self, begin: int, end: int, factor: float) -> float:
        """The fall of the learning rate from one step to another: t^(−p), none if a scheduler takes something off."""
        if not math.isclose(factor, 1.0, rel_tol=1e-6):  # a warm-up may end at 0.9999999999999998
            return 1.0
        return math.pow(max(begin, 1) / max(end, 1), self.annealing)

    def _correction(self, state: RelaxedState, factor: float) -> float | None:
        """The change of the learning rate that brings the excess loss into balance with the gain.

        It is a power of the steps until the next probe step, since both are averages over a part of the run. None if
        the excess loss at this step is not known.
        """
        averages = state.balance
        is_short = averages.count < max(2 * self._transient, state.step / RECENT)
        if is_short or math.isnan(averages.ratio):
            return None
        # The fall of a schedule takes the noise out: once it is under way, noise may cost as much as training gains.
        # The factor lowers the excess loss, and not what the learning rate found is worth.
        unscheduled = min(factor, 1.0) ** _LATENESS
        ratio = averages.ratio / (unscheduled * self.balance + (1.0 - unscheduled) * factor)
        exponent = min(max(math.log(ratio) if ratio > 0.0 else -math.inf, -_STEEPEST_GROWTH), _STEEPEST_FALL)
        return min(math.pow(state.step / (state.step + self.period), exponent), _GROWTH)

    def _with_losses(
        self, state: RelaxedState, loss_start: float, loss_end: float | None, excess_loss: float | None
    ) -> RelaxedState:
        """The state with the losses at the end of the last step averaged, or that at the start of the next one."""
        step = state.step + 1
        if step < self._transient:
            return state
        averages = state.balance if state.balance.step else BalanceAverages(began=step - self._transient)
        loss = loss_start if loss_end is None else loss_end
        return replace(state, balance=averages.with_losses(loss, excess_loss, step))

    @property
    def _transient(self) -> int:
        """The number of steps that are left out of the averages, because the loss falls unusually fast in them."""
        return max(self.burn_in // 2, 1)

    def _start(self, state: RelaxedState, search: InitialSearch, loss: float) -> Decision:
        """Begin training at a fraction of the learning rate that the search found, if it found one."""
        if search.lr is None:
            return self._decided(state, state.lr, loss, ProbeStatus.START_FAILED)
        lr = self.start_fraction * search.lr
        descent = loss - min(filter(math.isfinite, search.losses), default=loss)
        state = replace(state, started=True, loss_initial=loss, descent_initial=descent, lr_initial=lr)
        return self._decided(state, lr, loss, ProbeStatus.STARTED)

    def _below_noise(
        self, state: RelaxedState, parabola: Parabola, loss: float, factor: float, *, is_taken: bool
    ) -> Decision:
        """Grow the learning rate if the gradient at the end of the step still descends, lower it if it ascends.

        If the step is taken already, the slope at its end comes from the gradient, without the rounding of losses. In
        the burn-in, which begins with short steps, the learning rate is not lowered.
        """
        end_slope = parabola.slope - parabola.curvature * state.lr * factor
        change = 1.0
        if is_taken and end_slope > 0.0:
            change = _GROWTH if state.probes < self.burn_in else 1.0 + _LATER_CHANGE
        elif is_taken and end_slope < 0.0 and state.probes >= self.burn_in:
            change = 1.0 - _LATER_CHANGE
        return self._decided(state, state.lr * change, loss, ProbeStatus.BELOW_NOISE)

    def _cut(self, state: RelaxedState, loss: float, status: ProbeStatus, *, is_finite: bool) -> Decision:
        """Cut the learning rate, since a loss has risen unusually far or, with ``is_finite=False``, was not finite.

        The mean slope is cut too, so that the averages do not call for the old learning rate at once.
        """
        lr = state.lr / self.max_change
        slope = max(state.parabola.curvature, 0.0) * lr / self.relaxation
        state = replace(
            state,
            parabola=replace(state.parabola, slope=min(state.parabola.slope, slope)),
            lr_unstable=state.lr,
            lr_borne=min(state.lr_borne, lr * state.factor_last),
            has_diverged=state.has_diverged or is_finite,
            has_failed=state.has_failed or not is_finite,
        )
        return self._decided(state, lr, loss, status)

    def _decided(self, state: RelaxedState, lr: float, loss: float, status: ProbeStatus) -> Decision:
        """The decision for a learning rate, with the loss at the start of the step averaged."""
        state = replace(state, loss=state.loss.with_loss(loss, self.smoothing))
        is_urgent = status in _URGENT or state.probes + 1 < self.burn_in
        return Decision(self.after_probe(state, lr, steps_to_next=1 if is_urgent else None), status)


def _target(kappa: float, slope: float, curvature: float) -> float:
    """κ · slope / curvature; 0 for an ascending direction, infinity for a descending one without a minimum."""
    if slope <= 0.0:
        return 0.0
    return kappa * slope / curvature if curvature > 0.0 else math.inf
