import math
import sys
from itertools import permutations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gen_optim.rules.parabola import Parabola, fit_parabola

EPSILON = sys.float_info.epsilon

scales = st.floats(-12.0, 6.0).map(lambda exponent: 10.0**exponent)
# Far from where floats have fewer digits, which a factor could lead to.
coefficients = st.floats(-100.0, 100.0).map(lambda number: number if abs(number) > 1e-200 else 0.0)
multiples = st.lists(st.integers(-8, 8), min_size=3, max_size=8, unique=True)
whole_losses = st.integers(-(2**40), 2**40).map(float)
any_float = st.floats(allow_nan=True, allow_infinity=True)


def quadratic(value: float, slope: float, curvature: float, multiple: float) -> float:
    return value - slope * multiple + 0.5 * curvature * multiple * multiple


@given(scales, multiples, coefficients, coefficients, coefficients)
def test_fit_is_exact_on_quadratics(
    scale: float, points: list[int], value: float, slope: float, curvature: float
) -> None:
    losses = [quadratic(value, slope, curvature, point) for point in points]
    parabola = fit_parabola([scale * point for point in points], losses)
    error = 1e-9 * max(map(abs, losses))
    assert parabola.value == pytest.approx(value, rel=1e-9, abs=error)
    assert parabola.slope * scale == pytest.approx(slope, rel=1e-9, abs=error)
    assert parabola.curvature * scale * scale == pytest.approx(curvature, rel=1e-9, abs=error)
    assert parabola.is_finite


@given(scales, coefficients, st.floats(0.01, 100.0))
def test_fitted_optimum_is_the_lowest_point_of_a_convex_quadratic(scale: float, slope: float, curvature: float) -> None:
    losses = [quadratic(3.0, slope, curvature, point) for point in (-1, 0, 1)]
    optimum = fit_parabola([-scale, 0.0, scale], losses).optimal_lr
    assert optimum is not None
    assert optimum / scale == pytest.approx(slope / curvature, rel=1e-8, abs=1e-8)


@given(scales, coefficients, coefficients, coefficients)
def test_three_symmetric_points_give_the_closed_formulas(lr: float, behind: float, here: float, ahead: float) -> None:
    parabola = fit_parabola([-lr, 0.0, lr], [behind, here, ahead])
    error = 32 * EPSILON * max(abs(behind), abs(here), abs(ahead))
    assert parabola.value == pytest.approx(here, rel=0, abs=error)
    assert parabola.slope == pytest.approx((behind - ahead) / (2 * lr), rel=1e-12, abs=error / lr)
    assert parabola.curvature == pytest.approx((behind - 2 * here + ahead) / lr**2, rel=1e-12, abs=error / lr**2)


def test_closed_formulas_on_numbers_worked_out_by_hand() -> None:
    parabola = fit_parabola([-0.5, 0.0, 0.5], [4.0, 1.0, 0.0])
    assert parabola.slope == pytest.approx(4.0)  # (4 − 0) / 1
    assert parabola.curvature == pytest.approx(8.0)  # (4 − 2 + 0) / 0.25
    assert parabola.optimal_lr == pytest.approx(0.5)


def test_more_than_three_points_are_fitted_by_least_squares() -> None:
    # Residuals of (1, −3, 3, −1) are orthogonal to every parabola through four equidistant points.
    points = [0.0, 1.0, 2.0, 3.0]
    losses = [point**2 + residual for point, residual in zip(points, (1.0, -3.0, 3.0, -1.0), strict=True)]
    parabola = fit_parabola(points, losses)
    assert parabola.value == pytest.approx(0.0, abs=1e-12)
    assert parabola.slope == pytest.approx(0.0, abs=1e-12)
    assert parabola.curvature == pytest.approx(2.0)


@given(scales, multiples, st.data())
def test_shifting_the_loss_shifts_the_value_alone(scale: float, points: list[int], data: st.DataObject) -> None:
    losses = data.draw(st.lists(whole_losses, min_size=len(points), max_size=len(points)))
    shift = data.draw(whole_losses)  # whole numbers, so that the shift itself does not round
    learning_rates = [scale * point for point in points]
    parabola = fit_parabola(learning_rates, losses)
    shifted = fit_parabola(learning_rates, [loss + shift for loss in losses])
    assert shifted.slope == parabola.slope
    assert shifted.curvature == parabola.curvature
    assert shifted.optimal_lr == parabola.optimal_lr
    assert shifted.value == pytest.approx(parabola.value + shift, rel=1e-9, abs=1e-3)


