"""What a rule remembers between steps, and what it returns after a probe step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self


class ProbeStatus(Enum):
    """What a probe step concluded.

    Attributes:
        STARTED: The search for an initial learning rate found where the loss along the first direction is lowest.
        START_FAILED: No learning rate lowered the loss along the first direction. No step is taken, and the next step
            searches again.
        FITTED: The parabola (of the default rule the averaged one) has a minimum. The learning rate moves towards it.
            After the burn-in of the default rule it does so only if slopes agree; in noise it follows the excess loss
            and the gain, or is held.
        CONCAVE: The loss descends with a negative or unmeasurable curvature, so the minimum lies further out. The
            learning rate grows, under the same conditions.
        GROWING: The slopes agree and the minimum lies far out. The learning rate grows, and the next step probes.
        UNSTABLE: The averages call for a larger learning rate, but the last step was too long by its own parabola; or
            it raised the loss unusually far; or steps raise the loss on average. The learning rate falls, and the next
            step probes.
        NO_MINIMUM: The parabola has no minimum ahead. The default rule lowers the learning rate in its burn-in, and
            later does what it does in noise. The published rule keeps it.
        BELOW_NOISE: The losses differ by no more than their rounding. Looking back, the default rule goes by the
            gradient where the step ended: the learning rate grows if it descends, and falls after the burn-in if it
            ascends. Otherwise the learning rate is kept.
        NON_FINITE_LOSS: The loss at the start of the step is NaN or infinite. Nothing is learned from it.
        NON_FINITE_PROBE: A probed loss is NaN or infinite. The default rule cuts the learning rate, the published rule
            keeps it.
        REVERTED: The last step raised the loss far above its start, on the same batch, or ended where it is not
            finite. The parameters return to the start point, the base optimizer does not step,
            and the learning rate is cut.
        EXPLODED: The loss rose far above its average and above the loss at the beginning of training. The learning
            rate is cut, and the parabola is not used.
        RESTARTED: A loss has risen unusually far in the burn-in, which is over. The parameters return to where training
            began, the base optimizer's state is cleared, and training goes on at the learning rate found.
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
    REVERTED = "reverted"
    EXPLODED = "exploded"
    RESTARTED = "restarted"


@dataclass(frozen=True)
class RuleState:
    """What every rule remembers between steps.

    A rule that remembers more subclasses it and adds fields with defaults. A field is an int, a float, a bool, or a
    frozen dataclass of those whose fields have defaults too. Checkpoints keep the numbers of :meth:`to_numbers`.

    Attributes:
        lr: The learning rate α of the first unfrozen parameter group, without a scheduler's factor.
        step: Number of steps taken.
        probes: Number of probe steps among them.
        next_probe: Number of the step, counted from 1, at which the next probe step is due.

    Example:
        >>> @dataclass(frozen=True)
        ... class CountingState(RuleState):
        ...     failures: int = 0
        >>> CountingState(lr=0.1, failures=2).to_numbers()
        {'lr': 0.1, 'step': 0, 'probes': 0, 'next_probe': 1, 'failures': 2}
    """

    lr: float
    step: int = 0
    probes: int = 0
    next_probe: int = 1

    def after_step(self) -> Self:
        """The state one step later, with everything else unchanged."""
        # Every lazy step calls this: the constructor of a frozen dataclass takes 3 µs, ``replace`` 7, this less than 1.
        state = object.__new__(type(self))
        values = vars(state)
        values.update(vars(self))
        values["step"] += 1
        return state

    def to_numbers(self) -> dict[str, float | int | bool]:
        """The state as plain numbers by name, in the order of the fields.

        The fields of a nested dataclass are named after both: ``parabola.slope`` becomes ``"parabola_slope"``.
        """
        numbers: dict[str, float | int | bool] = {}
        for name, value in vars(self).items():
            if is_dataclass(value):
                numbers.update({f"{name}_{inner}": number for inner, number in vars(value).items()})
            else:
                numbers[name] = value
        return numbers

    @classmethod
    def from_numbers(cls, numbers: Mapping[str, Any]) -> Self:
        """The state that :meth:`to_numbers` turned into ``numbers``.

        Missing names take their defaults; names that the state does not have are ignored.

        Raises:
            KeyError: If ``"lr"`` is missing.
        """
        state = cls(lr=numbers["lr"])
        values: dict[str, Any] = {}
        for name, default in vars(state).items():
            if is_dataclass(default) and not isinstance(default, type):
                inner = {each: numbers[f"{name}_{each}"] for each in vars(default) if f"{name}_{each}" in numbers}
                values[name] = replace(default, **inner)
            elif name in numbers:
                values[name] = numbers[name]
        return replace(state, **values)


@dataclass(frozen=True)
class Decision:
    """What a rule returns after a probe step.

    Attributes:
        state: The rule's state from now on, with the learning rate chosen.
        status: Why this learning rate was chosen.
    """

    state: RuleState
    status: ProbeStatus

    @property
    def lr_taken(self) -> float:
        """The learning rate of the step, which is that of the state, or 0 if no initial learning rate was found."""
        return 0.0 if self.status is ProbeStatus.START_FAILED else self.state.lr

    @property
    def is_reverted(self) -> bool:
        """Whether the last step is undone and no other step is taken in its place."""
        return self.status is ProbeStatus.REVERTED
