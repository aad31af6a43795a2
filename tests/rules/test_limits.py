"""How far the learning rate moves in one probe step."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gen_optim.rules import limits
from gen_optim.rules.limits import fall_limit, growth_limit, limited_lr

fractions = st.floats(0.0, 1.0)


def test_growth_is_largest_without_noise_and_in_the_burn_in() -> None:
    assert growth_limit(1.0, is_burning_in=True) == limits._CHANGE
    assert growth_limit(1.0, is_burning_in=False) == limits._LATER_GROWTH
    assert growth_limit(0.0, is_burning_in=False) == pytest.approx(math.sqrt(limits._LATER_GROWTH))


@given(fractions, fractions, st.booleans())
def test_growth_rises_with_the_signal_fraction(one: float, other: float, is_burning_in: bool) -> None:
    low, high = (growth_limit(each, is_burning_in=is_burning_in) for each in sorted((one, other)))
    assert 1.0 < low <= high


def test_without_noise_the_learning_rate_falls_by_the_largest_change() -> None:
    for count in (0, 1, 10, 10**9):
        assert fall_limit(1.0, count) == pytest.approx(1.0 / limits._CHANGE)


def test_in_noise_it_falls_further_than_it_grows_at_first_and_less_far_later() -> None:
    growth = growth_limit(0.0, is_burning_in=False)
    falls = [1.0 / fall_limit(0.0, count) for count in (0, 1, 10, 100, 1000, 10**9)]
    assert falls == sorted(falls, reverse=True)
    assert falls[0] == pytest.approx(limits._CHANGE)
    assert falls[2] > growth > falls[-1] > 1.0


@given(fractions, st.integers(0, 10**9))
def test_fall_is_bounded_by_the_largest_change(signal_fraction: float, count: int) -> None:
    assert (1 - 1e-12) / limits._CHANGE <= fall_limit(signal_fraction, count) < 1.0


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (0.5, 1.0),  # the dead band, with its edges
        (0.7, 1.0),
        (0.8, 1.0),
        (0.84, 1.05),
        (8.0, 1.1),
        (math.inf, 1.1),
        (0.475, 0.95),
        (0.1, 0.9),
        (0.0, 0.9),
    ],
)
def test_the_learning_rate_moves_towards_a_target_outside_the_dead_band(target: float, expected: float) -> None:
    assert limited_lr(1.0, target, low=0.5, high=0.8, growth=1.1, fall=0.9) == pytest.approx(expected)
    assert limited_lr(3.0, target, low=0.5, high=0.8, growth=1.1, fall=0.9) == pytest.approx(3.0 * expected)


def test_limits_of_one_keep_the_learning_rate() -> None:
    for target in (0.0, 0.5, 1.0, math.inf):
        assert limited_lr(0.3, target, low=0.3, high=0.3, growth=1.0, fall=1.0) == 0.3
