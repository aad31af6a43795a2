"""What every rule has in common, rules by name, and a rule of a user's own."""

from __future__ import annotations

import copy
import io
import json
import math
import pickle
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch.optim import SGD

from benchmarks.cdat import CDATRule
from gen_optim import GeNOptimizer
from gen_optim.rules import (
    RULES,
    Decision,
    InitialSearch,
    Parabola,
    ProbeStatus,
    PublishedRule,
    RelaxedRule,
    Rule,
    RuleState,
    make_rule,
)
from gen_optim.rules.relaxed import RelaxedState
from tests.rules.cases import (
    CONVEX,
    NOT_FINITE,
    Found,
    probed_steps,
    settled,
    train_on_quadratic,
)


@dataclass(frozen=True)
class CountingState(RuleState):
    minima: int = 0
    lr_largest: float = 0.0


@dataclass(frozen=True, kw_only=True)
class PartialNewton(Rule):
    """A rule of a user's own: a fraction of the way to each minimum, with a search for the initial learning rate."""

    fraction: float = 0.5

    state_type: ClassVar[type[RuleState]] = CountingState

    def needs_search(self, state: CountingState) -> bool:
        return state.lr_largest == 0.0

    def decide(
        self,
        state: CountingState,
        found: Parabola | InitialSearch,
        *,
        loss_start: float,
        loss_end: float | None = None,
        excess_loss: float | None = None,
        factor: float = 1.0,
    ) -> Decision:
        if not math.isfinite(loss_start):
            return Decision(self.skip(state), ProbeStatus.NON_FINITE_LOSS)
        if isinstance(found, InitialSearch):
            if found.lr is None:
                return Decision(self.after_probe(state, state.lr), ProbeStatus.START_FAILED)
            lr = self.fraction * found.lr
            return Decision(self.after_probe(replace(state, lr_largest=lr), lr), ProbeStatus.STARTED)
        if found.optimal_lr is None or found.slope <= 0:
            return Decision(self.after_probe(state, state.lr), ProbeStatus.NO_MINIMUM)
        lr = state.lr + self.fraction * (found.optimal_lr - state.lr)
        state = replace(state, minima=state.minima + 1, lr_largest=max(state.lr_largest, lr))
        return Decision(self.after_probe(state, lr, steps_to_next=1 if state.minima < 3 else None), ProbeStatus.FITTED)


OPTIONS = {"period": 3, "smoothing": 0.5}
RULES_TO_TEST = [RelaxedRule(burn_in=5, **OPTIONS), PublishedRule(**OPTIONS), CDATRule(**OPTIONS), PartialNewton()]
rules = pytest.mark.parametrize("rule", RULES_TO_TEST, ids=lambda rule: type(rule).__name__)


# --- options ---------------------------------------------------------------------------------------------------------

MISTAKES = [
    ("period", 0),
    ("period", -1),
    ("period", 1.5),
    ("period", True),
    ("period", "8"),
    ("lr_min", -1e-9),
    ("lr_min", math.inf),
    ("lr_min", math.nan),
    ("lr_min", "0"),
    ("lr_max", 0.0),
    ("lr_max", -1.0),
    ("lr_max", math.nan),
    ("lr_max", None),
]
SMOOTHING_MISTAKES = [
    ("smoothing", -0.1),
    ("smoothing", 1.0),
    ("smoothing", math.nan),
    ("smoothing", "0.9"),
]
MAX_CHANGE_MISTAKES = [
    ("max_change", 1.0),
    ("max_change", 0.5),
    ("max_change", math.inf),
    ("max_change", math.nan),
    ("max_change", None),
]
RELAXED_MISTAKES = [
    ("start_fraction", 0.0),
    ("start_fraction", 1.01),
    ("start_fraction", math.nan),
    ("start_fraction", None),
    ("burn_in", -1),
    ("burn_in", 0.5),
    ("burn_in", None),
    ("annealing", -0.1),
    ("annealing", 1.1),
    ("annealing", math.nan),
    ("annealing", None),
    ("relaxation", 0.99),
    ("relaxation", 2.01),
    ("relaxation", math.nan),
    ("relaxation", None),
]


