"""Baselines, ratios to them, spreads and failures."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.battery import scores
from benchmarks.battery.config import GIVEN, SEEDS, Cell, Config
from benchmarks.battery.records import Record, Results
from benchmarks.battery.scores import Ratio
from benchmarks.battery.study import Study, other_seed, ours, sweep
from benchmarks.training import SCHEDULES


@dataclass(frozen=True)
class Baseline:
    """A configuration on the seeds on which it has been run.

    Attributes:
        runs: The configuration, once per seed.
        is_complete: Whether the choice and its seeds are final.
    """

    runs: tuple[Config, ...]
    is_complete: bool

    @property
    def config(self) -> Config:
        """The configuration on the sweep's seed."""
        return self.runs[0]


class Comparison:
    """What the results say about a study.

    Args:
        study: Which runs there are.
        results: What is known.
    """

    def __init__(self, study: Study, results: Results) -> None:
        self.study, self.results = study, results
        self.tuned = {cell: self._best(cell, tuple(SCHEDULES)) for cell in study.cells}
        self.best_constant = {cell: self._best(cell, ("constant",)) for cell in study.cells}
        self.fixed = self._fixed()

    # --- baselines -----------------------------------------------------------------------------------------------

    def _best(self, cell: Cell, schedules: Sequence[str]) -> Baseline | None:
        """Returns the configuration with the lowest mean over seeds, of those of the sweep with the most seeds."""
        ranking = [config for config in scores.best_of_sweep(sweep(cell), self.results) if config.schedule in schedules]
        if not ranking:
            return None

        runs = {config: self._known_seeds(config, cell) for config in ranking}
        most = max(map(len, runs.values()))
        means = {
            config: sum(self.score(run, cell) for run in found) / most
            for config, found in runs.items()
            if len(found) == most
        }
        chosen = min(means, key=lambda config: means[config])
        whole = all(config in self.results for config in sweep(cell))
        return Baseline(runs[chosen], whole and most == len(SEEDS))

    def _fixed(self) -> dict[Cell, Baseline | None]:
        """Returns one configuration for all cells of a base; None before all their sweeps are finished."""
        found: dict[Cell, Baseline | None] = dict.fromkeys(self.study.cells)
        for base in dict.fromkeys(cell.base for cell in self.study.cells):
            rows = [cell for cell in self.study.cells if cell.base == base]
            place = scores.best_overall([sweep(cell) for cell in rows], [cell.workload for cell in rows], self.results)
            if place is not None:
                for cell in rows:
                    runs = self._known_seeds(sweep(cell)[place], cell)
                    found[cell] = Baseline(runs, len(runs) == len(SEEDS))
        return found

    def _known_seeds(self, config: Config, cell: Cell) -> tuple[Config, ...]:
        """Returns a configuration on those seeds on which it has been run."""
        runs = (other_seed(config, cell, seed) for seed in SEEDS)
        return tuple(run for run in runs if run in self.results)

    # --- ratios --------------------------------------------------------------------------------------------------

    def score(self, config: Config, cell: Cell) -> float:
        """Returns a run's validation loss as it is compared; infinite if it is not known."""
        record = self.results.get(config)
        return math.inf if record is None else scores.score(record, cell.workload)

    def over(
        self, cell: Cell, runs: Sequence[Config], baseline: Baseline | None, *, is_averaged: bool = False
    ) -> Ratio | None:
        """Returns the ratio of runs, at their last or at averaged weights, to a baseline."""
        if baseline is None:
            return None
        return scores.mean_ratio(runs, baseline.runs, cell.workload, self.results, is_averaged=is_averaged)

    def ours(self, cell: Cell, method: str, schedule: str) -> list[Config]:
        """Returns our runs with one schedule, over initial learning rates and seeds."""
        return [config for config in ours(cell, method, SEEDS, GIVEN) if config.schedule == schedule]

    def spread(self, cell: Cell, method: str = "gen") -> Ratio | None:
        """Returns the largest over the smallest loss over initial learning rates, the worst of schedules and seeds."""
        planned = ours(cell, method, SEEDS, GIVEN)
        by_start: dict[tuple[str, int], list[float]] = defaultdict(list)
        for config in planned:
            if config in self.results:
                by_start[config.schedule, config.seed].append(self.score(config, cell))
        spreads = [scores.ratio_of(max(each), min(each)) for each in by_start.values() if len(each) > 1]
        return Ratio(max(spreads), sum(map(len, by_start.values())), len(planned)) if spreads else None

    def records(self, cell: Cell, method: str) -> list[Record]:
        """Returns the known records of a rule of ours in a cell."""
        found = (self.results.get(config) for config in ours(cell, method, SEEDS, GIVEN))
        return [record for record in found if record is not None]

    def extra_forwards(self, cells: Sequence[Cell], method: str) -> float:
        """Returns the extra forward passes per step of a rule of ours in some cells; NaN if nothing is known."""
        records = [record for cell in cells for record in self.records(cell, method) if record.steps]
        steps = sum(record.steps[-1] for record in records)  # a run whose parameters are lost ends early
        return sum(record.extra_forwards for record in records) / steps if records else math.nan

    def failures(self, cell: Cell, method: str) -> tuple[int, int, int]:
        """Returns the numbers of runs that diverged, that stalled, and of all."""
        records, tuned = self.records(cell, method), self.tuned[cell]
        diverged = sum(record.diverged for record in records)
        if tuned is None:
            return diverged, 0, len(records)
        bar = scores.STALL * sum(self.score(run, cell) for run in tuned.runs) / len(tuned.runs)
        stalled = sum(not record.diverged and scores.score(record, cell.workload) > bar for record in records)
        return diverged, stalled, len(records)
