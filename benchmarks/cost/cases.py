"""The models and base optimizers that the cost is measured with; the models differ in what dominates the time.

The batches of the first three are so large that forward passes dominate; what a probe step takes besides them hardly
depends on the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, AdamW, Optimizer

from benchmarks.data import Data
from benchmarks.workloads.text import Transformer, excerpts

BASES: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "SGD, momentum": lambda parameters: SGD(parameters, lr=1e-4, momentum=0.9, foreach=True),
    "AdamW, foreach": lambda parameters: AdamW(parameters, lr=1e-5, foreach=True),
    "AdamW, fused": lambda parameters: AdamW(parameters, lr=1e-5, fused=True),
}
"""At learning rates so small that the model, which all optimizers share, stays what it is."""


Bound = Literal["forwards", "copies", "calls"]


@dataclass(frozen=True)
class Case:
    """A model and one batch.

    Attributes:
        name: The name in tables.
        model: The model.
        inputs: The batch's inputs.
        targets: The class of each output.
        bound: What takes the time: forward passes, copies of the parameters, or the overhead of each call.
    """

    name: str
    model: nn.Module
    inputs: Tensor
    targets: Tensor
    bound: Bound = "forwards"

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters, which are all trained."""
        return list(self.model.parameters())

    @property
    def size(self) -> int:
        """The number of parameters."""
        return sum(each.numel() for each in self.parameters)

    @property
    def bytes(self) -> int:
        """The size of the parameters in memory, in bytes."""
        return sum(each.numel() * each.element_size() for each in self.parameters)

    def loss(self) -> Tensor:
        """Returns the loss on the batch."""
        return self.criterion(self.model(self.inputs), self.targets)

    @staticmethod
    def criterion(outputs: Tensor, targets: Tensor) -> Tensor:
        """Returns the loss of outputs."""
        return cross_entropy(outputs.flatten(0, -2), targets.flatten())


def mlp() -> Case:
    """Returns a fully connected network."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    return Case("MLP", model, torch.randn(8192, 256), torch.randint(10, (8192,)))


def convolutional() -> Case:
    """Returns a convolutional network with batch normalisation."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, after in ((3, 32), (32, 64), (64, 128), (128, 128)):
        layers += [nn.Conv2d(before, after, 3, 2, 1), nn.BatchNorm2d(after), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))
    return Case("convolutional network", model, torch.randn(512, 3, 32, 32), torch.randint(10, (512,)))


def transformer() -> Case:
    """Returns a transformer on running text."""
    torch.manual_seed(0)
    train, _ = Data().text()
    model = Transformer(train.alphabet, width=384, layers=6)
    inputs, targets = next(excerpts(train, 32)(0))
    return Case("transformer", model, inputs, targets)


def wide(width: int = 8192) -> Case:
    """Returns a network of a few large matrices, for which copying parameters takes much of the time."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(3)), nn.Linear(width, 10))
    return Case("wide network", model, torch.randn(64, width), torch.randint(10, (64,)), bound="copies")


def tiny(tensors: int = 1000) -> Case:
    """Returns a network of many tiny tensors."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(tensors // 2)))
    return Case("many tiny tensors", model, torch.randn(64, 16), torch.randint(16, (64,)), bound="calls")


CASES: dict[str, Callable[[], Case]] = {
    "mlp": mlp,
    "convolutional": convolutional,
    "transformer": transformer,
    "wide": wide,
    "tiny": tiny,
}
"""By the name that the option ``--only`` takes."""
