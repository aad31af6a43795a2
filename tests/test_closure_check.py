from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from gen_optim import GeNOptimizer, check_closure
from tests.training import Training, gen_adamw, mlp, parameters_of, same

Case = Callable[[], tuple[GeNOptimizer, Callable[[], Any]]]


def training(model: nn.Module | None = None, **options: Any) -> Training:
    return Training.of(lambda parameters: gen_adamw(parameters, **options), model)


# --- what is reproducible --------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.3, batch_first=True)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.block(inputs.unsqueeze(0)).squeeze(0).sum(dim=1, keepdim=True)


def under_autocast(dtype: torch.dtype) -> Case:
    def make() -> tuple[GeNOptimizer, Callable[[], Any]]:
        of = training(mlp(dropout=0.3, norm=True))

        def closure() -> Tensor:
            with torch.autocast("cpu", dtype):
                return of.loss()

        return of.optimizer, closure

    return make


def of_model(make: Callable[[], nn.Module], *, returns_only: bool = False) -> Case:
    def case() -> tuple[GeNOptimizer, Callable[[], Any]]:
        of = training(make())
        return of.optimizer, of.loss if returns_only else of.closure

    return case


def noise_from_global_streams() -> tuple[GeNOptimizer, Callable[[], Any]]:
    of = training()

    def closure() -> Tensor:
        noise = torch.randn(16, 4) + random.random() + float(np.random.rand())
        return nn.functional.mse_loss(of.model(of.inputs + noise), of.targets)

    return of.optimizer, closure


def loss_that_differentiates() -> tuple[GeNOptimizer, Callable[[], Any]]:
    of = training()

    def closure() -> Tensor:
        inputs = of.inputs.clone().requires_grad_()
        [gradient] = torch.autograd.grad(of.model(inputs).sum(), inputs, create_graph=True)
        return of.loss() + gradient.pow(2).mean()

    return of.optimizer, closure


REPRODUCIBLE: dict[str, Case] = {
    "plain": of_model(mlp),
    "loss only": of_model(mlp, returns_only=True),
    "dropout and batch normalisation": of_model(lambda: mlp(dropout=0.5, norm=True)),
    "attention with dropout": of_model(Attention),
    "attention in evaluation mode": of_model(lambda: Attention().eval()),
    "bfloat16": of_model(lambda: mlp(dtype=torch.bfloat16, dropout=0.3)),
    "autocast, bfloat16": under_autocast(torch.bfloat16),
    "autocast, float16": under_autocast(torch.float16),
    "global random streams": noise_from_global_streams,
    "a loss that differentiates": loss_that_differentiates,
}


@pytest.mark.parametrize("case", REPRODUCIBLE.values(), ids=REPRODUCIBLE)
def test_a_reproducible_loss_raises_no_warning(case: Case) -> None:
    optimizer, closure = case()
    losses = check_closure(optimizer, closure)  # a warning is an error here
    assert len(set(losses)) == 1
    assert len(losses) == 4


def test_rounding_is_no_difference_and_the_optimizers_tolerance_says_what_is() -> None:
    of = training()
    wiggle = iter([1.0, 1.0 + 4 * 2.0**-23, 1.0, 1.0])
    check_closure(of.optimizer, lambda: of.loss() * 0 + next(wiggle))
    wiggle = iter([1.0, 1.0 + 4 * 2.0**-23, 1.0, 1.0])
    strict = training(tolerance=1.0)
    with pytest.warns(UserWarning, match="different losses"):
        check_closure(strict.optimizer, lambda: strict.loss() * 0 + next(wiggle))


def test_a_loss_that_is_never_finite_is_no_difference() -> None:
    of = training()
    assert all(loss != loss for loss in check_closure(of.optimizer, lambda: of.loss() * float("nan")))


# --- what is not -----------------------------------------------------------------------------------------------------


def drawing_data() -> tuple[GeNOptimizer, Callable[[], Any]]:
    of = training()
    batches = iter(torch.randn(100, 16, 4))

    def closure() -> Tensor:
        of.inputs = next(batches)
        return of.closure()

    return of.optimizer, closure


def dropout_of_a_generator() -> tuple[GeNOptimizer, Callable[[], Any]]:
    of = training()
    generator = torch.Generator().manual_seed(0)

    def closure() -> Tensor:
        mask = torch.bernoulli(torch.full((16, 4), 0.5), generator=generator)
        return nn.functional.mse_loss(of.model(of.inputs * mask), of.targets)

    return of.optimizer, closure


def overflowing_now_and_then() -> tuple[GeNOptimizer, Callable[[], Any]]:
    of = training()
    factors = iter([1.0, 1.0, float("inf"), 1.0])
    return of.optimizer, lambda: of.loss() * next(factors)


