"""Parameters of every kind, losses of every size, and the records of both."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, SparseAdam

from gen_optim import GeNOptimizer, History, ProbeStatus
from tests.training import Training, gen_adamw, gen_sgd, mlp, parameters_of, regression_data, same

# --- parameters of every kind ---------------------------------------------------------------------------------------


def test_groups_keep_their_ratios() -> None:
    model = mlp()
    groups = [{"params": model[0].parameters(), "lr": 0.3}, {"params": model[4].parameters(), "lr": 0.1}]
    optimizer = GeNOptimizer(SGD(groups, lr=1.0, momentum=0.9))
    training = Training(model, optimizer, *regression_data())
    for _ in range(30):
        training.train(1)
        first, second = (group["lr"] for group in optimizer.param_groups)
        assert second / first == pytest.approx(1 / 3, rel=1e-12)
        assert optimizer.get_last_lr() == [first, second]
    assert optimizer.last_probe.lr_after == first


def test_a_learning_rate_that_is_a_tensor_stays_the_same_tensor() -> None:
    model, lr = mlp(), torch.tensor(0.01)
    optimizer = GeNOptimizer(AdamW(model.parameters(), lr=lr))
    held = optimizer.param_groups[0]["lr"]
    training = Training(model, optimizer, *regression_data())
    losses = training.train(20)
    assert optimizer.param_groups[0]["lr"] is held
    assert optimizer.get_last_lr() == [held.item()]
    assert held.item() == pytest.approx(optimizer.last_probe.lr_after, rel=1e-6)
    assert losses[-1] < losses[0]


def test_frozen_groups_parameters_and_missing_gradients() -> None:
    model = mlp()
    model[0].bias.requires_grad_(False)
    unused = nn.Parameter(torch.ones(2))
    groups = [
        {"params": [model[0].weight, model[0].bias], "lr": 0.0},
        {"params": [*model[4].parameters(), unused], "lr": 0.1, "weight_decay": 0.1},
    ]
    optimizer = GeNOptimizer(SGD(groups, lr=1.0))
    before = parameters_of(model)
    Training(model, optimizer, *regression_data()).train(5)
    assert same(parameters_of(model)[:2], before[:2])
    assert not torch.equal(model[4].weight, before[2])
    assert torch.equal(unused, torch.ones(2))
    assert optimizer.get_last_lr()[0] == 0.0
    assert optimizer.last_probe.lr_after == optimizer.param_groups[1]["lr"] > 0.0


def test_with_every_group_frozen_it_evaluates_and_stands_still() -> None:
    training = Training.of(lambda parameters: gen_sgd(parameters, lr=0.0))
    before = parameters_of(training.model)
    assert math.isfinite(training.train(1)[0])
    assert same(parameters_of(training.model), before)
    training.optimizer.param_groups[0]["lr"] = 0.1
    training.train(1)
    assert not same(parameters_of(training.model), before)


def test_groups_added_in_the_middle() -> None:
    model = mlp()
    optimizer = gen_sgd(model[0].parameters())
    training = Training(model, optimizer, *regression_data())
    training.train(3)
    lr = optimizer.param_groups[0]["lr"]
    optimizer.add_param_group({"params": [model[4].weight]})
    optimizer.add_param_group({"params": [model[4].bias], "lr": 3 * lr})
    assert [group["lr"] for group in optimizer.param_groups] == [lr, lr, 3 * lr]
    training.train(3)
    lr = optimizer.param_groups[0]["lr"]
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([lr, lr, 3 * lr], rel=1e-12)


def test_groups_added_to_the_base_directly() -> None:
    model = mlp()
    optimizer = gen_sgd(model[0].parameters(), lr=0.1)
    training = Training(model, optimizer, *regression_data())
    training.train(3)
    lr = optimizer.param_groups[0]["lr"]
    optimizer.base_optim.add_param_group({"params": [model[4].weight]})
    optimizer.base_optim.add_param_group({"params": [model[4].bias], "lr": 3 * lr})
    training.train(3)
    lr = optimizer.param_groups[0]["lr"]
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([lr, lr, 3 * lr], rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_precision_trains(dtype: torch.dtype) -> None:
    training = Training.of(gen_adamw, mlp(dtype=dtype))
    losses = training.train(80)
    assert losses[-1] < 0.8 * losses[0]
    assert all(parameter.dtype is dtype for parameter in training.model.parameters())


def test_mixed_precisions_train() -> None:
    model = mlp()
    model[4].double()
    model.insert(4, _Cast())
    optimizer = gen_adamw(model.parameters())
    inputs, targets = regression_data()
    losses = Training(model, optimizer, inputs, targets.double()).train(40)
    assert losses[-1] < 0.5 * losses[0]


class _Cast(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.double()


def test_maximize_climbs_and_records_what_is_minimised() -> None:
    def train(sign: float) -> tuple[Training, list[float]]:
        training = Training.of(lambda parameters: GeNOptimizer(SGD(parameters, lr=0.1, maximize=sign < 0)))

        def closure() -> Tensor:
            training.optimizer.zero_grad()
            gain = sign * training.loss()
            gain.backward()
            return gain

        return training, [torch.as_tensor(training.optimizer.step(closure)).item() for _ in range(10)]

    (down, losses), (up, gains) = train(1.0), train(-1.0)
    assert gains == [-loss for loss in losses]
    assert same(parameters_of(down.model), parameters_of(up.model))
    assert up.optimizer.last_probe == down.optimizer.last_probe


@pytest.mark.parametrize("mode", ["lookback", "approximate"])
def test_sparse_gradients(mode: str) -> None:
    torch.manual_seed(0)
    embedding = nn.Embedding(10, 4, sparse=True)
    optimizer = GeNOptimizer(SparseAdam(embedding.parameters()), mode=mode)
    words = torch.tensor([1, 2, 2, 5])
    before = embedding.weight.detach().clone()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (embedding(words) - 1.0).square().mean()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(80)]
    assert losses[-1] < 0.8 * losses[0]
    assert torch.equal(embedding.weight[6:], before[6:])


def test_parameters_spread_over_devices() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a second device besides the CPU: no CUDA device here")
    model = mlp()
    model[4].cuda()
    model.insert(4, _ToCuda())
    training = Training(model, gen_adamw(model.parameters()), regression_data()[0], regression_data()[1].cuda())
    losses = training.train(20)
    assert losses[-1] < losses[0]


class _ToCuda(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.cuda()


def test_direction_is_not_drowned_by_rounding_when_the_given_learning_rate_is_tiny() -> None:
    """In float32 a step at 1e-7 is mostly rounding; the start must not be extrapolated from it."""
    runs = []
    for lr in (1e-8, 1e-1):
        training = Training.of(lambda parameters, lr=lr: GeNOptimizer(SGD(parameters, lr=lr)))
        training.train(1)
        runs.append(parameters_of(training.model))
    assert same(*runs)


def test_differences_that_are_rounding_teach_nothing() -> None:
    training = Training.of(lambda parameters: gen_sgd(parameters, mode="approximate"))
    training.train(2)
    training.optimizer.param_groups[0]["lr"] = 1e-12
    training.train(1)
    record = training.optimizer.last_probe
    assert record.status is ProbeStatus.BELOW_NOISE
    assert record.lr_after == record.lr_before == 1e-12


# --- losses that are not finite, and records ------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("steps_before", [0, 3])
@pytest.mark.parametrize("rule", ["published", "relaxed"])
def test_a_loss_that_is_not_finite_teaches_nothing_and_steps_as_the_base_would(
    bad: float, steps_before: int, rule: str
) -> None:
    training = Training.of(lambda parameters: gen_sgd(parameters, mode="approximate", rule=rule, period=1))
    training.train(steps_before)
    bare_model = copy.deepcopy(training.model)
    bare = SGD(bare_model.parameters(), lr=training.optimizer.param_groups[0]["lr"], momentum=0.9)
    bare.load_state_dict(copy.deepcopy(training.optimizer.state_dict()))

    def closure() -> float:
        training.closure()
        return bad

    lr = training.optimizer.param_groups[0]["lr"]
    training.optimizer.step(closure)
    Training(bare_model, bare, training.inputs, training.targets).train(1)
    assert same(parameters_of(training.model), parameters_of(bare_model))
    assert training.optimizer.param_groups[0]["lr"] == lr
    assert training.optimizer.last_probe.status is ProbeStatus.NON_FINITE_LOSS
    training.train(1)
    assert training.optimizer.last_probe.status in (ProbeStatus.STARTED, ProbeStatus.FITTED)


def test_a_first_loss_that_is_not_finite_beside_a_probe_steps_as_the_base_would() -> None:
    wrapped, bare = Training.of(gen_sgd), Training.of(lambda parameters: SGD(parameters, lr=0.1, momentum=0.9))
    for training in (wrapped, bare):
        training.loss().backward()
    wrapped.optimizer.step(probe=lambda: math.nan)
    bare.optimizer.step()
    assert same(parameters_of(wrapped.model), parameters_of(bare.model))
    assert wrapped.optimizer.last_probe.status is ProbeStatus.NON_FINITE_LOSS


def test_a_closure_may_write_all_its_losses_into_one_tensor() -> None:
    runs = []
    for is_static in (False, True):
        training, static = Training.of(gen_adamw), torch.zeros(())

        def closure(training: Training = training, static: Tensor = static, is_static: bool = is_static) -> Tensor:
            loss = training.closure().detach()
            return static.copy_(loss) if is_static else loss

        losses = [training.optimizer.step(closure).item() for _ in range(20)]
        runs.append((losses, parameters_of(training.model)))
    assert runs[0][0] == runs[1][0]
    assert same(runs[0][1], runs[1][1])


def test_a_probe_that_is_not_finite_cuts_the_learning_rate() -> None:
    training = Training.of(lambda parameters: gen_sgd(parameters, mode="approximate", burn_in=2))
    training.train(2)
    lr = training.optimizer.param_groups[0]["lr"]

    def closure() -> Any:
        loss = training.closure()
        return math.inf if training.optimizer.is_probing else loss

    while training.optimizer.last_probe.step < 10:
        training.optimizer.step(closure)
        lr = training.optimizer.last_probe.lr_before
    assert training.optimizer.last_probe.status is ProbeStatus.NON_FINITE_PROBE
    assert training.optimizer.param_groups[0]["lr"] == lr / 2


def test_an_explosion_is_noticed_and_left_behind() -> None:
    training = Training.of(lambda parameters: gen_adamw(parameters, mode="approximate"))
    losses = training.train(40)
    with torch.no_grad():  # somebody throws the parameters far away
        for parameter in training.model.parameters():
            parameter.mul_(100.0).add_(30.0)
    history = History()
    training.optimizer.register_probe_hook(history)
    lr = training.optimizer.param_groups[0]["lr"]
    exploded = training.train(1)[0]
    assert exploded > losses[0]
    assert history[0].status is ProbeStatus.EXPLODED
    assert history[0].lr_after == lr / 2
    after = training.train(400)
    assert after[-1] < exploded
    assert [record.status for record in history].count(ProbeStatus.EXPLODED) <= 2


def test_records_reach_hooks_and_history() -> None:
    training, history, seen = Training.of(lambda p: gen_adamw(p, mode="approximate", burn_in=3)), History(), []
    optimizer = training.optimizer
    optimizer.register_probe_hook(history)
    handle = optimizer.register_probe_hook(lambda optimizer, record: seen.append((optimizer, record)))
    training.train(2)
    handle.remove()
    training.train(20)
    assert seen == [(optimizer, history[0]), (optimizer, history[1])]
    assert [record.step for record in history][:3] == [1, 2, 3]
    assert set(np.diff([record.step for record in history][2:])) <= {6, 7, 8, 9, 10}
    assert history[-1] is optimizer.last_probe
    assert history.to_dicts()[0]["status"] == "started"


def test_a_hook_may_raise_and_the_step_is_done() -> None:
    training = Training.of(lambda parameters: gen_sgd(parameters, mode="approximate"))

    def hook(optimizer: GeNOptimizer, record: Any) -> None:
        raise ValueError("on purpose")

    handle = training.optimizer.register_probe_hook(hook)
    with pytest.raises(ValueError, match="on purpose"):
        training.train(1)
    handle.remove()
    training.train(1)
    assert training.optimizer.last_probe.step == 2


@pytest.mark.filterwarnings("ignore:GeNOptimizer has reverted")
@pytest.mark.parametrize("scale", [0.03, 0.01, 0.001])
def test_a_first_batch_of_smaller_losses_ruins_nothing(scale: float) -> None:
    """The learning rate of its loss is far too high for all others; SGD's steps grow with it."""
    training = Training.of(lambda p: GeNOptimizer(SGD(p, lr=0.01, momentum=0.9)), mlp(dtype=torch.float64))
    first = training.loss().item()

    def scaled() -> Tensor:
        training.optimizer.zero_grad()
        loss = scale * training.loss()
        loss.backward()
        return loss

    training.optimizer.step(scaled)
    assert training.train(150)[-1] < 0.01 * first
