"""What a probe must leave as it was, in the corners: buffers lent, rebound or made; random base optimizers."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import SGD

from gen_optim import GeNOptimizer
from gen_optim.closures.buffers import Buffers
from gen_optim.closures.modules import owners_of
from tests.training import Training, mlp, parameters_of, regression_data, same


def published(parameters: Any) -> GeNOptimizer:
    return GeNOptimizer(SGD(parameters, lr=0.01), mode="approximate", rule="published", period=1)


def test_a_mean_teacher_that_lends_the_model_its_averages_is_left_alone() -> None:
    """Under functional_call a module holds buffers that are not its own while it is called."""
    model, (inputs, targets) = mlp(norm=True), regression_data()
    averages = {name: value.detach().clone() + 0.5 for name, value in model.state_dict().items()}
    optimizer = published(model.parameters())
    outputs: list[Tensor] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        with torch.no_grad():
            outputs.append(functional_call(model, averages, inputs))
        loss = nn.functional.mse_loss(model(inputs), targets) + (model(inputs) - outputs[-1]).square().mean()
        if not optimizer.is_probing:
            loss.backward()
        return loss

    twin = copy.deepcopy(model)
    kept = copy.deepcopy(averages)
    optimizer.step(closure)
    functional_call(twin, kept, inputs)
    twin(inputs), twin(inputs)
    assert same(outputs[:1] * 2, outputs[1:])  # all calls have seen the same teacher
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, dict(twin.named_buffers())[name]), name
        assert buffer is not averages[name]
        assert torch.equal(averages[name], kept[name]), name


class Rebinding(nn.Module):
    """Reassigns one buffer, registers another, and sees what stands in the first."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, inputs: Tensor) -> Tensor:
        self.count = self.count + 1
        self.register_buffer("latest", inputs.mean().detach())
        return self.linear(inputs) * self.count


def test_reassigned_and_new_buffers_are_those_of_the_first_call() -> None:
    training = Training.of(published, Rebinding())
    seen: list[float] = []
    training.before_return = lambda self: seen.append(self.model.count.item())
    for step in (1.0, 2.0, 3.0):
        seen.clear()
        training.train(1)
        assert seen == [step] * 3
        assert training.model.count.item() == step
        assert torch.equal(training.model.latest, training.inputs.mean())


def test_a_module_that_only_a_probe_calls_ends_as_before_it() -> None:
    model, other = mlp(), Rebinding()
    optimizer = published(model.parameters())
    inputs, targets = regression_data()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(inputs), targets)
        if optimizer.is_probing:
            other(inputs)
        else:
            loss.backward()
        return loss

    optimizer.step(closure)
    assert other.count.item() == 0.0
    assert not hasattr(other, "latest")


def test_names_are_put_back_in_their_order() -> None:
    module, buffers = Rebinding(), Buffers()
    buffers.enter(module)
    module(torch.ones(2, 4))
    buffers.leave(module)
    buffers.end_first_call()
    buffers.rewind()
    assert list(module._buffers) == ["count"]
    buffers.restore()
    assert list(module._buffers) == ["count", "latest"]
    assert module.count.item() == 1.0


class NoisySGD(SGD):
    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                drawn.append(torch.randn(()).item())
                parameter.grad += drawn[-1]
        super().step()
        return loss


drawn: list[float] = []


def test_a_base_optimizer_that_draws_at_random_draws_anew_each_step() -> None:
    models = mlp(), mlp()
    wrapped = GeNOptimizer(
        NoisySGD(models[0].parameters(), lr=0.01),
        mode="approximate",
        rule="published",
        period=1,
        lr_min=0.01,
        lr_max=0.01,
    )
    bare = NoisySGD(models[1].parameters(), lr=0.01)
    runs = []
    for model, optimizer in zip(models, (wrapped, bare), strict=True):
        drawn.clear()
        torch.manual_seed(0)
        Training(model, optimizer, *regression_data()).train(4)
        runs.append(list(drawn))
    assert runs[0] == runs[1]
    assert len(set(runs[0])) == 16
    assert same(parameters_of(models[0]), parameters_of(models[1]))


class Trainee(nn.Module):
    """As trainers have it: a method of the model, not the model itself, is called, and counts."""

    def __init__(self) -> None:
        super().__init__()
        self.network = mlp()
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def training_step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        self.steps += 1
        return nn.functional.mse_loss(self.network(inputs), targets)


@pytest.mark.parametrize("is_compiled", [False, True])
def test_buffers_of_the_parameters_owners_are_kept_though_only_a_method_is_called(is_compiled: bool) -> None:
    torch.compiler.reset()
    model = Trainee()
    optimizer = published(model.network.parameters())
    step = torch.compile(model.training_step, backend="eager") if is_compiled else model.training_step
    for _ in range(5):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's compiler warns of itself
            optimizer.step(lambda: step(*regression_data()))
    assert model.steps.item() == 5


def test_owners_are_found_up_to_the_top_and_no_others() -> None:
    model, stranger = Trainee(), mlp()
    found = owners_of([model.network[0].weight])
    assert set(found) == {model, model.network, model.network[0]}
    assert stranger not in found


def test_scripted_models_train() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scripting is deprecated
        model = torch.jit.script(mlp(norm=True))
    training = Training.of(published, model)
    training.train(4)
    assert dict(model.named_buffers())["1.num_batches_tracked"].item() == 4


@torch.inference_mode()
def inference_tensor() -> Tensor:
    return torch.ones(3)


def nested_tensor() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a prototype, says torch
        return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


def sparse_tensor() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # in beta, says torch
        return torch.eye(3).to_sparse_csr()


@pytest.mark.parametrize(
    "make",
    [inference_tensor, nested_tensor, sparse_tensor, nn.parameter.UninitializedBuffer, lambda: torch.ones(1).expand(3)],
    ids=["inference tensor", "nested", "sparse", "uninitialized", "overlapping"],
)
def test_buffers_of_any_kind_are_no_obstacle(make: Callable[[], Tensor]) -> None:
    model = mlp()
    model.register_buffer("table", make())
    training = Training.of(published, model)
    losses = training.train(6)
    assert losses[-1] < losses[0]
