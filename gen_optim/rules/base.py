"""From measured parabolas to a learning rate: what a rule remembers and decides. Numbers only, no tensors.

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
from operator import itemgetter
from typing import Any

from gen_optim.rules.initial_search import StartSearch
from gen_optim.rules.parabola import Parabola

__all__ = [
    "ControlState",
    "Decision",
    "ProbeStatus",
    "PublishedRule",
    "check_option",
    "is_whole",
]


_SMALLEST, _LARGEST = 1e-30, 1e30
"""Where a learning rate that is cut or grown for ever stops: 0 would freeze the group, infinity break it."""

_FORGETTING = 0.1
"""By this fraction of the distance the lowest mean loss follows the present one up, in case the task has changed."""


class ProbeStatus(Enum):
    """What a probe step concluded.

    Attributes:
        STARTED: The start's search found where the loss along the first direction is lowest.
        START_FAILED: No learning rate lowered the loss along the first direction; no step is taken, and the next one
            tries again.
        FITTED: The parabola has a lowest point, and the learning rate moved towards it.
        CONCAVE: The loss descends and curves downwards, or not measurably: the optimum lies further out; grown.
        GROWING: Without noise, the optimum lies far out: grown, and probed again at the next step.
        UNSTABLE: The averages call for more, but the last step was too long by its own parabola: lowered, and probed
            again at the next step.
        NO_MINIMUM: The parabola has no lowest point ahead. The default rule lowers the learning rate, the published one
            keeps it.
        BELOW_NOISE: The differences between the losses are rounding; the learning rate is kept.
        NON_FINITE_LOSS: The loss where the step began is NaN or infinite; nothing is learned from it.
        NON_FINITE_PROBE: A probed loss is NaN or infinite. The default rule cuts the learning rate, the published one
            keeps it.
        TAKEN_BACK: The last step has led to a loss far above the one where it began, on the same batch: the parameters
            are put back, the base optimizer does not step, and the learning rate is cut.
        EXPLODED: The loss rose far above where training began: the learning rate is cut and the parabola not used.
    """

    STARTED = "started"
    START_FAILED = "start_failed"
    FITTED = "fitted"
    CONCAVE = "concave"
    GROWING = "growing"
    UNSTABLE = "unstable"
    NO_MINIMUM = "no_minimum"
    BELOW_NOISE = "below_noise"
    NON_FINITE_LOSS = "non_finite_loss"
    NON_FINITE_PROBE = "non_finite_probe"
    TAKEN_BACK = "taken_back"
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
        loss_lowest: The lowest ``loss_mean`` of late.
        step_mean: Moving average of the steps at which these losses were measured.
        step_square: Moving average of the squared distance from it.
        step_loss: Moving average of that distance times the losses' from theirs; over ``step_square`` it is the trend
            of the loss, per step, by least squares.
        slope_mean: Moving average of slopes.
        curvature_mean: Moving average of curvatures.
        change_mean: Moving average of how much the loss changes along a step to first and second order.
        rise_mean: Moving average of how much the loss has changed along a step that was taken.
        agreement_mean: Moving average of the share of the first order in that, negative where the loss ascends.
        agreement_square: Moving average of its square.
        parabola_count: Number of parabolas in these averages.
        parabola_weight: Their weight in ``slope_mean`` and ``curvature_mean`` together, the last one's being 1.
        lr_measured: The learning rate of the step along which the last of them was measured.
        factor: The scheduler's factor at the last of them.
        lr_unstable: The learning rate at which training was last seen to be unstable; 0 if it never was.
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
    loss_lowest: float = 0.0
    step_mean: float = 0.0
    step_square: float = 0.0
    step_loss: float = 0.0
    slope_mean: float = 0.0
    curvature_mean: float = 0.0
    change_mean: float = 0.0
    rise_mean: float = 0.0
    agreement_mean: float = 0.0
    agreement_square: float = 0.0
    parabola_count: int = 0
    parabola_weight: float = 0.0
    lr_measured: float = 0.0
    factor: float = 1.0
    lr_unstable: float = 0.0

    @staticmethod
    def is_in(group: Mapping[str, Any]) -> bool:
        """Whether a state stands in a parameter group."""
        return _KEYS["lr"] in group

    @classmethod
    def load(cls, group: Mapping[str, Any]) -> ControlState:
        """Read the state from a parameter group; what does not stand there is as in the beginning."""
        try:
            return cls._of(dict(zip(_KEYS, _entries_of(group), strict=True)))
        except KeyError:
            return cls(**{name: group[key] for name, key in _KEYS.items() if key in group})

    def dump(self) -> dict[str, Any]:
        """The state as entries of a parameter group."""
        return dict(zip(_KEYS.values(), vars(self).values(), strict=True))

    def after_step(self) -> ControlState:
        """The state one step later, and else the same."""
        return self._of({**vars(self), "step": self.step + 1})

    @classmethod
    def _of(cls, values: dict[str, Any]) -> ControlState:
        """The state with these values, in the order of the fields.

        Each lazy step makes two: the constructor of a frozen class takes 3 µs, ``replace`` 7, and this less than 1.
        """
        state = object.__new__(cls)
        vars(state).update(values)
        return state


_KEYS = {field.name: f"gen_{field.name}" for field in fields(ControlState)}
"""Under which keys the state's entries stand in a parameter group."""

