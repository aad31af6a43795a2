"""Bare optimizers and our own rules."""

from __future__ import annotations

import ast
import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import gen_optim
from benchmarks.battery.config import Config
from benchmarks.battery.methods.method import Method
from benchmarks.optimizers import BASES, GeNStepper, base_optimizer
from benchmarks.training import SCHEDULES, Stepper
from benchmarks.workloads import Task
from gen_optim import GeNOptimizer
from gen_optim.rules import make_rule

_NO_OPTIONS = ("rule_version", "code", "without")
"""What keys hold besides the options of the rule."""


def _initial_lr(config: Config) -> float:
    if config.lr is None:
        raise ValueError(f"{config.method} needs a learning rate to begin with")
    return config.lr


def _bare(task: Task, config: Config) -> Stepper:
    return Stepper(base_optimizer(task.parameters(), config.base, _initial_lr(config)))


@dataclass(frozen=True)
class Ours:
    """Builds GeNOptimizer with a rule and a mode, and otherwise its defaults."""

    rule: str = "relaxed"
    mode: str = "lookback"

    def __call__(self, task: Task, config: Config) -> Stepper:
        """Returns the base optimizer, wrapped. The configuration's options are options of the rule."""
        options = {name: value for name, value in config.options.items() if name not in _NO_OPTIONS}
        base = base_optimizer(task.parameters(), config.base, _initial_lr(config))
        return GeNStepper(GeNOptimizer(base, rule=make_rule(self.rule, **options), mode=self.mode))


_ALL = tuple(SCHEDULES)

BARE_AND_OURS = (
    Method(name="bare", title="bare", bases=BASES, schedules=_ALL, build=_bare),
    Method(name="gen", title="GeN", bases=BASES, schedules=_ALL, build=Ours(), note="default arguments"),
    Method(
        name="gen-published",
        title="GeN, published rule",
        bases=BASES,
        schedules=_ALL,
        build=Ours("published", "approximate"),
        note='`rule="published", mode="approximate"`',
    ),
)

OURS = {"gen": 16, "gen-published": 3}
"""Our own rules with a version, which is part of the key of each of their runs. Raise it when the rule decides
otherwise; its runs are then repeated."""


@cache
def code_fingerprint() -> str:
    """Returns a short hash of gen_optim's code that ignores comments, docstrings and layout.

    Each run of ours has it, so that the report can say that runs come from different code.
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
