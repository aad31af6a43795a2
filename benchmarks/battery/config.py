"""What a run is: its configuration, which is also its key in the results."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from benchmarks.battery.data import Data
from benchmarks.battery.task import Workload

SEEDS = (0, 1, 2)
SWEEP_SEED = SEEDS[0]
BASES = ("SGD", "AdamW")

SWEEP = {
    "SGD": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0),
    "AdamW": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0),
}
"""The learning rates of the sweep, half a decade apart, the same for every workload."""

GIVEN = (1e-8, 1e-5, 1e-2, 10.0)
"""The initial learning rates given to our own rule."""


def _constant(_step: int, _steps: int) -> float:
    return 1.0


def _linear(step: int, steps: int) -> float:
    return 1.0 - step / steps


def _cosine(step: int, steps: int) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * step / steps))


SCHEDULES: dict[str, Callable[[int, int], float]] = {"constant": _constant, "linear": _linear, "cosine": _cosine}
"""The factor on the learning rate at a step, counted from 0, out of so many."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A run's full configuration.

    Attributes:
        workload: A name in the registry of workloads.
        version: The version of that workload's definition.
        source: What its data come from.
        base: A name in ``BASES``.
        method: A name in ``benchmarks.battery.methods.METHODS``.
        options: The method's options.
        schedule: A name in ``SCHEDULES``.
        lr: The learning rate to begin with; None for the method's own.
        seed: Decides initial weights and batches, alike for all methods.
        steps: How many.
    """

    workload: str
    version: int
    source: str
    base: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    schedule: str
    lr: float | None
    seed: int
    steps: int

    @cached_property
    def key(self) -> str:
        """The configuration as one string, the same for the same configuration."""
        return json.dumps(asdict(self), sort_keys=True)

    def __hash__(self) -> int:
        return hash(self.key)

    def __str__(self) -> str:
        lr = "" if self.lr is None else f" {self.lr:g}"
        return f"{self.workload} {self.base} {self.method} {self.schedule}{lr} seed {self.seed}"


@dataclass(frozen=True)
class Cell:
    """A workload with a base optimizer: a row of the report.

    Attributes:
        workload: What is trained.
        base: With what.
        source: On what.
        steps: How long.
    """

    workload: Workload
    base: str
    source: str
    steps: int

    @property
    def name(self) -> str:
        """For headings."""
        return f"{self.workload.name}, {self.base}"

    def config(
        self,
        method: str,
        schedule: str,
        lr: float | None,
        seed: int,
        options: Mapping[str, Any] | None = None,
    ) -> Config:
        """A run in this cell."""
        return Config(
            workload=self.workload.name,
            version=self.workload.version,
            source=self.source,
            base=self.base,
            method=method,
            options=dict(options or {}),
            schedule=schedule,
            lr=lr,
            seed=seed,
            steps=self.steps,
        )


def cells(workloads: Mapping[str, Workload], data: Data, steps: int | None = None) -> list[Cell]:
    """All rows: every workload with every base.

    Args:
        workloads: The registry.
        data: Decides what the workloads train on.
        steps: Instead of each workload's own, for trials.
    """
    return [
        Cell(each, base, data.source(each.data), steps or each.steps) for each in workloads.values() for base in BASES
    ]
