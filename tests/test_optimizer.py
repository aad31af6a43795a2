"""The lifecycle of a step: every statement that the class makes of it."""

from __future__ import annotations

import copy
import functools
import gc
import math
import random
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, SparseAdam
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from gen_optim import GeNOptimizer, History, LookAhead, ProbeStatus, PublishedRule, RelaxedRule
from gen_optim.measurement.interpolation import Interpolation
from tests.training import Training, gen_adamw, gen_sgd, mlp, parameters_of, regression_data, same


def published(parameters: Any, **options: Any) -> GeNOptimizer:
    """Probes at every step if ``period=1``, along the step that is about to be taken."""
    return gen_sgd(parameters, mode="approximate", rule="published", **options)


# --- an optimizer like any other ------------------------------------------------------------------------------------


def test_it_is_a_torch_optimizer_that_shares_all_with_its_base() -> None:
    base = AdamW(mlp().parameters())
    optimizer = GeNOptimizer(base)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups is base.param_groups
    assert optimizer.state is base.state
    assert optimizer.defaults is base.defaults


def test_training_lowers_the_loss_and_returns_it() -> None:
    training = Training.of(gen_adamw)
    expected = training.loss().item()
    losses = training.train(60)
    assert losses[0] == expected
    assert losses[-1] < 0.5 * losses[0]


def test_hooks_fire_once_a_step_and_global_ones_for_wrapper_and_base() -> None:
    calls: list[str] = []
    training = Training.of(gen_sgd)
    training.optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    training.optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    training.optimizer.base_optim.register_step_post_hook(lambda *_: calls.append("base"))
    handles = [
        register_optimizer_step_pre_hook(lambda opt, *_: calls.append(f"global {type(opt).__name__}")),
        register_optimizer_step_post_hook(lambda opt, *_: calls.append(f"after {type(opt).__name__}")),
    ]
    try:
        training.train(1)
    finally:
        for handle in handles:
            handle.remove()
    inner = ["global SGD", "after SGD", "base"]  # its own are called when the step has been taken
    assert calls == ["global GeNOptimizer", "pre", *inner, "post", "after GeNOptimizer"]


def test_zero_grad() -> None:
    training = Training.of(gen_sgd)
    training.loss().backward()
    training.optimizer.zero_grad(set_to_none=False)
    assert all(not parameter.grad.any() for parameter in training.model.parameters())
    training.optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in training.model.parameters())


def test_repr_begins_with_what_it_is_doing_and_shows_no_internals() -> None:
    layers = mlp()
    groups = [{"params": layers[0].parameters(), "lr": 1e-3}, {"params": layers[-1].parameters(), "lr": 2e-3}]
    training = Training.of(lambda _: GeNOptimizer(torch.optim.SGD(groups, momentum=0.9), period=4), layers)
    optimizer = training.optimizer
    assert repr(optimizer).splitlines() == [
        "GeNOptimizer (",
        "    learning rate: 0.001, 0.002",
        "    status: nothing measured yet",
        "    step: 0",
        "    base: SGD",
        "    mode: LookBack(tolerance=8.0)",
        "    rule: RelaxedRule",
        "    period: 4",
        *("Parameter Group 0", *(f"    {key}: {value}" for key, value in sorted(sgd_options(optimizer).items()))),
        *("Parameter Group 1", *(f"    {key}: {value}" for key, value in sorted(sgd_options(optimizer).items()))),
        ")",
    ]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    training.train(2, scheduler)
    lines = repr(optimizer).splitlines()
    rates = ", ".join(f"{each:.3g}" for each in optimizer.get_last_lr())
    found = optimizer.last_probe.lr_after
    assert lines[1] == f"    learning rate: {rates} ({found:.3g} found, times the scheduler's factor)"
    assert lines[2] == f"    status: {optimizer.last_probe.status.value} at step {optimizer.last_probe.step}"
    assert lines[3] == "    step: 2"
    optimizer.load_state_dict(optimizer.state_dict())
    assert repr(optimizer).splitlines()[2] == "    status: nothing measured since it was loaded"


def test_repr_shows_the_options_of_the_rule_that_are_not_its_defaults() -> None:
    optimizer = gen_sgd([torch.nn.Parameter(torch.ones(1))], rule="published", smoothing=0.5, period=2)
    assert "    rule: PublishedRule(smoothing=0.5)\n    period: 2\n" in repr(optimizer)


def sgd_options(optimizer: GeNOptimizer) -> dict[str, Any]:
    return {name: value for name, value in optimizer.defaults.items() if name != "lr"}


def test_no_module_is_left_with_a_hook_and_no_function_of_torch_replaced() -> None:
    functions = torch.autograd.backward, torch.nn.Module.zero_grad, torch.optim.Optimizer.zero_grad
    training = Training.of(gen_sgd)
    training.train(4)
    assert (torch.autograd.backward, torch.nn.Module.zero_grad, torch.optim.Optimizer.zero_grad) == functions
    assert not torch.nn.modules.module._global_forward_pre_hooks


