"""The base optimizers of the benchmarks, bare and in GeNOptimizer."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from benchmarks.training import Closure, Stepper
from gen_optim import GeNOptimizer

BASES = ("SGD", "AdamW")

MOMENTUM, WEIGHT_DECAY = 0.9, 0.01
"""Of SGD, and of AdamW and its relatives that have weight decay."""


def base_optimizer(parameters: Iterable[nn.Parameter], base: str, lr: float) -> Optimizer:
    """Returns SGD with momentum or AdamW.

    Args:
        parameters: The parameters to optimize.
        base: A name in ``BASES``.
        lr: The initial learning rate.
    """
    if base == "SGD":
        return SGD(parameters, lr=lr, momentum=MOMENTUM)
    return AdamW(parameters, lr=lr, weight_decay=WEIGHT_DECAY)


class GeNStepper(Stepper):
    """GeNOptimizer as the training loop sees it."""

    optimizer: GeNOptimizer

    @property
    def is_probing(self) -> bool:
        """Whether a probe is running."""
        return self.optimizer.is_probing

    def step(self, closure: Closure) -> None:
        """Takes one step, which may call the closure again."""
        self.optimizer.step(closure)

    def lr(self) -> float:
        """Returns the learning rate in force, the schedule's factor included."""
        return self.optimizer.get_last_lr()[0]
