"""Parabolas, states and runs on numbers alone that the tests of the rules share."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from gen_optim.rules import Decision, InitialSearch, Parabola, RelaxedRule, Rule, RuleState
from gen_optim.rules.initial_search import search_initial_lr
from gen_optim.rules.relaxed import RelaxedState

Found = Parabola | InitialSearch

CONVEX = Parabola(value=1.0, slope=3.0, curvature=2.0)  # lowest at 1.5
CONCAVE = Parabola(value=1.0, slope=3.0, curvature=-2.0)
NOT_FINITE = Parabola(math.nan, math.nan, math.nan)
PROBED_LONG = RuleState(lr=1.0, step=1000, probes=500, next_probe=1001)
STARTED_LONG_AGO = RelaxedState(lr=1.0, step=1000, probes=500, next_probe=1001, started=True, loss_initial=10.0)

State = TypeVar("State", bound=RuleState)


def changed(state: State, **numbers: Any) -> State:
    """The state with other numbers, by the names that they have in a checkpoint."""
    known = state.to_numbers()
    assert numbers.keys() <= known.keys()
    return type(state).from_numbers({**known, **numbers})


def decide_all(rule: Rule, state: RuleState, seen: Sequence[tuple[float, Found]]) -> list[Decision]:
    """The decisions of a rule that probes at every step."""
    decisions = []
    for loss, found in seen:
        decisions.append(rule.decide(state, found, loss_start=loss))
        state = decisions[-1].state
    return decisions


def settled(rule: RelaxedRule, loss: float = 1.0, deviation: float = 0.1) -> RelaxedState:
    """A state with averages of enough losses around ``loss`` to notice an explosion."""
    return changed(STARTED_LONG_AGO, loss_initial=loss, loss_mean=loss, loss_deviation=deviation, loss_count=100)


def noisy_losses(level: float, spread: float) -> Iterator[float]:
    source = random.Random(0)
    while True:
        yield level + spread * source.uniform(-1.0, 1.0)


def probed_steps(rule: Rule, steps: int) -> list[int]:
    """The numbers, counted from 1, of the steps that probe."""
    state: RuleState = rule.initial_state(1.0)
    if isinstance(state, RelaxedState):
        state = changed(state, started=True)
    probed = []
    for step in range(1, steps + 1):
        if rule.is_probe_due(state):
            probed.append(step)
            state = rule.decide(state, CONVEX, loss_start=1.0).state
        else:
            state = rule.skip(state)
        assert state.step == step
        assert state.probes == len(probed)
    return probed


def seen_in_training(seed: int, steps: int = 80) -> list[tuple[float, Parabola]]:
    """Losses that fall, jump up and fall again, with parabolas of every kind."""
    source = random.Random(seed)
    seen = []
    for step in range(steps):
        jump = 50.0 if steps // 2 <= step < steps // 2 + 5 else 0.0
        loss = 5.0 * math.exp(-step / 20) + jump + 0.1 * source.gauss(0.0, 1.0)
        parabola = Parabola(loss, slope=source.gauss(0.5, 1.0), curvature=source.gauss(0.5, 1.0))
        seen.append((loss, NOT_FINITE if source.random() < 0.05 else parabola))
    return seen


def train_on_quadratic(
    rule: Rule, steps: int = 60, lr: float = 1e-3
) -> tuple[list[tuple[float, Found] | None], list[float]]:
    """What a rule saw at each step of gradient descent on x² · 3 / 2, None at lazy ones, and its learning rates."""
    x, state = 10.0, rule.initial_state(lr)
    seen: list[tuple[float, Found] | None] = []
    learning_rates = []
    for _ in range(steps):
        gradient, loss = 3.0 * x, 1.5 * x * x
        if not rule.is_probe_due(state):
            seen.append(None)
            state = rule.skip(state)
        else:
            found: Found = Parabola(loss, slope=gradient**2, curvature=3.0 * gradient**2)
            if rule.needs_search(state):
                found = search_initial_lr(lambda lr: 1.5 * (x - lr * gradient) ** 2, loss, rounding=1e-15)  # noqa: B023
            seen.append((loss, found))
            state = rule.decide(state, found, loss_start=loss).state
        learning_rates.append(state.lr)
        x -= state.lr * gradient
    return seen, learning_rates
