"""Schedulers, manual values of learning rates, groups that join, and what checkpoints do with them."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer, lr_scheduler
from torch.optim.swa_utils import SWALR

from gen_optim import GeNOptimizer, ProbeStatus
from tests.training import Training, gen_adamw, gen_sgd, mlp, parameters_of, regression_data, same, wrapped


def cyclic(optimizer: Optimizer) -> lr_scheduler.CyclicLR:
    """CyclicLR does not show its upper limit; the user writes it to the groups."""
    scheduler = lr_scheduler.CyclicLR(optimizer, base_lr=[0.01, 0.02], max_lr=[0.1, 0.4], step_size_up=3)
    for group, max_lr in zip(optimizer.param_groups, scheduler.max_lrs, strict=True):
        group["max_lr"] = max_lr
    return scheduler


SCHEDULERS: dict[str, Callable[[Optimizer], lr_scheduler.LRScheduler]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "LambdaLR above 1": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 1.0 + 0.1 * epoch),
    "LambdaLR per group": lambda o: lr_scheduler.LambdaLR(o, [lambda epoch: 0.9**epoch, lambda epoch: 0.7**epoch]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.95),
    "StepLR": lambda o: lr_scheduler.StepLR(o, step_size=3, gamma=0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5], gamma=0.3),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, factor=0.3, total_iters=4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 1.0, 0.0, total_iters=9),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, gamma=0.8),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=9, power=2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=9),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=4),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 3), lr_scheduler.CosineAnnealingLR(o, 6)], milestones=[3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(o, 0.5, 1.0, 3), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "CyclicLR": cyclic,
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=[0.1, 0.4], total_steps=12),
}
NOMINAL = {"CyclicLR": [0.1, 0.4], "OneCycleLR": [0.1, 0.4]}
"""The learning rates at which the factor is 1, if they are not those given to the optimizer."""


def two_groups(lr: float = 0.05) -> tuple[nn.Module, SGD]:
    model = mlp()
    groups = [{"params": model[0].parameters()}, {"params": model[4].parameters(), "lr": lr / 2}]
    return model, SGD(groups, lr=lr, momentum=0.9)


def test_every_scheduler_of_torch_is_in_the_list() -> None:
    named = {name.split()[0] for name in SCHEDULERS} | {"ReduceLROnPlateau", "LRScheduler"}
    assert named == {name for name in lr_scheduler.__all__ if name != "SWALR"}


@pytest.mark.parametrize("owner", ["wrapper", "base"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_factor_multiplies_what_gen_chooses_per_group(name: str, owner: str) -> None:
    model, base = two_groups()
    optimizer = wrapped(base, burn_in=2, period=3)
    scheduler = SCHEDULERS[name](optimizer if owner == "wrapper" else base)
    _, twin = two_groups()
    twin_scheduler = SCHEDULERS[name](twin)
    training = Training(model, optimizer, *regression_data())
    nominal = NOMINAL.get(name, [0.05, 0.025])
    for _ in range(9):
        factors = [group["lr"] / most for group, most in zip(twin.param_groups, nominal, strict=True)]
        training.train(1)
        # What stands in the groups is the scheduler's own, to the bit: it computes its next value from it.
        assert [group["lr"] for group in optimizer.param_groups] == [group["lr"] for group in twin.param_groups]
        alpha = optimizer.state_dict()["param_groups"][0]["gen_lr"]
        assert optimizer.get_last_lr() == pytest.approx([alpha * factors[0], alpha / 2 * factors[1]], rel=1e-12)
        assert optimizer.last_probe.factor == pytest.approx(factors[0]) or optimizer.last_probe.step < training.calls
        scheduler.step()
        twin.step()
        twin_scheduler.step()
    assert 0.0 < alpha != 0.05


@pytest.mark.parametrize(
    ("first", "second", "factors"),
    [
        ("LinearLR", "flat", [1.0, 1.0, 1.0, 1.0]),
        ("CyclicLR", "flat", [1.0, 1.0, 1.0, 1.0]),
        # Without this package the learning rate would be max_lr / 25 as well.
        ("OneCycleLR", "flat", [0.04, 0.04, 0.04, 0.04]),
        ("LinearLR", "CyclicLR", [1.0, 4.0, 7.0, 10.0]),
        # The first value is torch's own: CyclicLR takes the first scheduler's initial_lr for its base_lr.
        ("LinearLR", "CyclicLR, max_lr", [1.0, 0.4, 0.7, 1.0]),
    ],
)
def test_the_factor_of_a_scheduler_attached_after_another(first: str, second: str, factors: list[float]) -> None:
    made = {
        "LinearLR": lambda o: lr_scheduler.LinearLR(o, 1.0, 0.5, 3),
        "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, base_lr=0.01, max_lr=0.1, step_size_up=3, cycle_momentum=False),
        "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=12, cycle_momentum=False),
        "flat": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 1.0),
    }
    lr = 0.1 if "max_lr" in second else 0.01
    training = Training.of(lambda parameters: gen_sgd(parameters, lr=lr, rule="published", period=1))
    training.train(4, made[first](training.optimizer))
    scheduler: Any = made[second.split(",", maxsplit=1)[0]](training.optimizer)
    if "max_lr" in second:
        training.optimizer.param_groups[0]["max_lr"] = 0.1
    seen = []
    for _ in factors:
        training.train(1, scheduler)
        seen.append(training.optimizer.last_probe.factor)
    assert seen == pytest.approx(factors)


def test_a_factor_is_relative_to_initial_lr_again_when_max_lr_is_deleted() -> None:
    training = Training.of(lambda parameters: gen_sgd(parameters, rule="published", period=1))
    training.train(4, lr_scheduler.OneCycleLR(training.optimizer, max_lr=0.1, total_steps=12))
    flat = lr_scheduler.LambdaLR(training.optimizer, lambda epoch: 1.0)
    del training.optimizer.param_groups[0]["max_lr"]
    training.train(2, flat)
    assert training.optimizer.last_probe.factor == 1.0


def test_wrapping_under_a_one_cycle_schedule_starts_at_the_learning_rate_shown() -> None:
    model = mlp()
    base = SGD(model.parameters(), lr=0.1)
    lr_scheduler.OneCycleLR(base, max_lr=0.1, total_steps=12, cycle_momentum=False)
    optimizer = GeNOptimizer(base, mode="approximate", rule="published")
    assert optimizer.get_last_lr() == pytest.approx([0.004])
    Training(model, optimizer, *regression_data()).train(1)
    assert optimizer.last_probe.lr_before == 0.1


def test_a_step_is_the_lerp_at_the_factor() -> None:
    """On a probe step each group lands at α · factor / α_probed of the base's step."""
    model, base = two_groups()
    optimizer = GeNOptimizer(base, mode="approximate", rule="published", period=1)
    scheduler = lr_scheduler.LambdaLR(optimizer, [lambda epoch: 0.5**epoch, lambda epoch: 0.25**epoch])
    training = Training(model, optimizer, *regression_data())
    training.train(1, scheduler)
    bare_model = copy.deepcopy(model)
    bare = SGD([{"params": bare_model[0].parameters()}, {"params": bare_model[4].parameters()}], lr=0.1, momentum=0.9)
    bare.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    alpha = optimizer.last_probe.lr_after
    for group, share in zip(bare.param_groups, [alpha, alpha / 2], strict=True):
        group["lr"] = share
    before = parameters_of(bare_model)
    Training(bare_model, bare, training.inputs, training.targets).train(1)
    training.train(1)
    moved = optimizer.last_probe.lr_after / alpha
    multiples = [moved * 0.5, moved * 0.5, moved * 0.25, moved * 0.25]
    expected = [torch.lerp(a, b, s) for a, b, s in zip(before, parameters_of(bare_model), multiples, strict=True)]
    assert same(parameters_of(model), expected)