@rules
@pytest.mark.parametrize(("option", "value"), MISTAKES)
def test_mistaken_option_is_named_with_what_came(rule: Rule, option: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"{option} must be .*got {value!r}"):
        replace(rule, **{option: value})


@pytest.mark.parametrize("rule", list(RULES))
@pytest.mark.parametrize(("option", "value"), [*MISTAKES, *SMOOTHING_MISTAKES, *MAX_CHANGE_MISTAKES])
def test_mistaken_option_of_a_rule_by_name_is_named(rule: str, option: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"{option} must be .*got {value!r}"):
        make_rule(rule, **{option: value})


@pytest.mark.parametrize(("option", "value"), RELAXED_MISTAKES)
def test_mistaken_option_of_the_relaxed_rule_is_named(option: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"{option} must be .*got {value!r}"):
        make_rule("relaxed", **{option: value})


@pytest.mark.parametrize(
    "options",
    [
        {"period": 1},
        {"smoothing": 0.0},
        {"smoothing": 0},
        {"lr_min": 0.1, "lr_max": 0.1},
        {"burn_in": 0},
        {"start_fraction": 1.0},
        {"relaxation": 2.0},
        {"annealing": 0.0},
        {"annealing": 1.0},
        {"relaxation": 1.0},
    ],
)
def test_options_at_the_edge_of_their_range_are_taken(options: dict[str, float]) -> None:
    taken = asdict(make_rule("relaxed", **options))
    assert options.items() <= taken.items()


@rules
def test_limits_that_cross_are_refused_with_both_values(rule: Rule) -> None:
    with pytest.raises(ValueError, match=r"lr_max must be at least lr_min \(0\.1\), got 0\.05"):
        replace(rule, lr_min=0.1, lr_max=0.05)


def test_numbers_of_numpy_become_plain_ones() -> None:
    rule = RelaxedRule(
        period=np.int64(3), smoothing=np.float32(0.5), lr_max=np.float64(2.0), burn_in=np.int32(1), relaxation=1
    )
    assert rule == RelaxedRule(period=3, smoothing=0.5, lr_max=2.0, burn_in=1, relaxation=1)
    assert all(type(value) in (int, float) for value in asdict(rule).values())


@rules
def test_options_are_keyword_only_and_frozen(rule: Rule) -> None:
    with pytest.raises(TypeError, match="positional"):
        type(rule)(8)  # type: ignore[misc]
    with pytest.raises(AttributeError, match="period"):
        rule.period = 4  # type: ignore[misc]


# --- rules by name ---------------------------------------------------------------------------------------------------


def test_rules_by_name_take_their_own_options() -> None:
    assert make_rule("published", period=3) == PublishedRule(period=3)
    assert make_rule("relaxed", period=3, burn_in=5) == RelaxedRule(period=3, burn_in=5)
    with pytest.raises(TypeError, match="burn_in"):
        make_rule("published", burn_in=5)


@pytest.mark.parametrize("name", ["newton", "cdat"])
def test_unknown_rule_is_refused_with_those_there_are(name: str) -> None:
    with pytest.raises(ValueError, match="rule must be one of 'relaxed', 'published', or a Rule, got"):
        make_rule(name)


@pytest.mark.parametrize("rule", [None, [], RelaxedRule])
def test_what_is_no_rule_is_refused(rule: Any) -> None:
    with pytest.raises(TypeError, match="rule must be a name or a Rule"):
        make_rule(rule)


def test_options_beside_a_rule_are_refused() -> None:
    rule = RelaxedRule(period=3)
    assert make_rule(rule) is rule
    with pytest.raises(ValueError, match=r"lr_max must be given to the rule .*RelaxedRule\(lr_max=1.0\)"):
        make_rule(rule, lr_max=1.0)


