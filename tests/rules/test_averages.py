"""Moving averages of losses and parabolas, and what they estimate."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gen_optim.rules import Parabola, averages
from gen_optim.rules.averages import LossAverages, ParabolaAverages, is_settled


def of_losses(losses: list[float], smoothing: float = 0.9) -> LossAverages:
    result = LossAverages()
    for loss in losses:
        result = result.with_loss(loss, smoothing)
    return result


def of_parabolas(parabolas: list[Parabola], lr: float = 1.0, rise: float = 0.0, smoothing: float = 0.9):
    result = ParabolaAverages()
    for parabola in parabolas:
        result = result.with_parabola(parabola, lr, rise, smoothing)
    return result


# --- losses ----------------------------------------------------------------------------------------------------------


def test_first_losses_are_averaged_with_equal_weights() -> None:
    losses = [3.0, 1.0, 4.0, 1.0, 5.0]
    assert of_losses(losses).mean == pytest.approx(np.mean(losses))
    assert of_losses(losses).count == 5


def test_later_losses_take_the_weight_that_smoothing_leaves() -> None:
    before = of_losses([1.0] * 50)
    after = before.with_loss(11.0, 0.9)
    assert after.mean == pytest.approx(2.0)
    assert after.deviation == pytest.approx(0.9 * before.deviation + 0.1 * 10.0)


def test_without_smoothing_the_last_loss_is_the_mean() -> None:
    assert of_losses([5.0, 1.0, 7.0], smoothing=0.0).mean == 7.0


def test_one_loss_deviates_from_nothing() -> None:
    averages = of_losses([5.0])
    assert (averages.mean, averages.deviation) == (5.0, 0.0)


def test_losses_are_settled_from_the_count_on_that_smoothing_averages() -> None:
    assert not is_settled(9, 0.9)
    assert is_settled(11, 0.9)
    assert not is_settled(1, 0.5)
    assert is_settled(2, 0.5)
    assert not is_settled(0, 0.0)
    assert is_settled(1, 0.0)


@given(st.lists(st.floats(-100.0, 100.0), min_size=1, max_size=50), st.floats(1e-3, 1e3), st.floats(-100.0, 100.0))
def test_averages_of_losses_shift_and_scale_with_the_loss(losses: list[float], factor: float, shift: float) -> None:
    plain, other = of_losses(losses), of_losses([factor * (loss + shift) for loss in losses])
    assert other.mean == pytest.approx(factor * (plain.mean + shift), rel=1e-9, abs=1e-9 * factor)
    assert other.deviation == pytest.approx(factor * plain.deviation, rel=1e-6, abs=1e-9 * factor)


# --- parabolas -------------------------------------------------------------------------------------------------------


def test_one_parabola_is_averaged_in_units_of_its_change() -> None:
    result = of_parabolas([Parabola(1.0, slope=3.0, curvature=-4.0)], lr=0.5, rise=0.25)
    assert result.change == 3.0 * 0.5 + 4.0 * 0.25
    assert result.slope * result.change == pytest.approx(3.0)
    assert result.curvature * result.change == pytest.approx(-4.0)
    assert result.first_order == pytest.approx(1.5 / 2.5)
    assert result.first_order_square == pytest.approx((1.5 / 2.5) ** 2)
    assert (result.rise, result.count, result.weight, result.lr) == (0.25, 1, 1.0, 0.5)


@pytest.mark.parametrize("parabola", [Parabola(1.0, 0.0, 0.0), Parabola(1.0, 1e308, 1e308), Parabola(1.0, 0.0, 5e-324)])
def test_a_parabola_without_a_measurable_change_teaches_nothing(parabola: Parabola) -> None:
    before = of_parabolas([Parabola(1.0, 1.0, 1.0)] * 3)
    assert before.with_parabola(parabola, 0.1 if parabola.slope == 0.0 else 10.0, 0.0, 0.9) is before
    assert before.with_parabola(Parabola(1.0, 1.0, 1.0), 0.0, 0.0, 0.9) is before


def test_earlier_parabolas_count_less_the_more_the_learning_rate_has_grown() -> None:
    before = of_parabolas([Parabola(1.0, 1.0, 1.0)] * 30)
    same, ten_times, a_tenth = (before.with_parabola(Parabola(1.0, 1.0, 1.0), lr, 0.0, 0.9) for lr in (1.0, 10.0, 0.1))
    assert same.weight == a_tenth.weight == 1.0 + 0.9 * before.weight
    assert ten_times.weight == pytest.approx(1.0 + 0.9 * before.weight / 100.0)


def test_a_parabola_counts_as_two_changes_at_most() -> None:
    before = of_parabolas([Parabola(1.0, 1.0, 1.0)] * 30)
    after = before.with_parabola(Parabola(1.0, 0.0, -1e6), 1.0, 0.0, 0.9)
    last = after.curvature * after.weight - before.curvature * (after.weight - 1.0)
    assert last == pytest.approx(-averages._MOST_CHANGES)


def test_the_average_change_follows_faster_than_the_others() -> None:
    before = of_parabolas([Parabola(1.0, 1.0, 0.0)] * 30)
    after = before.with_parabola(Parabola(1.0, 2.0, 0.0), 1.0, 0.0, 0.9)
    assert after.change == pytest.approx(1.0 + averages._CHANGE_WEIGHT)


@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_mean_slope_over_mean_curvature_scales_as_one_over_the_unit_of_learning_rate(loss: float, unit: float) -> None:
    source = np.random.default_rng(0)
    pairs = source.normal(0.5, 1.0, (30, 2)).tolist()
    plain = of_parabolas([Parabola(0.0, slope, curvature) for slope, curvature in pairs])
    other = of_parabolas([Parabola(0.0, loss * a / unit, loss * b / unit**2) for a, b in pairs], lr=unit)
    assert other.slope / other.curvature == pytest.approx(unit * plain.slope / plain.curvature, rel=1e-6)
    assert other.signal_fraction(0.9) == pytest.approx(plain.signal_fraction(0.9))


# --- signal fraction -------------------------------------------------------------------------------------------------


def test_signal_fraction_is_one_if_all_slopes_agree_and_zero_if_they_cancel() -> None:
    agreeing = of_parabolas([Parabola(1.0, 1.0, 1.0)] * 30)
    assert agreeing.signal_fraction(0.9) == pytest.approx(1.0)
    cancelling = of_parabolas([Parabola(1.0, (-1.0) ** index, 1.0) for index in range(30)])
    assert cancelling.signal_fraction(0.9) == 0.0


def test_signal_fraction_of_one_slope_is_zero() -> None:
    assert ParabolaAverages().signal_fraction(0.9) == 0.0
    assert of_parabolas([Parabola(1.0, 1.0, 1.0)]).signal_fraction(0.9) == 0.0
    assert of_parabolas([Parabola(1.0, 1.0, 1.0)] * 30, smoothing=0.0).signal_fraction(0.0) == 0.0


def test_signal_fraction_of_pure_noise_is_small_on_average() -> None:
    source = np.random.default_rng(0)
    fractions = []
    for _ in range(200):
        noise = [Parabola(1.0, slope, 1.0) for slope in source.normal(0.0, 1.0, 40).tolist()]
        fractions.append(of_parabolas(noise).signal_fraction(0.9))
    assert all(0.0 <= each <= 1.0 for each in fractions)
    assert np.mean(fractions) < 0.1


# --- steps that raise the loss ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parabola", "ascends"),
    [
        (Parabola(1.0, 1.0, 1.0), False),
        (Parabola(1.0, 1.0, 2.1), True),  # it descends at first, and ends higher
        (Parabola(1.0, -1.0, -1.9), True),
        (Parabola(1.0, -1.0, -2.1), False),
    ],
)
def test_whether_steps_raise_the_loss_depends_on_where_they_end(parabola: Parabola, ascends: bool) -> None:
    assert of_parabolas([parabola] * 30).ascends(0.9) is ascends


def test_noise_seldom_counts_as_steps_that_raise_the_loss() -> None:
    assert not ParabolaAverages().ascends(0.9)
    assert not of_parabolas([Parabola(1.0, -1.0, 1.0)]).ascends(0.9)
    source, found = np.random.default_rng(0), []
    for _ in range(400):
        noise = [Parabola(1.0, slope, 1e-3) for slope in source.normal(0.0, 1.0, 40).tolist()]
        found.append(of_parabolas(noise).ascends(0.9))
    assert 0.0 < np.mean(found) < 0.05
