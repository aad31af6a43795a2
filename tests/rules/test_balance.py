"""The relaxed rule in noise: the excess loss against the gain."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gen_optim.rules import Parabola, ProbeStatus, RelaxedRule, relaxed
from gen_optim.rules.averages import BalanceAverages
from gen_optim.rules.relaxed import RelaxedState
from tests.rules.cases import STARTED_LONG_AGO

BURNT_IN = replace(STARTED_LONG_AGO, step=0, probes=50, next_probe=1)
# Slopes that agree on nothing, of steps that do not raise the loss.
NOISE = (Parabola(1.0, 1.0, 1e-3), Parabola(1.0, -1.0, 1e-3))


def train(
    rule: RelaxedRule,
    state: RelaxedState,
    *,
    steps: int,
    excess: Callable[[RelaxedState], float],
    gain: float = 0.1,
    factor: float = 1.0,
) -> RelaxedState:
    """Training that gains ``gain`` while the number of steps grows e-fold, with slopes that are pure noise."""
    for _ in range(steps):
        if not rule.is_probe_due(state):
            state = rule.skip(state)
            continue
        loss = 10.0 - gain * math.log(state.step + 1)
        found, above = NOISE[state.probes % 2], excess(state)
        state = rule.decide(state, found, loss_start=loss - 1e-3, loss_end=loss, excess_loss=above, factor=factor).state
    return state


# --- where it leads --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lr", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("balance", [0.3, 0.6])
def test_the_excess_loss_settles_at_the_balance_times_the_gain(lr: float, balance: float) -> None:
    """An excess loss of 0.03 · α, and a gain of 0.1: balanced at α = balance · 0.1 / 0.03."""
    state = replace(BURNT_IN, lr=lr)
    after = train(RelaxedRule(balance=balance), state, steps=100_000, excess=lambda state: 0.03 * state.lr)
    assert after.lr == pytest.approx(balance * 0.1 / 0.03, rel=0.15)


@pytest.mark.parametrize(
    ("factor", "allowed"),
    [
        (1.0, 0.3),
        (1.0 - 2.0**-52, 0.3),  # a warm-up may end at this
        (2.0, 0.3),
        (0.99, 0.32),
        (0.8, 0.544),
        (0.5, 0.475),
        (0.1, 0.1),
        (1e-20, 1e-20),
    ],
)
def test_under_a_scheduler_noise_may_cost_more_the_more_has_been_taken_off(factor: float, allowed: float) -> None:
    """The excess loss is proportional to α · factor, so that at α = 1 noise may cost 0.3 times the gain at factor 1."""
    after = train(
        RelaxedRule(),
        replace(BURNT_IN, lr=3.0, factor=factor, factor_last=factor),
        steps=50_000,
        excess=lambda state: 0.03 * state.lr * factor,
        factor=factor,
    )
    assert after.lr == pytest.approx(allowed * 0.1 / 0.03 / factor, rel=0.2)


def change(rule: RelaxedRule, *, excess: float, gain: float = 0.1) -> float:
    """The change of the learning rate from step 100 to step 5100."""
    before = train(rule, BURNT_IN, steps=100, excess=lambda _: excess, gain=gain)
    return train(rule, before, steps=5000, excess=lambda _: excess, gain=gain).lr / before.lr


@pytest.mark.parametrize(("excess", "gain"), [(0.0, 0.1), (-1.0, 0.1), (-1.0, 0.0), (-1.0, -0.1)])
def test_if_the_average_is_no_better_it_grows_like_the_steps(excess: float, gain: float) -> None:
    """Of a gain that noise hides, as on a plateau, too."""
    assert change(RelaxedRule(), excess=excess, gain=gain) == pytest.approx(51, rel=0.1)


@pytest.mark.parametrize(("excess", "free", "near"), [(0.0, 1.05, relaxed._CAREFUL_GROWTH), (10.0, 0.97, 0.97)])
def test_near_where_it_was_unstable_it_grows_carefully(excess: float, free: float, near: float) -> None:
    before = train(RelaxedRule(), BURNT_IN, steps=150, excess=lambda _: excess)
    for lr_unstable, change in ((0.0, free), (10.0 * before.lr, free), (1.5 * before.lr, near)):
        state = replace(before, lr_unstable=lr_unstable)
        probed = train(RelaxedRule(), state, steps=state.next_probe - state.step, excess=lambda _: excess)
        assert probed.probes == state.probes + 1
        assert probed.lr / state.lr == pytest.approx(change, abs=0.01 if change == free else 1e-9)


def test_it_falls_and_probes_at_every_step_while_steps_raise_the_loss() -> None:
    """Fifteen steps of sixteen do, which is more than noise, though the average is no better."""
    rule, state = RelaxedRule(), train(RelaxedRule(), BURNT_IN, steps=1000, excess=lambda _: 0.0)
    decisions, learning_rates = [], [state.lr]
    for step in range(200):
        found, loss = Parabola(1.0, -1.0 if step % 16 else 1.0, 1e-3), 10.0 - 0.1 * math.log(state.step + 1)
        decisions.append(rule.decide(state, found, loss_start=loss - 1e-3, loss_end=loss, excess_loss=0.0))
        state = decisions[-1].state
        learning_rates.append(state.lr)
    assert learning_rates[5] > learning_rates[0]
    for decision, before, after in list(zip(decisions, learning_rates, learning_rates[1:], strict=False))[40:]:
        assert decision.status is ProbeStatus.UNSTABLE
        assert after == pytest.approx(before * (1.0 - relaxed._LATER_CHANGE))
        assert rule.is_probe_due(decision.state)


@pytest.mark.parametrize("gain", [0.0, -0.1])
def test_without_a_gain_it_falls_like_one_over_the_square_root_of_the_steps(gain: float) -> None:
    assert change(RelaxedRule(), excess=0.1, gain=gain) == pytest.approx(51**-0.5, rel=0.1)


@pytest.mark.parametrize("period", [8, 50, 200])
def test_between_two_probe_steps_it_grows_no_faster_than_in_the_burn_in(period: int) -> None:
    rule, state, changes = RelaxedRule(period=period), BURNT_IN, []
    for _ in range(2000):
        before, state = state, train(rule, state, steps=1, excess=lambda _: 0.0)
        changes.append(state.lr / before.lr)
    assert 1.0 < max(changes) <= relaxed._GROWTH * (1.0 + 1e-9)


@pytest.mark.parametrize("burn_in", [0, 1, 2, 3, 7])
def test_however_short_the_burn_in_it_does_not_leap(burn_in: int) -> None:
    rule, state = RelaxedRule(burn_in=burn_in), RelaxedState(lr=1.0, started=True)
    for _ in range(300):
        before, state = state, train(rule, state, steps=1, excess=lambda _: 0.1)
        assert state.lr >= 0.4 * before.lr
    assert state.lr > 0.01


# --- where it does not apply -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("excess", [math.nan, math.inf])
def test_if_the_excess_loss_is_not_known_the_learning_rate_is_annealed(excess: float) -> None:
    assert change(RelaxedRule(annealing=0.25), excess=excess) == pytest.approx(51**-0.25, rel=0.1)


@pytest.mark.parametrize("excess", [100.0, 1e4])
def test_a_step_that_is_reverted_does_not_count(excess: float) -> None:
    rule = RelaxedRule()
    state = train(rule, BURNT_IN, steps=2000, excess=lambda state: 0.03 * state.lr)
    decision = rule.decide(state, NOISE[0], loss_start=9.0, loss_end=1e6, excess_loss=excess)
    assert decision.is_reverted
    assert decision.state.balance == state.balance
    after = train(rule, decision.state, steps=30_000, excess=lambda state: 0.03 * state.lr)
    assert after.lr == pytest.approx(0.3 * 0.1 / 0.03, rel=0.15)


def test_an_excess_loss_that_was_known_once_does_not_count_for_ever() -> None:
    rule = RelaxedRule(annealing=0.0)
    known = train(rule, BURNT_IN, steps=2000, excess=lambda _: 1.0)
    assert train(rule, known, steps=20, excess=lambda _: 1.0).lr < known.lr
    assert train(rule, known, steps=2000, excess=lambda _: math.nan).lr == known.lr


def test_a_manual_value_forgets_what_was_measured_at_another_learning_rate() -> None:
    rule = RelaxedRule()
    state = rule.set_lr(train(rule, BURNT_IN, steps=2000, excess=lambda _: 1.0), 0.5)
    assert state.balance == BalanceAverages()


def test_a_manual_value_late_in_a_run_that_goes_on_as_before_stays_balanced() -> None:
    rule = RelaxedRule()
    state = train(rule, BURNT_IN, steps=10_000, excess=lambda state: 0.03 * state.lr)
    state = rule.set_lr(state, 1.0)
    for _ in range(10):
        state = train(rule, state, steps=1000, excess=lambda state: 0.03 * state.lr)
        assert state.lr == pytest.approx(1.0, rel=0.2)


def test_the_burn_in_is_not_corrected() -> None:
    rule = RelaxedRule()
    states = [replace(BURNT_IN, step=30, probes=30, next_probe=31)] * 2
    for index, excess in enumerate((0.0, 100.0)):
        states[index] = train(rule, states[index], steps=19, excess=lambda _, excess=excess: excess)  # type: ignore[misc]
    assert states[0].lr == states[1].lr
    assert states[0].balance.excess != states[1].balance.excess


# --- the averages ----------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.floats(-10.0, 10.0), st.integers(1, 20)), min_size=1, max_size=30), st.integers(0, 50))
def test_the_averages_weigh_values_by_powers_of_their_steps(seen: list[tuple[float, int]], began: int) -> None:
    averages, step, values, steps = BalanceAverages(began), 0, [], [0]
    for value, distance in seen:
        step += distance
        averages = averages.with_losses(value, -value, began + step)
        values.append(value)
        steps.append(step)
    for mean, exponent in ((averages.earlier, 2.0), (averages.recent, 8.0), (-averages.excess, 8.0)):
        weights = [(end / step) ** exponent - (begin / step) ** exponent for begin, end in zip(steps, steps[1:])]  # noqa: B905, RUF007
        expected = sum(weight * value for weight, value in zip(weights, values, strict=True))
        assert mean == pytest.approx(expected, abs=1e-9)
    assert (averages.count, averages.step, averages.excess_step) == (step, began + step, began + step)


@pytest.mark.parametrize("began", [0, 1000])
def test_the_gain_is_that_of_a_loss_that_falls_like_the_logarithm(began: int) -> None:
    averages = BalanceAverages(began)
    for step in range(began + 1, began + 20_001):
        averages = averages.with_losses(-0.2 * math.log(step), 0.05, step)
    assert averages.gain == pytest.approx(0.2, rel=0.05)
    assert averages.ratio == pytest.approx(0.25, rel=0.05)


def test_nothing_is_known_before_the_first_losses() -> None:
    assert math.isnan(BalanceAverages().gain)
    assert math.isnan(BalanceAverages().ratio)


def test_the_ratio_is_not_known_without_the_excess_loss_at_the_last_step() -> None:
    known = BalanceAverages().with_losses(2.0, 0.1, 1).with_losses(1.0, 0.1, 2)
    assert known.ratio > 0.0
    for unknown in (None, math.nan, math.inf):
        assert math.isnan(known.with_losses(0.5, unknown, 3).ratio)
    assert known.with_losses(9.0, 0.1, 3).ratio == math.inf
