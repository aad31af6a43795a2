"""What a method is: a way to choose learning rates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from benchmarks.battery.config import Config
from benchmarks.training import Stepper
from benchmarks.workloads import Task


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to choose learning rates.

    Attributes:
        name: The name in results.
        title: The name in the report.
        bases: The base optimizers that it works with.
        schedules: The schedules that it is run with.
        build: Makes it for a task.
        package: The distribution to install and the module to import; None for our own and torch's methods.
        note: Its settings and who recommends them.
    """

    name: str
    title: str
    bases: Sequence[str]
    schedules: Sequence[str]
    build: Callable[[Task, Config], Stepper]
    package: tuple[str, str] | None = None
    note: str = ""

    @property
    def is_installed(self) -> bool:
        """Whether its package can be imported."""
        return self.package is None or find_spec(self.package[1]) is not None
