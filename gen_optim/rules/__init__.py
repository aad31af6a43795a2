"""The rules that ``GeNOptimizer(rule=...)`` knows by name. Numbers only, no tensors."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from gen_optim.rules.base import ControlState, Decision, ProbeStatus, PublishedRule, check_option
from gen_optim.rules.parabola import Parabola
from gen_optim.rules.relaxed import RelaxedRule

__all__ = ["RULES", "CDATRule", "make_rule"]


@dataclass(frozen=True, kw_only=True)
class CDATRule(PublishedRule):
    """Curvature dynamics aware tuning (Roulet et al., "Stepping on the edge", arXiv:2407.06183), to compare with.

    α = ``edge`` · max(mean slope, 0) / mean |curvature|, both averaged with ``smoothing``, from the first step on.

    Attributes:
        edge: 1 is greedy, 2 on the edge of stability, as its authors recommend.
    """

    edge: float = 2.0

    def __post_init__(self) -> None:
        """Check every option.

        Raises:
            ValueError: Names the option, what was expected and what came.
        """
        super().__post_init__()
        check_option("edge", self.edge, "above 0", self.edge > 0)

    def judge(
        self, state: ControlState, loss: float, parabola: Parabola, *, factor: float, arrival: float | None
    ) -> Decision:
        """What a parabola at a finite loss calls for."""
        if not parabola.is_finite:
            return Decision(
                self._probed(state, state.lr, loss, ProbeStatus.NON_FINITE_PROBE), ProbeStatus.NON_FINITE_PROBE
            )
        weight = max(1.0 - self.smoothing, 1.0 / (state.parabola_count + 1))
        state = replace(
            state,
            slope_mean=state.slope_mean + weight * (parabola.slope - state.slope_mean),
            curvature_mean=state.curvature_mean + weight * (abs(parabola.curvature) - state.curvature_mean),
            parabola_count=state.parabola_count + 1,
        )
        if not state.curvature_mean:
            return Decision(self._probed(state, state.lr, loss, ProbeStatus.NO_MINIMUM), ProbeStatus.NO_MINIMUM)
        lr = self.edge * max(state.slope_mean, 0.0) / state.curvature_mean
        return Decision(self._probed(state, lr, loss, ProbeStatus.FITTED), ProbeStatus.FITTED)


RULES: dict[str, type[PublishedRule]] = {"relaxed": RelaxedRule, "published": PublishedRule, "cdat": CDATRule}
"""Rules by the name that ``GeNOptimizer(rule=...)`` takes."""


def make_rule(name: str, **options: Any) -> PublishedRule:
    """The rule of a name, with those of the options that it has.

    Raises:
        ValueError: If there is no such rule, or an option is out of range.
    """
    if name not in list(RULES):
        raise ValueError(f"rule must be one of {', '.join(map(repr, RULES))}, got {name!r}")
    for rule in RULES.values():  # what another one uses has to be in range all the same
        rule(**_known(rule, options))
    return RULES[name](**_known(RULES[name], options))


def _known(rule: type[PublishedRule], options: dict[str, Any]) -> dict[str, Any]:
    names = {field.name for field in fields(rule)}
    return {name: value for name, value in options.items() if name in names}
