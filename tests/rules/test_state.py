"""States as plain numbers, and decisions."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gen_optim.rules import Decision, ProbeStatus, RuleState
from gen_optim.rules.averages import LossAverages, ParabolaAverages
from gen_optim.rules.relaxed import RelaxedState

counts = st.integers(0, 10**9)
signed, positive = st.floats(-1e6, 1e6), st.floats(0.0, 1e6)
states = st.builds(
    RelaxedState,
    lr=positive,
    step=counts,
    probes=counts,
    next_probe=st.integers(1, 10**9),
    started=st.booleans(),
    loss_initial=signed,
    loss=st.builds(
        LossAverages,
        mean=signed,
        deviation=positive,
        count=counts,
    ),
    parabola=st.builds(
        ParabolaAverages,
        slope=signed,
        curvature=signed,
        change=positive,
        rise=positive,
        first_order=st.floats(-1.0, 1.0),
        first_order_square=st.floats(0.0, 1.0),
        count=counts,
        weight=positive,
        lr=positive,
    ),
    factor=positive,
    lr_unstable=positive,
)


@dataclass(frozen=True)
class Counting(RuleState):
    failures: int = 0
    is_sure: bool = False


@given(states)
def test_state_survives_becoming_plain_numbers(state: RelaxedState) -> None:
    numbers = state.to_numbers()
    assert RelaxedState.from_numbers(numbers) == state
    assert all(type(value) in (int, float, bool) for value in numbers.values())


@given(states)
def test_state_survives_json(state: RelaxedState) -> None:
    assert RelaxedState.from_numbers(json.loads(json.dumps(state.to_numbers()))) == state


def test_numbers_have_the_names_and_the_order_of_the_fields() -> None:
    assert list(RuleState(lr=0.5).to_numbers()) == ["lr", "step", "probes", "next_probe"]
    numbers = Counting(lr=0.5, failures=3, is_sure=True).to_numbers()
    assert list(numbers.items())[-2:] == [("failures", 3), ("is_sure", True)]


def test_numbers_of_averages_are_named_after_both_fields() -> None:
    numbers = RelaxedState(lr=0.5, loss=LossAverages(mean=2.0), parabola=ParabolaAverages(slope=3.0)).to_numbers()
    assert (numbers["loss_mean"], numbers["parabola_slope"]) == (2.0, 3.0)


@pytest.mark.parametrize("state", [RuleState(lr=0.5), Counting(lr=0.5), RelaxedState(lr=0.5)])
def test_names_of_numbers_are_unique(state: RuleState) -> None:
    assert type(state).from_numbers(dict.fromkeys(state.to_numbers(), 1)).to_numbers() == dict.fromkeys(
        state.to_numbers(), 1
    )


def test_missing_numbers_take_their_defaults() -> None:
    assert RelaxedState.from_numbers({"lr": 0.5, "step": 7}) == RelaxedState(lr=0.5, step=7)
    assert RelaxedState.from_numbers({"lr": 0.5, "loss_mean": 2.0}) == RelaxedState(lr=0.5, loss=LossAverages(mean=2.0))


def test_numbers_of_others_are_ignored() -> None:
    assert RuleState.from_numbers({"lr": 0.5, "ratio": 2.0, "loss_mean": 3.0}) == RuleState(lr=0.5)


def test_numbers_without_a_learning_rate_are_refused() -> None:
    with pytest.raises(KeyError, match="lr"):
        RuleState.from_numbers({"step": 7})


@given(states)
def test_a_step_changes_nothing_but_the_step_counter(state: RelaxedState) -> None:
    before = replace(state)
    assert state.after_step() == replace(state, step=state.step + 1)
    assert state == before
    assert type(state.after_step()) is RelaxedState


def test_only_a_reverted_step_is_reverted_and_only_a_failed_search_takes_no_step() -> None:
    for status in ProbeStatus:
        decision = Decision(RuleState(lr=0.5), status)
        assert decision.is_reverted == (status is ProbeStatus.REVERTED)
        assert decision.lr_taken == (0.0 if status is ProbeStatus.START_FAILED else 0.5)
