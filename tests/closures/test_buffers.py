"""The buffers that probes leave as they were: lent, rebound or made, of modules known and named."""

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
from gen_optim.closures.buffers import BufferSnapshot
from gen_optim.closures.session import ClosureCaller
from gen_optim.tensors.scalars import to_floats
from tests.closures.probes import (
    INPUTS,
    Counting,
    Reassigning,
    assert_same_buffers,
    buffers_of,
    call_and_probe,
    closure_of,
    parameters_of,
    session_of,
)
from tests.training import Training, mlp, regression_data, same

# --- sessions --------------------------------------------------------------------------------------------------------


class Growing(Counting):
    def count(self) -> None:
        self.calls.resize_(self.calls.numel() + 1, 1).fill_(self.calls.numel())

    def forward(self, inputs: Tensor) -> Tensor:
        self.count()
        return inputs + self.calls.numel()


class RegisteringAtFirst(nn.Module):
    first: Tensor

    def forward(self, inputs: Tensor) -> Tensor:
        if not hasattr(self, "first"):
            self.register_buffer("first", inputs.mean() + torch.rand(()))
        return inputs - self.first


class Forgetting(Counting):
    """Drops its buffer when it is called."""

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = super().forward(inputs)
        self.register_buffer("calls", None)
        return outputs


