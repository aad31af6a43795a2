"""Pictures of the loss along the direction before and after training, and of the probe steps between."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tqdm import tqdm

from benchmarks.command_line import add_output
from benchmarks.data import Data
from benchmarks.determinism import single_thread
from benchmarks.optimizers import GeNStepper, base_optimizer
from benchmarks.training import SCHEDULES, train
from benchmarks.workloads import WORKLOADS, Batch, Task
from gen_optim import GeNOptimizer, History
from gen_optim.functional.direction import optimizer_direction
from gen_optim.plotting import plot_history, plot_loss_along

TITLES = {"regression": "regression on synthetic data", "digits-mlp": "digits MLP", "digits-cnn": "digits CNN"}
"""The workloads, with the titles of their pictures."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Gives a parser the options of this job."""
    add_output(parser)
    parser.add_argument("--only", choices=TITLES, help="one of the pictures (default: all)")
    parser.add_argument("--steps", type=int, default=300, metavar="N", help="steps to train (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="20 steps, to see that all works; the files end in -quick")


def run(options: argparse.Namespace) -> None:
    """Trains and writes the pictures."""
    options.output.mkdir(parents=True, exist_ok=True)
    for name, title in TITLES.items():
        if options.only in (None, name):
            path = options.output / f"direction-{name}{'-quick' if options.quick else ''}.png"
            figure = plt.figure(figsize=(11, 7), layout="constrained")
            figure.suptitle(f"{title}, AdamW in GeNOptimizer", x=0.01, horizontalalignment="left")
            with single_thread():
                draw(WORKLOADS[name].make(0, Data()), 20 if options.quick else options.steps, figure)
            figure.savefig(path, dpi=110)
            plt.close(figure)
            print(f"picture: {path}")


def draw(task: Task, steps: int, figure: Figure) -> None:
    """Trains with AdamW in GeNOptimizer and draws four panels.

    Args:
        task: What to train.
        steps: The number of steps.
        figure: Where to draw.
    """
    (before, losses), (after, rates) = figure.subplots(2, 2)
    optimizer, history = GeNOptimizer(base_optimizer(task.parameters(), "AdamW", 1e-3)), History()
    optimizer.register_probe_hook(history)
    panels = {
        1: (before, "in the second step"),  # the first step has filled the moments
        steps - 1: (after, "in the last step"),  # after it the factor is 0, and no step would be taken
    }
    stream = task.batches(0)

    def batches() -> Iterator[Batch]:
        for step, batch in enumerate(stream):
            if step in panels:
                _draw_direction(task, optimizer, next(stream), *panels[step])
            yield batch

    taken = train(task, GeNStepper(optimizer), batches(), steps=steps, factor=SCHEDULES["linear"])
    for _ in tqdm(taken, total=steps, unit="step", mininterval=0.5):
        pass
    losses.sharex(rates)
    plot_history(history, ax=np.array([[losses], [rates]], dtype=object))


def _draw_direction(task: Task, optimizer: GeNOptimizer, batch: Batch, ax: Axes, when: str) -> None:
    optimizer.zero_grad()
    task.loss(task.model, batch).backward()  # type: ignore[no-untyped-call]
    params = dict(task.model.named_parameters())
    direction = optimizer_direction(optimizer, params)
    plot_loss_along(task.loss_function(batch), params, direction, ax=ax)
    ax.set_title(f"loss along the direction {when}", loc="left")
