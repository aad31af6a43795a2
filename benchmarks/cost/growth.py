"""The growth of the cost with the number of parameters and with the number of tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.cost.cases import Case
from benchmarks.cost.methods import FORWARDS, Wrapped
from benchmarks.cost.times import Sample, seconds

SIZES = (10**4, 10**5, 10**6, 10**7, 10**8, 2 * 10**8)
"""Numbers of parameters, in sixteen tensors."""
COUNTS = (1, 10, 100, 1000, 10**4)
"""Numbers of tensors, of 64 elements each."""

LINES = ("bare optimizer's step", *(f"{mode}, without its forward passes" for mode in FORWARDS))


@dataclass(frozen=True)
class Point:
    """The times of steps at one size.

    Attributes:
        parameters: Number of parameters.
        tensors: Number of tensors they are in.
        seconds: One sample for each of ``LINES``.
    """

    parameters: int
    tensors: int
    seconds: tuple[Sample, ...]


class _Weights(nn.Module):
    """Parameters in tensors of equal size."""

    def __init__(self, tensors: int, size: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.zeros(size) for _ in range(tensors))


class _Sum(Case):
    def loss(self) -> Tensor:
        """Returns a number that depends on all parameters."""
        return torch.stack([each.sum() for each in self.parameters]).sum()


def measure(
    make: Callable[[list[nn.Parameter]], Optimizer], places: Sequence[tuple[int, int]], rounds: int
) -> Iterator[Point]:
    """Takes bare and probe steps in turns at one size after the other.

    Args:
        make: Makes the base optimizer.
        places: Numbers of parameters and of tensors.
        rounds: Steps of each kind.
    """
    for parameters, tensors in places:
        case = _Sum("weights", _Weights(tensors, parameters // tensors), torch.zeros(0), torch.zeros(0))
        bare = make(case.parameters)
        wrapped = [Wrapped(case, make(case.parameters), mode, counts_forwards=False) for mode in FORWARDS]
        taken = [(seconds(bare.step), *(each.period() for each in wrapped)) for _ in range(rounds + 1)]
        yield Point(parameters, tensors, tuple(Sample(values) for values in zip(*taken[1:], strict=True)))


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Returns the exponent b in values ≈ a · sizes^b, by least squares."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def draw(by_size: Sequence[Point], by_count: Sequence[Point], path: Path) -> None:
    """Draws both and writes the picture.

    Args:
        by_size: Points that differ in their number of parameters.
        by_count: Points that differ in their number of tensors.
        path: Where to write it.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    panels: Any = figure.subplots(1, 2)
    for panel, points, what in ((panels[0], by_size, "parameters"), (panels[1], by_count, "tensors")):
        sizes = [getattr(point, what) for point in points]
        for index, name in enumerate(LINES):
            values = [1e3 * point.seconds[index].median for point in points]
            panel.loglog(sizes, values, marker="ov^"[index], linestyle=("-", "--", ":")[index], label=name)
        panel.set_xlabel(f"number of {what}")
        panel.set_ylabel("milliseconds")
        panel.grid(alpha=0.25)
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=110)