def test_a_lazy_step_under_a_scheduler_is_the_base_optimizers_at_that_learning_rate() -> None:
    training = Training.of(lambda p: gen_sgd(p, rule="published", period=100))
    scheduler = lr_scheduler.ExponentialLR(training.optimizer, 0.7)
    training.train(3, scheduler)
    bare_model = copy.deepcopy(training.model)
    bare = SGD(bare_model.parameters(), lr=0.1, momentum=0.9)
    bare.load_state_dict(copy.deepcopy(training.optimizer.state_dict()))
    training.train(1)
    bare.param_groups[0]["lr"] = training.optimizer.get_last_lr()[0]
    Training(bare_model, bare, training.inputs, training.targets).train(1)
    assert same(parameters_of(training.model), parameters_of(bare_model))


def test_a_factor_of_zero_moves_nothing_and_does_not_blind_the_probes() -> None:
    training = Training.of(gen_adamw)
    warm_up = lr_scheduler.LambdaLR(training.optimizer, lambda epoch: min(epoch / 5, 1.0))
    before = parameters_of(training.model)
    training.train(1, warm_up)
    record = training.optimizer.last_probe
    assert same(parameters_of(training.model), before)
    assert record.status is ProbeStatus.STARTED
    assert record.factor == 0.0 < record.lr_after
    assert training.optimizer.get_last_lr() == [0.0]
    losses = training.train(40, warm_up)
    assert losses[-1] < losses[0]


