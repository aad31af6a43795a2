"""A controller: manual values and schedulers are taken in, a rule decides, and everything goes through checkpoints."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LinearLR

from gen_optim import Decision, GeNOptimizer, Measurement, Parabola, ProbeStatus, RelaxedRule, Rule, RuleState
from gen_optim.controller import Controller
from gen_optim.tensors.interrupts import Unfinished


@dataclass(frozen=True)
class CountingState(RuleState):
    decisions: int = 0
    was_low: bool = False


@dataclass(frozen=True, kw_only=True)
class Counting(Rule):
    """Moves to the lowest point, and counts."""

    state_type: ClassVar[type[RuleState]] = CountingState

    def decide(self, state: Any, found: Any, **given: Any) -> Decision:
        state = replace(state, decisions=state.decisions + 1, was_low=given["factor"] < 1.0)
        return Decision(self.after_probe(state, found.optimal_lr), ProbeStatus.FITTED)


def base(**options: Any) -> SGD:
    parameters = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))]
    return SGD([{"params": parameters[:1]}, {"params": parameters[1:], "lr": 0.4}], **{"lr": 0.2, **options})


def step(controller: Controller, optimizer: Optimizer, optimal_lr: float | None = None) -> list[float]:
    """A step as the optimizer takes it, with a parabola of that lowest point if it is a probe step."""
    state = controller.recall()
    after = controller.rule.skip(state)
    if optimal_lr is not None:
        found = Parabola(1.0, optimal_lr, 1.0)
        after = controller.decide(Measurement((0.0,), (1.0,), found, 1.0), controller.rates.factor()).state
    used = controller.step_base(after.lr, Unfinished())
    controller.remember(after, used)
    return used


def test_groups_keep_their_ratios() -> None:
    optimizer = base()
    controller = Controller(optimizer, Counting())
    assert controller.state.lr == 0.2
    assert step(controller, optimizer, 0.05) == [0.05, 0.1]
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.1]
    assert step(controller, optimizer) == [0.05, 0.1]


def test_a_manual_value_becomes_the_learning_rate_and_clears_what_the_rule_has_averaged() -> None:
    optimizer = base()
    controller = Controller(optimizer, Counting())
    step(controller, optimizer, 0.05)
    optimizer.param_groups[0]["lr"] = 0.3
    state = controller.recall()
    assert (state.lr, state.step, state.decisions) == (0.3, 1, 0)  # type: ignore[attr-defined]


def test_what_a_closure_writes_is_taken_in_after_it() -> None:
    optimizer = base()
    controller = Controller(optimizer, Counting())
    before = controller.recall()
    assert controller.recall() is before
    optimizer.param_groups[0]["lr"] = 0.7
    assert controller.recall().lr == 0.7


def test_a_schedulers_factor_multiplies_what_the_rule_chooses() -> None:
    optimizer = base()
    controller = Controller(optimizer, Counting())
    scheduler = LinearLR(optimizer, 0.5, 1.0, total_iters=4)
    assert step(controller, optimizer, 0.1) == pytest.approx([0.05, 0.1])
    assert controller.state.was_low  # type: ignore[attr-defined]
    scheduler.step()
    assert step(controller, optimizer) == pytest.approx([0.0625, 0.125])
    assert controller.state.lr == 0.1


def test_the_base_optimizer_steps_once_at_the_rates_in_force() -> None:
    optimizer = base()
    controller = Controller(optimizer, Counting())
    seen: list[list[float]] = []
    optimizer.register_step_post_hook(lambda each, *_: seen.append([group["lr"] for group in each.param_groups]))
    step(controller, optimizer, 0.05)
    assert seen == [[0.05, 0.1]]


# --- checkpoints -----------------------------------------------------------------------------------------------------


def test_numbers_of_the_rules_own_state_go_through_the_groups() -> None:
    optimizer = base()
    controller = Controller(optimizer, Counting())
    keys = set(optimizer.param_groups[0])
    step(controller, optimizer, 0.05), step(controller, optimizer, 0.03)
    assert optimizer.param_groups[0]["gen_decisions"] == 0  # between steps the state is an object
    controller.save()
    assert set(optimizer.param_groups[0]) == keys
    other = base()
    for own, saved in zip(other.param_groups, optimizer.param_groups, strict=True):
        own.update({key: value for key, value in saved.items() if key != "params"})
    loaded = Controller(other, Counting())
    assert loaded.state == controller.state
    assert loaded.rates.last_lr(other.param_groups) == [0.03, 0.06]


def test_groups_of_a_bare_optimizer_begin_anew() -> None:
    optimizer = base()
    controller = Controller(optimizer, Counting())
    step(controller, optimizer, 0.05)
    for group in optimizer.param_groups:
        for key in [key for key in group if key.startswith("gen_")]:
            del group[key]
    controller.load()
    assert (controller.state.lr, controller.state.step) == (0.05, 0)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("gen_lr", -1.0),
        ("gen_lr", math.nan),
        ("gen_lr", math.inf),
        ("gen_lr", "0.1"),
        ("gen_lr", True),
        ("gen_step", -1),
        ("gen_step", 1.5),
        ("gen_decisions", 0.5),
        ("gen_was_low", 1),
        ("gen_ratio", math.inf),
        ("gen_ratio", -1.0),
    ],
)
def test_impossible_numbers_are_refused_by_name(key: str, value: Any) -> None:
    optimizer = base()
    controller = Controller(optimizer, Counting())
    groups = [dict(group) for group in optimizer.param_groups]
    controller.check(groups)
    groups[0][key] = value
    with pytest.raises(ValueError, match=rf"{key}.* of the state dict must be .*, got"):
        controller.check(groups)


# --- the scheduler's factor ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LimitedState(RuleState):
    factors: int = 0
    lowest: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Limited(Counting):
    """Counts the factors that it hears of."""

    state_type: ClassVar[type[RuleState]] = LimitedState

    def before_step(self, state: Any, factor: float) -> RuleState:
        return replace(state, factors=state.factors + 1, lowest=min(state.lowest, factor))

    def decide(self, state: Any, found: Any, **given: Any) -> Decision:
        return Decision(self.after_probe(state, 0.9 * state.lr), ProbeStatus.FITTED)


@pytest.mark.parametrize("is_scheduled", [False, True])
@pytest.mark.parametrize("mode", ["lookback", "approximate"])
def test_a_rule_hears_of_the_factor_once_before_each_step(mode: str, is_scheduled: bool) -> None:
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = GeNOptimizer(SGD([weight], lr=0.1), rule=Limited(period=3), mode=mode)
    scheduler = LinearLR(optimizer, 1.0, 0.1, 20) if is_scheduled else None

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    for _ in range(12):
        optimizer.step(closure)
        if scheduler is not None:
            scheduler.step()
    state = optimizer._context.controller.state
    assert isinstance(state, LimitedState)
    assert (state.factors == 12) if is_scheduled else (0 < state.factors < 8)
    assert (state.lowest < 1.0) == is_scheduled


def test_a_scheduler_that_is_taken_off_does_not_let_steps_grow_beyond_what_training_bears() -> None:
    optimizer = base()
    controller = Controller(optimizer, RelaxedRule())
    LambdaLR(optimizer, lambda step: 0.1)
    state = replace(controller.recall(), lr=1.0, started=True, lr_borne=0.1, lr_initial=0.05, factor_last=0.1)
    controller.remember(state, controller.rates.rates_in_force(1.0))
    for group in optimizer.param_groups:
        del group["initial_lr"]
    controller.recall()
    assert controller.skip().lr == pytest.approx(0.1)


def test_an_interrupted_step_is_no_longer_than_training_bears_after_the_factor_has_risen() -> None:
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = GeNOptimizer(SGD([weight], lr=0.1), rule=RelaxedRule(burn_in=3, period=1), mode="approximate")
    factors = [1.0] * 5 + [0.1] * 40 + [1.0] * 5
    scheduler = LambdaLR(optimizer, lambda step: factors[step])
    fails = False

    def closure() -> torch.Tensor:
        if fails and optimizer.is_probing:
            raise KeyboardInterrupt
        optimizer.zero_grad()
        loss = (weight * torch.tensor([1.0, 0.01])).square().sum()
        loss.backward()
        return loss

    for _ in range(45):
        optimizer.step(closure)
        scheduler.step()
    controller = optimizer._context.controller
    allowed = controller.rule.before_step(controller.state, 1.0).lr
    assert allowed < 0.6 * controller.state.lr
    fails = True
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert optimizer.get_last_lr() == pytest.approx([allowed])


# --- warnings --------------------------------------------------------------------------------------------------------


def test_manual_values_before_each_step_are_warned_of_once() -> None:
    optimizer = base()
    controller = Controller(optimizer, Counting())
    for number in range(3):
        optimizer.param_groups[0]["lr"] = 0.1 + 0.01 * number
        step(controller, optimizer)
    optimizer.param_groups[0]["lr"] = 0.5
    with pytest.warns(UserWarning, match="before 3 steps, the last of them step 4: 0.5 in place of 0.12"):
        controller.recall()
    controller.remember(controller.rule.skip(controller.state), controller.step_base(0.5, Unfinished()))
    optimizer.param_groups[0]["lr"] = 0.6
    controller.recall()
