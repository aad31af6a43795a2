"""The registry of workloads: what a workload is, and what workloads are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from benchmarks.data import Data

Batch = tuple[Tensor, ...]
Model = Callable[..., Tensor]
"""A module, or a module's forward pass with other parameters."""
Loss = Callable[[Model, Batch], Tensor]
Stream = Callable[[int], Iterator[Batch]]
"""From a seed to endless batches; the same seed gives the same ones."""
Suite = Literal["battery", "long", "study"]

CHUNK = 500
"""Examples that are evaluated at once."""
TRAINING_SAMPLE = 1500
"""The largest number of training examples that the training loss at the end of a run is taken over."""
_EVALUATION_SEED = 12345


@dataclass(frozen=True, kw_only=True)
class Task:
    """A workload made with a seed: all that a training run needs besides an optimizer.

    Attributes:
        model: The model. Parameters that do not require gradients stay as they are.
        loss: Maps a model and a batch to a scalar.
        batches: Endless batches for training, by seed.
        training: Batches that give the training loss at the end.
        validation: Batches that give the validation loss at the end.
        differentiates: Whether evaluating the loss needs gradients to be enabled.
    """

    model: nn.Module
    loss: Loss
    batches: Stream
    training: Sequence[Batch]
    validation: Sequence[Batch]
    differentiates: bool = False

    def parameters(self) -> list[nn.Parameter]:
        """Returns the parameters that are trained."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def evaluate(self, model: nn.Module, batches: Sequence[Batch]) -> float:
        """Returns the mean loss over batches in evaluation mode; noise in the loss is the same each time.

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

    def loss_function(self, batch: Batch) -> Callable[[Mapping[str, Tensor]], Tensor]:
        """Returns the loss on a batch as a function of the model's parameters by name; it changes no buffer."""

        def function(params: Mapping[str, Tensor]) -> Tensor:
            buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
            return self.loss(lambda *inputs: functional_call(self.model, {**buffers, **params}, inputs), batch)

        return function


@dataclass(frozen=True, kw_only=True)
class Workload:
    """An entry of the registry.

    Attributes:
        name: The name on the command line and in results.
        family: The kind of problem.
        summary: One line for the report.
        steps: The training steps of each run.
        version: Raised whenever the definition changes. Results of another version do not count.
        data: The kind of data, a key of ``benchmarks.data.KINDS``.
        approaches_zero: Whether the loss can come arbitrarily close to zero, so that ratios need a floor.
        suite: The benchmark that runs it: "battery", "long" for ``battery --long``, or "study" for those that only look
            at how the method works.
        make: Makes the task with a seed.
        centres: The middle of the learning rates that bare optimizers are tuned over, by base; of long workloads.
        is_held_out: Whether nothing is decided by its results, so that they show what was not tuned; of long workloads.
    """

    name: str
    family: str
    summary: str
    steps: int
    version: int
    data: str
    approaches_zero: bool
    suite: Suite
    make: Callable[[int, Data], Task]
    centres: Mapping[str, float] = field(default_factory=dict, hash=False)
    is_held_out: bool = False


WORKLOADS: dict[str, Workload] = {}
"""All workloads by name."""


def workload(
    *,
    family: str,
    summary: str,
    steps: int,
    data: str,
    version: int = 1,
    approaches_zero: bool = False,
    suite: Suite = "battery",
) -> Callable[[Callable[[int, Data], Task]], Callable[[int, Data], Task]]:
    """Enters a function from seed and data to a task into the registry, under its own name.

    The arguments are the attributes of :class:`Workload`.
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
            suite=suite,
            make=make,
        )
        return make

    return enter


def classification(model: Model, batch: Batch) -> Tensor:
    """The cross entropy of a model on inputs and the class of each."""
    return cross_entropy(model(batch[0]), batch[1])


def shuffled(tensors: Sequence[Tensor], size: int) -> Stream:
    """Returns batches of examples, each pass over them in a new order; examples that do not fill a batch are dropped.

    Args:
        tensors: Examples along their first dimension, all of the same length.
        size: Examples per batch.

    Raises:
        ValueError: If there are fewer examples than a batch needs.
    """
    count = len(tensors[0])
    if not 1 <= size <= count:
        raise ValueError(f"batch size must be between 1 and {count}, but is {size}")

    def stream(seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(count, generator=generator)
            for start in range(0, count - size + 1, size):
                chosen = order[start : start + size]
                yield tuple(each[chosen] for each in tensors)

    return stream


def chunks(tensors: Sequence[Tensor], limit: int | None = None) -> list[Batch]:
    """Returns the examples in order, in batches to evaluate.

    Args:
        tensors: Examples along their first dimension.
        limit: The number of examples to take; None for all.
    """
    count = len(tensors[0]) if limit is None else min(limit, len(tensors[0]))
    return [tuple(each[start : min(start + CHUNK, count)] for each in tensors) for start in range(0, count, CHUNK)]
