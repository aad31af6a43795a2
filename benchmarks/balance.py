"""What noise costs and what training gains at fixed learning rates: where the default rule's ``balance`` comes from."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.battery.config import SWEEP
from benchmarks.command_line import add_output, command_line
from benchmarks.data import Data
from benchmarks.determinism import single_thread
from benchmarks.markdown import markdown_table
from benchmarks.optimizers import BASES, base_optimizer
from benchmarks.workloads import LONG, Task
from gen_optim.averaging import AveragedWeights
from gen_optim.rules.averages import BalanceAverages

SKIPPED = 25
"""The number of steps at the beginning that are not averaged."""
AROUND = 2
"""How many learning rates of the sweep above and below the middle one are tried."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Gives a parser the options of this job."""
    add_output(parser)
    parser.add_argument("--data", type=Path, default=None, metavar="DIR", help="real images and text, as in battery")
    parser.add_argument("--quick", action="store_true", help="80 steps, to see that all works; the file ends in -quick")


def run(options: argparse.Namespace) -> None:
    """Trains, prints the table and writes it."""
    options.output.mkdir(parents=True, exist_ok=True)
    data = Data(options.data)
    # The physics-informed network has next to no noise.
    cells = [
        (each, base) for each in LONG.values() if not each.is_held_out for base in BASES if each.name != "long-pinn"
    ]
    if options.quick:
        cells = cells[:2]
    rows: list[list[str]] = []
    marks: tuple[int, ...] = ()
    with single_thread(), tqdm(total=len(cells) * (2 * AROUND + 1), unit="run") as progress:
        for workload, base in cells:
            steps = 80 if options.quick else workload.steps
            marks = tuple(steps // part for part in (8, 4, 2, 1))
            middle = SWEEP[base].index(workload.centres[base])
            found = []
            for lr in SWEEP[base][max(middle - AROUND, 0) : middle + AROUND + 1]:
                found.append((lr, *measure(workload.make(0, data), base, lr, marks)))
                progress.update()
            lowest = min((loss for _, loss, _ in found if math.isfinite(loss)), default=math.nan)
            rows += [
                [f"{workload.name}, {base}", f"{lr:g}", f"{loss / lowest:.3f}", *(f"{ratio:.2f}" for ratio in ratios)]
                for lr, loss, ratios in found
            ]
    head = ["workload, base", "learning rate", "averaged loss over the lowest", *(f"after {mark}" for mark in marks)]
    page = f"# What noise costs, over what training gains\n\n{command_line()}, one CPU thread, seed 0\n\n{_READING}\n\n"
    page += markdown_table(head, rows)
    path = options.output / f"balance{'-quick' if options.quick else ''}.md"
    path.write_text(page + "\n", "utf-8")
    print(f"{page}\n\ntable: {path}")


def measure(task: Task, base: str, lr: float, marks: Sequence[int]) -> tuple[float, list[float]]:
    """Trains the bare optimizer at a fixed learning rate.

    Args:
        task: What to train.
        base: A name in ``BASES``.
        lr: The learning rate.
        marks: The numbers of the steps after which to look; the last one ends the run.

    Returns:
        The validation loss at averaged weights, and the ratio of the excess loss to the gain at each mark; NaN and
        infinity from where the loss is not finite.
    """
    torch.manual_seed(0)
    optimizer = base_optimizer(task.parameters(), base, lr)
    weights = AveragedWeights(optimizer)
    averages = BalanceAverages()
    batches = task.batches(0)
    ratios: list[float] = []
    task.model.train()
    for step in range(1, marks[-1] + 1):
        optimizer.zero_grad()
        loss = task.loss(task.model, next(batches))
        loss.backward()  # type: ignore[no-untyped-call]
        if not math.isfinite(loss.item()):
            return math.nan, [*ratios, *[math.inf] * (len(marks) - len(ratios))]
        if step % 8 == 0 and step >= SKIPPED:
            averages = averages.with_losses(loss.item(), float(weights.excess_loss()), step)
        optimizer.step()
        weights.update()
        if step in marks:
            ratios.append(averages.ratio)
    with weights.swapped():
        return task.evaluate(task.model, task.validation), ratios


_READING = """\
The bare optimizer at fixed learning rates, with the average that `GeNOptimizer` keeps. The *excess loss* is half of the
gradient times the distance to that average, the *gain* is how much the loss falls while the number of steps grows
e-fold. The table has their ratio after a number of steps. The rule brings it to `balance`, by default 0.3. At the
learning rates that end lowest it is between 0.1 and 0.8, and higher for the perceptron, whose loss comes close to
zero. At lower learning rates it is lower, at higher ones higher."""