class ParentOfCounting(nn.Module):
    """Writes a buffer of a child that it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.child = Counting()

    def forward(self, inputs: Tensor) -> Tensor:
        self.child.count()
        return inputs + self.child.calls


def test_batch_norm_statistics_are_those_of_one_call() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    twin = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    twin.load_state_dict(model.state_dict())
    closure_of(twin)()
    call_and_probe(closure_of(model), parameters_of(model), probes=3)
    assert_same_buffers(model, buffers_of(twin))
    assert model[1].num_batches_tracked == 1


def test_batch_norm_statistics_ignore_where_the_probes_were() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    expected: dict[str, Tensor] = {}

    @torch.no_grad()
    def move() -> None:
        model.get_parameter("0.weight").add_(10.0)

    call_and_probe(
        closure_of(model),
        parameters_of(model),
        after_first=lambda: expected.update(buffers_of(model)),
        before_probe=move,
    )
    assert_same_buffers(model, expected)


@pytest.mark.parametrize(
    "layer",
    [Counting, Reassigning, Growing, RegisteringAtFirst, Forgetting, ParentOfCounting],
    ids=lambda it: it.__name__,
)
def test_every_probe_sees_the_buffers_of_the_first_call_and_leaves_those_it_left(layer: type[nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(3, 3), layer())
    buffers: list[tuple[str, Tensor | None, Tensor | None]] = []

    def remember() -> None:
        for module in model.modules():
            for name, buffer in module._buffers.items():
                buffers.append((name, buffer, None if buffer is None else buffer.clone()))

    losses = call_and_probe(closure_of(model), parameters_of(model), probes=3, after_first=remember)
    assert len(set(losses)) == 1
    left = [item for module in model.modules() for item in module._buffers.items()]
    for (name, buffer), (kept_name, kept, contents) in zip(left, buffers, strict=True):
        assert name == kept_name
        assert buffer is kept
        assert buffer is None or torch.equal(buffer, contents)  # type: ignore[arg-type]


def test_spectral_norm_probes_continue_from_the_vectors_of_the_first_call() -> None:
    model = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4))
    expected: dict[str, Tensor] = {}
    losses = call_and_probe(
        closure_of(model), parameters_of(model), after_first=lambda: expected.update(buffers_of(model))
    )
    assert len(set(losses)) == 1
    assert_same_buffers(model, expected)


def test_next_step_goes_on_from_the_buffers_of_the_last_first_call() -> None:
    model = nn.Sequential(nn.Linear(3, 3), Counting())
    for step in range(1, 4):
        call_and_probe(closure_of(model), parameters_of(model))
        assert model[1].calls == step


def test_buffer_registered_by_a_probe_is_gone_afterwards() -> None:
    caller = ClosureCaller()

    class Registering(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            if caller.is_probing:
                assert "extra" not in self._buffers
                self.register_buffer("extra", torch.ones(()))
            return super().forward(inputs)

    model = Registering(3, 1)
    call_and_probe(closure_of(model), parameters_of(model), caller=caller)
    assert not hasattr(model, "extra")
    assert "extra" not in model.state_dict()


def test_expanded_buffers_are_left_as_they_are() -> None:
    model = nn.Linear(3, 1)
    positions = torch.arange(3.0).expand(8, 3)
    model.register_buffer("positions", positions)

    def closure() -> Any:
        return (model(INPUTS) + model.get_buffer("positions").sum()).pow(2).mean()

    losses = call_and_probe(closure, parameters_of(model))
    assert len(set(losses)) == 1
    assert model.get_buffer("positions") is positions


def test_buffer_shared_by_two_modules_stays_shared() -> None:
    first, second = Counting(), Counting()
    second.calls = first.calls
    model = nn.Sequential(nn.Linear(3, 3), first, second)
    losses = call_and_probe(closure_of(model), parameters_of(model))
    assert len(set(losses)) == 1
    assert second.calls is first.calls
    assert first.calls == 2


def test_module_that_only_probes_call_ends_as_it_was() -> None:
    model, other = nn.Linear(3, 4), nn.BatchNorm1d(4)
    caller = ClosureCaller([other])
    expected = buffers_of(other)

    def closure() -> Any:
        outputs = model(INPUTS)
        return (other(outputs) if caller.is_probing else outputs).pow(2).mean()

    call_and_probe(closure, parameters_of(model), caller=caller, probes=3)
    assert_same_buffers(other, expected)


def test_module_made_in_a_call_is_probed_like_any_other() -> None:
    model = nn.Linear(3, 3)

    def closure() -> Any:
        return nn.Sequential(model, Counting(), nn.BatchNorm1d(3))(INPUTS).pow(2).mean()

    assert len(set(call_and_probe(closure, parameters_of(model)))) == 1


def test_probes_without_a_first_call_leave_buffers_as_they_were() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    expected = buffers_of(model)
    session = session_of(lambda: model(INPUTS).pow(2).mean(), parameters_of(model), name="probe")
    with session.probing():
        losses = [session.probe() for _ in range(3)]
    assert len(set(to_floats(losses))) == 1
    assert_same_buffers(model, expected)


def test_ensemble_called_by_vmap_with_its_buffers_is_probed() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3).eval())
    buffers = dict(model.named_buffers())
    members = [nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).eval() for _ in range(2)]
    stacked, stacked_buffers = torch.func.stack_module_state(members)

    def closure() -> Tensor:
        def call(parameters: Any, buffers: Any) -> Tensor:
            outputs: Tensor = torch.func.functional_call(model, (parameters, buffers), (INPUTS,))
            return outputs

        return torch.func.vmap(call)(stacked, stacked_buffers).pow(2).mean()

    losses = call_and_probe(closure, list(stacked.values()))
    assert len(set(losses)) == 1
    assert all(buffer is buffers[name] for name, buffer in model.named_buffers())


def test_loss_of_functional_derivatives_is_probed() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3).eval(), nn.Tanh(), nn.Linear(3, 1))
    buffers = dict(model.named_buffers())
    expected = buffers_of(model)

    def closure() -> Any:
        def output(inputs: Tensor) -> Tensor:
            outputs: Tensor = model(inputs.unsqueeze(0)).sum()
            return outputs

        return torch.func.vmap(torch.func.grad(output))(INPUTS).pow(2).mean()

    assert len(set(call_and_probe(closure, parameters_of(model)))) == 1
    assert all(buffer is buffers[name] for name, buffer in model.named_buffers())
    assert_same_buffers(model, expected)


# --- whole steps ----------------------------------------------------------------------------------------------------


def published(parameters: Any, **options: Any) -> GeNOptimizer:
    return GeNOptimizer(SGD(parameters, lr=0.01), mode="approximate", rule="published", period=1, **options)


def test_a_mean_teacher_that_lends_the_model_its_averages_is_left_alone() -> None:
    """Under functional_call a module holds buffers that are not its own while it is called."""
    model, (inputs, targets) = mlp(norm=True), regression_data()
    averages = {name: value.detach().clone() + 0.5 for name, value in model.state_dict().items()}
    teacher = nn.Module()
    for name, value in averages.items():
        teacher.register_buffer(name.replace(".", "_"), value)
    optimizer = published(model.parameters(), modules=teacher)
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
    assert same(outputs[:1] * (len(outputs) - 1), outputs[1:])  # all calls have seen the same teacher
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
    run = Training.of(published, Rebinding())
    seen: list[float] = []
    run.before_return = lambda self: seen.append(self.model.count.item())
    for step in (1.0, 2.0, 3.0):
        seen.clear()
        run.train(1)
        assert seen == [step] * len(seen)
        assert len(seen) >= 3
        assert run.model.count.item() == step
        assert torch.equal(run.model.latest, run.inputs.mean())


def test_a_module_that_only_a_probe_calls_ends_as_before_it() -> None:
    model, other = mlp(), Rebinding()
    optimizer = published(model.parameters(), modules=[other])
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
    module = Rebinding()
    before = BufferSnapshot([module])
    module(torch.ones(2, 4))
    after = before.later()
    before.restore()
    assert list(module._buffers) == ["count"]
    after.restore()
    assert list(module._buffers) == ["count", "latest"]
    assert module.count.item() == 1.0


def test_modules_that_the_first_call_makes_below_a_known_one_are_known() -> None:
    class Making(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            if not hasattr(self, "norm"):
                self.norm = nn.BatchNorm1d(3)
            return self.norm(inputs)

    model = nn.Sequential(nn.Linear(3, 3), Making())
    call_and_probe(closure_of(model), parameters_of(model))
    assert model[1].norm.num_batches_tracked == 1


def test_a_networks_buffers_are_kept_only_if_it_is_named() -> None:
    model, critic = nn.Linear(3, 4), nn.BatchNorm1d(4)

    def closure() -> Any:
        return critic(model(INPUTS)).pow(2).mean()

    call_and_probe(closure, parameters_of(model), probes=2, modules=[critic])
    assert critic.num_batches_tracked == 1
    call_and_probe(closure, parameters_of(model), probes=2)
    assert critic.num_batches_tracked == 4


def test_changes_since_the_first_call_are_told() -> None:
    norm, counting, other = nn.BatchNorm1d(4), Counting(), nn.BatchNorm1d(4)
    with torch.no_grad():
        norm.running_mean.fill_(torch.nan)
    after = BufferSnapshot([norm, counting, other])
    assert after.changed() == []
    norm(torch.ones(2, 4))
    counting.calls = torch.zeros(())
    assert set(after.changed()) == {norm, counting}
    after.restore()
    assert after.changed() == []


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


def test_scripted_models_train() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scripting is deprecated
        model = torch.jit.script(mlp(norm=True))
    Training.of(published, model).train(4)
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
    losses = Training.of(published, model).train(6)
    assert losses[-1] < losses[0]
