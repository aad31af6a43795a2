"""The battery's report: what is made of the losses."""

from __future__ import annotations

import math
from itertools import dropwhile, takewhile

import pytest

from benchmarks.battery import scores
from benchmarks.battery.comparison import Comparison
from benchmarks.battery.config import SWEEP, Config, cells
from benchmarks.battery.methods import PEERS
from benchmarks.battery.records import Results
from benchmarks.battery.report import page, tuning_table
from benchmarks.battery.study import Study, tuning
from benchmarks.workloads import BATTERY
from tests.benchmarks.battery_results import CHEAP, DATA, everything, record, tiny


def test_losses_that_approach_zero_have_a_floor_and_diverged_runs_a_cap() -> None:
    config = tiny()
    floor = scores.FLOOR * 10.0
    assert scores.score(record(config, 0.0), BATTERY["beale"]) == floor
    assert scores.score(record(config, 0.5), BATTERY["digits-mlp"]) == 0.5
    lost = scores.score(record(config, math.inf), BATTERY["beale"])
    assert scores.ratio_of(lost, 1.0) == scores.CAP
    assert scores.ratio_of(1e9, 1.0) == scores.CAP
    assert scores.geometric_mean([0.5, 2.0]) == pytest.approx(1.0)


def test_the_report_of_a_whole_battery() -> None:
    study = Study(cells(CHEAP, DATA), frozenset(each.name for each in PEERS))

    def loss(config: Config) -> float:
        if config.method == "gen":
            return 0.5 * (1.2 if config.lr == 10.0 else 1.0)
        best = config.method == "bare" and config.lr == SWEEP[config.base][4] and config.schedule == "linear"
        return 1.0 if best else 2.0

    known = Comparison(study, everything(loss, study))
    cell = study.cells[0]
    tuned = known.tuned[cell]
    assert tuned is not None
    assert tuned.is_complete
    assert (tuned.config.lr, tuned.config.schedule, len(tuned.runs)) == (SWEEP["SGD"][4], "linear", 3)
    ratio = known.over(cell, known.ours(cell, "gen", "linear"), tuned)
    assert ratio is not None
    floor = scores.FLOOR * 10.0
    assert ratio.value == pytest.approx((0.525 + floor) / (1.0 + floor))
    assert ratio.is_complete
    assert known.spread(cell).value == pytest.approx((0.6 + floor) / (0.5 + floor))
    assert known.failures(cell, "gen") == (0, 0, 36)
    fixed = known.fixed[cell]
    assert fixed is not None
    assert fixed.config == tuned.config
    text = page(known, "command", {"title": "file.png"})
    assert "Nothing: all runs are done." in text
    assert "![title](file.png)" in text
    assert "*" not in text.split("## GeN")[1].split("**geometric mean**")[0]
    assert "2/2" in text.split("**we are ahead on**")[1]


def test_the_report_of_little_says_what_is_missing_and_of_nothing_too() -> None:
    study = Study(cells(CHEAP, DATA))
    for results in (Results(), everything(lambda _: 1.0, Study(study.cells[:1], frozenset()))):
        text = page(Comparison(study, results), "command", {})
        assert "Runs are still missing" in text
        assert "not known yet" in text


def test_the_table_of_tuning_compares_with_what_is_known() -> None:
    rows = cells(CHEAP, DATA)
    plan = tuning(rows, {})
    results = Results()
    for config in plan:
        results.add(record(config, 0.5))
    known = Comparison(Study(rows, frozenset()), everything(lambda _: 1.0, Study(rows, frozenset())))
    assert "0.500" in tuning_table(known, plan, results)
    assert "0.500" not in tuning_table(Comparison(Study(rows, frozenset()), Results()), plan, results)


# --- every figure, computed by hand ----------------------------------------------------------------------------------

BARE = {
    ("linear", 4): (1.0, 4.0, 1.0),  # the best on the sweep's seed, and so the fixed one, but not over the seeds
    ("cosine", 4): (1.1, 1.1, 1.4),  # so this is tuned: 1.2
    ("constant", 4): (1.5, 1.5, 1.5),
    ("constant", 3): (1.6, 1.3, 1.3),  # likewise the best constant: 1.4
}
OURS = {"linear": 1.2, "cosine": 0.6, "constant": 2.8}


def chosen_loss(config: Config) -> float:
    times = 3.0 if config.base == "AdamW" else 1.0
    if config.method == "bare":
        return BARE.get((config.schedule, SWEEP[config.base].index(config.lr)), (3.0, 3.0, 3.0))[config.seed]
    if config.method == "gen":
        return times * OURS[config.schedule] * (2.0 if (config.schedule, config.lr) == ("linear", 10.0) else 1.0)
    if config.method == "gen-published":
        return math.inf if (config.schedule, config.lr, config.seed) == ("linear", 10.0, 1) else 1.2
    if config.method == "momo":
        return 2.0  # ahead of ours at the last weights without a scheduler, behind it at averaged ones
    if config.method == "dog":
        return 1.4  # the same as ours at averaged weights
    return 5.0


