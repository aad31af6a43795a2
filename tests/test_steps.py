"""Steps that look back: what they leave behind, what goes wrong in them, and what happens between them."""

from __future__ import annotations

import contextlib
import copy
import gc
import math
import pickle
import random
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import SGD, AdamW, lr_scheduler

from gen_optim import GeNOptimizer, History, ProbeRecord, ProbeStatus
from gen_optim.measurement.start_point import StartPoint
from tests.training import Training, gen_adamw, gen_sgd, looking, mlp, parameters_of, regression_data, same

# --- probes see the weights as they are ------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [looking, gen_sgd, lambda p: gen_sgd(p, mode="approximate", rule="published")])
def test_probes_do_not_see_cached_parametrizations(make: Callable[..., GeNOptimizer]) -> None:
    runs = []
    for is_cached in (False, True):
        model = mlp()
        nn.utils.parametrizations.weight_norm(model[0])
        training = Training.of(make, model)
        for _ in range(12):
            with parametrize.cached() if is_cached else contextlib.nullcontext():
                training.train(1)
                assert len(parametrize._cache) == is_cached  # that of the first call is back
        runs.append(parameters_of(model))
    assert same(*runs)


# --- nothing is left behind ------------------------------------------------------------------------------------------


def streams() -> tuple[Any, ...]:
    numpy = [part.tolist() if isinstance(part, np.ndarray) else part for part in np.random.get_state()]
    return random.getstate(), numpy, torch.get_rng_state().tolist()


def seed_all() -> None:
    torch.manual_seed(1), random.seed(1), np.random.seed(1)


def noisy(_: Training) -> None:
    """Draw from every global stream, as augmentation inside a closure does."""
    random.random(), np.random.rand(), torch.rand(1)


def zeroed_anew(training: Training) -> Callable[[], Tensor]:
    """A closure whose gradients are not known to be those of the loss: it needs the middle."""

    def closure() -> Tensor:
        training.optimizer.zero_grad(set_to_none=False)
        loss = training.loss()
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("half_way", [False, True])
def test_a_look_back_leaves_no_trace_but_its_learning_rate(half_way: bool) -> None:
    """With the learning rate held, it must equal the bare optimizer: parameters, buffers, gradients, streams."""
    runs = []
    for make in (
        lambda parameters: looking(parameters, lr=0.05, lr_min=0.05, lr_max=0.05),
        lambda parameters: SGD(parameters, lr=0.05, momentum=0.9),
    ):
        training = Training.of(make, mlp(dropout=0.5, norm=True))
        training.before_return = noisy
        seed_all()
        closure = zeroed_anew(training) if half_way else training.closure
        with torch.no_grad():
            losses = [float(training.optimizer.step(closure)) for _ in range(6)]
            assert not torch.is_grad_enabled()
        gradients = [parameter.grad for parameter in training.model.parameters()]
        state = [each["momentum_buffer"] for each in training.optimizer.state.values()]
        runs.append((losses, list(training.model.state_dict().values()), gradients, state, streams(), training.probes))
    (losses, tensors, gradients, state, drawn, probes), (bare_losses, *bare_tensors, bare_drawn, _) = runs
    assert probes == 1 + 5 * (2 if half_way else 1)  # one more in the first probe step, to compare
    assert losses == bare_losses
    for mine, bares in zip((tensors, gradients, state), bare_tensors, strict=True):
        assert same(mine, bares)
    assert drawn == bare_drawn


@pytest.mark.parametrize("half_way", [False, True])
def test_all_calls_of_a_look_back_see_the_same_dropout_masks(half_way: bool) -> None:
    masks: list[Tensor] = []
    training = Training.of(looking, mlp(dropout=0.5))
    training.model[3].register_forward_hook(lambda module, args, output: masks.append(output == 0))
    closure = zeroed_anew(training) if half_way else training.closure
    training.optimizer.step(closure)
    first = masks.pop()
    for step in range(3):
        masks.clear()
        training.optimizer.step(closure)
        assert len(masks) == (3 if half_way else 2) + (step == 0)  # one more in the first probe step, to compare
        assert same(masks[:1] * len(masks), masks)
        assert not torch.equal(masks[0], first)


def test_gradients_are_enabled_in_the_first_call_only_and_absent_in_the_other() -> None:
    seen: list[tuple[bool, bool, bool]] = []
    training = Training.of(looking)
    training.train(1)
    training.before_return = lambda self: seen.append(
        (self.optimizer.is_probing, torch.is_grad_enabled(), any(p.grad is not None for p in self.model.parameters()))
    )
    training.train(1)
    assert seen == [(False, True, False)] + [(True, False, False)] * 2
    assert not training.optimizer.is_probing