def test_a_factor_of_zero_beside_a_closure_of_the_constructor_remembers_nothing() -> None:
    training = Training.of(gen_adamw)
    training.optimizer.closure = training.closure
    lr_scheduler.LambdaLR(training.optimizer, lambda epoch: 0.0)
    training.optimizer.step()
    assert training.calls == 0
    assert training.optimizer.state_dict()["param_groups"][0]["gen_step"] == 0


@pytest.mark.parametrize("has_cosine", [True, False])
def test_the_averaging_phase_of_swa_keeps_to_what_gen_finds(has_cosine: bool) -> None:
    """``swa_lr`` is a learning rate, chosen for the one given to the optimizer: above that it is the top."""
    training = Training.of(
        lambda parameters: gen_sgd(parameters, lr=1e-3, mode="approximate", rule="published", period=1)
    )
    cosine = lr_scheduler.CosineAnnealingLR(training.optimizer, 20) if has_cosine else None
    averaging = SWALR(training.optimizer, swa_lr=0.05, anneal_epochs=4)
    factors: list[float] = []
    for step in range(38):
        training.train(1, cosine if step < 20 else averaging)
        factors.append(training.optimizer.last_probe.factor)
    assert factors[0] == 1.0
    assert factors[10] == pytest.approx(0.5 if has_cosine else 1.0)
    assert max(factors) <= 1.0
    assert factors[22:] == sorted(factors[22:])
    assert factors[-1] == pytest.approx(1.0)


def test_attaching_in_the_middle_starts_at_a_factor_of_one() -> None:
    training = Training.of(gen_adamw)
    training.train(10)
    alpha = training.optimizer.param_groups[0]["lr"]
    scheduler = lr_scheduler.LinearLR(training.optimizer, 1.0, 0.0, 10)
    training.train(1, scheduler)
    assert training.optimizer.last_probe.lr_before == alpha
    assert training.optimizer.last_probe.factor == 1.0
    training.train(1, scheduler)
    assert training.optimizer.last_probe.factor == pytest.approx(0.9)


def test_tensor_learning_rates_under_a_scheduler_stay_the_same_tensor() -> None:
    model = mlp()
    optimizer = GeNOptimizer(AdamW(model.parameters(), lr=torch.tensor(0.01)))
    held = optimizer.param_groups[0]["lr"]
    scheduler = lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 10)
    Training(model, optimizer, *regression_data()).train(5, scheduler)
    assert optimizer.param_groups[0]["lr"] is held
    assert held.item() == pytest.approx(0.005)
    assert optimizer.get_last_lr()[0] == pytest.approx(0.6 * optimizer.last_probe.lr_after)


# --- manual values --------------------------------------------------------------------------------------------------


def test_writing_a_learning_rate_sets_it_without_a_new_start_or_burn_in() -> None:
    training = Training.of(lambda p: gen_adamw(p, burn_in=3, period=4))
    training.train(5)
    optimizer = training.optimizer
    record = optimizer.last_probe
    optimizer.param_groups[0]["lr"] = 0.02
    training.train(1)  # lazy
    assert optimizer.last_probe is record
    assert optimizer.get_last_lr() == [0.02]
    training.train(4)
    assert optimizer.last_probe is not record
    assert optimizer.last_probe.lr_before == 0.02
    assert optimizer.last_probe.status is not ProbeStatus.STARTED
    assert optimizer.state_dict()["param_groups"][0]["gen_loss_count"] == 1