# --- how often things are called ------------------------------------------------------------------------------------


def test_the_base_optimizer_steps_once_a_step() -> None:
    training = Training.of(gen_adamw)
    training.train(7)
    assert {int(state["step"]) for state in training.optimizer.state.values()} == {7}


def test_a_lazy_step_calls_the_closure_once_and_a_probe_step_three_times() -> None:
    training = Training.of(lambda parameters: published(parameters, period=4))
    calls, history = [], History()
    training.optimizer.register_probe_hook(history)
    for _ in range(20):
        before = training.calls
        training.train(1)
        calls.append(training.calls - before)
    assert 4 <= len(history) <= 7
    expected = [3 if step in history.column("step") else 1 for step in range(1, 21)]
    assert calls == [expected[0] + 1, *expected[1:]]  # one more in the first step, to compare
    assert training.probes == 2 * len(history) + 1


def test_gradients_are_enabled_in_the_first_call_only_and_absent_in_probes() -> None:
    seen: list[tuple[bool, bool, bool]] = []
    training = Training.of(published)
    training.before_return = lambda self: seen.append(
        (self.optimizer.is_probing, torch.is_grad_enabled(), any(p.grad is not None for p in self.model.parameters()))
    )
    with torch.no_grad():
        training.train(1)
        assert not torch.is_grad_enabled()
    assert seen == [(False, True, False)] + [(True, False, False)] * 3
    assert not training.optimizer.is_probing


def test_the_losses_probed_are_those_along_the_step() -> None:
    training = Training.of(lambda parameters: published(parameters, lr=0.05))
    start = copy.deepcopy(training.model)
    training.train(1)
    bare = Training.of(lambda parameters: SGD(parameters, lr=0.05, momentum=0.9), start)
    before = parameters_of(start)
    bare.train(1)
    after = parameters_of(start)
    record = training.optimizer.last_probe
    assert record.multiples == (-1.0, 0.0, 1.0)
    for multiple, loss in zip(record.multiples, record.losses, strict=True):
        with torch.no_grad():
            for parameter, begin, end in zip(start.parameters(), before, after, strict=True):
                parameter.copy_(torch.lerp(begin, end, multiple))
            assert float(bare.loss()) == pytest.approx(loss, rel=1e-6)
    low, here, high = record.losses
    assert record.slope == pytest.approx((low - high) / (2 * 0.05), rel=1e-9)
    assert record.curvature == pytest.approx((low - 2 * here + high) / 0.05**2, rel=1e-9)
    assert record.optimal_lr == pytest.approx(record.slope / record.curvature)
    assert (record.step, record.lr_before, record.factor) == (1, 0.05, 1.0)


# --- forms of closures ----------------------------------------------------------------------------------------------


def steps_equal(make_step: Any, steps: int = 5, **options: Any) -> bool:
    """Whether ``make_step(training)()`` trains exactly as the standard closure does."""
    standard, other = (Training.of(lambda parameters: gen_adamw(parameters, **options)) for _ in range(2))
    step = make_step(other)
    for _ in range(steps):
        standard.train(1)
        step()
    return same(parameters_of(standard.model), parameters_of(other.model))


def test_a_closure_that_only_returns_the_loss() -> None:
    assert steps_equal(lambda training: lambda: training.optimizer.step(training.loss))


def test_a_closure_that_zeroes_and_only_returns_the_loss() -> None:
    def make_step(training: Training) -> Any:
        def closure() -> Tensor:
            training.optimizer.zero_grad(set_to_none=False)
            return training.loss()

        return lambda: training.optimizer.step(closure)

    assert steps_equal(make_step)


def test_a_closure_that_assigns_gradients_itself() -> None:
    def make_step(training: Training) -> Any:
        def closure() -> Tensor:
            loss = training.loss()
            if not training.optimizer.is_probing:
                parameters = list(training.model.parameters())
                for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                    parameter.grad = gradient
            return loss.detach()

        return lambda: training.optimizer.step(closure)

    assert steps_equal(make_step)


def test_fresh_gradients_of_the_caller_are_used_by_a_closure_that_only_returns_the_loss() -> None:
    training = Training.of(lambda p: GeNOptimizer(SGD(p, lr=0.1), mode="approximate", rule="published", lr_max=0.1))
    before = parameters_of(training.model)
    for parameter in training.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    training.optimizer.step(training.loss)
    lr = training.optimizer.get_last_lr()[0]
    for parameter, start in zip(training.model.parameters(), before, strict=True):
        assert torch.allclose(parameter, start - lr)


