"""A physics-informed network: its loss differentiates inside."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from benchmarks.data import Data
from benchmarks.determinism import seeded
from benchmarks.workloads.registry import Batch, Model, Task, workload

_WAVE = 2.0 * math.pi
_BOUNDARY_WEIGHT = 10.0


def _residual(model: Model, batch: Batch) -> Tensor:
    """The mean squared residual of u″ + (2π)² sin 2πx = 0, over (2π)⁴, and of u(0) = u(1) = 0."""
    x = batch[0].detach().clone().requires_grad_()
    u = model(x)
    (first,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x, create_graph=True)
    inside = (second / _WAVE**2 + torch.sin(_WAVE * x)).square().mean()
    ends: Tensor = model(torch.tensor([[0.0], [1.0]])).square().mean()
    loss: Tensor = inside + _BOUNDARY_WEIGHT * ends
    return loss


@workload(
    family="science",
    summary="physics-informed tanh network 1-32-32-1 for a two-point boundary-value problem, 64 random points a step",
    steps=600,
    data="generated",
    approaches_zero=True,
)
def pinn(seed: int, _data: Data) -> Task:
    """Steep walls: the loss squares a second derivative of the network."""

    def batches(number: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(number)
        while True:
            yield (torch.rand(64, 1, generator=generator),)

    grid = (torch.linspace(0.0, 1.0, 401).unsqueeze(1),)
    return Task(
        model=seeded(
            lambda: nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)), seed
        ),
        loss=_residual,
        batches=batches,
        training=[(torch.rand(400, 1, generator=torch.Generator().manual_seed(1000 + seed)),)],
        validation=[grid],
        differentiates=True,
    )
