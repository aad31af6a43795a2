"""The pictures of the long battery."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.battery.config import SWEEP_SEED, Cell
from benchmarks.battery.long.report import LongComparison
from benchmarks.battery.long.study import AVERAGED, LINEAR, Candidate, ours
from benchmarks.battery.pictures import grid
from benchmarks.battery.records import Record
from benchmarks.training import SCHEDULES

_TUNED = ("0.5", "--")
_OURS = {LINEAR: ("#c26a1b", "-"), AVERAGED: ("#0b3c6f", "-")}
"""Colour and style of lines."""


def draw(known: LongComparison, path: Path) -> None:
    """Draws the validation losses of tuned and our runs over steps, a panel for each cell with runs, and writes it.

    Args:
        known: What the results say.
        path: Where to write it.
    """
    runs = {cell: found for cell in known.study.cells if (found := list(_runs(known, cell)))}
    figure, panels = grid(list(runs))
    for shown, panel in zip(runs.values(), panels, strict=False):
        for candidate, record, (colour, line) in shown:
            panel.plot(record.evaluated, _losses(candidate, record), line, color=colour, linewidth=1.2)
    figure.suptitle(
        f"validation losses, seed {SWEEP_SEED}: tuned (grey), ours with a linear schedule (orange) and without a "
        "scheduler at averaged weights (blue)",
        fontsize="medium",
    )
    figure.savefig(path, dpi=90)


def draw_run(known: LongComparison, cell: Cell, path: Path) -> None:
    """Draws validation loss and learning rate over steps of the tuned run and of ours in one cell.

    Args:
        known: What the results say.
        cell: The cell.
        path: Where to write the picture.
    """
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    loss_panel, lr_panel = figure.subplots(1, 2)
    for candidate, record, (colour, line) in _runs(known, cell):
        config = candidate.config
        if config.method == "bare":
            name = f"bare, tuned: learning rate {config.lr:g}, {candidate.kind}"
            assert config.lr is not None
            rates = [config.lr * SCHEDULES[config.schedule](step - 1, config.steps) for step in record.steps]
        else:
            name, rates = f"wrapped: {candidate.kind}", list(record.learning_rates)
        loss_panel.plot(record.evaluated, _losses(candidate, record), line, color=colour, label=name)
        lr_panel.plot(record.steps, rates, line, color=colour)
    loss_panel.set(title="validation loss", xlabel="step")
    lr_panel.set(title="learning rate", xlabel="step", yscale="log")
    for panel in (loss_panel, lr_panel):
        panel.grid(alpha=0.25)
    loss_panel.legend(fontsize="small")
    figure.savefig(path, dpi=110)


def _runs(known: LongComparison, cell: Cell) -> Iterator[tuple[Candidate, Record, tuple[str, str]]]:
    """The known runs of a cell: the tuned one, and ours with and without a schedule."""
    baseline = known.tuned[cell]
    shown = [] if baseline is None else [(baseline, _TUNED)]
    for kind, look in _OURS.items():
        mine = next(config for config in ours(cell, (SWEEP_SEED,)) if config.schedule == kind.schedule)
        shown.append((Candidate(mine, kind), look))
    for candidate, look in shown:
        record = known.results.get(candidate.config)
        if record is not None:
            yield candidate, record, look


def _losses(candidate: Candidate, record: Record) -> list[float]:
    curve = record.averaged_validation_losses if candidate.kind.is_averaged else record.validation_losses
    return [loss if 0 < loss < math.inf else math.nan for loss in curve]
