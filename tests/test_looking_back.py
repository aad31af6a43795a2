"""The point where a step began, kept until the next one tells where it has led; and all that this must not disturb."""

from __future__ import annotations

import copy
import functools
import gc
import math
import pickle
import random
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, lr_scheduler
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from gen_optim import GeNOptimizer, History, ProbeRecord, ProbeStatus
from gen_optim.evaluating import losses_to_floats
from gen_optim.looking_back import KeptPoint, look_back, parabola_from_end
from tests.training import Training, gen_adamw, gen_sgd, mlp, parameters_of, regression_data, same

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
    found = look_back(kept, call=call, read=losses_to_floats, **{**given, **options})  # type: ignore[arg-type]
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


@pytest.mark.parametrize("end", [math.nan, math.inf])
def test_an_end_that_is_not_finite_needs_no_middle(end: float) -> None:
    found, evaluated = measured(end=end)
    assert evaluated == [0.0]
    assert not found.parabola.is_finite
    assert found.loss == 0.0
    assert not math.isfinite(found.arrival)


# --- on a quadratic --------------------------------------------------------------------------------------------------


class Quadratic:
    """½ xᵀHx − bᵀx + c in float64, with a b for each batch; what a step looks back on is known exactly."""

    def __init__(self, seed: int, size: int = 4, *, noise: float = 0.0, make: Any = None, **options: Any) -> None:
        self.random = torch.Generator().manual_seed(seed)
        root = self.normal(size, size)
        self.hessian = root @ root.T / size + 0.1 * torch.eye(size, dtype=torch.float64)
        self.shift, self.noise = self.normal(size), noise
        self.x = nn.Parameter(3.0 * self.normal(size))
        base = SGD([self.x], lr=0.05, momentum=0.5) if make is None else make([self.x])
        self.optimizer = GeNOptimizer(base, mode="lookback", **{"rule": "published", "period": 1, **options})
        self.history = History()
        self.optimizer.register_probe_hook(self.history)
        self.calls = 0

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.random, dtype=torch.float64)

    def loss(self, batch: Tensor) -> Tensor:
        self.calls += 1
        return 0.5 * self.x @ self.hessian @ self.x - batch @ self.x + 1.0

    def closure(self, batch: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.loss(batch)
        loss.backward()
        return loss

    def batch(self) -> Tensor:
        return self.shift + self.noise * self.normal(*self.shift.shape)

    def step(self, closure: Any = None, batch: Tensor | None = None) -> tuple[float, float]:
        """Take a step by a closure of a batch; the exact slope and curvature along the step before it, on that."""
        before, lr = self.before, self.optimizer.get_last_lr()[0]
        batch = self.batch() if batch is None else batch
        direction = (before - self.x.detach()) / lr
        self.before = self.x.detach().clone()
        self.optimizer.step(functools.partial(self.closure if closure is None else closure, batch))
        slope = direction @ (self.hessian @ before - batch)
        return slope.item(), (direction @ self.hessian @ direction).item()

    @functools.cached_property
    def before(self) -> Tensor:
        return self.x.detach().clone()


@given(seed=st.integers(0, 10**6), noise=st.floats(0.0, 3.0))
def test_the_parabola_is_the_exact_one_of_the_new_batch_for_one_more_call(seed: int, noise: float) -> None:
    case = Quadratic(seed, noise=noise)
    case.step()
    assert (case.calls, len(case.history)) == (1, 0)
    for step in range(2, 6):
        case.calls = 0
        slope, curvature = case.step()
        record = case.history[-1]
        assert (record.step, record.multiples[0], len(record.losses), case.calls) == (step, 0.0, 2, 2)
        assert record.slope == pytest.approx(slope, rel=1e-8, abs=1e-8 * abs(curvature))
        assert record.curvature == pytest.approx(curvature, rel=1e-8, abs=1e-8 * abs(slope))


@pytest.mark.parametrize("make", [lambda p: AdamW(p, lr=0.05), lambda p: Adam(p, lr=0.05, weight_decay=0.1)])
def test_the_parabola_is_exact_whatever_the_base_optimizer(make: Any) -> None:
    case = Quadratic(0, noise=1.0, make=make)
    case.step()
    for _ in range(5):
        slope, curvature = case.step()
        assert (case.history[-1].slope, case.history[-1].curvature) == pytest.approx((slope, curvature), rel=1e-9)


def test_slope_is_an_unbiased_estimate_of_the_losss_own() -> None:
    """On the batch that a step was made for, the slope of noise counts as descent; looked back at, it does not."""
    size, noise, lr = 4, 2.0, 1e-6  # hardly moving, at the minimum of the mean loss: all is noise
    case = Quadratic(0, noise=noise, make=lambda p: SGD(p, lr=lr), lr_min=lr, lr_max=lr)
    with torch.no_grad():
        case.x.copy_(torch.linalg.solve(case.hessian, case.shift))
    for _ in range(2000):
        case.step()
    slopes = np.array(case.history.column("slope"))
    biased = size * noise**2  # E|gradient|²
    assert abs(slopes.mean()) < 4.0 * slopes.std() / math.sqrt(len(slopes)) < 0.1 * biased


# --- what makes the middle necessary ---------------------------------------------------------------------------------


def clipped(case: Quadratic, batch: Tensor) -> Tensor:
    loss = case.closure(batch)
    if not case.optimizer.is_probing:
        nn.utils.clip_grad_norm_([case.x], 1e-3)
    return loss


def scaled(case: Quadratic, batch: Tensor) -> Tensor:
    case.optimizer.zero_grad()
    loss = case.loss(batch)
    (1024.0 * loss).backward()
    return loss


def scaled_by_gradient(case: Quadratic, batch: Tensor) -> Tensor:
    case.optimizer.zero_grad()
    loss = case.loss(batch)
    loss.backward(torch.tensor(2.0, dtype=torch.float64))
    return loss


def penalised(case: Quadratic, batch: Tensor) -> Tensor:
    case.optimizer.zero_grad()
    loss = case.loss(batch)
    (loss + 0.1 * case.x.square().sum()).backward()
    return loss


def penalised_in_gradients(case: Quadratic, batch: Tensor) -> Tensor:
    loss = case.closure(batch)
    if not case.optimizer.is_probing:
        case.x.grad.add_(case.x.detach(), alpha=0.1)
    return loss


def assigned(case: Quadratic, batch: Tensor) -> Tensor:
    loss = case.loss(batch)
    if not case.optimizer.is_probing:
        [case.x.grad] = torch.autograd.grad(loss, case.x)
    return loss.detach()


def zeroed_in_place(case: Quadratic, batch: Tensor) -> Tensor:
    case.optimizer.zero_grad(set_to_none=False)
    loss = case.loss(batch)
    loss.backward()
    return loss


def accumulated_beyond_a_step(case: Quadratic, batch: Tensor) -> Tensor:
    loss = case.loss(batch)
    loss.backward()
    return loss


@pytest.mark.parametrize(
    "closure",
    [
        clipped,
        scaled,
        scaled_by_gradient,
        penalised,
        penalised_in_gradients,
        assigned,
        zeroed_in_place,
        accumulated_beyond_a_step,
    ],
)
def test_gradients_of_something_else_cost_a_second_call_and_the_parabola_is_the_losss(closure: Any) -> None:
    case = Quadratic(0, noise=1.0)
    case.step()
    for _ in range(4):
        case.calls = 0
        slope, curvature = case.step(functools.partial(closure, case))
        assert (case.calls, len(case.history[-1].losses)) == (3, 3)
        assert (case.history[-1].slope, case.history[-1].curvature) == pytest.approx((slope, curvature), rel=1e-8)


def returned_alone(case: Quadratic, batch: Tensor) -> Tensor:
    return case.loss(batch)


def zeroed_and_returned_alone(case: Quadratic, batch: Tensor) -> Tensor:
    case.optimizer.zero_grad()
    return case.loss(batch)


def in_micro_batches(case: Quadratic, batch: Tensor) -> float:
    case.optimizer.zero_grad()
    total = 0.0
    for part in (0.25, 0.75):
        loss = part * case.loss(batch)
        loss.backward()
        total += loss.item()
    case.calls -= 1
    return total


def in_summands_of_one_call(case: Quadratic, batch: Tensor) -> Tensor:
    case.optimizer.zero_grad()
    loss = case.loss(batch)
    torch.autograd.backward([0.5 * loss, 0.5 * loss])
    return loss.detach()


def weighted(case: Quadratic, batch: Tensor) -> Tensor:
    case.optimizer.zero_grad()
    loss = 0.5 * case.loss(batch)
    loss.backward(torch.tensor(2.0, dtype=torch.float64))
    return 2.0 * loss.detach()


def returned_in_another_shape(case: Quadratic, batch: Tensor) -> Tensor:
    return case.closure(batch).reshape(1, 1)


def differentiated_inside(case: Quadratic, batch: Tensor) -> Tensor:
    """A loss that itself needs a gradient, of the same order in x: still a quadratic."""
    case.optimizer.zero_grad()
    point = torch.ones((), dtype=torch.float64, requires_grad=True)
    [inner] = torch.autograd.grad(case.loss(batch) * point, point, create_graph=True)
    inner.backward()
    return inner


@pytest.mark.parametrize(
    "closure",
    [
        returned_alone,
        zeroed_and_returned_alone,
        in_micro_batches,
        in_summands_of_one_call,
        weighted,
        returned_in_another_shape,
        differentiated_inside,
    ],
)
def test_gradients_of_the_loss_cost_one_call_in_whatever_way_they_come(closure: Any) -> None:
    case = Quadratic(0, noise=1.0)
    case.step()
    for step in range(4):
        case.calls = 0
        slope, curvature = case.step(functools.partial(closure, case))
        retried = closure is differentiated_inside and step == 0  # once without gradients, in vain
        assert (case.calls - retried, len(case.history[-1].losses)) == (2, 2)
        assert (case.history[-1].slope, case.history[-1].curvature) == pytest.approx((slope, curvature), rel=1e-8)


@pytest.mark.parametrize("with_closure", [False, True])
def test_a_probe_is_called_at_both_ends_and_half_way(with_closure: bool) -> None:
    case = Quadratic(0, noise=1.0)
    probed: list[Tensor] = []
    for _ in range(4):
        before, lr = case.before, case.optimizer.get_last_lr()[0]
        batch, other = case.batch(), case.batch()
        direction = (before - case.x.detach()) / lr
        case.before = case.x.detach().clone()
        probed.clear()

        def probe(batch: Tensor = other) -> Tensor:
            probed.append(case.x.detach().clone())
            return case.loss(batch)

        if with_closure:
            case.optimizer.step(functools.partial(case.closure, batch), probe=probe)
        else:
            case.closure(batch)
            case.optimizer.step(probe=probe)
        if len(case.history):
            assert same(probed, [case.before, before, torch.lerp(before, case.before, 0.5)])
            assert case.history[-1].slope == pytest.approx((direction @ (case.hessian @ before - other)).item())
            assert case.history[-1].curvature == pytest.approx((direction @ case.hessian @ direction).item())
        else:
            assert not probed
    assert len(case.history) == 3


def test_gradients_of_the_caller_cost_a_second_call() -> None:
    case = Quadratic(0, noise=1.0)
    case.step()
    batch = case.batch()
    case.optimizer.zero_grad()
    case.loss(batch).backward()
    case.x.grad.mul_(0.5)
    case.calls = 0
    case.step(functools.partial(returned_alone, case), batch)
    assert (case.calls, len(case.history[-1].losses)) == (3, 3)


def backward_for_one(one: Tensor, other: Tensor) -> Tensor:
    loss = one.square().sum() + other.square().sum()
    loss.backward(inputs=[one])
    return loss


def other_detached(one: Tensor, other: Tensor) -> Tensor:
    loss = one.square().sum() + other.detach().square().sum()
    loss.backward()
    return loss


@pytest.mark.parametrize("evaluate", [backward_for_one, other_detached])
def test_parameters_trained_in_turns_cost_a_second_call_and_the_parabola_is_the_losss(evaluate: Any) -> None:
    """The gradients of one turn say nothing of what the turn before has moved."""
    turns = [nn.Parameter(torch.full((3,), value, dtype=torch.float64)) for value in (1.0, 2.0)]
    base = SGD(turns, lr=0.1)
    optimizer = GeNOptimizer(base, mode="lookback", rule="published", period=1)
    squared = math.nan
    for step in range(6):

        def closure() -> Tensor:
            optimizer.zero_grad()
            return evaluate(*turns)

        gradient = 2.0 * turns[0].detach().clone()
        optimizer.step(closure)
        if step:
            record = optimizer.last_probe
            assert (record.step, len(record.losses)) == (step + 1, 3)
            assert (record.slope, record.curvature) == pytest.approx((squared, 2.0 * squared), rel=1e-9)
        squared = gradient.square().sum().item()
        turns.reverse()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_blocks_need_no_middle(use_reentrant: bool) -> None:
    inputs, targets = regression_data(dtype=torch.float64)
    runs = []
    for is_checkpointed in (False, True):
        model = mlp(dtype=torch.float64)
        optimizer = looking(model.parameters())

        def closure(is_checkpointed: bool = is_checkpointed, model: Any = model, optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            hidden = model[0](inputs).requires_grad_()
            if is_checkpointed:
                outputs = checkpoint(model[1:], hidden, use_reentrant=use_reentrant)
            else:
                outputs = model[1:](hidden)
            loss = nn.functional.mse_loss(outputs, targets)
            loss.backward()
            return loss

        records = []
        optimizer.register_probe_hook(lambda _, record, records=records: records.append(record))
        for _ in range(5):
            optimizer.step(closure)
        runs.append((parameters_of(model), records))
        assert [len(record.losses) for record in records] == [2] * 4
    assert same(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]


# --- nothing is left behind ------------------------------------------------------------------------------------------


def looking(parameters: Any, **options: Any) -> GeNOptimizer:
    return gen_sgd(parameters, **{"mode": "lookback", "rule": "published", "period": 1, **options})


def streams() -> tuple[Any, ...]:
    numpy = [part.tolist() if isinstance(part, np.ndarray) else part for part in np.random.get_state()]
    return random.getstate(), numpy, torch.get_rng_state().tolist()


def seed_all() -> None:
    torch.manual_seed(1), random.seed(1), np.random.seed(1)


def noisy(_: Training) -> None:
    """Draw from every global stream, as augmentation inside a closure does."""
    random.random(), np.random.rand(), torch.rand(1)


def zeroed_anew(training: Training) -> Callable[[], Tensor]:
    """A closure whose gradients are not known to be those of the loss: it needs the middle."""

    def closure() -> Tensor:
        training.optimizer.zero_grad(set_to_none=False)
        loss = training.loss()
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("half_way", [False, True])
def test_a_look_back_leaves_no_trace_but_its_learning_rate(half_way: bool) -> None:
    """With the learning rate held, it must equal the bare optimizer: parameters, buffers, gradients, streams."""
    runs = []
    for make in (
        lambda parameters: looking(parameters, lr=0.05, lr_min=0.05, lr_max=0.05),
        lambda parameters: SGD(parameters, lr=0.05, momentum=0.9),
    ):
        training = Training.of(make, mlp(dropout=0.5, norm=True))
        training.before_return = noisy
        seed_all()
        closure = zeroed_anew(training) if half_way else training.closure
        with torch.no_grad():
            losses = [float(training.optimizer.step(closure)) for _ in range(6)]
            assert not torch.is_grad_enabled()
        gradients = [parameter.grad for parameter in training.model.parameters()]
        state = [each["momentum_buffer"] for each in training.optimizer.state.values()]
        runs.append((losses, list(training.model.state_dict().values()), gradients, state, streams(), training.probes))
    (losses, tensors, gradients, state, drawn, probes), (bare_losses, *bare_tensors, bare_drawn, _) = runs
    assert probes == 5 * (2 if half_way else 1)
    assert losses == bare_losses
    for mine, bares in zip((tensors, gradients, state), bare_tensors, strict=True):
        assert same(mine, bares)
    assert drawn == bare_drawn


@pytest.mark.parametrize("half_way", [False, True])
def test_all_calls_of_a_look_back_see_the_same_dropout_masks(half_way: bool) -> None:
    masks: list[Tensor] = []
    training = Training.of(looking, mlp(dropout=0.5))
    training.model[3].register_forward_hook(lambda module, args, output: masks.append(output == 0))
    closure = zeroed_anew(training) if half_way else training.closure
    training.optimizer.step(closure)
    first = masks.pop()
    for _ in range(3):
        masks.clear()
        training.optimizer.step(closure)
        assert len(masks) == (3 if half_way else 2)
        assert same(masks[:1] * len(masks), masks)
        assert not torch.equal(masks[0], first)


def test_gradients_are_enabled_in_the_first_call_only_and_absent_in_the_other() -> None:
    seen: list[tuple[bool, bool, bool]] = []
    training = Training.of(looking)
    training.train(1)
    training.before_return = lambda self: seen.append(
        (self.optimizer.is_probing, torch.is_grad_enabled(), any(p.grad is not None for p in self.model.parameters()))
    )
    training.train(1)
    assert seen == [(False, True, False), (True, False, False)]
    assert not training.optimizer.is_probing


def test_gradients_of_another_network_are_left_alone() -> None:
    generator, critic = mlp(), nn.Linear(1, 1)
    other, optimizer = SGD(critic.parameters(), lr=0.1), looking(generator.parameters())
    inputs, _ = regression_data()
    seen = []

    def closure() -> Tensor:
        optimizer.zero_grad(), other.zero_grad()
        loss = -critic(generator(inputs)).mean()
        loss.backward()
        seen.append([parameter.grad for parameter in critic.parameters()])
        return loss

    optimizer.step(closure)
    seen.clear()
    optimizer.step(closure)
    assert seen[1:] == [[None, None]]
    assert all(mine.grad is theirs for mine, theirs in zip(critic.parameters(), seen[0], strict=True))
    assert len(optimizer.last_probe.losses) == 2


def test_steps_equal_those_of_the_bare_optimizer_at_the_same_learning_rates() -> None:
    wrapped, bare = Training.of(lambda p: looking(p, period=3)), Training.of(lambda p: SGD(p, lr=0.1, momentum=0.9))
    calls = []
    for _ in range(12):
        wrapped.calls = 0
        wrapped.train(1)
        calls.append(wrapped.calls)
        bare.optimizer.param_groups[0]["lr"] = wrapped.optimizer.get_last_lr()[0]
        bare.train(1)
        assert same(parameters_of(wrapped.model), parameters_of(bare.model))
    assert len({record for record in wrapped.optimizer.param_groups[0].items() if record[0] == "gen_lr"}) == 1
    assert calls == [1, 2, 1, 1, 2, 1, 1, 2, 1, 1, 2, 1]
    assert wrapped.optimizer.param_groups[0]["lr"] != 0.1


def test_a_copy_is_held_between_two_steps_only_where_the_second_looks_back() -> None:
    training = Training.of(lambda parameters: looking(parameters, period=3))
    held = []
    for _ in range(8):
        training.train(1)
        held.append(training.optimizer._kept is not None)
    assert held == [True, False, False, True, False, False, True, False]


def test_a_copy_serves_again_in_the_next_look_back_and_the_second_one_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    training = Training.of(looking)
    step, visit_middle = training.optimizer.base_optim.step, KeptPoint.visit_middle

    def count() -> None:
        alive.append(len({id(found) for copy in copies if (found := copy()) is not None}) // 4)

    def spy(kept: KeptPoint) -> None:
        visit_middle(kept)
        copies.extend(weakref.ref(each) for held in (kept._copies, kept._starts) for each in held)
        count()

    def base_step() -> None:
        count()
        step()

    monkeypatch.setattr(KeptPoint, "visit_middle", spy)
    monkeypatch.setattr(training.optimizer.base_optim, "step", base_step)
    gc.disable()
    try:
        for _ in range(4):
            training.optimizer.step(zeroed_anew(training))
    finally:
        gc.enable()
    assert alive == [0, *[2, 1] * 3]  # half way, and when the base optimizer steps: the one that serves again


def test_steps_with_nothing_to_probe_keep_no_copy() -> None:
    training = Training.of(looking)
    for _ in range(3):
        training.closure()
        training.optimizer.step()
        assert training.optimizer._kept is None
    training.train(2)
    assert training.optimizer.last_probe.step == 5


# --- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("failing", [2, 3])
@pytest.mark.parametrize("as_probe", [False, True])
def test_an_exception_in_a_look_back_ends_the_step_as_a_lazy_one(
    error: type[BaseException], failing: int, as_probe: bool
) -> None:
    trainings = []
    for _ in range(2):
        training = Training.of(looking, mlp(dropout=0.5, norm=True))
        seed_all()
        for _ in range(3):
            training.optimizer.step(zeroed_anew(training))
        trainings.append(training)
    failed, lazy = trainings
    optimizer, record = failed.optimizer, failed.optimizer.last_probe
    failed.calls = 0

    def fail(self: Training) -> None:
        noisy(self)
        if self.calls == failing:
            raise error("on purpose")

    failed.before_return = fail
    seed_all()
    given: dict[str, Any] = {"closure": zeroed_anew(failed)}
    if as_probe:
        zeroed_anew(failed)()
        failed.calls = 1 if failing == 2 else 0
        given = {"probe": failed.loss}
    with pytest.raises(error, match="on purpose"):
        optimizer.step(**given)
    state = streams()
    lazy.before_return = noisy
    seed_all()
    lazy.optimizer.zero_grad(set_to_none=False)
    lazy.loss().backward()
    lazy.optimizer.step()  # neither closure nor probe: the base optimizer's step

    assert same(list(failed.model.state_dict().values()), list(lazy.model.state_dict().values()))
    assert same([p.grad for p in failed.model.parameters()], [p.grad for p in lazy.model.parameters()])
    assert state == streams()
    for mine, theirs in zip(optimizer.state.values(), lazy.optimizer.state.values(), strict=True):
        assert torch.equal(mine["momentum_buffer"], theirs["momentum_buffer"])
    assert optimizer.param_groups[0]["gen_step"] == 4
    assert optimizer.last_probe is record
    assert not optimizer.is_probing
    failed.before_return = lambda self: None
    failed.train(1)
    assert optimizer.last_probe.step == 5  # the next one looks back as ever


def test_a_closure_that_fails_may_be_called_again() -> None:
    failed, other = (Training.of(looking, mlp(norm=True)) for _ in range(2))
    failed.train(3), other.train(3)
    failed.before_return = lambda self: 1 / 0
    with pytest.raises(ZeroDivisionError):
        failed.train(1)
    failed.before_return = lambda self: None
    failed.model.load_state_dict(other.model.state_dict())
    assert failed.optimizer._pending() is None  # loaded: parameters have been written
    failed.train(1), other.train(1)

    again = Training.of(looking)
    again.train(3)
    state = str(again.optimizer.state_dict())
    again.before_return = lambda self: 1 / 0
    with pytest.raises(ZeroDivisionError):
        again.train(1)
    assert str(again.optimizer.state_dict()) == state
    again.before_return = lambda self: None
    again.train(1)
    assert again.optimizer.last_probe.step == 4


def diverging(training: Training, bad: float, *, everywhere: bool = False) -> Callable[[], Tensor]:
    """A closure whose loss is ``bad`` where the last step has led, and if told so where it began too."""

    def closure() -> Tensor:
        training.optimizer.zero_grad()
        loss = training.loss()
        if everywhere or not training.optimizer.is_probing:
            loss = loss * bad
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e9])
def test_a_step_that_has_led_astray_is_taken_back(bad: float) -> None:
    training = Training.of(lambda p: gen_adamw(p, mode="lookback"), mlp(norm=True, dtype=torch.float64))
    training.train(12)
    before, buffers = parameters_of(training.model), [each.clone() for each in training.model.buffers()]
    training.train(1)
    after, lr = [each.clone() for each in training.model.buffers()], training.optimizer.param_groups[0]["lr"]
    assert not same(buffers, after)
    state = copy.deepcopy(list(training.optimizer.state.values()))

    loss = training.optimizer.step(diverging(training, bad))

    record = training.optimizer.last_probe
    assert record.status is ProbeStatus.TAKEN_BACK
    assert (record.step, record.lr_before, record.lr_after) == (14, lr, lr / 2)
    assert loss.item() == pytest.approx(bad * record.losses[0], rel=0.5, nan_ok=True)
    assert same(parameters_of(training.model), before)
    assert same(list(training.model.buffers()), after)  # what the far end has shown the model's statistics is gone
    for mine, theirs in zip(training.optimizer.state.values(), state, strict=True):
        assert all(torch.equal(torch.as_tensor(mine[name]), torch.as_tensor(theirs[name])) for name in theirs)
    assert training.optimizer.param_groups[0]["lr"] == lr / 2
    losses = training.train(40)
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0]
    assert training.optimizer.last_probe.status is not ProbeStatus.TAKEN_BACK