def test_gradients_of_another_network_are_left_alone() -> None:
    generator, critic = mlp(), nn.Linear(1, 1)
    other, optimizer = SGD(critic.parameters(), lr=0.1), looking(generator.parameters(), modules=critic)
    inputs, _ = regression_data()
    seen = []

    def closure() -> Tensor:
        optimizer.zero_grad(), other.zero_grad()
        loss = -critic(generator(inputs)).mean()
        loss.backward()
        seen.append([parameter.grad for parameter in critic.parameters()])
        return loss

    optimizer.step(closure)
    seen.clear()
    optimizer.step(closure)
    assert seen[1:] == [[None, None]] * 2
    assert all(mine.grad is theirs for mine, theirs in zip(critic.parameters(), seen[0], strict=True))
    assert len(optimizer.last_probe.losses) == 2


def test_steps_equal_those_of_the_bare_optimizer_at_the_same_learning_rates() -> None:
    wrapped, bare = Training.of(lambda p: looking(p, period=3)), Training.of(lambda p: SGD(p, lr=0.1, momentum=0.9))
    calls, history = [], History()
    wrapped.optimizer.register_probe_hook(history)
    for _ in range(12):
        wrapped.calls = 0
        wrapped.train(1)
        calls.append(wrapped.calls)
        bare.optimizer.param_groups[0]["lr"] = wrapped.optimizer.get_last_lr()[0]
        bare.train(1)
        assert same(parameters_of(wrapped.model), parameters_of(bare.model))
    assert len({record for record in wrapped.optimizer.param_groups[0].items() if record[0] == "gen_lr"}) == 1
    assert len(history) >= 3
    expected = [2 if step in history.column("step") else 1 for step in range(1, 13)]
    assert calls == [1, 3, *expected[2:]]  # one more in the first probe step, to compare
    assert wrapped.optimizer.param_groups[0]["lr"] != 0.1


def test_a_copy_is_held_between_two_steps_only_where_the_second_looks_back() -> None:
    training = Training.of(lambda parameters: looking(parameters, period=3))
    held, history = [], History()
    training.optimizer.register_probe_hook(history)
    for _ in range(12):
        training.train(1)
        held.append(training.optimizer._context.start_point is not None)
    assert len(history) >= 3
    assert held[:-1] == [step in history.column("step") for step in range(2, 13)]


