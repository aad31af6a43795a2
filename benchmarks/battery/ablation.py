"""What each mechanism of the default rule is worth: the battery with one of them switched off or changed at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pkgutil import resolve_name
from typing import Any

from benchmarks.battery.config import SEEDS, Cell, Config
from benchmarks.battery.methods import OURS
from benchmarks.battery.number_formats import NOTHING, number
from benchmarks.battery.records import Results
from benchmarks.battery.scores import CAP, geometric_mean, mean_ratio
from benchmarks.battery.study import USUAL
from benchmarks.markdown import markdown_table

_SCHEDULES = ("linear", "constant")
_NEVER = math.inf


def _holds_never(*_: object, **__: object) -> bool:
    return False


@dataclass(frozen=True)
class Mechanism:
    """Something that the default rule does, and how to do without it.

    Attributes:
        name: The name in results.
        change: What is done instead, for the report.
        options: Options of the rule.
        constants: Values of constants and methods, by module of ``gen_optim``, or ``module:class``, and name.
    """

    name: str
    change: str
    options: Mapping[str, Any] = field(default_factory=dict)
    constants: Mapping[tuple[str, str], Any] = field(default_factory=dict)


_RELAXED, _AVERAGES = "rules.relaxed", "rules.averages"
_RULE, _CONTROLLER = "rules.relaxed:RelaxedRule", "controller:Controller"

MECHANISMS = {
    each.name: each
    for each in (
        Mechanism("start fraction", "0.03 instead of 0.1", {"start_fraction": 0.03}),
        Mechanism("start fraction, larger", "0.3 instead of 0.1", {"start_fraction": 0.3}),
        Mechanism("growth in the burn-in", "20 % instead of 10 %", constants={(_RELAXED, "_GROWTH"): 1.2}),
        Mechanism("fall in the burn-in", "10 % instead of 20 %", constants={(_RELAXED, "_FALL"): 0.9}),
        Mechanism("burn-in, shorter", "25 steps instead of 50", {"burn_in": 25}),
        Mechanism("burn-in, longer", "100 steps instead of 50", {"burn_in": 100}),
        Mechanism("smoothing", "0.8 instead of 0.9", {"smoothing": 0.8}),
        Mechanism("restart", "none", constants={(_RULE, "may_restart"): _holds_never}),
        Mechanism("balance", "none: annealing by t^(−1/8)", constants={(_CONTROLLER, "has_one_batch"): True}),
        Mechanism("balance, smaller", "0.15 instead of 0.3", {"balance": 0.15}),
        Mechanism("balance, larger", "0.6 instead of 0.3", {"balance": 0.6}),
        Mechanism(
            "fall of the balance", "at most t^(−1) instead of t^(−1/2)", constants={(_RELAXED, "_STEEPEST_FALL"): 1.0}
        ),
        Mechanism(
            "growth of the balance", "at most t^(1/2) instead of t", constants={(_RELAXED, "_STEEPEST_GROWTH"): 0.5}
        ),
        Mechanism("rising loss", "no fall while steps raise the loss", constants={(_AVERAGES, "_ASCENDS"): _NEVER}),
        Mechanism("one batch", "is balanced too", constants={(_CONTROLLER, "has_one_batch"): False}),
        Mechanism("annealing", "none: on one batch it is held", {"annealing": 0.0}),
        Mechanism("agreement", "after the burn-in parabolas are never followed", constants={(_RELAXED, "_AGREE"): 1.0}),
        Mechanism("certainty", "no growth at every step, smaller falls", constants={(_RELAXED, "_CERTAIN"): 1.0}),
        Mechanism("growth later", "10 % instead of 5 %", constants={(_RELAXED, "_LATER_CHANGE"): 0.1}),
        Mechanism("careful growth", "5 % instead of 2 %", constants={(_RELAXED, "_CAREFUL_GROWTH"): 1.05}),
        Mechanism("contradiction", "none", constants={(_RELAXED, "is_contradicted"): _holds_never}),
        Mechanism("unusual rise", "no fall", constants={(_RELAXED, "rises_unusually"): _holds_never}),
        Mechanism("divergence", "no step is reverted", constants={(_RELAXED, "is_diverging"): _holds_never}),
        Mechanism(
            "explosion",
            "no cut after an exploded loss",
            constants={(_RELAXED, "has_exploded"): _holds_never},
        ),
        Mechanism("size of the cuts", "by 4 instead of 2", {"max_change": 4.0}),
        Mechanism("cap of a parabola", "none", constants={(_AVERAGES, "_MOST_CHANGES"): _NEVER}),
        Mechanism("faster average of changes", "none", constants={(_AVERAGES, "_CHANGE_WEIGHT"): 0.0}),
    )
}
"""The mechanisms by name, in the order of the report."""


@contextmanager
def without(name: str | None) -> Iterator[None]:
    """Changes the constants of a mechanism inside of the block; None changes nothing."""
    constants = {} if name is None else MECHANISMS[name].constants
    modules = {place: resolve_name(f"gen_optim.{place[0]}") for place in constants}
    before = {place: getattr(module, place[1]) for place, module in modules.items()}
    try:
        for place, value in constants.items():
            setattr(modules[place], place[1], value)
        yield
    finally:
        for place, value in before.items():
            setattr(modules[place], place[1], value)


def plan(cells: Sequence[Cell], seeds: Sequence[int] = SEEDS) -> list[Config]:
    """Returns the runs, with and without a schedule, one seed after the other."""
    return [
        cell.config("gen", schedule, USUAL, seed, _options(each))
        for seed in seeds
        for each in MECHANISMS.values()
        for cell in cells
        for schedule in _SCHEDULES
    ]


def _options(mechanism: Mechanism | None) -> dict[str, Any]:
    version = {"rule_version": OURS["gen"]}
    return version if mechanism is None else {**version, **mechanism.options, "without": mechanism.name}


def page(cells: Sequence[Cell], results: Results, command: str) -> str:
    """Returns the report.

    Args:
        cells: Workloads with base optimizers.
        results: The runs of the default rule, and those without a mechanism.
        command: What made them.
    """
    rows = []
    for mechanism in MECHANISMS.values():
        row = [mechanism.name, mechanism.change]
        ratios = [_ratios(mechanism, schedule, cells, results) for schedule in _SCHEDULES]
        for found in ratios:
            networks = [value for cell, value in found if cell.workload.family != "classics"]
            row += [number(geometric_mean(value for _, value in found)), number(geometric_mean(networks))]
        cell, worst = max((each for found in ratios for each in found), key=lambda each: each[1], default=(None, 0.0))
        row += [NOTHING if cell is None else f"{number(worst)} ({cell.name})", str(sum(map(len, ratios)))]
        rows.append(row)
    head = ["mechanism", "instead", "linear", "linear, models", "averaged", "averaged, models", "worst", "pairs"]
    title = "# What each mechanism of the default rule is worth"
    return "\n\n".join([title, command, _READING, markdown_table(head, rows)]) + "\n"


def _ratios(mechanism: Mechanism, schedule: str, cells: Sequence[Cell], results: Results) -> list[tuple[Cell, float]]:
    """The mean loss without a mechanism over that with it, of each cell, on the seeds on which both are known."""
    is_averaged = schedule == "constant"
    found = []
    for cell in cells:
        above, below = (
            [cell.config("gen", schedule, USUAL, seed, _options(each)) for seed in SEEDS] for each in (mechanism, None)
        )
        ratio = mean_ratio(
            above, below, cell.workload, results, is_averaged=is_averaged, is_baseline_averaged=is_averaged
        )
        if ratio is not None:
            found.append((cell, ratio.value))
    return found


_READING = f"""\
The default rule with one mechanism switched off, or one number changed, over the default rule: ratios of final
validation losses, geometric means over workloads × bases, on the same seeds. Above 1 the rule is worse without it.
*Linear*: under a linear schedule. *Averaged*: without a scheduler, at averaged weights. *Models*: without the test
functions (Rosenbrock, Beale, quadratics). A ratio counts as {CAP:g} at most, and as that if a run diverged."""
