"""Curvature dynamics aware tuning, a rule of others on the parabolas of this library, to compare with."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from gen_optim.rules import Decision, InitialSearch, Parabola, ProbeStatus, Rule, RuleState

__all__ = ["CDATRule", "CDATState"]


@dataclass(frozen=True)
class CDATState(RuleState):
    """What :class:`CDATRule` remembers.

    Attributes:
        slope_mean: Moving average of slopes.
        curvature_mean: Moving average of absolute curvatures.
        parabola_count: Number of parabolas in these averages.
    """

    slope_mean: float = 0.0
    curvature_mean: float = 0.0
    parabola_count: int = 0


@dataclass(frozen=True, kw_only=True)
class CDATRule(Rule):
    """Curvature dynamics aware tuning (Roulet et al., "Stepping on the edge", arXiv:2407.06183).

    α = ``edge`` · max(mean slope, 0) / mean |curvature|, from the first step on.

    Args:
        period: Number of steps from one probe step to the next.
        lr_min: Lower limit of the learning rate.
        lr_max: Upper limit of the learning rate.
        smoothing: Weight of earlier values in both moving averages, in [0, 1).
        edge: 1 is greedy; 2 is on the edge of stability, as its authors recommend.

    Raises:
        ValueError: If an option is out of range.

    Example:
        >>> rule = CDATRule(period=1)
        >>> parabola = Parabola(value=1.0, slope=3.0, curvature=2.0)
        >>> rule.decide(rule.initial_state(lr=1e-3), parabola, loss_start=1.0).state.lr
        3.0
    """

    smoothing: float = 0.9
    edge: float = 2.0

    state_type: ClassVar[type[RuleState]] = CDATState

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: If an option is out of range.
        """
        super().__post_init__()
        self.check_option("smoothing", "in [0, 1)", lambda value: 0 <= value < 1)
        self.check_option("edge", "above 0", lambda value: value > 0)

    def decide(
        self,
        state: CDATState,
        found: Parabola | InitialSearch,
        *,
        loss_start: float,
        loss_end: float | None = None,
        excess_loss: float | None = None,
        factor: float = 1.0,
    ) -> Decision:
        """Choose the learning rate after a probe step; see :meth:`gen_optim.rules.Rule.decide`.

        Raises:
            TypeError: If ``found`` is the outcome of a search, which this rule never asks for.
        """
        if not math.isfinite(loss_start):
            return Decision(self.skip(state), ProbeStatus.NON_FINITE_LOSS)
        if isinstance(found, InitialSearch):
            raise TypeError("found must be a Parabola, got an InitialSearch: CDATRule never asks for a search")
        if not found.is_finite:
            return Decision(self.after_probe(state, state.lr), ProbeStatus.NON_FINITE_PROBE)
        weight = max(1.0 - self.smoothing, 1.0 / (state.parabola_count + 1))
        state = replace(
            state,
            slope_mean=state.slope_mean + weight * (found.slope - state.slope_mean),
            curvature_mean=state.curvature_mean + weight * (abs(found.curvature) - state.curvature_mean),
            parabola_count=state.parabola_count + 1,
        )
        if not state.curvature_mean:
            return Decision(self.after_probe(state, state.lr), ProbeStatus.NO_MINIMUM)
        lr = self.edge * max(state.slope_mean, 0.0) / state.curvature_mean
        return Decision(self.after_probe(state, lr), ProbeStatus.FITTED)
