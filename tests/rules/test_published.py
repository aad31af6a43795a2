"""What every rule remembers and decides alike, and the published rule."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gen_optim.rules.base import ControlState, Decision, ProbeStatus, PublishedRule
from gen_optim.rules.initial_search import StartSearch
from gen_optim.rules.parabola import Parabola
from tests.rules.judging import (
    CONVEX,
    NOT_FINITE,
    STARTED_LONG_AGO,
    Found,
    decide_all,
    probed_steps,
    seen_in_training,
    settled,
)

# --- ControlState ----------------------------------------------------------------------------------------------------

states = st.builds(
    ControlState,
    lr=st.floats(0.0, 1e6),
    step=st.integers(0, 10**9),
    probes=st.integers(0, 10**9),
    next_probe=st.integers(1, 10**9),
    started=st.booleans(),
    loss_start=st.floats(-1e6, 1e6),
    loss_mean=st.floats(-1e6, 1e6),
    loss_deviation=st.floats(0.0, 1e6),
    loss_count=st.integers(0, 10**9),
    loss_lowest=st.floats(-1e6, 1e6),
    slope_mean=st.floats(-1e6, 1e6),
    curvature_mean=st.floats(-1e6, 1e6),
    change_mean=st.floats(0.0, 1e6),
    rise_mean=st.floats(0.0, 1e6),
    agreement_mean=st.floats(-1.0, 1.0),
    agreement_square=st.floats(0.0, 1.0),
    parabola_count=st.integers(0, 10**9),
    lr_unstable=st.floats(0.0, 1e6),
)


@given(states)
def test_state_survives_a_parameter_group_of_plain_numbers(state: ControlState) -> None:
    group = {"params": [], "lr": 0.5, "betas": (0.9, 0.99), **state.dump()}
    assert ControlState.load(group) == state
    assert all(type(value) in (int, float, bool) for value in state.dump().values())


@given(states)
def test_state_survives_json(state: ControlState) -> None:
    assert ControlState.load(json.loads(json.dumps(state.dump()))) == state


def test_state_entries_cannot_be_taken_for_those_of_an_optimizer() -> None:
    assert all(name.startswith("gen_") for name in ControlState(lr=1.0).dump())


def test_state_is_found_only_where_it_was_dumped() -> None:
    assert not ControlState.is_in({"params": [], "lr": 0.1, "initial_lr": 0.1})
    assert ControlState.is_in(ControlState(lr=0.1).dump())


def test_entries_missing_from_a_group_take_their_defaults() -> None:
    assert ControlState.load({"lr": 3.0, "gen_lr": 0.5, "gen_step": 7}) == ControlState(lr=0.5, step=7)


# --- the published rule ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slope", "curvature", "expected"),
    [
        (3.0, 2.0, 1.05),  # 0.9 · 1 + 0.1 · 1.5
        (1.0, 1.0, 1.0),
        (0.7, 1.0, 0.97),  # 0.9 · 1 + 0.1 · 0.7
        (10.0, 1.0, 1.1),  # the optimum counts at most 2
        (0.1, 1.0, 0.95),  # and at least 0.5
    ],
)
def test_published_rule_averages_with_the_optimum(slope: float, curvature: float, expected: float) -> None:
    rule = PublishedRule(smoothing=0.9, max_change=2.0)
    decision = rule.decide(ControlState(lr=1.0), 1.0, Parabola(1.0, slope, curvature))
    assert decision.state.lr == pytest.approx(expected)
    assert decision.status is ProbeStatus.FITTED


def test_published_rule_is_relative_to_the_present_learning_rate() -> None:
    rule = PublishedRule(smoothing=0.5, max_change=10.0)
    assert rule.decide(ControlState(lr=0.02), 1.0, Parabola(1.0, 0.04, 1.0)).state.lr == pytest.approx(0.03)
    assert rule.decide(ControlState(lr=0.02), 1.0, Parabola(1.0, 40.0, 1.0)).state.lr == pytest.approx(0.11)


def test_published_rule_without_smoothing_jumps_to_the_optimum() -> None:
    rule = PublishedRule(smoothing=0.0)
    assert rule.decide(ControlState(lr=1.0), 1.0, CONVEX).state.lr == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("parabola", "status"),
    [
        (Parabola(1.0, 3.0, 0.0), ProbeStatus.NO_MINIMUM),
        (Parabola(1.0, 3.0, -2.0), ProbeStatus.NO_MINIMUM),
        (Parabola(1.0, 0.0, 2.0), ProbeStatus.NO_MINIMUM),
        (Parabola(1.0, -3.0, 2.0), ProbeStatus.NO_MINIMUM),
        (Parabola(1.0, -3.0, -2.0), ProbeStatus.NO_MINIMUM),
        (NOT_FINITE, ProbeStatus.NON_FINITE_PROBE),
        (Parabola(1.0, math.inf, 2.0), ProbeStatus.NON_FINITE_PROBE),
    ],
)
def test_published_rule_keeps_the_learning_rate_elsewhere(parabola: Parabola, status: ProbeStatus) -> None:
    decision = PublishedRule().decide(ControlState(lr=1.0), 1.0, parabola)
    assert decision.state.lr == 1.0
    assert decision.status is status


def test_published_rule_ignores_rounding_noise() -> None:
    noisy = replace(CONVEX, slope_noise=100.0, curvature_noise=100.0)
    assert PublishedRule().decide(ControlState(lr=1.0), 1.0, noisy).state.lr == pytest.approx(1.05)


@pytest.mark.parametrize(
    ("period", "expected"), [(1, [1, 2, 3, 4, 5, 6, 7, 8, 9]), (2, [1, 3, 5, 7, 9]), (4, [1, 5, 9]), (8, [1, 9])]
)
def test_published_rule_probes_at_the_first_step_and_every_period(period: int, expected: list[int]) -> None:
    assert probed_steps(PublishedRule(period=period), 9) == expected


def test_published_rule_needs_no_start() -> None:
    assert not PublishedRule().needs_start(ControlState(lr=1.0))


# --- what every rule does alike --------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("found", [CONVEX, NOT_FINITE, StartSearch(0.5, (0.5,), (0.1,)), StartSearch(None, (), ())])
def test_non_finite_loss_changes_nothing_but_the_step_counter(loss: float, found: Found) -> None:
    rule = PublishedRule()
    state = settled(rule)
    decision = rule.decide(state, loss, found)
    assert decision.status is ProbeStatus.NON_FINITE_LOSS
    assert decision.state == replace(state, step=state.step + 1)
    assert rule.is_probe_due(decision.state)


def test_skipping_changes_nothing_but_the_step_counter() -> None:
    assert PublishedRule().skip(STARTED_LONG_AGO) == replace(STARTED_LONG_AGO, step=1001)


def test_restarting_averages_sets_the_learning_rate_and_keeps_the_start_and_the_schedule() -> None:
    state = ControlState(**{field.name: 3 for field in fields(ControlState)})
    kept = {name: getattr(state, name) for name in ("step", "probes", "next_probe", "started", "loss_start")}
    assert PublishedRule().restart_averages(state, 0.125) == ControlState(lr=0.125, **kept)


def test_only_a_step_taken_back_is_taken_back_and_only_a_failed_start_stands_still() -> None:
    for status in ProbeStatus:
        decision = Decision(ControlState(lr=0.5), status)
        assert decision.takes_back == (status is ProbeStatus.TAKEN_BACK)
        assert decision.taken_lr == (0.0 if status is ProbeStatus.START_FAILED else 0.5)


def test_the_trend_of_the_loss_is_that_of_weighted_least_squares() -> None:
    source, rule = np.random.default_rng(0), PublishedRule()
    steps = np.cumsum([1] * 30 + [8] * 30)
    losses = 5.0 - 0.01 * steps + source.normal(0.0, 0.3, steps.size)
    state = ControlState(lr=1.0)
    for step, loss in zip(steps, losses, strict=True):
        state = rule.decide(replace(state, step=int(step) - 1), float(loss), CONVEX).state
    # The first ten count alike; from then on each takes a tenth of the weight of all before.
    weights = 0.9 ** (steps.size - np.maximum(np.arange(1, steps.size + 1), 10))
    expected, _ = np.polyfit(steps, losses, 1, w=np.sqrt(weights))
    assert state.step_loss / state.step_square == pytest.approx(expected, rel=1e-9)


def test_lowest_mean_loss_follows_down_at_once_and_up_slowly() -> None:
    rule = PublishedRule(smoothing=0.5)
    state = ControlState(lr=1.0)
    lowest = []
    for loss in [5.0] * 20 + [1.0] * 20 + [3.0] * 400:
        state = rule.decide(state, loss, CONVEX).state
        lowest.append(state.loss_lowest)
    assert lowest[:20] == [5.0] * 20
    assert lowest[39] == pytest.approx(1.0, rel=1e-4)
    assert lowest[45] < 2.0
    assert lowest[-1] == pytest.approx(3.0, rel=1e-2)
    assert state.loss_lowest <= state.loss_mean


@given(seed=st.integers(0, 10**6), factor=st.floats(1e-6, 1e6), shift=st.floats(-100.0, 100.0))
def test_shifting_and_scaling_the_loss_changes_no_decision(seed: int, factor: float, shift: float) -> None:
    def changed(loss: float) -> float:
        return factor * (loss + shift)

    seen = seen_in_training(seed)
    other = [
        (changed(loss), Parabola(changed(it.value), factor * it.slope, factor * it.curvature)) for loss, it in seen
    ]
    expected = decide_all(PublishedRule(), replace(STARTED_LONG_AGO, loss_start=5.0), seen)
    decisions = decide_all(PublishedRule(), replace(STARTED_LONG_AGO, loss_start=changed(5.0)), other)
    assert [decision.status for decision in decisions] == [decision.status for decision in expected]
    assert [decision.state.lr for decision in decisions] == pytest.approx([it.state.lr for it in expected], rel=1e-9)


def test_learning_rate_stays_within_its_limits() -> None:
    rule = PublishedRule(lr_min=0.99, lr_max=1.01)
    assert rule.decide(STARTED_LONG_AGO, 1.0, Parabola(1.0, 100.0, 1.0)).state.lr == 1.01
    assert rule.decide(STARTED_LONG_AGO, 1.0, Parabola(1.0, 0.001, 1.0)).state.lr == 0.99


def test_limits_that_cross_are_refused_with_both_values() -> None:
    with pytest.raises(ValueError, match=r"lr_max must be at least lr_min \(0\.1\), got 0\.05"):
        PublishedRule(lr_min=0.1, lr_max=0.05)
