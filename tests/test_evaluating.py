import math
import random
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import backward as imported_backward
from torch.autograd import grad as imported_grad
from torch.nn.modules import module as torch_module

from gen_optim.evaluating import Evaluator, check_loss, losses_to_floats, rounding_of

INPUTS = torch.linspace(-1.0, 1.0, 24).reshape(8, 3)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def call_and_probe(
    closure: Callable[[], Any],
    parameters: list[Tensor],
    *,
    probes: int = 2,
    before_probe: Callable[[], object] = lambda: None,
    after_first: Callable[[], object] = lambda: None,
    evaluator: Evaluator | None = None,
) -> list[float]:
    """The losses of a step's calls of ``closure``: the first one and the probes."""
    evaluator = evaluator or Evaluator()
    with nullcontext(evaluator.session(parameters)) as session:
        losses = [session.first(lambda: evaluator.call(closure)[0])]
        after_first()
        with session.probing():
            for _ in range(probes):
                before_probe()
                losses.append(session.probe(closure, "closure"))
    return losses_to_floats(losses)


def closure_of(model: nn.Module, inputs: Tensor = INPUTS) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        model.zero_grad()
        loss: Tensor = model(inputs).pow(2).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    return closure


def parameters_of(*models: nn.Module) -> list[Tensor]:
    return [parameter for model in models for parameter in model.parameters()]


def stream_states() -> list[Any]:
    numpy_state = np.random.get_state(legacy=True)
    return [random.getstate(), tuple(map(str, numpy_state)), torch.get_rng_state().tolist()]


# --- what a closure returns ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "loss", [torch.tensor(1.5), torch.tensor([1.5]), torch.tensor([[1.5]]), torch.tensor(1.5, dtype=torch.bfloat16)]
)
def test_one_element_tensor_is_a_loss_as_it_is(loss: Tensor) -> None:
    assert check_loss(loss, "closure") is loss


@pytest.mark.parametrize("loss", [1.5, np.float32(1.5), np.float64(1.5)])
def test_real_number_is_a_loss(loss: float) -> None:
    checked = check_loss(loss, "closure")
    assert type(checked) is float
    assert checked == 1.5


def test_whole_number_is_a_loss() -> None:
    assert check_loss(2, "closure") == 2.0


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, ["closure", "returned None", "return loss"]),
        ("1.0", ["closure", "type str"]),
        ([1.0], ["closure", "type list"]),
        ((torch.tensor(1.0), None), ["closure", "type tuple"]),
        (1j, ["closure", "type complex"]),
        (torch.ones(3), ["closure", "shape (3,)", "float32", ".mean()"]),
        (torch.ones(0), ["closure", "shape (0,)", ".mean()"]),
        (torch.tensor(1), ["closure", "int64", "floating-point"]),
        (torch.tensor(1j), ["closure", "complex64", "floating-point"]),
    ],
)
def test_what_is_no_loss_is_refused_with_what_came_and_what_to_do(value: object, words: list[str]) -> None:
    with pytest.raises(TypeError) as caught:
        check_loss(value, "closure")
    assert all(word in str(caught.value) for word in words)


def test_refusal_names_the_caller() -> None:
    with pytest.raises(TypeError, match=r"^probe must return the loss"):
        check_loss(None, "probe")


def test_losses_of_every_kind_are_read_in_order() -> None:
    losses: list[Tensor | float] = [
        1,
        torch.tensor(2.5, requires_grad=True),
        3.5,
        torch.tensor([4.5], dtype=torch.bfloat16),
        torch.tensor([[math.inf]], dtype=torch.float64),
    ]
    assert losses_to_floats(losses) == [1.0, 2.5, 3.5, 4.5, math.inf]


def test_reading_float64_losses_keeps_every_digit() -> None:
    value = 1.0 + 2.0**-50
    assert losses_to_floats([torch.tensor(value, dtype=torch.float64), torch.tensor(1.0)]) == [value, 1.0]


def test_plain_numbers_are_read_without_any_tensor() -> None:
    assert losses_to_floats([1.0, 2]) == [1.0, 2.0]
    assert losses_to_floats([]) == []


