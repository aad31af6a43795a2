"""From measured parabolas to a learning rate: limits, smoothing, fallbacks, rules. Numbers only, no tensors.

A rule is a pure function of what it remembers (:class:`ControlState`) and of what a probe step measured. That makes
it possible to read, test and replay it without a model. What it minimises is called the loss; under ``maximize=True``
it is handed the negative of what the closure returned.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from enum import Enum
from numbers import Integral, Real
from typing import Any

from gen_optim.quadratic import Parabola
from gen_optim.starting import StartSearch

__all__ = [
    "ControlState",
    "Decision",
    "ProbeStatus",
    "PublishedRule",
    "SafeguardedRule",
    "make_rule",
]


_SMALLEST, _LARGEST = 1e-30, 1e30
"""Where a learning rate that is cut or grown for ever stops: 0 would freeze the group, infinity break it."""

_ROUNDING = 2.0**-20
"""A loss may rise by this fraction because it is rounded in single precision; that is no explosion."""


class ProbeStatus(Enum):
    """What a probe step concluded.

    Attributes:
        STARTED: The start's search found where the loss along the first direction is lowest.
        START_FAILED: No learning rate lowered the loss along the first direction; no step is taken, and the next one
            tries again.
        FITTED: The parabola has a lowest point, and the learning rate moved towards it.
        CONCAVE: The loss descends and curves downwards, or not measurably: the optimum lies further out; grown.
        NO_MINIMUM: The parabola has no lowest point ahead; the learning rate is kept.
        BELOW_NOISE: The differences between the losses are rounding; the learning rate is kept.
        NON_FINITE_LOSS: The loss where the step began is NaN or infinite; nothing is learned from it.
        NON_FINITE_PROBE: A probed loss is NaN or infinite. The default rule cuts the learning rate, the published one
            keeps it.
        EXPLODED: The loss rose far above where training began: the learning rate is cut and the parabola not used.
    """

    STARTED = "started"
    START_FAILED = "start_failed"
    FITTED = "fitted"
    CONCAVE = "concave"
    NO_MINIMUM = "no_minimum"
    BELOW_NOISE = "below_noise"
    NON_FINITE_LOSS = "non_finite_loss"
    NON_FINITE_PROBE = "non_finite_probe"
    EXPLODED = "exploded"


@dataclass(frozen=True)
class ControlState:
    """All that a rule remembers, in plain numbers.

    Attributes:
        lr: The learning rate α of the first unfrozen group, without a scheduler's factor.
        step: Number of steps taken.
        probes: Number of probe steps among them.
        next_probe: The step number at which the next probe step is due.
        started: Whether the start's search has succeeded.
        loss_start: The loss where training began.
        loss_mean: Moving average of the losses at which probe steps began.
        loss_deviation: Moving average of their absolute deviation from ``loss_mean``.
        loss_count: Number of losses in these two averages.
    """

    lr: float
    step: int = 0
    probes: int = 0
    next_probe: int = 1
    started: bool = False
    loss_start: float = 0.0
    loss_mean: float = 0.0
    loss_deviation: float = 0.0
    loss_count: int = 0

    @staticmethod
    def is_in(group: Mapping[str, Any]) -> bool:
        """Whether a state stands in a parameter group."""
        return _KEYS["lr"] in group

    @classmethod
    def load(cls, group: Mapping[str, Any]) -> ControlState:
        """Read the state from a parameter group."""
        return cls(**{name: group[key] for name, key in _KEYS.items() if key in group})

    def dump(self) -> dict[str, Any]:
        """The state as entries of a parameter group."""
        return {key: getattr(self, name) for name, key in _KEYS.items()}


_KEYS = {field.name: f"gen_{field.name}" for field in fields(ControlState)}
"""Under which keys the state's entries stand in a parameter group."""


@dataclass(frozen=True)
class Decision:
    """What a rule makes of a probe step: the state from now on, and why."""

    state: ControlState
    status: ProbeStatus

    @property
    def taken_lr(self) -> float:
        """The learning rate of the step: that of the state, but 0 where no start was found to begin at."""
        return 0.0 if self.status is ProbeStatus.START_FAILED else self.state.lr


