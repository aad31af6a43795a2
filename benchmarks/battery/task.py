"""What is trained: a workload by its name, and one seeded instance of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.battery.data import Data

Batch = tuple[Tensor, ...]
Loss = Callable[[nn.Module, Batch], Tensor]
Stream = Callable[[int], Iterator[Batch]]

CHUNK = 500
"""Examples evaluated at once."""
TRAINING_SAMPLE = 1500
"""So many training examples, at most, give the training loss that a run ends with."""
_EVALUATION_SEED = 12345


@dataclass(frozen=True, kw_only=True)
class Task:
    """A workload with its seed: all that a training run needs.

    Attributes:
        model: What is trained; parameters that do not require gradients stay as they are.
        loss: Maps a model and a batch to a scalar.
        batches: Endless batches for training; the same number gives the same ones.
        training: Batches that give the training loss at the end.
        validation: Batches that give the validation loss at the end.
        differentiates: Whether the loss needs gradients to be evaluated at all.
    """

    model: nn.Module
    loss: Loss
    batches: Stream
    training: Sequence[Batch]
    validation: Sequence[Batch]
    differentiates: bool = False

    def parameters(self) -> list[nn.Parameter]:
        """What the optimizer gets."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def evaluate(self, model: nn.Module, batches: Sequence[Batch]) -> float:
        """The mean loss over batches in evaluation mode; noise in the loss is the same each time.

        Args:
            model: This task's model or an average of it.
            batches: ``training`` or ``validation``.
        """
        was_training = model.training
        model.eval()
        total, count = 0.0, 0
        try:
            with torch.random.fork_rng(devices=[]), torch.set_grad_enabled(self.differentiates):
                torch.manual_seed(_EVALUATION_SEED)
                for batch in batches:
                    size = len(batch[0]) if batch else 1
                    total += size * float(self.loss(model, batch).detach())
                    count += size
        finally:
            model.train(was_training)
        return total / count


@dataclass(frozen=True, kw_only=True)
class Workload:
    """An entry of the registry.

    Attributes:
        name: As on the command line and in results.
        family: What kind of problem it is.
        summary: One line for the report.
        steps: Training steps of each run.
        version: Raised whenever the definition changes; results of another version do not count.
        data: The kind of data, a key of ``benchmarks.battery.data.KINDS``.
        approaches_zero: Whether its loss can come as close to zero as one likes, so that ratios need a floor.
        make: Makes it with a seed.
    """

    name: str
    family: str
    summary: str
    steps: int
    version: int
    data: str
    approaches_zero: bool
    make: Callable[[int, Data], Task]


WORKLOADS: dict[str, Workload] = {}


def workload(
    *, family: str, summary: str, steps: int, data: str, version: int = 1, approaches_zero: bool = False
) -> Callable[[Callable[[int, Data], Task]], Callable[[int, Data], Task]]:
    """Enters a function from seed and data to a task into the registry, under its own name.

    Args:
        family: What kind of problem it is.
        summary: One line for the report.
        steps: Training steps of each run.
        data: A key of ``benchmarks.battery.data.KINDS``.
        version: To be raised whenever the definition changes.
        approaches_zero: Whether its loss can come as close to zero as one likes.
    """

    def enter(make: Callable[[int, Data], Task]) -> Callable[[int, Data], Task]:
        name = make.__name__.replace("_", "-")
        WORKLOADS[name] = Workload(
            name=name,
            family=family,
            summary=summary,
            steps=steps,
            version=version,
            data=data,
            approaches_zero=approaches_zero,
            make=make,
        )
        return make

    return enter


def classification(model: nn.Module, batch: Batch) -> Tensor:
    """The loss of a model on inputs and the class of each."""
    return cross_entropy(model(batch[0]), batch[1])


def shuffled(tensors: Sequence[Tensor], size: int) -> Stream:
    """Batches of examples, each pass over them in a new order; what does not fill a batch is dropped.

    Args:
        tensors: Examples along their first dimension, all as many.
        size: Examples in a batch.
    """

    def stream(seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        count = len(tensors[0])
        while True:
            order = torch.randperm(count, generator=generator)
            for start in range(0, count - size + 1, size):
                chosen = order[start : start + size]
                yield tuple(each[chosen] for each in tensors)

    return stream


def chunks(tensors: Sequence[Tensor], limit: int | None = None) -> list[Batch]:
    """The examples in order, in batches to evaluate.

    Args:
        tensors: Examples along their first dimension.
        limit: Only so many of the first.
    """
    count = len(tensors[0]) if limit is None else min(limit, len(tensors[0]))
    return [tuple(each[start : min(start + CHUNK, count)] for each in tensors) for start in range(0, count, CHUNK)]