def test_rounding_is_that_of_the_coarsest_loss() -> None:
    def epsilon(dtype: torch.dtype) -> float:
        return torch.finfo(dtype).eps

    double, half = torch.tensor(1.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.bfloat16)
    assert rounding_of([double]) == epsilon(torch.float64)
    assert rounding_of([double, 1.0]) == epsilon(torch.float32)
    assert rounding_of([double, half]) == epsilon(torch.bfloat16) / 16
    assert rounding_of([double], {torch.float16}) == epsilon(torch.float16) / 16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("place", ["around", "in the closure", "in the model"])
def test_a_session_notices_in_what_autocast_computes(dtype: torch.dtype, place: str) -> None:
    model = nn.Linear(4, 1)
    if place == "in the model":  # as Accelerate does it
        model.forward = torch.autocast("cpu", dtype)(model.forward)  # type: ignore[method-assign]

    def closure() -> Tensor:
        with torch.autocast("cpu", dtype, enabled=place == "in the closure"):
            return model(torch.ones(2, 4)).float().mean()

    enter = torch.autocast.__enter__
    for has_first_call in (True, False):
        session = Evaluator().session(list(model.parameters()))
        with torch.autocast("cpu", dtype, enabled=place == "around"):
            if has_first_call and place != "around":
                session.first(closure)
            else:
                with session.probing():
                    session.probe(closure if place != "around" else lambda: 1.0, "probe")
        assert session.computed_in == {dtype}
    assert torch.autocast.__enter__ is enter


def test_an_autocast_that_is_off_or_another_threads_is_not_noticed() -> None:
    def autocast(enabled: bool) -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            return 1.0

    session = Evaluator().session([nn.Parameter(torch.ones(1))])
    session.first(lambda: autocast(enabled=False))

    def elsewhere() -> float:
        thread = threading.Thread(target=autocast, args=[True])
        thread.start()
        thread.join()
        return 1.0

    session.first(elsewhere)
    assert session.computed_in == set()
    with torch.autocast("cpu", torch.bfloat16):
        session.first(lambda: 1.0)
    assert session.computed_in == {torch.bfloat16}


# --- the first call --------------------------------------------------------------------------------------------------


def test_first_call_has_gradients_enabled_whatever_the_caller_has() -> None:
    seen = []

    def closure() -> float:
        seen.append(torch.is_grad_enabled())
        return 1.0

    with torch.no_grad():
        Evaluator.call(closure)
        assert not torch.is_grad_enabled()
    assert seen == [True]


def test_call_says_whether_the_closure_ran_backward() -> None:
    weight = torch.ones(2, requires_grad=True)

    def with_method() -> Tensor:
        loss = weight.sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    def with_function() -> Tensor:
        loss = weight.sum()
        torch.autograd.backward(loss)
        return loss

    assert Evaluator.call(with_method)[1]
    assert Evaluator.call(with_function)[1]
    assert torch.equal(weight.grad, torch.full((2,), 2.0))  # type: ignore[arg-type]
    assert not Evaluator.call(weight.sum)[1]


def test_backward_outside_of_a_call_is_not_taken_for_the_closure() -> None:
    Evaluator.call(closure_of(nn.Linear(3, 1)))
    weight = torch.ones(2, requires_grad=True)
    weight.sum().backward()  # type: ignore[no-untyped-call]
    assert not Evaluator.call(lambda: 1.0)[1]


def test_call_refuses_what_is_no_loss() -> None:
    with pytest.raises(TypeError, match="closure must return the loss"):
        Evaluator.call(lambda: None)


def test_probe_refuses_what_is_no_loss_and_names_the_caller() -> None:
    evaluator = Evaluator()
    with (
        nullcontext(evaluator.session([])) as session,
        session.probing(),
        pytest.raises(TypeError, match=r"^probe must return"),
    ):
        session.probe(lambda: None, "probe")


