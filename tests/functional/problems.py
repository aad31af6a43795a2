"""Models of many kinds and optimizers after a few steps on them: the cases of the tests in this folder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gen_optim.functional.direction import optimizer_direction
from tests.training import muon


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def detached(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


class Tied(nn.Module):
    """Token embedding and output layer share their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.out = nn.Linear(3, 5)
        self.out.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        result: Tensor = self.out(torch.tanh(self.embedding(tokens)))
        return result


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(4, 2, batch_first=True)
        self.out = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.out(x + self.inner(x, x, x, need_weights=False)[0])
        return result


TOKENS = torch.tensor([[0, 2, 1], [4, 3, 2]])


MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), randn(5, 3)),
    "conv": (
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.SiLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(2, 1)),
        randn(3, 1, 4, 4),
    ),
    "BatchNorm": (lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.GELU(), nn.Linear(4, 1)), randn(6, 3)),
    "LayerNorm": (lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 1)), randn(6, 3)),
    "embedding": (lambda: nn.Sequential(nn.Embedding(5, 3), nn.Sigmoid(), nn.Linear(3, 2)), TOKENS),
    "attention": (Attending, randn(2, 3, 4)),
    "dropout": (lambda: nn.Sequential(nn.Linear(3, 6), nn.Dropout(0.4), nn.Tanh(), nn.Linear(6, 1)), randn(6, 3)),
    "tied": (Tied, TOKENS),
}


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.1),
    "Nesterov": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, nesterov=True),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    "AMSGrad": lambda parameters: torch.optim.Adam(parameters, lr=0.01, amsgrad=True, weight_decay=0.1),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.3),
    "AdamW one by one": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, foreach=False),
    "NAdam": lambda parameters: torch.optim.NAdam(parameters, lr=0.01),
    "Adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.01),
    "RMSprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.01, momentum=0.9, centered=True),
    "tensor lr": lambda parameters: torch.optim.Adam(parameters, lr=torch.tensor(0.01, dtype=torch.float64)),
}


ALL_OPTIMIZERS = {**OPTIMIZERS, "Muon": lambda parameters: muon(parameters, lr=0.02)}


class Problem:
    """A model, its loss as a function of its parameters, and an optimizer that has taken two steps."""

    def __init__(self, name: str, make: Callable[[Any], torch.optim.Optimizer], *, dtype: Any = torch.float64) -> None:
        torch.manual_seed(0)
        build, inputs = MODELS[name]
        self.model = build().to(dtype)
        self.inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs
        self.optimizer = make(list(self.model.parameters()))
        for _ in range(2):
            self.backward()
            self.optimizer.step()
        self.backward()

    def loss(self, params: dict[str, Tensor]) -> Tensor:
        torch.manual_seed(7)
        # Copies: the loss must not depend on what it writes.
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        return functional_call(self.model, {**params, **buffers}, (self.inputs,)).cos().square().mean()

    def backward(self) -> None:
        self.optimizer.zero_grad()
        self.loss(dict(self.model.named_parameters())).backward()

    @property
    def direction(self) -> dict[str, Tensor]:
        return optimizer_direction(self.optimizer, self.model.named_parameters())