def test_statistics_of_a_loss_that_is_not_finite_do_not_stay() -> None:
    training = Training.of(lambda p: gen_adamw(p, mode="lookback"), mlp(norm=True))
    training.train(12)
    inputs = training.inputs.clone()

    def spoil() -> Tensor:
        training.optimizer.zero_grad()
        if not training.optimizer.is_probing:
            training.inputs = inputs * math.inf
        loss = training.loss()
        training.inputs = inputs
        loss.backward()
        return loss

    training.optimizer.step(spoil)
    assert training.optimizer.last_probe.status is ProbeStatus.TAKEN_BACK
    assert all(bool(torch.isfinite(buffer).all()) for buffer in training.model.buffers())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("rule", ["relaxed", "published"])
def test_a_batch_that_is_not_finite_anywhere_teaches_nothing_and_steps_as_the_base_would(bad: float, rule: str) -> None:
    training = Training.of(lambda parameters: gen_sgd(parameters, mode="lookback", rule=rule, period=1))
    training.train(6)
    twin = copy.deepcopy(training.model)
    bare = SGD(twin.parameters(), lr=training.optimizer.param_groups[0]["lr"], momentum=0.9)
    bare.load_state_dict(copy.deepcopy(training.optimizer.base_optim.state_dict()))
    lr, history = training.optimizer.param_groups[0]["lr"], History()
    training.optimizer.register_probe_hook(history)

    def closure() -> float:
        training.closure()
        return bad

    training.optimizer.step(closure)
    Training(twin, bare, training.inputs, training.targets).train(1)
    assert history[0].status is ProbeStatus.NON_FINITE_LOSS
    assert same(parameters_of(training.model), parameters_of(twin))
    assert training.optimizer.param_groups[0]["lr"] == lr
    training.train(1)
    assert training.optimizer.last_probe.status not in (ProbeStatus.NON_FINITE_LOSS, ProbeStatus.TAKEN_BACK)


