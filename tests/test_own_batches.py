"""Steps that are measured on the batch that they were computed from: used only if there is no other batch."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from gen_optim import GeNOptimizer, History, ProbeStatus, RelaxedRule
from gen_optim.controller import Controller
from tests.training import gen_adamw, gen_sgd, mlp, parameters_of, same

KNOWN_FROM = 3
"""The second step begins where the search has ended, and the third is the first to look back."""


class Run:
    """A network and an optimizer, trained on the batch of a number at each step."""

    def __init__(self, make: Callable[..., GeNOptimizer] = gen_sgd, **options: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(64, 16, 4, generator=generator)
        self.targets = torch.randn(64, 16, 1, generator=generator)
        self.model = mlp()
        self.optimizer = make(self.model.parameters(), **options)
        self.history = History()
        self.optimizer.register_probe_hook(self.history)

    def loss(self, number: int) -> Tensor:
        batch = number % len(self.inputs)
        return nn.functional.mse_loss(self.model(self.inputs[batch]), self.targets[batch])

    def train(self, numbers: Iterable[int]) -> Run:
        for number in numbers:
            self.optimizer.step(lambda number=number: self.loss(number))
        return self

    def measured(self) -> list[int]:
        """The steps whose records were used."""
        return [record.step for record in self.history.records if record.loss_end is not None]


def in_turn(steps: int, repeats: int) -> list[int]:
    """The batches of a loop that takes this many steps on each."""
    return [step // repeats for step in range(steps)]


@pytest.mark.parametrize("make", [gen_sgd, gen_adamw])
@pytest.mark.parametrize("repeats", [2, 4, 8])
def test_only_measurements_across_batches_are_used_once_there_is_another_batch(make: Any, repeats: int) -> None:
    run = Run(make).train(in_turn(48, repeats))
    # Step s, counted from 1, looks back at the step before on its own batch: another one if s − 1 divides.
    assert run.measured() == [s for s in range(KNOWN_FROM, 49) if s <= repeats or (s - 1) % repeats == 0]


@pytest.mark.parametrize("make", [gen_sgd, gen_adamw])
@pytest.mark.parametrize("repeats", [1, 1000])
def test_all_are_used_if_batches_differ_or_there_is_only_one(make: Any, repeats: int) -> None:
    assert Run(make).train(in_turn(36, repeats)).measured() == list(range(KNOWN_FROM, 37))


@pytest.mark.parametrize(("repeats", "is_compared"), [(1, True), (1000, False)])
def test_the_loss_is_compared_with_that_at_the_average_unless_there_is_one_batch(
    repeats: int, is_compared: bool
) -> None:
    later = [record for record in Run().train(in_turn(36, repeats)).history if record.step > 26]
    assert len(later) == 10
    assert all((record.excess_loss is not None) is is_compared for record in later)


def test_after_the_burn_in_they_are_told_from_the_losses_of_lazy_steps() -> None:
    run = Run(rule=RelaxedRule(burn_in=4)).train(in_turn(400, 4))
    later = [step for step in run.measured() if step > 50]
    assert len(later) > 20
    assert all((step - 1) % 4 == 0 for step in later)


def test_what_is_given_as_the_loss_may_be_written_to_by_the_next_call() -> None:
    run, kept = Run(rule=RelaxedRule(burn_in=4)), torch.zeros(())

    def closure(number: int) -> Tensor:
        run.optimizer.zero_grad()
        loss = run.loss(number)
        loss.backward()
        return kept.copy_(loss.detach())

    for number in in_turn(200, 4):
        run.optimizer.step(lambda number=number: closure(number))
    assert all((step - 1) % 4 == 0 for step in run.measured() if step > 50)


def test_a_batch_on_which_fifty_steps_follow_each_other_counts_as_the_only_one() -> None:
    run = Run().train([0] * 5 + [1] * 100)
    used = [step for step in run.measured() if step > 6]
    assert used[0] == 5 + 1 + 50
    assert used[:20] == list(range(used[0], used[0] + 20))


def test_a_step_to_where_the_loss_is_not_finite_is_reverted_all_the_same() -> None:
    run = Run().train(in_turn(40, 4))
    before = parameters_of(run.model)

    def closure() -> Tensor:
        is_where_it_was = all(map(torch.equal, before, run.model.parameters()))
        return run.loss(10) * (1.0 if is_where_it_was else math.inf)

    run.optimizer.step(closure)
    run.optimizer.step(closure)
    assert run.history[-1].status is ProbeStatus.REVERTED
    assert same(parameters_of(run.model), before)


@pytest.mark.parametrize("steps", [20, 21, 22, 23])
def test_resuming_between_steps_on_one_batch_is_exact(steps: int) -> None:
    numbers = in_turn(60, 4)
    one = Run().train(numbers[:steps])
    other = Run()
    other.model.load_state_dict(copy.deepcopy(one.model.state_dict()))
    other.optimizer.load_state_dict(one.optimizer.state_dict())
    one.train(numbers[steps:])
    other.train(numbers[steps:])
    assert same(parameters_of(one.model), parameters_of(other.model))
    assert one.measured()[-len(other.measured()) :] == other.measured()


# --- the judgement ---------------------------------------------------------------------------------------------------


def judged(*losses: tuple[float, float]) -> list[bool]:
    """What is said of pairs of a loss and that of the step's own batch."""
    controller = Controller(SGD([nn.Parameter(torch.ones(2))], lr=0.1), RelaxedRule())
    return [controller.note_batch(*pair) for pair in losses]


OWN, OTHER, NEAR, UNKNOWN = (1.0, 1.0), (1.0, 1.1), (1.0, 1.0 + 1e-5), (1.0, math.inf)


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([OWN] * 3, [False] * 3),  # there may be no other batch
        ([OTHER, OWN, OTHER, OWN], [False, True, False, True]),
        ([OWN, OTHER, OWN], [False, False, True]),
        ([OTHER, (1.0, 1.0 + 1e-7)], [False, True]),  # rounding of single precision
        ([NEAR, OWN, NEAR], [False] * 3),  # neither the same nor certainly another one
        ([OTHER, OWN, UNKNOWN, OWN], [False, True, False, True]),
        ([UNKNOWN, OWN], [False] * 2),
        ([OTHER, *[OWN] * 50], [False, *[True] * 49, False]),
        ([OTHER, (0.0, 0.0), (-1.0, -1.0)], [False, True, True]),
    ],
)
def test_own_batches_are_told_from_others(losses: list[tuple[float, float]], expected: list[bool]) -> None:
    assert judged(*losses) == expected


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([], False),
        ([OWN], True),
        ([OWN, OTHER], False),
        ([OTHER, *[OWN] * 50], False),
        ([OTHER, *[OWN] * 51], True),
        ([NEAR] * 9, False),
        ([UNKNOWN] * 99, False),
    ],
)
def test_there_is_one_batch_if_measurements_show_no_other(losses: list[Any], expected: bool) -> None:
    controller = Controller(SGD([nn.Parameter(torch.ones(2))], lr=0.1), RelaxedRule())
    for pair in losses:
        controller.note_batch(*pair)
    assert controller.has_one_batch is expected


def test_under_maximize_losses_are_compared_with_the_same_sign() -> None:
    run = Run(lambda parameters: GeNOptimizer(SGD(parameters, lr=0.1, momentum=0.9, maximize=True)))
    for number in in_turn(40, 4):
        run.optimizer.step(lambda number=number: -run.loss(number))
    assert all((step - 1) % 4 == 0 for step in run.measured() if step > 4)