def test_a_copy_serves_again_in_the_next_look_back_and_the_second_one_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    training = Training.of(looking)
    step, write_point = training.optimizer.base_optim.step, StartPoint.write

    def count() -> None:
        alive.append(len({id(found) for copy in copies if (found := copy()) is not None}) // 4)

    def spy(start_point: StartPoint, multiple: float) -> None:
        write_point(start_point, multiple)
        if multiple == 0.5:
            copies.extend(weakref.ref(each) for held in (start_point._copies, start_point._starts) for each in held)
            count()

    def base_step() -> None:
        count()
        step()

    monkeypatch.setattr(StartPoint, "write", spy)
    monkeypatch.setattr(training.optimizer.base_optim, "step", base_step)
    gc.disable()
    try:
        for _ in range(4):
            training.optimizer.step(zeroed_anew(training))
    finally:
        gc.enable()
    assert alive == [0, *[2, 1] * 3]  # half way, and when the base optimizer steps: the one that serves again


def test_steps_with_nothing_to_probe_keep_no_copy() -> None:
    training = Training.of(looking)
    for _ in range(3):
        training.closure()
        training.optimizer.step()
        assert training.optimizer._context.start_point is None
    training.train(2)
    assert training.optimizer.last_probe.step == 5


# --- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("failing", [2, 3])
@pytest.mark.parametrize("as_probe", [False, True])
def test_an_exception_in_a_look_back_ends_the_step_as_a_lazy_one(
    error: type[BaseException], failing: int, as_probe: bool
) -> None:
    trainings = []
    for _ in range(2):
        training = Training.of(looking, mlp(dropout=0.5, norm=True))
        seed_all()
        for _ in range(3):
            training.optimizer.step(zeroed_anew(training))
        trainings.append(training)
    failed, lazy = trainings
    optimizer, record = failed.optimizer, failed.optimizer.last_probe
    failed.calls = 0

    def fail(self: Training) -> None:
        noisy(self)
        if self.calls >= failing:
            raise error("on purpose")

    failed.before_return = fail
    seed_all()
    given: dict[str, Any] = {"closure": zeroed_anew(failed)}
    if as_probe:
        zeroed_anew(failed)()
        failed.calls = 1 if failing == 2 else 0
        given = {"probe": failed.loss}
    with pytest.raises(error, match="on purpose"):
        optimizer.step(**given)
    state = streams()
    lazy.before_return = noisy
    seed_all()
    lazy.optimizer.zero_grad(set_to_none=False)
    lazy.loss().backward()
    lazy.optimizer.step()  # neither closure nor probe: the base optimizer's step

    assert same(list(failed.model.state_dict().values()), list(lazy.model.state_dict().values()))
    assert same([p.grad for p in failed.model.parameters()], [p.grad for p in lazy.model.parameters()])
    assert state == streams()
    for mine, theirs in zip(optimizer.state.values(), lazy.optimizer.state.values(), strict=True):
        assert torch.equal(mine["momentum_buffer"], theirs["momentum_buffer"])
    assert optimizer.state_dict()["param_groups"][0]["gen_step"] == 4
    assert optimizer.last_probe is record
    assert not optimizer.is_probing
    failed.before_return = lambda self: None
    failed.train(1)
    assert optimizer.last_probe.step == 5  # the next one looks back as ever


def test_a_closure_that_fails_may_be_called_again() -> None:
    failed, other = (Training.of(looking, mlp(norm=True)) for _ in range(2))
    failed.train(3), other.train(3)
    failed.before_return = lambda self: 1 / 0
    with pytest.raises(ZeroDivisionError):
        failed.train(1)
    failed.before_return = lambda self: None
    failed.model.load_state_dict(other.model.state_dict())
    assert failed.optimizer._pending_start_point() is None  # loaded: parameters have been written
    failed.train(1), other.train(1)

    again = Training.of(looking)
    again.train(3)
    state = str(again.optimizer.state_dict())
    again.before_return = lambda self: 1 / 0
    with pytest.raises(ZeroDivisionError):
        again.train(1)
    assert str(again.optimizer.state_dict()) == state
    again.before_return = lambda self: None
    again.train(1)
    assert again.optimizer.last_probe.step == 4


def diverging(training: Training, bad: float, *, everywhere: bool = False) -> Callable[[], Tensor]:
    """A closure whose loss is ``bad`` where the last step has led, and if told so where it began too."""

    def closure() -> Tensor:
        training.optimizer.zero_grad()
        loss = training.loss()
        if everywhere or not training.optimizer.is_probing:
            loss = loss * bad
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e9])
def test_a_step_that_has_led_astray_is_taken_back(bad: float) -> None:
    training = Training.of(lambda p: gen_adamw(p, mode="lookback"), mlp(norm=True, dtype=torch.float64))
    training.train(12)
    before, buffers = parameters_of(training.model), [each.clone() for each in training.model.buffers()]
    training.train(1)
    after, lr = [each.clone() for each in training.model.buffers()], training.optimizer.param_groups[0]["lr"]
    assert not same(buffers, after)
    state = copy.deepcopy(list(training.optimizer.state.values()))

    loss = training.optimizer.step(diverging(training, bad))

    record = training.optimizer.last_probe
    assert record.status is ProbeStatus.REVERTED
    assert (record.step, record.lr_before, record.lr_after) == (14, lr, lr / 2)
    assert loss.item() == pytest.approx(bad * record.losses[0], rel=0.5, nan_ok=True)
    assert same(parameters_of(training.model), before)
    assert same(list(training.model.buffers()), after)  # what the far end has shown the model's statistics is gone
    for mine, theirs in zip(training.optimizer.state.values(), state, strict=True):
        assert all(torch.equal(torch.as_tensor(mine[name]), torch.as_tensor(theirs[name])) for name in theirs)
    assert training.optimizer.param_groups[0]["lr"] == lr / 2
    losses = training.train(100)  # it restarts when the burn-in is over
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0]
    assert training.optimizer.last_probe.status is not ProbeStatus.REVERTED


def test_a_reverted_step_gives_no_average_to_a_parameter_that_the_base_has_not_set_up() -> None:
    """A head that gets its first gradient in a reverted step: a state with an average alone is none of Adam's."""
    training = Training.of(lambda p: gen_adamw(p, mode="lookback"), mlp(dtype=torch.float64))
    head = nn.Parameter(torch.zeros((), dtype=torch.float64))
    training.optimizer.add_param_group({"params": [head]})
    training.train(15)

    def with_head() -> Tensor:
        training.optimizer.zero_grad()
        loss = (training.loss() + head) * (1.0 if training.optimizer.is_probing else math.inf)
        loss.backward()
        return loss

    training.optimizer.step(with_head)  # the 16th step, in which the average is updated
    assert training.optimizer.last_probe.status is ProbeStatus.REVERTED
    assert not training.optimizer.state[head]
    head.grad = None
    for _ in range(4):
        training.optimizer.step(lambda: training.closure() + 0.0 * head)