def test_probed_loss_has_no_graph() -> None:
    evaluator = Evaluator()
    weight = torch.ones(2, requires_grad=True)

    def penalised() -> Tensor:
        [gradient] = torch.autograd.grad(weight.pow(2).sum(), weight, create_graph=True)
        return gradient.pow(2).sum()

    for closure in (weight.sum, penalised):
        with nullcontext(evaluator.session([weight])) as session, session.probing():
            loss = session.probe(closure, "closure")
        assert isinstance(loss, Tensor)
        assert not loss.requires_grad


# --- random streams --------------------------------------------------------------------------------------------------


def test_probes_see_the_dropout_masks_of_the_first_call() -> None:
    model = nn.Sequential(nn.Linear(3, 32), nn.Dropout(0.5), nn.Linear(32, 1))
    losses = call_and_probe(closure_of(model), parameters_of(model), probes=3)
    assert len(set(losses)) == 1


def test_every_step_has_dropout_masks_of_its_own() -> None:
    model = nn.Sequential(nn.Linear(3, 32), nn.Dropout(0.5), nn.Linear(32, 1))
    closure = closure_of(model)
    first, second = (call_and_probe(closure, parameters_of(model))[0] for _ in range(2))
    assert first != second


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), torch.rand(1).item()


def test_probes_draw_what_the_first_call_drew_from_every_global_stream() -> None:
    draws = []

    def closure() -> float:
        draws.append(draw())
        return 1.0

    call_and_probe(closure, [], probes=3)
    assert len(draws) == 4
    assert len(set(draws)) == 1


@pytest.mark.parametrize("probe_draws", [0, 1, 100])
def test_random_streams_end_as_after_the_first_call(probe_draws: int) -> None:
    evaluator = Evaluator()

    def closure() -> float:
        for _ in range(probe_draws if evaluator.is_probing else 2):
            draw()
        return 1.0

    def remember() -> None:
        expected.extend(stream_states())

    expected: list[Any] = []
    call_and_probe(closure, [], evaluator=evaluator, after_first=remember)
    assert stream_states() == expected


def test_random_streams_end_where_they_were_without_a_first_call() -> None:
    before = stream_states()
    evaluator = Evaluator()
    draws = []

    def closure() -> float:
        draws.append(draw())
        return 1.0

    with nullcontext(evaluator.session([])) as session, session.probing():
        for _ in range(2):
            session.probe(closure, "probe")
    assert draws[0] == draws[1]
    assert stream_states() == before


# --- buffers ---------------------------------------------------------------------------------------------------------


def buffers_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def assert_same_buffers(model: nn.Module, expected: dict[str, Tensor]) -> None:
    buffers = dict(model.named_buffers())
    assert buffers.keys() == expected.keys()
    for name, buffer in buffers.items():
        assert torch.equal(buffer, expected[name]), name


