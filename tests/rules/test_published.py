"""The published rule."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gen_optim.rules import Parabola, ProbeStatus, PublishedRule, RuleState
from tests.rules.cases import CONVEX, NOT_FINITE, PROBED_LONG, decide_all, probed_steps, seen_in_training


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
    decision = rule.decide(RuleState(lr=1.0), Parabola(1.0, slope, curvature), loss_start=1.0)
    assert decision.state.lr == pytest.approx(expected)
    assert decision.status is ProbeStatus.FITTED


def test_published_rule_is_relative_to_the_present_learning_rate() -> None:
    rule = PublishedRule(smoothing=0.5, max_change=10.0)
    state = RuleState(lr=0.02)
    assert rule.decide(state, Parabola(1.0, 0.04, 1.0), loss_start=1.0).state.lr == pytest.approx(0.03)
    assert rule.decide(state, Parabola(1.0, 40.0, 1.0), loss_start=1.0).state.lr == pytest.approx(0.11)


def test_published_rule_without_smoothing_jumps_to_the_optimum() -> None:
    rule = PublishedRule(smoothing=0.0)
    assert rule.decide(RuleState(lr=1.0), CONVEX, loss_start=1.0).state.lr == pytest.approx(1.5)


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
    decision = PublishedRule().decide(RuleState(lr=1.0), parabola, loss_start=1.0)
    assert decision.state.lr == 1.0
    assert decision.status is status


def test_published_rule_ignores_rounding_noise() -> None:
    noisy = replace(CONVEX, slope_noise=100.0, curvature_noise=100.0)
    assert PublishedRule().decide(RuleState(lr=1.0), noisy, loss_start=1.0).state.lr == pytest.approx(1.05)


def test_published_rule_probes_at_the_first_step_and_without_a_burn_in() -> None:
    assert probed_steps(PublishedRule(period=1), 9) == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert probed_steps(PublishedRule(period=8), 6) == [1]


def test_published_rule_needs_no_search() -> None:
    assert not PublishedRule().needs_search(RuleState(lr=1.0))


def test_published_rule_remembers_the_learning_rate_and_counts_alone() -> None:
    state = decide_all(PublishedRule(period=3), RuleState(lr=1.0), [(1.0, CONVEX)] * 4)[-1].state
    assert type(state) is RuleState
    assert (state.step, state.probes) == (4, 4)


@given(seed=st.integers(0, 10**6), factor=st.floats(1e-6, 1e6), shift=st.floats(-100.0, 100.0))
def test_shifting_and_scaling_the_loss_changes_no_decision(seed: int, factor: float, shift: float) -> None:
    def changed(loss: float) -> float:
        return factor * (loss + shift)

    seen = seen_in_training(seed)
    other = [
        (changed(loss), Parabola(changed(it.value), factor * it.slope, factor * it.curvature)) for loss, it in seen
    ]
    expected, decisions = (decide_all(PublishedRule(), PROBED_LONG, losses) for losses in (seen, other))
    assert [decision.status for decision in decisions] == [decision.status for decision in expected]
    assert [decision.state.lr for decision in decisions] == pytest.approx([it.state.lr for it in expected], rel=1e-9)


def test_learning_rate_stays_within_its_limits() -> None:
    rule = PublishedRule(lr_min=0.99, lr_max=1.01)
    assert rule.decide(PROBED_LONG, Parabola(1.0, 100.0, 1.0), loss_start=1.0).state.lr == 1.01
    assert rule.decide(PROBED_LONG, Parabola(1.0, 0.001, 1.0), loss_start=1.0).state.lr == 0.99
