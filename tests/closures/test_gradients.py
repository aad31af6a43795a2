"""The gradients that a step uses, those that probes leave as they were, and which scalar they belong to."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import backward as imported_backward
from torch.autograd.graph import get_gradient_edge

from gen_optim.closures.gradients import GradientWatch, Source, mark_used
from gen_optim.closures.losses import Loss
from gen_optim.closures.session import ClosureCaller
from tests.closures.probes import (
    INPUTS,
    Gradients,
    begun,
    call,
    call_and_probe,
    closure_of,
    originals,
    parameters_of,
    session_of,
)
from tests.training import Training, looking

FRESH = torch.tensor([1.0, 2.0])
"""The gradient of the closures' loss."""


class Trained:
    """One weight whose loss has the gradient ``FRESH``, and a step as the optimizer takes it, the update apart."""

    def __init__(self) -> None:
        self.weight = nn.Parameter(torch.zeros(2))
        self.groups = [{"params": [self.weight]}]
        self.backward_calls = 0

    def loss(self) -> Tensor:
        loss = (self.weight * FRESH).sum()
        loss.register_hook(self._count)  # type: ignore[no-untyped-call]
        return loss

    def _count(self, gradient: Tensor) -> None:
        self.backward_calls += 1

    def zero_grad(self, set_to_none: bool = True) -> None:
        torch.optim.SGD([self.weight]).zero_grad(set_to_none)

    def backward(self, loss: Tensor | None = None) -> None:
        (self.loss() if loss is None else loss).backward()  # type: ignore[no-untyped-call]

    def step(self, closure: Callable[[], Loss]) -> None:
        ClosureCaller().call(closure, self.groups)
        mark_used(self.groups)

    @property
    def gradient(self) -> Tensor:
        assert self.weight.grad is not None
        return self.weight.grad


@pytest.fixture
def trained() -> Trained:
    return Trained()


def assert_fresh(trained: Trained) -> None:
    assert torch.equal(trained.gradient, FRESH)


# --- closures that only return the loss ------------------------------------------------------------------------------


def test_loss_is_differentiated_where_there_are_no_gradients(trained: Trained) -> None:
    trained.step(trained.loss)
    assert_fresh(trained)
    assert trained.backward_calls == 1


def test_loss_is_differentiated_anew_at_every_step(trained: Trained) -> None:
    for step in range(1, 4):
        trained.step(trained.loss)
        assert_fresh(trained)
        assert trained.backward_calls == step


@pytest.mark.parametrize("set_to_none", [True, False])
def test_loss_is_differentiated_where_the_closure_has_zeroed_the_gradients(trained: Trained, set_to_none: bool) -> None:
    def closure() -> Tensor:
        trained.zero_grad(set_to_none)
        return trained.loss()

    for _ in range(3):
        trained.step(closure)
        assert_fresh(trained)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_loss_is_differentiated_where_the_caller_has_zeroed_the_gradients(trained: Trained, set_to_none: bool) -> None:
    for _ in range(3):
        trained.zero_grad(set_to_none)
        trained.step(trained.loss)
        assert_fresh(trained)


def test_gradients_that_the_last_step_used_are_not_used_again(trained: Trained) -> None:
    trained.backward()
    trained.step(trained.loss)
    trained.weight.grad = trained.gradient.mul_(1.0)  # written in place: fresh
    mark_used(trained.groups)
    trained.step(trained.loss)
    assert_fresh(trained)
    assert trained.backward_calls == 2


# --- gradients of the caller's ---------------------------------------------------------------------------------------


def test_gradients_of_the_caller_are_used(trained: Trained) -> None:
    for step in range(1, 4):
        trained.zero_grad()
        loss = trained.loss()
        trained.backward(loss)
        trained.gradient.mul_(0.5)  # clipped, say
        trained.step(lambda: loss)  # noqa: B023
        assert torch.equal(trained.gradient, 0.5 * FRESH)
        assert trained.backward_calls == step


def test_gradients_that_the_caller_accumulates_in_place_are_used(trained: Trained) -> None:
    trained.step(trained.loss)
    trained.backward()
    trained.step(trained.loss)
    assert torch.equal(trained.gradient, 2 * FRESH)
    assert trained.backward_calls == 2


def test_gradients_of_the_caller_need_no_graph_from_the_closure(trained: Trained) -> None:
    trained.backward()
    trained.step(lambda: 1.0)
    assert_fresh(trained)


def test_all_zero_gradients_of_the_caller_need_no_graph_from_the_closure(trained: Trained) -> None:
    trained.weight.grad = torch.zeros(2)
    trained.step(lambda: 1.0)
    assert torch.equal(trained.gradient, torch.zeros(2))


