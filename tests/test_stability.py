"""Whole trainings with the default arguments: valleys without noise, where nothing holds the learning rate back but
the directions that it makes unstable, must be descended without blowing up in between.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from gen_optim import GeNOptimizer, History, ProbeStatus

STEPS, SETTLED = 1000, 100


def valley(seed: int) -> tuple[nn.Parameter, Callable[[], Tensor]]:
    """A quadratic of 20 numbers with condition number 10,000, rotated, and a start on it."""
    generator = torch.Generator().manual_seed(seed)
    rotation, _ = torch.linalg.qr(torch.randn(20, 20, generator=generator))
    hessian = rotation @ torch.diag(torch.logspace(0.0, -4.0, 20)) @ rotation.T
    point = nn.Parameter(torch.randn(20, generator=generator))
    return point, lambda: 0.5 * point @ hessian @ point


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("make", "rise", "descent"),
    [(partial(SGD, lr=1e-5, momentum=0.9), 100.0, 1e-3), (partial(AdamW, lr=1e-5), 1000.0, 1e-2)],
    ids=["SGD", "AdamW"],
)
def test_a_valley_without_noise_is_descended_without_blowing_up(
    make: Callable[..., Optimizer], rise: float, descent: float, seed: int
) -> None:
    """It hovers at the edge of stability: the loss rises up to fortyfold with SGD, two-hundredfold with AdamW."""
    point, evaluate = valley(seed)
    optimizer, history = GeNOptimizer(make([point])), History()
    optimizer.register_probe_hook(history)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = evaluate()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(STEPS)]
    assert max(losses[SETTLED:]) <= rise * losses[SETTLED]
    assert losses[-1] <= descent * losses[0]
    seen = {record.status for record in history}
    assert not seen & {ProbeStatus.REVERTED, ProbeStatus.EXPLODED}
    assert len(history) <= 50 + STEPS / 3
