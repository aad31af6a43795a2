"""Rules: from a measured parabola to the next learning rate, in plain numbers.

A rule is named by ``GeNOptimizer(rule="relaxed")`` or passed as an object, ``rule=RelaxedRule(smoothing=0.95)``. A rule
of one's own subclasses :class:`Rule`.
"""

from __future__ import annotations

from typing import Any

from gen_optim.rules.base import Rule
from gen_optim.rules.initial_search import InitialSearch, search_initial_lr
from gen_optim.rules.parabola import Parabola, fit_parabola
from gen_optim.rules.published import PublishedRule
from gen_optim.rules.relaxed import RelaxedRule
from gen_optim.rules.state import Decision, ProbeStatus, RuleState

__all__ = [
    "RULES",
    "Decision",
    "InitialSearch",
    "Parabola",
    "ProbeStatus",
    "PublishedRule",
    "RelaxedRule",
    "Rule",
    "RuleState",
    "fit_parabola",
    "make_rule",
    "search_initial_lr",
]

RULES: dict[str, type[Rule]] = {"relaxed": RelaxedRule, "published": PublishedRule}
"""The rules by the name that ``GeNOptimizer(rule=...)`` takes."""


def make_rule(rule: str | Rule, **options: Any) -> Rule:
    """Return the rule of a name, or the rule itself.

    Args:
        rule: A name in :data:`RULES`, or a rule.
        **options: Options of the rule, if it is given by name.

    Raises:
        TypeError: If ``rule`` is neither a name nor a rule, or the rule has no such option.
        ValueError: If there is no rule of that name, an option is out of range, or options come with a rule that has
            its own.

    Example:
        >>> make_rule("published", period=4)
        PublishedRule(period=4, lr_min=0.0, lr_max=inf, smoothing=0.9, max_change=2.0)
    """
    if isinstance(rule, Rule):
        if options:
            [(name, value), *_] = options.items()
            raise ValueError(
                f"{name} must be given to the rule if that is an object: rule={type(rule).__name__}({name}={value!r}), "
                f"got {name}={value!r} next to {rule!r}"
            )
        return rule
    if not isinstance(rule, str):
        raise TypeError(f"rule must be a name or a Rule, such as RelaxedRule(burn_in=20), got {rule!r}")
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(map(repr, RULES))}, or a Rule, got {rule!r}")
    return RULES[rule](**options)
