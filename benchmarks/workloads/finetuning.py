"""A network pretrained on one half of the classes, adapted to the other."""

from __future__ import annotations

import copy
from functools import cache

from torch import Tensor, nn
from torch.nn.functional import relu
from torch.optim import AdamW

from benchmarks.data import Data
from benchmarks.determinism import seeded
from benchmarks.workloads.registry import Batch, Task, chunks, classification, shuffled, workload

_KNOWN = 5  # the digits 0 to 4 are for pretraining
_PRETRAINING_STEPS = 300


class Adapted(nn.Module):
    """A frozen linear layer and a trained product of two thin matrices, the second zero at first."""

    def __init__(self, frozen: nn.Linear, rank: int) -> None:
        super().__init__()
        self.frozen = frozen.requires_grad_(False)
        self.down = nn.Linear(frozen.in_features, rank, bias=False)
        self.up = nn.Linear(rank, frozen.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, features: Tensor) -> Tensor:
        """Returns the output of the frozen layer, corrected."""
        corrected: Tensor = self.frozen(features) + self.up(self.down(features))
        return corrected


class Network(nn.Module):
    """Two hidden layers and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first: nn.Module = nn.Linear(64, 128)
        self.second: nn.Module = nn.Linear(128, 128)
        self.head = nn.Linear(128, _KNOWN)

    def forward(self, images: Tensor) -> Tensor:
        """Returns the scores of five classes."""
        scores: Tensor = self.head(relu(self.second(relu(self.first(images)))))
        return scores

    def adapt(self, rank: int) -> Network:
        """Freezes the hidden layers, gives them adapters, and replaces the head."""
        assert isinstance(self.first, nn.Linear)
        assert isinstance(self.second, nn.Linear)
        self.first, self.second = Adapted(self.first, rank), Adapted(self.second, rank)
        self.head = nn.Linear(128, _KNOWN)
        return self


def _half(images: Tensor, labels: Tensor, *, known: bool) -> Batch:
    chosen = labels < _KNOWN if known else labels >= _KNOWN
    return images[chosen], labels[chosen] % _KNOWN


@cache
def _pretrained(data: Data, seed: int) -> nn.Module:
    model = seeded(Network, seed)
    optimizer = AdamW(model.parameters(), lr=3e-3)
    stream = shuffled(_half(*data.digits(seed).train, known=True), 64)(seed)
    for _ in range(_PRETRAINING_STEPS):
        optimizer.zero_grad()
        classification(model, next(stream)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model


@workload(
    family="fine-tuning",
    summary="digits 0 to 4 pretrained; adapters of rank 4 and a new head learn 5 to 9, batch 32",
    steps=300,
    data="digits",
)
def finetune_adapters(seed: int, data: Data) -> Task:
    """Most parameters are frozen; half of the adapters' are zero at first, so that the others have no gradient."""
    split = data.digits(seed)
    train, valid = _half(*split.train, known=False), _half(*split.valid, known=False)
    network = copy.deepcopy(_pretrained(data, seed))
    assert isinstance(network, Network)
    return Task(
        model=seeded(lambda: network.adapt(rank=4), 1000 + seed),
        loss=classification,
        batches=shuffled(train, 32),
        training=chunks(train),
        validation=chunks(valid),
    )
