"""The loss along a direction against closed forms, dense Hessians and finite differences."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional

from gen_optim.functional.derivatives import derivatives_along, loss_along, quadratic_model
from tests.functional.problems import ALL_OPTIMIZERS, MODELS, OPTIMIZERS, TOKENS, Problem, detached, randn
from tests.oracles import (
    dense_derivatives,
    derivatives_by_differences,
    derivatives_by_double_backward,
    one_layer_optimum,
)

Losses = Callable[[dict[str, Tensor]], Tensor]


def numbers(found: Any) -> list[float]:
    return [each.item() for each in found]


def random_direction(params: dict[str, Tensor], seed: int = 1) -> dict[str, Tensor]:
    return {name: randn(*tensor.shape, seed=seed + index) for index, (name, tensor) in enumerate(params.items())}


# --- closed forms ----------------------------------------------------------------------------------------------------

SLOPES: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "identity": (lambda z: z, 1.0),
    "relu": (torch.relu, 0.0),
    "leaky_relu": (lambda z: functional.leaky_relu(z, 0.25), 0.25),
    "abs": (torch.abs, -1.0),
}


class OneLayer:
    """ŷ = σ(Wx + b), its loss 1/(2M) Σ‖ŷ(xᵢ) − yᵢ‖², and the direction of plain SGD."""

    def __init__(self, count: int, features: int, outputs: int, activation: str, seed: int) -> None:
        self.sigma, below = SLOPES[activation]
        self.inputs, self.targets = randn(count, features, seed=seed), randn(count, outputs, seed=seed + 1)
        self.params = {"weight": randn(outputs, features, seed=seed + 2), "bias": randn(outputs, seed=seed + 3)}
        self.before = self.inputs @ self.params["weight"].t() + self.params["bias"]
        self.slopes = torch.where(self.before > 0, torch.ones_like(self.before), torch.full_like(self.before, below))
        if activation == "identity":
            self.slopes = torch.ones_like(self.before)
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in self.params.items()}
        self.loss(leaves).backward()
        self.direction = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}

    def loss(self, params: dict[str, Tensor]) -> Tensor:
        predicted = self.sigma(self.inputs @ params["weight"].t() + params["bias"])
        return (predicted - self.targets).square().sum() / (2 * len(self.inputs))


@given(
    count=st.integers(1, 5),
    features=st.integers(1, 6),
    outputs=st.integers(1, 4),
    activation=st.sampled_from(sorted(SLOPES)),
    seed=st.integers(0, 10_000),
)
def test_closed_form_of_a_one_layer_network(
    count: int, features: int, outputs: int, activation: str, seed: int
) -> None:
    layer = OneLayer(count, features, outputs, activation, seed)
    assume(layer.before.abs().min() > 1e-6)
    gradient = torch.cat([each.flatten() for each in layer.direction.values()])
    assume(gradient.norm() > 1e-3)
    parabola = quadratic_model(layer.loss, layer.params, layer.direction)
    assume(parabola.curvature > 1e-6)
    expected = one_layer_optimum(*layer.params.values(), layer.inputs, layer.targets, layer.slopes)
    assert parabola.optimal_lr == pytest.approx(expected, rel=1e-10)
    assert parabola.value == pytest.approx(layer.loss(layer.params).item(), rel=1e-12)


@given(features=st.integers(1, 8), outputs=st.integers(1, 5), seed=st.integers(0, 10_000))
def test_closed_form_of_one_sample_and_relu(features: int, outputs: int, seed: int) -> None:
    layer = OneLayer(1, features, outputs, "relu", seed)
    assume(layer.before.abs().min() > 1e-6)
    assume(layer.before.max() > 0)
    x = layer.inputs[0]
    parabola = quadratic_model(layer.loss, layer.params, layer.direction)
    assert parabola.optimal_lr == pytest.approx(1 / (1 + float(x @ x)), rel=1e-10)


@given(seed=st.integers(0, 10_000))
def test_model_predicts_the_loss_where_it_is_quadratic(seed: int) -> None:
    layer = OneLayer(4, 3, 2, "identity", seed)
    parabola = quadratic_model(layer.loss, layer.params, layer.direction)
    rates = [-1.0, 0.0, 0.1, 0.5, 2.0]
    losses = loss_along(layer.loss, layer.params, layer.direction, rates)
    assert losses.tolist() == pytest.approx([parabola.predict(rate) for rate in rates], rel=1e-10)


# --- dense Hessians --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["SGD", "momentum", "Nesterov", "Adam", "AdamW", "RMSprop", "Muon"])
@pytest.mark.parametrize("name", MODELS)
def test_derivatives_agree_with_the_dense_hessian(name: str, optimizer: str) -> None:
    problem = Problem(name, ALL_OPTIMIZERS[optimizer])
    params, direction = detached(problem.model), problem.direction
    value, gradient, hessian = dense_derivatives(problem.loss, params)
    omega = torch.cat([direction[each].flatten() for each in params])
    expected = [value, (gradient @ omega).item(), (omega @ hessian @ omega).item()]
    scale = float(omega.norm() ** 2 * hessian.norm())
    found = numbers(derivatives_along(problem.loss, params, direction))
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-13 * scale)


@pytest.mark.parametrize("name", MODELS)
def test_derivatives_agree_with_differences_of_the_loss(name: str) -> None:
    problem = Problem(name, OPTIMIZERS["SGD"])
    params = detached(problem.model)
    direction = {key: 0.3 * tensor for key, tensor in random_direction(params).items()}
    found = numbers(derivatives_along(problem.loss, params, direction))
    # Narrow for the ReLU, whose kink must not be crossed.
    width = 1e-4 if name == "LayerNorm" else 1e-2
    expected = derivatives_by_differences(problem.loss, params, direction, width)
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)


# --- composition -----------------------------------------------------------------------------------------------------


def sample_loss(model: nn.Module, params: dict[str, Tensor], x: Tensor) -> Tensor:
    result: Tensor = functional_call(model, params, (x,)).sin().sum()
    return result


@pytest.fixture
def normed() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2)).double()


def test_per_sample_curvature_by_vmap(normed: nn.Module) -> None:
    params, inputs = detached(normed), randn(6, 3)
    direction = random_direction(params)
    found = vmap(lambda x: derivatives_along(lambda p: sample_loss(normed, p, x), params, direction))(inputs)
    for index, x in enumerate(inputs):
        expected = derivatives_by_double_backward(lambda p, x=x: sample_loss(normed, p, x), params, direction)
        assert [each[index].item() for each in found] == pytest.approx(expected, rel=1e-9)


def test_vmap_over_directions(normed: nn.Module) -> None:
    params, x = detached(normed), randn(3)
    several = [random_direction(params, seed) for seed in (1, 11, 21)]
    stacked = {name: torch.stack([each[name] for each in several]) for name in params}
    curvatures = vmap(lambda d: derivatives_along(lambda p: sample_loss(normed, p, x), params, d).curvature)(stacked)
    expected = [derivatives_along(lambda p: sample_loss(normed, p, x), params, each).curvature for each in several]
    assert curvatures.tolist() == pytest.approx(numbers(expected), rel=1e-10)


THIRD = pytest.mark.xfail(reason="third derivatives of LayerNorm are wrong in torch 2.13", strict=True)


@pytest.mark.parametrize(
    ("norm", "index"),
    [
        *((nn.LayerNorm(4), index) for index in (0, 1)),
        *((nn.GroupNorm(2, 4), index) for index in (0, 1, 2)),
        *((nn.Identity(), index) for index in (0, 1, 2)),
        pytest.param(nn.LayerNorm(4), 2, marks=THIRD),
    ],
    ids=lambda each: type(each).__name__ if isinstance(each, nn.Module) else ["value", "slope", "curvature"][each],
)
def test_gradient_of_each_derivative_with_respect_to_the_parameters(norm: nn.Module, index: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), norm, nn.Tanh(), nn.Linear(4, 2)).double()
    params, x = detached(model), randn(2, 3)
    direction, other = random_direction(params), random_direction(params, 50)

    def quantity(p: dict[str, Tensor]) -> Tensor:
        return derivatives_along(lambda q: sample_loss(model, q, x), p, direction)[index]

    slopes = grad(quantity)(params)
    found = sum(float((slopes[name] * other[name]).sum()) for name in params)
    expected = derivatives_by_differences(quantity, params, other, 1e-3)[1]
    assert found == pytest.approx(expected, rel=1e-6)


def test_slope_by_autograd_where_parameters_require_grad(normed: nn.Module) -> None:
    x = randn(3)
    params = dict(normed.named_parameters())
    direction = random_direction(params)
    derivatives_along(lambda p: sample_loss(normed, p, x), params, direction).slope.backward()
    expected = grad(lambda p: derivatives_along(lambda q: sample_loss(normed, q, x), p, direction).slope)(
        detached(normed)
    )
    for name, parameter in params.items():
        torch.testing.assert_close(parameter.grad, expected[name])


def test_gradient_through_the_loss_along_a_direction(normed: nn.Module) -> None:
    params, x = detached(normed), randn(3)
    direction = random_direction(params)
    slope = grad(lambda rate: loss_along(lambda p: sample_loss(normed, p, x), params, direction, rate))
    curvature = grad(slope)
    here = torch.zeros((), dtype=torch.float64)
    expected = derivatives_by_double_backward(lambda p: sample_loss(normed, p, x), params, direction)
    assert [-slope(here).item(), curvature(here).item()] == pytest.approx(list(expected[1:]), rel=1e-9)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(normed: nn.Module, backend: str) -> None:
    params, inputs = detached(normed), randn(3)
    direction, rates = random_direction(params), torch.tensor([0.1, 0.2], dtype=torch.float64)

    def loss(p: dict[str, Tensor]) -> Tensor:
        return sample_loss(normed, p, inputs)

    torch.compiler.reset()
    reference = torch.compile(lambda p, d: derivatives_along(loss, p, d), backend=backend, fullgraph=True)
    assert numbers(reference(params, direction)) == pytest.approx(numbers(derivatives_along(loss, params, direction)))
    losses = torch.compile(lambda p, d, r: loss_along(loss, p, d, r), backend=backend, fullgraph=True)
    torch.testing.assert_close(losses(params, direction, rates), loss_along(loss, params, direction, rates))


def test_compiled_model_inside_the_loss(normed: nn.Module) -> None:
    params, x = detached(normed), randn(3)
    direction = random_direction(params)
    expected = numbers(derivatives_along(lambda p: sample_loss(normed, p, x), params, direction))
    compiled = torch.compile(normed, backend="eager")
    prefixed = [{f"_orig_mod.{name}": tensor for name, tensor in each.items()} for each in (params, direction)]
    found = derivatives_along(lambda p: sample_loss(compiled, p, x), *prefixed)  # type: ignore[arg-type]
    assert numbers(found) == pytest.approx(expected, rel=1e-10)
    losses = loss_along(lambda p: sample_loss(compiled, p, x), *prefixed, [0.0, 0.1])  # type: ignore[arg-type]
    assert losses[0].item() == pytest.approx(expected[0])


# --- the loss along a direction --------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", [None, 1, 2, 3, 4, 7, 100])
@pytest.mark.parametrize("name", MODELS)
def test_chunked_is_one_after_the_other(name: str, chunk_size: int | None) -> None:
    problem = Problem(name, OPTIMIZERS["SGD"])
    params = detached(problem.model)
    direction = random_direction(params)
    rates = [0.0, -0.1, 0.1, 0.3, 1.0, 1e-8, 2.0]

    def loss(p: dict[str, Tensor]) -> Tensor:
        buffers = {key: buffer.clone() for key, buffer in problem.model.named_buffers()}
        return functional_call(problem.model, {**p, **buffers}, (problem.inputs,)).cos().square().mean()

    if name == "BatchNorm" and chunk_size != 1:
        with pytest.raises(RuntimeError, match="chunk_size=1"):
            loss_along(loss, params, direction, rates, chunk_size=chunk_size)
        return
    torch.manual_seed(3)
    found = loss_along(loss, params, direction, rates, chunk_size=chunk_size)
    state = torch.get_rng_state()
    for index, rate in enumerate(rates):
        torch.manual_seed(3)
        with torch.no_grad():
            alone = loss({key: params[key] - rate * direction[key] for key in params})
        assert found[index].item() == pytest.approx(alone.item(), rel=1e-12)
    assert torch.equal(state, torch.get_rng_state())
    assert not found.requires_grad


def test_chunks_see_the_same_python_and_numpy_streams() -> None:
    def loss(p: dict[str, Tensor]) -> Tensor:
        return p["x"].sum() * 0 + random.random() + np.random.rand()

    params = {"x": randn(3)}
    losses = loss_along(loss, params, params, [0.0, 0.1, 0.2], chunk_size=1)
    assert len(set(losses.tolist())) == 1


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3), (0,)])
def test_learning_rates_of_any_shape(shape: tuple[int, ...]) -> None:
    params, direction = {"x": randn(3)}, {"x": randn(3, seed=1)}
    rates = randn(*shape, seed=2)
    losses = loss_along(lambda p: p["x"].square().sum(), params, direction, rates)
    assert losses.shape == shape
    expected = (params["x"] - rates[..., None] * direction["x"]).square().sum(-1)
    torch.testing.assert_close(losses, expected)


def test_learning_rate_of_0_is_the_loss_itself_bit_for_bit() -> None:
    problem = Problem("linear", OPTIMIZERS["SGD"], dtype=torch.float32)
    params = detached(problem.model)
    value = loss_along(problem.loss, params, {name: torch.ones_like(each) for name, each in params.items()}, 0.0)
    assert value.item() == problem.loss(params).item()


def test_moving_in_bfloat16_rounds_once() -> None:
    params, direction = {"x": randn(1000).bfloat16()}, {"x": randn(1000, seed=1).bfloat16()}
    seen: list[Tensor] = []

    def loss(p: dict[str, Tensor]) -> Tensor:
        seen.append(p["x"])
        return p["x"].sum()

    loss_along(loss, params, direction, 1e-3)
    assert torch.equal(seen[0], (params["x"].float() - 1e-3 * direction["x"].float()).bfloat16())


def test_parameters_without_direction_stay() -> None:
    params, direction = {"x": randn(3), "y": randn(3, seed=1)}, {"y": randn(3, seed=2)}

    def loss(p: dict[str, Tensor]) -> Tensor:
        return (p["x"] * p["y"] ** 2).sum()

    expected = derivatives_by_double_backward(loss, params, direction)
    assert numbers(derivatives_along(loss, params, direction)) == pytest.approx(expected)
    none = derivatives_along(loss, params, {})
    assert numbers(none) == pytest.approx([expected[0], 0.0, 0.0])
    assert loss_along(loss, params, direction, 1.0).item() == pytest.approx(
        float((params["x"] * (params["y"] - direction["y"]) ** 2).sum())
    )


def test_linear_and_constant_losses() -> None:
    params = {"x": randn(3)}
    linear = derivatives_along(lambda p: p["x"].sum(), params, params)
    assert numbers(linear) == pytest.approx([params["x"].sum().item()] * 2 + [0.0])
    constant = derivatives_along(lambda p: torch.tensor(2.0) + 0 * p["x"].detach().sum(), params, params)
    assert numbers(constant) == [2.0, 0.0, 0.0]


# --- errors ----------------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no parameters": (lambda: loss_along(lambda p: torch.ones(()), {}, {}, 0.1), ValueError, "at least one parameter"),
    "unknown name": (lambda: along({"z": randn(3)}), ValueError, r"params has no 'z'"),
    "other shape": (lambda: along({"x": randn(4)}), ValueError, r"direction\['x'\] has shape \(4,\)"),
    "chunk_size": (
        lambda: loss_along(lambda p: p["x"].sum(), {"x": randn(3)}, {}, [0.1], chunk_size=0),
        ValueError,
        "chunk_size must be None or at least 1, got 0",
    ),
    "vector": (lambda: along({"x": randn(3)}, lambda p: p["x"]), TypeError, r"shape \(3,\).*Reduce it"),
    "integer": (lambda: along({"x": randn(3)}, lambda p: (p["x"] > 0).sum()), TypeError, "torch.int64"),
    "number": (lambda: along({"x": randn(3)}, lambda p: 1.0), TypeError, "must return a tensor, got float"),  # type: ignore[arg-type, return-value]
}


def along(direction: dict[str, Tensor], loss: Losses = lambda p: p["x"].sum()) -> None:
    params = {"x": randn(3)}
    errors = []
    for call in (
        lambda: loss_along(loss, params, direction, 0.1),
        lambda: derivatives_along(loss, params, direction),
    ):
        with pytest.raises((TypeError, ValueError)) as caught:
            call()
        errors.append(caught.value)
    assert len({str(error) for error in errors}) == 1
    raise errors[0]


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_named(name: str) -> None:
    call, kind, message = WRONG[name]
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.parametrize(
    ("named", "loss"),
    [
        ("_ctc_loss", lambda p: functional.ctc_loss(p["x"].log_softmax(-1)[:, None], TOKENS[:1, 1:2], [3], [1])),
        ("_embedding_bag", lambda p: functional.embedding_bag(TOKENS[:, :2] % 3, p["x"]).square().sum()),
    ],
)
def test_operation_without_derivative_is_named(named: str, loss: Losses) -> None:
    params = {"x": randn(3, 4)}
    with pytest.raises(NotImplementedError, match=named):
        derivatives_along(loss, params, params)


@pytest.mark.parametrize(
    "loss",
    [
        lambda p: functional.mse_loss(p["x"].sin(), torch.ones(3, 4, dtype=torch.float64)),
        lambda p: functional.huber_loss(3 * p["x"].sin(), torch.ones(3, 4, dtype=torch.float64)),
    ],
    ids=["mse_loss to a constant", "huber_loss"],
)
def test_where_forward_mode_fails_reverse_mode_takes_its_place(loss: Losses) -> None:
    params, direction = {"x": randn(3, 4)}, {"x": randn(3, 4)}
    found = derivatives_along(loss, params, direction)
    expected = derivatives_by_double_backward(loss, params, direction)
    assert [each.item() for each in found] == pytest.approx(expected, rel=1e-10)


def test_the_second_evaluation_uses_the_same_random_numbers() -> None:
    params, seen = {"x": randn(3, 4)}, []

    def loss(p: dict[str, Tensor]) -> Tensor:
        seen.append(torch.rand(()).item())
        return functional.huber_loss(p["x"] * seen[-1], torch.zeros(3, 4, dtype=torch.float64))

    state = torch.get_rng_state()
    derivatives_along(loss, params, params)
    assert len(seen) == 2
    assert seen[0] == seen[1]
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    torch.rand(())
    assert torch.equal(after, torch.get_rng_state())


@pytest.mark.parametrize("kind", [RuntimeError, NotImplementedError, ValueError, KeyboardInterrupt])
def test_errors_of_the_loss_itself_pass_unchanged(kind: type[BaseException]) -> None:
    params, raised = {"x": randn(3)}, []

    def loss(p: dict[str, Tensor]) -> Tensor:
        raised.append(kind("of the loss"))
        raise raised[-1]

    with pytest.raises(kind, match="of the loss") as caught:
        derivatives_along(loss, params, params)
    assert caught.value is raised[0]


def test_loss_along_keeps_a_graph_only_if_it_is_asked_for() -> None:
    params = {"x": randn(3).requires_grad_()}
    assert loss_along(lambda p: p["x"].sum(), params, params, 0.1).requires_grad
    with torch.no_grad():
        assert not loss_along(lambda p: p["x"].sum(), params, params, 0.1).requires_grad