def test_the_published_rule_takes_nothing_back() -> None:
    training = Training.of(looking)
    training.train(5)
    training.optimizer.step(diverging(training, 1e12))
    assert training.optimizer.last_probe.status is not ProbeStatus.TAKEN_BACK


# --- what happens between two steps ----------------------------------------------------------------------------------


def test_a_scheduler_that_stands_at_zero_is_survived() -> None:
    training = Training.of(lambda parameters: gen_sgd(parameters, mode="lookback"))
    factors = iter([0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 0.5, 0.0, 1.0, 1.0, 1.0])
    scheduler = lr_scheduler.LambdaLR(training.optimizer, lambda _: next(factors))
    history = History()
    training.optimizer.register_probe_hook(history)
    losses = []
    for _ in range(12):
        before = parameters_of(training.model)
        losses += training.train(1, None)
        factor = training.optimizer.param_groups[0]["lr"] / training.optimizer.param_groups[0]["initial_lr"]
        assert same(parameters_of(training.model), before) == (factor == 0.0)
        scheduler.step()
    assert all(math.isfinite(record.lr_after) and record.lr_after > 0 for record in history)
    assert {0.0, 1.0} <= {record.factor for record in history}
    assert losses[-1] < losses[0]
    for record in history:
        if record.factor == 0.0 and record.status is not ProbeStatus.STARTED:
            assert record.lr_after == record.lr_before