@given(multiples, st.floats(1e-9, 1e9), st.data())
def test_scaling_the_loss_scales_all_but_the_optimum(points: list[int], factor: float, data: st.DataObject) -> None:
    losses = data.draw(st.lists(coefficients, min_size=len(points), max_size=len(points)))
    parabola = fit_parabola(points, losses, rounding=1e-7)
    scaled = fit_parabola(points, [factor * loss for loss in losses], rounding=1e-7)
    error = 1e-12 * factor * max(map(abs, losses))
    assert scaled.slope == pytest.approx(factor * parabola.slope, rel=1e-9, abs=error)
    assert scaled.curvature == pytest.approx(factor * parabola.curvature, rel=1e-9, abs=error)
    assert scaled.slope_noise == pytest.approx(factor * parabola.slope_noise)
    assert scaled.curvature_noise == pytest.approx(factor * parabola.curvature_noise)


@given(multiples, scales, st.data())
def test_scaling_the_learning_rates_scales_the_optimum(points: list[int], scale: float, data: st.DataObject) -> None:
    losses = data.draw(st.lists(coefficients, min_size=len(points), max_size=len(points)))
    parabola = fit_parabola(points, losses, rounding=1e-7)
    scaled = fit_parabola([scale * point for point in points], losses, rounding=1e-7)
    error = 1e-11 * max(map(abs, losses))
    assert scaled.value == pytest.approx(parabola.value, rel=1e-9, abs=error)
    assert scaled.slope * scale == pytest.approx(parabola.slope, rel=1e-9, abs=error)
    assert scaled.curvature * scale * scale == pytest.approx(parabola.curvature, rel=1e-9, abs=error)
    assert scaled.slope_noise * scale == pytest.approx(parabola.slope_noise)
    assert scaled.curvature_noise * scale * scale == pytest.approx(parabola.curvature_noise)


def test_order_of_the_points_does_not_matter() -> None:
    pairs = [(-1.0, 5.0), (0.5, 2.0), (2.0, 3.0)]
    fits = [fit_parabola(*zip(*order, strict=True)) for order in permutations(pairs)]
    for fit in fits:
        assert (fit.value, fit.slope, fit.curvature) == pytest.approx((fits[0].value, fits[0].slope, fits[0].curvature))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_non_finite_loss_makes_a_parabola_that_says_so(bad: float, position: int) -> None:
    losses = [4.0, 1.0, 0.0]
    losses[position] = bad
    parabola = fit_parabola([-1.0, 0.0, 1.0], losses, rounding=1e-7)
    assert not parabola.is_finite
    assert parabola.optimal_lr is None
    assert all(map(math.isnan, (parabola.value, parabola.slope, parabola.curvature)))


@given(st.lists(any_float, min_size=3, max_size=3), st.floats(0.0, 1.0))
@example([sys.float_info.max, -sys.float_info.max, sys.float_info.max], 1.0)
@example([5e-324, 0.0, -5e-324], 1.0)
def test_no_losses_whatsoever_raise_or_warn(losses: list[float], rounding: float) -> None:
    parabola = fit_parabola([-0.1, 0.0, 0.1], losses, rounding=rounding)
    if not all(map(math.isfinite, losses)):
        assert not parabola.is_finite
    assert parabola.optimal_lr is None or math.isfinite(parabola.optimal_lr)
    parabola.predict(0.1)


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=3, max_size=6, unique=True), st.data())
@example([-5e-324, 0.0, 5e-324], None)
@example([-sys.float_info.max, 0.0, sys.float_info.max], None)
@example([0.0, 1e-300, 1.0], None)
def test_no_learning_rates_whatsoever_raise_or_warn(learning_rates: list[float], data: st.DataObject | None) -> None:
    size = len(learning_rates)
    losses = [1e300, -1.0, 1e300] if data is None else data.draw(st.lists(any_float, min_size=size, max_size=size))
    parabola = fit_parabola(learning_rates, losses, rounding=1e-3)
    assert parabola.optimal_lr is None or math.isfinite(parabola.optimal_lr)


@pytest.mark.parametrize("learning_rates", [[], [0.0], [0.0, 1.0], [1.0, 1.0, 0.0], [0.0, -0.0, 0.0, 1.0]])
def test_fewer_than_three_distinct_learning_rates_are_refused(learning_rates: list[float]) -> None:
    with pytest.raises(ValueError, match="learning_rates must hold at least three distinct finite numbers"):
        fit_parabola(learning_rates, [1.0] * len(learning_rates))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_learning_rate_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="learning_rates must hold at least three distinct finite numbers"):
        fit_parabola([bad, -1.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0])


def test_duplicates_beside_three_distinct_learning_rates_are_averaged() -> None:
    parabola = fit_parabola([-1.0, 0.0, 0.0, 1.0], [4.0, 0.0, 2.0, 0.0])
    assert parabola.value == pytest.approx(1.0)
    assert parabola.slope == pytest.approx(2.0)
    assert parabola.curvature == pytest.approx(2.0)