def test_no_rule_inherits_from_another() -> None:
    assert all(rule.__mro__[1] is Rule for rule in (*RULES.values(), CDATRule))


def test_a_rule_that_decides_nothing_is_refused() -> None:
    class Undecided(Rule):
        pass

    with pytest.raises(TypeError, match="decide"):
        Undecided()  # type: ignore[abstract]


# --- what every rule does alike --------------------------------------------------------------------------------------


def somewhere(rule: Rule) -> RuleState:
    """A state of the rule after a few decisions."""
    state = rule.initial_state(1.0)
    if rule.needs_search(state):
        state = rule.decide(state, InitialSearch(0.5, (0.5,), (0.1,)), loss_start=2.0).state
    for loss in (1.5, 1.2, 1.1):
        state = rule.decide(state, CONVEX, loss_start=loss, loss_end=loss - 0.1).state
    return state


@rules
@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("found", [CONVEX, NOT_FINITE, InitialSearch(0.5, (0.5,), (0.1,)), InitialSearch(None, (), ())])
def test_non_finite_loss_changes_nothing_but_the_step_counter(rule: Rule, loss: float, found: Found) -> None:
    state = replace(somewhere(rule), next_probe=1)
    decision = rule.decide(state, found, loss_start=loss)
    assert decision.status is ProbeStatus.NON_FINITE_LOSS
    assert decision.state == replace(state, step=state.step + 1)
    assert rule.is_probe_due(decision.state)


@rules
def test_skipping_changes_nothing_but_the_step_counter(rule: Rule) -> None:
    state = somewhere(rule)
    assert rule.skip(state) == replace(state, step=state.step + 1)


@rules
def test_initial_state_is_of_the_rule_and_due_for_a_probe(rule: Rule) -> None:
    state = rule.initial_state(0.25)
    assert state == rule.state_type(lr=0.25)
    assert rule.is_probe_due(state)


@rules
def test_a_manual_value_is_taken_and_the_schedule_of_probes_kept(rule: Rule) -> None:
    state = somewhere(rule)
    after = rule.set_lr(state, 0.125)
    assert type(after) is rule.state_type
    assert (after.lr, after.step, after.probes, after.next_probe) == (0.125, state.step, state.probes, state.next_probe)


def test_a_manual_value_clears_averages_and_keeps_the_start_of_the_relaxed_rule() -> None:
    rule = RelaxedRule()
    state = RelaxedState.from_numbers(dict.fromkeys(settled(rule).to_numbers(), 3))
    names = ("step", "probes", "next_probe", "started", "loss_initial", "descent_initial")
    kept = {name: getattr(state, name) for name in names}
    assert rule.set_lr(state, 0.125) == RelaxedState(lr=0.125, lr_initial=0.125, factor_last=3, **kept)


def test_after_a_probe_the_counts_advance_and_the_learning_rate_is_within_its_limits() -> None:
    rule = PublishedRule(period=4, lr_min=0.1, lr_max=10.0)
    state = RuleState(lr=1.0, step=7, probes=2, next_probe=8)
    assert rule.after_probe(state, 2.0, steps_to_next=1) == RuleState(lr=2.0, step=8, probes=3, next_probe=9)
    assert [rule.after_probe(state, lr).lr for lr in (-1.0, 0.0, 1e9)] == [0.1, 0.1, 10.0]
    unlimited = PublishedRule()
    assert [unlimited.after_probe(state, lr).lr for lr in (0.0, math.inf)] == [1e-36, 1e36]


