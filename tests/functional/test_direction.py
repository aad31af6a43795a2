"""The direction of an optimizer against the steps that it takes."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from gen_optim import GeNOptimizer
from gen_optim.functional.derivatives import loss_along, quadratic_model
from gen_optim.functional.direction import optimizer_direction
from tests.functional.problems import ALL_OPTIMIZERS, OPTIMIZERS, Problem, detached, randn

# --- the direction of an optimizer -----------------------------------------------------------------------------------


def snapshot(optimizer: torch.optim.Optimizer) -> Any:
    return copy.deepcopy(
        [
            [[parameter.detach(), parameter.grad] for group in optimizer.param_groups for parameter in group["params"]],
            optimizer.state_dict(),
            torch.get_rng_state(),
            random.getstate(),
            list(np.random.get_state()),
        ]
    )


def assert_identical(left: Any, right: Any) -> None:
    assert type(left) is type(right)
    if isinstance(left, Tensor):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)
    elif isinstance(left, np.ndarray):
        assert (left == right).all()
    elif isinstance(left, dict):
        assert_identical(list(left.items()), list(right.items()))
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            assert_identical(a, b)
    else:
        assert left == right


@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "in GeNOptimizer"])
@pytest.mark.parametrize("optimizer", ALL_OPTIMIZERS)
def test_direction_is_that_of_the_next_step(optimizer: str, wrapped: bool) -> None:
    problem = Problem("linear", ALL_OPTIMIZERS[optimizer])
    base = problem.optimizer
    named = list(problem.model.named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in named}
    given_optimizer = GeNOptimizer(base) if wrapped else base
    lr = float(base.param_groups[0]["lr"])
    direction = optimizer_direction(given_optimizer, named)
    base.step()
    for name, parameter in named:
        torch.testing.assert_close(direction[name], (before[name] - parameter.detach()) / lr, rtol=1e-9, atol=1e-11)
        assert not direction[name].requires_grad


@pytest.mark.parametrize("optimizer", ALL_OPTIMIZERS)
def test_direction_leaves_no_trace(optimizer: str) -> None:
    problem = Problem("linear", ALL_OPTIMIZERS[optimizer])
    parameters = [each for group in problem.optimizer.param_groups for each in group["params"]]
    objects = [id(each) for each in parameters] + [id(each.grad) for each in parameters]
    objects += [id(group["lr"]) for group in problem.optimizer.param_groups]
    objects += [id(value) for state in problem.optimizer.state.values() for value in state.values()]
    versions = [(each._version, each.grad._version) for each in parameters if each.grad is not None]
    before = snapshot(problem.optimizer)
    attributes = dict(vars(problem.optimizer))
    direction = problem.direction
    assert_identical(before, snapshot(problem.optimizer))
    assert vars(problem.optimizer) == attributes
    assert versions == [(each._version, each.grad._version) for each in parameters if each.grad is not None]
    now = [id(each) for each in parameters] + [id(each.grad) for each in parameters]
    now += [id(group["lr"]) for group in problem.optimizer.param_groups]
    now += [id(value) for state in problem.optimizer.state.values() for value in state.values()]
    assert now == objects
    assert_identical(direction, problem.direction)


@pytest.mark.parametrize("optimizer", ["SGD", "momentum", "AdamW", "RMSprop"])
@pytest.mark.parametrize("lr", [1e-8, 1e-3, 1.0, 0.0])
def test_tiny_learning_rates_cost_no_accuracy(optimizer: str, lr: float) -> None:
    """In float32, where the difference of two parameters 1e-8 apart is nothing but rounding."""
    exact = Problem("linear", OPTIMIZERS[optimizer], dtype=torch.float64)
    problem = Problem("linear", OPTIMIZERS[optimizer], dtype=torch.float32)
    with torch.no_grad():
        for ours, theirs in zip(problem.model.parameters(), exact.model.parameters(), strict=True):
            theirs.copy_(ours)
            assert ours.grad is not None
            theirs.grad = ours.grad.double()
            for key, value in problem.optimizer.state[ours].items():
                if isinstance(value, Tensor) and value.dim():
                    exact.optimizer.state[theirs][key].copy_(value)
    problem.optimizer.param_groups[0]["lr"] = lr
    expected, found = exact.direction, problem.direction
    for name in expected:
        if lr == 0.0:
            assert not found[name].any()
        else:
            torch.testing.assert_close(found[name].double(), expected[name], rtol=1e-5, atol=1e-6)


def test_groups_are_scaled_by_their_ratio_to_the_first_unfrozen() -> None:
    weights = {name: nn.Parameter(randn(3, seed=index)) for index, name in enumerate("abcd")}
    for index, weight in enumerate(weights.values()):
        weight.grad = randn(3, seed=10 + index)
    weights["d"].grad = None
    optimizer = torch.optim.SGD(
        [
            {"params": [weights["a"]], "lr": 0.0},
            {"params": [weights["b"]], "lr": torch.tensor(1e-8, dtype=torch.float64)},
            {"params": [weights["c"], weights["d"]], "lr": 3e-8, "weight_decay": 0.1},
        ],
        lr=0.1,
    )
    found = optimizer_direction(optimizer, {**weights, "other": randn(2)})
    assert found["other"].tolist() == [0.0, 0.0]
    assert not found["a"].any()
    assert not found["d"].any()
    assert weights["b"].grad is not None
    assert weights["c"].grad is not None
    torch.testing.assert_close(found["b"], weights["b"].grad)
    torch.testing.assert_close(found["c"], 3 * (weights["c"].grad + 0.1 * weights["c"].detach()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_direction_in_low_precision(dtype: torch.dtype) -> None:
    weight = nn.Parameter(randn(100).to(dtype))
    weight.grad = randn(100, seed=1).to(dtype)
    optimizer = torch.optim.SGD([weight], lr=1e-3)
    found = optimizer_direction(optimizer, {"w": weight})["w"]
    torch.testing.assert_close(found, weight.grad, rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)


def test_schedulers_and_hooks_are_not_called() -> None:
    problem = Problem("linear", OPTIMIZERS["SGD"])
    called: list[str] = []
    problem.optimizer.register_step_pre_hook(lambda *_: called.append("pre"))
    scheduler = torch.optim.lr_scheduler.StepLR(problem.optimizer, 1)
    count = problem.optimizer._opt_called if hasattr(problem.optimizer, "_opt_called") else None
    handle = register_optimizer_step_post_hook(lambda *_: called.append("post"))
    assert problem.direction
    handle.remove()
    assert called == []
    assert (problem.optimizer._opt_called if hasattr(problem.optimizer, "_opt_called") else None) == count
    assert scheduler.last_epoch == 0


def test_attributes_of_an_own_class_are_kept() -> None:
    class Own(torch.optim.SGD):
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, lr=0.1)
            self.factors = {id(parameter): 2.0 for parameter in self.param_groups[0]["params"]}
            self.favourite = self.param_groups[0]["params"][0]

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            assert self.favourite is self.param_groups[0]["params"][0]
            for parameter in self.param_groups[0]["params"]:
                parameter.sub_(self.param_groups[0]["lr"] * 2.0 * parameter.grad)

    weight = nn.Parameter(randn(3))
    weight.grad = randn(3, seed=1)
    torch.testing.assert_close(optimizer_direction(Own([weight]), {"w": weight})["w"], 2.0 * weight.grad)


def test_direction_of_an_optimizer_that_draws_random_numbers() -> None:
    class Langevin(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for parameter in self.param_groups[0]["params"]:
                parameter.sub_(self.param_groups[0]["lr"] * (parameter.grad + torch.randn_like(parameter)))

    weight = nn.Parameter(randn(3))
    weight.grad = randn(3, seed=1)
    optimizer = Langevin([weight], lr=0.1)
    state, before = torch.get_rng_state(), weight.detach().clone()
    found = optimizer_direction(optimizer, {"w": weight})["w"]
    assert torch.equal(state, torch.get_rng_state())
    optimizer.step()
    torch.testing.assert_close(found, (before - weight.detach()) / 0.1)


def test_optimizer_that_writes_into_gradients() -> None:
    class Halving(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for parameter in self.param_groups[0]["params"]:
                parameter.sub_(self.param_groups[0]["lr"] * parameter.grad.mul_(0.5))

    weight = nn.Parameter(randn(3))
    weight.grad = randn(3, seed=1)
    found = optimizer_direction(Halving([weight], lr=0.1), {"w": weight})["w"]
    assert torch.equal(weight.grad, randn(3, seed=1))
    torch.testing.assert_close(found, 0.5 * weight.grad)


def test_missing_parameters_and_strange_optimizers_are_refused() -> None:
    weight, other = nn.Parameter(randn(3)), nn.Parameter(randn(2))
    with pytest.raises(ValueError, match=r"param_groups\[1\].*model.named_parameters"):
        optimizer_direction(torch.optim.SGD([{"params": [weight]}, {"params": [other]}]), {"w": weight})
    with pytest.raises(TypeError, match="step without a closure"):
        optimizer_direction(torch.optim.LBFGS([weight]), {"w": weight})
    with pytest.raises(ValueError, match="proportional"):
        optimizer_direction(torch.optim.Rprop([weight]), {"w": weight})


class DecayAfterwards(torch.optim.SGD):
    """(θ − αu)(1 − αw), which is proportional to the learning rates of training alone."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for each in group["params"]:
                    each.mul_(1.0 - group["lr"] * 0.01)


