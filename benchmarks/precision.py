"""Training in half precision next to float32: under autocast, and with everything stored in bfloat16."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.command_line import add_output, command_line
from benchmarks.data import Data
from benchmarks.determinism import single_thread
from benchmarks.markdown import markdown_table
from benchmarks.optimizers import GeNStepper, base_optimizer
from benchmarks.training import SCHEDULES, train
from benchmarks.workloads import WORKLOADS, Batch, Task
from benchmarks.workloads.registry import Model
from gen_optim import GeNOptimizer

TITLES = {
    "digits-mlp": "digits MLP",
    "digits-cnn": "digits CNN",
    "character-transformer": "character transformer",
}
"""The workloads, with their names in the table."""
HALF = torch.bfloat16
WAYS: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "float32": (torch.float32, None),
    "autocast bfloat16": (torch.float32, HALF),
    "stored in bfloat16": (HALF, None),
}
"""The dtype in which everything is stored, and that of autocast."""
LAST = 20
"""The number of training losses at the end of a run that are averaged."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Gives a parser the options of this job."""
    add_output(parser)
    parser.add_argument("--quick", action="store_true", help="20 steps, to see that all works; the files end in -quick")


def run(options: argparse.Namespace) -> None:
    """Trains, prints the table and writes it."""
    options.output.mkdir(parents=True, exist_ok=True)
    steps = 20 if options.quick else 300
    rows = []
    bases = ("AdamW", "SGD")
    with single_thread(), tqdm(total=len(TITLES) * len(bases) * len(WAYS), unit="run") as progress:
        for name, title in TITLES.items():
            for base in bases:
                losses = []
                for stored, autocast in WAYS.values():
                    task = WORKLOADS[name].make(0, Data())
                    task.model.to(stored)
                    optimizer = GeNOptimizer(base_optimizer(task.parameters(), base, 1e-3))
                    losses.append(final_loss(task, optimizer, steps, autocast))
                    progress.update()
                rows.append([f"{title}, {base}", *(f"{loss:.4g}" for loss in losses)])
    page = (
        f"# Training in half precision\n\n{command_line()}, one CPU thread, one seed\n\n"
        f"Training losses, mean of the last {LAST} of {steps} steps with a linear schedule, default arguments.\n\n"
        + markdown_table(["network", *WAYS], rows)
    )
    path = options.output / f"precision{'-quick' if options.quick else ''}.md"
    path.write_text(page + "\n", "utf-8")
    print(f"{page}\n\ntable: {path}")


def final_loss(task: Task, optimizer: GeNOptimizer, steps: int, autocast: torch.dtype | None = None) -> float:
    """Trains with a linear schedule and returns the mean of the last losses.

    Args:
        task: What to train; batches are cast to the dtype of its parameters.
        optimizer: The optimizer.
        steps: The number of steps.
        autocast: The dtype of autocast; None for none.
    """
    stored = next(task.model.parameters()).dtype

    def loss(model: Model, batch: Batch) -> Tensor:
        with nullcontext() if autocast is None else torch.autocast("cpu", autocast):
            return task.loss(model, batch)

    def batches() -> Iterator[Batch]:
        for batch in task.batches(0):
            yield tuple(each.to(stored) if each.is_floating_point() else each for each in batch)

    steps_taken = train(
        replace(task, loss=loss), GeNStepper(optimizer), batches(), steps=steps, factor=SCHEDULES["linear"]
    )
    last = [step.loss for step in steps_taken][-LAST:]
    return sum(last) / len(last)