# --- closures that compute gradients ---------------------------------------------------------------------------------


def test_gradients_of_a_closure_that_goes_backward_are_left_alone(trained: Trained) -> None:
    def closure() -> Tensor:
        trained.zero_grad()
        loss = trained.loss()
        trained.backward(loss)
        return loss

    for step in range(1, 4):
        trained.step(closure)
        assert_fresh(trained)
        assert trained.backward_calls == step


def test_closure_that_goes_backward_may_return_a_plain_number(trained: Trained) -> None:
    def closure() -> float:
        trained.zero_grad()
        trained.backward()
        return 1.0

    trained.step(closure)
    assert_fresh(trained)


def test_closure_may_accumulate_over_micro_batches(trained: Trained) -> None:
    def closure() -> float:
        trained.zero_grad()
        for _ in range(3):
            trained.backward()
        return 1.0

    for _ in range(2):
        trained.step(closure)
        assert torch.equal(trained.gradient, 3 * FRESH)


def test_gradients_that_a_closure_assigns_are_used(trained: Trained) -> None:
    def closure() -> Tensor:
        loss = trained.loss()
        [gradient] = torch.autograd.grad(loss, trained.weight)
        trained.weight.grad = 7 * gradient
        return loss.detach()

    for _ in range(3):
        trained.step(closure)
        assert torch.equal(trained.gradient, 7 * FRESH)


def test_gradients_that_a_closure_writes_in_place_are_used(trained: Trained) -> None:
    trained.step(trained.loss)

    def closure() -> float:
        trained.gradient.copy_(7 * FRESH)
        return 1.0

    for _ in range(3):
        trained.step(closure)
        assert torch.equal(trained.gradient, 7 * FRESH)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_plain_number_without_gradients_is_refused(trained: Trained) -> None:
    message = r"closure must .*it returned a plain number.*neither \.item\(\) nor \.detach\(\)"
    with pytest.raises(TypeError, match=message):
        trained.step(lambda: 1.0)


def test_plain_number_is_refused_if_the_gradients_are_used_up(trained: Trained) -> None:
    trained.step(trained.loss)
    with pytest.raises(TypeError, match="no gradients were computed since the last step"):
        trained.step(lambda: 1.0)


def test_tensors_without_a_graph_are_steps_without_gradients_and_ten_of_them_are_warned_of(trained: Trained) -> None:
    """An empty batch looks the same as a loss that was detached by mistake."""
    training = Training.of(looking)
    before = [each.detach().clone() for each in training.model.parameters()]
    for _ in range(9):
        training.optimizer.step(lambda: torch.tensor(1.0))
    with pytest.warns(UserWarning, match="10 steps had no gradients"):
        training.optimizer.step(lambda: torch.tensor(1.0))
    assert all(map(torch.equal, before, training.model.parameters()))


# --- which gradient stands for all -----------------------------------------------------------------------------------


def is_fresh(groups: list[dict[str, Any]]) -> bool:
    """Whether the gradients, of ones, are used by a closure that only returns a number."""
    with begun(GradientWatch(groups)) as watch:
        pass
    return watch.find(1.0) is not Source.NONE


def test_parameters_without_gradients_and_frozen_ones_are_passed_over() -> None:
    unused, frozen, used = (
        nn.Parameter(torch.ones(1)),
        nn.Parameter(torch.ones(1), requires_grad=False),
        nn.Parameter(FRESH.clone()),
    )
    frozen.grad = torch.ones(1)
    used.grad = torch.ones(2)
    groups: list[dict[str, Any]] = [{"params": []}, {"params": [unused, frozen]}, {"params": [used]}]
    assert is_fresh(groups)
    used.grad.zero_()
    mark_used(groups)
    assert not is_fresh(groups)
    assert not hasattr(frozen.grad, "_gen_used_version")


def test_without_any_gradient_there_is_nothing_fresh_and_nothing_to_mark() -> None:
    groups = [{"params": [nn.Parameter(torch.ones(1))]}]
    mark_used(groups)
    assert not is_fresh(groups)


def test_used_gradient_is_fresh_again_once_written() -> None:
    weight = nn.Parameter(torch.ones(1))
    weight.grad = torch.ones(1)
    groups = [{"params": [weight]}]
    mark_used(groups)
    assert not is_fresh(groups)
    weight.grad.add_(1.0)
    assert is_fresh(groups)


