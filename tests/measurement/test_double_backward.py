"""Exact mode: slope and curvature of any closure's loss against a dense Hessian; the closed forms in every mode."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import SGD, Adam, AdamW, RMSprop

from gen_optim import GeNOptimizer, History, ProbeStatus
from gen_optim.measurement.double_backward import slope_and_curvature
from tests.oracles import dense_derivatives, derivatives_by_differences, one_layer_optimum
from tests.training import Training, gen_adamw, gen_sgd, mlp, muon, parameters_of, regression_data, same

# --- small models of every kind, on inputs of shape (6, 4) ------------------------------------------------------------


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 3, 3, padding=1)
        self.head = nn.Linear(3, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(torch.tanh(self.conv(inputs[:, None])).mean(dim=2))


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding((10 * inputs).long() % 5).sum(dim=1)))


class Attention(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(2, 1, dropout=dropout, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        sequence = inputs.reshape(-1, 2, 2)
        return self.head(self.attention(sequence, sequence, sequence, need_weights=False)[0].flatten(1))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(4, 4)
        self.decode = nn.Linear(4, 4)
        self.decode.weight = self.encode.weight

    def forward(self, inputs: Tensor) -> Tensor:
        return self.decode(torch.tanh(self.encode(inputs)))


def plain(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), *layers, nn.Linear(5, 2))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: plain(nn.Tanh()),
    "convolution": Convolution,
    "batch norm": lambda: plain(nn.BatchNorm1d(5), nn.Tanh()),
    "layer norm": lambda: plain(nn.LayerNorm(5), nn.Tanh()),
    "embedding": Words,
    "attention": Attention,
    "attention with dropout": lambda: Attention(dropout=0.5),
    "dropout": lambda: plain(nn.Tanh(), nn.Dropout(0.5)),
    "tied": Tied,
}
BASES: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "SGD": lambda p: SGD(p, lr=0.05),
    "momentum": lambda p: SGD(p, lr=0.05, momentum=0.9),
    "Nesterov": lambda p: SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "Adam": lambda p: Adam(p, lr=0.01),
    "AdamW": lambda p: AdamW(p, lr=0.01, weight_decay=0.1),
    "RMSprop": lambda p: RMSprop(p, lr=0.01),
    "Muon": lambda p: muon(p, lr=0.01),
}


def make(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(3)
    model = MODELS[name]().double()
    return model, torch.randn(6, 4, dtype=torch.float64)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", MODELS)
def test_slope_and_curvature_equal_the_dense_hessian(name: str, base: str) -> None:
    model, inputs = make(name)
    if base == "Muon":
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.dim() == 2)
    optimizer = GeNOptimizer(BASES[base](list(model.parameters())), mode="exact", rule="published", period=1)

    def loss_of(outputs: Tensor) -> Tensor:
        return (outputs - inputs[:, : outputs.shape[1]].cos()).square().mean() + 0.1 * outputs.exp().mean()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model(inputs))
        loss.backward()
        return loss

    for _ in range(3):
        twin, twin_base = copy.deepcopy((model, optimizer.base_optim))
        params = {name: each.detach().clone() for name, each in model.named_parameters()}
        buffers = {name: each.clone() for name, each in model.named_buffers()}
        drawn = torch.get_rng_state()
        optimizer.step(closure)
        record = optimizer.last_probe
        # The direction: where the bare optimizer goes from the very same state, with the very same gradients.
        twin_base.zero_grad()
        for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            theirs.grad = mine.grad
        twin_base.step()
        after = dict(twin.named_parameters())
        trained = [name for name, each in model.named_parameters() if each.requires_grad]
        omega = torch.cat([((params[name] - after[name]) / record.lr_before).flatten() for name in trained]).detach()

        def loss_fn(
            values: dict[str, Tensor], params: Any = params, buffers: Any = buffers, drawn: Any = drawn
        ) -> Tensor:
            torch.set_rng_state(drawn)
            fixed = {name: each.clone() for name, each in buffers.items()}
            return loss_of(functional_call(model, {**params, **fixed, **values}, inputs))

        with torch.random.fork_rng(devices=[]):
            value, gradient, hessian = dense_derivatives(loss_fn, {name: params[name] for name in trained})
        assert record.losses == (pytest.approx(value, rel=1e-12),)
        assert record.slope == pytest.approx((gradient @ omega).item(), rel=1e-9, abs=1e-12)
        assert record.curvature == pytest.approx((omega @ hessian @ omega).item(), rel=1e-8, abs=1e-10)


# --- the closed forms of a one-layer network ---

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda z: z,
    "relu": torch.relu,
    "leaky relu": lambda z: nn.functional.leaky_relu(z, 0.1),
    "abs": torch.abs,
}


@pytest.mark.parametrize(("mode", "tolerance"), [("exact", 1e-10), ("approximate", 1e-6)])
@given(
    count=st.integers(1, 5),
    features=st.integers(1, 4),
    outputs=st.integers(1, 3),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    seed=st.integers(0, 2**31),
)
def test_the_optimum_of_a_one_layer_network_has_the_closed_form(
    mode: str, tolerance: float, count: int, features: int, outputs: int, activation: str, seed: int
) -> None:
    torch.manual_seed(seed)
    layer = nn.Linear(features, outputs).double()
    inputs, targets = torch.randn(count, features).double(), torch.randn(count, outputs).double()
    before = layer(inputs).detach().requires_grad_()
    (slopes,) = torch.autograd.grad(ACTIVATIONS[activation](before).sum(), before)

    def closure() -> Tensor:
        return (ACTIVATIONS[activation](layer(inputs)) - targets).square().sum() / (2 * count)

    # Steps on which no activation changes sign, because there the loss is a parabola; and which are not so short that
    # its curvature drowns in the rounding of the loss.
    by_weight, by_bias = torch.autograd.grad(loss := closure(), [layer.weight, layer.bias])
    pace = (inputs @ by_weight.T + by_bias).abs()
    lr = 1.0 if activation == "identity" else 0.5 * (before.detach().abs() / pace.clamp(min=1e-12)).min().item()
    lr = min(lr, 1.0)
    assume(lr * pace.square().sum().item() * lr / count > 1e-6 * loss.item())

    optimizer = GeNOptimizer(SGD(layer.parameters(), lr=lr), mode=mode, rule="published")
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    optimizer.step(closure)
    expected = one_layer_optimum(weight, bias, inputs, targets, slopes)
    assert optimizer.last_probe.optimal_lr == pytest.approx(expected, rel=tolerance)
    if count == 1 and activation == "relu" and outputs == 1:
        assert expected == pytest.approx(1.0 / (1.0 + inputs.square().sum().item()))


# --- any closure ----------------------------------------------------------------------------------------------------


def exact(parameters: Any, **options: Any) -> GeNOptimizer:
    return gen_adamw(parameters, mode="exact", **options)


def records_of(step: Callable[[Training], Any], model: nn.Module | None = None, steps: int = 4) -> list[dict[str, Any]]:
    training = Training.of(exact, mlp(dtype=torch.float64) if model is None else model)
    history = History()
    training.optimizer.register_probe_hook(history)
    for _ in range(steps):
        step(training)
    return history.to_dicts()


def standard(training: Training) -> None:
    training.train(1)


def returns_the_loss_only(training: Training) -> None:
    training.optimizer.step(training.loss)


def returns_a_number(training: Training) -> None:
    training.optimizer.step(lambda: training.closure().item())


def accumulates(training: Training) -> None:
    def closure() -> float:
        training.optimizer.zero_grad()
        total = 0.0
        for inputs, targets in zip(training.inputs.chunk(4), training.targets.chunk(4), strict=True):
            loss = nn.functional.mse_loss(training.model(inputs), targets)
            loss.backward(torch.tensor(0.25, dtype=loss.dtype))
            total += loss.item() / 4
        return total

    training.optimizer.step(closure)


def probes(training: Training) -> None:
    training.optimizer.zero_grad()
    training.loss().backward()
    training.optimizer.step(probe=training.loss)


@pytest.mark.parametrize("step", [returns_the_loss_only, returns_a_number, accumulates, probes])
def test_every_form_of_closure_gives_the_same_records(step: Callable[[Training], None]) -> None:
    for mine, theirs in zip(records_of(step), records_of(standard), strict=True):
        assert mine["status"] == theirs["status"]
        for name in ("losses", "slope", "curvature", "lr_after"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-8, nan_ok=True), name


def test_records_and_steps_are_those_of_the_approximate_mode_but_for_the_third_order() -> None:
    histories = []
    for mode in ("exact", "approximate"):
        training, history = (
            Training.of(lambda p, mode=mode: gen_adamw(p, mode=mode), mlp(dtype=torch.float64)),
            History(),
        )
        training.optimizer.register_probe_hook(history)
        losses = training.train(60)
        histories.append(history)
        assert losses[-1] < 0.5 * losses[0]
    for mine, theirs in zip(*histories, strict=True):
        assert mine.status is theirs.status
        if mine.step < 10:  # later the two runs drift apart
            assert mine.slope == pytest.approx(theirs.slope, rel=1e-2, nan_ok=True)
            assert mine.curvature == pytest.approx(theirs.curvature, rel=1e-2, nan_ok=True)


def test_the_closure_is_called_once_more_with_gradients_on_probe_steps_alone() -> None:
    training = Training.of(lambda parameters: exact(parameters, burn_in=2, period=3))
    seen: list[tuple[bool, bool]] = []
    training.before_return = lambda self: seen.append((self.optimizer.is_probing, torch.is_grad_enabled()))
    training.train(1)
    history = History()
    training.optimizer.register_probe_hook(history)
    for step in range(2, 12):
        seen.clear()
        training.train(1)
        assert seen == [(False, True), (True, True)][: 1 + (step in history.column("step"))]
    assert 3 <= len(history) <= 6


def test_nothing_is_left_behind() -> None:
    runs = []
    for period in (1, 1000):
        training = Training.of(
            lambda p, period=period: gen_sgd(
                p, lr=0.05, lr_min=0.05, lr_max=0.05, period=period, rule="published", mode="exact"
            ),
            mlp(dropout=0.5, norm=True),
        )
        torch.manual_seed(1)
        losses = training.train(6)
        gradients = [parameter.grad for parameter in training.model.parameters()]
        runs.append((losses, list(training.model.state_dict().values()), gradients, torch.get_rng_state()))
    (losses, tensors, gradients, drawn), (other_losses, other_tensors, other_gradients, other_drawn) = runs
    assert losses == other_losses
    assert same(tensors, other_tensors)
    assert same(gradients, other_gradients)
    assert torch.equal(drawn, other_drawn)


def test_memory_is_freed_before_the_step_returns() -> None:
    training = Training.of(exact)
    training.train(1)
    activations: list[weakref.ref[Tensor]] = []
    training.model[2].register_forward_hook(lambda module, args, output: activations.append(weakref.ref(output)))
    gc.disable()
    try:
        training.train(1)
        assert len(activations) == 2
        assert activations[1]() is None  # of the call that was differentiated twice
    finally:
        gc.enable()


def test_attention_runs_on_a_kernel_with_a_second_derivative_and_the_choice_is_restored() -> None:
    def choice() -> list[bool]:
        cuda = torch.backends.cuda
        return [
            cuda.flash_sdp_enabled(),
            cuda.mem_efficient_sdp_enabled(),
            cuda.math_sdp_enabled(),
            cuda.cudnn_sdp_enabled(),
        ]

    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(8, 24)

        def forward(self, inputs: Tensor) -> Tensor:
            query, key, value = self.mix(inputs.repeat(1, 2)).reshape(1, 1, 16, 24).chunk(3, dim=-1)
            attended = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
            seen.append(choice())
            return attended[0, 0].mean(dim=1, keepdim=True)

    seen: list[list[bool]] = []
    before = choice()
    training = Training.of(exact, Fused())
    training.train(3)
    assert training.optimizer.last_probe.status in (ProbeStatus.FITTED, ProbeStatus.CONCAVE)
    assert all(each == [False, False, True, False] for each in seen)
    assert choice() == before != seen[0]


def test_a_loss_that_differentiates_inside() -> None:
    model, points = mlp(dtype=torch.float64), regression_data(dtype=torch.float64)[0].requires_grad_()
    optimizer = GeNOptimizer(SGD(model.parameters(), lr=0.01), mode="exact", rule="published")

    def loss_of(forward: Callable[[Tensor], Tensor]) -> Tensor:
        outputs = forward(points)
        (slopes,) = torch.autograd.grad(outputs.sum(), points, create_graph=True)
        return (outputs - slopes.sum(dim=1, keepdim=True) - 1.0).square().mean()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    params = {name: each.detach().clone() for name, each in model.named_parameters()}
    optimizer.step(closure)
    direction = {name: each.grad for name, each in model.named_parameters()}

    def loss_fn(values: dict[str, Tensor]) -> Tensor:
        with torch.enable_grad():
            return loss_of(lambda inputs: functional_call(model, values, inputs)).detach()

    _, slope, curvature = derivatives_by_differences(loss_fn, params, direction, width=1e-2)
    assert optimizer.last_probe.slope == pytest.approx(slope, rel=1e-7)
    assert optimizer.last_probe.curvature == pytest.approx(curvature, rel=1e-5)


def test_frozen_parameters_and_groups_and_missing_gradients() -> None:
    model = mlp(dtype=torch.float64)
    model[0].bias.requires_grad_(False)
    unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
    groups = [{"params": [model[0].weight, model[0].bias], "lr": 0.0}, {"params": [*model[4].parameters(), unused]}]
    optimizer = GeNOptimizer(SGD(groups, lr=0.1), mode="exact")
    training = Training(model, optimizer, *regression_data(dtype=torch.float64))
    losses = training.train(20)
    assert losses[-1] < losses[0]
    assert torch.equal(unused, torch.ones_like(unused))


def test_a_linear_loss_has_no_curvature() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = GeNOptimizer(SGD([weight], lr=0.1), mode="exact", rule="published")
    optimizer.step(weight.sum)
    assert (optimizer.last_probe.slope, optimizer.last_probe.curvature) == (pytest.approx(3.0), 0.0)


# --- what cannot be differentiated twice ------------------------------------------------------------------------------


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor) -> Tensor:
        ctx.save_for_backward(inputs)
        return inputs**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (inputs,) = ctx.saved_tensors
        return 3 * inputs**2 * gradient


@pytest.mark.parametrize(
    ("name", "loss_of"),
    [
        ("multi_margin_loss", lambda outputs: nn.functional.multi_margin_loss(outputs, torch.zeros(16).long())),
        ("embedding_bag", lambda outputs: nn.functional.embedding_bag(torch.arange(16)[None], outputs).square().mean()),
    ],
)
def test_an_operation_without_second_derivative_is_named_and_the_step_is_lazy(name: str, loss_of: Any) -> None:
    def training(wrap: Callable[[Any], Any]) -> tuple[nn.Module, Callable[[], Any]]:
        model, (inputs, _) = nn.Linear(4, 3), regression_data()
        with torch.no_grad():
            model.weight.copy_(torch.linspace(-1, 1, 12).reshape(3, 4)), model.bias.zero_()
        optimizer = wrap(SGD(model.parameters(), lr=0.1))

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model(inputs))
            loss.backward()
            return loss

        return model, lambda: optimizer.step(closure)

    model, step = training(lambda base: GeNOptimizer(base, mode="exact", rule="published"))
    bare, bare_step = training(lambda base: base)
    with pytest.raises(RuntimeError, match=rf"mode='exact' needs .* Use mode='approximate'.* torch says: .*{name}"):
        step()
    bare_step()
    assert same(parameters_of(model), parameters_of(bare))


@pytest.mark.parametrize("at", ["the end", "the beginning"])
def test_a_function_that_is_differentiable_once_is_refused(at: str) -> None:
    model, (inputs, targets) = nn.Linear(4, 1), regression_data()
    optimizer = GeNOptimizer(SGD(model.parameters(), lr=0.1), mode="exact", rule="published")

    def closure() -> Tensor:
        if at == "the end":
            return Once.apply(nn.functional.mse_loss(model(inputs), targets))
        return nn.functional.mse_loss(Once.apply(model(inputs)), targets)

    with pytest.raises(RuntimeError, match=r"torch says: .*once_differentiable"):
        optimizer.step(closure)


def test_a_loss_without_graph_is_a_type_error() -> None:
    training = Training.of(lambda p: GeNOptimizer(SGD(p, lr=0.1), mode="exact", rule="published"))

    training.loss().backward()
    with pytest.raises(TypeError, match=r"probe must return a loss that has a graph.*or use mode='approximate'"):
        training.optimizer.step(probe=lambda: training.loss().detach())


def test_a_compiled_model_is_refused_and_the_reason_given() -> None:
    model = torch.compile(mlp(), backend="aot_eager")
    training = Training.of(lambda p: GeNOptimizer(SGD(p, lr=0.1), mode="exact", rule="published"), model)
    with pytest.raises(RuntimeError, match=r"models compiled by torch\.compile .*torch says: .* was compiled"):
        training.train(1)


def test_slope_and_curvature_of_complex_parameters_are_those_of_their_parts() -> None:
    value = torch.tensor([1.0 + 2.0j, -0.5j], dtype=torch.complex128)
    step = torch.tensor([0.3 - 0.1j, 1.0 + 1.0j], dtype=torch.complex128)
    weight = value.clone().requires_grad_()
    slope, curvature = slope_and_curvature((weight.abs() ** 4).sum(), [weight], [step])
    parts = torch.view_as_real(value).clone().requires_grad_()
    loss = (parts.square().sum(dim=-1) ** 2).sum()
    expected = slope_and_curvature(loss, [parts], [torch.view_as_real(step)])
    assert slope.item() == pytest.approx(expected[0].item())
    assert curvature.item() == pytest.approx(expected[1].item())
