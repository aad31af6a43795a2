"""What others write to parameters, learning rates and checkpoints, during steps and between them."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss, softplus
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR

from gen_optim import GeNOptimizer, History, ProbeStatus
from tests.training import (
    Training,
    gen_adamw,
    gen_sgd,
    looking,
    looks_back_next,
    mlp,
    parameters_of,
    regression_data,
    same,
)

# --- parameters ------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The loss has no minimum")  # the critic's is linear in its last layer
def test_two_networks_whose_closures_switch_each_other_off_are_both_looked_back_at() -> None:
    """As generative adversarial networks are trained: gradients reset outside, ``requires_grad`` switched inside."""
    real, noise = torch.randn(64, 4) + 1.0, torch.randn(64, 2)
    generator, critic = nn.Linear(2, 4), nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizers = [GeNOptimizer(SGD(each.parameters(), lr=1e-5)) for each in (critic, generator)]

    def of_critic() -> Tensor:
        critic.requires_grad_(True)
        optimizers[0].zero_grad()
        loss = softplus(-critic(real)).mean() + softplus(critic(generator(noise).detach())).mean()
        loss.backward()
        return loss

    def of_generator() -> Tensor:
        critic.requires_grad_(False)
        optimizers[1].zero_grad()
        loss = softplus(-critic(generator(noise))).mean()
        loss.backward()
        return loss

    histories = [History(), History()]
    for optimizer, history in zip(optimizers, histories, strict=True):
        optimizer.register_probe_hook(history)
    for _ in range(20):
        for optimizer, closure in zip(optimizers, (of_critic, of_generator), strict=True):
            for each in optimizers:
                each.zero_grad()
            optimizer.step(closure)
    assert [len(history) for history in histories] == [19, 19]  # all but the second, which keeps where it begins


def test_parameters_that_join_a_step_do_not_take_copies_of_others_for_theirs() -> None:
    training = Training.of(looking, mlp(dtype=torch.float64))
    last = training.model[4].bias.requires_grad_(False)
    training.train(5)
    training.before_return = lambda _: last.requires_grad_(True)  # within the closure, after the point was looked for
    training.train(5)
    assert training.optimizer.last_probe.step == 10
    assert last.grad is not None


def written_between_steps(training: Training) -> None:
    with torch.no_grad():
        training.model[4].bias.copy_(1e3 * torch.randn(1))  # a write that shortens the step would be part of it


def shared_with_another(training: Training) -> None:
    other = GeNOptimizer(SGD(training.model[0].parameters(), lr=1e-3), period=1)
    other.step(lambda: training.model[0](training.inputs).square().mean())


def stepped_without_a_closure(training: Training) -> None:
    training.closure()
    training.optimizer.step()


@pytest.mark.parametrize("write", [written_between_steps, shared_with_another, stepped_without_a_closure])
def test_a_run_that_cannot_be_looked_back_at_is_warned_of_once(write: Callable[[Training], None]) -> None:
    training = Training.of(lambda parameters: gen_sgd(parameters, period=1, lr_max=1e-3))  # steps shorter than writes
    training.train(1)
    for _ in range(9):
        write(training)
        training.train(1)
    write(training)
    with pytest.warns(UserWarning, match="could not look back in many of the steps") as caught:
        training.train(1)
    assert len(caught) == 1
    for _ in range(20):
        write(training)
        training.train(1)
    assert training.optimizer.last_probe.status is ProbeStatus.STARTED


def test_writes_at_every_fifth_step_are_warned_of_and_those_at_every_twentieth_are_not() -> None:
    for every, warned in ((5, True), (20, False)):
        training = Training.of(lambda parameters: gen_sgd(parameters, period=1, lr_max=1e-3))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for step in range(200):
                training.train(1)
                if step % every == 0:
                    written_between_steps(training)
        assert any("could not look back in many" in str(each.message) for each in caught) is warned


def test_saving_after_every_step_changes_nothing_in_a_loop_that_clamps() -> None:
    runs = []
    for saves in (False, True):
        training = Training.of(gen_sgd)
        for _ in range(80):
            training.train(1)
            with torch.no_grad():
                for parameter in training.model.parameters():
                    parameter.clamp_(-0.5, 0.5)
            if saves:
                training.optimizer.state_dict()
        runs.append((training.probes, parameters_of(training.model)))
    (probes, parameters), (probes_if_saved, parameters_if_saved) = runs
    assert probes == probes_if_saved > 20
    assert same(parameters, parameters_if_saved)


def test_a_schedule_that_stands_at_zero_is_not_warned_of() -> None:
    training = Training.of(lambda parameters: gen_sgd(parameters, period=1))
    scheduler = torch.optim.lr_scheduler.LambdaLR(training.optimizer, lambda step: 1.0 if step < 2 else 0.0)
    training.train(30, scheduler)


# --- learning rates --------------------------------------------------------------------------------------------------


def test_manual_values_at_every_step_are_warned_of_once() -> None:
    training = Training.of(gen_sgd)
    training.train(3)

    def train(step: int) -> None:
        for group in training.optimizer.param_groups:
            group["lr"] = 1e-3 / (1 + step)
        training.train(1)
        assert training.optimizer.get_last_lr() != [0.0]

    for step in range(2):
        train(step)
    with pytest.warns(UserWarning, match="before 3 steps, the last of them step 6: 0.000333 in place of"):
        train(2)
    for step in range(3, 30):
        train(step)


def test_manual_values_at_every_epoch_are_warned_of_once() -> None:
    training = Training.of(gen_sgd)
    warned = []
    for epoch in range(8):
        training.optimizer.param_groups[0]["lr"] = 1e-3 / (1 + epoch)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            training.train(20)
        warned.append(len(caught))
    assert warned == [0, 0, 0, 1, 0, 0, 0, 0]  # the first value says where to begin


def test_freezing_a_group_and_letting_it_go_is_not_warned_of() -> None:
    model = mlp()
    groups = [{"params": model[0].parameters()}, {"params": model[-1].parameters()}]
    training = Training.of(lambda _: GeNOptimizer(torch.optim.SGD(groups, lr=0.1)), model)
    for _ in range(4):
        first, second = training.optimizer.param_groups
        second["lr"] = 0.0
        training.train(2)
        second["lr"] = first["lr"]
        training.train(2)


@pytest.mark.parametrize(
    "options", [{"burn_in": 0, "period": 100}, {"period": 1}, {"mode": "approximate", "rule": "published", "period": 1}]
)
def test_a_learning_rate_written_within_the_closure_holds_from_that_step_on(options: dict[str, object]) -> None:
    training = Training.of(lambda parameters: gen_sgd(parameters, **options))
    training.train(3)
    history = History()
    training.optimizer.register_probe_hook(history)
    is_written = False

    def write(training: Training) -> None:
        nonlocal is_written
        if not is_written:
            is_written = True
            training.optimizer.param_groups[0]["lr"] = 0.001

    training.before_return = write
    training.train(1)
    before = history[-1].lr_before if len(history) else training.optimizer.get_last_lr()[0]
    assert before == 0.001
    assert training.optimizer.get_last_lr()[0] == pytest.approx(0.001, rel=0.5)


# --- memory and checkpoints ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_scheduled", [False, True])
def test_model_and_optimizer_are_freed_without_a_garbage_collection(is_scheduled: bool) -> None:
    training = Training.of(gen_adamw)
    training.train(5, StepLR(training.optimizer, 2) if is_scheduled else None)
    freed = weakref.ref(training.optimizer), weakref.ref(next(training.model.parameters()))
    gc.collect()
    gc.disable()
    try:
        del training
        assert [each() for each in freed] == [None, None]
    finally:
        gc.enable()


def test_a_state_dict_whose_copies_later_steps_have_used_is_not_looked_back_at() -> None:
    training = Training.of(gen_sgd)
    training.train(20)
    parameters, state = copy.deepcopy(training.model.state_dict()), training.optimizer.state_dict()
    assert looks_back_next(training.optimizer)
    training.train(20)
    training.model.load_state_dict(parameters)
    training.optimizer.load_state_dict(state)
    before = parameters_of(training.model)
    assert training.optimizer._pending_start_point() is None
    assert same(parameters_of(training.model), before)
    training.train(2)
    assert training.optimizer.last_probe is not None


def test_a_pending_copy_that_a_mode_has_no_use_for_is_not_kept() -> None:
    training = Training.of(gen_sgd)
    training.train(20)
    other = gen_sgd(training.model.parameters(), mode="approximate", rule="published")
    other.load_state_dict(copy.deepcopy(training.optimizer.state_dict()))
    assert other._context.start_point is None


def test_a_loss_of_nothing_that_is_trained_is_only_evaluated() -> None:
    model, data = mlp(), regression_data()
    for each in model.parameters():
        each.requires_grad_(False)
    inputs = data[0].requires_grad_()
    optimizer = GeNOptimizer(SGD(model.parameters(), lr=0.1))
    before = parameters_of(model)
    assert optimizer.step(lambda: mse_loss(model(inputs), data[1])).item() > 0.0
    assert same(parameters_of(model), before)


@pytest.mark.parametrize("allows_writes", [False, True])
def test_a_jump_to_the_averaged_weights_is_not_measured_as_a_step(allows_writes: bool) -> None:
    training = Training.of(gen_adamw)
    training.train(12)
    training.optimizer._context.allows_writes = allows_writes
    training.train(1)
    training.optimizer.write_averaged()
    step = training.optimizer.last_probe.step
    training.train(1)
    assert training.optimizer.last_probe.step == step  # nothing is known about that step


def test_a_group_that_is_frozen_is_no_other_writer() -> None:
    training = Training.of(gen_adamw)
    head = nn.Parameter(torch.ones(()))
    training.optimizer.add_param_group({"params": [head], "lr": 0.1})
    for _ in range(6):
        training.optimizer.step(lambda: training.closure() + head.square())
    training.optimizer.param_groups[1]["lr"] = 0.0
    training.train(3)
    assert not training.optimizer._context.allows_writes