_entries_of = itemgetter(*_KEYS.values())

_AVERAGES = tuple(
    field.name
    for field in fields(ControlState)
    if field.name not in ("lr", "step", "probes", "next_probe", "started", "loss_start")
)
"""What a learning rate written by hand makes obsolete."""

_FRESH = ControlState(lr=0.0)


@dataclass(frozen=True)
class Decision:
    """What a rule makes of a probe step: the state from now on, and why."""

    state: ControlState
    status: ProbeStatus

    @property
    def taken_lr(self) -> float:
        """The learning rate of the step: that of the state, but 0 where no start was found to begin at."""
        return 0.0 if self.status is ProbeStatus.START_FAILED else self.state.lr

    @property
    def takes_back(self) -> bool:
        """Whether the last step is to be taken back, and no other one taken instead."""
        return self.status is ProbeStatus.TAKEN_BACK


def is_whole(value: object, *, least: int) -> bool:
    """Whether an option is a whole number of at least ``least``."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def check_option(name: str, value: object, expected: str, holds: bool) -> None:
    """Raise a ValueError that names the option, unless what is expected of it holds."""
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
            check_option(option.name, value, "a number", isinstance(value, Real) and not isinstance(value, bool))
            if not isinstance(value, int):  # numpy's numbers would end up in checkpoints, which refuse them
                plain = int(value) if isinstance(value, Integral) else float(value)
                object.__setattr__(self, option.name, plain)
        check_option("period", self.period, "a whole number of at least 1", is_whole(self.period, least=1))
        check_option("smoothing", self.smoothing, "in [0, 1)", 0 <= self.smoothing < 1)
        check_option("max_change", self.max_change, "a finite number above 1", 1 < self.max_change < math.inf)
        check_option("lr_min", self.lr_min, "a finite number of at least 0", 0 <= self.lr_min < math.inf)
        check_option("lr_max", self.lr_max, f"at least lr_min ({self.lr_min})", self.lr_max >= self.lr_min)
        check_option("lr_max", self.lr_max, "above 0", self.lr_max > 0)

    def is_probe_due(self, state: ControlState) -> bool:
        """Whether the next step probes."""
        return state.step + 1 >= state.next_probe

    def needs_start(self, state: ControlState) -> bool:
        """Whether the next probe step searches for a start instead of fitting a parabola."""
        return False

    def skip(self, state: ControlState) -> ControlState:
        """The state after a step that measured nothing."""
        return state.after_step()

    def restart_averages(self, state: ControlState, lr: float) -> ControlState:
        """The state after somebody else set the learning rate: nothing averaged is kept."""
        return replace(state, lr=lr, **{name: getattr(_FRESH, name) for name in _AVERAGES})

    def decide(
        self,
        state: ControlState,
        loss: float,
        found: Parabola | StartSearch,
        *,
        factor: float = 1.0,
        arrival: float | None = None,
    ) -> Decision:
        """Judge what a probe step found, and choose the learning rate.

        Args:
            state: What the rule remembers.
            loss: The loss where the measured step began.
            found: The loss along the direction, not finite where a probe was not; or the outcome of the start's
                search, where the rule asked for that.
            factor: The scheduler's factor.
            arrival: The loss where the measured step has led, if it has been taken already.

        Returns:
            The new state and why.
        """
        if not math.isfinite(loss):
            return Decision(self.skip(state), ProbeStatus.NON_FINITE_LOSS)
        if isinstance(found, StartSearch):
            return self.start(state, loss, found)
        return self.judge(state, loss, found, factor=factor, arrival=arrival)

    def start(self, state: ControlState, loss: float, search: StartSearch) -> Decision:
        """Turn the start's search into a learning rate; one that found none keeps it. This rule asks for none."""
        raise NotImplementedError

    def judge(
        self, state: ControlState, loss: float, parabola: Parabola, *, factor: float, arrival: float | None
    ) -> Decision:
        """What a parabola at a finite loss calls for."""
        lr, status = state.lr, ProbeStatus.FITTED
        if not parabola.is_finite:
            status = ProbeStatus.NON_FINITE_PROBE
        elif parabola.optimal_lr is None or parabola.slope <= 0:
            status = ProbeStatus.NO_MINIMUM
        else:
            lr = self.towards(state, parabola.optimal_lr)
        return Decision(self._probed(state, lr, loss, status), status)

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
        mean = loss if not state.loss_count else state.loss_mean + weight * surprise
        distance = state.step + 1 - state.step_mean
        lowest = state.loss_lowest + _FORGETTING * max(mean - state.loss_lowest, 0.0)
        return replace(
            state,
            lr=min(max(lr, self.lr_min, _SMALLEST), self.lr_max, _LARGEST),
            step=state.step + 1,
            probes=state.probes + 1,
            next_probe=state.step + 1 + self.steps_to_next_probe(state.probes + 1, status),
            loss_mean=mean,
            loss_deviation=state.loss_deviation + weight * (abs(surprise) - state.loss_deviation),
            loss_count=state.loss_count + 1,
            loss_lowest=min(lowest, mean) if state.loss_count else mean,
            step_mean=state.step_mean + weight * distance,
            step_square=(1.0 - weight) * (state.step_square + weight * distance**2),
            step_loss=(1.0 - weight) * (state.step_loss + weight * distance * surprise),
        )
