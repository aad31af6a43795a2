"""The table of results, which reads well in a terminal and in Markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from benchmarks.main_job.runs import Result
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

LEGEND = (
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


def sentence(results: Sequence[Result]) -> str:
    """Returns in words what the initial learning rate has decided, bare and wrapped.

    Args:
        results: Bare and wrapped runs, each optimizer from several learning rates.
    """
    rates = [result.spec.learning_rate for result in results]
    ranges = {}
    for gen in (False, True):
        losses = [result.training_losses[-1] for result in results if result.spec.gen is gen]
        ranges[gen] = f"{_loss(min(losses))} to {_loss(max(losses))}"
    wrapped: dict[str, set[float]] = {}
    for result in results:
        if result.spec.gen:
            wrapped.setdefault(result.spec.name, set()).add(result.training_losses[-1])
    same = all(len(losses) == 1 for losses in wrapped.values())
    return (
        f"From initial learning rates of {min(rates):g} to {max(rates):g}, bare runs end at training losses of "
        f"{ranges[False]}, wrapped ones at {ranges[True]}: "
        f"{'each wrapped optimizer at the same one' if same else 'not the same one'} from all of them."
    )


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
