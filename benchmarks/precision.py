"""Training in half precision next to float32: under autocast, and with everything stored in bfloat16."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from benchmarks.command import add_output, command_line, markdown_table
from benchmarks.repeatable import single_thread
from benchmarks.workloads import Batch, Workload, character_transformer, digits_cnn, digits_mlp
from gen_optim import GeNOptimizer

WORKLOADS = (digits_mlp, digits_cnn, character_transformer)
BASES: dict[str, Callable[[list[torch.nn.Parameter]], Optimizer]] = {
    "AdamW": AdamW,
    "SGD": lambda parameters: SGD(parameters, momentum=0.9),
}
HALF = torch.bfloat16
WAYS: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "float32": (torch.float32, None),
    "autocast bfloat16": (torch.float32, HALF),
    "stored in bfloat16": (HALF, None),
}
"""The dtype in which everything is stored, and that of autocast."""
LAST = 20
"""So many of the last training losses are averaged."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Gives a parser the options of this job."""
    add_output(parser)
    parser.add_argument("--quick", action="store_true", help="20 steps, to see that all works; the files end in -quick")


def run(options: argparse.Namespace) -> None:
    """Trains, prints the table and writes it."""
    options.output.mkdir(parents=True, exist_ok=True)
    steps = 20 if options.quick else 300
    rows = []
    with single_thread(), tqdm(total=len(WORKLOADS) * len(BASES) * len(WAYS), unit="run") as progress:
        for make in WORKLOADS:
            for base, wrap in BASES.items():
                losses = []
                for stored, autocast in WAYS.values():
                    workload = make()
                    workload.model.to(stored)
                    optimizer = GeNOptimizer(wrap(list(workload.model.parameters())))
                    losses.append(final_loss(workload, optimizer, steps, autocast))
                    progress.update()
                rows.append([f"{workload.name}, {base}", *(f"{loss:.4g}" for loss in losses)])
    page = (
        f"# Training in half precision\n\n{command_line()}, one CPU thread, one seed\n\n"
        f"Training losses, mean of the last {LAST} of {steps} steps with a linear schedule, default arguments.\n\n"
        + markdown_table(["network", *WAYS], rows)
    )
    path = options.output / f"precision{'-quick' if options.quick else ''}.md"
    path.write_text(page + "\n", "utf-8")
    print(f"{page}\n\ntable: {path}")


def final_loss(workload: Workload, optimizer: GeNOptimizer, steps: int, autocast: torch.dtype | None = None) -> float:
    """Trains with a linear schedule; returns the mean of the last losses.

    Args:
        workload: What to train; batches are cast to the dtype of its parameters.
        optimizer: With what.
        steps: How long.
        autocast: The dtype of autocast; None for none.
    """
    stored = next(workload.model.parameters()).dtype
    scheduler = LambdaLR(optimizer, lambda step: 1.0 - step / steps)
    losses = []
    for _ in range(steps):
        inputs, targets = next(workload.batches)
        batch: Batch = (inputs.to(stored) if inputs.is_floating_point() else inputs, targets)

        def closure(batch: Batch = batch) -> Tensor:
            optimizer.zero_grad()
            with nullcontext() if autocast is None else torch.autocast("cpu", autocast):
                loss = workload.loss_of(batch)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        losses.append(torch.as_tensor(optimizer.step(closure)).item())
        scheduler.step()
    last = losses[-LAST:]
    return sum(last) / len(last)
