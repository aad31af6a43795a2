"""The command line: ``python -m benchmarks [JOB] [options]``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks import balance, compatibility, curvature, directions, precision, replay
from benchmarks.battery import job as battery
from benchmarks.cost import job as cost
from benchmarks.main_job import job as main_job


@dataclass(frozen=True)
class Job:
    """Something to run from the command line.

    Attributes:
        name: The subcommand.
        summary: One line for ``--help``.
        add_options: Gives a parser the job's options.
        run: Runs the job.
    """

    name: str
    summary: str
    add_options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]


# The first is what runs when none is named.
JOBS = (
    Job(
        "digits",
        "train on handwritten digits from learning rates far too small, usual and far too large, "
        "bare and wrapped in GeNOptimizer",
        main_job.add_options,
        main_job.run,
    ),
    Job(
        "curvature",
        "how far the curvature from three probes is from the exact one, along training runs in float32",
        curvature.add_options,
        curvature.run,
    ),
    Job(
        "balance",
        "what noise costs and what training gains at fixed learning rates, in long runs of the bare optimizer",
        balance.add_options,
        balance.run,
    ),
    Job(
        "directions",
        "pictures of the loss along the direction with its parabola, before and after training three small networks",
        directions.add_options,
        directions.run,
    ),
    Job(
        "precision",
        "train three small networks in float32, under autocast and stored in bfloat16",
        precision.add_options,
        precision.run,
    ),
    Job(
        "compatibility",
        "wrap the optimizers of other packages: which are accepted and train, which are refused, and which fail",
        compatibility.add_options,
        compatibility.run,
    ),
    Job(
        "cost",
        "time, memory and moves of parameters in lazy steps and probe steps, next to the least they could cost",
        cost.add_options,
        cost.run,
    ),
    Job(
        "battery",
        "many small workloads: bare over a sweep of learning rates, wrapped from any, and others' learning-rate-free "
        "optimizers; resumes where it was interrupted",
        battery.add_options,
        battery.run,
    ),
    Job(
        "replay",
        "what another rule, or other constants, would have decided at the probe steps of a recorded run",
        replay.add_options,
        replay.run,
    ),
)


def parser() -> argparse.ArgumentParser:
    """Returns the parser: the first job's options, and a subcommand for each job."""
    default = JOBS[0]
    program = "python -m benchmarks"
    top = argparse.ArgumentParser(
        prog=program,
        usage="%(prog)s [JOB] [options]",
        description=f"Measures gen_optim. Without a job named: {default.name}.",
    )
    default.add_options(top)
    top.set_defaults(run=default.run)
    subparsers = top.add_subparsers(title="jobs", metavar="JOB", prog=program)
    for job in JOBS:
        below = subparsers.add_parser(job.name, help=job.summary, description=job.summary)
        job.add_options(below)
        below.set_defaults(run=job.run)
    return top


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line and runs the job.

    Args:
        arguments: What follows ``python -m benchmarks``; the process's own if None.
    """
    options = parser().parse_args(arguments)
    options.run(options)


if __name__ == "__main__":
    main()