def at_the_end(training: Training) -> Callable[[Training], None]:
    """Raises while the parameters are where they are now."""
    bad = parameters_of(training.model)

    def fail(training: Training) -> None:
        if same(parameters_of(training.model), bad):
            raise ValueError("scale must be positive")

    return fail


def test_a_step_at_whose_end_the_closure_always_fails_is_reverted() -> None:
    training = Training.of(gen_adamw, mlp(norm=True, dropout=0.5))
    training.train(12)
    before = parameters_of(training.model)
    training.train(1)
    buffers, lr = [each.clone() for each in training.model.buffers()], training.optimizer.get_last_lr()[0]
    moments = copy.deepcopy(list(training.optimizer.state.values()))
    training.before_return, calls = at_the_end(training), training.calls

    with pytest.warns(UserWarning, match="At step 14 a probe .* raised ValueError: scale must be positive"):
        loss = training.optimizer.step(training.closure)

    record = training.optimizer.last_probe
    assert (record.step, record.status) == (14, ProbeStatus.REVERTED)
    assert (record.lr_before, record.lr_after) == (lr, lr / 2)
    assert record.losses == (float(loss), math.inf)
    assert training.calls - calls == 4  # at the end, at the start, at the end again, at the start again
    assert same(parameters_of(training.model), before)
    assert same(list(training.model.buffers()), buffers)
    for mine, theirs in zip(training.optimizer.state.values(), moments, strict=True):
        assert all(torch.equal(torch.as_tensor(mine[name]), torch.as_tensor(theirs[name])) for name in theirs)
    training.train(20)  # from there on without the bad point
    assert training.optimizer.last_probe.status is not ProbeStatus.REVERTED


def once(training: Training) -> Callable[[Training], None]:
    """Raises once, wherever the parameters are."""
    calls = iter([True])

    def fail(_: Training) -> None:
        if next(calls, False):
            raise ValueError("scale must be positive")

    return fail


def everywhere(_: Training) -> Callable[[Training], None]:
    """Raises always, as an exhausted iterator does."""

    def fail(_: Training) -> None:
        raise ValueError("scale must be positive")

    return fail


def outside_of_probes(_: Training) -> Callable[[Training], None]:
    def fail(training: Training) -> None:
        if not training.optimizer.is_probing:
            raise ValueError("scale must be positive")

    return fail


@pytest.mark.parametrize("failing", [once, everywhere, outside_of_probes])
def test_an_exception_that_is_not_the_fault_of_the_end_is_raised(failing: Callable[[Training], Any]) -> None:
    training = Training.of(gen_adamw, mlp(norm=True, dropout=0.5))
    training.train(13)
    before, record, rates = (
        parameters_of(training.model),
        training.optimizer.last_probe,
        training.optimizer.get_last_lr(),
    )
    training.before_return = failing(training)
    with pytest.raises(ValueError, match="scale must be positive"):
        training.optimizer.step(training.closure)
    assert same(parameters_of(training.model), before)
    assert training.optimizer.last_probe is record
    assert not training.optimizer.is_probing
    assert training.optimizer.get_last_lr() == rates
    training.before_return = lambda training: None
    training.train(1)
    assert training.optimizer.last_probe.step == 14  # the start point is still there


def test_an_exception_at_the_end_is_raised_if_the_rule_does_not_revert() -> None:
    training = Training.of(looking)
    training.train(5)
    before = parameters_of(training.model)
    training.before_return = at_the_end(training)
    with pytest.raises(ValueError, match="scale must be positive"):
        training.optimizer.step(training.closure)
    assert same(parameters_of(training.model), before)
    training.before_return = lambda training: None
    training.train(1)
    assert training.optimizer.last_probe.step == 6  # looks back at the step before, as ever


def test_an_interrupt_while_an_exception_is_looked_into_is_raised() -> None:
    training = Training.of(gen_adamw)
    training.train(13)
    before, fail = parameters_of(training.model), at_the_end(training)

    def interrupt(training: Training) -> None:
        fail(training)
        raise KeyboardInterrupt

    training.before_return = interrupt
    with pytest.raises(KeyboardInterrupt):
        training.optimizer.step(training.closure)
    assert same(parameters_of(training.model), before)
    assert not training.optimizer.is_probing
    training.before_return = lambda training: None
    training.train(3)


