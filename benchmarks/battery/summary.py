"""The table of figures beside their goals."""

from __future__ import annotations

import math
from collections.abc import Sequence

from benchmarks.battery.comparing import Comparison
from benchmarks.battery.config import SCHEDULES
from benchmarks.battery.formatting import NOTHING, named, number
from benchmarks.battery.methods import METHODS, OURS
from benchmarks.battery.scoring import geometric_mean
from benchmarks.command import markdown_table

_GOALS = {
    "horizon": "≤ 0.98, worst ≤ 1.10",
    "best constant": "≤ 0.95, worst ≤ 1.10",
    "tuned": "≤ 1.02, worst ≤ 1.10",
    "fixed": "≤ 0.90",
    "spread": "worst ≤ 1.05",
    "failures": "none",
    "forwards": "≤ 0.25 in long runs",
}
"""For our rule with default arguments."""


def summary(known: Comparison) -> str:
    """Geometric means, worst cells and counts, of each rule of ours."""
    rows = [row for method in OURS for row in _Summary(known, method).rows()]
    return markdown_table(["figure", "goal", "geometric mean", "worst", "workloads × bases"], rows)


class _Summary:
    def __init__(self, known: Comparison, method: str) -> None:
        self.known, self.method = known, method

    def rows(self) -> list[list[str]]:
        return [
            *(self._over_tuned(schedule, "horizon") for schedule in SCHEDULES if schedule != "constant"),
            self._over_best_constant(),
            self._over_tuned("constant", "tuned"),
            *(self._over_fixed(schedule) for schedule in SCHEDULES),
            self._spread(),
            self._failures(),
            self._forwards(),
        ]

    def _row(self, what: str, goal: str, *cells: str) -> list[str]:
        return [f"{METHODS[self.method].title}, {what}", _GOALS[goal] if self.method == "gen" else "", *cells]

    def _means(self, what: str, goal: str, values: Sequence[tuple[str, float]]) -> list[str]:
        """A row from names of cells with their figures."""
        name, worst = max(values, key=lambda each: each[1], default=("", math.nan))
        shown = NOTHING if math.isnan(worst) else f"{number(worst)} ({name})"
        mean = number(geometric_mean(value for _, value in values))
        return self._row(what, goal, mean, shown, f"{len(values)} of {len(self.known.study.cells)}")

    def _over_tuned(self, schedule: str, goal: str) -> list[str]:
        values = [
            (cell.name, found.value)
            for cell in self.known.study.cells
            if (found := self.known.over(cell, self.known.ours(cell, self.method, schedule), self.known.tuned[cell]))
        ]
        return self._means(f"{named(schedule)} / tuned", goal, values)

    def _over_best_constant(self) -> list[str]:
        values = [
            (cell.name, found.value)
            for cell in self.known.study.cells
            if (
                found := self.known.over(
                    cell, self.known.ours(cell, self.method, "constant"), self.known.best_constant[cell]
                )
            )
        ]
        return self._means("no scheduler / best constant", "best constant", values)

    def _over_fixed(self, schedule: str) -> list[str]:
        values = [
            (cell.name, found.value)
            for cell in self.known.study.cells
            if (found := self.known.over(cell, self.known.ours(cell, self.method, schedule), self.known.fixed[cell]))
        ]
        return self._means(f"{named(schedule)} / fixed", "fixed", values)

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
        _, _, _, worst, count = self._means("extra forward passes a step", "forwards", shares)
        mean = f"{number(known.extra_forwards(cells, self.method))} (of all steps)"
        return self._row("extra forward passes a step", "forwards", mean, worst, count)
