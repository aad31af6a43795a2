"""The table of figures beside their goals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from benchmarks.battery.comparison import Baseline, Comparison
from benchmarks.battery.config import Cell
from benchmarks.battery.methods import METHODS, OURS
from benchmarks.battery.number_formats import NOTHING, named, number
from benchmarks.battery.scores import geometric_mean
from benchmarks.markdown import markdown_table
from benchmarks.training import SCHEDULES

_GOALS = {
    "horizon": "≤ 1.05",
    "best constant": "≤ 0.95, worst ≤ 1.10",
    "tuned": "≤ 1.02, worst ≤ 1.10",
    "averaged": "≤ 1.03",
    "fixed": "≤ 0.90",
    "spread": "worst ≤ 1.05",
    "failures": "none",
    "forwards": "≤ 0.25 in long runs",
}
"""For our rule with default arguments."""


def summary(known: Comparison) -> str:
    """Returns the table of geometric means, worst cells and counts of each rule of ours."""
    rows = [row for method in OURS for row in _Summary(known, method).rows()]
    return markdown_table(["figure", "goal", "geometric mean", "worst", "workloads × bases"], rows)


class _Summary:
    def __init__(self, known: Comparison, method: str) -> None:
        self.known, self.method = known, method

    def rows(self) -> list[list[str]]:
        known = self.known
        horizons = [schedule for schedule in SCHEDULES if schedule != "constant"]
        return [
            *(self._over(schedule, "tuned", "horizon", known.tuned) for schedule in horizons),
            self._over("constant", "best constant", "best constant", known.best_constant),
            self._over("constant", "tuned", "tuned", known.tuned),
            self._over("constant", "tuned", "averaged", known.tuned, is_averaged=True),
            *(self._over(schedule, "fixed", "fixed", known.fixed) for schedule in SCHEDULES),
            self._spread(),
            self._failures(),
            self._forwards(),
        ]

    def _row(self, what: str, goal: str, *cells: str) -> list[str]:
        return [f"{METHODS[self.method].title}, {what}", _GOALS[goal] if self.method == "gen" else "", *cells]

    def _means(self, what: str, goal: str, values: Sequence[tuple[str, float]]) -> list[str]:
        """Returns a row from names of cells with their figures."""
        return self._row(what, goal, number(geometric_mean(value for _, value in values)), *self._worst(values))

    def _worst(self, values: Sequence[tuple[str, float]]) -> list[str]:
        """Returns the last two columns: the largest figure with its cell, and the number of figures."""
        name, worst = max(values, key=lambda each: each[1], default=("", math.nan))
        shown = NOTHING if math.isnan(worst) else f"{number(worst)} ({name})"
        return [shown, f"{len(values)} of {len(self.known.study.cells)}"]

    def _over(
        self,
        schedule: str,
        what: str,
        goal: str,
        baselines: Mapping[Cell, Baseline | None],
        *,
        is_averaged: bool = False,
    ) -> list[str]:
        known = self.known
        values = [
            (cell.name, found.value)
            for cell in known.study.cells
            if (
                found := known.over(
                    cell, known.ours(cell, self.method, schedule), baselines[cell], is_averaged=is_averaged
                )
            )
        ]
        return self._means(f"{named(schedule)}{', averaged' * is_averaged} / {what}", goal, values)

    def _spread(self) -> list[str]:
        spreads = [
            (cell.name, spread.value)
            for cell in self.known.study.cells
            if (spread := self.known.spread(cell, self.method)) is not None
        ]
        return self._means("largest / smallest over initial learning rates", "spread", spreads)

    def _failures(self) -> list[str]:
        each = [self.known.failures(cell, self.method) for cell in self.known.study.cells]
        diverged, stalled, count = (sum(numbers) for numbers in zip(*each, strict=True))
        return self._row("runs", "failures", f"{diverged} diverged, {stalled} stalled", "", f"of {count} runs")

    def _forwards(self) -> list[str]:
        known, cells = self.known, self.known.study.cells
        shares = [
            (cell.name, share) for cell in cells if not math.isnan(share := known.extra_forwards([cell], self.method))
        ]
        mean = f"{number(known.extra_forwards(cells, self.method))} (of all steps)"
        return self._row("extra forward passes a step", "forwards", mean, *self._worst(shares))