@pytest.mark.parametrize(("learning_rates", "losses"), [([-1, 0, 1], [1, 2]), ([-1, 0, 1], [1, 2, 3, 4]), ([], [1])])
def test_unequal_lengths_are_refused_with_both_named(learning_rates: list[float], losses: list[float]) -> None:
    message = f"got {len(learning_rates)} learning rates and {len(losses)} losses"
    with pytest.raises(ValueError, match=message):
        fit_parabola(learning_rates, losses)


def test_a_straight_line_has_no_curvature() -> None:
    parabola = fit_parabola([-1.0, 0.0, 1.0], [2.0, 1.0, 0.0])
    assert parabola.curvature == pytest.approx(0.0, abs=1e-14)
    assert parabola.slope == pytest.approx(1.0)


@pytest.mark.parametrize("losses", [[0.0, 0.0, 0.0], [1.0, 2.0, 1.0], [0.0, 1.0, 0.5]])
def test_flat_and_concave_parabolas_have_no_optimum(losses: list[float]) -> None:
    parabola = fit_parabola([-1.0, 0.0, 1.0], losses)
    assert parabola.curvature <= 0
    assert parabola.is_finite
    assert parabola.optimal_lr is None


def test_ascending_direction_has_a_negative_optimum() -> None:
    parabola = fit_parabola([-1.0, 0.0, 1.0], [0.0, 1.0, 4.0])
    assert parabola.slope == pytest.approx(-2.0)
    assert parabola.optimal_lr == pytest.approx(-1.0)


def test_optimum_that_overflows_is_none() -> None:
    assert Parabola(0.0, 1e300, 1e-300).optimal_lr is None


def test_optimum_of_a_parabola_that_is_not_finite_is_none() -> None:
    assert Parabola(math.nan, 1.0, 1.0).optimal_lr is None
    assert Parabola(0.0, math.inf, 1.0).optimal_lr is None
    assert Parabola(0.0, 1.0, math.inf).optimal_lr is None


@given(coefficients, coefficients, st.floats(0.01, 100.0), st.floats(-10.0, 10.0))
def test_no_prediction_is_below_that_at_the_optimum(value: float, slope: float, curvature: float, lr: float) -> None:
    parabola = Parabola(value, slope, curvature)
    assert parabola.optimal_lr is not None
    lowest = parabola.predict(parabola.optimal_lr)
    assert lowest == pytest.approx(value - slope**2 / (2 * curvature), rel=1e-9, abs=1e-9)
    assert parabola.predict(lr) >= lowest - 1e-9 * (1 + abs(lowest))


@given(scales, coefficients, coefficients, coefficients, st.floats(1e-20, 0.1))
def test_noise_is_that_of_the_closed_formulas(
    lr: float, behind: float, here: float, ahead: float, rounding: float
) -> None:
    parabola = fit_parabola([-lr, 0.0, lr], [behind, here, ahead], rounding=rounding)
    largest = max(abs(behind), abs(here), abs(ahead))
    assert parabola.curvature_noise == pytest.approx(4 * rounding * largest / lr**2, rel=1e-9, abs=0)
    assert parabola.slope_noise == pytest.approx(rounding * largest / lr, rel=1e-9, abs=0)


def test_without_rounding_there_is_no_noise() -> None:
    parabola = fit_parabola([-1.0, 0.0, 1.0], [4.0, 1.0, 0.0])
    assert parabola.slope_noise == 0.0
    assert parabola.curvature_noise == 0.0


@given(scales, multiples, st.floats(1e-8, 1e-2), st.data())
def test_rounded_losses_stay_within_the_noise(
    scale: float, points: list[int], rounding: float, data: st.DataObject
) -> None:
    size = len(points)
    losses = data.draw(st.lists(coefficients, min_size=size, max_size=size))
    errors = data.draw(st.lists(st.floats(-1.0, 1.0), min_size=size, max_size=size))
    learning_rates = [scale * point for point in points]
    rounded = [loss * (1 + rounding * error) for loss, error in zip(losses, errors, strict=True)]
    exact = fit_parabola(learning_rates, losses)
    noisy = fit_parabola(learning_rates, rounded, rounding=rounding)
    slack = 1.0 / (1.0 - rounding) + 1e-4  # the noise is relative to the rounded losses, themselves a little smaller
    assert abs(noisy.slope - exact.slope) <= slack * noisy.slope_noise
    assert abs(noisy.curvature - exact.curvature) <= slack * noisy.curvature_noise


def test_the_worst_rounding_reaches_the_noise() -> None:
    rounding = 1e-3
    flat = fit_parabola([-1.0, 0.0, 1.0], [1 + rounding, 1 - rounding, 1 + rounding], rounding=rounding)
    assert flat.curvature == pytest.approx(flat.curvature_noise, rel=2 * rounding)
    tilted = fit_parabola([-1.0, 0.0, 1.0], [1 + rounding, 1.0, 1 - rounding], rounding=rounding)
    assert tilted.slope == pytest.approx(tilted.slope_noise, rel=2 * rounding)
