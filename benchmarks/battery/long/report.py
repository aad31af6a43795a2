"""The report of the long battery."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from benchmarks.battery.config import SEEDS, SWEEP_SEED, Cell, Config
from benchmarks.battery.long.statistics import final_loss, log_area, loss_at_the_end, steps_to_loss
from benchmarks.battery.long.study import (
    AVERAGED,
    COSINE,
    FRACTIONS,
    KINDS,
    LINEAR,
    Candidate,
    Kind,
    LongStudy,
    best_of_kinds,
    best_shortened,
    extended_sweep,
    mean_loss,
    ours,
    tuned,
)
from benchmarks.battery.methods import PEERS
from benchmarks.battery.number_formats import NOTHING, named, number
from benchmarks.battery.records import Results
from benchmarks.battery.report import missing_table
from benchmarks.battery.scores import CAP, geometric_mean, ratio_of
from benchmarks.battery.study import peer
from benchmarks.markdown import markdown_table
from benchmarks.optimizers import BASES

_STEPS_GOAL = (" (≥ 0.95)", " (≥ 0.75)")
_GOALS = {
    LINEAR: {"loss": (" (≤ 1.005)", " (≤ 1.03)"), "steps": _STEPS_GOAL},
    COSINE: {"loss": (" (≤ 1.005)", " (≤ 1.03)"), "steps": _STEPS_GOAL},
    AVERAGED: {"loss": (" (≤ 1.01)", " (≤ 1.04)"), "steps": _STEPS_GOAL},
}
"""Of the mean and of the worst cell."""

READING = f"""\
*Tuned* is the bare optimizer at the best of five learning rates, half a decade apart, and more if the best one is at
the edge, × (linear, cosine, no scheduler with averaged weights), swept on seed {SWEEP_SEED}. The best one of each kind
is run on seeds {", ".join(map(str, SEEDS))}, and the lowest mean is it. Our runs begin at learning rate 1e-5 on the
same seeds. *Loss*: the mean final validation loss over tuned; lower is better. *Steps*: the length of the tuned run,
with its schedule over that length, that ends at our loss, over ours; higher is better. Tuned runs at
{", ".join(f"{each:g}" for each in FRACTIONS)} and all of the length, each at the better one of two learning rates, give
the curve, whose ends bound the figure: 1 means at least the whole run, {FRACTIONS[0]:g} this or less. *Early*: the
geometric mean over all steps of the ratio of validation losses, which is what runs stopped early would have had.
*Averaged* is the loss at averaged weights: a power-law average with exponent 16, updated every 4 steps. Data do not run
out: images are augmented, and validated on other augmentations. Nothing is decided by the workloads that are held out.
A figure with a star may still change."""

READING_OF_PEERS = f"""\
At the settings that their authors recommend, listed in [the report of short runs](battery.md#settings-of-the-peers).
Over tuned, on seed {SWEEP_SEED}. *GeN there*: on the same workloads, under the same schedule, or at averaged weights if
there is none."""


@dataclass(frozen=True)
class Figures:
    """What a kind of our runs is worth in a cell.

    Attributes:
        loss: Its final loss over tuned.
        steps: The steps of a tuned run to its loss, over its own; None before the shorter tuned runs are known.
        early: The geometric mean over all steps of the ratio of losses.
        is_final: Whether all seeds are known.
    """

    loss: float
    steps: float | None
    early: float
    is_final: bool


class LongComparison:
    """What the results say about a long study.

    Args:
        study: The runs.
        results: The known results.
        runs: Returns our runs in a cell.
    """

    def __init__(
        self, study: LongStudy, results: Results, runs: Callable[[Cell], Sequence[Config]] | None = None
    ) -> None:
        self.study, self.results = study, results
        self._runs = runs or (lambda cell: ours(cell, SEEDS))

    @cached_property
    def tuned(self) -> dict[Cell, Candidate | None]:
        """The tuned baseline by cell."""
        return {cell: tuned(cell, self.results) for cell in self.study.cells}

    def is_swept(self, cell: Cell) -> bool:
        """Whether a cell's sweep is finished."""
        return all(config in self.results for config in extended_sweep(cell, self.results))

    def seeds(self, configs: Sequence[Config]) -> list[int]:
        """The seeds of those configurations whose results are known."""
        return [config.seed for config in configs if config in self.results]

    def figures(self, cell: Cell, kind: Kind) -> Figures | None:
        """Returns what a kind of our runs is worth in a cell; None if nothing can be compared yet."""
        baseline = self.tuned[cell]
        if baseline is None:
            return None
        mine = [config for config in self._runs(cell) if config.schedule == kind.schedule]
        theirs = [replace(baseline.config, seed=seed) for seed in SEEDS]
        seeds = [seed for seed in self.seeds(theirs) if seed in self.seeds(mine)]
        if not seeds:
            return None
        own = Candidate(mine[0], kind)
        loss = mean_loss(cell, own, seeds, self.results)
        curve = self.curve(cell, seeds)
        return Figures(
            loss=ratio_of(loss, mean_loss(cell, baseline, seeds, self.results)),
            steps=None if curve is None else steps_to_loss(loss, curve),
            early=_ratio_of_logs(self._area(cell, own, seeds), self._area(cell, baseline, seeds)),
            is_final=len(seeds) == len(mine) and self.is_swept(cell) and curve is not None,
        )

    def curve(self, cell: Cell, seeds: Sequence[int]) -> list[tuple[float, float]] | None:
        """Returns the lengths of tuned runs with their mean final losses over those seeds that are known."""
        baseline = self.tuned[cell]
        if baseline is None:
            return None
        found = []
        for fraction in FRACTIONS:
            shorter = best_shortened(cell, baseline, fraction, self.results)
            if shorter is None:
                return None
            known = self.seeds([replace(shorter.config, seed=seed) for seed in seeds])
            found.append((fraction, mean_loss(cell, shorter, known, self.results)))
        return [*found, (1.0, mean_loss(cell, baseline, seeds, self.results))]

    def _area(self, cell: Cell, candidate: Candidate, seeds: Sequence[int]) -> float:
        areas = (
            log_area(replace(candidate.config, seed=seed), candidate.kind.is_averaged, cell, self.results)
            for seed in seeds
        )
        return statistics.fmean(math.inf if area is None else area for area in areas)


def _ratio_of_logs(value: float, baseline: float) -> float:
    """The ratio whose log is a difference, capped."""
    return min(math.exp(min(value - baseline, math.log(CAP))), CAP) if math.isfinite(baseline) else 0.0


# --- the page --------------------------------------------------------------------------------------------------------


def page(known: LongComparison, command: str, pictures: Sequence[str]) -> str:
    """Returns the whole report.

    Args:
        known: What the results say.
        command: The command that made it.
        pictures: The names of the pictures' files.
    """
    parts = ["# Long runs: without a learning rate, against a tuned one", command, READING]
    for title, cells in groups(known.study.cells).items():
        parts += [f"## {title}", summary(known, cells), "### Our runs over tuned", main_table(known, cells)]
    parts += [f"![Validation losses of tuned and our runs]({picture})" for picture in pictures]
    parts += ["## Optimizers of others", READING_OF_PEERS]
    parts += [f"### With {base}\n\n{table}" for base in BASES if (table := peers_table(known, base))]
    parts += ["## Tuned", baselines_table(known), "## Still missing", missing_table(known.study.stages, known.results)]
    return "\n\n".join(parts) + "\n"


def groups(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """Returns the cells that constants are set on, and those that are held out, by a title; no empty group."""
    found = {
        "Workloads that constants are set on": [cell for cell in cells if not cell.workload.is_held_out],
        "Workloads that are held out": [cell for cell in cells if cell.workload.is_held_out],
    }
    return {title: group for title, group in found.items() if group}


def summary(known: LongComparison, cells: Sequence[Cell]) -> str:
    """Returns the table of means and worst cells of each kind of run, beside their goals."""
    rows = []
    for kind in KINDS:
        found = [figures for cell in cells if (figures := known.figures(cell, kind)) is not None]
        losses, early = [each.loss for each in found], [each.early for each in found]
        steps = [each.steps for each in found if each.steps is not None]
        median = statistics.median(steps) if steps else math.nan
        goals = _GOALS.get(kind, {})
        for name, mean, worst, count in (
            ("loss", geometric_mean(losses), max(losses, default=math.nan), len(losses)),
            ("steps", median, min(steps, default=math.nan), len(steps)),
            ("early", geometric_mean(early), max(early, default=math.nan), len(early)),
        ):
            goal, worst_goal = goals.get(name, ("", ""))
            row = [f"{kind}: {name}", f"{number(mean)}{goal}", f"{number(worst)}{worst_goal}"]
            rows.append([*row, f"{count} of {len(cells)}"])
    return markdown_table(
        ["our runs, over tuned", "geometric mean; of steps, median", "worst", "workloads × bases"], rows
    )


def main_table(known: LongComparison, cells: Sequence[Cell]) -> str:
    """Returns the table of loss, steps and early of each kind of run in each cell."""
    head = ["workload, base"]
    for kind in KINDS:
        head += [f"{kind}: loss", "steps", "early"]
    rows = []
    for cell in cells:
        row = [cell.name]
        for kind in KINDS:
            figures = known.figures(cell, kind)
            if figures is None:
                row += [NOTHING] * 3
                continue
            star = "" if figures.is_final else "*"
            steps = NOTHING if figures.steps is None else f"{figures.steps:.2f}{star}"
            row += [f"{number(figures.loss)}{star}", steps, f"{number(figures.early)}{star}"]
        rows.append(row)
    return markdown_table(head, rows)


def baselines_table(known: LongComparison) -> str:
    """Returns the table of the best of each kind of bare run, and of the curve of tuned runs over their length."""
    kinds = (LINEAR, COSINE, AVERAGED)
    rows = []
    for cell in known.study.cells:
        best, chosen = best_of_kinds(cell, known.results), known.tuned[cell]
        row = [cell.name, NOTHING if chosen is None else str(chosen.kind)]
        row += [_setting(known, cell, best.get(kind)) for kind in kinds]
        curve = None if chosen is None else known.curve(cell, [SWEEP_SEED])
        row += [NOTHING] * len(FRACTIONS) if curve is None else [f"{loss:.4g}" for _, loss in curve[:-1]]
        configs = extended_sweep(cell, known.results)
        row.append(f"{sum(config in known.results for config in configs)}/{len(configs)}")
        rates = {config.lr for config in configs}
        is_edge = chosen is not None and chosen.config.lr in (min(rates, key=_float), max(rates, key=_float))
        rows.append([*row, "yes" if is_edge else ""])
    head = ["workload, base", "tuned", *(f"best {kind}" for kind in kinds)]
    head += [f"tuned at {fraction:g}" for fraction in FRACTIONS]
    return markdown_table([*head, "sweep", "at its edge"], rows)


def peers_table(known: LongComparison, base: str) -> str:
    """Returns the table of optimizers of others, over tuned; empty if none of their runs is known."""
    kinds = {kind.schedule: kind for kind in (LINEAR, COSINE, AVERAGED)}
    baselines = {cell: each for cell, each in known.tuned.items() if cell.base == base and each is not None}
    over = {cell: mean_loss(cell, each, [SWEEP_SEED], known.results) for cell, each in baselines.items()}
    mine: dict[str, dict[Cell, float]] = {
        name: {
            cell: ratio_of(loss, over[cell])
            for cell in baselines
            for config in ours(cell, [SWEEP_SEED])
            if config.schedule == name
            and (loss := final_loss(config, kind.is_averaged, cell, known.results)) is not None
        }
        for name, kind in kinds.items()
    }
    rows = []
    for method in PEERS:
        for schedule in method.schedules:
            both = [
                (ratio_of(loss, over[cell]), mine[schedule][cell])
                for cell in baselines
                for config in peer(cell, method.name, (SWEEP_SEED,))
                if config.schedule == schedule
                and cell in mine[schedule]
                and (loss := loss_at_the_end(config, cell, known.results)) is not None
            ]
            if both:
                theirs, own = zip(*both, strict=True)
                means = [number(geometric_mean(theirs)), number(max(theirs)), number(geometric_mean(own))]
                won = sum(ratio > ours for ratio, ours in both)
                rows.append([f"{method.title}, {named(schedule)}", *means, f"{won} of {len(both)}"])
    head = ["", "geometric mean", "worst", "GeN there", "we are ahead on"]
    return markdown_table(head, rows) if rows else ""


def _float(lr: float | None) -> float:
    return math.nan if lr is None else lr


def _setting(known: LongComparison, cell: Cell, candidate: Candidate | None) -> str:
    if candidate is None:
        return NOTHING
    seeds = known.seeds([replace(candidate.config, seed=seed) for seed in SEEDS])
    return f"{mean_loss(cell, candidate, seeds, known.results):.4g} at {candidate.config.lr:g}"


def trial_table(known: LongComparison) -> str:
    """Returns the table of trials of our rule on one seed."""
    return "\n\n".join([summary(known, known.study.cells), main_table(known, known.study.cells)])
