"""The runs of the battery, the most informative first."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cache
from typing import Any

from benchmarks.battery.config import GIVEN, SEEDS, SWEEP, SWEEP_SEED, Cell, Config
from benchmarks.battery.methods import METHODS, OURS, PEERS, code_fingerprint
from benchmarks.battery.records import Results
from benchmarks.battery.scores import best_of_sweep, best_overall, has_ended_well
from benchmarks.training import SCHEDULES

TOP = 3
"""The number of the sweep's best, and of its best constant ones, that are run on the other seeds too."""
OTHER_SEEDS = SEEDS[1:]
USUAL = 1e-5
"""The first of the initial learning rates given to our rule: far from any that a user would choose."""


def installed_peers() -> frozenset[str]:
    """Returns the names of the peers that are installed."""
    return frozenset(each.name for each in PEERS if each.is_installed)


@dataclass(frozen=True)
class Study:
    """The whole battery over some cells.

    Attributes:
        cells: Workloads with base optimizers.
        peers: Names of the peers that are installed.
    """

    cells: Sequence[Cell]
    peers: frozenset[str] = field(default_factory=installed_peers)

    def stages(self, results: Results) -> Iterator[tuple[str, list[Config]]]:
        """Yields names and runs of the stages in order; some depend on the results so far.

        Args:
            results: The known results.
        """
        first, rest = SEEDS[:1], OTHER_SEEDS
        yield "ours from 1e-5", self._each(lambda cell: ours(cell, "gen", first, (USUAL,)))
        yield "coarse sweep", self._each(lambda cell: sweep(cell, coarse=True))
        yield "fine sweep", self._each(sweep)
        yield "ours from any start", self._each(lambda cell: ours(cell, "gen", first, GIVEN))
        yield "best of the sweep, other seeds", self._each(lambda cell: refinements(cell, results))
        yield "ours from 1e-5, other seeds", self._each(lambda cell: ours(cell, "gen", rest, (USUAL,)))
        yield "fixed baseline", fixed_baseline(self.cells, results)
        yield "peers", self._each(lambda cell: runs_of_peers(cell, self.peers, first))
        yield "published rule", self._each(lambda cell: ours(cell, "gen-published", first, GIVEN))
        yield "ours from any start, other seeds", self._each(lambda cell: ours(cell, "gen", rest, GIVEN))
        yield "peers, other seeds", self._each(lambda cell: runs_of_peers(cell, self.peers, rest))
        yield "published rule, other seeds", self._each(lambda cell: ours(cell, "gen-published", rest, GIVEN))

    def count(self) -> int:
        """Returns the number of runs, about: the sets of runs on other seeds overlap."""
        count = 0
        for cell in self.cells:
            count += len(sweep(cell)) + (TOP + 2) * len(OTHER_SEEDS)
            count += sum(len(ours(cell, method, SEEDS, GIVEN)) for method in OURS)
            count += len(runs_of_peers(cell, self.peers, SEEDS))
        return count

    def _each(self, runs: Callable[[Cell], Iterable[Config]]) -> list[Config]:
        """Cell by cell, so that rows of the report are complete early."""
        return [config for cell in self.cells for config in runs(cell)]


@cache
def sweep(cell: Cell, *, coarse: bool = False) -> tuple[Config, ...]:
    """Returns the 27 runs of the bare optimizer, or, coarsely, every other learning rate of them."""
    rates = SWEEP[cell.base][::2] if coarse else SWEEP[cell.base]
    return tuple(cell.config("bare", schedule, lr, SWEEP_SEED) for schedule in SCHEDULES for lr in rates)


@cache
def ours(cell: Cell, method: str, seeds: tuple[int, ...], given: tuple[float, ...]) -> tuple[Config, ...]:
    """Returns runs of our own rules."""
    options = {"rule_version": OURS[method]}
    return tuple(
        cell.config(method, schedule, lr, seed, options) for schedule in SCHEDULES for lr in given for seed in seeds
    )


