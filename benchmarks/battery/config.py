"""The configuration of a run, which is also its key in the results."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from benchmarks.data import Data
from benchmarks.optimizers import BASES
from benchmarks.workloads import Workload

SEEDS = (0, 1, 2)
SWEEP_SEED = SEEDS[0]

SWEEP = {
    "SGD": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0),
    "AdamW": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0),
}
"""The learning rates of the sweep, half a decade apart, the same for every workload."""

GIVEN = (1e-8, 1e-5, 1e-2, 10.0)
"""The initial learning rates given to our own rule."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A run's full configuration.

    Attributes:
        workload: A name in the registry of workloads.
        version: The version of that workload's definition.
        source: The name of the data set.
        base: A name in ``benchmarks.optimizers.BASES``.
        method: A name in ``benchmarks.battery.methods.METHODS``.
        options: The method's options.
        schedule: A name in ``benchmarks.training.SCHEDULES``.
        lr: The initial learning rate; None for the method's own.
        seed: Decides initial weights and batches, alike for all methods.
        steps: The number of steps.
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
        """The configuration as a string, the same for equal configurations."""
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
        workload: The workload.
        base: The base optimizer.
        source: The name of the data set.
        steps: The number of steps.
    """

    workload: Workload
    base: str
    source: str
    steps: int

    @property
    def name(self) -> str:
        """The name in headings."""
        return f"{self.workload.name}, {self.base}"

    def config(
        self,
        method: str,
        schedule: str,
        lr: float | None,
        seed: int,
        options: Mapping[str, Any] | None = None,
    ) -> Config:
        """Returns a run in this cell."""
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
    """Returns a cell for every workload with every base.

    Args:
        workloads: The workloads by name.
        data: Decides which data sets the workloads train on.
        steps: Instead of each workload's own, for trials.
    """
    return [
        Cell(each, base, data.source(each.data), steps or each.steps) for each in workloads.values() for base in BASES
    ]