@pytest.mark.parametrize("case", [drawing_data, dropout_of_a_generator, overflowing_now_and_then])
def test_a_loss_that_cannot_be_reproduced_is_warned_of(case: Case) -> None:
    optimizer, closure = case()
    with pytest.warns(UserWarning, match=r"different losses at the same parameters: .*Does the closure draw") as caught:
        losses = check_closure(optimizer, closure)
    assert len(set(losses)) > 1
    assert caught[0].filename == __file__


@pytest.mark.parametrize("different", ["without gradients", "as a probe"])
def test_a_probe_that_differs_from_the_call_with_gradients_is_warned_of(different: str) -> None:
    of = training()

    def closure() -> Tensor:
        differs = not torch.is_grad_enabled() if different == "without gradients" else of.optimizer.is_probing
        return of.loss() * (2.0 if differs else 1.0)

    with pytest.warns(UserWarning, match="With gradients it returned .* as a probe"):
        check_closure(of.optimizer, closure)


# --- the check in the first probe step --------------------------------------------------------------------------------


@pytest.mark.parametrize("case", REPRODUCIBLE.values(), ids=REPRODUCIBLE)
def test_a_reproducible_loss_is_not_warned_of_in_training(case: Case) -> None:
    optimizer, closure = case()
    for _ in range(3):
        optimizer.step(closure)  # a warning is an error here
    assert optimizer.last_probe is not None


def training_another_optimizer_inside() -> tuple[GeNOptimizer, Callable[[], Any]]:
    of, scale = training(), nn.Parameter(torch.ones(()))
    inner = torch.optim.SGD([scale], lr=0.1)

    def closure() -> Tensor:
        inner.zero_grad()
        of.optimizer.zero_grad()
        loss = of.loss() * scale
        loss.backward()
        inner.step()
        return loss

    return of.optimizer, closure


def carrying_a_state() -> tuple[GeNOptimizer, Callable[[], Any]]:
    of = training()
    states = [torch.zeros(16, 4)]

    def closure() -> Tensor:
        states.append(torch.tanh(of.inputs + states[-1]))
        return nn.functional.mse_loss(of.model(states[-1]), of.targets)

    return of.optimizer, closure


@pytest.mark.parametrize(
    "case", [drawing_data, dropout_of_a_generator, training_another_optimizer_inside, carrying_a_state]
)
def test_a_closure_that_differs_between_calls_is_warned_of_in_its_first_step(case: Case) -> None:
    optimizer, closure = case()
    expected = r"closure returned different losses .* draw its batch .* before the step, .*check_closure"
    with pytest.warns(UserWarning, match=expected) as caught:
        optimizer.step(closure)
    assert caught[0].filename == __file__


@pytest.mark.parametrize("offset", [0.1, -0.1])
def test_the_search_compares_losses_of_probes_alone(offset: float) -> None:
    """A closure that carries a state returns another loss in its first call than in all that follow it."""
    of, repeatable = training(), training()

    def closure() -> Tensor:
        loss = of.closure()
        return loss if of.optimizer.is_probing else loss + offset

    with pytest.warns(UserWarning, match="different losses"):
        of.optimizer.step(closure)
    repeatable.train(1)
    assert of.optimizer.last_probe.lr_after == repeatable.optimizer.last_probe.lr_after


@pytest.mark.parametrize("mode", ["lookback", "approximate", "exact"])
@pytest.mark.parametrize("rule", ["relaxed", "published"])
@pytest.mark.parametrize("gives", ["closure", "probe"])
def test_it_is_warned_of_once_in_any_mode_and_of_a_probe_too(mode: str, rule: str, gives: str) -> None:
    of = training(mode=mode, rule=rule, period=1)

    def differing() -> Tensor:
        of.inputs = torch.randn(16, 4, generator=generator)
        return of.closure()

    generator = torch.Generator().manual_seed(0)
    given = {"closure": differing} if gives == "closure" else {"closure": of.closure, "probe": differing}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(4):
            of.optimizer.step(**given)
    assert len([each for each in caught if f"The {gives} returned different losses" in str(each.message)]) == 1


def test_the_check_is_one_more_call_in_the_first_probe_step_and_none_later() -> None:
    of = training(mode="approximate", rule="published", period=1)
    calls = []
    for _ in range(3):
        of.calls = 0
        of.train(1)
        calls.append(of.calls)
    assert calls == [4, 3, 3]


def test_a_first_loss_that_is_not_finite_postpones_the_check() -> None:
    optimizer, drawing = drawing_data()
    optimizer.step(lambda: torch.tensor(float("nan")))
    with pytest.warns(UserWarning, match="different losses"):
        optimizer.step(drawing)


# --- modules that the optimizer does not know -------------------------------------------------------------------------


class Discriminator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp(seed=1, norm=True)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers(inputs)


