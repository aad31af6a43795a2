"""Tables with a row for each workload."""

from __future__ import annotations

import math
from collections.abc import Sequence

from benchmarks.battery.comparison import Comparison
from benchmarks.battery.config import GIVEN, SEEDS, SWEEP, Cell, Config
from benchmarks.battery.methods import METHODS, OURS, PEERS
from benchmarks.battery.number_formats import NOTHING, bottom_lines, named, number, ratio, setting
from benchmarks.battery.scores import Ratio, geometric_mean
from benchmarks.battery.study import peer, sweep
from benchmarks.markdown import markdown_table
from benchmarks.training import SCHEDULES


def tuned_loss(known: Comparison, cell: Cell) -> str:
    """Returns the validation loss of the tuned baseline, without a floor, and with a star if it may change."""
    tuned = known.tuned[cell]
    if tuned is None:
        return NOTHING
    losses = [record.validation_loss for run in tuned.runs if (record := known.results.get(run)) is not None]
    return f"{sum(losses) / len(losses):.4g}{'' if tuned.is_complete else '*'}"


def main_table(known: Comparison, method: str) -> str:
    """Returns the table of a rule of ours: its ratios to the tuned baseline, its spread, cost and failures."""
    head = ["workload, base", "tuned loss", "fixed", *map(named, SCHEDULES), "no scheduler, averaged"]
    head += ["no scheduler / best constant", "spread", "extra forwards a step", "diverged", "stalled"]
    rows, ratios = [], []
    for cell in known.study.cells:
        diverged, stalled, count = known.failures(cell, method)
        forwards = known.extra_forwards([cell], method)
        ratios.append(_main_ratios(known, cell, method))
        rows.append(
            [
                cell.name,
                tuned_loss(known, cell),
                *map(ratio, ratios[-1]),
                NOTHING if math.isnan(forwards) else f"{forwards:.2f}",
                f"{diverged}/{count}",
                f"{stalled}/{count}",
            ]
        )
    return markdown_table(head, [*rows, *_bottom(len(head), 2, ratios)])


def _main_ratios(known: Comparison, cell: Cell, method: str) -> list[Ratio | None]:
    tuned, fixed = known.tuned[cell], known.fixed[cell]
    return [
        None if fixed is None else known.over(cell, fixed.runs, tuned),
        *(known.over(cell, known.ours(cell, method, schedule), tuned) for schedule in SCHEDULES),
        known.over(cell, known.ours(cell, method, "constant"), tuned, is_averaged=True),
        known.over(cell, known.ours(cell, method, "constant"), known.best_constant[cell]),
        known.spread(cell, method),
    ]


def _bottom(width: int, first: int, rows: Sequence[Sequence[Ratio | None]]) -> list[list[str]]:
    """Returns the lines under a table whose columns from ``first`` on are ratios."""
    columns = enumerate(zip(*rows, strict=True), start=first)
    return bottom_lines(width, {place: [each.value for each in column if each] for place, column in columns})


def starts_table(known: Comparison) -> str:
    """Returns the table of our rules from each initial learning rate, over tuned: geometric means over all rows."""
    rows = []
    for method in OURS:
        for schedule in SCHEDULES:
            row = [METHODS[method].title, named(schedule)]
            for lr in GIVEN:
                found = (
                    known.over(
                        cell, [run for run in known.ours(cell, method, schedule) if run.lr == lr], known.tuned[cell]
                    )
                    for cell in known.study.cells
                )
                row.append(number(geometric_mean(each.value for each in found if each)))
            rows.append(row)
    return markdown_table(["rule", "schedule", *(f"from {lr:g}" for lr in GIVEN)], rows)


def peer_table(known: Comparison, base: str) -> str:
    """Returns the table of peers beside our rule, over tuned, and the number of workloads on which we are ahead."""
    mine = [("gen", schedule) for schedule in SCHEDULES]
    theirs = [
        (each.name, schedule)
        for each in PEERS
        if base in each.bases
        for schedule in each.schedules
        if _is_there(known, base, each.name, schedule)
    ]
    columns = [*mine, *theirs]
    rows, ratios, wins = [], [], {column: Wins() for column in theirs}
    for cell in known.study.cells:
        if cell.base != base:
            continue
        tuned = known.tuned[cell]
        found = {column: known.over(cell, _runs(known, cell, *column), tuned) for column in columns}
        averaged = known.over(cell, known.ours(cell, "gen", "constant"), tuned, is_averaged=True)
        ratios.append([averaged, *found.values()])
        rows.append([cell.workload.name, *map(ratio, ratios[-1])])
        for name, schedule in theirs:
            # Like with like: with a horizon, against our run with the same one; without, at what is to be used then.
            ours = averaged if schedule == "constant" else found["gen", schedule]
            wins[name, schedule].count(ours, found[name, schedule])
    ahead = ["**we are ahead on**", "", *[""] * len(mine), *map(str, wins.values())]
    titles = [f"{METHODS[name].title}, {named(schedule)}" for name, schedule in columns]
    head = ["workload", f"{METHODS['gen'].title}, no scheduler, averaged", *titles]
    return markdown_table(head, [*rows, *_bottom(len(head), 1, ratios), ahead])


class Wins:
    """Counts the workloads on which we are ahead of a peer; being equal does not count."""

    def __init__(self) -> None:
        self.won = self.compared = 0

    def count(self, ours: Ratio | None, theirs: Ratio | None) -> None:
        """Counts a workload, if both are known."""
        if ours is not None and theirs is not None:
            self.won += ours.value < theirs.value
            self.compared += 1

    def __str__(self) -> str:
        return f"{self.won}/{self.compared}"


def _runs(known: Comparison, cell: Cell, method: str, schedule: str) -> Sequence[Config]:
    if method in OURS:
        return known.ours(cell, method, schedule)
    return [config for config in peer(cell, method, SEEDS) if config.schedule == schedule]


def _is_there(known: Comparison, base: str, method: str, schedule: str) -> bool:
    """Whether a peer is installed, or was installed when the results were made."""
    runs = (run for cell in known.study.cells if cell.base == base for run in _runs(known, cell, method, schedule))
    return method in known.study.peers or any(run in known.results for run in runs)


def baselines_table(known: Comparison) -> str:
    """Returns the table of the tuned baselines, and whether they are at an edge of the sweep."""
    rows = []
    for cell in known.study.cells:
        tuned = known.tuned[cell]
        record = None if tuned is None else known.results.get(tuned.config)
        is_edge = tuned is not None and tuned.config.lr in (SWEEP[cell.base][0], SWEEP[cell.base][-1])
        rows.append(
            [
                cell.name,
                NOTHING if record is None else f"{record.initial_validation_loss:.4g}",
                tuned_loss(known, cell),
                setting(tuned),
                setting(known.best_constant[cell]),
                "0" if tuned is None else str(len(tuned.runs)),
                f"{sum(config in known.results for config in sweep(cell))}/{len(sweep(cell))}",
                "yes" if is_edge else "",
            ]
        )
    head = [
        "workload, base",
        "initial loss",
        "tuned loss",
        "tuned at",
        "best constant",
        "seeds",
        "sweep",
        "at its edge",
    ]
    return markdown_table(head, rows)


def workloads_table(known: Comparison) -> str:
    """Returns the table of the workloads."""
    cells = {cell.workload.name: cell for cell in known.study.cells}
    rows = [
        [name, cell.workload.family, str(cell.steps), cell.source, cell.workload.summary]
        for name, cell in cells.items()
    ]
    return markdown_table(["workload", "family", "steps", "data", "what"], rows)