class Counting(nn.Module):
    """Adds the number of times it was called to its inputs."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def count(self) -> None:
        self.calls += 1

    def forward(self, inputs: Tensor) -> Tensor:
        self.count()
        return inputs + self.calls


class Reassigning(Counting):
    def count(self) -> None:
        self.calls = self.calls + 1


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
    for (name, buffer), (kept_name, kept, copy) in zip(left, buffers, strict=True):
        assert name == kept_name
        assert buffer is kept
        assert buffer is None or torch.equal(buffer, copy)  # type: ignore[arg-type]


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
    evaluator = Evaluator()

    class Registering(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            if evaluator.is_probing:
                assert "extra" not in self._buffers
                self.register_buffer("extra", torch.ones(()))
            return super().forward(inputs)

    model = Registering(3, 1)
    call_and_probe(closure_of(model), parameters_of(model), evaluator=evaluator)
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
    evaluator = Evaluator()
    model, other = nn.Linear(3, 4), nn.BatchNorm1d(4)
    expected = buffers_of(other)

    def closure() -> Any:
        outputs = model(INPUTS)
        return (other(outputs) if evaluator.is_probing else outputs).pow(2).mean()

    call_and_probe(closure, parameters_of(model), evaluator=evaluator, probes=3)
    assert_same_buffers(other, expected)


def test_module_made_in_a_call_is_probed_like_any_other() -> None:
    model = nn.Linear(3, 3)

    def closure() -> Any:
        return nn.Sequential(model, Counting(), nn.BatchNorm1d(3))(INPUTS).pow(2).mean()

    assert len(set(call_and_probe(closure, parameters_of(model)))) == 1


def test_probes_without_a_first_call_leave_buffers_as_they_were() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    expected = buffers_of(model)
    evaluator = Evaluator()
    with nullcontext(evaluator.session(parameters_of(model))) as session, session.probing():
        losses = [session.probe(lambda: model(INPUTS).pow(2).mean(), "probe") for _ in range(3)]
    assert len(set(losses_to_floats(losses))) == 1
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


# --- gradients -------------------------------------------------------------------------------------------------------


class Gradients:
    """The gradients of tensors after the first call."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors

    def remember(self) -> None:
        self.gradients = [tensor.grad for tensor in self.tensors]
        self.copies = [None if gradient is None else gradient.clone() for gradient in self.gradients]

    def assert_unchanged(self) -> None:
        for tensor, gradient, copy in zip(self.tensors, self.gradients, self.copies, strict=True):
            assert tensor.grad is gradient
            assert gradient is None or torch.equal(gradient, copy)  # type: ignore[arg-type]


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_are_absent_in_probes_and_the_same_objects_afterwards(set_to_none: bool) -> None:
    evaluator = Evaluator()
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen: list[Tensor | None] = []

    def closure() -> Tensor:
        if evaluator.is_probing:
            seen.extend(parameter.grad for parameter in model.parameters())
        optimizer.zero_grad(set_to_none=set_to_none)
        loss: Tensor = model(INPUTS).pow(2).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        if evaluator.is_probing:
            seen.extend(parameter.grad for parameter in model.parameters())
        return loss

    gradients = Gradients(parameters_of(model))
    call_and_probe(closure, parameters_of(model), evaluator=evaluator, after_first=gradients.remember)
    assert seen == [None] * 8
    assert all(gradient is not None for gradient in gradients.gradients)
    gradients.assert_unchanged()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_of_a_module_outside_the_optimizer_survive(set_to_none: bool) -> None:
    generator, critic = nn.Linear(3, 3), nn.Linear(3, 1)

    def closure() -> Tensor:
        generator.zero_grad(set_to_none=set_to_none)
        critic.zero_grad(set_to_none=set_to_none)
        loss: Tensor = critic(generator(INPUTS)).pow(2).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    gradients = Gradients(parameters_of(generator, critic))
    call_and_probe(closure, parameters_of(generator), after_first=gradients.remember)
    assert all(gradient is not None for gradient in gradients.gradients)
    gradients.assert_unchanged()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_of_plain_tensors_that_another_optimizer_zeroes_survive(set_to_none: bool) -> None:
    model, other = nn.Linear(3, 1), torch.ones((), requires_grad=True)
    (3 * other).backward()  # type: ignore[no-untyped-call]
    other_optimizer = torch.optim.Adam([other])
    evaluator = Evaluator()

    def closure() -> Tensor:
        if evaluator.is_probing:
            other_optimizer.zero_grad(set_to_none=set_to_none)
        loss: Tensor = other * model(INPUTS).pow(2).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    gradients = Gradients([other, *model.parameters()])
    call_and_probe(closure, parameters_of(model), evaluator=evaluator, after_first=gradients.remember)
    gradients.assert_unchanged()


def test_gradients_that_a_probe_takes_away_by_hand_survive() -> None:
    model, critic = nn.Linear(3, 3), nn.Linear(3, 1)
    evaluator = Evaluator()

    def closure() -> Tensor:
        if evaluator.is_probing:
            for parameter in parameters_of(model, critic):
                assert parameter.grad is None
                parameter.grad = torch.full_like(parameter, 99.0)
        loss: Tensor = critic(model(INPUTS)).pow(2).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    gradients = Gradients(parameters_of(model, critic))
    call_and_probe(closure, parameters_of(model), evaluator=evaluator, after_first=gradients.remember)
    gradients.assert_unchanged()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_of_a_module_that_a_probe_zeroes_but_nobody_calls_survive(set_to_none: bool) -> None:
    model, other = nn.Linear(3, 1), nn.Linear(3, 1)
    closure_of(other)()
    evaluator = Evaluator()

    def closure() -> Tensor:
        if evaluator.is_probing:
            other.zero_grad(set_to_none=set_to_none)
        return closure_of(model)()

    gradients = Gradients(parameters_of(other))
    call_and_probe(closure, parameters_of(model), evaluator=evaluator, after_first=gradients.remember)
    assert all(gradient is not None for gradient in gradients.gradients)
    gradients.assert_unchanged()


