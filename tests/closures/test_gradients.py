from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from gen_optim.closures.gradients import GradientMark, GradientOrigin, complete_gradients, mark_used
from gen_optim.closures.interception import around_backward
from gen_optim.closures.losses import Loss
from gen_optim.closures.session import Evaluator
from tests.training import Training, looking

INPUTS = torch.tensor([1.0, 2.0])
FRESH = INPUTS
"""The gradient of the closures' loss."""


class Trained:
    """One weight whose loss has the gradient ``FRESH``, and a step as the optimizer takes it, the update apart."""

    def __init__(self) -> None:
        self.weight = nn.Parameter(torch.zeros(2))
        self.groups = [{"params": [self.weight]}]
        self.backward_calls = 0

    def loss(self) -> Tensor:
        loss = (self.weight * INPUTS).sum()
        loss.register_hook(self._count)  # type: ignore[no-untyped-call]
        return loss

    def _count(self, gradient: Tensor) -> None:
        self.backward_calls += 1

    def zero_grad(self, set_to_none: bool = True) -> None:
        torch.optim.SGD([self.weight]).zero_grad(set_to_none)

    def backward(self, loss: Tensor | None = None) -> None:
        (self.loss() if loss is None else loss).backward()  # type: ignore[no-untyped-call]

    def step(self, closure: Callable[[], Loss]) -> None:
        before = GradientMark.of(self.groups)
        loss, went_backward = Evaluator.call(closure)
        if not went_backward:
            complete_gradients(self.groups, loss, before)
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


@pytest.mark.parametrize(
    ("closure", "came"),
    [
        (lambda: 1.0, "a plain number"),
        (lambda: torch.tensor(1.0), "a tensor that does not require grad"),
    ],
)
def test_loss_without_a_graph_and_without_gradients_is_refused(
    trained: Trained, closure: Callable[[], Loss], came: str
) -> None:
    with pytest.raises(TypeError, match=rf"closure must .*it returned {came}.*neither \.item\(\) nor \.detach\(\)"):
        trained.step(closure)


@pytest.mark.parametrize("closure", [lambda: 1.0, lambda: torch.tensor(1.0)])
def test_loss_without_a_graph_is_refused_where_the_gradients_are_used_up(
    trained: Trained, closure: Callable[[], Loss]
) -> None:
    trained.step(trained.loss)
    with pytest.raises(TypeError, match="no gradients were computed since the last step"):
        trained.step(closure)


# --- which gradient stands for all -----------------------------------------------------------------------------------


def test_parameters_without_gradients_and_frozen_ones_are_passed_over() -> None:
    unused, frozen, used = (
        nn.Parameter(torch.ones(1)),
        nn.Parameter(torch.ones(1), requires_grad=False),
        nn.Parameter(INPUTS),
    )
    frozen.grad = torch.ones(1)
    used.grad = torch.ones(2)
    groups: list[dict[str, Any]] = [{"params": []}, {"params": [unused, frozen]}, {"params": [used]}]
    mark = GradientMark.of(groups)
    assert mark.gradient is not None
    assert mark.gradient() is used.grad
    assert mark.is_fresh
    mark_used(groups)
    assert not GradientMark.of(groups).is_fresh


def test_without_any_gradient_there_is_nothing_fresh_and_nothing_to_mark() -> None:
    groups = [{"params": [nn.Parameter(torch.ones(1))]}]
    mark_used(groups)
    mark = GradientMark.of(groups)
    assert mark.gradient is None
    assert not mark.is_fresh


def test_used_gradient_is_fresh_again_once_written() -> None:
    weight = nn.Parameter(torch.ones(1))
    weight.grad = torch.ones(1)
    groups = [{"params": [weight]}]
    mark_used(groups)
    assert not GradientMark.of(groups).is_fresh
    weight.grad.add_(1.0)
    assert GradientMark.of(groups).is_fresh


def test_another_gradient_is_fresh_though_the_one_before_was_used() -> None:
    weight = nn.Parameter(torch.ones(1))
    groups = [{"params": [weight]}]
    for _ in range(5):  # ids are recycled; marks are not
        weight.grad = torch.ones(1)
        assert GradientMark.of(groups).is_fresh
        mark_used(groups)
        weight.grad = None


def test_gradients_of_every_parameter_are_computed_together() -> None:
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    groups = [{"params": [first]}, {"params": [second]}]
    second.grad = torch.full((2,), 99.0)
    mark_used(groups)
    before = GradientMark.of(groups)
    loss = (first * INPUTS + second * INPUTS).sum()
    complete_gradients(groups, loss, before)
    for weight in (first, second):
        assert weight.grad is not None
        assert torch.equal(weight.grad, INPUTS)


# --- of what they are the gradients ----------------------------------------------------------------------------------


def differentiated_by(trained: Trained, closure: Callable[[], Any]) -> list[float] | None:
    """What the gradients that a closure leaves are known to be those of."""
    origin = GradientOrigin(trained.groups)
    before = GradientMark.of(trained.groups)
    with around_backward(origin.around_backward):
        loss, went_backward = Evaluator.call(closure)
        if not went_backward and complete_gradients(trained.groups, loss, before):
            origin.note(loss)
    found = origin.differentiated()
    return None if found is None else [each.item() for each in found]


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
        (away.weight * INPUTS).backward(torch.tensor([1.0, 10.0]))
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


def test_nothing_is_known_of_gradients_that_were_written_afterwards_or_in_between(away: Trained) -> None:
    def afterwards() -> float:
        away.zero_grad()
        away.backward()
        away.gradient.mul_(1.0)
        return 3.0

    def in_between() -> float:
        away.zero_grad()
        away.backward()
        away.gradient.mul_(1.0)
        away.backward()
        return 6.0

    def replaced() -> float:
        away.zero_grad()
        away.backward()
        away.weight.grad = FRESH.clone()
        return 3.0

    def zeroed_in_between() -> float:
        away.zero_grad()
        away.backward()
        away.zero_grad()
        away.backward()
        return 3.0

    for closure in (afterwards, in_between, replaced, zeroed_in_between):
        assert differentiated_by(away, closure) is None, closure.__name__


def test_nothing_is_known_where_nothing_went_backward(away: Trained) -> None:
    def closure() -> Tensor:
        loss = away.loss()
        [away.weight.grad] = torch.autograd.grad(loss, away.weight)
        return loss.detach()

    assert differentiated_by(away, closure) is None


def test_backward_that_fails_leaves_nothing_known(away: Trained) -> None:
    origin = GradientOrigin(away.groups)

    def closure() -> Tensor:
        away.zero_grad()
        loss = away.loss()
        loss.register_hook(lambda _: 1 / 0)
        loss.backward()
        return loss

    with around_backward(origin.around_backward), pytest.raises(ZeroDivisionError):
        Evaluator.call(closure)
    assert origin.differentiated() is None


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
