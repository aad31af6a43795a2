"""The relaxed rule as a whole: start, burn-in, hold, schedulers, reverted steps, explosions, long runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gen_optim.rules import Decision, InitialSearch, Parabola, ProbeStatus, RelaxedRule, relaxed, safeguards
from gen_optim.rules.relaxed import RelaxedState
from tests.rules.cases import (
    CONCAVE,
    CONVEX,
    NOT_FINITE,
    STARTED_LONG_AGO,
    Found,
    changed,
    decide_all,
    noisy_losses,
    probed_steps,
    seen_in_training,
    settled,
    train_on_quadratic,
)

ASCENDING = Parabola(value=1.0, slope=-3.0, curvature=2.0)

# --- start and burn-in -----------------------------------------------------------------------------------------------


def test_start_begins_at_a_fraction_of_what_was_found() -> None:
    rule = RelaxedRule(start_fraction=0.03)
    fresh = RelaxedState(lr=1e-3)
    assert rule.needs_search(fresh)
    decision = rule.decide(fresh, InitialSearch(0.5, (0.5,), (1.0,)), loss_start=2.5)
    assert decision.status is ProbeStatus.STARTED
    assert decision.state.lr == pytest.approx(0.015)
    assert decision.state.started
    assert decision.state.loss_initial == 2.5
    assert not rule.needs_search(decision.state)


def test_failed_start_keeps_the_learning_rate_and_is_tried_again_at_the_next_step() -> None:
    rule = RelaxedRule()
    decision = rule.decide(RelaxedState(lr=1e-3), InitialSearch(None, (1.0,), (3.0,)), loss_start=2.5)
    assert decision.status is ProbeStatus.START_FAILED
    assert decision.state.lr == 1e-3
    assert rule.needs_search(decision.state)
    assert rule.is_probe_due(decision.state)


@pytest.mark.parametrize("burn_in", [0, 1, 3])
def test_failed_start_is_tried_at_every_step_however_short_the_burn_in(burn_in: int) -> None:
    rule = RelaxedRule(burn_in=burn_in, period=8)
    state = RelaxedState(lr=1e-3)
    for _ in range(10):
        assert rule.is_probe_due(state)
        state = rule.decide(state, InitialSearch(None, (), ()), loss_start=2.5).state


@pytest.mark.parametrize("burn_in", [0, 1, 3, 50])
def test_burn_in_probes_at_every_step_and_then_once_in_a_period_on_average(burn_in: int) -> None:
    rule = RelaxedRule(burn_in=burn_in, period=8)
    probed = probed_steps(rule, 60)
    first = max(burn_in, 1)
    assert probed[:first] == list(range(1, first + 1))
    assert set(np.diff(probed[first - 1 :]).tolist()) <= {6, 7, 8, 9, 10}


# --- one parabola ----------------------------------------------------------------------------------------------------


BURNING_IN = replace(STARTED_LONG_AGO, probes=1)


@pytest.mark.parametrize(
    ("parabola", "status", "lr"),
    [
        (Parabola(1.0, 30.0, 2.0), ProbeStatus.FITTED, relaxed._GROWTH),
        (Parabola(1.0, 1.01, 2.0), ProbeStatus.FITTED, 1.01),  # one slope has no signal: κ = 2
        (Parabola(1.0, 0.9, 2.0), ProbeStatus.FITTED, 0.9),
        (Parabola(1.0, 0.3, 2.0), ProbeStatus.FITTED, relaxed._FALL),
        (CONCAVE, ProbeStatus.CONCAVE, relaxed._GROWTH),
        (Parabola(1.0, 3.0, 0.0), ProbeStatus.CONCAVE, relaxed._GROWTH),
        (ASCENDING, ProbeStatus.NO_MINIMUM, relaxed._FALL),
        (Parabola(1.0, -3.0, -2.0), ProbeStatus.NO_MINIMUM, relaxed._FALL),
        (Parabola(1.0, 0.0, -2.0), ProbeStatus.NO_MINIMUM, relaxed._FALL),
    ],
)
def test_in_the_burn_in_the_learning_rate_moves_towards_the_target_by_a_bounded_factor(
    parabola: Parabola, status: ProbeStatus, lr: float
) -> None:
    decision = RelaxedRule().decide(BURNING_IN, parabola, loss_start=1.0)
    assert decision.status is status
    assert decision.state.lr == pytest.approx(lr)


@pytest.mark.parametrize("parabola", [Parabola(1.0, 30.0, 2.0), Parabola(1.0, 0.3, 2.0), CONCAVE, ASCENDING])
@pytest.mark.parametrize("factor", [0.9, 0.5])
def test_after_the_burn_in_a_single_parabola_moves_nothing_under_a_scheduler(parabola: Parabola, factor: float) -> None:
    assert RelaxedRule().decide(STARTED_LONG_AGO, parabola, loss_start=1.0, factor=factor).state.lr == 1.0


def test_in_the_burn_in_the_learning_rate_grows_to_half_of_that_at_which_training_was_unstable() -> None:
    steep = Parabola(1.0, 30.0, 2.0)
    grown = [
        RelaxedRule().decide(replace(BURNING_IN, lr_unstable=each), steep, loss_start=1.0).state.lr
        for each in (3.0, 2.1, 2.0, 1.5)
    ]
    assert grown == pytest.approx([relaxed._GROWTH, 1.05, 1.0, 1.0])


def test_what_was_measured_at_a_far_smaller_learning_rate_is_soon_forgotten() -> None:
    """Curvatures of early training differ by decades from later ones; at their face value they would count for long."""
    rule, state = RelaxedRule(), replace(BURNING_IN, lr=1e-3)
    for curvature in [-1.0] * 25 + [1.0] * 12:  # in units of the step
        state = rule.decide(state, Parabola(1.0, 0.6 / state.lr, curvature / state.lr**2), loss_start=1.0).state
    assert 0.3 < state.parabola.slope / state.parabola.curvature / state.lr < 1.1
    grown = rule.decide(replace(state, lr=10.0 * state.lr), CONVEX, loss_start=1.0).state
    shrunk = rule.decide(replace(state, lr=0.1 * state.lr), CONVEX, loss_start=1.0).state
    assert grown.parabola.weight < 1.2
    assert shrunk.parabola.weight == pytest.approx(1.0 + rule.smoothing * state.parabola.weight)


def test_a_single_parabola_counts_little_more_than_usual_ones_however_much_the_loss_has_changed() -> None:
    rule = RelaxedRule()
    state = decide_all(rule, STARTED_LONG_AGO, [(1.0, Parabola(1.0, 1.0, 3.0))] * 30)[-1].state
    usual = state.parabola.slope / state.parabola.curvature
    after = rule.decide(replace(state, lr=1.0), Parabola(1.0, 0.0, -1e6), loss_start=1.0).state
    assert usual < after.parabola.slope / after.parabola.curvature < 2.0 * usual


def test_growth_on_concave_descent_never_stalls_and_ends_at_lr_max() -> None:
    rule = RelaxedRule(lr_max=0.25)
    seen: list[tuple[float, Found]] = [(1.0, CONCAVE)] * 1000
    learning_rates = [each.state.lr for each in decide_all(rule, replace(STARTED_LONG_AGO, lr=1e-6), seen)]
    slowest = relaxed._CAREFUL_GROWTH  # without noise, at every step
    assert len([each for each in learning_rates if each < 0.25]) <= 20 + math.log(0.25e6) / math.log(slowest)
    assert learning_rates[-1] == 0.25


@pytest.mark.parametrize("slope", [-0.9, 0.0, 0.9])
@pytest.mark.parametrize("curvature", [-0.9, 0.0, 0.9])
def test_slope_and_curvature_that_rounding_explains_teach_nothing(slope: float, curvature: float) -> None:
    parabola = Parabola(1.0, slope, curvature, slope_noise=1.0, curvature_noise=1.0)
    decision = RelaxedRule().decide(STARTED_LONG_AGO, parabola, loss_start=1.0)
    assert decision.status is ProbeStatus.BELOW_NOISE
    assert decision.state.lr == 1.0
    assert decision.state.parabola.count == 0


@pytest.mark.parametrize(("probes", "change"), [(10, {-1: 1.0, 0: 1.0, 1: 1.1}), (100, {-1: 0.95, 0: 1.0, 1: 1.05})])
@pytest.mark.parametrize(("factor", "curvature", "sign"), [(1.0, 0.4, 1), (1.0, 0.6, -1), (0.5, 0.6, 1), (1.0, 0.5, 0)])
def test_below_rounding_the_slope_at_the_end_tells_whether_the_step_was_too_long(
    probes: int, change: dict[int, float], factor: float, curvature: float, sign: int
) -> None:
    parabola = Parabola(1.0, 0.5, curvature, slope_noise=1.0, curvature_noise=1.0)
    state = replace(STARTED_LONG_AGO, lr=1.0, probes=probes, factor_last=factor)
    decision = RelaxedRule().decide(state, parabola, loss_start=1.0, loss_end=1.0, factor=factor)
    assert decision.status is ProbeStatus.BELOW_NOISE
    assert decision.state.lr == pytest.approx(change[sign])
    assert decision.state.parabola.count == 0


def test_non_finite_probe_cuts_the_learning_rate_and_probes_again_at_the_next_step() -> None:
    rule = RelaxedRule(max_change=4.0)
    for parabola in (NOT_FINITE, Parabola(1.0, math.inf, 2.0)):
        decision = rule.decide(STARTED_LONG_AGO, parabola, loss_start=1.0)
        assert decision.status is ProbeStatus.NON_FINITE_PROBE
        assert decision.state.lr == 0.25
        assert rule.is_probe_due(decision.state)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("found", [CONVEX, NOT_FINITE, InitialSearch(0.5, (0.5,), (0.1,)), InitialSearch(None, (), ())])
@pytest.mark.parametrize("loss_end", [None, 1.0, math.nan])
def test_non_finite_loss_changes_nothing_but_the_step_counter(
    loss: float, found: Found, loss_end: float | None
) -> None:
    rule = RelaxedRule()
    state = settled(rule)
    decision = rule.decide(state, found, loss_start=loss, loss_end=loss_end)
    assert decision.status is ProbeStatus.NON_FINITE_LOSS
    assert decision.state == replace(state, step=state.step + 1)
    assert rule.is_probe_due(decision.state)


def test_a_manual_value_needs_no_new_search() -> None:
    rule = RelaxedRule()
    trained = decide_all(rule, settled(rule), [(1.0, CONVEX)] * 5)[-1].state
    assert not rule.needs_search(rule.set_lr(trained, 0.125))
    decision = rule.decide(rule.set_lr(trained, 0.125), Parabola(1.0, 0.01, 1.0), loss_start=1.0)
    assert decision.state.parabola.slope == pytest.approx(decision.state.parabola.curvature * 0.01)


def test_cut_or_grown_for_ever_the_learning_rate_stays_a_number_that_moves() -> None:
    rule = RelaxedRule()
    down, up = STARTED_LONG_AGO, STARTED_LONG_AGO
    for _ in range(5000):
        down = rule.decide(down, NOT_FINITE, loss_start=1.0).state
        up = rule.decide(up, CONCAVE, loss_start=1.0).state
    assert (down.lr, up.lr) == (1e-36, 1e36)


def test_learning_rate_stays_within_its_limits() -> None:
    rule = RelaxedRule(lr_min=0.99, lr_max=1.01, start_fraction=1.0)
    assert rule.decide(BURNING_IN, Parabola(1.0, 100.0, 1.0), loss_start=1.0).state.lr == 1.01
    assert rule.decide(BURNING_IN, Parabola(1.0, 0.001, 1.0), loss_start=1.0).state.lr == 0.99
    assert rule.decide(STARTED_LONG_AGO, NOT_FINITE, loss_start=1.0).state.lr == 0.99
    assert rule.decide(settled(rule), CONVEX, loss_start=100.0).state.lr == 0.99
    assert rule.decide(RelaxedState(lr=1.0), InitialSearch(1e6, (), ()), loss_start=1.0).state.lr == 1.01
    assert rule.decide(RelaxedState(lr=1.0), InitialSearch(1e-6, (), ()), loss_start=1.0).state.lr == 0.99


def signal_fraction(rule: RelaxedRule, state: RelaxedState) -> float:
    return state.parabola.signal_fraction(rule.smoothing)


# --- where it leads --------------------------------------------------------------------------------------------------


def without_noise(rule: RelaxedRule, lr: float, factor: float = 1.0, probes: int = 1000) -> float:
    """The learning rate of a step, its factor included, after the same parabola at every probe step."""
    state = replace(STARTED_LONG_AGO, lr=lr / factor)
    for _ in range(probes):
        state = rule.decide(state, Parabola(1.0, 1.0, 3.0), loss_start=1.0, factor=factor).state
    assert signal_fraction(rule, state) > 0.999
    return state.lr * factor


@pytest.mark.parametrize("lr", [1e-4, 1e-2, 0.2])
@pytest.mark.parametrize("factor", [0.9, 0.5, 1e-3])
def test_without_noise_the_step_grows_to_the_minimum_of_the_parabola(lr: float, factor: float) -> None:
    assert 1.0 / 3.0 <= without_noise(RelaxedRule(), lr, factor) * (1.0 + 1e-4) < 1.1 / 3.0


@pytest.mark.parametrize("lr", [0.9, 30.0])
@pytest.mark.parametrize("relaxation", [1.2, 1.5, 1.8])
def test_without_noise_it_falls_to_kappa_times_the_minimum(lr: float, relaxation: float) -> None:
    assert without_noise(RelaxedRule(relaxation=relaxation), lr, 0.5) == pytest.approx(relaxation / 3.0, rel=1e-3)


def test_without_a_scheduler_what_slopes_call_for_is_annealed() -> None:
    rule = RelaxedRule(burn_in=50, annealing=0.25)
    annealed = (50 / (STARTED_LONG_AGO.step + 1000)) ** 0.25 / 3.0
    for lr in (1e-4, 0.01):
        assert without_noise(rule, lr) == pytest.approx(annealed, rel=0.1)
    assert without_noise(RelaxedRule(annealing=0.0), 0.01) == pytest.approx(1.0 / 3.0, rel=0.1)


def test_from_its_start_it_finds_the_range_of_a_quadratic() -> None:
    for lr in (1e-8, 10.0):
        _, learning_rates = train_on_quadratic(RelaxedRule(period=1), steps=200, lr=lr)
        assert 0.7 / 3.0 < learning_rates[-1] < 1.8 / 3.0  # 200 steps anneal by 0.7


def stationary(
    state: RelaxedState, source: np.random.Generator, *, factor: float, noise: float, mean: float = 0.0
) -> tuple[float, Found]:
    """A loss, and a parabola of curvature 1, of a run that makes no progress: its steps keep the mean loss.

    ``mean`` is by how much slopes are larger than that, on average.
    """
    loss, slope = source.normal(1.0, 0.1), source.normal(state.lr * factor / 2.0 + mean, noise)
    return float(loss), Parabola(float(loss), float(slope), 1.0)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("noise", "mean", "count"), [(2.0, -0.1, 2500), (2.0, 0.0, 2500), (2.0, 0.1, 2500), (0.5, 0.0, 1000)]
)
def test_in_noise_the_learning_rate_is_held_under_a_scheduler(noise: float, mean: float, count: int, seed: int) -> None:
    rule, state, source = RelaxedRule(), replace(STARTED_LONG_AGO, probes=50), np.random.default_rng(seed)
    for _ in range(count):
        loss, found = stationary(state, source, factor=0.5, noise=noise, mean=mean)
        state = rule.decide(state, found, loss_start=loss, factor=0.5).state
    assert 0.5 < state.lr < 1.5


@pytest.mark.parametrize("seed", range(5))
def test_in_noise_without_a_scheduler_the_learning_rate_falls_like_a_power_of_the_steps(seed: int) -> None:
    rule, state = RelaxedRule(annealing=0.25), replace(STARTED_LONG_AGO, step=50, probes=50, next_probe=51)
    source = np.random.default_rng(seed)
    for _ in range(8000):
        if rule.is_probe_due(state):
            loss, found = stationary(state, source, factor=1.0, noise=1.0)
            state = rule.decide(state, found, loss_start=loss).state
        else:
            state = rule.skip(state)
    assert state.lr == pytest.approx((50 / 8050) ** 0.25, rel=0.5)


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_steps_that_raise_the_loss_on_average_lower_the_learning_rate_under_a_scheduler_too(factor: float) -> None:
    rule, state, source = RelaxedRule(), replace(STARTED_LONG_AGO, probes=50), np.random.default_rng(0)
    for _ in range(100):
        slope = float(source.normal(-2.0, 2.0))
        state = rule.decide(state, Parabola(1.0, slope, 1.0), loss_start=1.0, factor=factor).state
    assert state.lr < 0.2
    assert state.lr_unstable > 0.0


def test_kappa_in_the_burn_in_is_two_in_noise_and_one_without() -> None:
    rule = RelaxedRule()
    for signal, kappa in ((1.0, 1.0), (0.5, 1.5), (0.0, 2.0)):
        state = replace(agreeing(1.0, signal), probes=1)
        lr, _ = rule._next_lr(state, CONVEX, 1.0)
        assert lr == pytest.approx(1.0, rel=0.05)
        assert state.parabola.slope == pytest.approx(1.0 / kappa)


def test_signal_fraction_is_the_share_of_what_slopes_have_in_common() -> None:
    rule = RelaxedRule(smoothing=0.98)
    means = []
    for mean in (0.0, 0.5, 1.0, 4.0):
        slopes = np.random.default_rng(0).normal(mean, 0.2, 1500).tolist()
        found = decide_all(rule, STARTED_LONG_AGO, [(1.0, Parabola(1.0, slope, 1.0)) for slope in slopes])
        fractions = [signal_fraction(rule, each.state) for each in found[500:]]
        assert all(0.0 <= each <= 1.0 for each in fractions)
        means.append(sum(fractions) / len(fractions))
    assert means == sorted(means)
    assert means[0] < 0.05
    assert means[-1] > 0.9
    assert signal_fraction(rule, RelaxedState(lr=1.0)) == 0.0
    assert signal_fraction(RelaxedRule(smoothing=0.0), found[-1].state) == 0.0  # one slope agrees with nothing


finite = st.floats(-1e12, 1e12)
parabolas = st.builds(Parabola, value=finite, slope=finite, curvature=finite)
everything = st.tuples(
    st.one_of(finite, st.sampled_from([math.nan, math.inf])),
    st.one_of(parabolas, st.just(NOT_FINITE)),
    st.one_of(st.none(), finite, st.sampled_from([math.nan, math.inf])),
    st.sampled_from([1.0, 0.5, 1e-3, 0.0, 2.0]),
)


@given(st.lists(everything, max_size=60), st.floats(1e-12, 1e6), st.sampled_from([0.0, 0.5, 0.9, 0.99]))
def test_whatever_it_sees_the_state_stays_plain_finite_numbers_and_the_learning_rate_positive(
    seen: Sequence[tuple[float, Parabola, float | None, float]], lr: float, smoothing: float
) -> None:
    rule, state = RelaxedRule(smoothing=smoothing), RelaxedState(lr=lr, started=True)
    for loss, parabola, loss_end, factor in seen:
        before = state
        state = rule.decide(state, parabola, loss_start=loss, factor=factor, loss_end=loss_end).state
        assert state.step == before.step + 1
        # Besides its own bounds it grows by what the scheduler has taken off since the last parabola.
        taken_off = max(1.0, before.factor / factor) if factor else 1.0
        assert state.lr <= before.lr * rule.max_change * taken_off
        assert state.lr >= before.lr / rule.max_change
        assert state.lr > 0.0
        for value in state.to_numbers().values():
            assert type(value) in (int, float, bool)
            assert math.isfinite(value)


def noisy_run(
    rule: RelaxedRule,
    state: RelaxedState,
    *,
    start: npt.NDArray[np.float64],
    curvatures: npt.NDArray[np.float64],
    noise: float,
    momentum: float = 0.0,
    steps: int,
    seed: int,
) -> tuple[list[float], list[float]]:
    """Learning rates and losses of SGD on a quadratic with noisy minima, looked back at on new batches."""
    source, x, velocity = np.random.default_rng(seed), start, np.zeros_like(start)
    learning_rates, losses = [], []
    before, taken = None, 0.0

    def loss(distance: npt.NDArray[np.float64]) -> float:
        return float(curvatures @ np.square(distance)) / 2.0

    for _ in range(steps):
        minimum = noise * source.normal(size=x.size)
        gradient = curvatures * (x - minimum)
        if before is not None and rule.is_probe_due(state):
            direction = (before - x) / taken
            slope = float(direction @ (curvatures * (before - minimum)))
            parabola = Parabola(loss(before - minimum), slope, 2.0 * loss(direction))
            decision = rule.decide(state, parabola, loss_start=parabola.value, loss_end=loss(x - minimum))
            state = decision.state
            if decision.is_reverted:
                x, before = before, None
                continue
        else:
            state = rule.skip(state)
        velocity = momentum * velocity + gradient
        before, taken = x, state.lr
        x = x - state.lr * velocity
        learning_rates.append(state.lr)
        losses.append(loss(x))
    return learning_rates, losses


@given(lr=st.floats(1e-2, 1.5), noise=st.floats(0.0, 10.0), seed=st.integers(0, 1000))
def test_noisy_quadratics_are_trained_from_any_learning_rate(lr: float, noise: float, seed: int) -> None:
    state = RelaxedState(lr=lr, started=True, loss_initial=1000.0)
    learning_rates, losses = noisy_run(
        RelaxedRule(), state, start=np.full(20, 10.0), curvatures=np.ones(20), noise=noise, steps=300, seed=seed
    )
    assert all(0.0 < each < 10.0 for each in learning_rates)
    assert losses[-1] <= max(1.0, 50.0 * noise**2)


# --- the loss as others write it --------------------------------------------------------------------------------------


def changed_decisions(seed: int, factor: float, shift: float) -> list[Decision]:
    seen = [
        (factor * (loss + shift), Parabola(factor * (it.value + shift), factor * it.slope, factor * it.curvature))
        for loss, it in seen_in_training(seed)
    ]
    return decide_all(RelaxedRule(), replace(STARTED_LONG_AGO, loss_initial=factor * (5.0 + shift)), seen)


@given(seed=st.integers(0, 10**6), factor=st.floats(1e-6, 1e6), shift=st.floats(-100.0, 100.0))
def test_shifting_and_scaling_the_loss_changes_no_decision(seed: int, factor: float, shift: float) -> None:
    expected, decisions = changed_decisions(seed, 1.0, 0.0), changed_decisions(seed, factor, shift)
    assert [decision.status for decision in decisions] == [decision.status for decision in expected]
    assert [decision.state.lr for decision in decisions] == pytest.approx([it.state.lr for it in expected], rel=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_the_losses_of_these_trainings_do_explode(seed: int) -> None:
    assert ProbeStatus.EXPLODED in {decision.status for decision in changed_decisions(seed, 1.0, 0.0)}


@given(seed=st.integers(0, 10**6), unit=st.floats(1e-6, 1e6))
def test_another_unit_of_learning_rate_gives_the_same_learning_rates_in_it(seed: int, unit: float) -> None:
    seen = seen_in_training(seed)
    other = [(loss, Parabola(it.value, it.slope / unit, it.curvature / unit**2)) for loss, it in seen]
    expected = decide_all(RelaxedRule(), STARTED_LONG_AGO, seen)
    decisions = decide_all(RelaxedRule(), replace(STARTED_LONG_AGO, lr=unit), other)
    assert [it.state.lr for it in decisions] == pytest.approx([unit * it.state.lr for it in expected], rel=1e-6)


# --- under a scheduler -----------------------------------------------------------------------------------------------


def agreeing(target: float, signal: float = 1.0, **changes: float) -> RelaxedState:
    """A state at α = 1 whose averages call for ``target``, about as sure as the ``signal`` fraction says."""
    state = changed(
        STARTED_LONG_AGO,
        parabola_slope=target / (2.0 - signal),
        parabola_curvature=1.0,
        parabola_change=1.0,
        parabola_first_order=math.sqrt(signal),
        parabola_first_order_square=1.0,
        parabola_count=1000,
        parabola_weight=10.0,
        parabola_lr=1.0,
    )
    return changed(state, **changes)


@pytest.mark.parametrize("factor", [0.5, 0.1])
def test_what_a_scheduler_takes_off_is_made_up_for_at_once_without_noise_but_not_in_noise(factor: float) -> None:
    rule = RelaxedRule()
    decision = rule.decide(agreeing(2.1), Parabola(1.0, 2.1, 1.0), loss_start=1.0, factor=factor)
    assert 1.0 < decision.state.lr * factor < 1.1
    assert decision.state.factor == factor
    assert rule._next_lr(agreeing(1e3, signal=0.4), CONVEX, factor)[0] == 1.0


def test_a_factor_of_zero_asks_for_nothing() -> None:
    rule = RelaxedRule()
    state = decide_all(rule, STARTED_LONG_AGO, [(1.0, CONVEX)] * 20)[-1].state
    assert signal_fraction(rule, state) > 0.5
    decision = rule.decide(state, CONVEX, loss_start=1.0, factor=0.0)
    assert decision.state.lr == state.lr
    assert decision.state.parabola.slope == state.parabola.slope


# --- reverted steps --------------------------------------------------------------------------------------------------


def calm(rule: RelaxedRule, count: int = 20) -> RelaxedState:
    """A state after steps each of which lowered the loss by 0.1 from about 1."""
    state = replace(STARTED_LONG_AGO, loss_initial=1.0)
    for loss in islice(noisy_losses(1.0, 0.01), count):
        state = rule.decide(state, CONVEX, loss_start=loss, loss_end=loss - 0.1).state
    return state


@pytest.mark.parametrize("loss_end", [1e6, math.inf, math.nan])
@pytest.mark.parametrize("parabola", [CONVEX, NOT_FINITE])
def test_a_step_that_led_far_up_is_reverted_and_the_learning_rate_cut(loss_end: float, parabola: Parabola) -> None:
    rule = RelaxedRule(max_change=4.0)
    state = calm(rule)
    decision = rule.decide(state, parabola, loss_start=1.0, loss_end=loss_end)
    assert decision.status is ProbeStatus.REVERTED
    assert decision.is_reverted
    assert decision.state.lr == state.lr / 4.0
    assert decision.state.lr_unstable == state.lr
    assert rule.is_probe_due(decision.state)


def test_how_far_up_is_relative_to_what_steps_usually_change() -> None:
    rule = RelaxedRule()
    state = calm(rule)
    usual = safeguards._UNUSUAL * state.parabola.rise
    assert state.parabola.rise == pytest.approx(0.1)
    assert not rule.decide(state, CONVEX, loss_start=1.0, loss_end=1.0 + 0.9 * usual).is_reverted
    assert rule.decide(state, CONVEX, loss_start=1.0, loss_end=1.0 + 1.1 * usual).is_reverted
    assert not rule.decide(replace(state, loss_initial=50.0), CONVEX, loss_start=1.0, loss_end=49.0).is_reverted
    young = calm(rule, count=0)
    assert not rule.decide(young, CONVEX, loss_start=1.0, loss_end=100.0).is_reverted
    assert rule.decide(young, CONVEX, loss_start=1.0, loss_end=math.nan).is_reverted


def test_only_steps_that_have_been_taken_are_reverted() -> None:
    rule = RelaxedRule()
    assert rule.decide(calm(rule), NOT_FINITE, loss_start=1.0).status is ProbeStatus.NON_FINITE_PROBE


def test_a_rise_that_rounding_explains_is_not_reverted() -> None:
    rule = RelaxedRule()
    state = replace(STARTED_LONG_AGO, loss_initial=0.0)
    for _ in range(20):
        state = rule.decide(state, CONVEX, loss_start=1.0, loss_end=1.0).state
    assert state.parabola.rise == 0.0
    assert not rule.decide(state, CONVEX, loss_start=1.0, loss_end=1.0 + 2.0**-22).is_reverted
    assert rule.decide(state, CONVEX, loss_start=1.0, loss_end=1.0 + 2.0**-18).is_reverted


@pytest.mark.parametrize("status", [ProbeStatus.REVERTED, ProbeStatus.EXPLODED, ProbeStatus.NON_FINITE_PROBE])
def test_after_a_cut_the_averages_do_not_call_for_the_old_learning_rate(status: ProbeStatus) -> None:
    rule = RelaxedRule()
    state = changed(calm(rule), lr=1.0, parabola_slope=10.0, parabola_curvature=1.0, loss_initial=0.0)
    found = NOT_FINITE if status is ProbeStatus.NON_FINITE_PROBE else CONVEX
    loss = 1e6 if status is ProbeStatus.EXPLODED else 1.0
    decision = rule.decide(state, found, loss_start=loss, loss_end=1e9 if status is ProbeStatus.REVERTED else loss)
    assert decision.status is status
    after = decision.state
    assert after.lr == 0.5
    assert rule.relaxation * after.parabola.slope / after.parabola.curvature <= after.lr * (1 + 1e-12)


LONG = Parabola(value=1.0, slope=1.0, curvature=2.0)  # lowest at a half of α


@pytest.mark.parametrize(
    ("state", "burn_in"),
    [
        (agreeing(0.98), 50),  # not so far
        (agreeing(100.0, signal=0.8), 50),
        (agreeing(100.0, lr_unstable=1.9), 50),
        (agreeing(100.0), 1000),  # probed at every step already, and grows faster
    ],
)
def test_what_is_far_out_without_noise_is_approached_with_a_probe_at_every_step(
    state: RelaxedState, burn_in: int
) -> None:
    rule = RelaxedRule(burn_in=burn_in)
    lr, status = RelaxedRule()._next_lr(agreeing(2.1, factor=0.99), CONVEX, 0.99)
    assert (lr, status) == (relaxed._CAREFUL_GROWTH, ProbeStatus.GROWING)
    assert ProbeStatus.GROWING in relaxed._URGENT
    assert rule._next_lr(state, CONVEX, 0.99)[1] is ProbeStatus.FITTED


def test_a_parabola_that_contradicts_the_averages_lowers_the_learning_rate_and_asks_for_another() -> None:
    rule = RelaxedRule()
    decision = rule.decide(agreeing(100.0), LONG, loss_start=1.0)
    assert decision.status is ProbeStatus.UNSTABLE
    assert decision.state.lr == pytest.approx(0.9)  # κ times the lowest point of its own parabola
    assert decision.state.lr_unstable == 1.0
    assert rule.is_probe_due(decision.state)


@pytest.mark.parametrize(("signal", "fall"), [(0.8, 0.95), (0.95, 0.8)])
def test_the_less_a_single_parabola_tells_the_less_its_contradiction_lowers(signal: float, fall: float) -> None:
    lr, status = RelaxedRule()._next_lr(agreeing(100.0, signal=signal), Parabola(1.0, 0.1, 2.0), 1.0)
    assert status is ProbeStatus.UNSTABLE
    assert lr == fall


@pytest.mark.parametrize(
    ("state", "parabola"),
    [
        (agreeing(100.0, signal=0.4), LONG),  # one parabola tells nothing in noise
        (agreeing(0.95), LONG),  # the averages do not call for more
        (agreeing(100.0), Parabola(1.0, slope=1.2, curvature=2.0)),  # κ times its lowest point lies ahead
        (agreeing(100.0), Parabola(1.0, slope=-1.0, curvature=2.0)),  # momentum carries uphill
        (agreeing(100.0, probes=0), LONG),  # in the burn-in
    ],
)
def test_other_parabolas_do_not_contradict_the_averages(state: RelaxedState, parabola: Parabola) -> None:
    lr, status = RelaxedRule()._next_lr(state, parabola, 1.0)
    assert status is not ProbeStatus.UNSTABLE
    assert lr >= relaxed._FALL


def test_what_is_unstable_is_lowered_under_a_scheduler_too_though_the_loss_gets_lower_than_ever() -> None:
    state = agreeing(100.0, loss_mean=1.0, loss_deviation=0.1, loss_count=100)
    lr, status = RelaxedRule()._next_lr(state, Parabola(1.0, slope=0.5, curvature=2.0), 0.5)
    assert status is ProbeStatus.UNSTABLE
    assert lr < 1.0


@pytest.mark.parametrize("signal", [0.2, 0.8, 0.95])
@pytest.mark.parametrize(
    ("parabola", "fall"),
    [
        (Parabola(1.0, slope=1.0, curvature=2.0), 0.9),  # to κ times the lowest point of its own parabola
        (Parabola(1.0, slope=0.1, curvature=2.0), relaxed._FALL),
        (ASCENDING, relaxed._FALL),
    ],
)
def test_after_a_step_that_raised_the_loss_unusually_far_the_learning_rate_falls_and_the_next_step_probes(
    parabola: Parabola, fall: float, signal: float
) -> None:
    rule = RelaxedRule()
    state = agreeing(0.95, signal=signal, parabola_rise=0.1)
    usual, unusual = (
        rule.decide(state, parabola, loss_start=1.0, loss_end=1.0 + each * safeguards._UNUSUAL * 0.1)
        for each in (0.9, 1.1)
    )
    assert usual.status is not ProbeStatus.UNSTABLE
    assert unusual.status is ProbeStatus.UNSTABLE
    assert unusual.state.lr == pytest.approx(fall)
    assert unusual.state.lr_unstable == 1.0
    assert rule.is_probe_due(unusual.state)


def test_in_the_burn_in_an_unusual_rise_below_the_first_loss_changes_nothing() -> None:
    rule = RelaxedRule()
    state = agreeing(0.95, probes=5, parabola_rise=0.1)
    calm, rising = (rule.decide(state, CONVEX, loss_start=1.0, loss_end=each) for each in (1.1, 9.0))
    assert rising.status is calm.status is ProbeStatus.FITTED
    assert rising.state.lr == calm.state.lr


def test_near_where_it_was_unstable_the_learning_rate_grows_carefully() -> None:
    rule = RelaxedRule()
    steep = agreeing(3.0, signal=0.8)
    free, _ = rule._next_lr(steep, CONVEX, 1.0)
    near, _ = rule._next_lr(replace(steep, lr_unstable=1.5), CONVEX, 1.0)
    far, _ = rule._next_lr(replace(steep, lr_unstable=100.0), CONVEX, 1.0)
    assert near == pytest.approx(relaxed._CAREFUL_GROWTH)
    assert free == far == pytest.approx(1.0 + relaxed._LATER_CHANGE)


@pytest.mark.parametrize(("signal", "fall"), [(0.8, 1.0), (0.95, 1.0 - relaxed._LATER_CHANGE)])
def test_a_step_that_no_longer_descends_lowers_the_learning_rate_unless_that_may_be_noise(
    signal: float, fall: float
) -> None:
    lr, _ = RelaxedRule()._next_lr(agreeing(0.1, signal=signal, factor=0.5), CONVEX, 0.5)
    assert lr == pytest.approx(fall)


def test_in_noise_the_learning_rate_does_not_grow_because_a_scheduler_made_steps_small() -> None:
    calls_for_this = agreeing(0.8, signal=0.8, factor=0.5)
    assert RelaxedRule()._next_lr(calls_for_this, CONVEX, 0.5)[0] == 1.0
    assert RelaxedRule()._next_lr(agreeing(0.8, factor=0.5), CONVEX, 0.5)[0] > 1.0


# --- explosions ------------------------------------------------------------------------------------------------------


def test_explosion_cuts_the_learning_rate_and_probes_again_at_the_next_step() -> None:
    rule = RelaxedRule(max_change=2.0)
    decision = rule.decide(settled(rule, loss=1.0, deviation=0.1), CONVEX, loss_start=2.1)
    assert decision.status is ProbeStatus.EXPLODED
    assert decision.state.lr == 0.5
    assert decision.state.lr_unstable == 1.0
    assert rule.is_probe_due(decision.state)


def test_loss_just_within_the_limit_has_not_exploded() -> None:
    rule = RelaxedRule()
    assert rule.decide(settled(rule, loss=1.0, deviation=0.1), CONVEX, loss_start=1.9).status is ProbeStatus.FITTED


def test_explosion_is_noticed_even_where_the_probes_are_not_finite() -> None:
    rule = RelaxedRule()
    assert rule.decide(settled(rule), NOT_FINITE, loss_start=100.0).status is ProbeStatus.EXPLODED


def test_loss_below_where_training_began_has_not_exploded() -> None:
    rule = RelaxedRule()
    state = replace(settled(rule, loss=1.0, deviation=0.01), loss_initial=5.0)
    assert rule.decide(state, CONVEX, loss_start=4.9).status is ProbeStatus.FITTED
    assert rule.decide(state, CONVEX, loss_start=5.1).status is ProbeStatus.EXPLODED


def test_few_losses_cannot_explode() -> None:
    rule = RelaxedRule(smoothing=0.9)
    young = changed(settled(rule), loss_count=9)
    assert rule.decide(young, CONVEX, loss_start=100.0).status is ProbeStatus.FITTED


@pytest.mark.parametrize("level", [3.0, 100.0, 1e6])
def test_loss_that_stays_at_a_higher_level_is_cut_once(level: float) -> None:
    rule = RelaxedRule()
    before: list[tuple[float, Found]] = [(loss, CONVEX) for loss in islice(noisy_losses(1.0, 0.1), 50)]
    after: list[tuple[float, Found]] = [(loss, CONVEX) for loss in islice(noisy_losses(level, 0.1), 600)]
    decisions = decide_all(rule, replace(STARTED_LONG_AGO, loss_initial=1.0), before + after)
    exploded = [index for index, decision in enumerate(decisions) if decision.status is ProbeStatus.EXPLODED]
    assert exploded == [50]
    assert 0.5 < decisions[-1].state.lr < 1.5  # back in the range that the parabolas call for


def test_second_explosion_is_noticed_when_the_first_is_digested() -> None:
    rule = RelaxedRule()
    seen: list[tuple[float, Found]] = [
        (loss, CONVEX) for level in (1.0, 10.0, 100.0) for loss in islice(noisy_losses(level, 0.1), 100)
    ]
    decisions = decide_all(rule, replace(STARTED_LONG_AGO, loss_initial=1.0), seen)
    assert [i for i, decision in enumerate(decisions) if decision.status is ProbeStatus.EXPLODED] == [100, 200]


@pytest.mark.parametrize("smoothing", [0.0, 0.5, 0.9, 0.99])
def test_cuts_end_once_the_loss_stays_where_it_is(smoothing: float) -> None:
    rule = RelaxedRule(smoothing=smoothing)
    before: list[tuple[float, Found]] = [(loss, CONVEX) for loss in islice(noisy_losses(1.0, 0.1), 300)]
    decisions = decide_all(rule, replace(STARTED_LONG_AGO, loss_initial=1.0), [*before, *[(1000.0, CONVEX)] * 1000])
    assert decisions[300].status is ProbeStatus.EXPLODED
    assert all(decision.status is ProbeStatus.FITTED for decision in decisions[-300:])


# --- the long run ----------------------------------------------------------------------------------------------------


def test_a_flat_loss_of_any_length_leaves_a_learning_rate_that_grows_again() -> None:
    """A plateau of 20,000 steps, then slopes that agree."""
    rule, source = RelaxedRule(), np.random.default_rng(0)
    state = replace(STARTED_LONG_AGO, step=50, probes=50, next_probe=51, lr=0.01)
    for _ in range(20_000):
        if rule.is_probe_due(state):
            noise, loss = source.normal(0.0, 1.0), 1.0 + 0.1 * source.normal()
            state = rule.decide(state, Parabola(loss, noise, 1.0), loss_start=loss).state
        else:
            state = rule.skip(state)
    assert 0.5 * 0.01 * (50 / 20_000) ** 0.25 < state.lr <= 0.01
    plateau = state.lr
    for step in range(400):
        state = rule.decide(state, Parabola(1.0, 1.0, 1.0), loss_start=1.0 - 0.001 * step).state
    assert state.lr > 10.0 * plateau


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_over_20_000_steps_of_a_noisy_quadratic_the_learning_rate_neither_runs_away_nor_dies(
    momentum: float, seed: int
) -> None:
    """Stationary: minima of the batches vary around a fixed one. Looked back at, every period, on another batch."""
    curvatures = np.logspace(-2.0, 0.0, 10)
    learning_rates, losses = noisy_run(
        RelaxedRule(),
        RelaxedState(lr=1e-2, started=True, loss_initial=100.0),
        start=np.full(10, 3.0),
        curvatures=curvatures,
        noise=1.0,
        momentum=momentum,
        steps=20_000,
        seed=seed,
    )
    stable = 2.0 * (1.0 + momentum) / curvatures.max()
    assert max(learning_rates) < 10.0 * stable
    # One over the number of steps is what such a problem calls for, and 2.5e-5 of what is stable.
    assert min(learning_rates[1000:]) > 1e-6 * stable
    assert learning_rates[-1] > 1e-5 * stable
    assert losses[-1] < 10.0  # near the minimum, as far as the noise allows
