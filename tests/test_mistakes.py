"""What is easily done wrong is answered once: by the step, the numbers, what they mean and what to do."""

from __future__ import annotations

import itertools
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from gen_optim import GeNOptimizer, ProbeStatus, RelaxedRule
from gen_optim.integrations.micro_batches import MicroBatches
from gen_optim.warning import PATIENCE
from tests.training import Training, gen_adamw, gen_sgd, looking, mlp, parameters_of, same

# --- the constructor -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"base_optim": iter(())},
            r"must be a torch.optim.Optimizer, got .*iterator\. .*GeNOptimizer\(torch.optim.AdamW",
        ),
        ({"base_optim": [nn.Parameter(torch.ones(1))]}, r"got list\. .*GeNOptimizer\(torch.optim.AdamW"),
        ({"base_optim": [nn.Parameter(torch.ones(1))], "lr": 1e-3}, r"no option 'lr'\. .*AdamW\(.*, lr=0.001\)\)"),
        ({"base_optim": SGD}, r"got the class SGD\. .*GeNOptimizer\(torch.optim.AdamW"),
        ({"peroid": 4}, r"no option 'peroid'\. Did you mean 'period'\?"),
        ({"lr": 1e-3}, r"no option 'lr'\. .*AdamW\(model.parameters\(\), lr=0.001\)\)"),
        ({"burn_in": 20}, r"no option 'burn_in'\. It belongs to the rule: .*RelaxedRule\(burn_in=20\)"),
    ],
)
def test_the_constructor_says_what_to_wrap_and_where_options_belong(arguments: dict[str, Any], message: str) -> None:
    base = SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    with pytest.raises(TypeError, match=message):
        GeNOptimizer(**{"base_optim": base, **arguments})


def test_a_constructor_without_arguments_fails_as_any_other() -> None:
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'base_optim'"):
        GeNOptimizer()  # type: ignore[call-arg]


# --- the closure -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "step"), [(gen_sgd, 3), (looking, 2)])  # the first probe step after the first step
def test_a_forgotten_zero_grad_is_warned_of_once(make: Any, step: int) -> None:
    training = Training.of(make)

    def closure() -> Tensor:
        loss = training.loss()
        loss.backward()
        return loss

    for _ in range(step - 1):
        training.optimizer.step(closure)
    with pytest.warns(UserWarning, match=f"At step {step} the closure .*added to the gradients.*zero_grad") as caught:
        training.optimizer.step(closure)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    for _ in range(10):
        training.optimizer.step(closure)


def test_gradients_zeroed_in_any_way_or_accumulated_within_a_step_are_not_warned_of() -> None:
    training = Training.of(looking)

    def in_place() -> Tensor:
        training.optimizer.zero_grad(set_to_none=False)
        loss = training.loss()
        loss.backward()
        return loss

    def in_two_passes() -> Tensor:
        training.optimizer.zero_grad()
        (training.loss() / 2).backward()
        loss = training.loss()
        (loss / 2).backward()
        return loss

    def zeroed_afterwards() -> Tensor:
        loss = training.loss()
        loss.backward()
        return loss

    def another_loss() -> Tensor:  # whose backward pass leaves the gradients of the last step alone
        torch.ones(1, requires_grad=True).sum().backward()
        return in_place()

    for closure in (in_place, in_two_passes, another_loss):
        for _ in range(3):
            training.optimizer.step(closure)
    training.optimizer.zero_grad()
    for _ in range(3):
        training.optimizer.step(zeroed_afterwards)
        training.optimizer.zero_grad()


@pytest.mark.parametrize("make", [gen_sgd, looking])
def test_a_closure_that_steps_the_base_optimizer_is_refused_and_nothing_has_moved(make: Any) -> None:
    training = Training.of(make)
    lazy = make is looking
    if lazy:
        training.train(1)
    before = parameters_of(training.model)

    def closure() -> Tensor:
        loss = training.closure()
        training.optimizer.base_optim.step()
        return loss

    with pytest.raises(RuntimeError, match=re.escape("closure must not step the optimizer, but calls SGD.step()")):
        training.optimizer.step(closure)
    assert same(parameters_of(training.model), before)
    assert not training.optimizer.base_optim._optimizer_step_pre_hooks
    training.train(3)


