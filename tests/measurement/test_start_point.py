"""The point where a step began, kept until the next one tells where it has led; and the parabola between them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gen_optim.closures.losses import losses_to_floats
from gen_optim.measurement.lookback import KeptPoint, look_back, parabola_from_end
from tests.training import same

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


# --- the kept point --------------------------------------------------------------------------------------------------


def points(dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor], list[Tensor], KeptPoint]:
    """Parameters that have moved, where they were, where they are, and the kept point."""
    torch.manual_seed(0)
    parameters = [torch.randn(3, 2).to(dtype), torch.randn(5).to(dtype), torch.randn(()).to(dtype)]
    starts = [each.clone() for each in parameters]
    kept = KeptPoint(parameters, lr=0.1)
    for parameter in parameters:
        parameter.add_(torch.randn(parameter.shape).to(dtype))
    kept.arrive()
    return parameters, starts, [each.clone() for each in parameters], kept


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parameters_go_where_the_step_began_and_back_again_to_the_bit(dtype: torch.dtype) -> None:
    parameters, starts, ends, kept = points(dtype)
    kept.visit()
    assert same(parameters, starts)
    kept.leave()
    assert same(parameters, ends)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ending", ["leave", "stay"])
def test_half_way_is_between_both_and_neither_is_lost(dtype: torch.dtype, ending: str) -> None:
    parameters, starts, ends, kept = points(dtype)
    kept.visit()
    kept.visit_middle()
    assert same(parameters, [torch.lerp(start, end, 0.5) for start, end in zip(starts, ends, strict=True)])
    getattr(kept, ending)()
    assert same(parameters, ends if ending == "leave" else starts)


@pytest.mark.parametrize("visits", [0, 1])
def test_parameters_stay_where_the_step_began(visits: int) -> None:
    parameters, starts, _, kept = points()
    if visits:
        kept.visit()
    kept.stay()
    assert same(parameters, starts)


class Interrupted(TorchFunctionMode):
    """Raises in the middle of what is done to tensors: before or after the given call."""

    def __init__(self, at: int, *, after: bool) -> None:
        super().__init__()
        self.at, self.after, self.calls = at, after, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        writes = func.__name__ in ("clone", "copy_", "lerp", "_foreach_copy_")  # and not what switches grad mode
        self.calls += writes
        is_now = self.calls == self.at and writes
        if is_now and not self.after:
            raise KeyboardInterrupt
        result = func(*args, **(kwargs or {}))
        if is_now:
            raise KeyboardInterrupt
        return result


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(
    ("interrupted", "ending"),
    [("visit", "leave"), ("visit_middle", "leave"), ("visit_middle", "stay"), ("leave", "leave"), ("stay", "stay")],
)
def test_an_interrupt_anywhere_leaves_a_way_to_both_ends(interrupted: str, ending: str, after: bool) -> None:
    ways = {
        "visit": [],
        "visit_middle": ["visit"],
        "leave": ["visit", "visit_middle"],
        "stay": ["visit", "visit_middle"],
    }
    count = 0
    for at in range(1, 100):
        parameters, starts, ends, kept = points()
        for way in ways[interrupted]:
            getattr(kept, way)()
        mode = Interrupted(at, after=after)
        try:
            with mode:
                getattr(kept, interrupted)()
        except KeyboardInterrupt:
            count += 1
        else:
            break
        if interrupted in ("leave", "stay"):
            assert same(parameters, ends if interrupted == "leave" else starts)
        else:
            getattr(kept, ending)()
            assert same(parameters, ends if ending == "leave" else starts)
    assert count >= 1


def test_one_copy_is_held_and_a_second_one_half_way() -> None:
    _, _, _, kept = points()
    held = [(len(kept._copies), len(kept._starts))]
    for go in (kept.visit, kept.visit_middle, kept.leave):
        go()
        held.append((len(kept._copies), len(kept._starts)))
    assert held == [(3, 0), (3, 0), (3, 3), (3, 0)]


@pytest.mark.parametrize("on_host", [False, True])
def test_copies_that_are_elsewhere_do_not_serve_again(on_host: bool) -> None:
    parameters, _, _, kept = points()
    kept.visit()
    kept.leave()
    again = KeptPoint(parameters, 0.1, last=kept, on_host=on_host)
    assert (again._copies is kept._copies) is not on_host


def test_it_is_of_parameters_that_nobody_has_written_since() -> None:
    parameters, _, _, kept = points()
    assert kept.is_of(parameters)
    assert not kept.is_of(parameters[:2])
    assert not kept.is_of([*parameters[:2], torch.zeros(7)])
    assert not kept.is_of([each.clone() for each in parameters])
    parameters[1].mul_(1.0)
    assert not kept.is_of(parameters)


@pytest.mark.parametrize("convert", [Tensor.clone, Tensor.double, lambda each: each[..., None]])
def test_it_is_not_of_parameters_that_were_given_other_data(convert: Any) -> None:
    parameters, _, _, kept = points()
    versions = [each._version for each in parameters]
    parameters[1].data = convert(parameters[1].data)
    assert [each._version for each in parameters] == versions  # nothing tells of it but the data
    assert not kept.is_of(parameters)


def test_a_kept_point_survives_a_state_dict_of_plain_tensors() -> None:
    parameters, starts, _, kept = points()
    others = [each.clone() for each in parameters]
    loaded = KeptPoint.load(others, kept.state_dict())
    assert loaded is not None
    assert loaded.lr == kept.lr
    loaded.visit()
    assert same(others, starts)
    assert not same(parameters, starts)
    assert KeptPoint.load(others[:2], kept.state_dict()) is None
    assert KeptPoint.load([torch.zeros(2)] * 3, kept.state_dict()) is None


def test_rise_is_the_gradients_times_the_step() -> None:
    parameters, starts, ends, kept = points()
    expected = 0.0
    for parameter, start, end in zip(parameters, starts, ends, strict=True):
        parameter.grad = torch.randn(parameter.shape)
        parameter.requires_grad_()
        expected += ((end - start).double() * parameter.grad.double()).sum().item()
    rise = kept.rise()
    assert rise is not None
    assert rise.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("is_stale", [False, True])
def test_rise_is_not_known_where_what_has_moved_has_no_gradient(is_stale: bool) -> None:
    parameters, starts, _, kept = points()
    parameters[0].requires_grad_().grad = torch.ones_like(parameters[0])
    if is_stale:  # left from before it was frozen
        parameters[1].grad = torch.ones_like(parameters[1])
    assert kept.rise() is None
    with torch.no_grad():
        for parameter, start in zip(parameters, starts, strict=True):
            parameter.copy_(start)
    rise = kept.rise()
    assert rise is not None
    assert rise.item() == 0.0


def measured(**options: Any) -> tuple[Any, list[float]]:
    """A look back at a step from 0 to 2 along x² − x, in one dimension, and where the loss was evaluated."""
    parameter, evaluated = torch.zeros((), dtype=torch.float64), []
    kept = KeptPoint([parameter], lr=0.5)
    parameter.fill_(2.0)

    def call() -> Tensor:
        evaluated.append(parameter.item())
        return parameter**2 - parameter

    given = {"end": None, "gradient_of": None, "rise": None, "rounding": lambda _: 1e-15}
    found = look_back(kept, call=call, **{"read": losses_to_floats, **given, **options})  # type: ignore[arg-type]
    return found, evaluated


def test_losses_at_both_ends_and_the_slope_at_the_far_one_are_enough() -> None:
    # L(2) = 2, L(0) = 0; along the whole step s from 0 to 2, dL/ds = 2 · L′(2) = 6.
    rise = torch.tensor(6.0, dtype=torch.float64)
    found, evaluated = measured(end=torch.tensor(2.0), gradient_of=[torch.tensor(2.0)], rise=rise)
    assert evaluated == [0.0]
    assert (found.learning_rates, found.losses, found.arrival) == ((0.0, 0.5), (0.0, 2.0), 2.0)
    assert found.parabola.slope == pytest.approx(4.0)  # −dL/ds at 0 is 2, per lr 0.5
    assert found.parabola.curvature == pytest.approx(8.0 / 0.25)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"end": torch.tensor(2.0)},
        {"end": 2.0, "gradient_of": [2.5], "rise": torch.tensor(6.0)},
        {"end": 2.0, "gradient_of": [], "rise": torch.tensor(6.0)},
        {"end": 2.0, "gradient_of": [2.0, 1e-9], "rise": torch.tensor(6.0)},
    ],
)
def test_where_gradients_are_not_known_to_be_the_losss_the_middle_tells_the_same(options: dict[str, Any]) -> None:
    found, evaluated = measured(**options)
    assert evaluated == ([2.0] if "end" not in options else []) + [0.0, 1.0]
    assert found.learning_rates == (0.0, 0.25, 0.5)
    assert found.arrival == 2.0
    assert found.parabola.slope == pytest.approx(4.0)
    assert found.parabola.curvature == pytest.approx(8.0 / 0.25)


@pytest.mark.parametrize(("is_alone", "expected"), [(True, 1), (False, 2)])
def test_a_rank_on_its_own_reads_once_where_it_knows_nothing_of_the_gradients(is_alone: bool, expected: int) -> None:
    readings: list[int] = []

    def read(losses: Any) -> list[float]:
        readings.append(len(losses))
        return losses_to_floats(losses)

    found, evaluated = measured(is_alone=is_alone, read=read)
    assert len(readings) == expected
    assert evaluated == [2.0, 0.0, 1.0]
    assert (found.parabola.slope, found.parabola.curvature) == pytest.approx((4.0, 8.0 / 0.25))


@pytest.mark.parametrize("end", [math.nan, math.inf])
def test_an_end_that_is_not_finite_needs_no_middle(end: float) -> None:
    found, evaluated = measured(end=end)
    assert evaluated == [0.0]
    assert not found.parabola.is_finite
    assert found.loss == 0.0
    assert not math.isfinite(found.arrival)
