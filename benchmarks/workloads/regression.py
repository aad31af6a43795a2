"""A regression on generated data."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from benchmarks.data import Data
from benchmarks.determinism import seeded
from benchmarks.workloads.registry import Batch, Model, Task, workload


def _squared_error(model: Model, batch: Batch) -> Tensor:
    return mse_loss(model(batch[0]), batch[1])


@workload(
    family="tables",
    summary="tanh network 8-64-64-1 on a function of eight numbers with a little noise, batch 128",
    steps=300,
    data="generated",
    suite="study",
)
def regression(seed: int, _data: Data) -> Task:
    """Smooth activations, and data that do not repeat."""

    def batches(number: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(number)
        while True:
            inputs = torch.randn(128, 8, generator=generator)
            noise = 0.1 * torch.randn(128, 1, generator=generator)
            yield inputs, torch.sin(2.0 * inputs[:, :1]) + inputs[:, 1:2] * inputs[:, 2:3] + noise

    return Task(
        model=seeded(
            lambda: nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)), seed
        ),
        loss=_squared_error,
        batches=batches,
        training=[next(batches(1000 + seed))],
        validation=[next(batches(2000 + seed))],
    )
