"""Warnings about a training that goes wrong in silence: what a user would otherwise find out after hours."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from gen_optim.records import ProbeRecord
from gen_optim.rules import ProbeStatus, RuleState
from gen_optim.tensors.dtensor import local
from gen_optim.warning import PATIENCE, warn

Group = dict[str, Any]

_FEWEST_PAIRS, _MOST_PAIRS, _DEVIATIONS = 40, 50, 8.0
"""How many pairs of successive batches are compared, and from how many standard deviations on they are alike. Runs of
the battery had at most 6.2; sorted data, overlapping windows and batches kept in part 5 to 30."""

_HITS_PER_MISS = 9
"""One probe step in ten may be missed. If more are, those that are left need not be typical."""


class Diagnostics:
    """Counts what happens in the steps of one optimizer, and warns once it has happened too often."""

    def __init__(self) -> None:
        self.misses = 0
        self._has_warned_of_misses = False
        self._lost_steps = self._reverted_steps = 0
        self._last: ProbeRecord | None = None
        self._differences: list[float] = []
        self._gain = 0.0
        self._has_warned_of_batches = False

    def look_at(self, record: ProbeRecord, groups: Sequence[Group], *, probes: int) -> None:
        """Warn of what the record of the ``probes``-th probe step shows, together with those before it."""
        if record.status is ProbeStatus.START_FAILED and probes == PATIENCE:
            _warn_of_failed_start(record, groups)
        # A step may also be reverted because it ends at NaN, again and again.
        is_lost = record.status is ProbeStatus.NON_FINITE_LOSS or (
            record.status is ProbeStatus.REVERTED and not math.isfinite(record.loss)
        )
        self._lost_steps = self._lost_steps + 1 if is_lost else 0
        if self._lost_steps == PATIENCE:
            _warn_of_lost_steps(record, groups)
        is_reverted = record.status is ProbeStatus.REVERTED and not is_lost
        self._reverted_steps = self._reverted_steps + 1 if is_reverted else 0
        if self._reverted_steps == PATIENCE:
            _warn_of_reverted_steps(record)
        last, self._last = self._last, record
        if last is None or record.step != last.step + 1 or record.loss_end is None:
            return
        if math.isfinite(record.loss_start) and math.isfinite(last.loss) and not self._has_warned_of_batches:
            self._compare_batches(record, last.loss)

    def _compare_batches(self, record: ProbeRecord, last_loss: float) -> None:
        """Warn if what steps gain on the next batch is lost again on the one after that.

        ``record.loss_start`` and ``last_loss`` are the losses of two successive batches at the same point. If batches
        are drawn independently, their differences add up to that of the last and the first batch, whatever the steps
        gain. If successive batches are alike, each step gains more on the next batch than on others, and the
        differences add up to what is lost again.
        """
        if len(self._differences) == _MOST_PAIRS:
            return
        self._differences.append(record.loss_start - last_loss)
        self._gain += record.loss_start - record.loss
        if len(self._differences) < _FEWEST_PAIRS:
            return
        lost, deviation = sum(self._differences), statistics.pstdev(self._differences)
        if not (self._gain > 0.0 and lost > _DEVIATIONS * deviation > 0.0):
            return
        self._has_warned_of_batches = True
        warn(
            f"Up to step {record.step}, steps lowered the loss by {self._gain:.3g} in sum, each on the next batch. "
            f"But from batch to batch it has risen by {lost:.3g}. Are successive batches alike "
            "(data in order, windows that overlap, batches kept in part), or does something else move the loss (a "
            "network that trains in turn, a policy that makes the data)? Then steps look better than they are, and the "
            "learning rate may become too large. Shuffle, give step() a probe= on samples that the last steps have not "
            "seen, or set lr_max."
        )

    def hit(self) -> None:
        """Count a probe step that looks back."""
        self.misses = max(self.misses - 1, 0)

    def miss(self, state: RuleState) -> None:
        """Count a probe step that was due and could not look back, and warn if that happens often.

        After a step that was reverted, or a restart, there is none to look back at, which says nothing.
        """
        last = self._last
        if last and last.step == state.step and last.status in (ProbeStatus.REVERTED, ProbeStatus.RESTARTED):
            return
        self.misses += _HITS_PER_MISS
        if self.misses >= _HITS_PER_MISS * PATIENCE and not self._has_warned_of_misses:
            self._has_warned_of_misses = True
            warn(
                "GeNOptimizer could not look back in many of the steps in which a probe was due, up to step "
                f"{state.step + 1}, so that its learning rate of {state.lr:.3g} may be wrong: something else writes to "
                "the parameters between its steps (the loop, a forward pass, an optimizer that shares them), or some "
                "steps have neither a closure nor a probe. Write to parameters in "
                "base_optim.register_step_post_hook(...), give every step a closure or a probe, or use "
                "mode='approximate' with a probe on another batch."
            )

    def look_at_frozen_step(self, state: RuleState) -> None:
        """Warn if all learning rates were 0 in all steps so far."""
        if state.probes == 0 and state.step + 1 == PATIENCE:
            warn(
                f"GeNOptimizer has taken {PATIENCE} steps in which the learning rates of all parameter groups are 0: "
                "nothing is measured, and nothing moves. A learning rate of 0 freezes a group. Give the base optimizer "
                "any other one, or write it to param_groups[...]['lr']."
            )

    def look_at_bare_step(self, state: RuleState) -> None:
        """Warn if no step so far had a closure or a probe."""
        if state.probes == 0 and state.step + 1 == PATIENCE:
            warn(
                f"GeNOptimizer has taken {PATIENCE} steps without a closure or a probe, at the base optimizer's "
                f"learning rate of {state.lr:.3g}: nothing was measured. Call step(closure), or step(probe=...) if "
                "the loop calls backward() itself."
            )


def _warn_of_failed_start(record: ProbeRecord, groups: Sequence[Group]) -> None:
    if all(each.grad is None for each in _parameters(groups)):
        cause = (
            "The parameters have no gradients: call loss.backward() before step(probe=...), and zero_grad() after it, "
            "or return a loss that depends on the parameters."
        )
    else:
        cause = (
            "Does the closure return the same loss when it is called twice, and does it depend on the parameters? "
            "check_closure(optimizer, closure) looks for what differs."
        )
    warn(
        f"GeNOptimizer has found no learning rate that lowers the loss in {PATIENCE} steps, and takes no "
        f"step: at step {record.step} the loss is {record.loss:.3g}. {_half_precision_advice(groups) or cause}"
    )


def _warn_of_lost_steps(record: ProbeRecord, groups: Sequence[Group]) -> None:
    parameters = _parameters(groups)
    spoilt = sum(not bool(local(each.detach()).isfinite().all()) for each in parameters)
    if record.status is ProbeStatus.REVERTED:
        done = "takes such steps back, so that training stands still"
        cause = (
            "The base optimizer's state is likely not finite, since a gradient once was not: go back to a checkpoint, "
            "and leave out batches whose loss is not finite: return from the closure before backward(), or skip step()."
        )
    else:
        done = f"learns nothing from such steps, and takes them at its last learning rate of {record.lr_after:.3g}"
        cause = (
            f"{spoilt} of {len(parameters)} parameters are not finite either: go back to a checkpoint."
            if spoilt
            else "All parameters are finite: look at the data and at the loss."
        )
    warn(
        f"The loss was not finite in {PATIENCE} probe steps in a row. At step {record.step} it is {record.loss}. "
        f"GeNOptimizer {done}. {cause} {_half_precision_advice(groups)}".rstrip()
    )


def _warn_of_reverted_steps(record: ProbeRecord) -> None:
    warn(
        f"GeNOptimizer has reverted the last step in {PATIENCE} probe steps in a row: at step {record.step} it took "
        f"the loss from {record.loss_start:.3g} to {record.loss:.3g}, and the learning rate is {record.lr_after:.3g} "
        "now. It was far too high if the first batch had a much smaller loss than others. If this goes on, training "
        "stands still: is loss= the loss that probe() returns, on the same batch and scale?"
    )


def _half_precision_advice(groups: Sequence[Group]) -> str:
    if all(each.dtype != torch.float16 for each in _parameters(groups)):
        return ""
    return (
        "Parameters are in float16, in which small gradients and Adam's eps are 0: keep them in float32 and use "
        "torch.autocast with a GradScaler, or bfloat16."
    )


def _parameters(groups: Sequence[Group]) -> list[Tensor]:
    return list(chain.from_iterable(group["params"] for group in groups))
