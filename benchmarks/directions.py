"""Pictures of the method at work: the loss along the direction before and after training, and what happened between."""

from __future__ import annotations

import argparse

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from benchmarks.command import add_output
from benchmarks.workloads import Workload, digits_cnn, digits_mlp, regression
from gen_optim import GeNOptimizer, History
from gen_optim.functional.direction import optimizer_direction
from gen_optim.plotting import plot_history, plot_loss_along

WORKLOADS = {"regression": regression, "digits-mlp": digits_mlp, "digits-cnn": digits_cnn}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Gives a parser the options of this job."""
    add_output(parser)
    parser.add_argument("--only", choices=WORKLOADS, help="one of the pictures (default: all)")
    parser.add_argument("--steps", type=int, default=300, metavar="N", help="steps to train (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="20 steps, to see that all works; the files end in -quick")


def run(options: argparse.Namespace) -> None:
    """Trains and writes the pictures."""
    options.output.mkdir(parents=True, exist_ok=True)
    for name, make in WORKLOADS.items():
        if options.only in (None, name):
            path = options.output / f"direction-{name}{'-quick' if options.quick else ''}.png"
            figure = plt.figure(figsize=(11, 7), layout="constrained")
            draw(make(), 20 if options.quick else options.steps, figure)
            figure.savefig(path, dpi=110)
            plt.close(figure)
            print(f"picture: {path}")


def draw(workload: Workload, steps: int, figure: Figure) -> None:
    """Trains with AdamW in GeNOptimizer and draws four panels.

    Args:
        workload: What to train.
        steps: How long.
        figure: Where to draw.
    """
    (before, losses), (after, rates) = figure.subplots(2, 2)
    figure.suptitle(f"{workload.name}, AdamW in GeNOptimizer", x=0.01, horizontalalignment="left")
    optimizer, history = GeNOptimizer(AdamW(workload.model.parameters())), History()
    optimizer.register_probe_hook(history)
    scheduler = LambdaLR(optimizer, lambda step: 1.0 - step / steps)
    for step in tqdm(range(steps), desc=workload.name, unit="step", mininterval=0.5):
        batch = next(workload.batches)
        if step == 1:  # the first step has filled the moments
            _draw_direction(workload, optimizer, before, "in the second step")
        if step == steps - 1:  # after it the scheduler's factor is 0, and no step would be taken
            _draw_direction(workload, optimizer, after, "in the last step")
        optimizer.step(lambda batch=batch: workload.loss_of(batch))  # type: ignore[misc]
        scheduler.step()
    losses.sharex(rates)
    plot_history(history, ax=np.array([[losses], [rates]], dtype=object))


def _draw_direction(workload: Workload, optimizer: GeNOptimizer, ax: Axes, when: str) -> None:
    batch = next(workload.batches)
    optimizer.zero_grad()
    workload.loss_of(batch).backward()  # type: ignore[no-untyped-call]
    params = dict(workload.model.named_parameters())
    direction = optimizer_direction(optimizer, params)
    plot_loss_along(workload.loss_function(batch), params, direction, ax=ax)
    ax.set_title(f"loss along the direction {when}", loc="left")
