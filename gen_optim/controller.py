"""A rule, its state, and the learning rates of the parameter groups that follow from them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch.optim import Optimizer

from gen_optim.closures.losses import DIFFERENT
from gen_optim.learning_rates import LearningRates, check_lr
from gen_optim.measurement import Measurement
from gen_optim.rules import Decision, Rule, RuleState
from gen_optim.rules.safeguards import ROUNDING
from gen_optim.tensors.interrupts import Unfinished
from gen_optim.warning import warn

_PREFIX = "gen_"
"""Begins the keys under which the numbers of the state are in the first parameter group, for checkpoints."""

_OWN_BATCHES = "own_batches"
"""The name among them of how many measurements in a row were on the batch of the measured step itself."""

_NOT_NEGATIVE = frozenset({"lr", "step", "probes", "next_probe", _OWN_BATCHES})

_ONLY_BATCH = 50
"""The number of such measurements after which one more shows that there is no other batch, so that there is no noise to
balance. A training begins with it."""

_MANUAL = 3
"""The user is warned when a learning rate has been written before this many steps."""


class Controller:
    """Chooses the learning rates of an optimizer's groups, and remembers what that takes.

    ``state`` is what the rule remembers, after the last step. Its numbers enter the parameter groups when a checkpoint
    is made, and leave them when one is loaded; the keys are there from the beginning, because flattened distributed
    checkpoints keep only those that the groups have already.
    """

    def __init__(self, base_optim: Optimizer, rule: Rule) -> None:
        self.rule = rule
        self.state = rule.initial_state(0.0)
        self.rates = LearningRates()
        self._own_batches = _ONLY_BATCH
        self._base_optim = base_optim
        self._manual_steps, self._last_manual_step = 0, 0
        self.load()

    # --- before a step ------------------------------------------------------------------------------------------------

    def recall(self) -> RuleState:
        """Take in what schedulers and the user have written; return the state that holds now.

        Called before a step, and after the closure, which may have written to the groups: manual warm-ups do that.
        """
        groups = self._base_optim.param_groups
        if not self.rates.is_unchanged(groups, self.state.lr):
            before = self.state
            lr = self.rates.update(groups, before.lr, self._base_optim.defaults.get("lr"))
            if lr is not None and lr != before.lr:  # else a ratio has changed: what is known is the best there is
                self.state = self.rule.set_lr(before, lr)
                self._warn_of_manual_values(lr, before)
        return self.state

    # --- decisions ----------------------------------------------------------------------------------------------------

    def decide(self, measurement: Measurement, factor: float) -> Decision:
        """What the rule makes of a measurement under the scheduler's ``factor``; nothing is remembered yet."""
        decision = self.rule.decide(
            self.state,
            measurement.found,
            loss_start=measurement.loss_start,
            loss_end=measurement.loss_end,
            excess_loss=measurement.excess_loss,
            factor=factor,
        )
        return Decision(self._limited(decision.state), decision.status)

    def skip(self) -> RuleState:
        """The state after a step that measures nothing; nothing is remembered yet."""
        return self._limited(self.rule.skip(self.state))

    @property
    def has_one_batch(self) -> bool:
        """Whether all steps are on the same batch, so that there is no noise."""
        return self._own_batches > _ONLY_BATCH

    def note_batch(self, loss_start: float, own_loss: float) -> bool:
        """Note on which batch a step was measured; return whether it is the step's own, and not the only one.

        ``loss_start`` is the loss measured where the step began, ``own_loss`` that of its own batch there; infinite if
        it is not known. On its own batch a step looks better than it is.
        """
        if not math.isfinite(own_loss):
            return False
        difference = abs(loss_start - own_loss)
        is_own = difference <= ROUNDING * abs(own_loss)
        if is_own:
            self._own_batches += 1
        elif difference > DIFFERENT * abs(own_loss):
            self._own_batches = 0
        return is_own and self._own_batches < _ONLY_BATCH

    def _limited(self, state: RuleState) -> RuleState:
        """The state for the step that is about to be taken, as the scheduler's factor allows."""
        if self.rates.is_unchanged(self._base_optim.param_groups, state.lr):
            return state
        return self.rule.before_step(state, self.rates.factor())

    # --- the step -----------------------------------------------------------------------------------------------------

    def step_base(self, lr: float, unfinished: Unfinished) -> list[float]:
        """Let the base optimizer take its step at α = ``lr``; return each group's learning rate in it."""
        if self.rates.is_unchanged(self._base_optim.param_groups, lr):
            self._base_optim.step()
            return self.rates.shares(lr)
        rates = self.rates.rates_in_force(lr)
        with self.rates.in_force(rates, unfinished):
            self._base_optim.step()
        return rates

    def remember(self, state: RuleState, used: list[float]) -> None:
        """Keep the state after a step, and the learning rate that each group used in it."""
        self.state = state
        self.rates.settle(state.lr, used)

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write everything that has to be remembered to the parameter groups, as plain numbers."""
        numbers = {**self.state.to_numbers(), _OWN_BATCHES: self._own_batches}
        self._base_optim.param_groups[0].update({_PREFIX + name: number for name, number in numbers.items()})
        self.rates.save()

    def load(self) -> None:
        """Read it back; what is missing, as in a checkpoint of the base optimizer alone, begins anew."""
        groups = self._base_optim.param_groups
        self._own_batches = int(groups[0].get(_PREFIX + _OWN_BATCHES, _ONLY_BATCH))
        names = self.rule.initial_state(0.0).to_numbers()
        numbers = {name: groups[0][_PREFIX + name] for name in names if _PREFIX + name in groups[0]}
        if "lr" in numbers and self.rates.load_from(groups):
            self.state = self.rule.state_type.from_numbers(numbers)
        else:
            self.state = self.rule.initial_state(self.rates.begin(groups))
        self.recall()
        self.save()

    def check(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Check the numbers in the groups of a checkpoint, before anything of it is loaded; they may be missing."""
        for index, group in enumerate(groups):
            check_lr(index, group.get("lr"))
        self.rates.check_numbers(groups)
        numbers = {**self.rule.initial_state(0.0).to_numbers(), _OWN_BATCHES: 0}
        for name, own in numbers.items():
            key = _PREFIX + name
            if key not in groups[0]:
                continue
            value = groups[0][key]
            kinds = (int, float) if isinstance(own, float) else (type(own),)
            is_valid = isinstance(value, kinds) and isinstance(value, bool) == isinstance(own, bool)
            if name in _NOT_NEGATIVE:
                is_valid = is_valid and 0 <= value < math.inf
            if not is_valid:
                expected = f"a {type(own).__name__}" + (" of at least 0" if name in _NOT_NEGATIVE else "")
                raise ValueError(f"param_groups[0][{key!r}] of the state dict must be {expected}, got {value!r}")

    # --- warnings -----------------------------------------------------------------------------------------------------

    def _warn_of_manual_values(self, lr: float, before: RuleState) -> None:
        if before.step == self._last_manual_step:  # before the first step a value says where to begin
            return
        self._last_manual_step = before.step
        self._manual_steps += 1
        if self._manual_steps == _MANUAL:
            warn(
                f"param_groups[...]['lr'] has been written before {_MANUAL} steps, the last of them step "
                f"{before.step + 1}: {lr:.3g} in place of {before.lr:.3g}. Each such value replaces what "
                "GeNOptimizer has found, and clears what it has averaged. If this is a schedule, attach a scheduler "
                "instead, for example torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: get_lr(step) / "
                "highest): its factor multiplies what GeNOptimizer finds. ReduceLROnPlateau writes such values too, "
                "which may be as you want."
            )