def _is_whole(value: object, *, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _check(name: str, value: object, expected: str, holds: bool) -> None:
    if not holds:
        raise ValueError(f"{name} must be {expected}, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class PublishedRule:
    """The rule as published (Bu and Xu, arXiv:2407.02772, and the authors' code).

    Every ``period`` steps, where slope and curvature are positive, the learning rate is averaged with the optimum,
    which counts at most ``max_change`` times and at least ``1 / max_change`` times the present learning rate:

        α ← smoothing · α + (1 − smoothing) · clip(slope / curvature, α / max_change, α · max_change).

    Anything else keeps the learning rate. The first probe step is the first step, from the learning rate given.

    Attributes:
        period: A probe step every ``period`` steps.
        smoothing: Weight of the present learning rate in the average, in [0, 1).
        max_change: Factor by which one optimum may differ from the present learning rate.
        lr_min: Lower limit of the learning rate.
        lr_max: Upper limit of the learning rate.
    """

    period: int = 8
    smoothing: float = 0.9
    max_change: float = 2.0
    lr_min: float = 0.0
    lr_max: float = math.inf

    def __post_init__(self) -> None:
        """Check every option.

        Raises:
            ValueError: Names the option, what was expected and what came.
        """
        for option in fields(self):
            value = getattr(self, option.name)
            _check(option.name, value, "a number", isinstance(value, Real) and not isinstance(value, bool))
            if not isinstance(value, int):  # numpy's numbers would end up in checkpoints, which refuse them
                plain = int(value) if isinstance(value, Integral) else float(value)
                object.__setattr__(self, option.name, plain)
        _check("period", self.period, "a whole number of at least 1", _is_whole(self.period, least=1))
        _check("smoothing", self.smoothing, "in [0, 1)", 0 <= self.smoothing < 1)
        _check("max_change", self.max_change, "a finite number above 1", 1 < self.max_change < math.inf)
        _check("lr_min", self.lr_min, "a finite number of at least 0", 0 <= self.lr_min < math.inf)
        _check("lr_max", self.lr_max, f"at least lr_min ({self.lr_min})", self.lr_max >= self.lr_min)
        _check("lr_max", self.lr_max, "above 0", self.lr_max > 0)

    def is_probe_due(self, state: ControlState) -> bool:
        """Whether the next step probes."""
        return state.step + 1 >= state.next_probe

    def needs_start(self, state: ControlState) -> bool:
        """Whether the next probe step searches for a start instead of fitting a parabola."""
        return False

    def skip(self, state: ControlState) -> ControlState:
        """The state after a step that measured nothing."""
        return replace(state, step=state.step + 1)

    def restart_averages(self, state: ControlState, lr: float) -> ControlState:
        """The state after somebody else set the learning rate: nothing averaged is kept."""
        return replace(state, lr=lr, loss_mean=0.0, loss_deviation=0.0, loss_count=0)

    def decide(self, state: ControlState, loss: float, found: Parabola | StartSearch) -> Decision:
        """Judge what a probe step found, and choose the learning rate.

        Args:
            state: What the rule remembers.
            loss: The loss where the step began.
            found: The loss along the direction, not finite where a probe was not; or the outcome of the start's
                search, where the rule asked for that.

        Returns:
            The new state and why.
        """
        if not math.isfinite(loss):
            return Decision(self.skip(state), ProbeStatus.NON_FINITE_LOSS)
        if isinstance(found, StartSearch):
            return self.start(state, loss, found)
        lr, status = self.propose(state, loss, found)
        return Decision(self._probed(state, lr, loss, status), status)

    def start(self, state: ControlState, loss: float, search: StartSearch) -> Decision:
        """Turn the start's search into a learning rate; one that found none keeps it. This rule asks for none."""
        raise NotImplementedError

    def propose(self, state: ControlState, loss: float, parabola: Parabola) -> tuple[float, ProbeStatus]:
        """The learning rate that a finite loss and its parabola call for, limits apart, and why."""
        if not parabola.is_finite:
            return state.lr, ProbeStatus.NON_FINITE_PROBE
        if parabola.optimal_lr is None or parabola.slope <= 0:
            return state.lr, ProbeStatus.NO_MINIMUM
        return self.towards(state, parabola.optimal_lr), ProbeStatus.FITTED

    def towards(self, state: ControlState, lr: float) -> float:
        """The average of the present learning rate and ``lr``, as far as ``max_change`` lets it count."""
        target = min(max(lr, state.lr / self.max_change), state.lr * self.max_change)
        return self.smoothing * state.lr + (1.0 - self.smoothing) * target

    def steps_to_next_probe(self, probes: int, status: ProbeStatus) -> int:
        """The distance to the next probe step after ``probes`` of them, the last of which concluded ``status``."""
        return self.period

    def _probed(self, state: ControlState, lr: float, loss: float, status: ProbeStatus) -> ControlState:
        """The state after a probe step that began at a finite ``loss`` and chose ``lr``."""
        weight = max(1.0 - self.smoothing, 1.0 / (state.loss_count + 1))
        surprise = loss - state.loss_mean if state.loss_count else 0.0
        return replace(
            state,
            lr=min(max(lr, self.lr_min, _SMALLEST), self.lr_max, _LARGEST),
            step=state.step + 1,
            probes=state.probes + 1,
            next_probe=state.step + 1 + self.steps_to_next_probe(state.probes + 1, status),
            loss_mean=loss if not state.loss_count else state.loss_mean + weight * surprise,
            loss_deviation=state.loss_deviation + weight * (abs(surprise) - state.loss_deviation),
            loss_count=state.loss_count + 1,
        )


@dataclass(frozen=True, kw_only=True)
class SafeguardedRule(PublishedRule):
    """The published rule, made independent of the initial learning rate and safe where its parabola says nothing.

    What it adds, in the order in which a training run meets it:

    - a start taken from the loss itself (:func:`search_start`); training begins at ``start_fraction`` of the learning
      rate found, because the first gradient points down an untypically steep slope and no momentum is built up yet;
    - a burn-in: the first ``burn_in`` probe steps follow each other at every step;
    - a slope or curvature that rounding alone explains counts as unknown;
    - where the loss descends and no positive curvature is seen, the optimum lies further out, and the learning rate
      grows as fast as its limits let it; the published rule would stay there for ever;
    - where the loss is unusually high (above its moving average by more than its mean absolute deviation) there is no
      such growth, and a lower optimum holds at once;
    - a probe that is not finite, and a loss that exploded, cut the learning rate by ``max_change`` at once, and the
      next step probes again.

    Attributes:
        start_fraction: Fraction of the learning rate found by the start's search at which training begins.
        burn_in: Number of probe steps at the beginning that follow each other at every step.
        explosion: The loss has exploded when it is above the loss where training began and above its own moving
            average by this many times its mean absolute deviation; ``inf`` turns that off.
    """

    start_fraction: float = 0.03
    burn_in: int = 50
    explosion: float = 10.0

    def __post_init__(self) -> None:
        """Check every option.

        Raises:
            ValueError: Names the option, what was expected and what came.
        """
        super().__post_init__()
        _check("start_fraction", self.start_fraction, "in (0, 1]", 0 < self.start_fraction <= 1)
        _check("burn_in", self.burn_in, "a whole number of at least 0", _is_whole(self.burn_in, least=0))
        _check("explosion", self.explosion, "above 0", self.explosion > 0)

    def needs_start(self, state: ControlState) -> bool:
        """Whether the next probe step searches for a start instead of fitting a parabola."""
        return not state.started

    def start(self, state: ControlState, loss: float, search: StartSearch) -> Decision:
        """Turn the start's search into a learning rate; one that found none keeps it."""
        if search.lr is None:
            return Decision(self._probed(state, state.lr, loss, ProbeStatus.START_FAILED), ProbeStatus.START_FAILED)
        begun = self._probed(state, self.start_fraction * search.lr, loss, ProbeStatus.STARTED)
        return Decision(replace(begun, started=True, loss_start=loss), ProbeStatus.STARTED)

    def propose(self, state: ControlState, loss: float, parabola: Parabola) -> tuple[float, ProbeStatus]:
        """The learning rate that a finite loss and its parabola call for, limits apart, and why."""
        if self._has_exploded(state, loss):
            return state.lr / self.max_change, ProbeStatus.EXPLODED
        if not parabola.is_finite:
            return state.lr / self.max_change, ProbeStatus.NON_FINITE_PROBE
        descends = parabola.slope > parabola.slope_noise
        # Where training has gone astray, losses that saturate are concave all around: no reason to go faster.
        is_usual = not state.loss_count or loss <= state.loss_mean + state.loss_deviation
        if parabola.curvature <= parabola.curvature_noise and descends and is_usual:
            return self.towards(state, math.inf), ProbeStatus.CONCAVE
        if max(abs(parabola.curvature) - parabola.curvature_noise, abs(parabola.slope) - parabola.slope_noise) <= 0:
            return state.lr, ProbeStatus.BELOW_NOISE
        if parabola.optimal_lr is None or parabola.curvature <= parabola.curvature_noise:
            return state.lr, ProbeStatus.NO_MINIMUM
        if not is_usual and parabola.optimal_lr < state.lr:
            return max(parabola.optimal_lr, state.lr / self.max_change), ProbeStatus.FITTED
        return self.towards(state, parabola.optimal_lr), ProbeStatus.FITTED

    def steps_to_next_probe(self, probes: int, status: ProbeStatus) -> int:
        """The distance to the next probe step after ``probes`` of them, the last of which concluded ``status``."""
        is_urgent = status in (ProbeStatus.START_FAILED, ProbeStatus.EXPLODED, ProbeStatus.NON_FINITE_PROBE)
        return 1 if is_urgent or probes < self.burn_in else self.period

    def _has_exploded(self, state: ControlState, loss: float) -> bool:
        # Below this many losses their deviation says little; a shift or a scaling of the loss changes nothing here.
        settled = state.loss_count >= 1.0 / (1.0 - self.smoothing)
        surprise = loss - state.loss_mean
        usual = max(state.loss_deviation, _ROUNDING * abs(state.loss_mean))
        return settled and loss > state.loss_start and surprise > self.explosion * usual


_RULES: dict[str, type[PublishedRule]] = {"published": PublishedRule, "safeguarded": SafeguardedRule}


def make_rule(name: str, **options: Any) -> PublishedRule:
    """The rule that ``GeNOptimizer(rule=name)`` asks for, with those of the options that it has.

    Raises:
        ValueError: If there is no such rule, or an option is out of range.
    """
    if name not in list(_RULES):
        raise ValueError(f"rule must be one of {', '.join(map(repr, _RULES))}, got {name!r}")
    if name != "safeguarded":
        SafeguardedRule(**options)  # what this rule does not use has to be in range all the same
    taken = {field.name for field in fields(_RULES[name])}
    return _RULES[name](**{option: value for option, value in options.items() if option in taken})
