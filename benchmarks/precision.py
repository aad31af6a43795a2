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
WAYS = ("float32", "autocast bfloat16", "stored in bfloat16")
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
    with single_thread():
        for make in WORKLOADS:
            for name, base in BASES.items():
                losses = [final_loss(make(), base, way, steps) for way in tqdm(WAYS, desc=f"{make().name}, {name}")]
                rows.append([f"{make().name}, {name}", *(f"{loss:.4g}" for loss in losses)])
    page = (
        f"# Training in half precision\n\n{command_line()}, one CPU thread, one seed\n\n"
        f"Training losses, mean of the last {LAST} of {steps} steps with a linear schedule, default arguments.\n\n"
        + markdown_table(["network", *WAYS], rows)
    )
    path = options.output / f"precision{'-quick' if options.quick else ''}.md"
    path.write_text(page + "\n", "utf-8")
    print(f"{page}\n\ntable: {path}")


def final_loss(
    workload: Workload, base: Callable[[list[torch.nn.Parameter]], Optimizer], way: str, steps: int
) -> float:
    """Trains in one of ``WAYS``.

    Args:
        workload: What to train.
        base: Makes the base optimizer.
        way: A name in ``WAYS``.
        steps: How long.
    """
    is_stored = way == "stored in bfloat16"
    if is_stored:
        workload.model.to(HALF)
    optimizer = GeNOptimizer(base(list(workload.model.parameters())))
    scheduler = LambdaLR(optimizer, lambda step: 1.0 - step / steps)
    losses = []
    for _ in range(steps):
        inputs, targets = next(workload.batches)
        is_cast = is_stored and inputs.is_floating_point()
        batch: Batch = (inputs.to(HALF), targets) if is_cast else (inputs, targets)

        def closure(batch: Batch = batch) -> Tensor:
            optimizer.zero_grad()
            with torch.autocast("cpu", HALF) if way == "autocast bfloat16" else nullcontext():
                loss = workload.loss_of(batch)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        losses.append(torch.as_tensor(optimizer.step(closure)).item())
        scheduler.step()
    last = losses[-LAST:]
    return sum(last) / len(last)
