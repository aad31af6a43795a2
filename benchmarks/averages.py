"""Averaged weights, for runs whose learning rate is not annealed."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn

from benchmarks.workloads.registry import Task

EXPONENT = 16
"""The average is about that of the last 1 / 16 of a run, whatever its length."""
EVERY = 4
"""The average is updated after so many steps."""
_BATCHES = 20
"""Batches that give the statistics of batch normalisation."""


def power_law_average(model: nn.Module) -> AveragedModel:
    """Returns an average of a model's weights, θ̄ ← θ̄ + (1 − β)(θ − θ̄) with β = (1 − 1/n)^16 at the n-th update.

    Call ``update_parameters(model)`` every ``EVERY`` steps. (T. Karras and co-authors, "Analyzing and improving the
    training dynamics of diffusion models", CVPR 2024, arXiv:2312.02696, section 3.)
    """

    def average(averaged: Tensor, current: Tensor, updates: Tensor | int) -> Tensor:
        n = int(updates) + 1
        return torch.lerp(averaged, current, 1.0 - (1.0 - 1.0 / n) ** EXPONENT)

    return AveragedModel(model, avg_fn=average)


def evaluate_average(average: AveragedModel, task: Task, seed: int) -> float:
    """Returns the validation loss at averaged weights.

    Statistics of batch normalisation belong to other weights and are computed again.

    Args:
        average: The average of the task's model.
        task: The task.
        seed: Of the batches that give the statistics.
    """
    with torch.random.fork_rng(devices=[]):
        update_bn(itertools.islice(task.batches(seed), _BATCHES), average)
    return task.evaluate(average, task.validation)
