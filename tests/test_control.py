import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gen_optim.control import (
    ControlState,
    Decision,
    ProbeStatus,
    PublishedRule,
    SafeguardedRule,
    make_rule,
)
from gen_optim.quadratic import Parabola
from gen_optim.starting import StartSearch, search_start

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
    return replace(STARTED_LONG_AGO, loss_start=loss, loss_mean=loss, loss_deviation=deviation, loss_count=100)


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


@pytest.mark.parametrize(
    ("period", "expected"), [(1, [1, 2, 3, 4, 5, 6, 7, 8, 9]), (2, [1, 3, 5, 7, 9]), (4, [1, 5, 9]), (8, [1, 9])]
)
def test_published_rule_probes_at_the_first_step_and_every_period(period: int, expected: list[int]) -> None:
    assert probed_steps(PublishedRule(period=period), 9) == expected


def test_published_rule_needs_no_start() -> None:
    assert not PublishedRule().needs_start(ControlState(lr=1.0))


# --- the safeguarded rule: start, burn-in, growth, noise -------------------------------------------------------------


def test_start_begins_at_a_fraction_of_what_was_found() -> None:
    rule = SafeguardedRule(start_fraction=0.03)
    fresh = ControlState(lr=1e-3)
    assert rule.needs_start(fresh)
    decision = rule.decide(fresh, 2.5, StartSearch(0.5, (0.5,), (1.0,)))
    assert decision.status is ProbeStatus.STARTED
    assert decision.state.lr == pytest.approx(0.015)
    assert decision.state.started
    assert decision.state.loss_start == 2.5
    assert not rule.needs_start(decision.state)


def test_failed_start_keeps_the_learning_rate_and_is_tried_again_at_the_next_step() -> None:
    rule = SafeguardedRule()
    decision = rule.decide(ControlState(lr=1e-3), 2.5, StartSearch(None, (1.0,), (3.0,)))
    assert decision.status is ProbeStatus.START_FAILED
    assert decision.state.lr == 1e-3
    assert rule.needs_start(decision.state)
    assert rule.is_probe_due(decision.state)


@pytest.mark.parametrize("burn_in", [0, 1, 3])
def test_failed_start_is_tried_at_every_step_however_short_the_burn_in(burn_in: int) -> None:
    rule = SafeguardedRule(burn_in=burn_in, period=8)
    state = ControlState(lr=1e-3)
    for _ in range(10):
        assert rule.is_probe_due(state)
        state = rule.decide(state, 2.5, StartSearch(None, (), ())).state


@pytest.mark.parametrize(
    ("burn_in", "expected"),
    [(0, [1, 5, 9, 13]), (1, [1, 5, 9, 13]), (2, [1, 2, 6, 10, 14]), (3, [1, 2, 3, 7, 11, 15])],
)
def test_burn_in_probes_at_every_step_and_then_every_period(burn_in: int, expected: list[int]) -> None:
    assert probed_steps(SafeguardedRule(burn_in=burn_in, period=4), 16) == expected


def test_safeguarded_rule_averages_with_the_optimum_like_the_published_one() -> None:
    safeguarded = SafeguardedRule().decide(STARTED_LONG_AGO, 1.0, CONVEX)
    published = PublishedRule().decide(STARTED_LONG_AGO, 1.0, CONVEX)
    assert safeguarded.state.lr == published.state.lr == pytest.approx(1.05)
    assert safeguarded.status is ProbeStatus.FITTED


def test_concave_descent_grows_the_learning_rate_as_fast_as_the_limits_let_it() -> None:
    decision = SafeguardedRule(smoothing=0.9, max_change=2.0).decide(STARTED_LONG_AGO, 1.0, CONCAVE)
    assert decision.state.lr == pytest.approx(1.1)  # 0.9 · 1 + 0.1 · 2
    assert decision.status is ProbeStatus.CONCAVE


def test_growth_on_concave_descent_never_stalls() -> None:
    rule = SafeguardedRule()
    learning_rates = [1e-6]
    state = replace(STARTED_LONG_AGO, lr=1e-6)
    while state.lr < 1.0:
        state = rule.decide(state, 1.0, CONCAVE).state
        learning_rates.append(state.lr)
    assert len(learning_rates) <= 2 + math.log(1e6) / math.log(1.1)


def test_growth_on_concave_descent_ends_at_lr_max() -> None:
    rule = SafeguardedRule(lr_max=0.25)
    [*_, last] = decide_all(rule, replace(STARTED_LONG_AGO, lr=0.01), [(1.0, CONCAVE)] * 100)
    assert last.state.lr == 0.25


