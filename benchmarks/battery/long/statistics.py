"""The figures of long runs: final losses, steps to the loss, and the area under the log of the loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from benchmarks.battery.config import Cell, Config
from benchmarks.battery.records import Record, Results
from benchmarks.battery.scores import FLOOR


def final_loss(config: Config, is_averaged: bool, cell: Cell, results: Results) -> float | None:
    """Returns a run's final validation loss, with the floor if its loss approaches zero.

    Args:
        config: The run.
        is_averaged: Whether to take the loss at averaged weights.
        cell: The run's cell.
        results: The known results.

    Returns:
        Infinity if the run diverged, None if it is not known.
    """
    record = results.get(config)
    if record is None:
        return None
    curve = record.averaged_validation_losses if is_averaged else record.validation_losses
    is_whole = bool(record.evaluated) and record.evaluated[-1] == config.steps and not record.error
    if not is_whole or not curve[-1] <= record.initial_validation_loss:
        return math.inf
    return curve[-1] + _floor(record, cell)


def loss_at_the_end(config: Config, cell: Cell, results: Results) -> float | None:
    """Returns the validation loss of the model that a method hands over after its last step, as :func:`final_loss`."""
    record = results.get(config)
    if record is None:
        return None
    return math.inf if record.diverged or record.error else record.validation_loss + _floor(record, cell)


def log_area(config: Config, is_averaged: bool, cell: Cell, results: Results) -> float | None:
    """Returns the mean over a run's steps of the log of its validation loss.

    It says what the run would have had if it had been stopped early: the difference of two such areas is the log of
    the geometric mean of the ratio of their losses over all lengths.

    Args:
        config: The run.
        is_averaged: Whether to take the losses at averaged weights.
        cell: The run's cell.
        results: The known results.

    Returns:
        Infinity if the run diverged, None if it is not known.
    """
    final = final_loss(config, is_averaged, cell, results)
    record = results.get(config)
    if final is None or record is None or not math.isfinite(final):
        return final
    curve = record.averaged_validation_losses if is_averaged else record.validation_losses
    losses = [each + _floor(record, cell) for each in (record.initial_validation_loss, *curve)]
    return mean_log((0, *record.evaluated), losses)


def _floor(record: Record, cell: Cell) -> float:
    return FLOOR * record.initial_validation_loss if cell.workload.approaches_zero else 0.0


def mean_log(steps: Sequence[int], losses: Sequence[float]) -> float:
    """Returns the mean of the log of a loss over steps, by the trapezoidal rule.

    Args:
        steps: The steps at which the loss is known, increasing.
        losses: The positive loss then; infinite if one of them is not finite.
    """
    if not all(math.isfinite(loss) for loss in losses):
        return math.inf
    logs = [math.log(loss) for loss in losses]
    return float(np.trapezoid(logs, steps)) / (steps[-1] - steps[0])


def steps_to_loss(loss: float, curve: Sequence[tuple[float, float]]) -> float:
    """Returns the length of the tuned run that ends at a loss, over the whole length.

    Between two lengths, the log of the length is linear in the log of the loss. A longer run counts as at least as
    good as a shorter one.

    Args:
        loss: The loss at which another run of the whole length ends.
        curve: Lengths of tuned runs over the whole length, increasing, each with its final loss.

    Returns:
        1 if even the longest run ends no lower, and the shortest length if even the shortest run ends lower: that is
        an upper bound.
    """
    shortest, best = curve[0]
    if not loss < best:
        return shortest
    for (before, _), (length, reached) in pairwise(curve):
        after = min(best, reached)
        if loss >= after and after < best:
            share = math.log(best / loss) / math.log(best / after)
            return before * math.exp(share * math.log(length / before))
        best = after
    return curve[-1][0]