@cache
def peer(cell: Cell, method: str, seeds: tuple[int, ...]) -> tuple[Config, ...]:
    """Returns runs of a peer; none if it does not work with the base optimizer."""
    entry = METHODS[method]
    if cell.base not in entry.bases:
        return ()
    return tuple(cell.config(method, schedule, None, seed) for schedule in entry.schedules for seed in seeds)


def runs_of_peers(cell: Cell, names: Collection[str], seeds: tuple[int, ...]) -> list[Config]:
    """Returns runs of all peers with these names."""
    return [config for each in PEERS if each.name in names for config in peer(cell, each.name, seeds)]


def other_seed(config: Config, cell: Cell, seed: int) -> Config:
    """Returns the same run with another seed."""
    return cell.config(config.method, config.schedule, config.lr, seed, config.options)


def refinements(cell: Cell, results: Results) -> list[Config]:
    """Returns the best of a finished sweep, and the best constant ones, on the other seeds; nothing before."""
    ranking = best_of_sweep(sweep(cell), results)
    if len(ranking) < len(sweep(cell)):
        return []
    constants = [config for config in ranking if config.schedule == "constant"]
    chosen = dict.fromkeys([*_refined(ranking, cell, results), *_refined(constants, cell, results)])
    return [other_seed(config, cell, seed) for config in chosen for seed in OTHER_SEEDS]


def _refined(ranking: Sequence[Config], cell: Cell, results: Results) -> Iterator[Config]:
    """Yields the best of a ranking until ``TOP`` of them have diverged on no seed: others are no baseline."""
    steady = 0
    for config in ranking:
        if steady == TOP:
            return
        yield config
        records = (results.get(other_seed(config, cell, seed)) for seed in SEEDS)
        steady += all(record is None or has_ended_well(record) for record in records)


def fixed_baseline(cells: Sequence[Cell], results: Results) -> list[Config]:
    """Returns the best configuration for all workloads on the other seeds, once all sweeps are finished."""
    chosen = []
    for base in dict.fromkeys(cell.base for cell in cells):
        rows = [cell for cell in cells if cell.base == base]
        found = best_overall([sweep(cell) for cell in rows], [cell.workload for cell in rows], results)
        if found is not None:
            chosen += [other_seed(sweep(cell)[found], cell, seed) for cell in rows for seed in OTHER_SEEDS]
    return chosen


def tuning(cells: Sequence[Cell], options: Mapping[str, Any]) -> list[Config]:
    """Returns runs of our own rule on one seed: three schedules from 1e-5, and no scheduler from 10.

    The key has the code's fingerprint, so that other code or other options make other runs.

    Args:
        cells: Workloads with base optimizers.
        options: Arguments of GeNOptimizer that are not its defaults.
    """
    keyed = {"code": code_fingerprint(), **options}
    starts = [(schedule, USUAL) for schedule in SCHEDULES] + [("constant", 10.0)]
    return [cell.config("gen", schedule, lr, SWEEP_SEED, keyed) for cell in cells for schedule, lr in starts]


def trial(cells: Sequence[Cell]) -> list[Config]:
    """Returns a few short runs of every workload, to see that all works."""
    middle = {base: rates[len(rates) // 2] for base, rates in SWEEP.items()}
    options = {"rule_version": OURS["gen"]}
    return [
        config
        for cell in cells
        for config in (
            cell.config("bare", "linear", middle[cell.base], SWEEP_SEED),
            cell.config("gen", "linear", USUAL, SWEEP_SEED, options),
            cell.config("gen", "constant", USUAL, SWEEP_SEED, options),
        )
    ]


def matches(config: Config, pattern: str | None) -> bool:
    """Returns whether a pattern with ``*`` and ``?`` fits a run's line: workload, base, method and so on."""
    return pattern is None or fnmatch(str(config).lower(), f"*{pattern.lower()}*")