def test_descent_without_measurable_curvature_counts_as_concave() -> None:
    parabola = Parabola(1.0, slope=3.0, curvature=0.5, slope_noise=0.1, curvature_noise=1.0)
    assert SafeguardedRule().decide(STARTED_LONG_AGO, 1.0, parabola).status is ProbeStatus.CONCAVE


@pytest.mark.parametrize("slope", [-0.9, 0.0, 0.9])
@pytest.mark.parametrize("curvature", [-0.9, 0.0, 0.9])
def test_slope_and_curvature_that_rounding_explains_keep_the_learning_rate(slope: float, curvature: float) -> None:
    parabola = Parabola(1.0, slope, curvature, slope_noise=1.0, curvature_noise=1.0)
    decision = SafeguardedRule().decide(STARTED_LONG_AGO, 1.0, parabola)
    assert decision.status is ProbeStatus.BELOW_NOISE
    assert decision.state.lr == 1.0


@pytest.mark.parametrize(("slope", "curvature"), [(-3.0, -2.0), (-3.0, 0.0), (0.0, -2.0)])
def test_parabola_without_a_minimum_ahead_keeps_the_learning_rate(slope: float, curvature: float) -> None:
    decision = SafeguardedRule().decide(STARTED_LONG_AGO, 1.0, Parabola(1.0, slope, curvature))
    assert decision.status is ProbeStatus.NO_MINIMUM
    assert decision.state.lr == 1.0


def test_convex_ascent_shrinks_the_learning_rate() -> None:
    decision = SafeguardedRule().decide(STARTED_LONG_AGO, 1.0, Parabola(1.0, slope=-3.0, curvature=2.0))
    assert decision.status is ProbeStatus.FITTED
    assert decision.state.lr == pytest.approx(0.95)  # 0.9 · 1 + 0.1 · 0.5


def test_unusually_high_losses_take_a_lower_optimum_at_once_and_do_not_grow() -> None:
    rule = SafeguardedRule()
    state = replace(settled(rule, loss=1.0, deviation=0.1), loss_start=10.0)
    low = Parabola(value=1.0, slope=0.6, curvature=1.0)
    assert rule.decide(state, 1.05, low).state.lr == pytest.approx(0.9 + 0.1 * 0.6)
    assert rule.decide(state, 1.2, low).state.lr == 0.6
    assert rule.decide(state, 1.2, Parabola(1.0, -3.0, 1.0)).state.lr == 0.5  # at most by max_change
    assert rule.decide(state, 1.05, CONCAVE).status is ProbeStatus.CONCAVE
    held = rule.decide(state, 1.2, CONCAVE)
    assert (held.status, held.state.lr) == (ProbeStatus.NO_MINIMUM, 1.0)


def test_cut_or_grown_for_ever_the_learning_rate_stays_a_number_that_moves() -> None:
    rule = SafeguardedRule()
    down, up = STARTED_LONG_AGO, STARTED_LONG_AGO
    for _ in range(2000):
        down = rule.decide(down, 1.0, NOT_FINITE).state
        up = rule.decide(up, 1.0, CONCAVE).state
    assert (down.lr, up.lr) == (1e-30, 1e30)


# --- what is not finite ----------------------------------------------------------------------------------------------


def test_non_finite_probe_cuts_the_learning_rate_and_probes_again_at_the_next_step() -> None:
    rule = SafeguardedRule(max_change=4.0)
    decision = rule.decide(STARTED_LONG_AGO, 1.0, NOT_FINITE)
    assert decision.status is ProbeStatus.NON_FINITE_PROBE
    assert decision.state.lr == 0.25
    assert rule.is_probe_due(decision.state)


@pytest.mark.parametrize("rule", [PublishedRule(), SafeguardedRule()])
@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("found", [CONVEX, NOT_FINITE, StartSearch(0.5, (0.5,), (0.1,)), StartSearch(None, (), ())])
def test_non_finite_loss_changes_nothing_but_the_step_counter(rule: PublishedRule, loss: float, found: Found) -> None:
    state = settled(rule)
    decision = rule.decide(state, loss, found)
    assert decision.status is ProbeStatus.NON_FINITE_LOSS
    assert decision.state == replace(state, step=state.step + 1)
    assert rule.is_probe_due(decision.state)


def test_skipping_changes_nothing_but_the_step_counter() -> None:
    assert SafeguardedRule().skip(STARTED_LONG_AGO) == replace(STARTED_LONG_AGO, step=1001)