@pytest.mark.parametrize("period", [1, 2, 3, 8, 16])
def test_probes_come_once_in_a_period_on_average_by_nearly_the_same_number_of_steps(period: int) -> None:
    gaps = np.diff(probed_steps(PublishedRule(period=period), 4000))
    assert gaps.mean() == pytest.approx(period, rel=0.03)
    spread = min(period - 1, max(1, period // 4))
    assert set(gaps.tolist()) == set(range(period - spread, period + spread + 1))


@pytest.mark.parametrize("rhythm", range(2, 17))
def test_probes_fall_on_every_phase_of_a_loop_that_takes_things_in_turn(rhythm: int) -> None:
    probed = np.array(probed_steps(PublishedRule(period=8), 8000))
    counts = np.bincount(probed % rhythm, minlength=rhythm)
    assert counts.min() > 0.5 * len(probed) / rhythm


@rules
def test_replaying_what_was_seen_gives_the_same_learning_rates(rule: Rule) -> None:
    seen, learning_rates = train_on_quadratic(rule)
    assert None in seen

    numbers = rule.initial_state(1e-3).to_numbers()
    replayed = []
    for each in seen:
        state = rule.state_type.from_numbers(json.loads(json.dumps(numbers)))
        assert rule.is_probe_due(state) == (each is not None)
        state = rule.skip(state) if each is None else rule.decide(state, each[1], loss_start=each[0]).state
        numbers = state.to_numbers()
        replayed.append(state.lr)
    assert replayed == learning_rates


@rules
def test_rules_are_copied_and_pickled(rule: Rule) -> None:
    assert pickle.loads(pickle.dumps(rule)) == copy.deepcopy(rule) == rule


# --- a rule of a user's own ------------------------------------------------------------------------------------------


def train(optimizer: GeNOptimizer, weight: torch.nn.Parameter, steps: int) -> list[float]:
    target, scale = torch.tensor([1.0, -2.0]), torch.tensor([1.0, 0.3])

    def loss() -> torch.Tensor:
        return scale @ (weight - target).square()

    return [optimizer.step(loss).item() for _ in range(steps)]  # type: ignore[union-attr]


@pytest.mark.parametrize("mode", ["lookback", "approximate", "exact"])
def test_a_rule_of_a_users_own_trains(mode: str) -> None:
    rule = PartialNewton(period=4)
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = GeNOptimizer(SGD([weight], lr=1e-4), rule=rule, mode=mode)
    assert optimizer.rule is rule
    statuses = []
    optimizer.register_probe_hook(lambda _, record: statuses.append(record.status))
    losses = train(optimizer, weight, 20)
    assert losses[-1] < 1e-3 * losses[0]
    assert statuses[:2] == [ProbeStatus.STARTED, ProbeStatus.FITTED]
    assert 5 < len(statuses) < 12
    assert 0.5 < optimizer.get_last_lr()[0] < 0.5 / 0.3  # between the inverses of the curvatures


def test_a_rule_of_a_users_own_is_resumed_from_a_checkpoint() -> None:
    runs = []
    for interrupted in (False, True):
        weight = torch.nn.Parameter(torch.zeros(2))
        optimizer = GeNOptimizer(SGD([weight], lr=1e-4), rule=PartialNewton(fraction=0.1, period=4))
        losses = train(optimizer, weight, 7)
        if interrupted:
            buffer = io.BytesIO()
            torch.save((optimizer.state_dict(), weight.detach()), buffer)
            buffer.seek(0)
            state_dict, value = torch.load(buffer)
            weight = torch.nn.Parameter(value)
            optimizer = GeNOptimizer(SGD([weight], lr=1e-4), rule=PartialNewton(fraction=0.1, period=4))
            optimizer.load_state_dict(state_dict)
        runs.append(losses + train(optimizer, weight, 10))
    assert runs[0] == runs[1]


def test_all_that_a_rule_of_a_users_own_remembers_is_in_the_checkpoint_from_the_beginning() -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = GeNOptimizer(SGD([weight], lr=1e-4), rule=PartialNewton())
    [group] = optimizer.state_dict()["param_groups"]
    assert {f"gen_{field.name}" for field in fields(CountingState)} <= group.keys()