def test_the_learning_rate_looked_back_at_is_that_of_the_step_the_schedulers_factor_included() -> None:
    training = Training.of(lambda p: looking(p, lr=0.05, lr_min=0.05, lr_max=0.05))
    scheduler = lr_scheduler.LambdaLR(training.optimizer, lambda epoch: 0.5**epoch)
    history = History()
    training.optimizer.register_probe_hook(history)
    training.train(4, scheduler)
    assert [record.multiples for record in history] == [(0.0, 1.0), (0.0, 0.5), (0.0, 0.25)]
    assert [record.factor for record in history] == [0.5, 0.25, 0.125]


def test_parameters_written_by_hand_cost_one_parabola() -> None:
    training = Training.of(looking)
    training.train(3)
    assert training.optimizer.last_probe.step == 3
    training.model.load_state_dict(copy.deepcopy(training.model.state_dict()))
    training.train(1)
    assert training.optimizer.last_probe.step == 3
    training.train(1)
    assert training.optimizer.last_probe.step == 5


def test_groups_that_are_frozen_added_and_of_other_ratios() -> None:
    model = mlp(dtype=torch.float64)
    groups = [
        {"params": [model[0].weight], "lr": 0.0},
        {"params": [model[0].bias], "lr": 0.02},
        {"params": [model[4].weight], "lr": 0.06},
    ]
    optimizer = GeNOptimizer(SGD(groups, lr=1.0, momentum=0.9), mode="lookback", rule="published", period=1)
    training = Training(model, optimizer, *regression_data(dtype=torch.float64))
    frozen = model[0].weight.detach().clone()
    training.train(3)
    assert optimizer.last_probe.step == 3
    assert optimizer.last_probe.lr_after == optimizer.param_groups[1]["lr"]
    assert torch.equal(model[0].weight, frozen)
    optimizer.add_param_group({"params": [model[4].bias]})
    training.train(1)
    assert optimizer.last_probe.step == 3  # the last step was one of fewer parameters
    before = parameters_of(model)
    training.train(1)
    record = optimizer.last_probe
    assert record.step == 5
    lrs = [group["lr"] for group in optimizer.param_groups]
    assert lrs[2] / lrs[1] == pytest.approx(3.0, rel=1e-12)
    assert lrs[3] == pytest.approx(lrs[1], rel=1e-12)
    # The parabola is that of all groups together: their next step from here, at their ratios.
    optimizer.param_groups[0]["lr"] = lrs[1]  # let go
    training.train(2)
    assert not torch.equal(model[0].weight, frozen)
    assert not same(parameters_of(model), before)
    assert optimizer.last_probe.step == 7