def test_gradients_used_by_the_last_step_are_not_used_again() -> None:
    def make_step(training: Training) -> Any:
        forms = iter([training.closure, training.loss, training.loss, training.closure, training.loss])
        return lambda: training.optimizer.step(next(forms))

    assert steps_equal(make_step)


def test_a_probe_beside_gradients_of_the_caller() -> None:
    def make_step(training: Training) -> Any:
        def step() -> None:
            training.optimizer.zero_grad()
            training.loss().backward()
            training.optimizer.step(probe=training.loss)

        return step

    assert steps_equal(make_step)


def test_a_probe_is_called_on_probe_steps_alone_and_lazy_steps_return_none() -> None:
    training = Training.of(lambda parameters: published(parameters, period=3))
    returned = []
    for _ in range(4):
        training.optimizer.zero_grad()
        training.loss().backward()
        training.calls = 0
        returned.append((training.optimizer.step(probe=training.loss), training.calls))
    assert [calls for _, calls in returned] == [4, 0, 0, 3]
    assert [loss is None for loss, _ in returned] == [False, True, True, False]


def test_a_probe_next_to_a_closure_is_what_gets_probed() -> None:
    training, other = Training.of(published), regression_data(size=8)
    calls = 0

    def probe() -> Tensor:
        nonlocal calls
        calls += 1
        return nn.functional.mse_loss(training.model(other[0]), other[1])

    with torch.no_grad():
        expected = probe()
    loss = training.optimizer.step(training.closure, probe=probe)
    assert training.calls == 1
    assert calls == 5  # one of them above, one to compare
    assert training.optimizer.last_probe.losses[1] == pytest.approx(float(expected))
    assert loss.item() != pytest.approx(float(expected))


def test_closure_and_probe_of_the_constructor() -> None:
    def make_step(training: Training) -> Any:
        training.optimizer.closure = training.closure
        return training.optimizer.step

    assert steps_equal(make_step)

    def make_probing_step(training: Training) -> Any:
        training.optimizer.probe = training.loss

        def step() -> None:
            training.optimizer.zero_grad()
            training.loss().backward()
            training.optimizer.step()

        return step

    assert steps_equal(make_probing_step)
    model = mlp()
    optimizer = gen_sgd(model.parameters(), closure=(closure := lambda: 1.0), probe=(probe := lambda: 2.0))
    assert (optimizer.closure, optimizer.probe) == (closure, probe)


def test_with_neither_it_is_the_base_optimizers_step() -> None:
    wrapped, bare = Training.of(gen_sgd), Training.of(lambda parameters: SGD(parameters, lr=0.1, momentum=0.9))
    for training in (wrapped, bare, wrapped, bare):
        training.optimizer.zero_grad()
        training.loss().backward()
        assert training.optimizer.step() is None
    assert same(parameters_of(wrapped.model), parameters_of(bare.model))
    assert wrapped.optimizer.last_probe is None


def test_ten_steps_with_neither_are_warned_of_once() -> None:
    training = Training.of(gen_sgd)

    def train_bare(steps: int) -> None:
        for _ in range(steps):
            training.optimizer.zero_grad()
            training.loss().backward()
            training.optimizer.step()

    train_bare(9)
    with pytest.warns(UserWarning, match="10 steps without a closure or a probe") as caught:
        train_bare(1)
    assert caught[0].filename == __file__
    train_bare(20)


def test_ten_steps_in_which_everything_is_frozen_are_warned_of_once() -> None:
    training = Training.of(lambda parameters: GeNOptimizer(SGD(parameters, lr=0.0)))
    before = parameters_of(training.model)
    training.train(9)
    with pytest.warns(
        UserWarning, match="10 steps in which the learning rates of all parameter groups are 0"
    ) as caught:
        training.train(1)
    assert len(caught) == 1
    training.train(20)
    assert same(before, parameters_of(training.model))


def test_freezing_everything_later_is_no_mistake() -> None:
    training = Training.of(gen_sgd)
    training.train(3)
    training.optimizer.param_groups[0]["lr"] = 0.0
    training.train(20)


def test_bare_steps_are_no_mistake_where_something_has_been_measured() -> None:
    training = Training.of(gen_sgd)
    training.train(1)
    for _ in range(20):
        training.optimizer.step()


@pytest.mark.parametrize("mode", ["lookback", "approximate"])
def test_hooks_of_the_base_optimizer_see_the_steps_that_are_taken(mode: str) -> None:
    training = Training.of(lambda parameters: gen_sgd(parameters, mode=mode, burn_in=3, period=2))
    seen: list[list[Tensor]] = []

    def look(base: Any, args: Any, kwargs: Any) -> None:
        assert base is training.optimizer.base_optim
        assert (args, kwargs) == ((base,), {})
        seen.append(parameters_of(training.model))

    training.optimizer.base_optim.register_step_post_hook(look)
    after: list[list[Tensor]] = []
    for _ in range(8):
        training.train(1)
        after.append(parameters_of(training.model))
    assert len(seen) == 8
    assert all(map(same, seen, after))


