"""The interface of a rule, which chooses learning rates from measured parabolas."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Integral, Real
from random import Random
from typing import Any, ClassVar, TypeVar

from gen_optim.rules.initial_search import InitialSearch
from gen_optim.rules.parabola import Parabola
from gen_optim.rules.state import Decision, RuleState

_State = TypeVar("_State", bound=RuleState)

_SMALLEST, _LARGEST = 1e-36, 1e36
"""Bounds of a learning rate that is cut or grown again and again: 0 would freeze the group, infinity break it."""


@dataclass(frozen=True, kw_only=True)
class Rule(ABC):
    """Chooses the learning rate from what probe steps measure. Abstract: a subclass implements :meth:`decide`.

    A rule is a pure function of its state and of one measurement, in plain numbers, so it can be tested and replayed
    without a model. Its options are fields of a frozen, keyword-only dataclass. What it remembers is a
    :class:`RuleState`; a rule that remembers more sets ``state_type`` to a subclass of that.

    The loss is what is minimized: under ``maximize=True``, the negative of what the closure returns.

    Args:
        period: Mean number of steps from one probe step to the next.
        lr_min: Lower limit of the learning rate.
        lr_max: Upper limit of the learning rate.

    Raises:
        ValueError: If an option is out of range.

    Example:
        A rule that moves a fraction of the way to the minimum of each parabola.

        >>> import math
        >>> from dataclasses import dataclass
        >>> from gen_optim.rules import Decision, Parabola, ProbeStatus, Rule
        >>> @dataclass(frozen=True, kw_only=True)
        ... class PartialNewton(Rule):
        ...     fraction: float = 0.5
        ...
        ...     def decide(self, state, found, *, loss_start, loss_end=None, excess_loss=None, factor=1.0):
        ...         if not math.isfinite(loss_start):
        ...             return Decision(self.skip(state), ProbeStatus.NON_FINITE_LOSS)
        ...         if found.optimal_lr is None or found.slope <= 0:
        ...             return Decision(self.after_probe(state, state.lr), ProbeStatus.NO_MINIMUM)
        ...         lr = state.lr + self.fraction * (found.optimal_lr - state.lr)
        ...         return Decision(self.after_probe(state, lr), ProbeStatus.FITTED)
        >>> rule = PartialNewton(period=4)
        >>> parabola = Parabola(value=1.0, slope=3.0, curvature=2.0)
        >>> rule.decide(rule.initial_state(lr=0.5), parabola, loss_start=1.0).state
        RuleState(lr=1.0, step=1, probes=1, next_probe=5)
    """

    # The state is annotated as Any in methods that a subclass may override: a rule meets states of its own type alone.

    period: int = 8
    lr_min: float = 0.0
    lr_max: float = math.inf

    state_type: ClassVar[type[RuleState]] = RuleState

    def __post_init__(self) -> None:
        """Check the options. A subclass with options of its own calls this, then :meth:`check_option` for each.

        Raises:
            ValueError: If an option is out of range.
        """
        self.check_option("period", "a whole number of at least 1", lambda value: isinstance(value, int) and value >= 1)
        self.check_option("lr_min", "a finite number of at least 0", lambda value: 0 <= value < math.inf)
        self.check_option("lr_max", f"at least lr_min ({self.lr_min})", lambda value: value >= self.lr_min)
        self.check_option("lr_max", "above 0", lambda value: value > 0)

    def check_option(self, name: str, expected: str, holds: Callable[[Any], bool]) -> None:
        """Check a numeric option, and turn a number of numpy's into a plain one.

        Args:
            name: Name of the option.
            expected: What its value must be, for the message.
            holds: Returns whether a number is such a value.

        Raises:
            ValueError: If the value is no number, or ``holds`` returns False for it.
        """
        value: Any = getattr(self, name)
        if not isinstance(value, int) and isinstance(value, Real):  # checkpoints refuse numpy's numbers
            value = int(value) if isinstance(value, Integral) else float(value)
            object.__setattr__(self, name, value)
        if isinstance(value, bool) or not isinstance(value, Real):
            raise ValueError(f"{name} must be a number, got {value!r}")
        if not holds(value):
            raise ValueError(f"{name} must be {expected}, got {value!r}")

    def initial_state(self, lr: float) -> RuleState:
        """The state before the first step, at the base optimizer's learning rate."""
        return self.state_type(lr=lr)

    def is_probe_due(self, state: Any) -> bool:
        """Whether the next step is a probe step."""
        return bool(state.step + 1 >= state.next_probe)

    def needs_search(self, state: Any) -> bool:
        """Whether the next probe step searches for an initial learning rate instead of fitting a parabola."""
        return False

    def needs_excess_loss(self, state: Any) -> bool:
        """Whether the next :meth:`decide` makes use of ``excess_loss``. It may cost a forward pass."""
        return False

    def may_restart(self, state: Any) -> bool:
        """Whether training may have to restart, so that the point where it began must be kept; never by default."""
        return False

    def restart(self, state: Any) -> RuleState | None:
        """The state with which training restarts after the probe step that led to ``state``; None if it goes on.

        If the point where training began is not known any more, it goes on all the same.
        """
        return None

    def before_step(self, state: Any, factor: float) -> RuleState:
        """The state for a step under the scheduler's ``factor``, 1 without a scheduler.

        Called before each step, maybe more than once, unless there is no scheduler and the learning rate has not
        changed. It must not remember anything but in the state that it returns.
        """
        unchanged: RuleState = state
        return unchanged

    def skip(self, state: Any) -> RuleState:
        """The state after a step that measured nothing."""
        after: RuleState = state.after_step()
        return after

    def set_lr(self, state: Any, lr: float) -> RuleState:
        """The state after a manual value was written to the learning rate.

        The step counters are kept. Fields that a subclass of :class:`RuleState` adds return to their defaults, because
        averages measured at another learning rate no longer hold.
        """
        return self.state_type(lr=lr, step=state.step, probes=state.probes, next_probe=state.next_probe)

    def after_probe(self, state: _State, lr: float, *, steps_to_next: int | None = None) -> _State:
        """The state after a probe step that chose a learning rate.

        Args:
            state: The state before the step, its other fields already updated.
            lr: The learning rate chosen; limited to [``lr_min``, ``lr_max``].
            steps_to_next: Number of steps to the next probe step. By default it varies by a quarter around ``period``,
                the same on all ranks and after a resume: a loop that takes things in turn must not be measured on one
                of them for ever.
        """
        if steps_to_next is None:
            spread = min(self.period - 1, max(1, self.period // 4))
            steps_to_next = Random(state.step).randint(self.period - spread, self.period + spread)
        return replace(
            state,
            lr=min(max(lr, self.lr_min, _SMALLEST), self.lr_max, _LARGEST),
            step=state.step + 1,
            probes=state.probes + 1,
            next_probe=state.step + 1 + steps_to_next,
        )

    @abstractmethod
    def decide(
        self,
        state: Any,
        found: Parabola | InitialSearch,
        *,
        loss_start: float,
        loss_end: float | None = None,
        excess_loss: float | None = None,
        factor: float = 1.0,
    ) -> Decision:
        """Choose the learning rate after a probe step.

        Args:
            state: The rule's state before the step.
            found: The parabola along the measured step, which is not finite if a loss was not. The outcome of the
                search if :meth:`needs_search` returned True.
            loss_start: The loss at the start of the measured step. It may be NaN or infinite.
            loss_end: The loss at its end, if the step was taken before it was measured. It may be NaN or infinite.
            excess_loss: An estimate of how far the loss at the end is above that at averaged weights: what the noise
                in the parameters costs. It may be negative; None if no average is kept, it could not be measured, or
                :meth:`needs_excess_loss` returned False.
            factor: The scheduler's factor: steps are taken at the learning rate times this.

        Returns:
            The state after the step, and why its learning rate was chosen.
        """