def test_statistics_of_a_loss_that_is_not_finite_do_not_stay() -> None:
    training = Training.of(lambda p: gen_adamw(p, mode="lookback"), mlp(norm=True))
    training.train(12)
    inputs = training.inputs.clone()

    def spoil() -> Tensor:
        training.optimizer.zero_grad()
        if not training.optimizer.is_probing:
            training.inputs = inputs * math.inf
        loss = training.loss()
        training.inputs = inputs
        loss.backward()
        return loss

    training.optimizer.step(spoil)
    assert training.optimizer.last_probe.status is ProbeStatus.REVERTED
    assert all(bool(torch.isfinite(buffer).all()) for buffer in training.model.buffers())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("rule", ["relaxed", "published"])
def test_a_batch_that_is_not_finite_anywhere_teaches_nothing_and_steps_as_the_base_would(bad: float, rule: str) -> None:
    training = Training.of(lambda parameters: gen_sgd(parameters, mode="lookback", rule=rule, period=1))
    training.train(6)
    twin = copy.deepcopy(training.model)
    bare = SGD(twin.parameters(), lr=training.optimizer.param_groups[0]["lr"], momentum=0.9)
    bare.load_state_dict(copy.deepcopy(training.optimizer.base_optim.state_dict()))
    lr, history = training.optimizer.param_groups[0]["lr"], History()
    training.optimizer.register_probe_hook(history)

    def closure() -> float:
        training.closure()
        return bad

    training.optimizer.step(closure)
    Training(twin, bare, training.inputs, training.targets).train(1)
    assert history[0].status is ProbeStatus.NON_FINITE_LOSS
    assert same(parameters_of(training.model), parameters_of(twin))
    assert training.optimizer.param_groups[0]["lr"] == lr
    training.train(1)
    assert training.optimizer.last_probe.status not in (ProbeStatus.NON_FINITE_LOSS, ProbeStatus.REVERTED)


def test_the_published_rule_takes_nothing_back() -> None:
    training = Training.of(looking)
    training.train(5)
    training.optimizer.step(diverging(training, 1e12))
    assert training.optimizer.last_probe.status is not ProbeStatus.REVERTED


# --- what happens between two steps ----------------------------------------------------------------------------------


def test_a_scheduler_that_stands_at_zero_is_survived() -> None:
    training = Training.of(lambda parameters: gen_sgd(parameters, mode="lookback"))
    factors = iter([0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 0.5, 0.0, 1.0, 1.0, 1.0])
    scheduler = lr_scheduler.LambdaLR(training.optimizer, lambda _: next(factors))
    history = History()
    training.optimizer.register_probe_hook(history)
    losses = []
    for _ in range(12):
        before = parameters_of(training.model)
        losses += training.train(1, None)
        factor = training.optimizer.param_groups[0]["lr"] / training.optimizer.param_groups[0]["initial_lr"]
        assert same(parameters_of(training.model), before) == (factor == 0.0)
        scheduler.step()
    assert all(math.isfinite(record.lr_after) and record.lr_after > 0 for record in history)
    assert {0.0, 1.0} <= {record.factor for record in history}
    assert losses[-1] < losses[0]
    for record in history:
        if record.factor == 0.0 and record.status is not ProbeStatus.STARTED:
            assert record.lr_after == record.lr_before


def test_the_learning_rate_looked_back_at_is_that_of_the_step_the_schedulers_factor_included() -> None:
    training = Training.of(lambda p: looking(p, lr=0.05, lr_min=0.05, lr_max=0.05))
    scheduler = lr_scheduler.LambdaLR(training.optimizer, lambda epoch: 0.5**epoch)
    history = History()
    training.optimizer.register_probe_hook(history)
    training.train(4, scheduler)
    assert [record.multiples for record in history] == [(0.0, 1.0), (0.0, 0.5), (0.0, 0.25)]
    assert [record.factor for record in history] == [0.5, 0.25, 0.125]


def test_parameters_written_by_hand_cost_one_parabola() -> None:
    training = Training.of(looking)
    training.train(3)
    assert training.optimizer.last_probe.step == 3
    training.model.load_state_dict(copy.deepcopy(training.model.state_dict()))
    training.train(1)
    assert training.optimizer.last_probe.step == 3
    training.train(1)
    assert training.optimizer.last_probe.step == 5


def test_a_step_given_a_probe_alone_returns_the_loss_where_it_began() -> None:
    training = Training.of(looking)
    training.train(1)
    for _ in range(4):
        training.optimizer.zero_grad()
        here = training.loss()
        here.backward()
        assert training.optimizer.step(probe=training.loss).item() == here.item()
        assert training.optimizer.last_probe.loss_end == here.item()