def test_writing_one_group_changes_the_ratio_and_zero_freezes() -> None:
    model, base = two_groups()
    optimizer = GeNOptimizer(base, mode="approximate")
    training = Training(model, optimizer, *regression_data())
    training.train(3)
    optimizer.param_groups[1]["lr"] = 3.0 * optimizer.param_groups[0]["lr"]
    training.train(3)
    assert optimizer.param_groups[1]["lr"] == pytest.approx(3.0 * optimizer.param_groups[0]["lr"], rel=1e-12)
    optimizer.param_groups[0]["lr"] = 0.0
    alpha = optimizer.param_groups[1]["lr"]
    frozen = parameters_of(model[0])
    training.train(1)
    assert same(parameters_of(model[0]), frozen)
    assert optimizer.last_probe.lr_before == alpha  # of the first unfrozen group
    training.train(3)
    assert optimizer.param_groups[0]["lr"] == 0.0


def test_a_manual_value_survives_a_failing_closure() -> None:
    model, base = two_groups()
    optimizer = GeNOptimizer(base)
    training = Training(model, optimizer, *regression_data())
    training.train(3)
    second = optimizer.param_groups[1]["lr"]
    optimizer.param_groups[0]["lr"] = 0.5
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            optimizer.step(lambda: 1 / 0)
    training.train(1)
    assert optimizer.last_probe.lr_before == 0.5
    assert optimizer.param_groups[1]["lr"] / optimizer.param_groups[0]["lr"] == pytest.approx(second / 0.5)


def test_a_value_written_just_before_a_scheduler_is_attached_counts() -> None:
    training = Training.of(gen_adamw)
    training.train(5)
    training.optimizer.param_groups[0]["lr"] = 0.5
    lr_scheduler.LinearLR(training.optimizer, 0.5, 1.0, 5)
    training.train(1)
    assert training.optimizer.last_probe.lr_before == 0.5
    assert training.optimizer.last_probe.factor == pytest.approx(0.5)


def test_a_tensor_learning_rate_may_be_filled_or_replaced() -> None:
    model = mlp()
    optimizer = GeNOptimizer(AdamW(model.parameters(), lr=torch.tensor(0.01)))
    training = Training(model, optimizer, *regression_data())
    training.train(3)
    optimizer.param_groups[0]["lr"].fill_(0.25)
    training.train(1)
    assert optimizer.last_probe.lr_before == 0.25
    optimizer.param_groups[0]["lr"] = torch.tensor(0.125)
    training.train(1)
    assert optimizer.last_probe.lr_before == 0.125


def test_reduce_on_plateau_writes_manual_values() -> None:
    training = Training.of(lambda p: gen_adamw(p, burn_in=1, period=100))
    training.train(2)
    lr = training.optimizer.param_groups[0]["lr"]
    plateau = lr_scheduler.ReduceLROnPlateau(training.optimizer, factor=0.25, patience=0)
    plateau.step(1.0)
    plateau.step(1.0)
    training.train(1)
    assert training.optimizer.get_last_lr() == [0.25 * lr]
    assert training.optimizer.state_dict()["param_groups"][0]["gen_lr"] == 0.25 * lr


@pytest.mark.parametrize("lr", [-1.0, float("nan"), float("inf"), None, "0.1"])
def test_an_impossible_learning_rate_is_refused(lr: Any) -> None:
    training = Training.of(gen_sgd)
    training.optimizer.param_groups[0]["lr"] = lr
    with pytest.raises(ValueError, match=r"param_groups\[0\]\['lr'\] must be a finite number of at least 0"):
        training.train(1)


def test_without_a_scheduler_the_groups_show_what_is_in_force() -> None:
    training = Training.of(gen_adamw)
    assert training.optimizer.get_last_lr() == [1e-3]
    for _ in range(60):
        training.train(1)
        assert training.optimizer.get_last_lr() == [group["lr"] for group in training.optimizer.param_groups]


