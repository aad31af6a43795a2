"""The picture of the main job: loss and learning rate over steps, a row for each base optimizer.

Bare and wrapped runs differ in darkness and in dashes, the initial learning rates in markers, so
that nothing is lost in grey.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.data import CLASSES
from benchmarks.main_job.runs import Result

# For a small, a usual and a large learning rate: marker, colour if wrapped (dark), if bare (light).
_LOOKS = (
    ("v", "#0b3c6f", "#5b9bd5"),
    ("o", "#14501a", "#5fb564"),
    ("^", "#7f1d1d", "#e8836b"),
)
_MARKED = 8  # markers on a line
_GUESSING = math.log(CLASSES)  # the loss if every digit has the same probability
_TOP = 10 * _GUESSING  # a loss above is off the panel


def draw(results: Sequence[Result], path: Path) -> None:
    """Draws loss and learning rate of all runs and writes the picture.

    Args:
        results: The runs.
        path: Where to write it; the ending decides the format.
    """
    bases = list(dict.fromkeys(result.spec.base for result in results))
    figure = Figure(figsize=(12, 4 * len(bases)), layout="constrained")
    panels = figure.subplots(len(bases), 2, squeeze=False)
    for base, (left, right) in zip(bases, panels, strict=True):
        runs = [result for result in results if result.spec.base == base]
        rates = sorted({run.spec.learning_rate for run in runs})
        for run in runs:
            place = rates.index(run.spec.learning_rate)
            _loss(left, run, place)
            _learning_rate(right, run, place)
        _finish_losses(left)
        right.set_yscale("log")
        left.set_title(f"{base}: training loss", loc="left")
        right.set_title(f"{base}: learning rate in force", loc="left")
        right.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)
        for panel in (left, right):
            panel.set_xlabel("step")
            panel.grid(alpha=0.25)
    figure.savefig(path, dpi=130)


def _style(run: Result, place: int) -> dict[str, Any]:
    """Returns the style of a run's lines, by its learning rate's place among those of its base."""
    marker, dark, light = _LOOKS[place]
    gen = run.spec.gen
    return {
        "label": f"{run.spec.name} from {run.spec.learning_rate:g}" + (" (diverged)" if run.diverged else ""),
        "color": dark if gen else light,
        "linestyle": "-" if gen else (0, (4, 2)),
        "linewidth": 1.8 if gen else 1.4,
        "marker": marker,
        "markersize": 6,
        "markerfacecolor": dark if gen else "white",
        "zorder": 3 if gen else 2,
    }


def _marked(run: Result, place: int, points: int) -> tuple[int, int]:
    """Returns which points of a line get a marker: the first one, and the distance to the next.

    Lines meet, and then only the markers tell them apart: so each run begins at another point.
    """
    every = max(1, points // _MARKED)
    return every * (2 * place + run.spec.gen) // (2 * len(_LOOKS)), every


def _loss(panel: Axes, run: Result, place: int) -> None:
    style = _style(run, place)
    # NaN leaves a gap in a line. An infinite loss leaves the panel at its top, as a huge one does.
    shown = [100 * _TOP if loss == math.inf else loss for loss in run.training_losses]
    panel.plot(run.evaluated, shown, markevery=_marked(run, place, len(shown)), **style)
    for step, loss in zip(run.evaluated, run.training_losses, strict=True):
        if not loss <= _TOP:  # NaN included
            alone = style | {"linestyle": "none", "label": None, "clip_on": False}
            panel.plot([step], [_TOP], **alone)
            break


def _finish_losses(panel: Axes) -> None:
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


def _learning_rate(panel: Axes, run: Result, place: int) -> None:
    steps = range(1, len(run.learning_rates) + 1)
    # The logarithm has no zero: a learning rate that is not positive leaves a gap.
    shown = [rate if rate > 0 else math.nan for rate in run.learning_rates]
    panel.plot(steps, shown, markevery=_marked(run, place, len(shown)), **_style(run, place))