def table(text: str, heading: str) -> dict[str, dict[str, str]]:
    """The first table under a heading: rows and columns by their names."""
    lines = text.split(f"\n## {heading}")[1].splitlines()
    found = takewhile(lambda line: line.startswith("|"), dropwhile(lambda line: not line.startswith("|"), lines))
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in found]
    return {row[0]: dict(zip(head, row, strict=True)) for row in rows}


@pytest.fixture(scope="module")
def report() -> str:
    study = Study(cells({"digits-mlp": BATTERY["digits-mlp"]}, DATA), frozenset(each.name for each in PEERS))
    return page(Comparison(study, everything(chosen_loss, study)), "command", {})


def test_baselines_are_the_best_over_seeds(report: str) -> None:
    row = table(report, "Baselines")["digits-mlp, SGD"]
    assert (row["tuned loss"], row["tuned at"], row["best constant"]) == ("1.2", "0.1 cosine", "0.03 constant")
    assert "Fixed baseline of SGD: learning rate 0.1, linear." in report


def test_ratios_are_of_means_over_starts_and_seeds(report: str) -> None:
    rows = table(report, "GeN, default")
    row = rows["digits-mlp, SGD"]
    assert row["fixed"] == "1.667"  # 2.0 / 1.2
    assert [row[name] for name in ("linear", "cosine", "no scheduler")] == ["1.250", "0.500", "2.333"]
    assert row["no scheduler / best constant"] == "2.000"
    assert row["spread"] == "2.000"
    assert row["extra forwards a step"] == "0.50"
    assert (row["diverged"], row["stalled"]) == ("0/36", "12/36")  # 2.8 is above twice 1.2, 2.4 is not
    assert (rows["digits-mlp, AdamW"]["linear"], rows["digits-mlp, AdamW"]["stalled"]) == ("3.750", "24/36")
    assert (rows["**geometric mean**"]["linear"], rows["**worst**"]["linear"]) == (
        "2.165",
        "3.750",
    )  # the root of 1.25 * 3.75


def test_a_single_run_that_diverges_makes_a_ratio_the_cap(report: str) -> None:
    row = table(report, "GeN, published")["digits-mlp, SGD"]
    assert (row["linear"], row["cosine"], row["spread"], row["diverged"]) == ("100", "1.000", "100", "1/36")


def test_ratios_by_initial_learning_rate(report: str) -> None:
    text = report.split("## Our rules by initial learning rate")[1]
    ours, published = (line for line in text.splitlines() if "| " in line and "   linear |" in line)
    assert [cell.strip() for cell in ours.strip("|").split("|")][2:] == ["1.732", "1.732", "1.732", "3.464"]
    assert [cell.strip() for cell in published.strip("|").split("|")][2:] == ["1.000", "1.000", "1.000", "100"]


def test_being_ahead_is_under_the_same_schedule_or_at_averaged_weights_and_ties_are_not(report: str) -> None:
    ahead = table(report, "Peers, over tuned SGD")["**we are ahead on**"]
    assert ahead["MoMo, no scheduler"] == "1/1"
    assert ahead["DoG, no scheduler"] == "0/1"
    assert ahead["Mechanic, linear"] == "1/1"
    assert table(report, "Peers, over tuned SGD")["digits-mlp"]["MoMo, no scheduler"] == "1.667"


def test_the_summary_has_geometric_means_and_worst_cells(report: str) -> None:
    rows = table(report, "Summary")
    shown = {name: (row["geometric mean"], row["worst"]) for name, row in rows.items()}
    assert shown["GeN, linear / tuned"] == ("2.165", "3.750 (digits-mlp, AdamW)")
    assert shown["GeN, no scheduler / best constant"] == ("3.464", "6.000 (digits-mlp, AdamW)")
    assert shown["GeN, no scheduler / tuned"] == ("4.041", "7.000 (digits-mlp, AdamW)")
    assert shown["GeN, linear / fixed"] == ("1.299", "2.250 (digits-mlp, AdamW)")
    assert shown["GeN, runs"][0] == "0 diverged, 36 stalled"
    assert shown["GeN, extra forward passes a step"] == ("0.500 (of all steps)", "0.500 (digits-mlp, SGD)")


def test_errors_of_any_method_are_told(report: str) -> None:
    assert "raised an error" not in report
    study = Study(cells({"digits-mlp": BATTERY["digits-mlp"]}, DATA), frozenset())
    results = everything(chosen_loss, study)
    config = next(config for _, configs in study.stages(results) for config in configs if config.method == "gen")
    results.add(record(config, math.inf, error="ValueError: lost"))
    assert "- GeN, digits-mlp, SGD: ValueError: lost" in page(Comparison(study, results), "command", {})
