import math
import random
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gen_optim.rules.initial_search import search_initial_lr

SCALES = [10.0**exponent for exponent in range(-12, 4)]
MOST_EVALUATIONS = 68
"""The powers of 4 from 4^−60, the first one below 1e-36, to 4^5, the largest; and two more."""


class Counted:
    """A loss along a direction, and how often it was evaluated."""

    def __init__(self, function: Callable[[float], float]) -> None:
        self.function = function
        self.calls = 0

    def __call__(self, learning_rate: float) -> float:
        self.calls += 1
        return self.function(learning_rate)


def assert_finds(optimum: float, function: Callable[[float], float], rounding: float = 1e-15) -> None:
    counted = Counted(function)
    search = search_initial_lr(counted, function(0.0), rounding=rounding)
    assert search.lr is not None
    assert optimum / 2 <= search.lr <= 2 * optimum
    assert counted.calls <= MOST_EVALUATIONS


@pytest.mark.parametrize("optimum", SCALES)
@pytest.mark.parametrize("height", [1e-3, 1.0, 1e3])
def test_start_finds_the_lowest_point_of_a_quadratic_at_any_scale(optimum: float, height: float) -> None:
    assert_finds(optimum, lambda lr: height * (lr / optimum - 1) ** 2)


@given(st.floats(-12.0, 3.0).map(lambda exponent: 10.0**exponent), st.floats(0.0, 100.0))
def test_start_finds_the_lowest_point_above_any_floor(optimum: float, floor: float) -> None:
    assert_finds(optimum, lambda lr: floor + (lr / optimum - 1) ** 2)


@pytest.mark.parametrize("optimum", SCALES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("edge", [1.2, 3.0, 100.0])
def test_start_finds_the_lowest_point_before_losses_that_are_not_finite(
    optimum: float, bad: float, edge: float
) -> None:
    assert_finds(optimum, lambda lr: (lr / optimum - 1) ** 2 if lr < edge * optimum else bad)


@pytest.mark.parametrize("optimum", [10.0**exponent for exponent in range(-9, 4)])
@pytest.mark.parametrize("distance", [30.0, 300.0, 3000.0])
def test_start_takes_the_first_minimum_and_not_a_lower_one_far_away(optimum: float, distance: float) -> None:
    def loss(lr: float) -> float:
        near = min((lr / optimum - 1) ** 2, 4.0)
        is_far = 0.3 * distance < lr / optimum < 3.0 * distance
        return near - 5.0 if is_far else near

    assert_finds(optimum, loss)


@pytest.mark.parametrize("optimum", SCALES)
def test_start_finds_the_lowest_point_under_float32_noise(optimum: float) -> None:
    source = random.Random(0)
    epsilon = float(np.finfo(np.float32).eps)

    def loss(lr: float) -> float:
        exact = 1.0 + min((lr / optimum - 1) ** 2, 1e30)
        return float(np.float32(exact * (1 + epsilon * source.uniform(-2.0, 2.0))))

    search = search_initial_lr(loss, 2.0, rounding=8 * epsilon)
    assert search.lr is not None
    assert optimum / 2 <= search.lr <= 2 * optimum


def test_start_says_all_that_it_evaluated() -> None:
    search = search_initial_lr(lambda lr: (lr - 0.01) ** 2, 1e-4, rounding=1e-12)
    assert search.losses == tuple((lr - 0.01) ** 2 for lr in search.learning_rates)
    assert len(set(search.learning_rates)) == len(search.learning_rates)
    assert search.lr in search.learning_rates


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda lr: 1.0, id="flat"),
        pytest.param(lambda lr: 1.0 + lr, id="ascending"),
        pytest.param(lambda lr: 1.0 + min(lr, 1e-3), id="ascending, then flat"),
        pytest.param(lambda lr: 1.0 + 1e-7 * math.sin(lr), id="noise"),
        pytest.param(lambda lr: math.nan if lr else 1.0, id="NaN"),
        pytest.param(lambda lr: math.inf if lr else 1.0, id="inf"),
        pytest.param(lambda lr: -math.inf if lr else 1.0, id="-inf"),
    ],
)
def test_start_finds_nothing_where_nothing_descends(function: Callable[[float], float]) -> None:
    counted = Counted(function)
    assert search_initial_lr(counted, 1.0, rounding=1e-6).lr is None
    assert counted.calls <= MOST_EVALUATIONS


def test_start_does_not_look_below_the_rounding() -> None:
    flat = search_initial_lr(lambda lr: 1.0, 1.0, rounding=1e-6)
    assert min(flat.learning_rates) >= 0.25
    steep = search_initial_lr(lambda lr: 1.0 - min(lr, 1e-3), 1.0, rounding=1e-6)
    assert min(steep.learning_rates) >= 1e-8


def test_start_walks_over_a_loss_that_rises_at_first() -> None:
    def loss(lr: float) -> float:
        return 1.001 if 0.0 < lr < 1e-12 else 1.0 - math.sqrt(lr) + 5.0 * lr  # lowest at 0.01, linear nowhere

    search = search_initial_lr(loss, 1.0, rounding=1e-6)
    assert search.lr is not None
    assert 0.005 <= search.lr <= 0.02


def test_start_on_a_loss_that_falls_for_ever_ends_at_the_largest_learning_rates() -> None:
    search = search_initial_lr(lambda lr: -lr, 0.0, rounding=1e-6)
    assert search.lr is not None
    assert search.lr >= 1024.0


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=100, max_size=100), st.floats(-1e3, 1e3))
def test_start_ends_after_few_evaluations_whatever_the_losses(losses: list[float], loss: float) -> None:
    values = iter(losses)
    counted = Counted(lambda lr: next(values))
    search = search_initial_lr(counted, loss, rounding=1e-6)
    assert counted.calls == len(search.learning_rates) <= MOST_EVALUATIONS
    if search.lr is not None:
        found = search.losses[search.learning_rates.index(search.lr)]
        assert math.isfinite(found)
        assert found < loss
