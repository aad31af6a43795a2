"""A loss that the loop has computed saves the probe a forward pass, if it is the one that the probe returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.optim import SGD

from gen_optim import GeNOptimizer, History, check_closure
from tests.training import Training, gen_sgd, looking, mlp, parameters_of, same

WARNING = "not used; the probe is called once more"


class Loop(Training):
    """Calls ``backward()`` itself, clips, and counts the calls of the probe in each step."""

    def run(self, steps: int, give: Callable[[Tensor], Any]) -> tuple[list[int], History]:
        self.optimizer.register_probe_hook(history := History())
        probed = []
        for _ in range(steps):
            self.optimizer.zero_grad()
            loss = self.loss()
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 0.1)
            self.calls = 0
            given = give(loss)
            returned = self.optimizer.step(probe=self.loss, loss=given)
            probed.append(self.calls)
            assert given is None or returned is given
        return probed, history


def assert_same_run(one: Loop, other: Loop, histories: tuple[History, History]) -> None:
    assert same(parameters_of(one.model), parameters_of(other.model))
    assert repr(list(histories[0])) == repr(list(histories[1]))  # records with NaN are unequal from Python 3.13 on


@pytest.mark.parametrize("give", [lambda loss: loss, lambda loss: loss.detach(), lambda loss: loss.item()])
def test_a_probe_step_takes_one_call_less_once_the_first_loss_was_right(give: Callable[[Tensor], Any]) -> None:
    given, bare = Loop.of(looking), Loop.of(looking)
    calls, history = given.run(6, give)
    assert calls == [0, 4, 2, 2, 2, 2]
    bare_calls, bare_history = bare.run(6, lambda _: None)
    assert bare_calls == [0, 4, 3, 3, 3, 3]
    assert_same_run(given, bare, (history, bare_history))


def test_looking_ahead_takes_one_call_less_too() -> None:
    def ahead(parameters: Any) -> GeNOptimizer:
        return gen_sgd(parameters, mode="approximate", rule="published", period=1)

    given, bare = Loop.of(ahead), Loop.of(ahead)
    calls, history = given.run(4, lambda loss: loss)
    assert calls == [4, 2, 2, 2]
    bare_calls, bare_history = bare.run(4, lambda _: None)
    assert bare_calls == [4, 3, 3, 3]
    assert_same_run(given, bare, (history, bare_history))


def test_a_search_evaluates_the_loss_itself() -> None:
    given, bare = Loop.of(gen_sgd), Loop.of(gen_sgd)
    calls, history = given.run(4, lambda loss: loss)
    bare_calls, bare_history = bare.run(4, lambda _: None)
    assert calls[0] == bare_calls[0] > 3
    assert_same_run(given, bare, (history, bare_history))


@pytest.mark.parametrize(
    ("dropout", "give"),
    [(0.3, lambda loss: loss), (0.0, lambda loss: 1024.0 * loss), (0.0, lambda loss: loss.detach() + 1e-3)],
    ids=["dropout", "scaled", "of another batch"],
)
def test_another_loss_than_the_probes_is_warned_of_once_and_not_used(
    dropout: float, give: Callable[[Tensor], Any]
) -> None:
    given, bare = (Loop.of(looking, mlp(dropout=dropout)) for _ in range(2))
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match=WARNING) as caught:
        calls, history = given.run(6, give)
    assert len(caught) == 1
    assert str(caught[0].message).startswith("At step 2 GeNOptimizer was given loss=")
    assert caught[0].filename == __file__
    torch.manual_seed(1)
    bare_calls, bare_history = bare.run(6, lambda _: None)
    assert calls == bare_calls == [0, 4, 3, 3, 3, 3]
    assert_same_run(given, bare, (history, bare_history))


def test_the_sign_of_a_maximised_loss_is_as_the_probe_returns_it() -> None:
    parameter = nn.Parameter(torch.tensor([2.0]))
    optimizer = looking_up(parameter)
    for _ in range(4):
        optimizer.zero_grad()
        loss = -(parameter**2).sum()
        loss.backward()
        optimizer.step(probe=lambda: -(parameter**2).sum(), loss=loss)
    assert optimizer.last_probe.loss_end == -loss.item()


def looking_up(parameter: nn.Parameter) -> Any:
    return GeNOptimizer(SGD([parameter], lr=0.01, maximize=True), rule="published", period=1)


def test_a_probe_that_writes_to_the_tensor_given_changes_nothing() -> None:
    training = Loop.of(looking)
    static = torch.zeros(())

    def probe() -> Tensor:
        return static.copy_(nn.functional.mse_loss(training.model(training.inputs), training.targets).detach())

    for _ in range(5):
        training.optimizer.zero_grad()
        loss = training.loss()
        loss.backward()
        here = static.copy_(loss.detach()).item()
        training.optimizer.step(probe=probe, loss=static)
    assert training.optimizer.last_probe.loss_end == here
    assert len(set(training.optimizer.last_probe.losses)) == 3


def test_a_loss_that_is_not_finite_proves_nothing() -> None:
    training = Loop.of(looking)
    calls, _ = training.run(2, lambda loss: loss.detach() * float("nan"))
    assert calls == [0, 4]
    calls, _ = training.run(3, lambda loss: loss)
    assert calls == [3, 2, 2]


def test_a_grad_scaler_passes_it_on() -> None:
    training, scaler = Loop.of(looking), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(4):
        training.optimizer.zero_grad()
        loss = training.loss()
        scaler.scale(loss).backward()
        training.calls = 0
        assert scaler.step(training.optimizer, probe=training.loss, loss=loss) is loss
        scaler.update()
        assert training.calls == [0, 4, 2, 2][step]


def test_the_constructors_probe_takes_one_too() -> None:
    training = Loop.of(looking)
    training.optimizer.probe = training.loss
    loss = training.loss()
    loss.backward()
    assert training.optimizer.step(loss=loss) is loss


@pytest.mark.parametrize(
    ("value", "came"),
    [
        ("0.5", "got an object of type str. Give the loss itself"),
        (torch.ones(2), r"got a tensor of shape \(2,\) and dtype torch.float32. Reduce it"),
        (torch.tensor(1), "got a tensor of shape .* Make it a floating-point loss"),
        (True, "got an object of type bool"),
    ],
)
def test_anything_else_is_a_type_error(value: Any, came: str) -> None:
    training = Loop.of(looking)
    before = parameters_of(training.model)
    with pytest.raises(TypeError, match=f"loss must be a float or a one-element tensor, but {came}"):
        training.optimizer.step(probe=training.loss, loss=value)
    assert same(parameters_of(training.model), before)


def test_a_loss_with_a_closure_or_without_a_probe_is_refused() -> None:
    training = Loop.of(looking)
    with pytest.raises(ValueError, match="loss must be given with a probe and no closure"):
        training.optimizer.step(training.closure, probe=training.loss, loss=1.0)
    with pytest.raises(ValueError, match="loss must be given next to a probe"):
        training.optimizer.step(loss=1.0)
    training.optimizer.closure = training.closure
    with pytest.raises(ValueError, match="loss must be given with a probe and no closure"):
        training.optimizer.step(probe=training.loss, loss=1.0)


def test_a_loss_that_is_a_distributed_tensor_may_be_given_and_checked(mesh_of_one: DeviceMesh) -> None:
    weight = nn.Parameter(DTensor.from_local(torch.linspace(-1.0, 2.0, 6), mesh_of_one, [Shard(0)]))
    optimizer = gen_sgd([weight], mode="lookback")

    def loss_of() -> Tensor:
        return (weight**4).sum()

    assert len(set(check_closure(optimizer, loss_of))) == 1
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        assert optimizer.step(probe=loss_of, loss=loss) is loss
        losses.append(loss.full_tensor().item())
    assert losses[-1] < losses[0]
