"""The rule as its authors published it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gen_optim.rules.base import Rule
from gen_optim.rules.initial_search import InitialSearch
from gen_optim.rules.parabola import Parabola
from gen_optim.rules.state import Decision, ProbeStatus, RuleState


@dataclass(frozen=True, kw_only=True)
class PublishedRule(Rule):
    """Moves the learning rate towards the minimum of each parabola (Bu and Xu, arXiv:2407.02772, and their code).

    A probe step with positive slope and curvature averages the learning rate with the optimal one, which counts as at
    most ``max_change`` times and at least ``1 / max_change`` times the present learning rate:

        α ← smoothing · α + (1 − smoothing) · clip(slope / curvature, α / max_change, α · max_change).

    Any other parabola keeps the learning rate. The first step is a probe step at the base optimizer's learning rate.

    Args:
        period: Mean number of steps from one probe step to the next.
        lr_min: Lower limit of the learning rate.
        lr_max: Upper limit of the learning rate.
        smoothing: Weight of the present learning rate in the average, in [0, 1).
        max_change: Factor by which an optimal learning rate may differ from the present one, above 1.

    Raises:
        ValueError: If an option is out of range.

    Example:
        >>> rule = PublishedRule(smoothing=0.5)
        >>> parabola = Parabola(value=1.0, slope=3.0, curvature=2.0)
        >>> rule.decide(rule.initial_state(lr=1.0), parabola, loss_start=1.0).state.lr
        1.25
    """

    smoothing: float = 0.9
    max_change: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_option("smoothing", "in [0, 1)", lambda value: 0 <= value < 1)
        self.check_option("max_change", "a finite number above 1", lambda value: 1 < value < math.inf)

    def decide(
        self,
        state: RuleState,
        found: Parabola | InitialSearch,
        *,
        loss_start: float,
        loss_end: float | None = None,
        excess_loss: float | None = None,
        factor: float = 1.0,
    ) -> Decision:
        """Choose the learning rate after a probe step; see :meth:`Rule.decide`."""
        if not math.isfinite(loss_start):
            return Decision(self.skip(state), ProbeStatus.NON_FINITE_LOSS)
        assert isinstance(found, Parabola), "this rule asks for no search"
        lr, status = state.lr, ProbeStatus.FITTED
        if not found.is_finite:
            status = ProbeStatus.NON_FINITE_PROBE
        elif found.optimal_lr is None or found.slope <= 0:
            status = ProbeStatus.NO_MINIMUM
        else:
            target = min(max(found.optimal_lr, lr / self.max_change), lr * self.max_change)
            lr = self.smoothing * lr + (1.0 - self.smoothing) * target
        return Decision(self.after_probe(state, lr), status)
