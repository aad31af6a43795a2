"""The training loop of all benchmarks, and an optimizer as the loop sees it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.workloads.registry import Batch, Task


class Closure(Protocol):
    """Zeroes the gradients and evaluates the loss of a step's batch."""

    def __call__(self, *, differentiates: bool = True) -> Tensor:
        """Returns the loss, after its ``backward()`` unless told not to differentiate."""


def _constant(_step: int, _steps: int) -> float:
    return 1.0


def _linear(step: int, steps: int) -> float:
    return 1.0 - step / steps


def _cosine(step: int, steps: int) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * step / steps))


SCHEDULES: dict[str, Callable[[int, int], float]] = {"constant": _constant, "linear": _linear, "cosine": _cosine}
"""The factor on the learning rate, from the step, counted from 0, and the number of steps."""


class Stepper:
    """An optimizer as the training loop sees it. Subclasses override what differs.

    Args:
        optimizer: The optimizer that steps and that a schedule is attached to.

    Attributes:
        optimizer: The optimizer that steps and that a schedule is attached to.
        takes_schedule: Whether a scheduler is to be attached; False for methods that scale by themselves.
        extra_forwards: Forward passes that the method makes without calling the closure.
    """

    takes_schedule = True

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.extra_forwards = 0

    @property
    def is_probing(self) -> bool:
        """Whether the closure is being called only to choose a learning rate."""
        return False

    def step(self, closure: Closure) -> None:
        """Takes one step.

        Args:
            closure: Zeroes the gradients, evaluates the loss and calls ``backward()``.
        """
        closure()
        self.optimizer.step()

    def lr(self) -> float:
        """Returns the learning rate that the last step used."""
        return float(self.optimizer.param_groups[0]["lr"])

    def finish(self, task: Task) -> nn.Module:
        """Returns the model to evaluate. Called after the last step."""
        return task.model


@dataclass(frozen=True)
class Step:
    """What a training step showed.

    Attributes:
        number: The step, counted from 1.
        loss: The loss of its batch, before it.
        lr: The learning rate that it used, the schedule's factor included.
        seconds: How long it took, in seconds.
        extra_forwards: Forward passes that only served to choose a learning rate, of all steps so far.
    """

    number: int
    loss: float
    lr: float
    seconds: float
    extra_forwards: int


def train(
    task: Task,
    stepper: Stepper,
    batches: Iterator[Batch],
    *,
    steps: int,
    factor: Callable[[int, int], float] | None = None,
) -> Iterator[Step]:
    """Trains, and yields after each step. A caller that wants to stop early stops iterating.

    Args:
        task: The model and its loss.
        stepper: The optimizer.
        batches: The batches, at least as many as steps.
        steps: The number of steps.
        factor: The schedule, one of ``SCHEDULES``; None to attach no scheduler.
    """
    scheduler = None if factor is None else LambdaLR(stepper.optimizer, lambda step: factor(step, steps))
    probes = 0
    losses: list[Tensor] = []

    def closure(*, differentiates: bool = True) -> Tensor:
        nonlocal probes
        probes += stepper.is_probing
        stepper.optimizer.zero_grad()
        loss = task.loss(task.model, batch)
        if differentiates:
            loss.backward()  # type: ignore[no-untyped-call]
        if not losses:
            losses.append(loss.detach())
        return loss

    task.model.train()
    for number in range(1, steps + 1):
        batch = next(batches)
        losses.clear()
        began = time.perf_counter()
        stepper.step(closure)
        lr = stepper.lr()
        if scheduler is not None:
            scheduler.step()
        loss = float(losses[0])
        seconds = time.perf_counter() - began
        yield Step(number, loss, lr, seconds, probes + stepper.extra_forwards)
