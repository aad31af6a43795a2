"""Curvature dynamics aware tuning."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.cdat import CDATRule, CDATState
from gen_optim.rules import InitialSearch, Parabola, ProbeStatus
from tests.rules.cases import CONCAVE, CONVEX, NOT_FINITE, decide_all


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, None, True])
def test_mistaken_edge_is_named(value: object) -> None:
    with pytest.raises(ValueError, match=rf"edge must be .*got {value!r}"):
        CDATRule(edge=value)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [-0.1, 1.0, math.nan, "0.9"])
def test_mistaken_smoothing_is_named(value: object) -> None:
    with pytest.raises(ValueError, match=rf"smoothing must be .*got {value!r}"):
        CDATRule(smoothing=value)  # type: ignore[arg-type]


@pytest.mark.parametrize("edge", [1.0, 2.0])
def test_cdat_is_a_multiple_of_mean_slope_over_mean_curvature(edge: float) -> None:
    rule = CDATRule(edge=edge, smoothing=0.5)
    first, second = Parabola(1.0, 3.0, 2.0), Parabola(1.0, 1.0, 6.0)
    decisions = decide_all(rule, CDATState(lr=1e-3), [(1.0, first), (1.0, second)])
    assert decisions[0].state.lr == pytest.approx(edge * 3.0 / 2.0)  # from the first step on
    assert decisions[1].state.lr == pytest.approx(edge * (3.0 + 1.0) / (2.0 + 6.0))
    assert {decision.status for decision in decisions} == {ProbeStatus.FITTED}


def test_cdat_takes_curvature_by_its_size_and_no_negative_slope() -> None:
    rule = CDATRule(smoothing=0.0)
    assert rule.decide(CDATState(lr=1.0), CONCAVE, loss_start=1.0).state.lr == pytest.approx(2.0 * 1.5)
    uphill = rule.decide(CDATState(lr=1.0), Parabola(1.0, -3.0, 2.0), loss_start=1.0).state.lr
    assert 0.0 < uphill < 1e-20  # never 0, which would freeze the group


@pytest.mark.parametrize(
    ("parabola", "status"),
    [(NOT_FINITE, ProbeStatus.NON_FINITE_PROBE), (Parabola(1.0, 3.0, 0.0), ProbeStatus.NO_MINIMUM)],
)
def test_cdat_keeps_the_learning_rate_where_there_is_nothing_to_divide(parabola: Parabola, status: ProbeStatus) -> None:
    decision = CDATRule().decide(CDATState(lr=0.25), parabola, loss_start=1.0)
    assert (decision.state.lr, decision.status) == (0.25, status)
    assert CDATRule().decide(decision.state, CONVEX, loss_start=1.0).state.lr == pytest.approx(
        3.0 if parabola is NOT_FINITE else 2.0 * 3.0 / 1.0
    )


def test_cdat_refuses_the_outcome_of_a_search() -> None:
    with pytest.raises(TypeError, match="found must be a Parabola, got an InitialSearch"):
        CDATRule().decide(CDATState(lr=1.0), InitialSearch(0.5, (0.5,), (0.1,)), loss_start=1.0)


@given(factor=st.floats(1e-6, 1e6), shift=st.floats(-100.0, 100.0))
def test_cdat_does_not_see_how_the_loss_is_scaled_or_shifted(factor: float, shift: float) -> None:
    learning_rates = []
    for scale, offset in ((1.0, 0.0), (factor, shift)):
        seen = [(scale * (loss + offset), Parabola(0.0, scale * loss, scale * 2.0)) for loss in (3.0, 2.0, 1.0)]
        learning_rates.append([each.state.lr for each in decide_all(CDATRule(), CDATState(lr=1.0), seen)])
    assert learning_rates[1] == pytest.approx(learning_rates[0], rel=1e-9)
