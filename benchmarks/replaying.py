"""What a rule would have made of recorded probe steps. Numbers only, no tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

from gen_optim.records import ProbeRecord
from gen_optim.rules.base import ControlState, Decision, ProbeStatus, PublishedRule
from gen_optim.rules.initial_search import StartSearch
from gen_optim.rules.parabola import Parabola

__all__ = ["replay"]

_STARTS = (ProbeStatus.STARTED, ProbeStatus.START_FAILED)


def replay(records: Iterable[ProbeRecord], rule: PublishedRule) -> list[Decision]:
    """Let a rule decide again, from what the probe steps of a run have measured.

    The rule that the run was made with decides as it did then, bit for bit. Another one is told of the parabolas along
    the way that the run has taken, not of those along its own.

    Args:
        records: The probe steps of a run, from the first on, in order.
        rule: The rule, as :func:`gen_optim.rules.make_rule` makes it.

    Returns:
        Its decisions, one a record.

    Example:
        >>> from gen_optim.rules import make_rule
        >>> losses = (4.0, 1.0, 0.0)
        >>> record = ProbeRecord(1, (-1.0, 0.0, 1.0), losses, 2.0, 2.0, 1.0, 0.5, 0.55, 1.0, ProbeStatus.FITTED)
        >>> [decision] = replay([record], make_rule("published"))
        >>> decision.state.lr
        0.55
    """
    decisions: list[Decision] = []
    state: ControlState | None = None
    lr_recorded = math.nan
    for record in records:
        if state is None:
            state = ControlState(lr=record.lr_before)
        elif record.lr_before != lr_recorded:  # a hand has written it
            state = rule.restart_averages(state, record.lr_before)
        lr_recorded = record.lr_after
        state = replace(state, step=record.step - 1)
        loss = next((loss for at, loss in zip(record.multiples, record.losses, strict=True) if at == 0.0), math.nan)
        found: Parabola | StartSearch
        if record.status in _STARTS:
            found = StartSearch(record.optimal_lr, record.multiples[1:], record.losses[1:])
        else:
            found = Parabola(loss, record.slope, record.curvature, record.slope_noise, record.curvature_noise)
        if record.status in _STARTS and not rule.needs_start(state):
            decision = Decision(replace(rule.skip(state), lr=record.lr_after), record.status)
        else:
            decision = rule.decide(state, loss, found, factor=record.factor, arrival=record.arrival)
        decisions.append(decision)
        state = decision.state
    return decisions