def test_weight_decay_after_the_update_is_refused() -> None:
    weight = nn.Parameter(torch.tensor([2.0]))
    weight.grad = torch.ones(1)
    with pytest.raises(ValueError, match=r"DecayAfterwards must be proportional .* set weight_decay=0"):
        optimizer_direction(DecayAfterwards([weight], lr=0.01), {"weight": weight})


def test_rounding_is_no_departure() -> None:
    """Of gradients of very different sizes in half precision the direction at one is all rounding."""
    weights = [nn.Parameter(torch.tensor([value], dtype=torch.float16)) for value in (1.0, 10.0)]
    for weight, gradient in zip(weights, (100.0, 0.005), strict=True):
        weight.grad = torch.tensor([gradient], dtype=torch.float16)
    direction = optimizer_direction(torch.optim.SGD(weights, lr=1.0), {"large": weights[0], "small": weights[1]})
    assert direction["large"].item() == pytest.approx(100.0, rel=0.01)


def test_predicted_loss_of_the_next_step() -> None:
    """All parts together: the parabola along an optimizer's direction predicts what its step does."""
    problem = Problem("LayerNorm", OPTIMIZERS["AdamW"])
    params, direction = detached(problem.model), problem.direction
    parabola = quadratic_model(problem.loss, params, direction)
    lr = 1e-4
    problem.optimizer.param_groups[0]["lr"] = lr
    losses = loss_along(problem.loss, params, direction, [lr], chunk_size=1)
    problem.optimizer.step()
    after = problem.loss(detached(problem.model)).item()
    assert losses.item() == pytest.approx(after, rel=1e-12)
    assert parabola.predict(lr) - parabola.value == pytest.approx(after - parabola.value, rel=1e-4)
