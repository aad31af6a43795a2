"""Each safeguard of the relaxed rule, and their order."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from gen_optim.rules import Parabola, ProbeStatus, safeguards
from gen_optim.rules.averages import LossAverages, ParabolaAverages
from gen_optim.rules.relaxed import RelaxedRule, RelaxedState
from gen_optim.rules.safeguards import has_exploded, is_below_noise, is_contradicted, is_diverging, rises_unusually
from tests.rules.cases import CONVEX, NOT_FINITE

USUAL = ParabolaAverages(rise=0.1, count=100)
CALM = LossAverages(mean=1.0, deviation=0.1, count=100)
FLAT = Parabola(1.0, 0.5, 0.5, slope_noise=1.0, curvature_noise=1.0)


# --- diverging step --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_end", [math.nan, math.inf, -math.inf])
def test_a_step_to_a_loss_that_is_not_finite_diverges(loss_end: float) -> None:
    assert is_diverging(ParabolaAverages(), 1.0, loss_end, loss_initial=10.0, descent_initial=0.0)


def test_a_step_diverges_that_raises_the_loss_by_far_more_than_usual() -> None:
    usual = safeguards._UNUSUAL * USUAL.rise
    assert not is_diverging(USUAL, 1.0, 1.0 + 0.99 * usual, loss_initial=1.0, descent_initial=0.0)
    assert is_diverging(USUAL, 1.0, 1.0 + 1.01 * usual, loss_initial=1.0, descent_initial=0.0)


def test_a_step_to_below_where_training_began_does_not_diverge_however_far_the_loss_rises() -> None:
    assert not is_diverging(USUAL, 1.0, 49.0, loss_initial=50.0, descent_initial=0.0)
    assert rises_unusually(USUAL, 1.0, 49.0, descent_initial=0.0)
    assert is_diverging(USUAL, 1.0, 51.0, loss_initial=50.0, descent_initial=0.0)


def test_before_the_first_parabola_the_descent_that_the_search_has_found_is_the_usual_change() -> None:
    descent = 2.0
    usual = safeguards._UNUSUAL * descent
    first = ParabolaAverages()
    assert not is_diverging(first, 1.0, 1.0 + 0.99 * usual, loss_initial=1.0, descent_initial=descent)
    assert is_diverging(first, 1.0, 1.0 + 1.01 * usual, loss_initial=1.0, descent_initial=descent)
    assert is_diverging(replace(USUAL, count=1), 1.0, 1.0 + 0.99 * usual, loss_initial=1.0, descent_initial=descent)
    assert not is_diverging(first, 1.0, 1e6, loss_initial=1.0, descent_initial=0.0)  # unknown


def test_a_rise_within_rounding_does_not_diverge() -> None:
    silent = replace(USUAL, rise=0.0)
    assert not is_diverging(silent, 1.0, 1.0 + 2.0**-22, loss_initial=0.0, descent_initial=0.0)
    assert is_diverging(silent, 1.0, 1.0 + 2.0**-18, loss_initial=0.0, descent_initial=0.0)


# --- explosion -------------------------------------------------------------------------------------------------------


def test_a_loss_explodes_by_deviations_above_the_mean() -> None:
    assert not has_exploded(CALM, 1.0 + 0.9 * safeguards._EXPLOSION * 0.1, loss_initial=1.0)
    assert has_exploded(CALM, 1.0 + 1.1 * safeguards._EXPLOSION * 0.1, loss_initial=1.0)


def test_a_loss_below_where_training_began_does_not_explode() -> None:
    assert not has_exploded(CALM, 4.9, loss_initial=5.0)
    assert has_exploded(CALM, 5.1, loss_initial=5.0)


def test_a_rise_within_rounding_does_not_explode() -> None:
    constant = replace(CALM, deviation=0.0)
    assert not has_exploded(constant, 1.0 + 9 * 2.0**-20, loss_initial=0.0)
    assert has_exploded(constant, 1.0 + 11 * 2.0**-20, loss_initial=0.0)


# --- noise -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slope", "curvature", "expected"),
    [(0.9, 0.9, True), (-1.0, 1.0, True), (1.1, 0.9, False), (0.9, -1.1, False), (math.nan, 0.0, False)],
)
def test_a_parabola_is_noise_if_rounding_explains_slope_and_curvature(
    slope: float, curvature: float, expected: bool
) -> None:
    assert is_below_noise(replace(FLAT, slope=slope, curvature=curvature)) is expected


# --- contradiction ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"own_target": 1.01}, False),  # it does not call for less
        ({"own_target": 0.0}, False),
        ({"own_target": math.inf}, False),
        ({"target": 0.99}, False),  # the averages do not call for more
        ({"target": math.inf}, True),
    ],
)
def test_a_parabola_contradicts_averages_that_call_for_more(changes: dict[str, Any], expected: bool) -> None:
    case: dict[str, Any] = {"target": 1.01, "own_target": 0.99, "taken": 1.0}
    assert is_contradicted(**{**case, **changes}) is expected


# --- the order -------------------------------------------------------------------------------------------------------


def fired(
    parabola: Parabola, loss_start: float = 1.0, loss_end: float | None = None, losses: LossAverages = CALM
) -> ProbeStatus:
    state = RelaxedState(lr=1.0, started=True, loss_initial=1.0, loss=losses, parabola=USUAL)
    return RelaxedRule().decide(state, parabola, loss_start=loss_start, loss_end=loss_end).status


def test_the_first_safeguard_that_fires_gives_the_status() -> None:
    assert fired(NOT_FINITE, loss_start=100.0, loss_end=200.0) is ProbeStatus.REVERTED
    assert fired(NOT_FINITE, loss_start=100.0, loss_end=100.0) is ProbeStatus.EXPLODED
    assert fired(NOT_FINITE, loss_end=1.0) is ProbeStatus.NON_FINITE_PROBE
    assert fired(FLAT, loss_end=1.0) is ProbeStatus.BELOW_NOISE
    assert fired(CONVEX, loss_end=1.0) is ProbeStatus.FITTED


def test_a_step_that_is_not_taken_yet_cannot_diverge() -> None:
    assert fired(CONVEX, loss_end=None) is ProbeStatus.FITTED
    assert fired(CONVEX, loss_end=math.nan) is ProbeStatus.REVERTED


def test_few_losses_cannot_explode() -> None:
    assert fired(CONVEX, loss_start=100.0, losses=replace(CALM, count=5)) is ProbeStatus.FITTED
    assert fired(CONVEX, loss_start=100.0, losses=replace(CALM, count=11)) is ProbeStatus.EXPLODED