def test_gradients_of_frozen_parameters_and_absent_ones_stay_as_they_are() -> None:
    model = nn.Linear(3, 1)
    model.bias.requires_grad_(False)
    unused = nn.Parameter(torch.ones(2))
    gradients = Gradients([*model.parameters(), unused])
    call_and_probe(closure_of(model), gradients.tensors, after_first=gradients.remember)
    assert [gradient is None for gradient in gradients.gradients] == [False, True, True]
    gradients.assert_unchanged()


def test_gradients_computed_before_the_first_call_survive_probes_alone() -> None:
    model = nn.Linear(3, 1)
    closure = closure_of(model)
    closure()
    gradients = Gradients(parameters_of(model))
    gradients.remember()
    evaluator = Evaluator()
    with nullcontext(evaluator.session(gradients.tensors)) as session, session.probing():
        session.probe(closure, "probe")
    gradients.assert_unchanged()


def test_backward_of_any_form_does_nothing_in_a_probe() -> None:
    model, leaf = nn.Linear(3, 1), torch.ones(3, requires_grad=True)
    evaluator = Evaluator()

    def closure() -> Tensor:
        loss: Tensor = model(INPUTS * leaf).pow(2).mean()
        if evaluator.is_probing:
            loss.backward()  # type: ignore[no-untyped-call]
            loss.backward(inputs=[leaf])  # type: ignore[no-untyped-call]
            torch.autograd.backward(loss)
            torch.autograd.backward([loss], inputs=[leaf])
            assert leaf.grad is None
        return loss

    call_and_probe(closure, parameters_of(model), evaluator=evaluator)
    assert leaf.grad is None


def test_another_thread_keeps_its_gradients_while_this_one_probes() -> None:
    evaluator = Evaluator()
    model, other = nn.Linear(3, 1), nn.Linear(3, 1)
    checks = []

    def train_other() -> None:
        with torch.enable_grad():
            other(INPUTS).sum().backward()
            checks.append(other.weight.grad is not None)
            torch.autograd.backward(other(INPUTS).sum())
            assert other.weight.grad is not None
            checks.append(torch.allclose(other.weight.grad, 2 * INPUTS.sum(dim=0, keepdim=True)))
            other.zero_grad()
            checks.append(other.weight.grad is None)

    def closure() -> Tensor:
        if evaluator.is_probing:
            thread = threading.Thread(target=train_other)
            thread.start()
            thread.join()
        return closure_of(model)()

    call_and_probe(closure, parameters_of(model), evaluator=evaluator, probes=2)
    assert checks == [True] * 6


def test_two_threads_probe_at_the_same_time() -> None:
    barrier = threading.Barrier(2, timeout=60)
    originals = torch.autograd.backward, nn.Module.zero_grad, torch.optim.Optimizer.zero_grad
    failures: list[BaseException] = []

    def work() -> None:
        try:
            model = nn.Linear(3, 1)
            gradients = Gradients(parameters_of(model))
            call_and_probe(
                closure_of(model),
                gradients.tensors,
                probes=5,
                after_first=gradients.remember,
                before_probe=barrier.wait,
            )
            gradients.assert_unchanged()
            assert gradients.gradients[0] is not None
        except BaseException as error:  # noqa: BLE001 - raised again by the test
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert originals == (torch.autograd.backward, nn.Module.zero_grad, torch.optim.Optimizer.zero_grad)