def adversarial(other: nn.Module, **options: Any) -> tuple[GeNOptimizer, Callable[[], Tensor]]:
    of = training(**options)

    def closure() -> Tensor:
        of.optimizer.zero_grad()
        loss = of.loss() + other(of.inputs).mean()
        loss.backward()
        return loss

    return of.optimizer, closure


def test_a_network_whose_buffers_probes_would_change_is_to_be_named() -> None:
    other = Discriminator()
    optimizer, closure = adversarial(other)
    before = [each.clone() for each in other.buffers()]
    with pytest.warns(
        UserWarning, match=r"parameters: Discriminator \(\d+ parameters\)\. .*Name them in its option modules="
    ) as caught:
        check_closure(optimizer, closure)
    assert caught[0].filename == __file__
    assert same(list(other.buffers()), before)
    optimizer, closure = adversarial(other, modules=other)
    check_closure(optimizer, closure)  # a warning is an error here


def test_a_network_whose_gradients_probes_would_zero_is_to_be_named() -> None:
    other = Discriminator().eval()
    optimizer, closure = adversarial(other)

    def zeroing() -> Tensor:
        other.zero_grad()
        return closure()

    check_closure(optimizer, closure)
    with pytest.warns(UserWarning, match=r"parameters: Discriminator \(\d+ parameters\)\."):
        check_closure(optimizer, zeroing)


def test_a_network_in_evaluation_mode_and_one_that_probes_do_not_call_need_no_name() -> None:
    other = Discriminator().eval()
    check_closure(*adversarial(other))
    other.train()
    of = training()

    def closure() -> Tensor:
        if not of.optimizer.is_probing:
            other(of.inputs)
        return of.loss()

    check_closure(of.optimizer, closure)


# --- without a trace -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_named", [True, False])
def test_nothing_is_left_behind(is_named: bool) -> None:
    other = mlp(seed=1, norm=True)
    of = training(mlp(dropout=0.5, norm=True), modules=[other] if is_named else [])
    of.train(3)

    def closure() -> Tensor:
        other.zero_grad()
        of.optimizer.zero_grad()
        loss = of.loss() + other(of.inputs).mean()
        loss.backward()
        return loss

    for parameter in other.parameters():
        parameter.grad = torch.ones_like(parameter)
    models = (of.model, other)
    tensors = [each for model in models for each in (*model.parameters(), *model.buffers())]
    gradients = [parameter.grad for model in models for parameter in model.parameters()]
    contents = [each.clone() for each in (*tensors, *gradients)]  # type: ignore[union-attr]
    remembered, record = str(of.optimizer.state_dict()), of.optimizer.last_probe
    streams = [torch.get_rng_state(), random.getstate(), str(np.random.get_state())]

    with nullcontext() if is_named else pytest.warns(UserWarning, match="Sequential.*modules="):
        check_closure(of.optimizer, closure)
    now = [parameter.grad for model in models for parameter in model.parameters()]
    assert all(one is another for one, another in zip(now, gradients, strict=True))
    assert same([*tensors, *gradients], contents)  # type: ignore[list-item]
    assert str(of.optimizer.state_dict()) == remembered
    assert of.optimizer.last_probe is record
    assert not of.optimizer.is_probing
    assert torch.equal(torch.get_rng_state(), streams[0])
    assert [random.getstate(), str(np.random.get_state())] == streams[1:]


def test_training_goes_on_as_if_it_had_not_been_called() -> None:
    runs = []
    for checks in (False, True):
        torch.manual_seed(0)
        of = training(mlp(dropout=0.3, norm=True))
        of.train(3)
        if checks:
            check_closure(of.optimizer, of.closure)
        of.train(10)
        runs.append(parameters_of(of.model))
    assert same(*runs)


def test_an_exception_of_the_closure_leaves_nothing_either() -> None:
    of = training(mlp(norm=True))
    of.train(2)
    buffers = [each.clone() for each in of.model.buffers()]
    gradients = [each.grad for each in of.model.parameters()]
    calls = []

    def closure() -> Tensor:
        loss = of.closure()
        calls.append(1)
        if len(calls) == 3:
            raise ArithmeticError("the third call")
        return loss

    with pytest.raises(ArithmeticError, match="the third call"):
        check_closure(of.optimizer, closure)
    assert same(list(of.model.buffers()), buffers)
    assert all(one.grad is another for one, another in zip(of.model.parameters(), gradients, strict=True))


@pytest.mark.parametrize("optimizer", [AdamW([nn.Parameter(torch.ones(1))]), None])
def test_another_optimizer_is_refused(optimizer: Any) -> None:
    with pytest.raises(TypeError, match="optimizer must be a GeNOptimizer, got"):
        check_closure(optimizer, lambda: 1.0)


def test_no_probe_is_refused() -> None:
    of = training()
    with pytest.raises(ValueError, match="probes must be at least 1, got 0"):
        check_closure(of.optimizer, of.closure, probes=0)
