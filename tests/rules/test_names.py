"""The rules by name, the options that each takes, and those that exist to compare with."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gen_optim.rules import RULES, CDATRule, make_rule
from gen_optim.rules.base import ControlState, ProbeStatus, PublishedRule
from gen_optim.rules.parabola import Parabola
from gen_optim.rules.relaxed import RelaxedRule
from tests.rules.judging import CONCAVE, CONVEX, NOT_FINITE, decide_all, train_on_quadratic

# --- options ---------------------------------------------------------------------------------------------------------

PUBLISHED_MISTAKES = [
    ("period", 0),
    ("period", -1),
    ("period", 1.5),
    ("period", True),
    ("period", "8"),
    ("smoothing", -0.1),
    ("smoothing", 1.0),
    ("smoothing", math.nan),
    ("smoothing", "0.9"),
    ("max_change", 1.0),
    ("max_change", 0.5),
    ("max_change", math.inf),
    ("max_change", math.nan),
    ("max_change", None),
    ("lr_min", -1e-9),
    ("lr_min", math.inf),
    ("lr_min", math.nan),
    ("lr_min", "0"),
    ("lr_max", 0.0),
    ("lr_max", -1.0),
    ("lr_max", math.nan),
    ("lr_max", None),
]
RELAXED_MISTAKES = [
    ("start_fraction", 0.0),
    ("start_fraction", 1.01),
    ("start_fraction", math.nan),
    ("start_fraction", None),
    ("burn_in", -1),
    ("burn_in", 0.5),
    ("burn_in", None),
    ("explosion", 0.0),
    ("explosion", -1.0),
    ("explosion", math.nan),
    ("explosion", None),
    ("relaxation", 0.99),
    ("relaxation", 2.0),
    ("relaxation", math.nan),
    ("relaxation", None),
]


@pytest.mark.parametrize(("option", "value"), PUBLISHED_MISTAKES)
@pytest.mark.parametrize("rule", list(RULES))
def test_mistaken_option_is_named_with_what_came(rule: str, option: str, value: object) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"{option} must be .*got {value!r}"):
        make_rule(rule, **{option: value})


@pytest.mark.parametrize(("option", "value"), RELAXED_MISTAKES)
@pytest.mark.parametrize("rule", list(RULES))
def test_mistaken_option_of_the_relaxed_rule_is_named_whatever_the_rule(rule: str, option: str, value: object) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"{option} must be .*got {value!r}"):
        make_rule(rule, **{option: value})


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, None, True])
def test_mistaken_edge_is_named(value: object) -> None:
    with pytest.raises(ValueError, match=rf"edge must be .*got {value!r}"):
        make_rule("cdat", edge=value)


@pytest.mark.parametrize(
    "options",
    [
        {"period": 1},
        {"smoothing": 0.0},
        {"smoothing": 0},
        {"lr_min": 0.1, "lr_max": 0.1},
        {"burn_in": 0},
        {"start_fraction": 1.0},
        {"explosion": math.inf},
        {"relaxation": 1.0},
    ],
)
def test_options_at_the_edge_of_their_range_are_taken(options: dict[str, float]) -> None:
    taken = asdict(make_rule("relaxed", **options))
    assert options.items() <= taken.items()


def test_unknown_rule_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="rule must be one of 'relaxed', 'published', 'cdat', got 'newton'"):
        make_rule("newton")


def test_rules_take_the_options_that_they_have() -> None:
    options = {"period": 3, "burn_in": 5}
    assert make_rule("published", **options) == PublishedRule(period=3)
    assert make_rule("relaxed", **options) == RelaxedRule(period=3, burn_in=5)
    assert make_rule("cdat", **options, edge=1.5) == CDATRule(period=3, edge=1.5)


# --- replay ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(RULES))
def test_replaying_what_was_seen_gives_the_same_learning_rates(name: str) -> None:
    options = {"period": 3, "burn_in": 5, "smoothing": 0.5}
    seen, learning_rates = train_on_quadratic(make_rule(name, **options))
    assert None in seen

    rule = make_rule(name, **options)
    group = ControlState(lr=1e-3).dump()
    replayed = []
    for each in seen:
        state = ControlState.load(json.loads(json.dumps(group)))
        assert rule.is_probe_due(state) == (each is not None)
        state = rule.skip(state) if each is None else rule.decide(state, *each).state
        group = state.dump()
        replayed.append(state.lr)
    assert replayed == learning_rates


# --- curvature dynamics aware tuning ---------------------------------------------------------------------------------


@pytest.mark.parametrize("edge", [1.0, 2.0])
def test_cdat_is_a_multiple_of_mean_slope_over_mean_curvature(edge: float) -> None:
    rule = CDATRule(edge=edge, smoothing=0.5)
    first, second = Parabola(1.0, 3.0, 2.0), Parabola(1.0, 1.0, 6.0)
    decisions = decide_all(rule, ControlState(lr=1e-3), [(1.0, first), (1.0, second)])
    assert decisions[0].state.lr == pytest.approx(edge * 3.0 / 2.0)  # from the first step on
    assert decisions[1].state.lr == pytest.approx(edge * (3.0 + 1.0) / (2.0 + 6.0))
    assert {decision.status for decision in decisions} == {ProbeStatus.FITTED}


def test_cdat_takes_curvature_by_its_size_and_no_negative_slope() -> None:
    rule = CDATRule(smoothing=0.0)
    assert rule.decide(ControlState(lr=1.0), 1.0, CONCAVE).state.lr == pytest.approx(2.0 * 1.5)
    uphill = rule.decide(ControlState(lr=1.0), 1.0, Parabola(1.0, -3.0, 2.0)).state.lr
    assert 0.0 < uphill < 1e-20  # never 0, which would freeze the group


@pytest.mark.parametrize(
    ("parabola", "status"),
    [(NOT_FINITE, ProbeStatus.NON_FINITE_PROBE), (Parabola(1.0, 3.0, 0.0), ProbeStatus.NO_MINIMUM)],
)
def test_cdat_keeps_the_learning_rate_where_there_is_nothing_to_divide(parabola: Parabola, status: ProbeStatus) -> None:
    decision = CDATRule().decide(ControlState(lr=0.25), 1.0, parabola)
    assert (decision.state.lr, decision.status) == (0.25, status)
    assert CDATRule().decide(decision.state, 1.0, CONVEX).state.lr == pytest.approx(
        3.0 if parabola is NOT_FINITE else 2.0 * 3.0 / 1.0
    )


@given(factor=st.floats(1e-6, 1e6), shift=st.floats(-100.0, 100.0))
def test_cdat_does_not_see_how_the_loss_is_scaled_or_shifted(factor: float, shift: float) -> None:
    learning_rates = []
    for scale, offset in ((1.0, 0.0), (factor, shift)):
        seen = [(scale * (loss + offset), Parabola(0.0, scale * loss, scale * 2.0)) for loss in (3.0, 2.0, 1.0)]
        learning_rates.append([each.state.lr for each in decide_all(CDATRule(), ControlState(lr=1.0), seen)])
    assert learning_rates[1] == pytest.approx(learning_rates[0], rel=1e-9)