@pytest.mark.parametrize("goes_backward_first", [True, False])
def test_closure_in_which_another_optimizer_probes_keeps_its_own_gradients(goes_backward_first: bool) -> None:
    outer, inner = nn.Linear(3, 1), nn.Linear(3, 1)
    probing = Evaluator()

    def closure() -> Tensor:
        if not goes_backward_first:
            call_and_probe(closure_of(inner), parameters_of(inner), evaluator=probing)
        loss = closure_of(outer)()
        if goes_backward_first:
            call_and_probe(closure_of(inner), parameters_of(inner), evaluator=probing)
        return loss

    before = originals()
    _, went_backward = Evaluator.call(closure)
    assert went_backward
    assert all(parameter.grad is not None for parameter in parameters_of(outer, inner))
    assert originals() == before


# --- losses that differentiate inside --------------------------------------------------------------------------------


def inner_derivative(gradient: Callable[..., Any], backward: Callable[..., Any]) -> Callable[[nn.Module], Any]:
    def closure_of_model(model: nn.Module) -> Callable[[], Tensor]:
        inputs = INPUTS.clone().requires_grad_()

        def closure() -> Tensor:
            model.zero_grad()
            [derivative] = gradient(model(inputs).sum(), inputs, create_graph=True)
            loss: Tensor = derivative.pow(2).mean() + model(inputs).mean()
            backward(loss)
            return loss

        return closure

    return closure_of_model


@pytest.mark.parametrize(
    "closure_of_model",
    [
        pytest.param(inner_derivative(torch.autograd.grad, Tensor.backward), id="method"),
        pytest.param(inner_derivative(imported_grad, Tensor.backward), id="imported grad"),
        pytest.param(inner_derivative(imported_grad, imported_backward), id="imported grad and backward"),
        pytest.param(
            inner_derivative(imported_grad, lambda loss: torch.autograd.backward([loss])), id="functional backward"
        ),
    ],
)
@pytest.mark.parametrize("outer", [torch.enable_grad, torch.no_grad])
def test_loss_that_differentiates_inside_is_probed(
    closure_of_model: Callable[[nn.Module], Callable[[], Tensor]], outer: Callable[[], Any]
) -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 1))
    gradients = Gradients(parameters_of(model))
    evaluator = Evaluator()
    with outer():
        for _ in range(2):
            losses = call_and_probe(
                closure_of_model(model), gradients.tensors, evaluator=evaluator, after_first=gradients.remember
            )
            assert len(set(losses)) == 1
            gradients.assert_unchanged()


def test_imported_backward_finds_gradients_absent_in_every_probe() -> None:
    evaluator = Evaluator()
    model = nn.Linear(3, 1)
    seen: list[Tensor | None] = []

    def closure() -> Tensor:
        if evaluator.is_probing:
            seen.extend(parameter.grad for parameter in model.parameters())
        loss: Tensor = model(INPUTS).pow(2).mean()
        imported_backward(loss)
        return loss

    gradients = Gradients(parameters_of(model))
    call_and_probe(closure, gradients.tensors, evaluator=evaluator, after_first=gradients.remember, probes=3)
    assert all(gradient is None for gradient in seen)
    gradients.assert_unchanged()


@pytest.mark.parametrize(
    "watch",
    [
        pytest.param(lambda hidden: hidden.register_hook(lambda gradient: gradient.clamp(-1.0, 1.0)), id="hook"),
        pytest.param(lambda hidden: hidden.retain_grad(), id="retained gradient"),
    ],
)
def test_loss_that_hooks_an_activation_is_probed(watch: Callable[[Tensor], object]) -> None:
    model = nn.Linear(3, 1)

    def closure() -> Tensor:
        model.zero_grad()
        hidden = model(INPUTS)
        watch(hidden)
        loss: Tensor = hidden.pow(2).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    gradients = Gradients(parameters_of(model))
    losses = call_and_probe(closure, gradients.tensors, after_first=gradients.remember)
    assert len(set(losses)) == 1
    gradients.assert_unchanged()


def test_loss_that_differentiates_inside_is_called_twice_in_its_first_probe_only() -> None:
    model, calls = nn.Linear(3, 1), 0
    closure = inner_derivative(torch.autograd.grad, Tensor.backward)(model)

    def counted() -> Any:
        nonlocal calls
        calls += 1
        return closure()

    evaluator = Evaluator()
    call_and_probe(counted, parameters_of(model), evaluator=evaluator)
    assert calls == 4
    call_and_probe(counted, parameters_of(model), evaluator=evaluator)
    assert calls == 7