def test_the_parabola_of_groups_is_that_of_their_common_step() -> None:
    model = mlp(dtype=torch.float64)
    groups = [{"params": model[0].parameters(), "lr": 1e-4}, {"params": model[4].parameters(), "lr": 3e-4}]
    optimizer = GeNOptimizer(SGD(groups, lr=1.0), mode="lookback", rule="published", period=1, lr_max=1e-4, lr_min=1e-4)
    training = Training(model, optimizer, *regression_data(dtype=torch.float64))
    training.train(1)
    after = parameters_of(model)
    gradient_before = [parameter.grad.clone() for parameter in model.parameters()]
    training.train(1)
    ratios = [1.0, 1.0, 3.0, 3.0]
    expected = sum((ratio * g.square().sum()).item() for ratio, g in zip(ratios, gradient_before, strict=True))
    assert optimizer.last_probe.slope == pytest.approx(expected, rel=1e-6)
    assert not same(parameters_of(model), after)


@pytest.mark.parametrize("mode", ["lookback", "approximate"])
def test_a_scheduler_that_holds_the_first_group_at_zero_does_not_blind_the_probes(mode: str) -> None:
    model = mlp()
    groups = [{"params": model[0].parameters()}, {"params": model[4].parameters()}]
    training = Training(model, GeNOptimizer(AdamW(groups), mode=mode), *regression_data())
    scheduler = lr_scheduler.LambdaLR(training.optimizer, [lambda _: 0.0, lambda _: 0.5])
    before = model[0].weight.detach().clone()
    training.train(10, scheduler)
    record = training.optimizer.last_probe
    assert torch.equal(model[0].weight, before)
    assert (record.step, record.factor, record.status) == (10, 0.5, ProbeStatus.FITTED)
    assert record.lr_after > record.lr_before
    if mode == "lookback":
        assert record.multiples == (0.0, 0.5)


