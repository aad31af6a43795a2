"""Bare optimizers and our own; the peers register themselves from ``peers.py``."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

import gen_optim
from benchmarks.battery.config import SCHEDULES, Config
from benchmarks.battery.task import Task
from gen_optim import GeNOptimizer

Closure = Callable[[], Tensor]

MOMENTUM, WEIGHT_DECAY = 0.9, 0.01
"""Of SGD, and of AdamW and its relatives, wherever they have one."""


class Stepper:
    """An optimizer as the training loop sees it. Override what differs.

    Args:
        optimizer: What steps, and what the schedule is attached to.

    Attributes:
        optimizer: What steps, and what the schedule is attached to.
        takes_schedule: Whether the loop attaches a scheduler; False for methods that scale by themselves.
        extra_forwards: Forward passes beyond the closure's, where the method makes them without the closure.
    """

    takes_schedule = True

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.extra_forwards = 0

    @property
    def is_probing(self) -> bool:
        """Whether the closure is called only to choose a learning rate, right now."""
        return False

    def step(self, closure: Closure) -> None:
        """One step; the closure zeroes gradients, evaluates the loss and goes backward."""
        closure()
        self.optimizer.step()

    def lr(self) -> float:
        """The learning rate that the last step used."""
        return float(self.optimizer.param_groups[0]["lr"])

    def finish(self, task: Task) -> nn.Module:
        """Called after the last step: returns the model to evaluate."""
        return task.model


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to choose learning rates.

    Attributes:
        name: In results.
        title: In the report.
        bases: The base optimizers that it works with.
        schedules: The schedules that it is run with.
        build: Makes it for a task.
        package: What to install for it, and the module to import; None if it is ours or torch's.
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


METHODS: dict[str, Method] = {}


def base_optimizer(task: Task, base: str, lr: float) -> Optimizer:
    """SGD with momentum or AdamW."""
    if base == "SGD":
        return SGD(task.parameters(), lr=lr, momentum=MOMENTUM)
    return AdamW(task.parameters(), lr=lr, weight_decay=WEIGHT_DECAY)


def _given(config: Config) -> float:
    if config.lr is None:
        raise ValueError(f"{config.method} needs a learning rate to begin with")
    return config.lr


def _bare(task: Task, config: Config) -> Stepper:
    return Stepper(base_optimizer(task, config.base, _given(config)))


class OurStepper(Stepper):
    """GeNOptimizer."""

    optimizer: GeNOptimizer

    @property
    def is_probing(self) -> bool:
        """Whether a probe runs right now."""
        return self.optimizer.is_probing

    def step(self, closure: Closure) -> None:
        """One step, which may call the closure again."""
        self.optimizer.step(closure)

    def lr(self) -> float:
        """The learning rate in force, the schedule's factor included."""
        return self.optimizer.get_last_lr()[0]


@dataclass(frozen=True)
class Ours:
    """Builds GeNOptimizer with default arguments but for these."""

    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, task: Task, config: Config) -> Stepper:
        """The base optimizer, wrapped; arguments among the configuration's options count too."""
        extra = {name: value for name, value in config.options.items() if name not in ("rule_version", "code")}
        base = base_optimizer(task, config.base, _given(config))
        return OurStepper(GeNOptimizer(base, **{**self.arguments, **extra}))


ALL = tuple(SCHEDULES)

for _method in (
    Method(name="bare", title="bare", bases=("SGD", "AdamW"), schedules=ALL, build=_bare),
    Method(name="gen", title="GeN", bases=("SGD", "AdamW"), schedules=ALL, build=Ours(), note="default arguments"),
    Method(
        name="gen-published",
        title="GeN, published rule",
        bases=("SGD", "AdamW"),
        schedules=ALL,
        build=Ours({"rule": "published", "mode": "approximate"}),
        note='`rule="published", mode="approximate"`',
    ),
):
    METHODS[_method.name] = _method

OURS = {"gen": 5, "gen-published": 3}
"""Our own rules, with a number that is part of the key of every run of theirs. Raise it when the rule decides
otherwise; its runs are then repeated."""


@cache
def code_fingerprint() -> str:
    """A short hash of gen_optim's code, blind to comments, docstrings and layout.

    It is noted in every run of ours, so that the report can say when runs come from different code.
    """
    digest = hashlib.sha256()
    for path in sorted(Path(gen_optim.__file__).parent.rglob("*.py")):
        if path.name in ("plotting.py", "records.py"):
            continue
        tree = ast.parse(path.read_text("utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                node.body = [each for each in node.body if not _is_docstring(each)]
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()[:12]


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