def test_a_learning_rate_that_is_written_while_the_base_optimizer_steps_does_not_stay() -> None:
    _, base = two_groups()
    optimizer = GeNOptimizer(base, rule="published")
    before = [group["lr"] for group in base.param_groups]
    base.register_step_post_hook(lambda *_: base.param_groups[0].update(lr=7.0))
    for each in base.param_groups[0]["params"]:
        each.grad = torch.ones_like(each)
    for _ in range(2):
        optimizer.step()
        assert [group["lr"] for group in base.param_groups] == optimizer.get_last_lr() == before


def test_all_zero_and_no_closure_is_a_plain_base_step_that_remembers_nothing() -> None:
    """What torch.distributed.checkpoint does to create state before it loads."""
    model, base = two_groups()
    optimizer = GeNOptimizer(base)
    optimizer.closure = lambda: pytest.fail("called")
    remembered = copy.deepcopy(optimizer.state_dict()["param_groups"])
    lrs = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step(closure=None)
    for group, lr in zip(optimizer.param_groups, lrs, strict=True):
        group["lr"] = lr
    optimizer.zero_grad()
    assert optimizer.state_dict()["param_groups"] == remembered
    assert len(optimizer.state) == 4
    optimizer.closure = None
    Training(model, optimizer, *regression_data()).train(1)
    assert optimizer.last_probe.status is ProbeStatus.STARTED


def test_a_tensor_learning_rate_is_read_once_after_each_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """A learning rate on a device is read once after each write: reading it synchronises."""
    model = mlp()
    optimizer = wrapped(AdamW(model.parameters(), lr=torch.tensor(0.01)), burn_in=1, period=100)
    training = Training(model, optimizer, *regression_data())
    training.train(2)
    reads: list[Any] = []
    monkeypatch.setattr(torch.Tensor, "__float__", lambda self: reads.append(self) or self.item())
    optimizer.step(training.closure)
    assert not any(read is optimizer.param_groups[0]["lr"] for read in reads)


def test_groups_that_join_while_all_are_frozen_or_share_a_tensor() -> None:
    model = mlp()
    optimizer = GeNOptimizer(SGD(model[0].parameters(), lr=0.0))
    optimizer.add_param_group({"params": [model[4].weight], "lr": 0.5})
    training = Training(model, optimizer, *regression_data())
    before = parameters_of(model)
    training.train(2)
    assert same(parameters_of(model)[:2], before[:2])
    assert not torch.equal(model[4].weight, before[2])

    shared = torch.tensor(0.5)
    optimizer = GeNOptimizer(AdamW(mlp().parameters(), lr=shared))
    held = optimizer.param_groups[0]["lr"]
    lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.25)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    assert held.item() == 0.125  # the scheduler's, as before
    assert optimizer.param_groups[1]["lr"].item() == 0.125
    assert optimizer.param_groups[1]["lr"] is not held


@pytest.mark.parametrize("name", ["ExponentialLR", "StepLR", "LinearLR"])
def test_steps_of_a_scheduler_are_no_manual_values_of_a_group_that_has_joined(name: str) -> None:
    model = mlp()
    optimizer = GeNOptimizer(SGD(model[0].parameters(), lr=0.01))
    scheduler = SCHEDULERS[name](optimizer)
    training = Training(model, optimizer, *regression_data())
    training.train(3, scheduler)
    optimizer.add_param_group({"params": model[4].parameters()})
    before = parameters_of(model)
    training.train(6, scheduler)
    group, _ = optimizer.state_dict()["param_groups"]
    assert group["gen_parabola_count"] >= 6  # none forgotten
    assert optimizer.get_last_lr()[1] == pytest.approx(optimizer.get_last_lr()[0])
    assert not any(map(torch.equal, parameters_of(model), before))


def test_freezing_all_groups_and_unfreezing_them() -> None:
    training = Training.of(lambda parameters: gen_sgd(parameters, mode="approximate"))
    training.train(3)
    lr = training.optimizer.param_groups[0]["lr"]
    training.optimizer.param_groups[0]["lr"] = 0.0
    before = parameters_of(training.model)
    training.train(2)
    assert same(parameters_of(training.model), before)
    assert training.optimizer.state_dict()["param_groups"][0]["gen_lr"] == lr
    training.optimizer.param_groups[0]["lr"] = 0.01
    training.train(1)
    assert training.optimizer.last_probe.lr_before == 0.01