@pytest.mark.parametrize(("period", "steps"), [(1, 0), (1, 1), (50, 1)], ids=["search", "look back", "lazy"])
def test_a_closure_that_calls_step_is_refused_and_nothing_is_left_behind(period: int, steps: int) -> None:
    training = Training.of(lambda p: gen_sgd(p, mode="lookback", rule=RelaxedRule(burn_in=0, period=period)))
    training.train(steps)

    def closure() -> Tensor:
        loss = training.closure()
        training.optimizer.step()
        return loss

    with pytest.raises(RuntimeError, match=re.escape("closure must not step the optimizer, but calls GeNOptimizer.")):
        training.optimizer.step(closure)
    assert not training.optimizer.base_optim._optimizer_step_pre_hooks
    losses = training.train(12)
    assert losses[-1] < losses[0]


def test_a_closure_that_calls_step_is_refused_while_a_scheduler_stands_at_zero() -> None:
    training = Training.of(gen_sgd)
    training.train(3)
    torch.optim.lr_scheduler.LambdaLR(training.optimizer, lambda step: 0.0)
    with pytest.raises(RuntimeError, match="closure must not step the optimizer"):
        training.optimizer.step(lambda: training.optimizer.step() or training.closure())


def test_a_closure_that_returns_nothing_says_what_else_may_have_passed_it() -> None:
    training = Training.of(gen_sgd)
    with pytest.raises(TypeError, match=r"End it with `return loss`\. If a framework has passed .*manual optimization"):
        training.optimizer.step(lambda: None)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions have notes from Python 3.11 on")
def test_a_closure_that_needs_gradients_in_probes_is_told_that_they_are_absent() -> None:
    training = Training.of(gen_sgd)

    def closure() -> Tensor:
        loss = training.closure()
        torch.nn.utils.clip_grad_value_(training.model.parameters(), 1.0)
        return loss

    with pytest.raises(RuntimeError) as caught:
        training.optimizer.step(closure)
    assert any("gradients absent (None)" in note for note in caught.value.__notes__)


# --- losses and parameters -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spoils", [True, False])
def test_losses_that_stay_nan_are_warned_of_once(spoils: bool) -> None:
    training = Training.of(looking)
    training.train(3)
    if spoils:
        with torch.no_grad():
            training.model[0].weight[0, 0] = float("nan")

    def closure() -> Tensor:
        training.optimizer.zero_grad()
        return training.loss() * float("nan")  # whose gradients the optimizer leaves out

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3 * PATIENCE):
            training.optimizer.step(closure)
    [message] = [str(each.message) for each in caught if "not finite" in str(each.message)]
    assert re.search(r"in 10 probe steps in a row\. At step \d+ it is nan", message)
    assert ("1 of 4 parameters are not finite either: go back" if spoils else "All parameters are finite") in message


def test_a_loss_that_is_not_finite_now_and_then_is_not_warned_of() -> None:
    training = Training.of(lambda parameters: looking(parameters, tolerance=0.0))
    is_bad = False

    def closure() -> Tensor:
        return training.closure() * (float("nan") if is_bad else 1.0)

    for step in range(4 * PATIENCE):
        is_bad = step % 4 == 3
        training.optimizer.step(closure)


def test_a_probe_without_gradients_says_what_to_call_if_no_learning_rate_is_found() -> None:
    training = Training.of(gen_adamw)
    for _ in range(PATIENCE - 1):
        training.optimizer.step(probe=training.loss)
    with pytest.warns(UserWarning, match=r"in 10 steps.*have no gradients: call loss.backward\(\) before step\(probe"):
        training.optimizer.step(probe=training.loss)


def test_parameters_in_float16_are_named_if_no_learning_rate_is_found() -> None:
    training = Training.of(gen_adamw, mlp().half())
    for _ in range(PATIENCE - 1):
        training.optimizer.step(lambda: training.closure().detach().float() + 1e6)
    with pytest.warns(
        UserWarning, match=r"in 10 steps.*at step 10 the loss is 1e\+06\. Parameters are in float16.*autocast"
    ):
        training.optimizer.step(lambda: training.closure().detach().float() + 1e6)
    assert training.optimizer.last_probe.status is ProbeStatus.START_FAILED


