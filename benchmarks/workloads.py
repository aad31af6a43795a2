"""What the studies train: a model, its batches and its loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, mse_loss

from benchmarks import digits, text
from benchmarks.repeatable import seeded

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Workload:
    """Something to train.

    Attributes:
        name: What it is, for headings.
        model: The model; the same seed gives the same weights.
        batches: Inputs and targets, for ever.
        loss: Maps outputs and targets to a scalar.
    """

    name: str
    model: nn.Module
    batches: Iterator[Batch]
    loss: Callable[[Tensor, Tensor], Tensor]

    def loss_of(self, batch: Batch) -> Tensor:
        """The loss of the model on a batch."""
        return self.loss(self.model(batch[0]), batch[1])

    def loss_function(self, batch: Batch) -> Callable[[Mapping[str, Tensor]], Tensor]:
        """The loss on a batch as a function of the model's parameters; what it writes to buffers is lost."""

        def function(params: Mapping[str, Tensor]) -> Tensor:
            buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
            return self.loss(functional_call(self.model, {**buffers, **params}, batch[0]), batch[1])

        return function


def regression(seed: int = 0) -> Workload:
    """A fully connected network with smooth activations, on a function of eight numbers with a little noise."""
    generator = torch.Generator().manual_seed(seed)

    def batches() -> Iterator[Batch]:
        while True:
            inputs = torch.randn(128, 8, generator=generator)
            noise = 0.1 * torch.randn(128, 1, generator=generator)
            yield inputs, torch.sin(2.0 * inputs[:, :1]) + inputs[:, 1:2] * inputs[:, 2:3] + noise

    model = seeded(
        lambda: nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)), seed
    )
    return Workload("regression on synthetic data", model, batches(), mse_loss)


def digits_mlp(seed: int = 0) -> Workload:
    """The digits and the network of the main job."""
    images, _ = digits.load(seed)
    stream = ((batch.inputs, batch.targets) for batch in digits.batches(images, 64, seed))
    return Workload("digits MLP", digits.network(seed), stream, cross_entropy)


def digits_cnn(seed: int = 0) -> Workload:
    """The digits as pictures, and a small convolutional network with batch normalisation."""
    images, _ = digits.load(seed)
    stream = ((batch.inputs.reshape(-1, 1, 8, 8), batch.targets) for batch in digits.batches(images, 64, seed))
    model = seeded(
        lambda: nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(128, digits.CLASSES)),
        ),
        seed,
    )
    return Workload("digits CNN", model, stream, cross_entropy)


def character_transformer(seed: int = 0) -> Workload:
    """A small transformer on the help texts of Python."""
    train, _ = text.load()
    model = text.network(train.alphabet, seed)
    stream = ((characters, following.flatten()) for characters, following in text.batches(train, 16, seed))
    return Workload(
        "character transformer", model, stream, lambda outputs, targets: cross_entropy(outputs.flatten(0, 1), targets)
    )
