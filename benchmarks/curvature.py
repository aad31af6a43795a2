"""How far is the curvature of three probes from the exact one, and can one tell from the probes alone?

Along real training runs in float32, at every probe step, the curvature along the step is measured exactly (by
differentiation) and from probes at ±mα for several m. Two things separate them: the loss is no parabola (large m), and
the second difference drowns in the rounding of the losses (small m). For the second there is a prediction,
``4 ε max|g| / (mα)²``, on which the rule that distrusts a parabola rests; here it meets what really happens.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from benchmarks.command import add_output, command_line, markdown_table
from benchmarks.workloads import Workload, character_transformer, digits_mlp
from gen_optim import GeNOptimizer
from gen_optim.closures.losses import rounding_of
from gen_optim.measurement.double_backward import twice_differentiable_kernels
from gen_optim.measurement.lookahead import MODES, Line, Measurement, Mode, differentiate, probe_around
from gen_optim.rules.parabola import fit_parabola

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
    from benchmarks.curvature_picture import draw

    steps = 20 if options.quick else options.steps
    stem = "curvature-quick" if options.quick else "curvature"
    options.output.mkdir(parents=True, exist_ok=True)
    found = {each.name: compare(each, steps=steps) for each in (digits_mlp(), character_transformer())}
    page = _page(found, f"{stem}.png")
    (options.output / f"{stem}.md").write_text(page, "utf-8")
    draw(found, options.output / f"{stem}.png")
    print(page)
    print(f"table:   {options.output / f'{stem}.md'}\npicture: {options.output / f'{stem}.png'}")


def compare(workload: Workload, *, steps: int) -> list[Comparison]:
    """Trains with AdamW in GeNOptimizer and measures the curvature in all ways at every step.

    Args:
        workload: What to train.
        steps: Steps to train.
    """
    found: list[Comparison] = []

    def measure(line: Line) -> Measurement:
        exact = differentiate(line).parabola.curvature
        for multiple in MULTIPLES:
            raw = [line.evaluate(-multiple), line.evaluate(0.0), line.evaluate(multiple)]
            points = [-multiple * line.lr, 0.0, multiple * line.lr]
            parabola = fit_parabola(points, line.read(raw), rounding=rounding_of(raw))
            found.append(Comparison(multiple, exact, parabola.curvature, parabola.curvature_noise))
        return probe_around(line)

    MODES["compared"] = Mode(measure, twice_differentiable_kernels)
    try:
        optimizer = GeNOptimizer(AdamW(workload.model.parameters()), mode="compared", rule="published", period=1)
        scheduler = LambdaLR(optimizer, lambda step: 1.0 - step / steps)
        for batch in tqdm(
            itertools.islice(workload.batches, steps), total=steps, desc=workload.name, unit="step", mininterval=0.5
        ):
            optimizer.step(lambda batch=batch: workload.loss_of(batch))  # type: ignore[misc]
            scheduler.step()
    finally:
        del MODES["compared"]
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
