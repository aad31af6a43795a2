"""A rule decides from numbers alone, so that its decisions can be repeated from records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.cdat import CDATRule
from benchmarks.replaying import replay
from gen_optim import GeNOptimizer, History
from gen_optim.rules import ProbeStatus, PublishedRule, RelaxedRule, Rule
from tests.training import Training, mlp


def recorded(steps: int = 120, *, schedule: bool = False, **options: Any) -> History:
    torch.manual_seed(0)
    training = Training.of(
        lambda parameters: GeNOptimizer(torch.optim.SGD(parameters, lr=1e-5, momentum=0.9), **options), mlp(dropout=0.1)
    )
    history = History()
    training.optimizer.register_probe_hook(history)
    scheduler = torch.optim.lr_scheduler.LinearLR(training.optimizer, 1.0, 0.0, steps) if schedule else None
    training.train(steps, scheduler)
    return history


@pytest.mark.parametrize(
    "rule",
    [RelaxedRule(period=3, burn_in=20), PublishedRule(period=3), CDATRule(period=3)],
    ids=lambda rule: type(rule).__name__,
)
@pytest.mark.parametrize("mode", ["lookback", "approximate", "exact"])
@pytest.mark.parametrize("schedule", [False, True])
@pytest.mark.filterwarnings("ignore:The loss was not finite")  # CDAT diverges here
def test_the_rule_of_a_run_decides_again_as_it_did(rule: Rule, mode: str, schedule: bool) -> None:
    history = recorded(rule=rule, mode=mode, schedule=schedule)
    decisions = replay(history, rule)
    assert len(history) > 30
    expected = [each.lr_after for each in history]
    if schedule and mode == "lookback":  # the factor of the step that is looked back at is in no record
        expected = pytest.approx(expected, rel=1e-3)
    assert [each.state.lr for each in decisions] == expected
    assert [each.status for each in decisions] == [each.status for each in history]


def test_another_constant_chooses_otherwise() -> None:
    history = recorded()
    replayed = [each.state.lr for each in replay(history, RelaxedRule(balance=100.0))]
    assert replayed[0] == history[0].lr_after  # the start does not ask for it
    assert replayed[-1] > history[-1].lr_after


def test_a_rule_without_a_start_begins_where_the_run_began() -> None:
    history = recorded()
    first, second, *_ = replay(history, PublishedRule())
    assert first.status is ProbeStatus.STARTED
    assert second.state.lr == pytest.approx(history[0].lr_after, rel=0.2)


def test_records_survive_a_file(tmp_path: Path) -> None:
    history = recorded(40)
    history.save(tmp_path / "records.jsonl")
    assert repr(History.load(tmp_path / "records.jsonl").records) == repr(history.records)  # NaN is not equal to itself


def test_the_command_prints_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    history = recorded(40)
    history.save(tmp_path / "records.jsonl")
    main(["replay", str(tmp_path / "records.jsonl"), "--set", "relaxation=1.2"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(history)
    assert f"{history[-1].lr_after:.4g}" in lines[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.jsonl"], "nowhere.jsonl"),
        (["{record}", "--set", "relaxation=3"], "relaxation must be in"),
        (["{record}", "--set", "kappa=1.5"], "'kappa' is none"),
        (["{record}", "--every", "0"], "--every must be at least 1"),
    ],
)
def test_the_command_says_what_is_wrong(tmp_path: Path, arguments: list[str], message: str) -> None:
    recorded(5).save(tmp_path / "records.jsonl")
    with pytest.raises(SystemExit, match=message):
        main(["replay", *(each.format(record=tmp_path / "records.jsonl") for each in arguments)])
