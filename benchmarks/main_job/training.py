"""One training run, from a specification to what was seen."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from benchmarks import digits
from gen_optim import GeNOptimizer

EVALUATIONS = 50  # points of a run's loss curve, at most


def _adamw(model: nn.Module, learning_rate: float) -> Optimizer:
    return AdamW(model.parameters(), lr=learning_rate)


def _sgd(model: nn.Module, learning_rate: float) -> Optimizer:
    return SGD(model.parameters(), lr=learning_rate, momentum=0.9)


BASES: dict[str, Callable[[nn.Module, float], Optimizer]] = {"AdamW": _adamw, "SGD": _sgd}


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What to run.

    Attributes:
        base: A name in ``BASES``.
        gen: Whether ``GeNOptimizer`` wraps the base optimizer.
        learning_rate: The one to begin with.
        steps: How many.
        schedule: "linear", from 1 to 0 over the steps, or "constant".
        batch_size: Images in a batch.
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
        evaluated: After how many steps the training loss was taken.
        training_losses: The loss over the whole training set then. The last one is after the last
            step. May be infinite or NaN.
        learning_rates: The learning rate in force at each step, the schedule's factor included.
        learning_rate_found: The last of them with the schedule divided out, which is what GeN last
            chose; None for a bare optimizer, which finds nothing.
        validation_accuracy: Share of the validation images that were told rightly.
        extra_forwards: How often the model was evaluated only to choose a learning rate.
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
    """Trains as specified and returns what was seen.

    A run that diverges goes on to its end: whether it comes back is part of the answer.

    Args:
        spec: What to run.
        on_step: Called after each step, for a progress bar.
    """
    train_images, valid_images = digits.load(spec.seed)
    stream = digits.batches(train_images, spec.batch_size, spec.seed)
    model = digits.network(spec.seed)
    base = BASES[spec.base](model, spec.learning_rate)
    wrapped = GeNOptimizer(base) if spec.gen else None
    optimizer: Optimizer = base if wrapped is None else wrapped
    # Attached alike to a bare and a wrapped optimizer.
    is_linear = spec.schedule == "linear"
    scheduler = LambdaLR(optimizer, lambda step: 1.0 - step / spec.steps if is_linear else 1.0)

    batch = next(stream)
    extra_forwards = 0

    def closure() -> Tensor:
        nonlocal extra_forwards
        if wrapped is not None and wrapped.is_probing:
            extra_forwards += 1
        optimizer.zero_grad()
        loss = cross_entropy(model(batch.inputs), batch.targets)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    interval = max(1, spec.steps // EVALUATIONS)
    evaluated = [0]
    losses = [_loss(model, train_images)]
    learning_rates: list[float] = []
    found: float | None = None
    seconds = 0.0
    for step in range(1, spec.steps + 1):
        factor = scheduler.lr_lambdas[0](step - 1)
        in_force = float(base.param_groups[0]["lr"])
        began = time.perf_counter()
        # torch's annotation asks for a float, its optimizers take a tensor.
        optimizer.step(closure)  # type: ignore[arg-type]
        if wrapped is not None:
            in_force = wrapped.get_last_lr()[0]
            found = in_force / factor
        scheduler.step()
        seconds += time.perf_counter() - began
        learning_rates.append(in_force)
        if step % interval == 0 or step == spec.steps:
            evaluated.append(step)
            losses.append(_loss(model, train_images))
        batch = next(stream)
        on_step()

    return Result(
        spec=spec,
        evaluated=tuple(evaluated),
        training_losses=tuple(losses),
        learning_rates=tuple(learning_rates),
        learning_rate_found=found,
        validation_accuracy=_accuracy(model, valid_images),
        extra_forwards=extra_forwards,
        seconds=seconds,
    )


@torch.no_grad()
def _loss(model: nn.Module, images: digits.Images) -> float:
    """Mean loss over all images."""
    return float(cross_entropy(model(images.inputs), images.targets))


@torch.no_grad()
def _accuracy(model: nn.Module, images: digits.Images) -> float:
    """Share of the images that are told rightly; a model that answers NaN tells none."""
    outputs = model(images.inputs)
    right = (outputs.argmax(dim=1) == images.targets) & outputs.isfinite().all(dim=1)
    return float(right.float().mean())