def test_restarting_averages_sets_the_learning_rate_and_keeps_the_start_and_the_schedule() -> None:
    rule = SafeguardedRule()
    state = rule.restart_averages(settled(rule), 0.125)
    assert state == replace(settled(rule), lr=0.125, loss_mean=0.0, loss_deviation=0.0, loss_count=0)
    assert not rule.needs_start(state)


# --- explosions ------------------------------------------------------------------------------------------------------


def test_explosion_cuts_the_learning_rate_and_probes_again_at_the_next_step() -> None:
    rule = SafeguardedRule(explosion=10.0, max_change=2.0)
    decision = rule.decide(settled(rule, loss=1.0, deviation=0.1), 2.1, CONVEX)
    assert decision.status is ProbeStatus.EXPLODED
    assert decision.state.lr == 0.5
    assert rule.is_probe_due(decision.state)


def test_loss_just_within_the_limit_has_not_exploded() -> None:
    rule = SafeguardedRule(explosion=10.0)
    assert rule.decide(settled(rule, loss=1.0, deviation=0.1), 1.9, CONVEX).status is ProbeStatus.FITTED


def test_explosion_is_noticed_even_where_the_probes_are_not_finite() -> None:
    rule = SafeguardedRule()
    assert rule.decide(settled(rule), 100.0, NOT_FINITE).status is ProbeStatus.EXPLODED


def test_loss_below_where_training_began_has_not_exploded() -> None:
    rule = SafeguardedRule()
    state = replace(settled(rule, loss=1.0, deviation=0.01), loss_start=5.0)
    assert rule.decide(state, 4.9, CONVEX).status is ProbeStatus.FITTED
    assert rule.decide(state, 5.1, CONVEX).status is ProbeStatus.EXPLODED


def test_few_losses_cannot_explode() -> None:
    rule = SafeguardedRule(smoothing=0.9)
    young = replace(settled(rule), loss_count=9)
    assert rule.decide(young, 100.0, CONVEX).status is ProbeStatus.FITTED


def test_explosion_can_be_turned_off() -> None:
    rule = SafeguardedRule(explosion=math.inf)
    assert rule.decide(settled(rule), 1e30, CONVEX).status is ProbeStatus.FITTED


def noisy_losses(level: float, spread: float) -> Iterator[float]:
    source = random.Random(0)
    while True:
        yield level + spread * source.uniform(-1.0, 1.0)


@pytest.mark.parametrize("level", [3.0, 100.0, 1e6])
def test_loss_that_stays_at_a_higher_level_is_cut_once(level: float) -> None:
    rule = SafeguardedRule()
    before = [(loss, CONVEX) for loss in islice(noisy_losses(1.0, 0.1), 50)]
    after = [(loss, CONVEX) for loss in islice(noisy_losses(level, 0.1), 200)]
    decisions = decide_all(rule, replace(STARTED_LONG_AGO, loss_start=1.0), before + after)
    exploded = [index for index, decision in enumerate(decisions) if decision.status is ProbeStatus.EXPLODED]
    assert exploded == [50]
    assert decisions[-1].state.lr == pytest.approx(1.5, rel=0.01)  # back at the optimum


def test_second_explosion_is_noticed_when_the_first_is_digested() -> None:
    rule = SafeguardedRule()
    seen = [(loss, CONVEX) for level in (1.0, 10.0, 100.0) for loss in islice(noisy_losses(level, 0.1), 100)]
    decisions = decide_all(rule, replace(STARTED_LONG_AGO, loss_start=1.0), seen)
    assert [i for i, decision in enumerate(decisions) if decision.status is ProbeStatus.EXPLODED] == [100, 200]


