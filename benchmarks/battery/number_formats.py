"""Numbers as the tables show them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from benchmarks.battery.comparison import Baseline
from benchmarks.battery.scores import Ratio, geometric_mean

NOTHING = "-"
"""Shown if nothing is known."""


def named(schedule: str) -> str:
    """Returns a schedule's name in the tables."""
    return "no scheduler" if schedule == "constant" else schedule


def number(value: float) -> str:
    """Returns a ratio, or a mean of ratios."""
    if math.isnan(value):
        return NOTHING
    return f"{value:.3g}" if value >= 10 else f"{value:.3f}"


def ratio(value: Ratio | None) -> str:
    """Returns a ratio, with a star if runs are missing."""
    return NOTHING if value is None else f"{number(value.value)}{'' if value.is_complete else '*'}"


def setting(baseline: Baseline | None) -> str:
    """Returns learning rate and schedule of a baseline."""
    return NOTHING if baseline is None else f"{baseline.config.lr:g} {baseline.config.schedule}"


def bottom_lines(width: int, columns: Mapping[int, Sequence[float]]) -> list[list[str]]:
    """Returns the lines under a table: geometric means and worst values of its columns of ratios.

    Args:
        width: The number of the table's columns.
        columns: The known ratios by the place of their column.
    """
    summaries: list[tuple[str, Callable[[Sequence[float]], float]]] = [
        ("**geometric mean**", geometric_mean),
        ("**worst**", lambda values: max(values, default=math.nan)),
    ]
    lines = []
    for title, summarise in summaries:
        line = [title, *[""] * (width - 1)]
        for place, values in columns.items():
            line[place] = number(summarise(values))
        lines.append(line)
    return lines
