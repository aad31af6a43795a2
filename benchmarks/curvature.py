"""How far is the curvature from three probes from the exact one, and can the probes alone tell?

At every step of training runs in float32, the curvature along the step is computed exactly, by differentiation, and
from probes at ±mα for several m. Two things make them differ: the loss is no parabola (large m), and the second
difference is lost in the rounding of the losses (small m). The error of the second kind is predicted to be
``4 ε max|g| / (mα)²``. The rule that distrusts a parabola rests on that prediction, which is compared here with the
errors that occur.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from benchmarks.command_line import add_output, command_line
from benchmarks.data import Data
from benchmarks.determinism import single_thread
from benchmarks.markdown import markdown_table
from benchmarks.optimizers import GeNStepper, base_optimizer
from benchmarks.training import SCHEDULES, train
from benchmarks.workloads import WORKLOADS, Batch, Task
from gen_optim import GeNOptimizer, ProbeRecord
from gen_optim.functional.derivatives import derivatives_along, loss_along
from gen_optim.functional.direction import optimizer_direction
from gen_optim.rules.parabola import fit_parabola

TITLES = {"digits-mlp": "digits MLP", "character-transformer": "character transformer"}
"""The workloads, with their names in the tables."""

MULTIPLES = (1.0, 0.1, 0.01, 0.001)
NOISE_BINS = (0.0, 0.01, 0.125, 0.3, 1.0, 3.0, 10.0, np.inf)
"""The default tolerance of 8 machine epsilons trusts a curvature where this noise is below 1 / 8."""


@dataclass(frozen=True)
class Comparison:
    """One curvature from probes beside the exact one.

    Attributes:
        multiple: Where the probes were, in multiples of the learning rate.
        exact: The curvature by differentiation.
        probed: The curvature from the probes.
        epsilon_noise: The noise of the latter if each loss is off by one machine epsilon.
    """

    multiple: float
    exact: float
    probed: float
    epsilon_noise: float

    @property
    def error(self) -> float:
        """Relative error of the curvature from probes."""
        return abs(self.probed - self.exact) / abs(self.exact)

    @property
    def noise(self) -> float:
        """The predicted error, relative to what was probed: known without the exact curvature."""
        return self.epsilon_noise / abs(self.probed) if self.probed else np.inf


def add_options(parser: argparse.ArgumentParser) -> None:
    """Gives a parser the options of this job."""
    add_output(parser)
    parser.add_argument("--steps", type=int, default=300, metavar="N", help="steps of each run (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="20 steps a run, to see that all works")


def run(options: argparse.Namespace) -> None:
    """Trains, prints the tables, and writes them and the picture."""
    steps = 20 if options.quick else options.steps
    stem = "curvature-quick" if options.quick else "curvature"
    options.output.mkdir(parents=True, exist_ok=True)
    with single_thread():
        found = {title: compare(WORKLOADS[name].make(0, Data()), steps=steps) for name, title in TITLES.items()}
    page = _page(found, f"{stem}.png")
    (options.output / f"{stem}.md").write_text(page, "utf-8")
    draw(found, options.output / f"{stem}.png")
    print(page)
    print(f"table:   {options.output / f'{stem}.md'}\npicture: {options.output / f'{stem}.png'}")


def compare(task: Task, *, steps: int) -> list[Comparison]:
    """Trains with AdamW in GeNOptimizer and measures the curvature along each step in all ways.

    Args:
        task: What to train.
        steps: The number of steps.
    """
    base = base_optimizer(task.parameters(), "AdamW", 1e-3)
    optimizer = GeNOptimizer(base, mode="approximate", rule="published", period=1)
    before: dict[str, Tensor] = {}
    direction: dict[str, Tensor] = {}
    measured: list[Batch] = []
    found: list[Comparison] = []

    def batches() -> Iterator[Batch]:
        for batch in task.batches(0):
            optimizer.zero_grad()
            task.loss(task.model, batch).backward()  # type: ignore[no-untyped-call]
            params = dict(task.model.named_parameters())
            before.update({name: each.detach().clone() for name, each in params.items()})
            direction.update(optimizer_direction(optimizer, params))
            measured[:] = [batch]
            yield batch

    def on_probe(_optimizer: GeNOptimizer, record: ProbeRecord) -> None:
        loss = task.loss_function(measured[0])
        exact = derivatives_along(loss, before, direction).curvature.item()
        for multiple in MULTIPLES:
            points = [-multiple * record.lr_before, 0.0, multiple * record.lr_before]
            losses = loss_along(loss, before, direction, points, chunk_size=1)
            parabola = fit_parabola(points, losses.tolist(), rounding=torch.finfo(losses.dtype).eps)
            found.append(Comparison(multiple, exact, parabola.curvature, parabola.curvature_noise))

    optimizer.register_probe_hook(on_probe)
    taken = train(task, GeNStepper(optimizer), batches(), steps=steps, factor=SCHEDULES["linear"])
    for _ in tqdm(taken, total=steps, unit="step", mininterval=0.5):
        pass
    return found


def _page(found: dict[str, list[Comparison]], picture: str) -> str:
    parts = ["# Curvature from three probes against the exact one", command_line(), _READING]
    for name, comparisons in found.items():
        parts += [f"## {name}: by how far the probes reach", _by_multiple(comparisons)]
        parts += [f"## {name}: by the noise predicted from the probes", _by_noise(comparisons)]
    return "\n\n".join([*parts, f"![Error of the curvature over its predicted noise]({picture})"]) + "\n"


_READING = """\
Relative error of the curvature from probes at ±mα, over all steps of a training run in float32 with AdamW and the
published rule, from learning rate 1e-3. Predicted noise: 4 ε max|g| / (mα)², with ε the machine epsilon, relative to
the curvature probed. Error / noise below 1 means that the losses are rounded better than one ε each. The default
rule, with a tolerance of 8 ε, trusts a curvature whose predicted noise is below 1 / 8. "Exact" knows no kinks: along
a step on which ReLUs switch, probes see a curvature that differentiation does not."""


def _by_multiple(comparisons: list[Comparison]) -> str:
    rows = []
    for multiple in MULTIPLES:
        chosen = [each for each in comparisons if each.multiple == multiple]
        errors = np.array([each.error for each in chosen])
        signs = np.mean([each.probed * each.exact > 0 for each in chosen])
        rows.append([f"{multiple:g}", str(len(chosen)), *_quantiles(errors), f"{1 - signs:.1%}"])
    return markdown_table(["m", "steps", "median error", "90 %", "99 %", "wrong sign"], rows)


def _by_noise(comparisons: list[Comparison]) -> str:
    noise = np.array([each.noise for each in comparisons])
    errors = np.array([each.error for each in comparisons])
    wrong = np.array([each.probed * each.exact <= 0 for each in comparisons])
    ratio = np.array([abs(each.probed - each.exact) / each.epsilon_noise for each in comparisons])
    rows = []
    for low, high in itertools.pairwise(NOISE_BINS):
        inside = (noise >= low) & ((noise < high) | (high == np.inf))
        if inside.any():
            rows.append(
                [
                    f"{low:g} to {high:g}",
                    str(inside.sum()),
                    *_quantiles(errors[inside]),
                    f"{wrong[inside].mean():.1%}",
                    f"{np.quantile(ratio[inside], 0.99):.2g}",
                ]
            )
    return markdown_table(
        ["predicted noise", "parabolas", "median error", "90 %", "99 %", "wrong sign", "error / noise, 99 %"], rows
    )


def _quantiles(errors: npt.NDArray[np.float64]) -> list[str]:
    return [f"{np.quantile(errors, level):.2g}" for level in (0.5, 0.9, 0.99)]


_LOOKS = (("o", "0.0"), ("s", "#1f5fa8"), ("^", "#c26a1b"), ("x", "0.6"))


def draw(found: Mapping[str, Sequence[Comparison]], path: Path) -> None:
    """Draws a panel per workload and writes the picture.

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
