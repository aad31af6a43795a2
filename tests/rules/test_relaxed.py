"""The relaxed rule: its start and burn-in, what it makes of parabolas, what it takes back, and how long it lasts."""

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

from gen_optim.rules import relaxed as relaxing
from gen_optim.rules.base import ControlState, Decision, ProbeStatus, PublishedRule
from gen_optim.rules.initial_search import StartSearch
from gen_optim.rules.parabola import Parabola
from gen_optim.rules.relaxed import RelaxedRule
from tests.rules.judging import (
    CONCAVE,
    CONVEX,
    NOT_FINITE,
    STARTED_LONG_AGO,
    Found,
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
    fresh = ControlState(lr=1e-3)
    assert rule.needs_start(fresh)
    decision = rule.decide(fresh, 2.5, StartSearch(0.5, (0.5,), (1.0,)))
    assert decision.status is ProbeStatus.STARTED
    assert decision.state.lr == pytest.approx(0.015)
    assert decision.state.started
    assert decision.state.loss_start == 2.5
    assert not rule.needs_start(decision.state)


def test_failed_start_keeps_the_learning_rate_and_is_tried_again_at_the_next_step() -> None:
    rule = RelaxedRule()
    decision = rule.decide(ControlState(lr=1e-3), 2.5, StartSearch(None, (1.0,), (3.0,)))
    assert decision.status is ProbeStatus.START_FAILED
    assert decision.state.lr == 1e-3
    assert rule.needs_start(decision.state)
    assert rule.is_probe_due(decision.state)


@pytest.mark.parametrize("burn_in", [0, 1, 3])
def test_failed_start_is_tried_at_every_step_however_short_the_burn_in(burn_in: int) -> None:
    rule = RelaxedRule(burn_in=burn_in, period=8)
    state = ControlState(lr=1e-3)
    for _ in range(10):
        assert rule.is_probe_due(state)
        state = rule.decide(state, 2.5, StartSearch(None, (), ())).state


@pytest.mark.parametrize(
    ("burn_in", "expected"),
    [(0, [1, 5, 9, 13]), (1, [1, 5, 9, 13]), (2, [1, 2, 6, 10, 14]), (3, [1, 2, 3, 7, 11, 15])],
)
def test_burn_in_probes_at_every_step_and_then_every_period(burn_in: int, expected: list[int]) -> None:
    assert probed_steps(RelaxedRule(burn_in=burn_in, period=4), 16) == expected


# --- one parabola ----------------------------------------------------------------------------------------------------


def is_growth_within_bounds(before: float, after: float) -> bool:
    return before / relaxing._CHANGE * (1 - 1e-12) <= after <= before * relaxing._CHANGE * (1 + 1e-12)


@pytest.mark.parametrize(
    ("parabola", "status", "direction"),
    [
        (Parabola(1.0, 30.0, 2.0), ProbeStatus.FITTED, 1),
        (Parabola(1.0, 0.3, 2.0), ProbeStatus.FITTED, -1),
        (CONCAVE, ProbeStatus.CONCAVE, 1),
        (Parabola(1.0, 3.0, 0.0), ProbeStatus.CONCAVE, 1),
        (ASCENDING, ProbeStatus.NO_MINIMUM, -1),
        (Parabola(1.0, -3.0, -2.0), ProbeStatus.NO_MINIMUM, -1),
        (Parabola(1.0, 0.0, -2.0), ProbeStatus.NO_MINIMUM, -1),
    ],
)
def test_learning_rate_moves_towards_the_target_by_a_bounded_factor(
    parabola: Parabola, status: ProbeStatus, direction: int
) -> None:
    decision = RelaxedRule().decide(STARTED_LONG_AGO, 1.0, parabola)
    assert decision.status is status
    assert direction * math.log(decision.state.lr) > 0
    assert is_growth_within_bounds(1.0, decision.state.lr)


def test_growth_is_faster_during_the_burn_in() -> None:
    young = replace(STARTED_LONG_AGO, probes=1)
    rule = RelaxedRule()
    assert rule.decide(young, 1.0, CONCAVE).state.lr > rule.decide(STARTED_LONG_AGO, 1.0, CONCAVE).state.lr > 1.0


def test_what_was_measured_at_a_far_smaller_learning_rate_is_soon_forgotten() -> None:
    """Curvatures of early training differ by decades from later ones; at their face value they would count for long."""
    rule, state = RelaxedRule(), replace(STARTED_LONG_AGO, lr=1e-3, probes=1)
    for curvature in [-1.0] * 25 + [1.0] * 12:  # in units of the step
        state = rule.decide(state, 1.0, Parabola(1.0, 0.6 / state.lr, curvature / state.lr**2)).state
    assert 0.3 < state.slope_mean / state.curvature_mean / state.lr < 1.0
    grown = rule.decide(replace(state, lr=10.0 * state.lr), 1.0, CONVEX).state
    shrunk = rule.decide(replace(state, lr=0.1 * state.lr), 1.0, CONVEX).state
    assert grown.parabola_weight < 1.2
    assert shrunk.parabola_weight == pytest.approx(1.0 + rule.smoothing * state.parabola_weight)


def test_a_single_parabola_counts_little_more_than_usual_ones_however_much_the_loss_has_changed() -> None:
    rule = RelaxedRule()
    state = decide_all(rule, STARTED_LONG_AGO, [(1.0, Parabola(1.0, 1.0, 3.0))] * 30)[-1].state
    usual = state.slope_mean / state.curvature_mean
    after = rule.decide(replace(state, lr=1.0), 1.0, Parabola(1.0, 0.0, -1e6)).state
    assert usual < after.slope_mean / after.curvature_mean < 2.0 * usual


def test_growth_on_concave_descent_never_stalls_and_ends_at_lr_max() -> None:
    rule = RelaxedRule(lr_max=0.25)
    seen: list[tuple[float, Found]] = [(1.0, CONCAVE)] * 1000
    learning_rates = [each.state.lr for each in decide_all(rule, replace(STARTED_LONG_AGO, lr=1e-6), seen)]
    slowest = relaxing._CAREFUL_GROWTH  # without noise, at every step
    assert len([each for each in learning_rates if each < 0.25]) <= 2 + math.log(0.25e6) / math.log(slowest)
    assert learning_rates[-1] == 0.25


@pytest.mark.parametrize("slope", [-0.9, 0.0, 0.9])
@pytest.mark.parametrize("curvature", [-0.9, 0.0, 0.9])
def test_slope_and_curvature_that_rounding_explains_teach_nothing(slope: float, curvature: float) -> None:
    parabola = Parabola(1.0, slope, curvature, slope_noise=1.0, curvature_noise=1.0)
    decision = RelaxedRule().decide(STARTED_LONG_AGO, 1.0, parabola)
    assert decision.status is ProbeStatus.BELOW_NOISE
    assert decision.state.lr == 1.0
    assert decision.state.parabola_count == 0


def test_non_finite_probe_cuts_the_learning_rate_and_probes_again_at_the_next_step() -> None:
    rule = RelaxedRule(max_change=4.0)
    for parabola in (NOT_FINITE, Parabola(1.0, math.inf, 2.0)):
        decision = rule.decide(STARTED_LONG_AGO, 1.0, parabola)
        assert decision.status is ProbeStatus.NON_FINITE_PROBE
        assert decision.state.lr == 0.25
        assert rule.is_probe_due(decision.state)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("found", [CONVEX, NOT_FINITE, StartSearch(0.5, (0.5,), (0.1,)), StartSearch(None, (), ())])
@pytest.mark.parametrize("arrival", [None, 1.0, math.nan])
def test_non_finite_loss_changes_nothing_but_the_step_counter(loss: float, found: Found, arrival: float | None) -> None:
    rule = RelaxedRule()
    state = settled(rule)
    decision = rule.decide(state, loss, found, arrival=arrival)
    assert decision.status is ProbeStatus.NON_FINITE_LOSS
    assert decision.state == replace(state, step=state.step + 1)
    assert rule.is_probe_due(decision.state)


def test_restarting_averages_needs_no_new_start() -> None:
    rule = RelaxedRule()
    trained = decide_all(rule, settled(rule), [(1.0, CONVEX)] * 5)[-1].state
    assert not rule.needs_start(rule.restart_averages(trained, 0.125))
    decision = rule.decide(rule.restart_averages(trained, 0.125), 1.0, Parabola(1.0, 0.01, 1.0))
    assert decision.state.slope_mean == pytest.approx(decision.state.curvature_mean * 0.01)


def test_cut_or_grown_for_ever_the_learning_rate_stays_a_number_that_moves() -> None:
    rule = RelaxedRule()
    down, up = STARTED_LONG_AGO, STARTED_LONG_AGO
    for _ in range(5000):
        down = rule.decide(down, 1.0, NOT_FINITE).state
        up = rule.decide(up, 1.0, CONCAVE).state
    assert (down.lr, up.lr) == (1e-30, 1e30)


def test_learning_rate_stays_within_its_limits() -> None:
    rule = RelaxedRule(lr_min=0.99, lr_max=1.01, start_fraction=1.0)
    assert rule.decide(STARTED_LONG_AGO, 1.0, Parabola(1.0, 100.0, 1.0)).state.lr == 1.01
    assert rule.decide(STARTED_LONG_AGO, 1.0, Parabola(1.0, 0.001, 1.0)).state.lr == 0.99
    assert rule.decide(STARTED_LONG_AGO, 1.0, NOT_FINITE).state.lr == 0.99
    assert rule.decide(settled(rule), 100.0, CONVEX).state.lr == 0.99
    assert rule.decide(ControlState(lr=1.0), 1.0, StartSearch(1e6, (), ())).state.lr == 1.01
    assert rule.decide(ControlState(lr=1.0), 1.0, StartSearch(1e-6, (), ())).state.lr == 0.99


# --- where it leads --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lr", [1e-4, 1e-2, 0.9, 30.0])
@pytest.mark.parametrize("relaxation", [1.2, 1.5, 1.8])
def test_without_noise_it_converges_to_kappa_times_the_optimum_from_both_sides(lr: float, relaxation: float) -> None:
    rule = RelaxedRule(relaxation=relaxation)
    # The same parabola at every probe step: slopes agree.
    state = decide_all(rule, replace(STARTED_LONG_AGO, lr=lr), [(1.0, Parabola(1.0, 1.0, 3.0))] * 1000)[-1].state
    assert rule.agreement(state) == pytest.approx(1.0)
    assert state.lr == pytest.approx(relaxation / 3.0, rel=1e-3)


def test_from_its_start_it_finds_kappa_times_the_optimum_of_a_quadratic() -> None:
    rule = RelaxedRule(period=1, relaxation=1.5)
    for lr in (1e-8, 10.0):
        _, learning_rates = train_on_quadratic(rule, steps=200, lr=lr)
        assert learning_rates[-1] == pytest.approx(1.5 / 3.0, rel=1e-3)


def noisy_slopes(mean: float, noise: float, count: int, seed: int = 0) -> list[tuple[float, Found]]:
    """Parabolas of curvature 1 whose slopes vary; losses as a stationary run has them."""
    source = np.random.default_rng(seed)
    slopes, losses = source.normal(mean, noise, count), source.normal(1.0, 0.1, count)
    return [(float(loss), Parabola(float(loss), float(slope), 1.0)) for slope, loss in zip(slopes, losses, strict=True)]


@pytest.mark.parametrize("seed", range(5))
def test_in_pure_noise_the_learning_rate_falls(seed: int) -> None:
    decisions = decide_all(RelaxedRule(), STARTED_LONG_AGO, noisy_slopes(0.0, 1.0, 400, seed))
    assert decisions[-1].state.lr < 0.1
    agreements = [RelaxedRule().agreement(each.state) for each in decisions[20:]]
    assert sum(agreements) / len(agreements) < 0.15


def test_agreement_is_the_share_of_what_slopes_have_in_common() -> None:
    rule = RelaxedRule(smoothing=0.98)
    means = []
    for mean in (0.0, 0.5, 1.0, 4.0):
        found = decide_all(rule, STARTED_LONG_AGO, noisy_slopes(mean, 0.2, 1500))
        agreements = [rule.agreement(each.state) for each in found[500:]]
        assert all(0.0 <= each <= 1.0 for each in agreements)
        means.append(sum(agreements) / len(agreements))
    assert means == sorted(means)
    assert means[0] < 0.05
    assert means[-1] > 0.9
    assert rule.agreement(ControlState(lr=1.0)) == 0.0
    assert RelaxedRule(smoothing=0.0).agreement(found[-1].state) == 0.0  # one slope agrees with nothing


def under_noise(descent: float, seed: int, factor: float) -> float:
    """The learning rate after 400 steps, from 1, where each step lowers the loss by ``descent``.

    Along each the second order costs 0.01, slopes vary by 0.2 around what makes up for both, and losses by 0.05.
    """
    rule, source, state = RelaxedRule(), np.random.default_rng(seed), STARTED_LONG_AGO
    for step in range(400):
        if rule.is_probe_due(state):
            first, loss = descent + 0.01 + 0.2 * source.normal(), 5.0 - descent * step + 0.05 * source.normal()
            taken = state.lr * factor
            state = rule.decide(state, loss, Parabola(loss, first / taken, 0.02 / taken**2), factor=factor).state
        else:
            state = rule.skip(state)
    return state.lr


def test_under_noise_and_a_scheduler_the_losses_tell_what_slopes_do_not() -> None:
    # By its slopes alone, each of which varies by ten times the mean, no run would be told from the others.
    descending, standing, ascending = (
        [under_noise(descent, seed, 0.9) for seed in range(8)] for descent in (0.01, 0.0, -0.01)
    )
    assert min(descending) > 3.0 * max(standing) > 3.0 * max(ascending)
    assert math.prod(descending) > 1.0


def test_without_a_scheduler_chance_anneals_the_learning_rate_though_the_loss_falls() -> None:
    assert math.prod(under_noise(0.01, seed, 1.0) for seed in range(8)) < 0.5**8


@pytest.mark.parametrize("factor", [1.0, 0.5])
@pytest.mark.parametrize("trend", [-0.5, -0.1, 0.0])
def test_where_parabolas_agree_the_losses_do_not_count(trend: float, factor: float) -> None:
    state = STARTED_LONG_AGO
    for step in range(300):
        loss = 5.0 + trend * step + 0.01 * (-1) ** step
        state = RelaxedRule().decide(state, loss, Parabola(1.0, 1.0, 3.0), factor=factor).state
    assert state.lr * factor == pytest.approx(0.6, rel=1e-3)


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
    rule, state = RelaxedRule(smoothing=smoothing), ControlState(lr=lr, started=True)
    for loss, parabola, arrival, factor in seen:
        before = state
        state = rule.decide(state, loss, parabola, factor=factor, arrival=arrival).state
        assert state.step == before.step + 1
        # Besides its own bounds it grows by what the scheduler has taken off since the last parabola.
        taken_off = max(1.0, before.factor / factor) if factor else 1.0
        assert state.lr <= before.lr * rule.max_change * taken_off
        assert state.lr >= before.lr / rule.max_change
        assert state.lr > 0.0
        for value in state.dump().values():
            assert type(value) in (int, float, bool)
            assert math.isfinite(value)


def noisy_run(
    rule: RelaxedRule,
    state: ControlState,
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
            decision = rule.decide(state, parabola.value, parabola, arrival=loss(x - minimum))
            state = decision.state
            if decision.takes_back:
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
    state = ControlState(lr=lr, started=True, loss_start=1000.0)
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
    return decide_all(RelaxedRule(), replace(STARTED_LONG_AGO, loss_start=factor * (5.0 + shift)), seen)


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


def in_noise(mean: float, curvature: float) -> ControlState:
    """A state in which slopes are known to be nothing but noise, around a mean."""
    return replace(
        STARTED_LONG_AGO,
        slope_mean=mean,
        curvature_mean=curvature,
        change_mean=1.0,
        agreement_mean=0.0,
        agreement_square=1.0,
        parabola_count=1000,
    )


@pytest.mark.parametrize("factor", [0.5, 0.1, 1e-3])
def test_in_noise_a_target_between_the_step_taken_and_alpha_keeps_the_learning_rate(factor: float) -> None:
    rule = RelaxedRule()
    kappa = rule.relaxation
    for target in (factor * 1.01, math.sqrt(factor), 0.99):
        state = in_noise(target / kappa, 1.0)
        assert rule._relaxed(state, CONVEX, factor)[0] == 1.0
        if target < 0.9:
            assert rule._relaxed(state, CONVEX, 1.0)[0] < 1.0  # without a scheduler it would fall
    assert rule._relaxed(in_noise(0.9 * factor / kappa, 1.0), CONVEX, factor)[0] < 1.0
    assert rule._relaxed(in_noise(1.1 / kappa, 1.0), CONVEX, factor)[0] > 1.0


@pytest.mark.parametrize("factor", [0.5, 0.1, 1e-3])
def test_without_noise_the_target_is_followed_from_both_sides_under_a_scheduler(factor: float) -> None:
    rule = RelaxedRule(relaxation=1.5)
    for lr in (0.01 / factor, 10.0 / factor):
        state = replace(STARTED_LONG_AGO, lr=lr)
        for _ in range(400):  # the loss has been lower before, by less than losses vary
            state = replace(state, loss_mean=1.0, loss_lowest=0.99, loss_deviation=0.1, loss_count=100)
            state = rule.decide(state, 1.0, Parabola(1.0, 1.0, 3.0), factor=factor).state
        assert state.lr * factor == pytest.approx(1.5 / 3.0, rel=1e-3)


def test_under_a_scheduler_the_learning_rate_does_not_fall_while_the_loss_gets_lower_than_ever() -> None:
    rule = RelaxedRule()
    improving = replace(
        STARTED_LONG_AGO, lr=100.0, loss_mean=1.0, loss_lowest=1.0, loss_deviation=0.1, loss_count=100, factor=0.5
    )
    assert rule.decide(improving, 1.0, Parabola(1.0, 1.0, 3.0), factor=0.5).state.lr == 100.0
    assert rule.decide(improving, 1.0, Parabola(1.0, 1.0, 3.0)).state.lr < 100.0
    assert rule.decide(replace(improving, loss_lowest=0.99), 1.0, Parabola(1.0, 1.0, 3.0), factor=0.5).state.lr < 100.0


@pytest.mark.parametrize("factor", [0.5, 0.1])
def test_what_a_scheduler_takes_off_is_made_up_for_at_once_without_noise_but_not_in_noise(factor: float) -> None:
    rule = RelaxedRule()
    agreeing = decide_all(rule, STARTED_LONG_AGO, [(1.0, Parabola(1.0, 1.0, 3.0))] * 1000)[-1].state
    decision = rule.decide(agreeing, 1.0, Parabola(1.0, 1.0, 3.0), factor=factor)
    assert 0.6 * agreeing.lr < decision.state.lr * factor <= agreeing.lr * (1.0 + 1e-9)
    assert decision.state.factor == factor
    assert rule._relaxed(in_noise(1e3, 1.0), CONVEX, factor)[0] == rule._relaxed(in_noise(1e3, 1.0), CONVEX, 1.0)[0]


def test_a_factor_of_zero_asks_for_nothing() -> None:
    rule = RelaxedRule()
    state = decide_all(rule, STARTED_LONG_AGO, [(1.0, CONVEX)] * 20)[-1].state
    assert rule.agreement(state) > 0.5
    decision = rule.decide(state, 1.0, CONVEX, factor=0.0)
    assert decision.state.lr == state.lr
    assert decision.state.slope_mean == state.slope_mean


# --- taken back ------------------------------------------------------------------------------------------------------


def calm(rule: RelaxedRule, count: int = 20) -> ControlState:
    """A state after steps each of which lowered the loss by 0.1 from about 1."""
    state = replace(STARTED_LONG_AGO, loss_start=1.0)
    for loss in islice(noisy_losses(1.0, 0.01), count):
        state = rule.decide(state, loss, CONVEX, arrival=loss - 0.1).state
    return state


@pytest.mark.parametrize("arrival", [1e6, math.inf, math.nan])
@pytest.mark.parametrize("parabola", [CONVEX, NOT_FINITE])
def test_a_step_that_led_far_up_is_taken_back_and_the_learning_rate_cut(arrival: float, parabola: Parabola) -> None:
    rule = RelaxedRule(max_change=4.0)
    state = calm(rule)
    decision = rule.decide(state, 1.0, parabola, arrival=arrival)
    assert decision.status is ProbeStatus.TAKEN_BACK
    assert decision.takes_back
    assert decision.state.lr == state.lr / 4.0
    assert decision.state.lr_unstable == state.lr
    assert rule.is_probe_due(decision.state)


def test_how_far_up_is_relative_to_what_steps_usually_change() -> None:
    rule = RelaxedRule()
    state = calm(rule)
    usual = relaxing._ASTRAY * state.rise_mean
    assert state.rise_mean == pytest.approx(0.1)
    assert not rule.decide(state, 1.0, CONVEX, arrival=1.0 + 0.9 * usual).takes_back
    assert rule.decide(state, 1.0, CONVEX, arrival=1.0 + 1.1 * usual).takes_back
    assert not rule.decide(replace(state, loss_start=50.0), 1.0, CONVEX, arrival=49.0).takes_back
    young = calm(rule, count=relaxing._FEW - 1)
    assert not rule.decide(young, 1.0, CONVEX, arrival=100.0).takes_back
    assert rule.decide(young, 1.0, CONVEX, arrival=math.nan).takes_back


def test_only_steps_that_have_been_taken_are_taken_back() -> None:
    rule = RelaxedRule()
    assert rule.decide(calm(rule), 1.0, NOT_FINITE).status is ProbeStatus.NON_FINITE_PROBE


def test_a_rise_that_rounding_explains_is_not_taken_back() -> None:
    rule = RelaxedRule()
    state = replace(STARTED_LONG_AGO, loss_start=0.0)
    for _ in range(10):
        state = rule.decide(state, 1.0, CONVEX, arrival=1.0).state
    assert state.rise_mean == 0.0
    assert not rule.decide(state, 1.0, CONVEX, arrival=1.0 + 2.0**-22).takes_back
    assert rule.decide(state, 1.0, CONVEX, arrival=1.0 + 2.0**-18).takes_back


@pytest.mark.parametrize("status", [ProbeStatus.TAKEN_BACK, ProbeStatus.EXPLODED, ProbeStatus.NON_FINITE_PROBE])
def test_after_a_cut_the_averages_do_not_call_for_the_old_learning_rate(status: ProbeStatus) -> None:
    rule = RelaxedRule()
    state = replace(calm(rule), lr=1.0, slope_mean=10.0, curvature_mean=1.0, loss_start=0.0)
    found = NOT_FINITE if status is ProbeStatus.NON_FINITE_PROBE else CONVEX
    loss = 1e6 if status is ProbeStatus.EXPLODED else 1.0
    decision = rule.decide(state, loss, found, arrival=1e9 if status is ProbeStatus.TAKEN_BACK else loss)
    assert decision.status is status
    after = decision.state
    assert after.lr == 0.5
    assert rule.relaxation * after.slope_mean / after.curvature_mean <= after.lr * (1 + 1e-12)


def agreeing(target: float, agreement: float = 1.0, **changes: float) -> ControlState:
    """A state at α = 1 whose averages call for ``target``, about as sure as ``agreement`` says."""
    state = replace(
        STARTED_LONG_AGO,
        slope_mean=target / RelaxedRule().relaxation,
        curvature_mean=1.0,
        change_mean=1.0,
        agreement_mean=math.sqrt(agreement),
        agreement_square=1.0,
        parabola_count=1000,
        parabola_weight=10.0,
        lr_measured=1.0,
    )
    return replace(state, **changes)


LONG = Parabola(value=1.0, slope=1.0, curvature=2.0)  # lowest at a half of α


@pytest.mark.parametrize(
    ("state", "burn_in"),
    [
        (agreeing(3.9), 50),  # not so far
        (agreeing(100.0, agreement=0.8), 50),
        (agreeing(100.0, lr_unstable=1.9), 50),
        (agreeing(100.0, loss_mean=1.06, loss_lowest=1.0, loss_deviation=0.1, loss_count=100), 50),  # it rises
        (agreeing(100.0), 1000),  # probed at every step already, and grows faster
    ],
)
def test_what_is_far_out_without_noise_is_approached_with_a_probe_at_every_step(
    state: ControlState, burn_in: int
) -> None:
    rule = RelaxedRule(burn_in=burn_in)
    lr, status = RelaxedRule()._relaxed(agreeing(4.1), CONVEX, 1.0)
    assert (lr, status) == (relaxing._CAREFUL_GROWTH, ProbeStatus.GROWING)
    assert rule.steps_to_next_probe(1000, ProbeStatus.GROWING) == 1
    assert rule._relaxed(state, CONVEX, 1.0)[1] is ProbeStatus.FITTED


def test_a_parabola_that_contradicts_the_averages_lowers_the_learning_rate_and_asks_for_another() -> None:
    rule = RelaxedRule()
    decision = rule.decide(agreeing(100.0), 1.0, LONG)
    assert decision.status is ProbeStatus.UNSTABLE
    assert 0.9 < decision.state.lr < 0.95
    assert decision.state.lr_unstable == 1.0
    assert rule.is_probe_due(decision.state)


@pytest.mark.parametrize(
    ("state", "parabola"),
    [
        (agreeing(100.0, agreement=0.4), LONG),  # one parabola tells nothing in noise
        (agreeing(1.2), LONG),  # the averages do not call for much more
        (agreeing(100.0), Parabola(1.0, slope=1.2, curvature=2.0)),  # κ times its lowest point lies ahead
        (agreeing(100.0), Parabola(1.0, slope=-1.0, curvature=2.0)),  # momentum carries uphill
        (agreeing(100.0, probes=0), LONG),  # in the burn-in
    ],
)
def test_other_parabolas_do_not_contradict_the_averages(state: ControlState, parabola: Parabola) -> None:
    lr, status = RelaxedRule()._relaxed(state, parabola, 1.0)
    assert status is not ProbeStatus.UNSTABLE
    assert lr > 1.0


def test_near_where_it_was_unstable_any_contradiction_counts() -> None:
    lr, status = RelaxedRule()._relaxed(agreeing(1.2, lr_unstable=1.9), LONG, 1.0)
    assert status is ProbeStatus.UNSTABLE
    assert lr == pytest.approx(1.0 / relaxing._CHANGE)


def test_what_is_unstable_is_lowered_under_a_scheduler_too_though_the_loss_gets_lower_than_ever() -> None:
    state = agreeing(100.0, loss_mean=1.0, loss_lowest=1.0, loss_deviation=0.1, loss_count=100)
    lr, status = RelaxedRule()._relaxed(state, Parabola(1.0, slope=0.5, curvature=2.0), 0.5)
    assert status is ProbeStatus.UNSTABLE
    assert lr < 1.0


def test_near_where_it_was_unstable_the_learning_rate_grows_carefully() -> None:
    rule = RelaxedRule()
    steep = agreeing(3.0)
    free, _ = rule._relaxed(steep, CONVEX, 1.0)
    near, _ = rule._relaxed(replace(steep, lr_unstable=1.5), CONVEX, 1.0)
    far, _ = rule._relaxed(replace(steep, lr_unstable=100.0), CONVEX, 1.0)
    assert near == pytest.approx(relaxing._CAREFUL_GROWTH)
    assert free == far > near
    down, _ = rule._relaxed(replace(steep, slope_mean=0.1, lr_unstable=1.5), CONVEX, 1.0)
    assert down == pytest.approx(1.0 / relaxing._CHANGE)  # falling is free


# --- explosions ------------------------------------------------------------------------------------------------------


def test_explosion_cuts_the_learning_rate_and_probes_again_at_the_next_step() -> None:
    rule = RelaxedRule(explosion=10.0, max_change=2.0)
    decision = rule.decide(settled(rule, loss=1.0, deviation=0.1), 2.1, CONVEX)
    assert decision.status is ProbeStatus.EXPLODED
    assert decision.state.lr == 0.5
    assert decision.state.lr_unstable == 1.0
    assert rule.is_probe_due(decision.state)


def test_loss_just_within_the_limit_has_not_exploded() -> None:
    rule = RelaxedRule(explosion=10.0)
    assert rule.decide(settled(rule, loss=1.0, deviation=0.1), 1.9, CONVEX).status is ProbeStatus.FITTED


def test_explosion_is_noticed_even_where_the_probes_are_not_finite() -> None:
    rule = RelaxedRule()
    assert rule.decide(settled(rule), 100.0, NOT_FINITE).status is ProbeStatus.EXPLODED


def test_loss_below_where_training_began_has_not_exploded() -> None:
    rule = RelaxedRule()
    state = replace(settled(rule, loss=1.0, deviation=0.01), loss_start=5.0)
    assert rule.decide(state, 4.9, CONVEX).status is ProbeStatus.FITTED
    assert rule.decide(state, 5.1, CONVEX).status is ProbeStatus.EXPLODED


def test_few_losses_cannot_explode() -> None:
    rule = RelaxedRule(smoothing=0.9)
    young = replace(settled(rule), loss_count=9)
    assert rule.decide(young, 100.0, CONVEX).status is ProbeStatus.FITTED


def test_explosion_can_be_turned_off() -> None:
    rule = RelaxedRule(explosion=math.inf)
    assert rule.decide(settled(rule), 1e30, CONVEX).status is ProbeStatus.FITTED


@pytest.mark.parametrize("level", [3.0, 100.0, 1e6])
def test_loss_that_stays_at_a_higher_level_is_cut_once(level: float) -> None:
    rule = RelaxedRule()
    before: list[tuple[float, Found]] = [(loss, CONVEX) for loss in islice(noisy_losses(1.0, 0.1), 50)]
    after: list[tuple[float, Found]] = [(loss, CONVEX) for loss in islice(noisy_losses(level, 0.1), 600)]
    decisions = decide_all(rule, replace(STARTED_LONG_AGO, loss_start=1.0), before + after)
    exploded = [index for index, decision in enumerate(decisions) if decision.status is ProbeStatus.EXPLODED]
    assert exploded == [50]
    assert decisions[-1].state.lr == pytest.approx(rule.relaxation * 1.5, rel=0.01)  # back at the target


def test_second_explosion_is_noticed_when_the_first_is_digested() -> None:
    rule = RelaxedRule()
    seen: list[tuple[float, Found]] = [
        (loss, CONVEX) for level in (1.0, 10.0, 100.0) for loss in islice(noisy_losses(level, 0.1), 100)
    ]
    decisions = decide_all(rule, replace(STARTED_LONG_AGO, loss_start=1.0), seen)
    assert [i for i, decision in enumerate(decisions) if decision.status is ProbeStatus.EXPLODED] == [100, 200]


@pytest.mark.parametrize("smoothing", [0.0, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("explosion", [1.0, 3.0, 10.0])
def test_cuts_end_however_sensitive_the_rule(smoothing: float, explosion: float) -> None:
    rule = RelaxedRule(smoothing=smoothing, explosion=explosion)
    before: list[tuple[float, Found]] = [(loss, CONVEX) for loss in islice(noisy_losses(1.0, 0.1), 300)]
    decisions = decide_all(rule, replace(STARTED_LONG_AGO, loss_start=1.0), [*before, *[(1000.0, CONVEX)] * 1000])
    assert decisions[300].status is ProbeStatus.EXPLODED
    assert all(decision.status is ProbeStatus.FITTED for decision in decisions[-300:])


# --- the long run ----------------------------------------------------------------------------------------------------


def test_growth_ends_where_the_mean_loss_rises_and_further_up_the_learning_rate_falls() -> None:
    rule = RelaxedRule()
    state = replace(settled(rule, loss=1.0, deviation=0.1), loss_start=10.0, slope_mean=100.0, curvature_mean=1.0)
    growing, held, falling = (
        rule._relaxed(replace(state, loss_mean=1.0 + risen * 0.1), CONVEX, 1.0)[0]
        for risen in (0.9 * relaxing._RISEN, 1.1 * relaxing._RISEN, 2.1 * relaxing._RISEN)
    )
    assert growing > held == 1.0 > falling


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_over_20_000_steps_of_a_noisy_quadratic_the_learning_rate_neither_runs_away_nor_dies(
    momentum: float, seed: int
) -> None:
    """Stationary: minima of the batches vary around a fixed one. Looked back at, every period, on another batch."""
    curvatures = np.logspace(-2.0, 0.0, 10)
    learning_rates, losses = noisy_run(
        RelaxedRule(),
        ControlState(lr=1e-2, started=True, loss_start=100.0),
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


def test_it_is_the_published_rule_in_all_that_it_does_not_change() -> None:
    assert issubclass(RelaxedRule, PublishedRule)
    assert RelaxedRule().skip(STARTED_LONG_AGO) == PublishedRule().skip(STARTED_LONG_AGO)