@pytest.mark.parametrize("mode", ["lookback", "approximate"])
def test_hooks_of_the_base_optimizer_see_the_learning_rate_in_force(mode: str) -> None:
    training = Training.of(lambda parameters: gen_sgd(parameters, mode=mode, burn_in=3, period=2))
    scheduler = torch.optim.lr_scheduler.LinearLR(training.optimizer, 0.5, 1.0, total_iters=10)
    seen: list[float] = []
    training.optimizer.base_optim.register_step_post_hook(lambda base, *_: seen.append(base.param_groups[0]["lr"]))
    in_force = []
    for _ in range(8):
        training.train(1)
        in_force += training.optimizer.get_last_lr()
        scheduler.step()
    assert seen == in_force


def test_hooks_of_the_base_optimizer_are_not_called_where_no_start_was_found() -> None:
    training = Training.of(gen_sgd)
    calls: list[int] = []
    training.optimizer.base_optim.register_step_post_hook(lambda *_: calls.append(training.calls))
    for _ in range(3):
        training.optimizer.step(lambda: training.closure().detach() + 1e6)
    assert training.optimizer.last_probe.status is ProbeStatus.START_FAILED
    assert calls == []


@pytest.mark.parametrize("mode", ["lookback", "approximate"])
def test_a_base_that_wraps_another_and_skips_the_set_up_of_hooks(mode: str) -> None:
    class Around(torch.optim.Optimizer):
        def __init__(self, inner: torch.optim.Optimizer) -> None:
            self.inner, self.param_groups = inner, inner.param_groups
            self.state, self.defaults = inner.state, inner.defaults

        def zero_grad(self, set_to_none: bool = True) -> None:
            self.inner.zero_grad(set_to_none)

        def step(self, closure: Any = None) -> Any:
            return self.inner.step(closure)

    around = Training.of(lambda parameters: GeNOptimizer(Around(SGD(parameters, lr=0.1)), mode=mode))
    plain = Training.of(lambda parameters: GeNOptimizer(SGD(parameters, lr=0.1), mode=mode))
    assert around.train(10) == plain.train(10)


@pytest.mark.parametrize("mode", ["lookback", "approximate"])
def test_what_a_hook_of_the_base_optimizer_writes_stays_within_its_bounds_from_the_first_step_on(mode: str) -> None:
    training = Training.of(lambda parameters: gen_sgd(parameters, mode=mode, period=1))
    free = Training.of(lambda parameters: gen_sgd(parameters, mode=mode, period=1))
    bound = max(each.abs().max().item() for each in training.model.parameters())

    def clamp(*_: object) -> None:
        with torch.no_grad():
            for each in training.model.parameters():
                each.clamp_(-bound, bound)

    training.optimizer.base_optim.register_step_post_hook(clamp)
    training.train(1), free.train(1)
    # The start is searched along the optimizer's direction, not along what is left of it between bounds.
    assert training.optimizer.last_probe.optimal_lr == free.optimizer.last_probe.optimal_lr
    for _ in range(20):
        training.train(1)
        assert max(each.abs().max().item() for each in training.model.parameters()) <= bound


@pytest.mark.parametrize(
    "convert", [torch.Tensor.item, lambda loss: loss.reshape(1, 1), lambda loss: loss.to("cpu", torch.float64)]
)
def test_a_loss_may_be_a_float_or_any_one_element_tensor(convert: Any) -> None:
    training = Training.of(gen_sgd)

    def closure() -> Any:
        return convert(training.closure())

    losses = [torch.as_tensor(training.optimizer.step(closure)).item() for _ in range(10)]
    assert losses[-1] < losses[0]
    assert training.optimizer.last_probe.status is not ProbeStatus.START_FAILED


@pytest.mark.parametrize(
    ("returned", "came"),
    [
        (None, "returned None"),
        (torch.zeros(3), r"shape \(3,\)"),
        ("loss", "type str"),
        (True, "type bool"),
        (torch.tensor(1), "torch.int64"),
        (torch.tensor(1j), "torch.complex64"),
    ],
)
def test_anything_else_is_a_type_error_that_names_the_closure(returned: Any, came: str) -> None:
    training = Training.of(gen_sgd)
    before = parameters_of(training.model)
    with pytest.raises(TypeError, match=f"closure must return the loss .*{came}"):
        training.optimizer.step(lambda: returned)
    assert same(parameters_of(training.model), before)
    training.loss().backward()
    with pytest.raises(TypeError, match=f"probe must return the loss .*{came}"):
        training.optimizer.step(probe=lambda: returned)


