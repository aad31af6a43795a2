"""The picture of the main job: final losses over initial learning rates, and the best runs, for each base optimizer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.data import CLASSES
from benchmarks.main_job.report import best_bare
from benchmarks.main_job.runs import Result

_BARE: dict[str, Any] = {"color": "#c2571a", "linestyle": (0, (4, 2)), "linewidth": 1.6, "marker": "o", "zorder": 2}
_WRAPPED: dict[str, Any] = {"color": "#0b3c6f", "linewidth": 1.8, "marker": "v", "zorder": 3}
_MARKED = 8  # markers on a line
_GUESSING = math.log(CLASSES)  # the loss if every digit has the same probability
_TOP = 10 * _GUESSING  # a loss above is off the panel


def draw(results: Sequence[Result], path: Path) -> None:
    """Draws the final losses of all runs, and the course of the wrapped ones and of the best bare one.

    Args:
        results: The runs.
        path: Where to write it; the ending decides the format.
    """
    bases = list(dict.fromkeys(result.spec.base for result in results))
    figure = Figure(figsize=(15, 4 * len(bases)), layout="constrained")
    panels = figure.subplots(len(bases), 3, squeeze=False)
    for base, (finals, losses, rates) in zip(bases, panels, strict=True):
        runs = [result for result in results if result.spec.base == base]
        _finals(finals, runs)
        for label, run in _courses(runs).items():
            style = {**(_WRAPPED if run.spec.gen else _BARE), "label": label}
            losses.plot(run.evaluated, [_shown(loss) for loss in run.training_losses], **_marked(run.evaluated, style))
            steps = range(1, len(run.learning_rates) + 1)
            # The logarithm has no zero: a learning rate that is not positive leaves a gap.
            positive = [rate if rate > 0 else math.nan for rate in run.learning_rates]
            rates.plot(steps, positive, **_marked(steps, style))
        _guessing(losses)
        rates.set_yscale("log")
        finals.set_title(f"{base}: final training loss", loc="left")
        losses.set_title("training loss", loc="left")
        rates.set_title("learning rate in force", loc="left")
        finals.set_xlabel("initial learning rate")
        finals.legend()
        rates.legend()
        for panel in (losses, rates):
            panel.set_xlabel("step")
        for panel in (finals, losses, rates):
            panel.grid(alpha=0.25)
    figure.savefig(path, dpi=130)


def _finals(panel: Axes, runs: Sequence[Result]) -> None:
    for gen, style in ((False, _BARE), (True, _WRAPPED)):
        chosen = [run for run in runs if run.spec.gen is gen]
        at = [run.spec.learning_rate for run in chosen]
        shown = [_shown(run.training_losses[-1]) for run in chosen]
        panel.plot(at, shown, label=chosen[0].spec.name, clip_on=False, **style)
    panel.set_xscale("log")
    _guessing(panel)


def _courses(runs: Sequence[Result]) -> dict[str, Result]:
    """The runs that are drawn over their steps, by label: the best bare one, and wrapped ones that differ."""
    best = best_bare(runs)
    wrapped: dict[tuple[float, ...], list[Result]] = {}
    for run in runs:
        if run.spec.gen:
            wrapped.setdefault(run.training_losses, []).append(run)
    found = {f"{best.spec.name} at {best.spec.learning_rate:g}, the best of the sweep": best}
    for same in wrapped.values():
        rates = ", ".join(f"{run.spec.learning_rate:g}" for run in same)
        found[f"{same[0].spec.name} from {rates}" + (": the same run" if len(same) > 1 else "")] = same[0]
    return found


def _shown(loss: float) -> float:
    """A loss, or the top of the panel if it is above or not a number."""
    return loss if loss <= _TOP else _TOP


def _marked(points: Sequence[float], style: dict[str, Any]) -> dict[str, Any]:
    return {**style, "markevery": max(1, len(points) // _MARKED)}


def _guessing(panel: Axes) -> None:
    panel.axhline(_GUESSING, color="0.5", linewidth=0.8, linestyle=":", zorder=1)
    panel.text(
        0.99,
        _GUESSING,
        "guessing",
        transform=panel.get_yaxis_transform(),
        horizontalalignment="right",
        verticalalignment="top",
        color="0.4",
        fontsize="small",
    )
    panel.set_yscale("log")
    panel.set_ylim(top=_TOP)
