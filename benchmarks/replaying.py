"""What a rule would have decided at the probe steps of a recorded run. Numbers only, no tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

from gen_optim.records import ProbeRecord
from gen_optim.rules import Decision, InitialSearch, Parabola, ProbeStatus, Rule, RuleState

__all__ = ["replay"]

_SEARCHES = (ProbeStatus.STARTED, ProbeStatus.START_FAILED)


def replay(records: Iterable[ProbeRecord], rule: Rule) -> list[Decision]:
    """Let a rule decide again, from what the probe steps of a run measured.

    The rule of the run makes the same decisions, bit for bit. Under a scheduler, looking back, they are the same but
    for the change of its factor since the last record, since no record has that of the step that was looked back at.
    Another rule gets the parabolas along the path of the run, not those along its own path.

    Args:
        records: The probe steps of a run, from the first on, in order.
        rule: The rule.

    Returns:
        One decision per record.

    Example:
        >>> from gen_optim.rules import PublishedRule
        >>> losses = (4.0, 1.0, 0.0)
        >>> record = ProbeRecord(1, (-1.0, 0.0, 1.0), losses, 2.0, 2.0, 1.0, 0.5, 0.55, 1.0, ProbeStatus.FITTED)
        >>> [decision] = replay([record], PublishedRule())
        >>> decision.state.lr
        0.55
    """
    decisions: list[Decision] = []
    state: RuleState | None = None
    lr_recorded = math.nan
    for record in records:
        if state is None:
            state = rule.initial_state(record.lr_before)
        elif record.lr_before != lr_recorded:  # a manual value
            state = rule.set_lr(state, record.lr_before)
        lr_recorded = record.lr_after
        state = replace(state, step=record.step - 1)
        loss = next((loss for at, loss in zip(record.multiples, record.losses, strict=True) if at == 0.0), math.nan)
        found: Parabola | InitialSearch
        if record.status in _SEARCHES:
            found = InitialSearch(record.optimal_lr, record.multiples[1:], record.losses[1:])
        else:
            found = Parabola(loss, record.slope, record.curvature, record.slope_noise, record.curvature_noise)
        if record.status in _SEARCHES and not rule.needs_search(state):
            decision = Decision(replace(rule.skip(state), lr=record.lr_after), record.status)
        else:
            decision = rule.decide(
                state,
                found,
                loss_start=loss,
                loss_end=record.loss_end,
                excess_loss=record.excess_loss,
                factor=record.factor,
            )
        decisions.append(decision)
        state = rule.before_step(decision.state, record.factor)
    return decisions