def test_a_loss_without_a_graph_and_without_gradients_is_an_error_that_says_so() -> None:
    training = Training.of(gen_sgd)
    with pytest.raises(TypeError, match="closure must either call backward"):
        training.optimizer.step(lambda: training.loss().item())
    with pytest.raises(TypeError, match="closure must be a callable"):
        training.optimizer.step(training.loss())


def test_a_loss_that_differentiates_inside_is_probed() -> None:
    model, points = mlp(), regression_data()[0].requires_grad_()
    optimizer = gen_adamw(model.parameters())

    def closure() -> Tensor:
        optimizer.zero_grad()
        outputs = model(points)
        (slopes,) = torch.autograd.grad(outputs.sum(), points, create_graph=True)
        loss = (outputs - slopes.sum(dim=1, keepdim=True) - 1.0).square().mean()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(20)]
    assert losses[-1] < losses[0]
    assert optimizer.last_probe.status is ProbeStatus.FITTED


def test_accumulation_over_micro_batches_trains_as_the_whole_batch_does() -> None:
    whole, micro = (Training.of(gen_adamw) for _ in range(2))

    def closure() -> Tensor:
        micro.optimizer.zero_grad()
        total = torch.zeros(())
        for inputs, targets in zip(micro.inputs.chunk(4), micro.targets.chunk(4), strict=True):
            loss = nn.functional.mse_loss(micro.model(inputs), targets) / 4
            loss.backward()
            total += loss.detach()
        return total

    for _ in range(10):
        whole.train(1)
        micro.optimizer.step(closure)
        assert micro.optimizer.last_probe.losses == pytest.approx(whole.optimizer.last_probe.losses, rel=1e-5)
    for mine, theirs in zip(micro.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-3, atol=1e-4)


# --- nothing is left behind -----------------------------------------------------------------------------------------


def streams() -> tuple[Any, ...]:
    return (
        random.getstate(),
        [part.tolist() if isinstance(part, np.ndarray) else part for part in np.random.get_state()],
        torch.get_rng_state().tolist(),
    )


def noisy(training: Training) -> None:
    """Draw from every global stream, as augmentation inside a closure does."""
    random.random()
    np.random.rand()
    torch.rand(1)


def test_a_probe_step_leaves_no_trace_but_its_learning_rate() -> None:
    """Probing, with the learning rate held, must equal never probing: parameters, buffers, gradients, streams."""
    runs = []
    for period in (1, 1000):
        model = mlp(dropout=0.5, norm=True)
        training = Training.of(
            lambda parameters, period=period: published(parameters, lr=0.05, lr_min=0.05, lr_max=0.05, period=period),
            model,
        )
        training.before_return = noisy
        torch.manual_seed(1), random.seed(1), np.random.seed(1)
        losses = training.train(6)
        gradients = [parameter.grad for parameter in model.parameters()]
        runs.append((losses, list(model.state_dict().values()), gradients, streams(), training.probes))
    (losses, tensors, gradients, drawn, probes), (other_losses, other_tensors, other_gradients, other_drawn, few) = runs
    assert (probes, few) == (13, 3)
    assert losses == other_losses
    assert same(tensors, other_tensors)
    assert same(gradients, other_gradients)
    assert drawn == other_drawn


def test_all_probes_see_the_dropout_masks_of_the_first_call() -> None:
    masks: list[Tensor] = []
    training = Training.of(published, mlp(dropout=0.5))
    training.model[3].register_forward_hook(lambda module, args, output: masks.append(output == 0))
    training.train(1)
    assert len(masks) == 4
    assert same(masks[:1] * 3, masks[1:])


@pytest.mark.parametrize("failing", [2, 3])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("as_probe", [False, True])
def test_an_exception_in_a_probe_ends_the_step_as_a_lazy_one(
    failing: int, error: type[BaseException], as_probe: bool
) -> None:
    def run(rule: str, fail: bool) -> tuple[Training, Any]:
        period = 3 if rule == "published" else 1
        training = Training.of(
            lambda p: gen_adamw(p, mode="approximate", rule="published", period=period), mlp(dropout=0.5, norm=True)
        )
        torch.manual_seed(1), random.seed(1), np.random.seed(1)
        training.train(3)
        training.calls = 0
        if fail:

            def raise_at(self: Training) -> None:
                noisy(self)
                if self.calls >= failing:
                    raise error("on purpose")

            training.before_return = raise_at
        else:
            training.before_return = noisy
        return training, training.optimizer

    failed, optimizer = run("published", fail=True)
    if as_probe:
        optimizer.zero_grad()
        failed.loss().backward()
        failed.calls = 1 if failing == 2 else 0
    history = History()
    optimizer.register_probe_hook(history)
    record = optimizer.last_probe
    with pytest.raises(error, match="on purpose"):
        optimizer.step(probe=failed.loss) if as_probe else optimizer.step(failed.closure)

    lazy, lazy_optimizer = run("published", fail=False)
    lazy_optimizer.probe = lazy_optimizer.closure = None
    lazy_optimizer.zero_grad()
    loss = lazy.loss()
    loss.backward()
    lazy_optimizer.step()  # neither closure nor probe: the base optimizer's step

    assert same(list(failed.model.state_dict().values()), list(lazy.model.state_dict().values()))
    assert same([p.grad for p in failed.model.parameters()], [p.grad for p in lazy.model.parameters()])
    assert {int(state["step"]) for state in optimizer.state.values()} == {4}
    assert optimizer.last_probe is record
    assert len(history) == 0
    assert not optimizer.is_probing
    state = streams()
    lazy_state = streams()
    assert state == lazy_state
    failed.before_return = lambda self: None
    failed.train(3)  # and it goes on
    assert optimizer.last_probe is not record