def test_a_learning_rate_written_by_hand_is_where_it_goes_on() -> None:
    training = Training.of(lambda parameters: gen_adamw(parameters, mode="lookback"))
    training.train(4)
    training.optimizer.param_groups[0]["lr"] = 0.02
    training.train(1)
    assert training.optimizer.last_probe.lr_before == 0.02
    assert training.optimizer.last_probe.lr_after == pytest.approx(0.02, rel=0.2)


# --- parameters of every kind ----------------------------------------------------------------------------------------


def test_maximize_climbs_as_minimising_descends() -> None:
    runs = []
    for sign in (1.0, -1.0):
        training = Training.of(
            lambda p, sign=sign: GeNOptimizer(SGD(p, lr=0.1, maximize=sign < 0), mode="lookback"), mlp(norm=True)
        )
        history = History()
        training.optimizer.register_probe_hook(history)

        def closure(training: Training = training, sign: float = sign) -> Tensor:
            training.optimizer.zero_grad()
            gain = sign * training.loss()
            gain.backward()
            return gain

        gains = [sign * training.optimizer.step(closure).item() for _ in range(12)]
        runs.append((gains, parameters_of(training.model), list(history)))
        assert {len(record.losses) for record in history[1:]} == {2}  # gradients are known to be the loss's
    assert runs[0][0] == runs[1][0]
    assert same(runs[0][1], runs[1][1])
    assert runs[0][2] == runs[1][2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_no_parameter_of_any_precision_changes_by_being_looked_back_at(dtype: torch.dtype) -> None:
    wrapped = Training.of(lambda p: looking(p, lr=0.01, lr_min=0.01, lr_max=0.01), mlp(dtype=dtype))
    bare = Training.of(lambda p: SGD(p, lr=0.01, momentum=0.9), mlp(dtype=dtype))
    for _ in range(8):
        wrapped.train(1), bare.train(1)
        assert same(parameters_of(wrapped.model), parameters_of(bare.model))
    assert wrapped.probes >= 7


def test_half_precision_trains() -> None:
    training = Training.of(lambda p: gen_adamw(p, mode="lookback"), mlp(dtype=torch.bfloat16))
    losses = training.train(150)
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("half_way", [False, True])
@pytest.mark.parametrize("make", [lambda p: SGD(p, lr=0.05, momentum=0.9), lambda p: AdamW(p, lr=0.05)])
def test_complex_parameters(make: Any, half_way: bool) -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(5, dtype=torch.complex128))
    target = torch.randn(5, dtype=torch.complex128)
    optimizer = GeNOptimizer(make([weight]), mode="lookback", rule="published", period=1)
    seen: list[tuple[float, float]] = []
    before = lr = None
    for _ in range(6):
        here = weight.detach().clone()

        def closure() -> Tensor:
            optimizer.zero_grad(set_to_none=not half_way)
            loss = (weight - target).abs().square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        if before is not None:
            direction = (before - here) / lr
            slope = 2.0 * (direction.conj() * (before - target)).sum().real.item()
            seen.append((slope, 2.0 * direction.abs().square().sum().item()))
            record = optimizer.last_probe
            assert len(record.losses) == (3 if half_way else 2)
            assert (record.slope, record.curvature) == pytest.approx(seen[-1], rel=1e-8)
        before, lr = here, optimizer.get_last_lr()[0]
    assert len(seen) == 5


