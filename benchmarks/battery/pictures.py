"""Pictures of the battery: ratios to tuned, traces of learning rates, loss curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from benchmarks.battery.comparison import Comparison
from benchmarks.battery.config import GIVEN, SWEEP_SEED, Cell
from benchmarks.battery.records import Record
from benchmarks.battery.study import USUAL
from benchmarks.training import SCHEDULES

_LOOKS = {"constant": ("o", "#0b3c6f"), "linear": ("s", "#c26a1b"), "cosine": ("^", "#14501a")}
_STARTS = ("#0b3c6f", "#14501a", "#c26a1b", "#7f1d1d")
_COLUMNS = 6


def draw(known: Comparison, folder: Path, stem: str) -> dict[str, str]:
    """Draws all pictures.

    Args:
        known: What the results say.
        folder: Where to write.
        stem: What file names begin with.

    Returns:
        File names by title.
    """
    pictures: tuple[tuple[str, str, Callable[[Comparison], Figure]], ...] = (
        ("Ratio to the tuned baseline by workload", "ratios", _ratios),
        ("Learning rates of our rule by step, from four initial learning rates", "learning-rates", _traces),
        ("Losses of the batches by step: tuned and ours", "losses", _losses),
    )
    written = {}
    for title, name, make in pictures:
        file = f"{stem}-{name}.png"
        make(known).savefig(folder / file, dpi=90)
        written[title] = file
    return written


def _ratios(known: Comparison) -> Figure:
    cells = known.study.cells
    figure = Figure(figsize=(10, 0.28 * len(cells) + 2), layout="constrained")
    panel = figure.subplots()
    places = range(len(cells))
    for schedule, (marker, colour) in _LOOKS.items():
        found = [known.over(cell, known.ours(cell, "gen", schedule), known.tuned[cell]) for cell in cells]
        values = [math.nan if each is None else each.value for each in found]
        label = "no scheduler" if schedule == "constant" else schedule
        panel.plot(values, places, marker, color=colour, label=label, markersize=6, alpha=0.8)
    fixed = [
        None if (one := known.fixed[cell]) is None else known.over(cell, one.runs, known.tuned[cell]) for cell in cells
    ]
    panel.plot([math.nan if each is None else each.value for each in fixed], places, "x", color="0.5", label="fixed")
    panel.axvline(1.0, color="0.3", linewidth=1)
    panel.set(xscale="log", xlabel="validation loss / tuned baseline (100: diverged)")
    panel.set_yticks(list(places), [cell.name for cell in cells], fontsize="small")
    panel.set_ylim(len(cells) - 0.5, -0.5)
    panel.grid(alpha=0.25)
    panel.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)
    return figure


def grid(cells: Sequence[Cell]) -> tuple[Figure, list[Axes]]:
    """Returns a figure with a panel for each cell, with logarithmic y axes."""
    rows = max(1, math.ceil(len(cells) / _COLUMNS))
    figure = Figure(figsize=(3 * _COLUMNS, 2.3 * rows), layout="constrained")
    panels = list(figure.subplots(rows, _COLUMNS, squeeze=False).flat)
    for panel in panels[len(cells) :]:
        panel.set_axis_off()
    for panel, cell in zip(panels, cells, strict=False):
        panel.set_title(cell.name, loc="left", fontsize="small")
        panel.set_yscale("log")
        panel.grid(alpha=0.25)
        panel.tick_params(labelsize="x-small")
    return figure, panels


def _whole_decades(panel: Axes) -> None:
    """Sets limits at powers of ten, and labels only there."""
    low, high = panel.get_ylim()
    panel.set_ylim(10.0 ** math.floor(math.log10(low)), 10.0 ** math.ceil(math.log10(high)))
    panel.yaxis.set_minor_formatter(NullFormatter())


def _one(known: Comparison, cell: Cell, schedule: str, lr: float) -> Record | None:
    return next(
        (
            known.results.get(config)
            for config in known.ours(cell, "gen", schedule)
            if (config.lr, config.seed) == (lr, SWEEP_SEED)
        ),
        None,
    )


def _traces(known: Comparison) -> Figure:
    """Full lines without a scheduler, dashes with cosine, and a horizontal line at the tuned learning rate."""
    cells = known.study.cells
    figure, panels = grid(cells)
    for cell, panel in zip(cells, panels, strict=False):
        for lr, colour in zip(GIVEN, _STARTS, strict=True):
            for schedule, line in (("constant", "-"), ("cosine", "--")):
                record = _one(known, cell, schedule, lr)
                if record is not None:
                    rates = [rate if 0 < rate < math.inf else math.nan for rate in record.learning_rates]
                    panel.plot(record.steps, rates, line, color=colour, linewidth=1, alpha=0.8)
        tuned = known.tuned[cell]
        if tuned is not None and tuned.config.lr is not None:
            panel.axhline(tuned.config.lr, color="0.3", linewidth=1, linestyle=":")
    starts = ", ".join(f"{lr:g}" for lr in GIVEN)
    for panel in panels[: len(cells)]:
        _whole_decades(panel)
    figure.suptitle(
        f"learning rates of our rule, seed {SWEEP_SEED}, from {starts}; no scheduler (full), cosine (dashed); "
        "dotted: the tuned baseline's peak",
        fontsize="medium",
    )
    return figure


def _losses(known: Comparison) -> Figure:
    cells = known.study.cells
    figure, panels = grid(cells)
    for cell, panel in zip(cells, panels, strict=False):
        tuned = known.tuned[cell]
        curves = [("0.5", None if tuned is None else known.results.get(tuned.config))]
        curves += [(_LOOKS[schedule][1], _one(known, cell, schedule, USUAL)) for schedule in SCHEDULES]
        for colour, record in curves:
            if record is not None:
                losses = [loss if 0 < loss < math.inf else math.nan for loss in record.losses]
                panel.plot(record.steps, losses, color=colour, linewidth=1.2, alpha=0.85)
                if record.initial_train_loss < math.inf and record.diverged:
                    panel.set_ylim(top=10 * record.initial_train_loss)
    figure.suptitle(
        f"training losses of the batches, seed {SWEEP_SEED}: tuned (grey), ours without scheduler (blue), "
        "linear (orange), cosine (green)",
        fontsize="medium",
    )
    return figure