def test_errors_of_the_closure_are_raised_as_they_are() -> None:
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
        return torch.tensor(1.0)

    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        call_and_probe(closure, [])
    assert calls == 2


# --- the surroundings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outer", [torch.enable_grad, torch.no_grad])
def test_probes_run_without_a_graph_and_leave_grad_mode_alone(outer: Callable[[], Any]) -> None:
    modes = []

    def closure() -> float:
        modes.append(torch.is_grad_enabled())
        return 1.0

    with outer():
        before = torch.is_grad_enabled()
        call_and_probe(closure, [])
        assert torch.is_grad_enabled() == before
    assert modes == [True, False, False]


def test_probes_inside_an_outer_autocast_see_the_moved_weights() -> None:
    model = nn.Linear(3, 1)

    @torch.no_grad()
    def double() -> None:
        for parameter in model.parameters():
            parameter.mul_(2.0)

    with torch.autocast("cpu", torch.bfloat16):
        first, second, third = call_and_probe(closure_of(model), parameters_of(model), before_probe=double)
    assert second == pytest.approx(4 * first, rel=0.05)
    assert third == pytest.approx(16 * first, rel=0.05)


def test_what_follows_the_probes_inside_an_outer_autocast_sees_the_present_weights() -> None:
    model = nn.Linear(3, 1)
    before = model.weight.detach().clone()

    @torch.no_grad()
    def move() -> None:
        model.weight.add_(10.0)

    with torch.autocast("cpu", torch.bfloat16):
        evaluator = Evaluator()
        with nullcontext(evaluator.session(parameters_of(model))) as session:
            first = session.first(lambda: evaluator.call(closure_of(model))[0])
            with session.probing():
                move()
                session.probe(closure_of(model), "closure")
            with torch.no_grad():
                model.weight.copy_(before)
        assert closure_of(model)().item() == first.item()  # type: ignore[union-attr]


@pytest.mark.parametrize("enabled", [True, False])
def test_attention_takes_no_other_kernel_in_probes(enabled: bool) -> None:
    torch.backends.mha.set_fastpath_enabled(enabled)
    try:
        flags = []
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
        inputs = torch.randn(2, 5, 8)

        def closure() -> Tensor:
            flags.append(torch.backends.mha.get_fastpath_enabled())
            return closure_of(layer, inputs)()

        losses = call_and_probe(closure, parameters_of(layer))
        assert len(set(losses)) == 1
        assert flags == [enabled, False, False]
        assert torch.backends.mha.get_fastpath_enabled() == enabled
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_is_probing_while_a_probe_runs_and_only_then() -> None:
    evaluator = Evaluator()
    seen = []

    def closure() -> float:
        seen.append(evaluator.is_probing)
        return 1.0

    assert not evaluator.is_probing
    call_and_probe(closure, [], evaluator=evaluator)
    assert seen == [False, True, True]
    assert not evaluator.is_probing


def originals() -> tuple[object, ...]:
    return (
        torch.autograd.backward,
        Tensor.backward,
        nn.Module.zero_grad,
        torch.optim.Optimizer.zero_grad,
        dict(torch_module._global_forward_pre_hooks),
    )