def test_weights_clamped_by_a_hook_of_the_base_optimizer_are_looked_back_at() -> None:
    training = Training.of(looking)
    weights = list(training.model.parameters())

    @torch.no_grad()
    def clamp(*_: object) -> None:
        for each in weights:
            each.clamp_(-0.3, 0.3)

    training.optimizer.base_optim.register_step_post_hook(clamp)
    losses = training.train(30)
    assert training.optimizer.last_probe.step == 30
    assert max(each.abs().max().item() for each in weights) == pytest.approx(0.3)
    assert losses[-1] < losses[0]


def test_groups_that_are_frozen_added_and_of_other_ratios() -> None:
    model = mlp(dtype=torch.float64)
    groups = [
        {"params": [model[0].weight], "lr": 0.0},
        {"params": [model[0].bias], "lr": 0.02},
        {"params": [model[4].weight], "lr": 0.06},
    ]
    optimizer = GeNOptimizer(SGD(groups, lr=1.0, momentum=0.9), mode="lookback", rule="published", period=1)
    training = Training(model, optimizer, *regression_data(dtype=torch.float64))
    frozen = model[0].weight.detach().clone()
    training.train(3)
    assert optimizer.last_probe.step == 3
    assert optimizer.last_probe.lr_after == optimizer.param_groups[1]["lr"]
    assert torch.equal(model[0].weight, frozen)
    optimizer.add_param_group({"params": [model[4].bias]})
    training.train(1)
    assert optimizer.last_probe.step == 4  # the last step was one of fewer parameters; the new one did not move in it
    before = parameters_of(model)
    training.train(1)
    record = optimizer.last_probe
    assert record.step == 5
    lrs = [group["lr"] for group in optimizer.param_groups]
    assert lrs[2] / lrs[1] == pytest.approx(3.0, rel=1e-12)
    assert lrs[3] == pytest.approx(lrs[1], rel=1e-12)
    # The parabola is that of all groups together: their next step from here, at their ratios.
    optimizer.param_groups[0]["lr"] = lrs[1]  # let go
    training.train(2)
    assert not torch.equal(model[0].weight, frozen)
    assert not same(parameters_of(model), before)
    assert optimizer.last_probe.step == 7


def test_the_parabola_of_groups_is_that_of_their_common_step() -> None:
    model = mlp(dtype=torch.float64)
    groups = [{"params": model[0].parameters(), "lr": 1e-4}, {"params": model[4].parameters(), "lr": 3e-4}]
    optimizer = GeNOptimizer(SGD(groups, lr=1.0), mode="lookback", rule="published", period=1, lr_max=1e-4, lr_min=1e-4)
    training = Training(model, optimizer, *regression_data(dtype=torch.float64))
    training.train(1)
    after = parameters_of(model)
    gradient_before = [parameter.grad.clone() for parameter in model.parameters()]
    training.train(1)
    ratios = [1.0, 1.0, 3.0, 3.0]
    expected = sum((ratio * g.square().sum()).item() for ratio, g in zip(ratios, gradient_before, strict=True))
    assert optimizer.last_probe.slope == pytest.approx(expected, rel=1e-6)
    assert not same(parameters_of(model), after)


@pytest.mark.parametrize("mode", ["lookback", "approximate"])
def test_a_scheduler_that_holds_the_first_group_at_zero_does_not_blind_the_probes(mode: str) -> None:
    model = mlp()
    groups = [{"params": model[0].parameters()}, {"params": model[4].parameters()}]
    training = Training(model, GeNOptimizer(AdamW(groups), mode=mode), *regression_data())
    scheduler = lr_scheduler.LambdaLR(training.optimizer, [lambda _: 0.0, lambda _: 0.5])
    before = model[0].weight.detach().clone()
    training.train(10, scheduler)
    record = training.optimizer.last_probe
    assert torch.equal(model[0].weight, before)
    assert (record.step, record.factor, record.status) == (10, 0.5, ProbeStatus.FITTED)
    assert record.lr_after > record.lr_before
    if mode == "lookback":
        assert record.multiples == (0.0, 0.5)


def test_a_learning_rate_written_by_hand_is_where_it_goes_on() -> None:
    training = Training.of(lambda parameters: gen_adamw(parameters, mode="lookback"))
    training.train(4)
    training.optimizer.param_groups[0]["lr"] = 0.02
    training.train(1)
    assert training.optimizer.last_probe.lr_before == 0.02
    assert training.optimizer.last_probe.lr_after == pytest.approx(0.02, rel=0.2)


