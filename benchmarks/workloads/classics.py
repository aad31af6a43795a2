"""Functions of a few numbers, known from textbooks. The validation loss is the function itself, without noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from benchmarks.data import Data
from benchmarks.workloads.registry import Batch, Task, workload

_JITTER = 0.05  # of the starting point, by seed


class Point(nn.Module):
    """A point, whose output is the function there."""

    def __init__(self, start: Tensor, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.point = nn.Parameter(start)
        self.function = function

    def forward(self, shift: Tensor) -> Tensor:
        """Returns the function at the point minus ``shift``."""
        return self.function(self.point - shift)


def _task(start: Tensor, function: Callable[[Tensor], Tensor], noise: float = 0.0) -> Task:
    def batches(number: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(number)
        while True:
            yield (noise * torch.randn(1, len(start), generator=generator),)

    exact = [(torch.zeros(1, len(start)),)]
    return Task(
        model=Point(start, function),
        loss=lambda model, batch: torch.as_tensor(model(batch[0][0])),
        batches=batches,
        training=exact,
        validation=exact,
    )


def _near(start: list[float], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.tensor(start) + _JITTER * torch.randn(len(start), generator=generator)


@workload(
    family="classics",
    summary="a tenth of Rosenbrock's function from near (-1.2, 1)",
    steps=600,
    data="generated",
    approaches_zero=True,
)
def rosenbrock(seed: int, _data: Data) -> Task:
    """A narrow curved valley. The tenth brings its learning rates into the range of the others."""
    return _task(
        _near([-1.2, 1.0], seed), lambda p: 0.1 * (1.0 - p[0]).square() + 10.0 * (p[1] - p[0].square()).square()
    )


@workload(
    family="classics", summary="Beale's function from near (1, 1)", steps=600, data="generated", approaches_zero=True
)
def beale(seed: int, _data: Data) -> Task:
    """Flat around its minimum, steep at the corners."""

    def function(p: Tensor) -> Tensor:
        x, y = p[0], p[1]
        return (1.5 - x + x * y).square() + (2.25 - x + x * y**2).square() + (2.625 - x + x * y**3).square()

    return _task(_near([1.0, 1.0], seed), function)


def _quadratic(dimension: int, condition: float, seed: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Returns a start point and a rotated quadratic with its minimum elsewhere and largest eigenvalue 1."""
    generator = torch.Generator().manual_seed(seed)
    rotation, _ = torch.linalg.qr(torch.randn(dimension, dimension, generator=generator))
    eigenvalues = torch.logspace(0.0, -float(torch.tensor(condition).log10()), dimension)
    hessian = rotation @ torch.diag(eigenvalues) @ rotation.T
    lowest = torch.randn(dimension, generator=generator)
    start = lowest + torch.randn(dimension, generator=generator)

    def function(p: Tensor) -> Tensor:
        distance = p - lowest
        value: Tensor = 0.5 * distance @ hessian @ distance
        return value

    return start, function


@workload(
    family="classics",
    summary="quadratic of 20 numbers, condition number 10,000, rotated",
    steps=600,
    data="generated",
    approaches_zero=True,
)
def quadratic(seed: int, _data: Data) -> Task:
    """The parabola is exact."""
    return _task(*_quadratic(20, 1e4, seed))


@workload(
    family="classics",
    summary="the same with condition number 1,000 and noise in the position of its minimum",
    steps=600,
    data="generated",
    approaches_zero=True,
)
def noisy_quadratic(seed: int, _data: Data) -> Task:
    """Without a decay the noise stays; the validation loss is the excess without noise."""
    start, function = _quadratic(20, 1e3, seed)
    return _task(start, function, noise=0.5)
