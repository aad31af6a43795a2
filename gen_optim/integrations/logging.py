"""Loggers that take a dictionary of numbers and a step, as those of Weights & Biases, MLflow and Accelerate do."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from gen_optim.optimizer import GeNOptimizer
from gen_optim.records import ProbeRecord

__all__ = ["logging_hook"]


def logging_hook(
    log: Callable[[dict[str, float], int], Any], *, prefix: str = "gen/"
) -> Callable[[GeNOptimizer, ProbeRecord], None]:
    """Make a probe hook that hands what each probe step found to a logger.

    The numbers are ``learning_rate`` (of the step just taken; with several parameter groups ``learning_rate/0`` and so
    on), ``loss`` (where the step began), ``slope``, ``curvature`` and ``optimal_lr``. Those that are unknown or not
    finite are left out.

    Args:
        log: Called as ``log(numbers, step)`` after each probe step.
        prefix: Put before each name.

    Returns:
        What :meth:`~gen_optim.GeNOptimizer.register_probe_hook` takes.

    Raises:
        TypeError: If ``log`` cannot be called.

    Example:
        >>> handle = optimizer.register_probe_hook(logging_hook(wandb.log))  # doctest: +SKIP
        >>> handle = optimizer.register_probe_hook(logging_hook(accelerator.log))  # doctest: +SKIP
    """
    if not callable(log):
        raise TypeError(f"log must be a callable that takes a dictionary and a step, got {type(log).__name__}")

    def hook(optimizer: GeNOptimizer, record: ProbeRecord) -> None:
        rates = optimizer.get_last_lr()
        names = ["learning_rate"] if len(rates) == 1 else [f"learning_rate/{index}" for index in range(len(rates))]
        numbers: dict[str, float | None] = dict(zip(names, rates, strict=True))
        numbers |= {name: getattr(record, name) for name in ("loss", "slope", "curvature", "optimal_lr")}
        known = {prefix + name: each for name, each in numbers.items() if each is not None and math.isfinite(each)}
        log(known, record.step)

    return hook