def test_a_base_optimizer_whose_moments_became_nan_is_warned_of_though_every_step_is_taken_back() -> None:
    training = Training.of(gen_adamw)
    training.train(5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        training.optimizer.step(lambda: training.loss() * float("nan"))
        before = parameters_of(training.model)
        for parameter in training.model.parameters():
            training.optimizer.base_optim.state[parameter]["exp_avg"].fill_(float("nan"))
        training.train(4 * PATIENCE)
    assert same(parameters_of(training.model), before)
    assert training.optimizer.last_probe.status is ProbeStatus.REVERTED
    assert not any("could not look back" in str(each.message) for each in caught)
    [message] = [str(each.message) for each in caught if "not finite" in str(each.message)]
    assert "takes such steps back, so that training stands still. The base optimizer's state is likely not" in message


# --- batches ---------------------------------------------------------------------------------------------------------


def in_order(count: int, targets: Tensor) -> Iterator[Tensor]:
    """A data set that is sorted by class, in one epoch after another; successive batches share no sample."""
    yield from itertools.islice(itertools.cycle(targets.argsort().split(30)), count)


def overlapping(count: int, targets: Tensor) -> Iterator[Tensor]:
    """Windows of a series, each moved on by a quarter of its length."""
    yield from ((torch.arange(30) + 7 * step) % len(targets) for step in range(count))


def kept_in_part(count: int, targets: Tensor) -> Iterator[Tensor]:
    """Batches of which half was in the batch before."""
    half = torch.randint(len(targets), (15,))
    for _ in range(count):
        last, half = half, torch.randint(len(targets), (15,))
        yield torch.cat([last, half])


def shuffled(count: int, targets: Tensor) -> Iterator[Tensor]:
    for _ in range(1 + count // 20):
        yield from torch.randperm(len(targets)).split(30)


def drawn(count: int, targets: Tensor) -> Iterator[Tensor]:
    yield from (torch.randint(len(targets), (30,)) for _ in range(count))


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    ("order", "base", "expected"),
    [
        (in_order, gen_sgd, 1),  # with AdamW in two runs of three
        (overlapping, gen_sgd, 1),
        (overlapping, gen_adamw, 1),
        (kept_in_part, gen_sgd, 1),  # with AdamW in seven runs of eight
        (shuffled, gen_sgd, 0),
        (shuffled, gen_adamw, 0),
        (drawn, gen_sgd, 0),
        (drawn, gen_adamw, 0),
    ],
)
def test_successive_batches_that_are_alike_are_warned_of_once(
    order: Callable[[int, Tensor], Iterator[Tensor]], base: Callable[..., GeNOptimizer], expected: int, seed: int
) -> None:
    torch.manual_seed(seed)
    inputs, model = torch.randn(600, 6), nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3))
    targets = (inputs @ torch.randn(6, 3)).argmax(1)
    optimizer = base(model.parameters())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for batch in order(120, targets):

            def closure(batch: Tensor = batch) -> Tensor:
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(inputs[batch]), targets[batch])
                loss.backward()
                return loss

            optimizer.step(closure)
    assert sum("Are successive batches alike" in str(each.message) for each in caught) == expected


def test_a_loss_given_on_another_scale_later_is_warned_of_since_all_steps_are_reverted() -> None:
    training = Training.of(gen_adamw)

    def train(steps: int, scale: float) -> None:
        for _ in range(steps):
            loss = training.closure()
            training.optimizer.step(probe=training.loss, loss=scale * loss.detach())

    train(60, 1.0)
    with pytest.warns(UserWarning, match="has reverted the last step in 10 probe steps in a row.*is loss= the loss"):
        train(60, 1e6)


def test_a_micro_batch_without_a_loss_is_not_remembered() -> None:
    training = Training.of(gen_sgd)
    batches = MicroBatches(training.optimizer, is_last=lambda: True)
    with pytest.raises(TypeError, match="loss_of must return the loss"):
        batches.evaluate(lambda: None)
    losses = []
    for _ in range(5):
        training.optimizer.zero_grad()
        loss = batches.evaluate(training.loss)
        loss.backward()
        training.optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