@pytest.mark.parametrize("as_probe", [False, True])
def test_an_exception_while_a_start_is_searched_ends_the_step_as_a_lazy_one_and_it_is_searched_again(
    as_probe: bool,
) -> None:
    training, bare = Training.of(gen_adamw), Training.of(lambda parameters: AdamW(parameters, lr=1e-3))
    seen: list[list[Tensor]] = []
    training.optimizer.base_optim.register_step_post_hook(lambda *_: seen.append(parameters_of(training.model)))

    def raise_at(self: Training) -> None:
        if self.calls >= 4:
            raise ValueError("on purpose")

    def step() -> None:
        if as_probe:
            training.optimizer.zero_grad()
            nn.functional.mse_loss(training.model(training.inputs), training.targets).backward()
            training.optimizer.step(probe=training.loss)
        else:
            training.train(1)

    training.before_return = raise_at
    with pytest.raises(ValueError, match="on purpose"):
        step()
    bare.train(1)
    assert same(*seen, parameters_of(training.model))
    torch.testing.assert_close(*seen, parameters_of(bare.model))  # read off a longer step
    training.before_return = lambda self: None
    step()
    assert training.optimizer.last_probe.status is ProbeStatus.STARTED


def test_an_exception_in_the_first_call_moves_nothing_and_acts_as_on_the_bare_optimizer() -> None:
    wrapped, bare = Training.of(gen_adamw, mlp(norm=True)), Training.of(AdamW, mlp(norm=True))
    wrapped.train(2)
    bare.model.load_state_dict(wrapped.model.state_dict())
    state, before = copy.deepcopy(wrapped.optimizer.state_dict()), parameters_of(wrapped.model)

    def fail(self: Training) -> None:
        noisy(self)
        raise ValueError("on purpose")

    drawn = []
    for training in (wrapped, bare):
        torch.manual_seed(1), random.seed(1), np.random.seed(1)
        training.before_return = fail
        with pytest.raises(ValueError, match="on purpose"):
            training.train(1)
        drawn.append(streams())
    assert same(parameters_of(wrapped.model), before)
    assert str(wrapped.optimizer.state_dict()) == str(state)
    # A closure that draws another sample after a bad one must get another one.
    assert drawn[0] == drawn[1]
    assert same(list(wrapped.model.buffers()), list(bare.model.buffers()))


