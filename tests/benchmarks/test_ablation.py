"""The battery without one mechanism of the rule at a time."""

from __future__ import annotations

import math
from pkgutil import resolve_name

import pytest

from benchmarks.battery import ablation, scores
from benchmarks.battery.config import Config, cells
from benchmarks.battery.methods import OURS
from benchmarks.battery.records import Results
from benchmarks.battery.runs import run
from gen_optim.rules import make_rule
from tests.benchmarks.battery_results import CHEAP, DATA, record

CELLS = cells(CHEAP, DATA, steps=60)


@pytest.mark.parametrize("name", ablation.MECHANISMS)
def test_a_mechanism_changes_something_of_the_rule_and_all_is_as_before_afterwards(name: str) -> None:
    mechanism = ablation.MECHANISMS[name]
    assert make_rule("relaxed", **mechanism.options) != make_rule("relaxed") or mechanism.constants
    modules = {place: resolve_name(f"gen_optim.{place[0]}") for place in mechanism.constants}
    before = {place: getattr(module, place[1]) for place, module in modules.items()}
    with ablation.without(name):
        for place, value in mechanism.constants.items():
            assert getattr(modules[place], place[1]) == value != before[place]
    assert {place: getattr(module, place[1]) for place, module in modules.items()} == before


def test_a_run_without_a_mechanism_is_another_run() -> None:
    by_key = {config.options.get("without"): config for config in ablation.plan(CELLS[:1], (0,))}
    assert list(by_key) == list(ablation.MECHANISMS)
    default = CELLS[0].config("gen", "constant", 1e-5, 0, {"rule_version": OURS["gen"]})
    usual, slower, again = (run(each, DATA) for each in (default, by_key["growth in the burn-in"], default))
    assert usual.learning_rates == again.learning_rates != slower.learning_rates
    assert len(usual.averaged_validation_losses) == 1
    assert not any(each.error for each in (usual, slower))


def test_the_report_compares_each_seed_with_the_same_one() -> None:
    def loss(config: Config) -> float:
        return (1.0 + config.seed) * (3.0 if config.options.get("without") == "annealing" else 1.0)

    def averaged(config: Config) -> dict[str, object]:
        return {"averaged_validation_losses": (0.5 * loss(config),), "evaluated": (60,)}

    results = Results()
    planned = ablation.plan(CELLS)
    for cell in CELLS:
        for schedule in ("linear", "constant"):
            planned += [cell.config("gen", schedule, 1e-5, seed, {"rule_version": OURS["gen"]}) for seed in (0, 1)]
    for config in planned:
        results.add(record(config, loss(config), **(averaged(config) if config.schedule == "constant" else {})))
    lines = ablation.page(CELLS, results, "command").splitlines()
    rows = {cells[0]: cells for cells in ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)}
    # The floor of losses that approach zero is added above and below the line.
    assert [float(ratio) for ratio in rows["annealing"][2:6:2]] == pytest.approx([3.0, 3.0], rel=0.01)
    assert rows["smoothing"][2:6] == ["1.000", "-", "1.000", "-"]  # no models among these cells
    assert rows["annealing"][-1] == str(2 * len(CELLS))


def test_an_average_may_be_well_where_the_last_step_went_up() -> None:
    config = CELLS[0].config("gen", "constant", 1e-5, 0, {"rule_version": OURS["gen"]})
    run_up = record(config, 11.0, averaged_validation_losses=(2.0,), evaluated=(60,))
    lost = record(config, 1.0, averaged_validation_losses=(12.0,), evaluated=(60,))
    workload = CELLS[0].workload
    assert scores.score(run_up, workload) == math.inf
    assert scores.score(run_up, workload, is_averaged=True) == pytest.approx(2.0, rel=1e-2)
    assert scores.score(lost, workload, is_averaged=True) == math.inf
    assert scores.score(lost, workload) < math.inf