def test_another_gradient_is_fresh_though_the_one_before_was_used() -> None:
    weight = nn.Parameter(torch.ones(1))
    groups = [{"params": [weight]}]
    for _ in range(5):  # ids are recycled; marks are not
        weight.grad = torch.ones(1)
        assert is_fresh(groups)
        mark_used(groups)
        weight.grad = None


def test_gradients_of_every_parameter_are_computed_together() -> None:
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    groups = [{"params": [first]}, {"params": [second]}]
    second.grad = torch.full((2,), 99.0)
    mark_used(groups)
    with begun(GradientWatch(groups)) as watch:
        loss = (first * FRESH + second * FRESH).sum()
    assert watch.find(loss) is Source.NONE
    assert watch.differentiate(loss)
    for weight in (first, second):
        assert weight.grad is not None
        assert torch.equal(weight.grad, FRESH)


# --- of what they are the gradients ----------------------------------------------------------------------------------


def differentiated_by(trained: Trained, closure: Callable[[], Any]) -> list[float] | None:
    """What the gradients that a closure leaves are known to be those of."""
    session = session_of(closure, [trained.weight])
    session.first(closure)
    found = session.origin.differentiated()
    return None if found is None else [each.item() for each in found[0]]


@pytest.fixture
def away(trained: Trained) -> Trained:
    """Where its loss is 3."""
    with torch.no_grad():
        trained.weight.fill_(1.0)
    return trained


def test_gradients_are_those_of_what_went_backward(away: Trained) -> None:
    def closure() -> Tensor:
        away.zero_grad()
        loss = away.loss()
        (2.0 * loss).backward()
        loss = away.loss()
        loss.backward(torch.tensor(0.5))
        torch.autograd.backward([loss.new_ones(()) * away.loss(), away.loss()], [torch.tensor(1.0), torch.tensor(4.0)])
        return loss

    assert differentiated_by(away, closure) == [6.0, 1.5, 3.0, 12.0]


def test_vectors_that_go_backward_count_by_their_weighted_sum(away: Trained) -> None:
    def closure() -> float:
        away.zero_grad()
        (away.weight * FRESH).backward(torch.tensor([1.0, 10.0]))
        return 1.0

    assert differentiated_by(away, closure) == [21.0]


def test_gradients_that_the_optimizer_computes_are_those_of_the_loss(away: Trained) -> None:
    assert differentiated_by(away, away.loss) == [3.0]
    mark_used(away.groups)
    assert differentiated_by(away, away.loss) == [3.0]  # those of the step before are replaced


def test_nothing_is_known_of_gradients_that_were_there_before(away: Trained) -> None:
    away.backward()
    assert differentiated_by(away, away.loss) is None  # the caller's
    assert differentiated_by(away, lambda: away.backward() or 1.0) is None  # added to


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_zeroed_in_place_are_those_of_nobody_knows_what(away: Trained, set_to_none: bool) -> None:
    def closure() -> Tensor:
        away.zero_grad(set_to_none)
        loss = away.loss()
        loss.backward()
        return loss

    assert differentiated_by(away, closure) == [3.0]
    assert differentiated_by(away, closure) == ([3.0] if set_to_none else None)


def summed_gradient(trained: Trained) -> tuple[Tensor]:
    return (trained.gradient.sum(),)


def test_gradients_are_measured_before_they_are_written(away: Trained) -> None:
    def clipped() -> float:
        away.zero_grad()
        away.backward()
        away.gradient.mul_(0.5)
        return 3.0

    def replaced() -> float:
        away.zero_grad()
        away.backward()
        away.weight.grad = 2.0 * FRESH
        return 3.0

    def computed_by_the_optimizer() -> Tensor:
        away.zero_grad()
        return away.loss()

    for closure in (clipped, replaced, computed_by_the_optimizer):
        session = session_of(closure, [away.weight])
        session.first(closure, functools.partial(summed_gradient, away))
        [scalar], measured = session.origin.differentiated() or ([], None)
        assert (scalar, measured) == (3.0, (FRESH.sum(),)), closure.__name__


def test_gradients_of_several_passes_are_measured_together(away: Trained) -> None:
    def closure() -> float:
        away.zero_grad()
        away.backward()
        away.backward()
        return 6.0

    session = session_of(closure, [away.weight])
    session.first(closure, functools.partial(summed_gradient, away))
    _, measured = session.origin.differentiated() or ([], None)
    assert measured == (2.0 * FRESH.sum(),)


