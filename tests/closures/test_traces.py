"""What probes leave as it was: random streams, buffers and gradients."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gen_optim.closures.losses import losses_to_floats
from gen_optim.closures.session import Evaluator
from tests.closures.probes import (
    INPUTS,
    Counting,
    Gradients,
    Reassigning,
    assert_same_buffers,
    buffers_of,
    call_and_probe,
    closure_of,
    draw,
    originals,
    parameters_of,
    stream_states,
)

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
            checks.append(torch.allclose(other.weight.grad, 2 * INPUTS.sum(dim=0, keepdim=True), atol=1e-5))
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