# --- checkpoints -----------------------------------------------------------------------------------------------------


def records_of(training: Training) -> list[ProbeRecord]:
    records: list[ProbeRecord] = []
    training.optimizer.register_probe_hook(lambda _, record: records.append(record))
    return records


def copies(training: Training) -> Iterator[Training]:
    model, optimizer = copy.deepcopy((training.model, training.optimizer))
    yield Training(model, optimizer, training.inputs, training.targets)
    model, optimizer = pickle.loads(pickle.dumps((training.model, training.optimizer)))
    yield Training(model, optimizer, training.inputs, training.targets)


@pytest.mark.parametrize("make", [gen_adamw, gen_sgd])
def test_copies_go_on_to_the_bit_after_every_step(make: Any) -> None:
    training = Training.of(lambda parameters: make(parameters, mode="lookback", burn_in=4, period=3))
    for step in range(21):
        reference = None
        for twin in copies(training):
            records = records_of(twin)
            result = (twin.train(5), records)
            reference = result if reference is None else reference
            assert result == reference
        original, records = copy.deepcopy(training.model), records_of(training)
        expected = training.train(1)
        assert reference is not None
        assert reference[0][:1] == expected
        assert [record for record in reference[1] if record.step == step + 1] == records
        assert not same(parameters_of(original), parameters_of(training.model))


def test_copies_share_no_kept_point() -> None:
    training = Training.of(looking)
    training.train(3)
    twin = next(copies(training))
    before = parameters_of(training.model)
    twin.train(3)
    assert same(parameters_of(training.model), before)
    assert training.optimizer._pending() is not None