def test_nothing_is_known_of_gradients_that_were_written_in_between(away: Trained) -> None:
    def in_between() -> float:
        away.zero_grad()
        away.backward()
        away.gradient.mul_(1.0)
        away.backward()
        return 6.0

    def zeroed_in_between() -> float:
        away.zero_grad()
        away.backward()
        away.zero_grad()
        away.backward()
        return 3.0

    for closure in (in_between, zeroed_in_between):
        assert differentiated_by(away, closure) is None, closure.__name__


def test_nothing_is_known_where_nothing_went_backward(away: Trained) -> None:
    def closure() -> Tensor:
        loss = away.loss()
        [away.weight.grad] = torch.autograd.grad(loss, away.weight)
        return loss.detach()

    assert differentiated_by(away, closure) is None


def test_backward_that_fails_leaves_nothing_known(away: Trained) -> None:
    def closure() -> Tensor:
        away.zero_grad()
        loss = away.loss()
        loss.register_hook(lambda _: 1 / 0)
        loss.backward()
        return loss

    session = session_of(closure, [away.weight])
    with pytest.raises(ZeroDivisionError):
        session.first(closure)
    assert session.origin.differentiated() is None


def test_a_backward_pass_from_an_edge_of_the_graph_is_of_nothing_known() -> None:
    training = Training.of(looking)

    def closure() -> Tensor:
        training.optimizer.zero_grad()
        loss = training.loss()
        if loss.requires_grad:
            torch.autograd.backward((get_gradient_edge(loss),))
        return loss

    for _ in range(5):
        training.optimizer.step(closure)
    record = training.optimizer.last_probe
    assert record.step == 5
    assert record.multiples == (0.0, 0.5, 1.0)  # without a slope from the gradients


# --- which backward pass it was --------------------------------------------------------------------------------------


def zero_loss(trained: Trained) -> Tensor:
    """A loss whose gradient is zero."""
    return trained.loss() * 0.0


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("backward", [Tensor.backward, torch.autograd.backward, imported_backward])
def test_gradients_of_zero_are_those_of_the_closure(trained: Trained, backward: Any, set_to_none: bool) -> None:
    def closure() -> Tensor:
        trained.zero_grad(set_to_none)
        loss = zero_loss(trained)
        backward(loss)
        return loss

    for step in range(1, 4):
        trained.step(closure)
        assert torch.equal(trained.gradient, torch.zeros(2))
        assert trained.backward_calls == step


def test_a_backward_pass_that_reaches_no_parameter_leaves_them_without_gradients(trained: Trained) -> None:
    critic = nn.Linear(2, 1)

    def closure() -> Tensor:
        trained.zero_grad()
        loss: Tensor = critic(FRESH).square().sum()
        trained.backward(loss)
        return loss

    for _ in range(2):
        trained.step(closure)
        assert trained.weight.grad is None
        assert critic.weight.grad is not None
        critic.zero_grad()


def test_a_backward_pass_of_another_network_is_not_taken_for_that_of_the_loss(trained: Trained) -> None:
    critic = nn.Linear(2, 1)

    def closure() -> Tensor:
        critic(FRESH).square().sum().backward()
        return trained.loss()

    for step in range(1, 4):
        trained.step(closure)
        assert_fresh(trained)
        assert trained.backward_calls == step


def test_a_parameter_outside_the_graph_may_come_first(trained: Trained) -> None:
    unused = nn.Parameter(torch.ones(2))
    trained.groups.insert(0, {"params": [unused]})

    def closure() -> Tensor:
        for each in (unused, trained.weight):
            if each.grad is not None:
                each.grad.zero_()
        loss = trained.loss()
        trained.backward(loss)
        return loss

    unused.grad = torch.ones(2)
    for step in range(1, 4):
        trained.step(closure)
        assert_fresh(trained)
        assert trained.backward_calls == step


def test_gradients_that_are_set_without_a_hook_are_told_by_their_version() -> None:
    """As ``fully_shard`` does: it writes to the local part of a parameter's gradient."""
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    groups: list[dict[str, Any]] = [{"params": [weight]}]
    mark_used(groups)
    with begun(GradientWatch(groups)) as watch:
        loss = weight.sum()
        weight.grad.add_(1.0)
    assert watch.find(loss) is Source.CLOSURE
    assert torch.equal(weight.grad, torch.full((2,), 2.0))


def test_no_hook_is_left() -> None:
    weight = nn.Parameter(torch.ones(2))
    groups: list[dict[str, Any]] = [{"params": [weight]}]
    for fails in (False, True):
        weight.grad = torch.ones(2)

        def closure(fails: bool = fails) -> Tensor:
            if fails:
                raise KeyError
            return weight.sum()

        with suppress(KeyError):
            ClosureCaller().call(closure, groups)
        assert not weight._post_accumulate_grad_hooks


