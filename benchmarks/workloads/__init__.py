"""The workloads. Importing this package fills the registry, in the order of the battery's report."""

# isort: off
from benchmarks.workloads.registry import WORKLOADS, Batch, Task, Workload
from benchmarks.workloads import (  # noqa: F401  # imported for the registry
    digits,
    images,
    text,
    tables,
    regression,
    science,
    finetuning,
    classics,
    long,
)
# isort: on

__all__ = ["BATTERY", "LONG", "WORKLOADS", "Batch", "Task", "Workload"]

BATTERY = {name: each for name, each in WORKLOADS.items() if each.suite == "battery"}
"""The workloads of the battery."""
LONG = {name: each for name, each in WORKLOADS.items() if each.suite == "long"}
"""The workloads of ``battery --long``."""
