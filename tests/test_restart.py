"""Training that restarts after a burn-in in which it was unstable."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Adagrad, AdamW, lr_scheduler

from gen_optim import GeNOptimizer, ProbeStatus, RelaxedRule
from gen_optim.measurement.start_point import StartPoint
from tests.rules.cases import CONVEX, STARTED_LONG_AGO
from tests.training import Training, gen_adamw, gen_sgd, mlp, muon, parameters_of, same, wrapped

BURN_IN = 12


def gen_muon(parameters: Iterable[torch.Tensor], **options: Any) -> GeNOptimizer:
    return wrapped(muon(parameters), **options)


def lead_astray(training: Training) -> None:
    """Take a step whose end is seen to be far up, so that it is reverted."""

    def closure() -> torch.Tensor:
        training.optimizer.zero_grad()
        loss = training.loss() * (1.0 if training.optimizer.is_probing else 1e9)
        loss.backward()
        return loss

    training.optimizer.step(closure)
    assert training.optimizer.last_probe.status is ProbeStatus.REVERTED


def unstable(make: Callable[..., GeNOptimizer] = gen_adamw, model: nn.Module | None = None, **options: Any) -> Training:
    """A training that was unstable in its burn-in, which has not ended."""
    training = Training.of(lambda parameters: make(parameters, burn_in=BURN_IN, **options), model)
    training.train(5)
    lead_astray(training)
    return training


def end_burn_in(training: Training) -> ProbeStatus:
    """Train to the end of the burn-in; return the status of its last probe step."""
    while training.optimizer._context.controller.state.probes < BURN_IN:
        training.train(1)
    return training.optimizer.last_probe.status


# --- the rule --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("probes", "has_diverged", "has_failed", "restarts"),
    [(50, True, False, True), (50, False, False, False), (50, True, True, False), (49, True, False, False)],
)
def test_the_rule_restarts_when_a_burn_in_ends_in_which_a_loss_rose_far(
    probes: int, has_diverged: bool, has_failed: bool, restarts: bool
) -> None:
    rule = RelaxedRule()
    state = replace(STARTED_LONG_AGO, probes=probes, has_diverged=has_diverged, has_failed=has_failed)
    after = rule.restart(state)
    assert (after is not None) is restarts
    assert rule.may_restart(state) is (probes < 50)
    if after is not None:
        assert (after.lr, after.parabola, after.step) == (state.lr, state.parabola, state.step)


@pytest.mark.parametrize("loss_end", [1e9, math.inf, math.nan])
def test_the_rule_remembers_that_a_loss_rose_far(loss_end: float) -> None:
    rule, state = RelaxedRule(), replace(STARTED_LONG_AGO, descent_initial=1.0)
    after = rule.decide(state, CONVEX, loss_start=1.0, loss_end=loss_end)
    assert after.status is ProbeStatus.REVERTED
    assert after.state.has_diverged is math.isfinite(loss_end)
    assert after.state.has_failed is not math.isfinite(loss_end)
    again = rule.decide(after.state, CONVEX, loss_start=1.0, loss_end=1e9).state
    assert again.has_diverged
    assert again.has_failed is after.state.has_failed


# --- the optimizer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [gen_adamw, gen_sgd, gen_muon])
def test_parameters_return_to_their_first_values_and_the_base_has_no_state(make: Callable[..., GeNOptimizer]) -> None:
    model = mlp(dtype=torch.float64)
    first = parameters_of(model)
    training = unstable(make, model)
    assert not same(parameters_of(model), first)
    assert end_burn_in(training) is ProbeStatus.RESTARTED
    optimizer = training.optimizer
    assert same(parameters_of(model), first)
    assert not optimizer.base_optim.state
    assert (
        optimizer.param_groups[0]["lr"]
        == optimizer.last_probe.lr_after
        < optimizer._context.controller.state.lr_unstable
    )

    losses = training.train(100)
    assert losses[-1] < 0.5 * losses[0]
    assert optimizer.last_probe.status is not ProbeStatus.RESTARTED
    with optimizer.averaged():
        averaged = training.loss().item()
    assert averaged == pytest.approx(losses[-1], rel=0.5)


def test_that_there_is_no_step_to_look_back_at_then_is_no_miss() -> None:
    training = unstable(period=1)
    assert end_burn_in(training) is ProbeStatus.RESTARTED
    training.train(1)  # would probe
    assert training.optimizer._diagnostics.misses == 0


def test_a_training_that_was_stable_goes_on() -> None:
    training = Training.of(lambda parameters: gen_adamw(parameters, burn_in=BURN_IN))
    assert end_burn_in(training) is not ProbeStatus.RESTARTED
    assert training.optimizer.base_optim.state


def test_it_restarts_once_and_under_a_scheduler_the_factor_stays() -> None:
    training = unstable()
    scheduler = lr_scheduler.LinearLR(training.optimizer, 1.0, 0.0, total_iters=200)
    restarts = []
    training.optimizer.register_probe_hook(
        lambda _, record: restarts.append(record) if record.status is ProbeStatus.RESTARTED else None
    )
    losses = training.train(150, scheduler)
    assert len(restarts) == 1
    assert math.isfinite(losses[-1])
    assert training.optimizer.get_last_lr()[0] < training.optimizer._context.controller.state.lr


# --- what must not be undone -----------------------------------------------------------------------------------------


def write(training: Training) -> None:
    with torch.no_grad():
        next(training.model.parameters()).mul_(0.5)


def replace_data(training: Training) -> None:
    parameter = next(training.model.parameters())
    parameter.data = parameter.data * 0.5


def load_weights(training: Training) -> None:
    training.model.load_state_dict(copy.deepcopy(training.model.state_dict()))


def load_checkpoint(training: Training) -> None:
    training.optimizer.load_state_dict(copy.deepcopy(training.optimizer.state_dict()))


def add_group(training: Training) -> None:
    training.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})


def write_averaged(training: Training) -> None:
    training.optimizer.write_averaged()


@pytest.mark.parametrize("happens", [write, replace_data, load_weights, load_checkpoint, add_group, write_averaged])
def test_what_else_has_happened_to_the_parameters_is_not_undone(happens: Callable[[Training], None]) -> None:
    training = unstable()
    happens(training)
    assert end_burn_in(training) is not ProbeStatus.RESTARTED
    assert training.optimizer.base_optim.state


def validate(training: Training) -> None:
    with training.optimizer.averaged():
        training.loss()


def save(training: Training) -> None:
    torch.save(training.optimizer.state_dict(), io.BytesIO())


def fail(training: Training) -> None:
    def closure() -> torch.Tensor:
        training.loss()
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        training.optimizer.step(closure)


@pytest.mark.parametrize("happens", [validate, save, fail])
def test_what_leaves_the_parameters_alone_does_not_hinder_it(happens: Callable[[Training], None]) -> None:
    model = mlp()
    first = parameters_of(model)
    training = unstable(model=model)
    happens(training)
    assert end_burn_in(training) is ProbeStatus.RESTARTED
    assert same(parameters_of(model), first)


class Own(AdamW):
    """An optimizer that torch does not have, which may keep state elsewhere."""


@pytest.mark.parametrize("make", [Own, Adagrad])
def test_bases_whose_beginning_is_not_known_do_not_restart(make: Callable[..., torch.optim.Optimizer]) -> None:
    training = unstable(lambda parameters, burn_in: GeNOptimizer(make(parameters), rule=RelaxedRule(burn_in=burn_in)))
    assert end_burn_in(training) is not ProbeStatus.RESTARTED
    assert training.optimizer.base_optim.state


def test_copies_train_on_without_the_initial_point() -> None:
    twin = copy.deepcopy(unstable())
    assert end_burn_in(twin) is not ProbeStatus.RESTARTED
    assert twin.optimizer.base_optim.state


def test_the_copies_are_let_go_when_the_burn_in_is_over() -> None:
    training = Training.of(lambda parameters: gen_adamw(parameters, burn_in=BURN_IN))
    training.train(2)
    assert training.optimizer._context.initial_point is not None
    training.train(BURN_IN)
    assert training.optimizer._context.initial_point is None


def test_steps_that_are_never_measured_keep_nothing() -> None:
    training = Training.of(gen_adamw)
    training.loss().backward()
    training.optimizer.step()
    assert training.optimizer._context.initial_point is None


def test_an_interrupt_while_it_restarts_leaves_nothing_half_done(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    first = parameters_of(model)
    training, interrupts = unstable(model=model), []
    stay = StartPoint.stay

    def interrupted(point: StartPoint) -> None:
        if not interrupts:
            interrupts.append(1)
            next(model.parameters()).data.copy_(first[0])
            raise KeyboardInterrupt
        stay(point)

    monkeypatch.setattr(StartPoint, "stay", interrupted)
    with pytest.raises(KeyboardInterrupt):
        end_burn_in(training)
    assert same(parameters_of(model), first)
    assert not training.optimizer.base_optim.state
    losses = training.train(60)
    assert losses[-1] < losses[0]


def test_buffers_stay() -> None:
    training = unstable(model=mlp(norm=True))
    while training.optimizer._context.controller.state.probes < BURN_IN:
        before = [each.clone() for each in training.model.buffers()]
        training.train(1)
    assert training.optimizer.last_probe.status is ProbeStatus.RESTARTED
    assert list(training.model.buffers())[-1] == before[-1] + 1  # the number of batches


def test_a_parameter_that_is_unfrozen_meanwhile_is_not_put_back() -> None:
    model = mlp()
    last = list(model.parameters())[-1].requires_grad_(False)
    training = unstable(model=model)
    last.requires_grad_(True)
    assert end_burn_in(training) is not ProbeStatus.RESTARTED
    assert training.optimizer.base_optim.state


@pytest.mark.parametrize("step", [0, 4])
def test_what_a_closure_writes_is_not_undone(step: int) -> None:
    """In its first call it may initialise parameters from data: that is where training begins then."""
    model = mlp()
    training = Training.of(lambda parameters: gen_adamw(parameters, burn_in=BURN_IN), model)
    *first, bias = model.parameters()
    first = [each.detach().clone() for each in first]

    loss_of = training.loss

    def loss() -> torch.Tensor:
        optimizer = training.optimizer
        if optimizer._context.controller.state.step == step and not optimizer.is_probing:
            with torch.no_grad():
                bias.fill_(2.0)
        return loss_of()

    training.loss = loss
    training.train(6)
    lead_astray(training)
    is_back = end_burn_in(training) is ProbeStatus.RESTARTED
    assert is_back is (step == 0)
    assert same(list(model.parameters())[:-1], first) is is_back
    assert (bias.item() == 2.0) is is_back


def test_parameters_that_are_unfrozen_inside_of_the_closure_return() -> None:
    model = mlp()
    first = parameters_of(model)
    training = Training.of(lambda parameters: gen_sgd(parameters, burn_in=BURN_IN), model)
    loss_of = training.loss

    def loss() -> torch.Tensor:
        model[4].requires_grad_(True)
        return loss_of()

    training.loss = loss
    for step in range(40):
        model[4].requires_grad_(False)
        if step == 6:
            lead_astray(training)
        elif training.optimizer._context.controller.state.probes < BURN_IN:
            training.train(1)
    assert training.optimizer.last_probe.status is ProbeStatus.RESTARTED
    assert same(parameters_of(model), first)


@pytest.mark.parametrize("make", [gen_adamw, gen_sgd])
def test_a_checkpoint_made_right_after_it_loads_into_wrapper_and_base(make: Callable[..., GeNOptimizer]) -> None:
    training = unstable(make)
    assert end_burn_in(training) is ProbeStatus.RESTARTED
    saved = copy.deepcopy(training.optimizer.state_dict())
    model = copy.deepcopy(training.model)
    resumed = Training.of(lambda parameters: make(parameters, burn_in=BURN_IN), model)
    resumed.optimizer.load_state_dict(copy.deepcopy(saved))

    bare = make(mlp().parameters()).base_optim
    bare.load_state_dict(saved)
    for each in bare.param_groups[0]["params"]:
        each.grad = torch.ones_like(each)
    bare.step()
    assert training.train(10) == resumed.train(10)


def test_a_checkpoint_that_does_not_load_leaves_the_restart_as_it_was() -> None:
    training = unstable()
    wrong = copy.deepcopy(training.optimizer.state_dict())
    wrong["param_groups"][0]["gen_lr"] = -1.0
    with pytest.raises(ValueError, match="gen_lr"):
        training.optimizer.load_state_dict(wrong)
    assert end_burn_in(training) is ProbeStatus.RESTARTED