# --- probes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_are_absent_in_probes_and_the_same_objects_afterwards(set_to_none: bool) -> None:
    caller = ClosureCaller()
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen: list[Tensor | None] = []

    def closure() -> Tensor:
        if caller.is_probing:
            seen.extend(parameter.grad for parameter in model.parameters())
        optimizer.zero_grad(set_to_none=set_to_none)
        loss: Tensor = model(INPUTS).pow(2).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        if caller.is_probing:
            seen.extend(parameter.grad for parameter in model.parameters())
        return loss

    gradients = Gradients(parameters_of(model))
    call_and_probe(closure, parameters_of(model), caller=caller, after_first=gradients.remember)
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
    call_and_probe(closure, parameters_of(generator), after_first=gradients.remember, modules=[critic])
    assert all(gradient is not None for gradient in gradients.gradients)
    gradients.assert_unchanged()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_of_plain_tensors_that_another_optimizer_zeroes_survive(set_to_none: bool) -> None:
    model, other = nn.Linear(3, 1), nn.Parameter(torch.ones(()))
    (3 * other).backward()  # type: ignore[no-untyped-call]
    other_optimizer = torch.optim.Adam([other])
    caller = ClosureCaller([nn.ParameterList([other])])

    def closure() -> Tensor:
        if caller.is_probing:
            other_optimizer.zero_grad(set_to_none=set_to_none)
        loss: Tensor = other * model(INPUTS).pow(2).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    gradients = Gradients([other, *model.parameters()])
    call_and_probe(closure, parameters_of(model), caller=caller, after_first=gradients.remember)
    gradients.assert_unchanged()


def test_gradients_that_a_probe_takes_away_by_hand_survive() -> None:
    model, critic = nn.Linear(3, 3), nn.Linear(3, 1)
    caller = ClosureCaller([critic])

    def closure() -> Tensor:
        if caller.is_probing:
            for parameter in parameters_of(model, critic):
                assert parameter.grad is None
                parameter.grad = torch.full_like(parameter, 99.0)
        loss: Tensor = critic(model(INPUTS)).pow(2).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    gradients = Gradients(parameters_of(model, critic))
    call_and_probe(closure, parameters_of(model), caller=caller, after_first=gradients.remember)
    gradients.assert_unchanged()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_of_a_module_that_a_probe_zeroes_but_nobody_calls_survive(set_to_none: bool) -> None:
    model, other = nn.Linear(3, 1), nn.Linear(3, 1)
    closure_of(other)()
    caller = ClosureCaller([other])

    def closure() -> Tensor:
        if caller.is_probing:
            other.zero_grad(set_to_none=set_to_none)
        return closure_of(model)()

    gradients = Gradients(parameters_of(other))
    call_and_probe(closure, parameters_of(model), caller=caller, after_first=gradients.remember)
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
    session = session_of(closure, gradients.tensors, name="probe")
    with session.probing():
        session.probe()
    gradients.assert_unchanged()


def test_backward_of_any_form_does_nothing_in_a_probe() -> None:
    model, leaf = nn.Linear(3, 1), torch.ones(3, requires_grad=True)
    caller = ClosureCaller()

    def closure() -> Tensor:
        loss: Tensor = model(INPUTS * leaf).pow(2).mean()
        if caller.is_probing:
            loss.backward()  # type: ignore[no-untyped-call]
            loss.backward(inputs=[leaf])  # type: ignore[no-untyped-call]
            torch.autograd.backward(loss)
            torch.autograd.backward([loss], inputs=[leaf])
            assert leaf.grad is None
        return loss

    call_and_probe(closure, parameters_of(model), caller=caller)
    assert leaf.grad is None


def test_another_thread_keeps_its_gradients_while_this_one_probes() -> None:
    caller = ClosureCaller()
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
        if caller.is_probing:
            thread = threading.Thread(target=train_other)
            thread.start()
            thread.join()
        return closure_of(model)()

    call_and_probe(closure, parameters_of(model), caller=caller, probes=2)
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
    probing = ClosureCaller()

    def closure() -> Tensor:
        if not goes_backward_first:
            call_and_probe(closure_of(inner), parameters_of(inner), caller=probing)
        loss = closure_of(outer)()
        if goes_backward_first:
            call_and_probe(closure_of(inner), parameters_of(inner), caller=probing)
        return loss

    before = originals()
    call(closure, parameters_of(outer))
    assert all(parameter.grad is not None for parameter in parameters_of(outer, inner))
    assert originals() == before