# --- parameters of every kind ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_in_place", [True, False])
def test_gradients_at_a_point_to_which_the_closure_moves_are_not_those_of_the_loss(is_in_place: bool) -> None:
    training, history = Training.of(looking), History()
    training.optimizer.register_probe_hook(history)
    parameters = list(training.model.parameters())

    @torch.no_grad()
    def write(values: list[Tensor]) -> None:
        for parameter, value in zip(parameters, values, strict=True):
            if is_in_place:
                parameter.copy_(value)
            else:
                parameter.data = value

    def closure() -> Tensor:
        training.optimizer.zero_grad()
        kept = [each.detach().clone() for each in parameters]
        write([each + 0.1 for each in kept])
        loss = training.loss()
        loss.backward()
        write(kept)
        return loss

    for _ in range(6):
        training.optimizer.step(closure)
    assert [record.multiples for record in history[1:]] == [(0.0, 0.5, 1.0)] * 4


def test_maximize_climbs_as_minimising_descends() -> None:
    runs = []
    for sign in (1.0, -1.0):
        training = Training.of(
            lambda p, sign=sign: GeNOptimizer(SGD(p, lr=0.1, maximize=sign < 0), mode="lookback"), mlp(norm=True)
        )
        history = History()
        training.optimizer.register_probe_hook(history)

        def closure(training: Training = training, sign: float = sign) -> Tensor:
            training.optimizer.zero_grad()
            gain = sign * training.loss()
            gain.backward()
            return gain

        gains = [sign * training.optimizer.step(closure).item() for _ in range(12)]
        runs.append((gains, parameters_of(training.model), list(history)))
        assert {len(record.losses) for record in history[1:]} == {2}  # gradients are known to be the loss's
    assert runs[0][0] == runs[1][0]
    assert same(runs[0][1], runs[1][1])
    assert repr(runs[0][2]) == repr(runs[1][2])  # records with NaN are unequal from Python 3.13 on


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_no_parameter_of_any_precision_changes_by_being_looked_back_at(dtype: torch.dtype) -> None:
    wrapped = Training.of(lambda p: looking(p, lr=0.01, lr_min=0.01, lr_max=0.01), mlp(dtype=dtype))
    bare = Training.of(lambda p: SGD(p, lr=0.01, momentum=0.9), mlp(dtype=dtype))
    for _ in range(8):
        wrapped.train(1), bare.train(1)
        assert same(parameters_of(wrapped.model), parameters_of(bare.model))
    assert wrapped.probes >= 7


def test_half_precision_trains() -> None:
    training = Training.of(lambda p: gen_adamw(p, mode="lookback"), mlp(dtype=torch.bfloat16))
    losses = training.train(150)
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("half_way", [False, True])
@pytest.mark.parametrize("make", [lambda p: SGD(p, lr=0.05, momentum=0.9), lambda p: AdamW(p, lr=0.05)])
def test_complex_parameters(make: Any, half_way: bool) -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(5, dtype=torch.complex128))
    target = torch.randn(5, dtype=torch.complex128)
    optimizer = GeNOptimizer(make([weight]), mode="lookback", rule="published", period=1)
    seen: list[tuple[float, float]] = []
    before = lr = None
    for _ in range(6):
        here = weight.detach().clone()

        def closure() -> Tensor:
            optimizer.zero_grad(set_to_none=not half_way)
            loss = (weight - target).abs().square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        if before is not None:
            direction = (before - here) / lr
            slope = 2.0 * (direction.conj() * (before - target)).sum().real.item()
            seen.append((slope, 2.0 * direction.abs().square().sum().item()))
            record = optimizer.last_probe
            assert len(record.losses) == (3 if half_way else 2)
            assert (record.slope, record.curvature) == pytest.approx(seen[-1], rel=1e-8)
        before, lr = here, optimizer.get_last_lr()[0]
    assert len(seen) == 5


# --- checkpoints -----------------------------------------------------------------------------------------------------


def records_of(training: Training) -> list[ProbeRecord]:
    records: list[ProbeRecord] = []
    training.optimizer.register_probe_hook(lambda _, record: records.append(record))
    return records


def copies(training: Training) -> Iterator[Training]:
    model, optimizer = copy.deepcopy((training.model, training.optimizer))
    yield Training(model, optimizer, training.inputs, training.targets)
    model, optimizer = pickle.loads(pickle.dumps((training.model, training.optimizer)))
    yield Training(model, optimizer, training.inputs, training.targets)