# --- groups that join -------------------------------------------------------------------------------------------------

JOINING: dict[str, Callable[[Optimizer], lr_scheduler.LRScheduler | None]] = {
    "no scheduler": lambda o: None,
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 1.0),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=200, cycle_momentum=False),
    **{name: SCHEDULERS[name] for name in ("ExponentialLR", "StepLR", "CosineAnnealingWarmRestarts")},
}


@pytest.mark.parametrize("through", ["wrapper", "base"])
@pytest.mark.parametrize("brought", ["copied", "twice", "none"])
@pytest.mark.parametrize("name", JOINING)
def test_a_group_joins_at_its_lr_over_the_one_shown(name: str, brought: str, through: str) -> None:
    """Callbacks that unfreeze layers copy the lr of the first group."""
    model = mlp()
    optimizer = wrapped(SGD(model[0].parameters(), lr=1e-3), burn_in=8)
    scheduler = JOINING[name](optimizer)
    training = Training(model, optimizer, *regression_data())
    training.train(20, scheduler)
    shown = optimizer.param_groups[0]["lr"]
    group: dict[str, Any] = {"params": model[4].parameters()}
    if brought != "none":
        group["lr"] = 2.0 * shown if brought == "twice" else shown
    (optimizer if through == "wrapper" else optimizer.base_optim).add_param_group(group)
    for _ in range(3):
        training.train(1, None if name == "CosineAnnealingWarmRestarts" else scheduler)
        first, second = optimizer.get_last_lr()
        assert second / first == pytest.approx(2.0 if brought == "twice" else 1.0)


def test_a_group_that_copies_the_zero_of_a_warm_up_gets_ratio_1() -> None:
    optimizer = GeNOptimizer(SGD(mlp().parameters(), lr=0.1))
    lr_scheduler.LinearLR(optimizer, 1e-9, 1.0, 5)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    for lr in (0.0, 0.2):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "lr": lr})
    ratios = [group["gen_ratio"] for group in optimizer.state_dict()["param_groups"]]
    assert ratios == pytest.approx([1.0, 1.0, 2.0])


def test_another_list_of_groups_is_noticed() -> None:
    model, base = two_groups()
    optimizer = GeNOptimizer(base, mode="approximate")
    training = Training(model, optimizer, *regression_data())
    training.train(3)
    last = optimizer.get_last_lr()
    optimizer.state_dict()  # writes what is remembered to the groups
    optimizer.param_groups = [dict(group) for group in optimizer.param_groups]
    assert optimizer.get_last_lr() == last
    training.train(1)
    assert optimizer.last_probe.lr_before == last[0]
    optimizer.param_groups = optimizer.param_groups[1:]
    training.train(1)
    assert len(optimizer.get_last_lr()) == 1


@pytest.mark.filterwarnings("ignore:param_groups.* has been written before 3 steps")
def test_tensor_learning_rates_that_are_replaced_are_not_collected() -> None:
    model = mlp()
    optimizer = GeNOptimizer(AdamW(model.parameters(), lr=torch.tensor(0.01)))
    training = Training(model, optimizer, *regression_data())
    freed = []
    for step in range(5):
        lr = optimizer.param_groups[0]["lr"] = torch.tensor(0.1 + step)
        freed.append(weakref.ref(lr))
        del lr
        training.train(1)
    assert [each() is None for each in freed] == [True] * 4 + [False]


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("through", ["wrapper", "base"])
@pytest.mark.parametrize(
    ("key", "value"),
    [("lr", -1.0), ("gen_lr", -1.0), ("gen_lr", float("nan")), ("gen_lr", "0.1"), ("gen_step", 0.5)]
    + [(f"gen_{name}", bad) for name in ("ratio", "written_lr", "last_lr") for bad in (-1.0, float("inf"), None, True)]
    + [("gen_scheduled", 1)],
)
def test_an_impossible_number_in_a_checkpoint_is_refused(key: str, value: Any, through: str) -> None:
    training = Training.of(gen_adamw)
    training.train(3)
    saved = copy.deepcopy(training.optimizer.state_dict())
    training.train(2)
    before = str(training.optimizer.state_dict())
    saved["param_groups"][0][key] = value
    optimizer = training.optimizer if through == "wrapper" else training.optimizer.base_optim
    with pytest.raises(ValueError, match=rf"param_groups\[0\]\['{key}'\].* must be"):
        optimizer.load_state_dict(saved)
    assert str(training.optimizer.state_dict()) == before


