"""The picture of the curvature study: the error of each parabola over the noise predicted for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from benchmarks.curvature import MULTIPLES, Comparison

_LOOKS = (("o", "0.0"), ("s", "#1f5fa8"), ("^", "#c26a1b"), ("x", "0.6"))


def draw(found: Mapping[str, Sequence[Comparison]], path: Path) -> None:
    """Draws a panel a workload and writes the picture.

    Args:
        found: Comparisons by workload.
        path: Where to write it; the ending decides the format.
    """
    figure = Figure(figsize=(6 * len(found) + 2, 5), layout="constrained")
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    for panel, (name, comparisons) in zip(panels, found.items(), strict=True):
        for multiple, (marker, colour) in zip(MULTIPLES, _LOOKS, strict=True):
            chosen = [each for each in comparisons if each.multiple == multiple and each.error > 0]
            panel.plot(
                [each.noise for each in chosen],
                [each.error for each in chosen],
                marker,
                color=colour,
                markersize=3.5,
                alpha=0.7,
                label=f"probes at ±{multiple:g} α",
            )
        diagonal = np.array([1e-8, 1e4])
        panel.plot(diagonal, diagonal, "-", color="0.3", linewidth=1, label="error = predicted noise")
        panel.plot(diagonal, 8 * diagonal, "--", color="0.3", linewidth=1, label="error = 8 × predicted noise")
        panel.axhline(1.0, color="0.3", linewidth=0.8, linestyle=":")
        panel.set(xscale="log", yscale="log", xlim=(1e-6, 1e3), ylim=(1e-6, 1e4))
        panel.set_xlabel("predicted noise / curvature probed (1 machine epsilon a loss)")
        panel.set_ylabel("relative error of the curvature")
        panel.set_title(name, loc="left")
        panel.grid(alpha=0.25)
    panels[-1].legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)
    figure.savefig(path, dpi=130)