@pytest.mark.parametrize("smoothing", [0.0, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("explosion", [1.0, 3.0, 10.0])
def test_cuts_end_however_sensitive_the_rule(smoothing: float, explosion: float) -> None:
    rule = SafeguardedRule(smoothing=smoothing, explosion=explosion)
    calm = [(loss, CONVEX) for loss in islice(noisy_losses(1.0, 0.1), 300)]
    decisions = decide_all(rule, replace(STARTED_LONG_AGO, loss_start=1.0), [*calm, *[(1000.0, CONVEX)] * 1000])
    assert decisions[300].status is ProbeStatus.EXPLODED
    assert all(decision.status is ProbeStatus.FITTED for decision in decisions[-300:])


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


@pytest.mark.parametrize("rule", [PublishedRule(), SafeguardedRule()])
@given(seed=st.integers(0, 10**6), factor=st.floats(1e-6, 1e6), shift=st.floats(-100.0, 100.0))
def test_shifting_and_scaling_the_loss_changes_no_decision(
    rule: PublishedRule, seed: int, factor: float, shift: float
) -> None:
    def changed(loss: float) -> float:
        return factor * (loss + shift)

    seen = seen_in_training(seed)
    other = [
        (changed(loss), Parabola(changed(it.value), factor * it.slope, factor * it.curvature)) for loss, it in seen
    ]
    expected = decide_all(rule, replace(STARTED_LONG_AGO, loss_start=5.0), seen)
    decisions = decide_all(rule, replace(STARTED_LONG_AGO, loss_start=changed(5.0)), other)
    assert [decision.status for decision in decisions] == [decision.status for decision in expected]
    assert [decision.state.lr for decision in decisions] == pytest.approx([it.state.lr for it in expected], rel=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_the_losses_of_these_trainings_do_explode(seed: int) -> None:
    decisions = decide_all(SafeguardedRule(), replace(STARTED_LONG_AGO, loss_start=5.0), seen_in_training(seed))
    assert ProbeStatus.EXPLODED in {decision.status for decision in decisions}


# --- limits and options ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule_type", [PublishedRule, SafeguardedRule])
def test_learning_rate_stays_within_its_limits(rule_type: type[PublishedRule]) -> None:
    rule = rule_type(lr_min=0.99, lr_max=1.01)
    assert rule.decide(STARTED_LONG_AGO, 1.0, Parabola(1.0, 100.0, 1.0)).state.lr == 1.01
    assert rule.decide(STARTED_LONG_AGO, 1.0, Parabola(1.0, 0.001, 1.0)).state.lr == 0.99


def test_start_and_cuts_stay_within_the_limits() -> None:
    rule = SafeguardedRule(lr_min=0.1, lr_max=0.2, start_fraction=1.0)
    assert rule.decide(ControlState(lr=0.15), 1.0, StartSearch(1e6, (), ())).state.lr == 0.2
    assert rule.decide(ControlState(lr=0.15), 1.0, StartSearch(1e-6, (), ())).state.lr == 0.1
    assert rule.decide(replace(STARTED_LONG_AGO, lr=0.1), 1.0, NOT_FINITE).state.lr == 0.1
    assert rule.decide(replace(settled(rule), lr=0.1), 100.0, CONVEX).state.lr == 0.1


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
SAFEGUARDED_MISTAKES = [
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
]


@pytest.mark.parametrize(("option", "value"), PUBLISHED_MISTAKES)
@pytest.mark.parametrize("rule", ["published", "safeguarded"])
def test_mistaken_option_is_named_with_what_came(rule: str, option: str, value: object) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"{option} must be .*got {value!r}"):
        make_rule(rule, **{option: value})


@pytest.mark.parametrize(("option", "value"), SAFEGUARDED_MISTAKES)
def test_mistaken_option_of_the_safeguarded_rule_is_named(option: str, value: object) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"{option} must be .*got {value!r}"):
        make_rule("safeguarded", **{option: value})


def test_limits_that_cross_are_refused_with_both_values() -> None:
    with pytest.raises(ValueError, match=r"lr_max must be at least lr_min \(0\.1\), got 0\.05"):
        PublishedRule(lr_min=0.1, lr_max=0.05)


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
    ],
)
def test_options_at_the_edge_of_their_range_are_taken(options: dict[str, float]) -> None:
    taken = asdict(make_rule("safeguarded", **options))
    assert options.items() <= taken.items()


def test_unknown_rule_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="rule must be one of 'published', 'safeguarded', got 'newton'"):
        make_rule("newton")


def test_rules_take_the_options_that_they_have() -> None:
    options = {"period": 3, "burn_in": 5}
    assert make_rule("published", **options) == PublishedRule(period=3)
    assert make_rule("safeguarded", **options) == SafeguardedRule(period=3, burn_in=5)


# --- replay ----------------------------------------------------------------------------------------------------------


def train_on_quadratic(rule: PublishedRule) -> tuple[list[tuple[float, Found] | None], list[float]]:
    """What a rule saw at each step of gradient descent on x² · 3 / 2, None at lazy ones, and its learning rates."""
    x, state = 10.0, ControlState(lr=1e-3)
    seen: list[tuple[float, Found] | None] = []
    learning_rates = []
    for _ in range(60):
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


@pytest.mark.parametrize("name", ["published", "safeguarded"])
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


def test_safeguarded_rule_finds_the_optimum_of_a_quadratic() -> None:
    _, learning_rates = train_on_quadratic(SafeguardedRule(period=1, smoothing=0.5))
    assert learning_rates[-1] == pytest.approx(1 / 3, rel=1e-3)
