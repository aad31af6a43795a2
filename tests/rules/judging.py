"""Parabolas, states and runs on numbers alone that the tests of the rules share."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace

from gen_optim.rules.base import ControlState, Decision, PublishedRule
from gen_optim.rules.initial_search import StartSearch, search_start
from gen_optim.rules.parabola import Parabola

Found = Parabola | StartSearch

CONVEX = Parabola(value=1.0, slope=3.0, curvature=2.0)  # lowest at 1.5
CONCAVE = Parabola(value=1.0, slope=3.0, curvature=-2.0)
NOT_FINITE = Parabola(math.nan, math.nan, math.nan)
STARTED_LONG_AGO = ControlState(lr=1.0, step=1000, probes=500, next_probe=1001, started=True, loss_start=10.0)


def decide_all(rule: PublishedRule, state: ControlState, seen: Sequence[tuple[float, Found]]) -> list[Decision]:
    """The decisions of a rule that probes at every step."""
    decisions = []
    for loss, found in seen:
        decisions.append(rule.decide(state, loss, found))
        state = decisions[-1].state
    return decisions


def settled(rule: PublishedRule, loss: float = 1.0, deviation: float = 0.1) -> ControlState:
    """A state with averages of enough losses around ``loss`` to notice an explosion."""
    return replace(
        STARTED_LONG_AGO, loss_start=loss, loss_mean=loss, loss_lowest=loss, loss_deviation=deviation, loss_count=100
    )


def noisy_losses(level: float, spread: float) -> Iterator[float]:
    source = random.Random(0)
    while True:
        yield level + spread * source.uniform(-1.0, 1.0)


def probed_steps(rule: PublishedRule, steps: int) -> list[int]:
    """The numbers, counted from 1, of the steps that probe."""
    state, probed = ControlState(lr=1.0, started=True), []
    for step in range(1, steps + 1):
        if rule.is_probe_due(state):
            probed.append(step)
            state = rule.decide(state, 1.0, CONVEX).state
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
    rule: PublishedRule, steps: int = 60, lr: float = 1e-3
) -> tuple[list[tuple[float, Found] | None], list[float]]:
    """What a rule saw at each step of gradient descent on x² · 3 / 2, None at lazy ones, and its learning rates."""
    x, state = 10.0, ControlState(lr=lr)
    seen: list[tuple[float, Found] | None] = []
    learning_rates = []
    for _ in range(steps):
        gradient, loss = 3.0 * x, 1.5 * x * x
        if not rule.is_probe_due(state):
            seen.append(None)
            state = rule.skip(state)
        else:
            found: Found = Parabola(loss, slope=gradient**2, curvature=3.0 * gradient**2)
            if rule.needs_start(state):
                found = search_start(lambda lr: 1.5 * (x - lr * gradient) ** 2, loss, rounding=1e-15)  # noqa: B023
            seen.append((loss, found))
            state = rule.decide(state, loss, found).state
        learning_rates.append(state.lr)
        x -= state.lr * gradient
    return seen, learning_rates