def test_what_is_patched_is_as_before_afterwards() -> None:
    before = originals()
    model = nn.Linear(3, 1)
    call_and_probe(closure_of(model), parameters_of(model))
    assert originals() == before


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("failing_call", [1, 2, 3])
@pytest.mark.parametrize("outer", [torch.enable_grad, torch.no_grad])
def test_everything_is_put_back_when_a_call_raises(
    error: type[BaseException], failing_call: int, outer: Callable[[], Any]
) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), Reassigning(), nn.Dropout(0.5), nn.Linear(4, 1))
    critic = nn.Linear(1, 1)
    tensors = parameters_of(model, critic)
    gradients = Gradients(tensors)
    streams: list[Any] = []
    buffers: dict[str, Tensor] = {}
    evaluator = Evaluator()
    calls = 0

    def remember() -> None:
        gradients.remember()
        streams[:] = stream_states()
        buffers.update(buffers_of(model))

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        draw()
        if calls > 1:
            critic.zero_grad()
        loss: Tensor = critic(model(INPUTS)).pow(2).mean()
        if calls == failing_call:
            raise error("stop")
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    before = originals()
    remember()
    with outer():
        grad_mode = torch.is_grad_enabled()
        with pytest.raises(error, match="stop"):
            call_and_probe(closure, parameters_of(model), evaluator=evaluator, after_first=remember)
        assert torch.is_grad_enabled() == grad_mode
    assert calls == failing_call
    gradients.assert_unchanged()
    if failing_call > 1:  # what a first call that fails has drawn and written is drawn and written, as without GeN
        assert stream_states() == streams
        assert_same_buffers(model, buffers)
    assert originals() == before
    assert torch.backends.mha.get_fastpath_enabled()
    assert not evaluator.is_probing

    weight = torch.ones((), requires_grad=True)
    (2 * weight).backward()  # type: ignore[no-untyped-call]
    assert weight.grad == 2.0


def test_steps_after_a_failed_one_probe_as_usual() -> None:
    evaluator, model = Evaluator(), nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5))

    def failing() -> Tensor:
        if evaluator.is_probing:
            raise ValueError("stop")
        return closure_of(model)()

    with pytest.raises(ValueError, match="stop"):
        call_and_probe(failing, parameters_of(model), evaluator=evaluator)
    assert len(set(call_and_probe(closure_of(model), parameters_of(model), evaluator=evaluator))) == 1


# --- calls with a graph ----------------------------------------------------------------------------------------------


def differentiate(closure: Callable[[], Any], parameters: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The gradients of a closure: of the first call, and of one more with a graph."""
    evaluator = Evaluator()
    with nullcontext(evaluator.session(parameters)) as session:
        loss = session.first(lambda: evaluator.call(closure)[0])
        expected = parameters[0].grad
        if expected is None:
            [expected] = torch.autograd.grad(loss, parameters[:1])  # type: ignore[arg-type]
        expected = expected.clone()
        with session.probing():
            [gradient] = torch.autograd.grad(session.differentiable(closure, "closure"), parameters[:1])
    return expected, gradient


def test_call_with_a_graph_sees_what_the_first_call_saw() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), Counting(), nn.Linear(8, 1))
    twin_buffers: dict[str, Tensor] = {}

    def closure() -> Tensor:
        loss = closure_of(model)()
        twin_buffers.update(twin_buffers or buffers_of(model))
        return loss

    expected, gradient = differentiate(closure, parameters_of(model))
    assert torch.equal(gradient, expected)
    assert_same_buffers(model, twin_buffers)


def test_graph_is_that_of_the_backward_calls_where_the_loss_has_none() -> None:
    model = nn.Linear(3, 1)

    def closure() -> Any:
        model.zero_grad()
        halves = [model(half).pow(2).sum() / len(INPUTS) for half in INPUTS.chunk(2)]
        halves[0].backward()
        torch.autograd.backward(halves[1:])
        return sum(half.item() for half in halves)

    expected, gradient = differentiate(closure, parameters_of(model))
    assert torch.allclose(gradient, expected)


def test_graph_of_weighted_backward_calls_is_weighted() -> None:
    model = nn.Linear(3, 1)

    def closure() -> Any:
        model.zero_grad()
        outputs = model(INPUTS).squeeze(1)
        outputs.backward(torch.arange(8.0))
        return outputs.sum().item()

    expected, gradient = differentiate(closure, parameters_of(model))
    assert torch.allclose(gradient, expected)


def test_loss_without_any_graph_is_refused_with_what_to_do() -> None:
    evaluator = Evaluator()
    with (
        nullcontext(evaluator.session([])) as session,
        session.probing(),
        pytest.raises(TypeError, match=r"probe must return a loss that has a graph.*mode='approximate'"),
    ):
        session.differentiable(lambda: 1.0, "probe")
