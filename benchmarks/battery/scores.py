"""Scores of runs, and ratios of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.battery.config import Config
from benchmarks.battery.records import Record, Results
from benchmarks.workloads import Workload

FLOOR = 1e-4
"""Of the initial loss, added to losses that approach zero: a loss below it counts as solved."""
CAP = 100.0
"""A ratio counts as this at most, and that of a run that diverged as exactly this."""
STALL = 2.0
"""A run that ends above this many times the tuned baseline has stalled."""


def has_ended_well(record: Record) -> bool:
    """Returns whether a run neither diverged nor raised."""
    return not (record.diverged or record.error)


def score(record: Record, workload: Workload, *, is_averaged: bool = False) -> float:
    """Returns a run's validation loss, with the floor if there is one; infinite if the run, or its average, diverged.

    Args:
        record: The run.
        workload: Its workload.
        is_averaged: Whether to take the loss at averaged weights, which the run must have kept.
    """
    loss = record.averaged_validation_losses[-1] if is_averaged else record.validation_loss
    has_diverged = not loss <= record.initial_validation_loss if is_averaged else record.diverged
    if has_diverged or record.error:
        return math.inf
    return loss + (FLOOR * record.initial_validation_loss if workload.approaches_zero else 0.0)


def best_of_sweep(sweep: Sequence[Config], results: Results) -> list[Config]:
    """Returns the finished runs of a sweep, the best first."""
    done = [(config, record) for config in sweep if (record := results.get(config)) is not None]
    return [config for config, record in sorted(done, key=lambda each: _loss(each[1]))]


def best_overall(sweeps: Sequence[Sequence[Config]], workloads: Sequence[Workload], results: Results) -> int | None:
    """Returns the place in the sweep that is best over all workloads, by geometric mean of ratios to each one's best.

    Returns:
        None if a sweep is not finished.
    """
    table: list[list[float]] = []
    for sweep, workload in zip(sweeps, workloads, strict=True):
        records = [results.get(config) for config in sweep]
        scores = [score(record, workload) for record in records if record is not None]
        if len(scores) < len(sweep):
            return None
        best = min(scores)
        table.append([ratio_of(each, best) for each in scores])
    if not table:
        return None
    means = [geometric_mean(column) for column in zip(*table, strict=True)]
    return means.index(min(means))


def ratio_of(value: float, baseline: float) -> float:
    """Returns a ratio of losses, capped."""
    if not math.isfinite(value):
        return CAP
    if not math.isfinite(baseline):
        return 0.0
    return min(value / baseline, CAP) if baseline > 0 else CAP


def geometric_mean(values: Iterable[float]) -> float:
    """Returns the geometric mean, of values raised to 1 / CAP at least; NaN of no value."""
    chosen = [max(each, 1.0 / CAP) for each in values]
    return statistics.geometric_mean(chosen) if chosen else math.nan


@dataclass(frozen=True)
class Ratio:
    """One loss over another.

    Attributes:
        value: The ratio, capped.
        runs: The number of runs above the line.
        planned: The number there will be.
    """

    value: float
    runs: int
    planned: int

    @property
    def is_complete(self) -> bool:
        """Whether no run is missing."""
        return self.runs >= self.planned


def mean_ratio(
    runs: Sequence[Config],
    baseline: Sequence[Config],
    workload: Workload,
    results: Results,
    *,
    is_averaged: bool = False,
    is_baseline_averaged: bool = False,
) -> Ratio | None:
    """Returns the mean over runs, over the mean of the baseline on the seeds of those runs.

    Args:
        runs: The runs to compare, over seeds and other settings.
        baseline: One configuration on several seeds.
        workload: The workload of all of them.
        results: The known results.
        is_averaged: Whether the runs to compare count with their averaged weights.
        is_baseline_averaged: Whether the baseline does.

    Returns:
        None if nothing can be compared yet.
    """

    def scored(configs: Sequence[Config], *, is_averaged: bool) -> list[tuple[int, float]]:
        return [
            (config.seed, score(record, workload, is_averaged=is_averaged))
            for config in configs
            if (record := results.get(config)) is not None and (record.averaged_validation_losses or not is_averaged)
        ]

    reference = dict(scored(baseline, is_averaged=is_baseline_averaged))
    found = [(seed, value) for seed, value in scored(runs, is_averaged=is_averaged) if seed in reference]
    if not found:
        return None
    above = sum(each for _, each in found) / len(found)
    below = sum(reference[seed] for seed, _ in found) / len(found)
    return Ratio(ratio_of(above, below), len(found), len(runs))


def _loss(record: Record) -> float:
    return record.validation_loss if has_ended_well(record) else math.inf
