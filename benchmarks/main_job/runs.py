"""One run of the main job, from a specification to what it showed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.data import Data
from benchmarks.optimizers import GeNStepper, base_optimizer
from benchmarks.training import SCHEDULES, Stepper
from benchmarks.training import train as training_steps
from benchmarks.workloads.digits import digit_classifier, digit_network
from gen_optim import GeNOptimizer

EVALUATIONS = 50
"""Points of a run's loss curve, at most."""


@dataclass(frozen=True, kw_only=True)
class Spec:
    """The specification of a run.

    Attributes:
        base: A name in ``benchmarks.optimizers.BASES``.
        gen: Whether ``GeNOptimizer`` wraps the base optimizer.
        learning_rate: The initial one.
        steps: The number of steps.
        schedule: "linear", from 1 to 0 over the steps, or "constant".
        batch_size: Images per batch.
        seed: Decides split, weights and batches, so that runs differ in nothing but the optimizer.
    """

    base: str
    gen: bool
    learning_rate: float
    steps: int
    schedule: str
    batch_size: int
    seed: int

    @property
    def name(self) -> str:
        """The optimizer as a user would write it."""
        return f"GeN({self.base})" if self.gen else self.base


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run showed.

    Attributes:
        spec: What was run.
        evaluated: The steps after which the training loss was evaluated.
        training_losses: The loss over the whole training set then. The last one is after the last
            step. May be infinite or NaN.
        learning_rates: The learning rate in force at each step, the schedule's factor included.
        learning_rate_found: The last of them with the schedule divided out, which is what GeN last
            chose; None for a bare optimizer, which finds nothing.
        validation_accuracy: Share of the validation images that were classified correctly.
        extra_forwards: Forward passes that only served to choose a learning rate.
        seconds: Wall-clock time of the steps alone.
    """

    spec: Spec
    evaluated: tuple[int, ...]
    training_losses: tuple[float, ...]
    learning_rates: tuple[float, ...]
    learning_rate_found: float | None
    validation_accuracy: float
    extra_forwards: int
    seconds: float

    @property
    def diverged(self) -> bool:
        """Whether the run ended without a finite training loss."""
        return not math.isfinite(self.training_losses[-1])


def train(spec: Spec, on_step: Callable[[], object] = lambda: None) -> Result:
    """Trains as specified.

    A run that diverges goes on to its end: whether it recovers is part of the answer.

    Args:
        spec: What to run.
        on_step: Called after each step, for a progress bar.
    """
    split = Data().digits(spec.seed)
    task = digit_classifier(digit_network(spec.seed), split, batch_size=spec.batch_size)
    base = base_optimizer(task.parameters(), spec.base, spec.learning_rate)
    stepper = GeNStepper(GeNOptimizer(base)) if spec.gen else Stepper(base)
    factor = SCHEDULES[spec.schedule]  # as a scheduler even if it is constant, alike for bare and wrapped optimizers

    @torch.no_grad()
    def training_loss() -> float:
        return float(task.loss(task.model, split.train))

    interval = max(1, spec.steps // EVALUATIONS)
    evaluated, losses = [0], [training_loss()]
    seen = []
    for step in training_steps(task, stepper, task.batches(spec.seed), steps=spec.steps, factor=factor):
        seen.append(step)
        if step.number % interval == 0 or step.number == spec.steps:
            evaluated.append(step.number)
            losses.append(training_loss())
        on_step()

    return Result(
        spec=spec,
        evaluated=tuple(evaluated),
        training_losses=tuple(losses),
        learning_rates=tuple(step.lr for step in seen),
        learning_rate_found=seen[-1].lr / factor(spec.steps - 1, spec.steps) if spec.gen else None,
        validation_accuracy=_accuracy(task.model, *split.valid),
        extra_forwards=seen[-1].extra_forwards,
        seconds=sum(step.seconds for step in seen),
    )


@torch.no_grad()
def _accuracy(model: nn.Module, inputs: Tensor, targets: Tensor) -> float:
    """The share of images that are classified correctly; if the outputs for one are not finite, it is not."""
    outputs = model(inputs)
    right = (outputs.argmax(dim=1) == targets) & outputs.isfinite().all(dim=1)
    return float(right.float().mean())
