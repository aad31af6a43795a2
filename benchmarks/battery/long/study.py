"""The runs of the long battery, the most informative first."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.battery.config import SEEDS, SWEEP, SWEEP_SEED, Cell, Config
from benchmarks.battery.long.statistics import final_loss
from benchmarks.battery.methods import OURS, code_fingerprint
from benchmarks.battery.records import Results
from benchmarks.battery.study import OTHER_SEEDS, USUAL, installed_peers, other_seed, runs_of_peers
from benchmarks.training import SCHEDULES

RATES = 5
"""Learning rates of the sweep; at most ``BEYOND`` more on each side if the best one is at the edge."""
BEYOND = 2
FRACTIONS = (1 / 8, 1 / 4, 1 / 2)
"""Lengths of the shorter tuned runs, of the whole length."""


@dataclass(frozen=True)
class Kind:
    """A schedule, and the weights that count at the end.

    Attributes:
        schedule: A name in ``benchmarks.training.SCHEDULES``.
        is_averaged: Whether the loss is that at averaged weights.
    """

    schedule: str
    is_averaged: bool = False

    def __str__(self) -> str:
        name = "no scheduler" if self.schedule == "constant" else self.schedule
        return f"{name}, averaged" if self.is_averaged else name


LINEAR, COSINE, CONSTANT, AVERAGED = KINDS = (
    *(Kind("linear"), Kind("cosine")),
    *(Kind("constant"), Kind("constant", is_averaged=True)),
)
"""A run without a scheduler is of two kinds: it keeps an average of its weights next to the last ones."""


@dataclass(frozen=True)
class Candidate:
    """A configuration of the bare optimizer, and the kind of result of it that counts."""

    config: Config
    kind: Kind


@dataclass(frozen=True)
class LongStudy:
    """The long battery over some cells.

    Attributes:
        cells: Long workloads with base optimizers.
        with_held_out: Whether our rule is run on workloads that are held out.
        peers: Names of the peers that are installed.
    """

    cells: Sequence[Cell]
    with_held_out: bool = False
    peers: frozenset[str] = field(default_factory=installed_peers)

    @property
    def shown(self) -> list[Cell]:
        """The cells that our rule is run in."""
        return [cell for cell in self.cells if self.with_held_out or not cell.workload.is_held_out]

    def stages(self, results: Results) -> Iterator[tuple[str, list[Config]]]:
        """Yields names and runs of the stages in order; some depend on the results so far.

        Args:
            results: The known results.
        """
        first = (SWEEP_SEED,)
        yield "ours", _each(self.shown, lambda cell: ours(cell, first))
        yield "sweep, linear", _each(self.cells, lambda cell: sweep(cell, ("linear",)))
        yield "sweep, no scheduler", _each(self.cells, lambda cell: sweep(cell, ("constant",)))
        yield "sweep, cosine", _each(self.cells, lambda cell: sweep(cell, ("cosine",)))
        yield "sweep, beyond its edges", _each(self.cells, lambda cell: extended_sweep(cell, results))
        yield "shorter tuned runs", _each(self.cells, lambda cell: shorter_runs(cell, results, first))
        yield "peers", _each(self.shown, lambda cell: runs_of_peers(cell, self.peers, first))
        yield "ours, other seeds", _each(self.shown, lambda cell: ours(cell, OTHER_SEEDS))
        yield "tuned, other seeds", _each(self.cells, lambda cell: refinements(cell, results))
        yield "shorter, other seeds", _each(self.cells, lambda cell: shorter_runs(cell, results, OTHER_SEEDS))

    def count(self) -> int:
        """Returns the number of runs, about: it depends on the results."""
        shorter = len(FRACTIONS) * (2 + len(OTHER_SEEDS))
        bare = RATES * len(SCHEDULES) + 3 * len(OTHER_SEEDS) + shorter
        theirs = sum(len(runs_of_peers(cell, self.peers, (SWEEP_SEED,))) for cell in self.shown)
        return bare * len(self.cells) + len(SEEDS) * len(SCHEDULES) * len(self.shown) + theirs


def _each(cells: Sequence[Cell], runs: Callable[[Cell], Iterable[Config]]) -> list[Config]:
    """The runs of all cells, those that constants are set on first."""
    ordered = sorted(cells, key=lambda cell: cell.workload.is_held_out)
    return [config for cell in ordered for config in runs(cell)]


def ours(cell: Cell, seeds: Sequence[int], options: Mapping[str, Any] | None = None) -> list[Config]:
    """Returns runs of our rule from 1e-5, one per schedule and seed.

    Args:
        cell: A workload with a base optimizer.
        seeds: The seeds.
        options: Of the method; None for the version of the default rule.
    """
    keyed = {"rule_version": OURS["gen"]} if options is None else options
    return [cell.config("gen", schedule, USUAL, seed, keyed) for schedule in SCHEDULES for seed in seeds]


def trials(cells: Sequence[Cell], options: Mapping[str, Any]) -> list[Config]:
    """Returns runs of our rule on one seed, on what is not held out; their keys have the code's fingerprint.

    Args:
        cells: Long workloads with base optimizers.
        options: Arguments of GeNOptimizer that are not its defaults.
    """
    keyed = {"code": code_fingerprint(), **options}
    return _each([c for c in cells if not c.workload.is_held_out], lambda cell: ours(cell, (SWEEP_SEED,), keyed))


def quick_trial(cells: Sequence[Cell]) -> list[Config]:
    """Returns a few runs of every workload, to see that all works."""
    chosen = []
    for cell in cells:
        middle = cell.workload.centres[cell.base]
        chosen += [cell.config("bare", schedule, middle, SWEEP_SEED) for schedule in ("linear", "constant")]
        chosen += [config for config in ours(cell, (SWEEP_SEED,)) if config.schedule == "constant"]
    return chosen


# --- the sweep -------------------------------------------------------------------------------------------------------


def rates(cell: Cell, results: Results) -> tuple[float, ...]:
    """Returns the learning rates of a cell's sweep, with those beyond its edges that the results call for."""
    every = SWEEP[cell.base]
    middle = every.index(cell.workload.centres[cell.base])
    first = max(0, min(middle - RATES // 2, len(every) - RATES))
    low, high = first, first + RATES
    while True:
        known = every[low:high]
        configs = [cell.config("bare", schedule, lr, SWEEP_SEED) for schedule in SCHEDULES for lr in known]
        if not all(config in results for config in configs):
            return known
        best = best_of(cell, configs, KINDS, results)
        if best is None:
            return known
        if best.config.lr == known[0] and low > 0 and first - low < BEYOND:
            low -= 1
        elif best.config.lr == known[-1] and high < len(every) and high - first - RATES < BEYOND:
            high += 1
        else:
            return known


def sweep(cell: Cell, schedules: Iterable[str]) -> list[Config]:
    """Returns the runs of the bare optimizer at the first five learning rates."""
    return [cell.config("bare", each, lr, SWEEP_SEED) for each in schedules for lr in rates(cell, Results())]


def extended_sweep(cell: Cell, results: Results) -> list[Config]:
    """Returns all runs of the sweep, those beyond its edges included."""
    return [cell.config("bare", each, lr, SWEEP_SEED) for each in SCHEDULES for lr in rates(cell, results)]


def best_of(cell: Cell, configs: Iterable[Config], kinds: Sequence[Kind], results: Results) -> Candidate | None:
    """Returns the candidate with the lowest loss; None if no run of these kinds is known that ended well."""
    found = [
        (loss, index, Candidate(config, kind))
        for index, (config, kind) in enumerate((config, kind) for kind in kinds for config in configs)
        if config.schedule == kind.schedule
        and (loss := final_loss(config, kind.is_averaged, cell, results)) is not None
        and math.isfinite(loss)
    ]
    return min(found, key=lambda each: each[:2])[2] if found else None


def best_of_kinds(cell: Cell, results: Results) -> dict[Kind, Candidate]:
    """Returns the best of the sweep for a linear and a cosine schedule, and for averaged weights without one."""
    configs = extended_sweep(cell, results)
    found = {kind: best_of(cell, configs, (kind,), results) for kind in (LINEAR, COSINE, AVERAGED)}
    return {kind: candidate for kind, candidate in found.items() if candidate is not None}


def refinements(cell: Cell, results: Results) -> list[Config]:
    """Returns the best of a finished sweep, one per kind, on the other seeds; nothing before."""
    if not all(config in results for config in extended_sweep(cell, results)):
        return []
    chosen = best_of_kinds(cell, results).values()
    return [other_seed(each.config, cell, seed) for each in chosen for seed in OTHER_SEEDS]


def tuned(cell: Cell, results: Results) -> Candidate | None:
    """Returns the best of ``best_of_kinds`` by its mean over the seeds that are known of all of them."""
    found = best_of_kinds(cell, results)
    seeds = [seed for seed in SEEDS if all(other_seed(each.config, cell, seed) in results for each in found.values())]
    means = {each: mean_loss(cell, each, seeds, results) for each in found.values()}
    return min(means, key=lambda each: means[each], default=None)


def mean_loss(cell: Cell, candidate: Candidate, seeds: Sequence[int], results: Results) -> float:
    """Returns a candidate's mean loss over seeds, infinite if one of its runs diverged or is not known."""
    losses = [
        final_loss(replace(candidate.config, seed=seed), candidate.kind.is_averaged, cell, results) for seed in seeds
    ]
    return math.inf if not losses else sum(math.inf if each is None else each for each in losses) / len(losses)


# --- shorter tuned runs ----------------------------------------------------------------------------------------------


def shortened(candidate: Candidate, fraction: float) -> list[Candidate]:
    """Returns a candidate at a fraction of its length, at its learning rate and at the next larger one."""
    every = SWEEP[candidate.config.base]
    assert candidate.config.lr is not None
    place = every.index(candidate.config.lr)
    steps = max(1, round(fraction * candidate.config.steps))
    return [Candidate(replace(candidate.config, lr=lr, steps=steps), candidate.kind) for lr in every[place : place + 2]]


def best_shortened(cell: Cell, candidate: Candidate, fraction: float, results: Results) -> Candidate | None:
    """Returns the better one of ``shortened``; None before both are known."""
    both = shortened(candidate, fraction)
    if not all(each.config in results for each in both):
        return None
    return best_of(cell, [each.config for each in both], (candidate.kind,), results)


def shorter_runs(cell: Cell, results: Results, seeds: Sequence[int]) -> list[Config]:
    """Returns shorter runs of what is tuned, once the sweep is finished but for the cosine schedule.

    If a run with that schedule is better, the shorter runs are of that one, as soon as it is known.

    Args:
        cell: A workload with a base optimizer.
        results: The known results.
        seeds: The seeds: on the first one, both learning rates of ``shortened``; on others the better one.
    """
    if not all(config in results for config in extended_sweep(cell, results) if config.schedule != COSINE.schedule):
        return []
    candidate = tuned(cell, results)
    if candidate is None:
        return []
    chosen: list[Config] = []
    for fraction in FRACTIONS:
        if SWEEP_SEED in seeds:
            chosen += [each.config for each in shortened(candidate, fraction)]
        better = best_shortened(cell, candidate, fraction, results)
        if better is not None:
            chosen += [replace(better.config, seed=seed) for seed in seeds if seed != SWEEP_SEED]
    return chosen
