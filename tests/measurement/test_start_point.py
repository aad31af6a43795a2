"""The point where a step began: going there and back, validity, the slope at the end, and checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gen_optim.measurement.start_point import StartPoint
from tests.training import same

# --- moving --------------------------------------------------------------------------------------------------


def points(dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor], list[Tensor], StartPoint]:
    """Parameters that have moved, where they were, where they are, and the start_point point."""
    torch.manual_seed(0)
    parameters = [torch.randn(3, 2).to(dtype), torch.randn(5).to(dtype), torch.randn(()).to(dtype)]
    starts = [each.clone() for each in parameters]
    start_point = StartPoint(parameters, lr=0.1)
    for parameter in parameters:
        parameter.add_(torch.randn(parameter.shape).to(dtype))
    start_point.arrive()
    return parameters, starts, [each.clone() for each in parameters], start_point


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parameters_go_where_the_step_began_and_back_again_to_the_bit(dtype: torch.dtype) -> None:
    parameters, starts, ends, start_point = points(dtype)
    start_point.write(0.0)
    assert same(parameters, starts)
    start_point.leave()
    assert same(parameters, ends)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ending", ["leave", "stay"])
def test_the_middle_is_between_both_and_neither_is_lost(dtype: torch.dtype, ending: str) -> None:
    parameters, starts, ends, start_point = points(dtype)
    start_point.write(0.0)
    start_point.write(0.5)
    assert same(parameters, [torch.lerp(start, end, 0.5) for start, end in zip(starts, ends, strict=True)])
    getattr(start_point, ending)()
    assert same(parameters, ends if ending == "leave" else starts)


@pytest.mark.parametrize("visits", [0, 1])
def test_parameters_stay_where_the_step_began(visits: int) -> None:
    parameters, starts, _, start_point = points()
    if visits:
        start_point.write(0.0)
    for _ in range(2):
        start_point.stay()
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


def go(start_point: StartPoint, way: str) -> None:
    ways: dict[str, Callable[[], None]] = {
        "start": lambda: start_point.write(0.0),
        "middle": lambda: start_point.write(0.5),
        "leave": start_point.leave,
        "stay": start_point.stay,
    }
    ways[way]()


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(
    ("interrupted", "ending"),
    [("start", "leave"), ("middle", "leave"), ("middle", "stay"), ("leave", "leave"), ("stay", "stay")],
)
def test_an_interrupt_anywhere_leaves_a_way_to_both_ends(interrupted: str, ending: str, after: bool) -> None:
    before = {"start": [], "middle": ["start"], "leave": ["start", "middle"], "stay": ["start", "middle"]}
    count = 0
    for at in range(1, 100):
        parameters, starts, ends, start_point = points()
        for way in before[interrupted]:
            go(start_point, way)
        mode = Interrupted(at, after=after)
        try:
            with mode:
                go(start_point, interrupted)
        except KeyboardInterrupt:
            count += 1
        else:
            break
        if interrupted in ("leave", "stay"):
            assert same(parameters, ends if interrupted == "leave" else starts)
        else:
            go(start_point, ending)
            assert same(parameters, ends if ending == "leave" else starts)
    assert count >= 1


def test_one_copy_is_held_and_a_second_one_in_between() -> None:
    _, _, _, start_point = points()
    held = [(len(start_point._copies), len(start_point._starts))]
    for way in ("start", "middle", "leave"):
        go(start_point, way)
        held.append((len(start_point._copies), len(start_point._starts)))
    assert held == [(3, 0), (3, 0), (3, 3), (3, 0)]


def test_any_point_between_both_ends_can_be_visited_in_any_order() -> None:
    parameters, starts, ends, start_point = points()
    for multiple in (0.25, 1.0, 0.0, 0.75, 1.0):
        start_point.write(multiple)
        assert same(parameters, [torch.lerp(start, end, multiple) for start, end in zip(starts, ends, strict=True)])
    start_point.leave()
    assert same(parameters, ends)


def test_it_is_of_parameters_that_have_not_been_written_since() -> None:
    parameters, _, _, start_point = points()
    assert start_point.is_of(parameters)
    assert not start_point.is_of(parameters[:2])
    assert not start_point.is_of([*parameters[:2], torch.zeros(7)])
    assert not start_point.is_of([each.clone() for each in parameters])
    parameters[1].mul_(1.0)
    assert not start_point.is_of(parameters)


@pytest.mark.parametrize("convert", [Tensor.clone, Tensor.double, lambda each: each[..., None]])
def test_it_is_not_of_parameters_that_were_given_other_data(convert: Any) -> None:
    parameters, _, _, start_point = points()
    versions = [each._version for each in parameters]
    parameters[1].data = convert(parameters[1].data)
    assert [each._version for each in parameters] == versions  # nothing tells of it but the data
    assert not start_point.is_of(parameters)


def test_it_goes_through_a_checkpoint_as_tensors_by_parameter_and_two_numbers() -> None:
    parameters, starts, _, start_point = points()
    others = [each.clone() for each in parameters]
    saved = [start_point.tensors()[each].clone() for each in parameters]
    lr, fingerprint = start_point.lr, start_point.fingerprint()
    loaded = StartPoint.load(dict(zip(others, saved, strict=True)), lr, fingerprint)
    assert loaded.lr == start_point.lr
    assert loaded.is_of(others)
    loaded.write(0.0)
    assert same(others, starts)
    assert not same(parameters, starts)


@pytest.mark.parametrize("changed", ["start", "end", "shape"])
def test_loaded_beside_other_parameters_it_is_not_theirs(changed: str) -> None:
    parameters, _, _, start_point = points()
    others = [each.clone() for each in parameters]
    saved = [start_point.tensors()[each].clone() for each in parameters]
    if changed == "shape":
        saved[1] = torch.zeros(7)
    else:
        (others if changed == "end" else saved)[1][0] += 1.0
    loaded = StartPoint.load(dict(zip(others, saved, strict=True)), start_point.lr, start_point.fingerprint())
    assert not loaded.is_of(others)


def test_slope_at_the_end_is_the_gradients_times_the_step() -> None:
    parameters, starts, ends, start_point = points()
    expected = 0.0
    for parameter, start, end in zip(parameters, starts, ends, strict=True):
        parameter.grad = torch.randn(parameter.shape)
        parameter.requires_grad_()
        expected += ((end - start).double() * parameter.grad.double()).sum().item()
    slope = start_point.end_slope()
    assert slope is not None
    assert slope.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("is_stale", [False, True])
def test_slope_at_the_end_is_not_known_if_what_has_moved_has_no_gradient(is_stale: bool) -> None:
    parameters, starts, _, start_point = points()
    parameters[0].requires_grad_().grad = torch.ones_like(parameters[0])
    if is_stale:  # left from before it was frozen
        parameters[1].grad = torch.ones_like(parameters[1])
    assert math.isnan(start_point.end_slope())
    with torch.no_grad():
        for parameter, start in zip(parameters, starts, strict=True):
            parameter.copy_(start)
    assert start_point.end_slope().item() == 0.0
