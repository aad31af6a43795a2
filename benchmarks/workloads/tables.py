"""Tables with unscaled features, which are ill-conditioned, and a matrix of ratings to factorise."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss

from benchmarks.data import Data
from benchmarks.determinism import seeded
from benchmarks.workloads.registry import Batch, Loss, Model, Task, chunks, shuffled, workload


def _linear(name: str, loss: Loss, data: Data, seed: int) -> Task:
    split = data.table(name, seed)
    return Task(
        model=seeded(lambda: nn.Linear(split.train_x.shape[1], 1), seed),
        loss=loss,
        batches=shuffled(split.train, 64),
        training=chunks(split.train),
        validation=chunks(split.valid),
    )


@workload(
    family="tables",
    summary="linear regression on the diabetes table, features neither centred nor scaled, batch 64",
    steps=400,
    data="tables",
)
def table_regression(seed: int, data: Data) -> Task:
    """A quadratic loss with a large condition number."""
    return _linear("diabetes", lambda model, batch: mse_loss(model(batch[0]).squeeze(1), batch[1]), data, seed)


@workload(
    family="tables",
    summary="logistic regression on the breast-cancer table, features neither centred nor scaled, batch 64",
    steps=400,
    data="tables",
)
def table_logistic(seed: int, data: Data) -> Task:
    """Features whose scales differ by a factor of 100,000."""
    return _linear(
        "cancer",
        lambda model, batch: binary_cross_entropy_with_logits(model(batch[0]).squeeze(1), batch[1]),
        data,
        seed,
    )


class Factors(nn.Module):
    """A factor for each user and each item, small at first: a saddle."""

    def __init__(self, users: int, items: int, rank: int) -> None:
        super().__init__()
        self.users = nn.Parameter(0.01 * torch.randn(users, rank))
        self.items = nn.Parameter(0.01 * torch.randn(items, rank))

    def forward(self, chosen: Tensor) -> Tensor:
        """Returns the ratings of some users, shape ``(chosen, items)``."""
        return self.users[chosen] @ self.items.T


def _squared_error(model: Model, batch: Batch) -> Tensor:
    """The squared error, summed over the ratings that were given and averaged over users."""
    chosen, ratings, given = batch
    error: Tensor = given * (model(chosen) - ratings).square()
    return error.sum() / len(chosen)


@workload(
    family="tables",
    summary="factorisation, rank 8, of 200 × 100 ratings (rank 5 and noise), small initialisation, batch 32 users",
    steps=600,
    data="generated",
)
def matrix_factorisation(seed: int, _data: Data) -> Task:
    """Training starts at a saddle, where slope and curvature are both tiny."""
    users, items, rank, noise = 200, 100, 5, 0.3
    generator = torch.Generator().manual_seed(1000 + seed)
    left = torch.randn(users, rank, generator=generator)
    right = torch.randn(items, rank, generator=generator)
    ratings = left @ right.T / rank**0.5 + noise * torch.randn(users, items, generator=generator)
    lot = torch.rand(users, items, generator=generator)
    train, valid = (lot < 0.4).float(), ((lot >= 0.4) & (lot < 0.6)).float()
    everyone = torch.arange(users)
    return Task(
        model=seeded(lambda: Factors(users, items, rank=8), seed),
        loss=_squared_error,
        batches=shuffled((everyone, ratings, train), 32),
        training=chunks((everyone, ratings, train)),
        validation=chunks((everyone, ratings, valid)),
    )