@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("where", ["step", "arrive"])
def test_an_exception_between_the_bases_step_and_the_probes_leaves_the_parameters(
    where: str, steps_before: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of memory, say; at the first step the base optimizer steps far, and there is the way back to go."""
    training = Training.of(lambda parameters: gen_adamw(parameters, mode="approximate"))
    training.train(steps_before)
    before, lr = parameters_of(training.model), training.optimizer.param_groups[0]["lr"]
    base_step = training.optimizer.base_optim.step

    def fail(*_: Any, **__: Any) -> None:
        base_step()
        raise MemoryError("on purpose")

    if where == "step":
        monkeypatch.setattr(training.optimizer.base_optim, "step", fail)
    else:
        monkeypatch.setattr(Interpolation, "arrive", fail)
    with pytest.raises(MemoryError, match="on purpose"):
        training.train(1)
    assert same(parameters_of(training.model), before)
    assert training.optimizer.param_groups[0]["lr"] == lr
    monkeypatch.undo()
    losses = training.train(40)
    assert losses[-1] < losses[0]


def test_an_exception_in_the_bases_step_keeps_the_learning_rate() -> None:
    model = mlp()
    optimizer = GeNOptimizer(SparseAdam(model.parameters(), lr=0.01))
    training = Training(model, optimizer, *regression_data())
    with pytest.raises(RuntimeError, match="dense gradients"):
        training.train(1)
    assert optimizer.param_groups[0]["lr"] == 0.01


def train_two_networks(*, goes_backward: bool) -> list[Tensor]:
    """A sum of two networks, each with an optimizer and a loss of its own, in turn."""
    networks = mlp(seed=1), mlp(seed=2)
    optimizers = [gen_adamw(network.parameters()) for network in networks]
    inputs, targets = regression_data()

    def closure(which: int) -> Tensor:
        outputs = [network(inputs) for network in networks]
        loss = (outputs[0] + outputs[1] - targets).square().mean() + 0.1 * outputs[which].square().mean()
        if goes_backward:
            optimizers[which].zero_grad()
            loss.backward()
        return loss

    for _ in range(6):
        for which, optimizer in enumerate(optimizers):
            optimizer.step(functools.partial(closure, which))
    return [value for network in networks for value in parameters_of(network)]


def test_two_optimizers_with_closures_that_only_return_the_loss_do_not_mix_their_gradients() -> None:
    assert same(train_two_networks(goes_backward=True), train_two_networks(goes_backward=False))


def test_the_copies_of_a_probe_step_are_freed_when_it_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[weakref.ref[Tensor]] = []
    arrive = Interpolation.arrive

    def spy(move: Interpolation) -> None:
        arrive(move)
        copies.extend(weakref.ref(each) for group in (*move._before, *move._after) for each in group)

    monkeypatch.setattr(Interpolation, "arrive", spy)
    training = Training.of(lambda parameters: gen_sgd(parameters, mode="approximate"))
    gc.disable()
    try:
        training.train(3)
        assert len(copies) == 3 * 2 * 4
        assert all(copy() is None for copy in copies)
    finally:
        gc.enable()


def test_gradients_outside_the_optimizer_survive_a_closure_that_zeroes_both_networks() -> None:
    generator, critic = mlp(), nn.Linear(1, 1)
    other = SGD(critic.parameters(), lr=0.1)
    optimizer = published(generator.parameters(), modules=critic)
    inputs, _ = regression_data()
    seen = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        other.zero_grad()
        loss = -critic(generator(inputs)).mean()
        loss.backward()
        seen.append([parameter.grad for parameter in critic.parameters()])
        return loss

    optimizer.step(closure)
    assert seen[1:] == [[None, None]] * 3
    assert all(mine.grad is theirs for mine, theirs in zip(critic.parameters(), seen[0], strict=True))


# --- options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "newton"}, "mode must be one of 'lookback', 'approximate', 'exact', or a Mode, got 'newton'"),
        ({"rule": "best"}, "rule must be one of 'relaxed', 'published', or a Rule, got 'best'"),
        ({"period": 0}, "period must be a whole number of at least 1, got 0"),
        ({"lr_min": -1.0}, "lr_min must be"),
        ({"lr_min": 1.0, "lr_max": 0.5}, "lr_max must be at least lr_min"),
        ({"lr_max": True}, "lr_max must be a number"),
        ({"rule": RelaxedRule(), "period": 4}, r"period must be given to the rule .* rule=RelaxedRule\(period=4\)"),
        ({"rule": PublishedRule(), "lr_max": 1.0}, r"lr_max must be given to the rule"),
    ],
)
def test_an_option_out_of_range_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GeNOptimizer(SGD(mlp().parameters(), lr=0.1), **options)


def test_types_are_checked() -> None:
    model = mlp()
    with pytest.raises(TypeError, match=r"base_optim must be a torch.optim.Optimizer.*got Sequential"):
        GeNOptimizer(model)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="another GeNOptimizer"):
        GeNOptimizer(gen_sgd(model.parameters()))
    with pytest.raises(TypeError, match="closure must be a callable"):
        gen_sgd(model.parameters(), closure=1.0)
    with pytest.raises(TypeError, match="probe must be a callable"):
        gen_sgd(model.parameters(), probe=1.0)
    with pytest.raises(TypeError, match="hook must be a callable"):
        gen_sgd(model.parameters()).register_probe_hook(3)
    with pytest.raises(TypeError, match="got the class History"):
        gen_sgd(model.parameters()).register_probe_hook(History)
    for name, value in (("mode", ["exact"]), ("rule", 3), ("modules", [model, "model"]), ("offload_copies", "cpu")):
        with pytest.raises(TypeError, match=f"{name} must be "):
            GeNOptimizer(SGD(model.parameters(), lr=0.1), **{name: value})
    with pytest.raises(RuntimeError, match=r"outside of torch\.inference_mode"), torch.inference_mode():
        gen_sgd(model.parameters()).step(lambda: 1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -0.1}, r"param_groups\[1\]\['lr'\] must be a finite number of at least 0, got -0.1"),
        ({"lr": None}, r"param_groups\[1\]\['lr'\] must be a finite number of at least 0, got None"),
        ({"lr": math.inf}, r"param_groups\[1\]\['lr'\] must be a finite number"),
        ({"maximize": True}, "same maximize in all groups"),
        ({"differentiable": True}, r"param_groups\[1\] has differentiable=True"),
    ],
)
def test_a_group_that_cannot_be_trained_is_not_added(options: dict[str, Any], message: str) -> None:
    training = Training.of(lambda parameters: gen_sgd(parameters[:2]))
    group = {"params": [training.model[4].weight], **options}
    with pytest.raises(ValueError, match=message):
        training.optimizer.add_param_group(group)
    assert len(training.optimizer.param_groups) == 1
    training.train(3)


def test_parameters_of_an_added_group_may_come_one_by_one() -> None:
    training = Training.of(lambda parameters: gen_sgd(parameters[:2]))
    with pytest.raises(ValueError, match="meta device"):
        training.optimizer.add_param_group({"params": iter([torch.zeros(1, device="meta", requires_grad=True)])})
    training.optimizer.add_param_group({"params": (each for each in training.model[4].parameters())})
    assert len(training.optimizer.param_groups[1]["params"]) == 2
    training.train(3)


def test_a_group_added_to_the_base_with_a_learning_rate_below_zero_is_noticed_at_the_next_step() -> None:
    training = Training.of(lambda parameters: gen_sgd(parameters[:2]))
    training.optimizer.base_optim.add_param_group({"params": [training.model[4].weight], "lr": -1.0})
    with pytest.raises(ValueError, match=r"param_groups\[1\]\['lr'\] must be a finite number of at least 0, got -1.0"):
        training.train(1)


def test_what_cannot_be_changed_later_is_read_only() -> None:
    optimizer = GeNOptimizer(SGD(mlp().parameters(), lr=0.1), mode="approximate", rule="published", period=4)
    assert isinstance(optimizer.mode, LookAhead)
    assert optimizer.rule == PublishedRule(period=4)
    for name in ("mode", "rule", "modules"):
        with pytest.raises(AttributeError):
            setattr(optimizer, name, "other")


def test_numbers_of_numpy_do_not_reach_checkpoints() -> None:
    options = {"smoothing": np.float32(0.5), "period": np.int64(4), "lr_max": np.float64(1.0)}
    training = Training.of(lambda parameters: gen_sgd(parameters, **options))
    training.train(3)
    assert {type(v) for k, v in training.optimizer.param_groups[0].items() if k.startswith("gen_")} <= {
        int,
        float,
        bool,
    }


def test_a_closure_set_later_is_checked_too() -> None:
    training = Training.of(gen_sgd)
    training.optimizer.closure = 3
    with pytest.raises(TypeError, match="closure must be a callable"):
        training.optimizer.step()


@pytest.mark.parametrize("lr", [1e-7, 10.0])
def test_a_start_that_fails_takes_no_step_warns_at_length_and_goes_on_trying(lr: float) -> None:
    training = Training.of(lambda parameters: gen_adamw(parameters, lr=lr))
    before = parameters_of(training.model)
    offset = 1e6  # in float32 it drowns what training changes

    def closure() -> Tensor:
        return training.closure().detach() + offset

    for _ in range(9):
        training.optimizer.step(closure)
    training.optimizer.register_step_post_hook(lambda *_: None)  # through torch's own lines
    torch.optim.lr_scheduler.ConstantLR(training.optimizer, factor=1.0)
    with pytest.warns(UserWarning, match="found no learning rate that lowers the loss in 10 steps") as caught:
        training.optimizer.step(closure)
    assert caught[0].filename == __file__
    training.optimizer.step(closure)
    assert training.optimizer.last_probe.status is ProbeStatus.START_FAILED
    assert same(parameters_of(training.model), before)
    assert training.optimizer.get_last_lr() == [0.0]
    assert training.optimizer.param_groups[0]["lr"] == lr
    offset = 0.0
    training.optimizer.step(closure)
    assert training.optimizer.last_probe.status is ProbeStatus.STARTED


def test_gradients_however_small_find_a_start() -> None:
    training = Training.of(lambda parameters: GeNOptimizer(SGD(parameters, lr=0.1)))

    def closure() -> Tensor:
        training.optimizer.zero_grad()
        loss = 1e-12 * training.loss()
        loss.backward()
        return loss

    losses = [training.optimizer.step(closure).item() for _ in range(40)]
    assert losses[-1] < 0.5 * losses[0]


def test_limits_of_the_learning_rate_hold() -> None:
    training = Training.of(lambda parameters: gen_adamw(parameters, lr_min=1e-4, lr_max=2e-4))
    for _ in range(20):
        training.train(1)
        assert 1e-4 <= training.optimizer.get_last_lr()[0] <= 2e-4


def test_any_start_is_as_good_as_another() -> None:
    finals = []
    for lr in (1e-7, 1e-3, 10.0):
        training = Training.of(lambda parameters, lr=lr: gen_adamw(parameters, lr=lr))
        finals.append(training.train(150)[-1])
    assert max(finals) <= 1.1 * min(finals)
    assert finals[0] < 0.1
