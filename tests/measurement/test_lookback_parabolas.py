"""What a look back measures: the parabola of the new batch, at one more call or at two."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW
from torch.utils.checkpoint import checkpoint

from gen_optim import GeNOptimizer, History
from tests.training import looking, mlp, parameters_of, regression_data, same

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
        is_first = not len(self.history)
        self.optimizer.step(functools.partial(self.closure if closure is None else closure, batch))
        if is_first and len(self.history):  # the first probe step evaluates the loss once more, to compare
            self.calls -= 1
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


def calls_and_losses(closure: Any) -> list[tuple[int, int]]:
    """Of four steps with a closure: how often the loss was evaluated, and at how many points; the parabola is its."""
    case = Quadratic(0, noise=1.0)
    case.step()
    seen = []
    for _ in range(4):
        case.calls = 0
        slope, curvature = case.step(functools.partial(closure, case))
        seen.append((case.calls, len(case.history[-1].losses)))
        assert (case.history[-1].slope, case.history[-1].curvature) == pytest.approx((slope, curvature), rel=1e-8)
    return seen


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
        scaled,
        scaled_by_gradient,
        penalised,
        assigned,
        zeroed_in_place,
        pytest.param(
            accumulated_beyond_a_step,
            marks=pytest.mark.filterwarnings("ignore:At step 2 the closure of GeNOptimizer has added to the gradients"),
        ),
    ],
)
def test_gradients_of_something_else_cost_a_second_call_and_the_parabola_is_the_losss(closure: Any) -> None:
    assert calls_and_losses(closure) == [(3, 3)] * 4


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


def clipped(case: Quadratic, batch: Tensor) -> Tensor:
    loss = case.closure(batch)
    if not case.optimizer.is_probing:
        nn.utils.clip_grad_norm_([case.x], 1e-3)
    return loss


def penalised_in_gradients(case: Quadratic, batch: Tensor) -> Tensor:
    loss = case.closure(batch)
    if not case.optimizer.is_probing:
        case.x.grad.add_(case.x.detach(), alpha=0.1)
    return loss


def replaced_afterwards(case: Quadratic, batch: Tensor) -> Tensor:
    loss = case.closure(batch)
    if not case.optimizer.is_probing:
        case.x.grad = case.x.grad.sign()
    return loss


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
        clipped,
        penalised_in_gradients,
        replaced_afterwards,
        returned_in_another_shape,
        differentiated_inside,
    ],
)
def test_gradients_of_the_loss_cost_one_call_in_whatever_way_they_come(closure: Any) -> None:
    retried = closure is differentiated_inside  # once without gradients, in vain
    assert calls_and_losses(closure) == [(2 + retried, 2)] + [(2, 2)] * 3


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
        if len(case.history) == 1:  # the first probe step evaluates the loss once more, to compare
            assert torch.equal(probed.pop(1), case.before)
        if len(case.history):
            assert same(probed, [case.before, before, torch.lerp(before, case.before, 0.5)])
            assert case.history[-1].slope == pytest.approx((direction @ (case.hessian @ before - other)).item())
            assert case.history[-1].curvature == pytest.approx((direction @ case.hessian @ direction).item())
        else:
            assert not probed
    assert len(case.history) == 3


def test_gradients_that_are_not_finite_cost_a_second_call() -> None:
    case = Quadratic(0)
    case.step()

    def closure(batch: Tensor) -> Tensor:
        case.optimizer.zero_grad()
        loss = case.loss(batch) + 0.0 * (case.x - case.x.detach()).abs().sqrt().sum()  # its gradient is NaN
        loss.backward()
        if not case.optimizer.is_probing:
            case.x.grad.nan_to_num_()
        return loss

    case.calls = 0
    slope, curvature = case.step(closure)
    assert (case.calls, len(case.history[-1].losses)) == (3, 3)
    assert (case.history[-1].slope, case.history[-1].curvature) == pytest.approx((slope, curvature), rel=1e-8)


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