@pytest.mark.parametrize("key", ["gen_ratio", "gen_written_lr", "gen_last_lr", "gen_scheduled"])
def test_a_checkpoint_that_lacks_a_number_is_refused(key: str) -> None:
    training = Training.of(gen_adamw)
    training.train(3)
    saved = copy.deepcopy(training.optimizer.state_dict())
    del saved["param_groups"][0][key]
    with pytest.raises(ValueError, match=rf"param_groups\[0\] of the state dict must have '{key}'"):
        training.optimizer.load_state_dict(saved)


def test_an_upper_limit_of_none_is_none() -> None:
    """Optimizers of optimi have the key from construction on."""
    weight = torch.nn.Parameter(torch.ones(2))
    base = SGD([{"params": [weight], "max_lr": None}], lr=0.1)
    optimizer = GeNOptimizer(base)
    scheduler = lr_scheduler.ConstantLR(optimizer, 0.5, total_iters=100)
    for _ in range(3):
        optimizer.step(lambda: weight.square().sum())
        scheduler.step()
    assert optimizer.last_probe is not None
    assert optimizer.last_probe.factor == 0.5


def test_a_learning_rate_shows_again_what_steps_use_once_its_scheduler_is_taken_off() -> None:
    """``initial_lr`` tells schedulers where they began: it is taken out to begin another one."""
    training = Training.of(gen_adamw)
    scheduler = lr_scheduler.ExponentialLR(training.optimizer, gamma=0.9)
    training.train(5, scheduler)
    (group,) = training.optimizer.param_groups
    del group["initial_lr"]
    for _ in range(5):
        training.train(1)
        assert training.optimizer.get_last_lr() == [group["lr"]] == [training.optimizer._context.controller.state.lr]


def test_a_group_that_is_let_go_at_the_learning_rate_found_clears_no_averages() -> None:
    model, base = two_groups()
    base.param_groups[0]["lr"] = 0.0
    training = Training(model, GeNOptimizer(base), *regression_data())
    training.train(60)
    groups, controller = training.optimizer.param_groups, training.optimizer._context.controller
    count = controller.state.parabola.count
    groups[0]["lr"] = groups[1]["lr"]
    assert controller.recall().parabola.count == count > 10
    assert controller.rates.shares(1.0) == [1.0, 1.0]


def test_a_manual_value_is_kept_if_its_warning_is_an_error() -> None:
    training = Training.of(gen_adamw)
    for value in (0.03, 0.02, 0.01):
        training.train(2)
        training.optimizer.param_groups[0]["lr"] = value
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="has been written before 3 steps"):
            training.train(1)
    assert training.optimizer._context.controller.state.lr == 0.01


def test_a_scheduler_attached_after_a_resume_goes_on_though_initial_lr_was_missing_for_a_while() -> None:
    """A flattened distributed checkpoint brings no key that the groups do not have yet."""
    training = Training.of(gen_adamw)
    scheduler = lr_scheduler.LambdaLR(training.optimizer, lambda epoch: 0.5**epoch)
    training.train(60, None)
    scheduler.step()
    training.train(5)
    state = training.optimizer.state_dict()
    found = training.optimizer._context.controller.state.lr
    for group in state["param_groups"]:
        del group["initial_lr"]
    resumed = Training.of(gen_adamw)
    resumed.optimizer.load_state_dict(state)
    for group in resumed.optimizer.param_groups:
        group.setdefault("initial_lr", 1e-3)
    lr_scheduler.LambdaLR(resumed.optimizer, lambda epoch: 0.5**epoch, last_epoch=1)
    resumed.train(1)
    assert resumed.optimizer._context.controller.state.lr == pytest.approx(found, rel=0.3)