@pytest.mark.parametrize("make", [gen_adamw, gen_sgd])
def test_copies_go_on_to_the_bit_after_every_step(make: Any) -> None:
    training = Training.of(lambda parameters: make(parameters, mode="lookback", burn_in=4, period=3))
    for step in range(21):
        reference = None
        for twin in copies(training):
            records = records_of(twin)
            result = (twin.train(5), records)
            reference = result if reference is None else reference
            assert repr(result) == repr(reference)  # records with NaN are unequal from Python 3.13 on
        original, records = copy.deepcopy(training.model), records_of(training)
        expected = training.train(1)
        assert reference is not None
        assert reference[0][:1] == expected
        assert repr([record for record in reference[1] if record.step == step + 1]) == repr(records)
        assert not same(parameters_of(original), parameters_of(training.model))


def test_copies_share_no_start_point() -> None:
    training = Training.of(looking)
    training.train(3)
    twin = next(copies(training))
    before = parameters_of(training.model)
    twin.train(3)
    assert same(parameters_of(training.model), before)
    assert training.optimizer._pending_start_point() is not None


# --- exceptions at points that only probes visit ---------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["lookback", "approximate"])
def test_an_exception_at_a_point_that_only_a_probe_visits_counts_as_an_infinite_loss_there(mode: str) -> None:
    """A scale that a distribution refuses, say: the first call at another point has just succeeded."""
    training = Training.of(lambda p: gen_sgd(p, mode=mode, rule="published", period=1))
    training.train(3)
    lr = training.optimizer.get_last_lr()
    present = training.model[0].weight

    def refuse(self: Training) -> None:
        if self.optimizer.is_probing and not torch.equal(present, at_first_call[0]):
            raise ValueError("scale must be positive")
        if not self.optimizer.is_probing:
            at_first_call[:] = [present.detach().clone()]

    at_first_call: list[Tensor] = []
    training.before_return = refuse
    with pytest.warns(UserWarning, match="a probe of GeNOptimizer raised ValueError: scale must be positive"):
        training.train(1)
    record = training.optimizer.last_probe
    assert record.step == 4
    assert math.inf in record.losses
    assert training.optimizer.get_last_lr() == lr  # the published rule keeps it
    training.train(2)  # warned of once
    training.before_return = lambda self: None
    assert training.train(20)[-1] < 1.0


# --- writes between steps ---------------------------------------------------------------------------------------------


def test_a_clamp_after_each_step_is_part_of_the_step() -> None:
    training = Training.of(looking)
    history = History()
    training.optimizer.register_probe_hook(history)
    for _ in range(12):
        training.train(1)
        with torch.no_grad():
            for each in training.model.parameters():
                each.clamp_(-0.4, 0.4)
    assert [record.step for record in history] == list(range(3, 13))  # one is missed before it is allowed


def clamped(training: Training, steps: int, *, averaged: bool = False) -> None:
    for _ in range(steps):
        training.train(1)
        if averaged:
            with training.optimizer.averaged():
                pass
        with torch.no_grad():
            for each in training.model.parameters():
                each.clamp_(-0.4, 0.4)


def test_copies_of_a_loop_that_clamps_go_on_to_the_bit() -> None:
    training = Training.of(looking)
    clamped(training, 6)
    twins = list(copies(training))
    records = [records_of(each) for each in (training, *twins)]
    for each in (training, *twins):
        clamped(each, 3)
    assert [record.step for record in records[0]] == [7, 8, 9]
    assert records[1:] == records[:1] * 2


def test_averaged_weights_before_a_clamp_do_not_end_probing() -> None:
    training = Training.of(looking)
    history = History()
    training.optimizer.register_probe_hook(history)
    clamped(training, 12, averaged=True)
    assert [record.step for record in history] == list(range(3, 13))


class Masked(nn.Module):
    """A network with a mask of −∞ that is a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.network, self.mask = mlp(), nn.Parameter(torch.tensor([0.0, -math.inf]))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.network(inputs) * self.mask.softmax(0)[0]


def test_parameters_that_are_infinite_on_purpose_are_resumed_to_the_bit() -> None:
    original, resumed = Training.of(looking, Masked()), Training.of(looking, Masked())
    original.train(6)
    resumed.model.load_state_dict(original.model.state_dict())
    resumed.optimizer.load_state_dict(copy.deepcopy(original.optimizer.state_dict()))
    assert resumed.train(3) == original.train(3)
    assert resumed.optimizer.last_probe == original.optimizer.last_probe
    assert math.isfinite(resumed.optimizer.last_probe.slope)
