"""The table of results, which reads well in a terminal and in Markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from benchmarks.main_job.runs import Result, Spec
from benchmarks.markdown import markdown_table

_HEADINGS = (
    "optimizer",
    "initial learning rate",
    "final training loss",
    "validation accuracy",
    "learning rate found",
    "median in force",
    "seconds",
    "extra forward passes",
)

_LEGEND = (
    "Training loss: over the whole training set. Learning rate found: the last one in force, schedule divided out.\n"
    "Median in force: of the learning rates of all steps, the schedule included. Seconds: of the steps alone.\n"
    "Extra forward passes: those that only served to choose a learning rate."
)


def table(results: Sequence[Result]) -> str:
    """Returns a Markdown table, padded so that its columns line up as plain text.

    Args:
        results: The rows, in order.
    """
    return markdown_table(_HEADINGS, [_cells(result) for result in results])


def legend(spec: Spec) -> str:
    """Returns what the columns mean, and what the schedule of all runs is.

    Args:
        spec: One of the runs.
    """
    if spec.schedule == "linear":
        schedule = f"In all runs the learning rate falls linearly to 0 over {spec.steps} steps."
    else:
        schedule = f"No run of {spec.steps} steps has a schedule."
    return f"{schedule}\n{_LEGEND}"


def best_bare(results: Sequence[Result]) -> Result:
    """Returns the bare run with the lowest final training loss.

    Args:
        results: Runs of which at least one is bare.
    """
    bare = [result for result in results if not result.spec.gen]
    return min(bare, key=lambda run: math.inf if run.diverged else run.training_losses[-1])


def sentence(results: Sequence[Result]) -> str:
    """Returns in words where each optimizer ends, bare over the sweep and wrapped.

    Args:
        results: Bare and wrapped runs, each optimizer from several learning rates.
    """
    said = []
    for base in dict.fromkeys(result.spec.base for result in results):
        runs = [result for result in results if result.spec.base == base]
        best = best_bare(runs)
        wrapped = {run.spec.learning_rate: run.training_losses[-1] for run in runs if run.spec.gen}
        lowest, highest = min(wrapped.values()), max(wrapped.values())
        ends = _loss(lowest) if lowest == highest else f"{_loss(lowest)} to {_loss(highest)}"
        given = " or ".join(f"{rate:g}" for rate in wrapped)
        said.append(
            f"{base} at the best learning rate of the sweep, {best.spec.learning_rate:g}, ends at a training loss of "
            f"{_loss(best.training_losses[-1])}; wrapped, from {given}, at {ends}"
        )
    return ". ".join(said) + "."


def _cells(result: Result) -> tuple[str, ...]:
    found = result.learning_rate_found
    return (
        result.spec.name,
        f"{result.spec.learning_rate:g}",
        _loss(result.training_losses[-1]),
        f"{100 * result.validation_accuracy:.1f} %",
        "-" if found is None else f"{found:.2g}",
        f"{statistics.median(result.learning_rates):.2g}",
        f"{result.seconds:.2f}",
        str(result.extra_forwards),
    )


def _loss(loss: float) -> str:
    if not math.isfinite(loss):
        return f"diverged ({loss})"
    return f"{loss:.4f}" if loss < 1000 else f"{loss:.2e}"
