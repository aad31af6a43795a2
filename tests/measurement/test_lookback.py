"""What a look back makes of the losses at both ends of a step, of the slope at its end, or of the middle."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gen_optim.measurement import LookBack, Measurement, StepLoss
from gen_optim.measurement.lookback import parabola_from_end
from gen_optim.measurement.start_point import StartPoint
from tests.measurement.recorded import RecordedSession

numbers = st.floats(-100.0, 100.0, allow_subnormal=False).map(lambda x: x if abs(x) > 1e-100 else 0.0)

# --- the parabola ----------------------------------------------------------------------------------------------------


@given(lr=st.floats(1e-6, 1e3), value=numbers, slope=numbers, curvature=numbers)
def test_parabola_from_its_end_is_the_one_it_was(lr: float, value: float, slope: float, curvature: float) -> None:
    # In units of the step: g(s) = value − slope · s + curvature · s² / 2.
    end, slope_at_end = value - slope + 0.5 * curvature, -slope + curvature
    found = parabola_from_end(lr, value, end, slope_at_end)
    size = abs(value) + abs(slope) + abs(curvature)
    assert found.value == value
    assert found.slope * lr == pytest.approx(slope, abs=1e-13 * size)
    assert found.curvature * lr * lr == pytest.approx(curvature, abs=1e-13 * size)


@given(lr=st.floats(1e-3, 1e3), error=st.floats(-1.0, 1.0), other=st.floats(-1.0, 1.0), slope_at_end=numbers)
def test_noise_of_the_parabola_is_what_rounding_of_its_losses_can_do(
    lr: float, error: float, other: float, slope_at_end: float
) -> None:
    rounding = 1e-3
    exact = parabola_from_end(lr, 2.0, 1.5, slope_at_end, rounding=rounding)
    off = parabola_from_end(lr, 2.0 * (1.0 + rounding * error), 1.5 * (1.0 + rounding * other), slope_at_end)
    assert abs(off.slope - exact.slope) <= exact.slope_noise * (1.0 + 1e-9)
    assert abs(off.curvature - exact.curvature) <= exact.curvature_noise * (1.0 + 1e-9)


# --- the measurement -------------------------------------------------------------------------------------------------


def measured(
    *, start: float = 0.0, end: Any = None, ranks: Any = None, average: float | None = None, **known: Any
) -> tuple[Measurement, list[float], list[int]]:
    """A look back at a step from 0 to 2 along x² − x, in one dimension: where it was evaluated, and what was read."""
    parameter, evaluated = torch.full((), start, dtype=torch.float64), []

    @contextmanager
    def averaged() -> Iterator[None]:
        present = parameter.clone()
        parameter.fill_(average or 0.0)
        yield
        parameter.copy_(present)

    start_point = StartPoint([parameter], lr=0.5)
    parameter.fill_(2.0)

    def call() -> Tensor:
        evaluated.append(parameter.item())
        if not math.isfinite(evaluated[-1]):
            raise ArithmeticError("too far")
        return parameter**2 - parameter

    session: Any = RecordedSession(call, tolerance=1.0, ranks=ranks)
    session.rounding = lambda losses: 1e-15
    step_loss = StepLoss(
        start_point, 0.5, session, {1.0: end}, averaged=None if average is None else averaged, valid=1.0, **known
    )
    found = LookBack().measure(step_loss)
    return found, evaluated, session.reads


def test_losses_at_both_ends_and_the_slope_at_the_end_are_enough() -> None:
    # L(2) = 2, L(0) = 0; along the whole step s from 0 to 2, dL/ds = 2 · L′(2) = 6.
    slope = torch.tensor(6.0, dtype=torch.float64)
    found, evaluated, _ = measured(end=torch.tensor(2.0), differentiated=[torch.tensor(2.0)], end_slope=slope)
    assert evaluated == [0.0]
    assert (found.learning_rates, found.losses, found.loss_end) == ((0.0, 0.5), (0.0, 2.0), 2.0)
    assert found.parabola.slope == pytest.approx(4.0)  # −dL/ds at 0 is 2, per lr 0.5
    assert found.parabola.curvature == pytest.approx(8.0 / 0.25)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"end": torch.tensor(2.0)},
        {"end": 2.0, "differentiated": [torch.tensor(2.5)], "end_slope": torch.tensor(6.0)},
        {"end": 2.0, "differentiated": [], "end_slope": torch.tensor(6.0)},
        {"end": 2.0, "differentiated": [torch.tensor(2.0), torch.tensor(1e-9)], "end_slope": torch.tensor(6.0)},
    ],
)
def test_if_gradients_are_not_known_to_be_the_losss_the_middle_says_the_same(options: dict[str, Any]) -> None:
    found, evaluated, _ = measured(**options)
    assert evaluated == ([2.0] if "end" not in options else []) + [0.0, 1.0]
    assert found.learning_rates == (0.0, 0.25, 0.5)
    assert found.loss_end == 2.0
    assert found.parabola.slope == pytest.approx(4.0)
    assert found.parabola.curvature == pytest.approx(8.0 / 0.25)


def test_the_excess_loss_is_measured_if_the_gradients_are_those_of_the_loss() -> None:
    known: dict[str, Any] = {"end": 2.0, "end_slope": torch.tensor(6.0), "excess_loss": torch.tensor(0.25)}
    found, evaluated, _ = measured(**known, differentiated=[torch.tensor(2.0)], average=0.5)
    assert (found.excess_loss, evaluated) == (0.25, [0.0])
    assert measured(**known, differentiated=[torch.tensor(2.5)])[0].excess_loss is None
    del known["excess_loss"]
    assert measured(**known, differentiated=[torch.tensor(2.0)])[0].excess_loss is None
    known["excess_loss"] = torch.tensor(math.nan)
    assert measured(**known, differentiated=[torch.tensor(2.0)])[0].excess_loss is None


@pytest.mark.parametrize("options", [{}, {"end": 2.0, "differentiated": [torch.tensor(2.5)]}])
def test_if_they_are_not_the_loss_is_evaluated_at_the_average(options: dict[str, Any]) -> None:
    found, evaluated, _ = measured(**options, average=0.5)
    assert evaluated == ([2.0] if "end" not in options else []) + [0.0, 1.0, 0.5]
    assert found.excess_loss == 2.0 + 0.25
    assert found.learning_rates == (0.0, 0.25, 0.5)


def test_gradients_of_another_loss_say_nothing_of_the_excess_loss_where_the_loss_is_not_finite() -> None:
    known = {"end": 2.0, "end_slope": torch.tensor(6.0), "excess_loss": torch.tensor(0.25)}
    assert measured(**known, start=1e200)[0].excess_loss is None


def test_an_average_at_which_the_closure_raises_is_not_compared_with() -> None:
    found, evaluated, _ = measured(average=math.inf)
    assert found.excess_loss is None
    assert found.parabola.curvature == pytest.approx(8.0 / 0.25)
    assert evaluated == [2.0, 0.0, 1.0, math.inf, 2.0], "the end is evaluated again: it is not the closure's fault"


class Two:
    """Two ranks that see the same."""

    def __len__(self) -> int:
        return 2


def test_losses_are_read_once_more_if_the_slope_is_not_known() -> None:
    found, evaluated, reads = measured()
    assert len(reads) == 2
    assert evaluated == [2.0, 0.0, 1.0]
    assert (found.parabola.slope, found.parabola.curvature) == pytest.approx((4.0, 8.0 / 0.25))


@pytest.mark.parametrize("end", [math.nan, math.inf])
def test_an_end_that_is_not_finite_needs_no_middle(end: float) -> None:
    found, evaluated, _ = measured(end=end, ranks=Two())
    assert evaluated == [0.0]
    assert not found.parabola.is_finite
    assert found.loss_start == 0.0
    assert found.loss_end is not None
    assert not math.isfinite(found.loss_end)
