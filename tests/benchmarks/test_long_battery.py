"""``battery --long``: its workloads, its averages, its plan, and its figures computed by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import dropwhile, islice, takewhile
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.__main__ import main
from benchmarks.averages import EVERY, evaluate_average, power_law_average
from benchmarks.battery import ablation, job, results_file
from benchmarks.battery.config import BASES, SEEDS, SWEEP, Cell, Config, cells
from benchmarks.battery.long.report import LongComparison, page, peers_table
from benchmarks.battery.long.statistics import final_loss, log_area, mean_log, steps_to_loss
from benchmarks.battery.long.study import (
    AVERAGED,
    CONSTANT,
    COSINE,
    FRACTIONS,
    LINEAR,
    LongStudy,
    ours,
    rates,
    refinements,
    shorter_runs,
    sweep,
    trials,
    tuned,
)
from benchmarks.battery.records import Record, Results
from benchmarks.battery.runs import run
from benchmarks.battery.scores import CAP, FLOOR
from benchmarks.battery.study import matches
from benchmarks.workloads import BATTERY, LONG
from tests.benchmarks.battery_results import DATA, record

MLP, HELD_OUT = LONG["long-digits-mlp"], LONG["long-vae"]


def cell_of(name: str = "long-digits-mlp", base: str = "SGD", steps: int | None = None) -> Cell:
    return next(each for each in cells({name: LONG[name]}, DATA, steps) if each.base == base)


# --- workloads -------------------------------------------------------------------------------------------------------


def test_long_workloads_are_those_of_the_battery_at_about_ten_times_the_length() -> None:
    assert len(LONG) == 10
    for name, each in LONG.items():
        short = BATTERY[name.removeprefix("long-")]
        assert 4000 <= each.steps <= 8000
        assert 10 <= each.steps / short.steps < 14
        assert (each.family, each.data, each.approaches_zero) == (short.family, short.data, short.approaches_zero)
        assert all(each.centres[base] in SWEEP[base] for base in BASES)


def test_the_division_into_what_constants_are_set_on_and_what_is_held_out_stays() -> None:
    held_out = {name.removeprefix("long-") for name, each in LONG.items() if each.is_held_out}
    assert held_out == {"digits-logistic", "digits-autoencoder", "vae", "images-resnet", "images-vit"}


@pytest.mark.parametrize("name", LONG)
def test_a_long_workload_is_the_same_for_the_same_seed(name: str) -> None:
    state = torch.get_rng_state()
    first, second = (LONG[name].make(3, DATA) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    for one, two in islice(zip(first.batches(3), second.batches(3), strict=True), 2):
        assert all(map(torch.equal, one, two))
    batches = first.validation[:2]
    assert first.evaluate(first.model, batches) == second.evaluate(second.model, batches)


@pytest.mark.parametrize("name", ["long-digits-mlp", "long-vae", "long-images-cnn"])
def test_no_example_is_ever_repeated(name: str) -> None:
    task = LONG[name].make(0, DATA)
    # Two passes over the digits that are the images here.
    examples = torch.cat([batch[0].flatten(1) for batch in islice(task.batches(0), 56)])
    validated = torch.cat([batch[0].flatten(1) for batch in task.validation])
    assert len(torch.unique(examples, dim=0)) == len(examples)
    together = torch.cat([examples, validated])
    assert len(torch.unique(together, dim=0)) >= len(examples) + len(torch.unique(validated, dim=0))


def test_augmented_digits_are_still_digits() -> None:
    task = LONG["long-digits-mlp"].make(0, DATA)
    inputs, targets = next(task.batches(0))
    assert inputs.shape == (64, 64)
    assert 0.0 <= inputs.min() <= inputs.max() <= 1.0
    split = DATA.digits(0)
    images, labels = torch.cat([split.train_x, split.valid_x]), torch.cat([split.train_y, split.valid_y])
    nearest = labels[torch.cdist(inputs, images).argmin(1)]
    assert (nearest == targets).float().mean() > 0.8


# --- averages --------------------------------------------------------------------------------------------------------


def test_the_average_follows_its_formula() -> None:
    model = nn.Linear(1, 1, bias=False)
    average = power_law_average(model)
    expected = 0.0
    for n, weight in enumerate((1.0, 3.0, -2.0), start=1):
        nn.init.constant_(model.weight, weight)
        average.update_parameters(model)
        beta = (1.0 - 1.0 / n) ** 16
        expected = beta * expected + (1.0 - beta) * weight
        assert average.module.weight.item() == pytest.approx(expected)


def test_the_average_is_about_the_last_sixteenth_of_a_run() -> None:
    model = nn.Linear(1, 1, bias=False)
    average = power_law_average(model)
    for step in range(1000):
        nn.init.constant_(model.weight, float(step))
        average.update_parameters(model)
    assert average.module.weight.item() == pytest.approx(1000.0 * 16 / 17, rel=2e-3)


def test_statistics_of_batch_normalisation_are_those_of_the_averaged_weights() -> None:
    task = LONG["long-images-cnn"].make(0, DATA)
    task = replace(task, validation=task.validation[:2])
    average = power_law_average(task.model)
    average.update_parameters(task.model)
    state = torch.get_rng_state()
    before = task.evaluate(average, task.validation)
    after = evaluate_average(average, task, 5)
    assert torch.equal(torch.get_rng_state(), state)
    assert after != before
    assert after == evaluate_average(average, task, 5)
    assert all(int(count) == 0 for name, count in task.model.named_buffers() if "num_batches" in name)


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_a_long_run_has_a_validation_curve_and_averages_without_a_scheduler(schedule: str) -> None:
    cell = cell_of(steps=64)
    seen = run(cell.config("bare", schedule, 0.1, 0), DATA)
    assert seen.error == ""
    assert seen.evaluated == (16, 32, 48, 64)
    assert seen.validation_losses[-1] == seen.validation_loss
    assert len(seen.averaged_validation_losses) == (4 if schedule == "constant" else 0)
    again = Record.from_line(seen.to_line())
    assert again.evaluated == seen.evaluated
    assert again.averaged_validation_losses == pytest.approx(seen.averaged_validation_losses, rel=1e-4)
    if schedule == "constant":
        assert seen.averaged_validation_losses[0] != seen.validation_losses[0]


def test_the_average_is_that_of_every_fourth_step() -> None:
    seen = run(cell_of(steps=EVERY).config("bare", "constant", 0.1, 0), DATA)
    assert seen.averaged_validation_losses == (seen.validation_loss,)


def test_a_record_without_a_validation_curve_is_read_as_before() -> None:
    line = record(cell_of().config("bare", "linear", 0.1, 0)).to_line()
    for name in ("evaluated", "validation_losses", "averaged_validation_losses"):
        line = line.replace(f'"{name}": [], ', "")
    assert "evaluated" not in line
    assert Record.from_line(line).evaluated == ()


# --- figures ---------------------------------------------------------------------------------------------------------


def test_the_mean_log_of_a_loss_is_over_steps() -> None:
    losses = [math.exp(each) for each in (2.0, 1.0, 0.0)]
    assert mean_log((0, 10, 30), losses) == pytest.approx((10 * 1.5 + 20 * 0.5) / 30)
    assert mean_log((0, 10), [1.0, math.inf]) == math.inf


@pytest.mark.parametrize(
    ("loss", "steps"),
    [
        (9.0, 1 / 8),  # worse than the shortest: a bound
        (8.0, 1 / 8),
        (4.0, 1 / 4),
        (math.sqrt(8.0), math.sqrt(1 / 8)),  # halfway between 1/4 and 1/2, in logarithms
        (2.0, 1 / 2),
        (1.0, 1.0),
        (0.5, 1.0),  # better than the whole: a bound
        (math.inf, 1 / 8),
        (math.nan, 1 / 8),
    ],
)
def test_steps_to_a_loss(loss: float, steps: float) -> None:
    assert steps_to_loss(loss, [(1 / 8, 8.0), (1 / 4, 4.0), (1 / 2, 2.0), (1.0, 1.0)]) == pytest.approx(steps)


def test_a_longer_tuned_run_counts_as_no_worse_than_a_shorter_one() -> None:
    curve = [(1 / 8, 8.0), (1 / 4, 9.0), (1 / 2, 2.0), (1.0, 2.5)]
    assert steps_to_loss(4.0, curve) == pytest.approx(math.sqrt(1 / 8))  # from 1/4 at 8.0 to 1/2 at 2.0
    assert steps_to_loss(2.0, curve) == pytest.approx(1 / 2)
    assert steps_to_loss(1.9, curve) == 1.0


def with_curve(config: Config, loss: float, averaged: float | None = None, halfway: float = 4.0) -> Record:
    """A record of a run with an initial loss of 10, a loss halfway and one at the end."""
    whole = {"evaluated": (config.steps // 2, config.steps), "validation_losses": (halfway, loss)}
    if averaged is not None:
        whole["averaged_validation_losses"] = (halfway, averaged)
    return record(config, loss, **whole)


def test_final_losses_and_areas() -> None:
    results, cell = Results(), cell_of()
    config = cell.config("bare", "constant", 0.1, 0)
    assert final_loss(config, False, cell, results) is None
    assert log_area(config, False, cell, results) is None
    results.add(with_curve(config, 1.0, averaged=0.5))
    assert final_loss(config, False, cell, results) == 1.0
    assert final_loss(config, True, cell, results) == 0.5
    logs = [math.log(each) for each in (10.0, 4.0, 1.0)]
    assert log_area(config, False, cell, results) == pytest.approx(logs[0] / 4 + logs[1] / 2 + logs[2] / 4)
    assert log_area(config, True, cell, results) == pytest.approx(logs[0] / 4 + logs[1] / 2 + math.log(0.5) / 4)
    results.add(with_curve(config, 11.0, averaged=0.5))  # above the initial loss
    assert (final_loss(config, False, cell, results), final_loss(config, True, cell, results)) == (math.inf, 0.5)
    results.add(replace(with_curve(config, 1.0, averaged=0.5), evaluated=(2000,)))  # ended early
    assert log_area(config, True, cell, results) == math.inf


def test_losses_that_approach_zero_have_a_floor() -> None:
    results, cell = Results(), cell_of("long-pinn")
    config = cell.config("bare", "linear", 0.1, 0)
    results.add(with_curve(config, 0.0))
    floor = FLOOR * 10.0
    assert final_loss(config, False, cell, results) == floor
    logs = [math.log(each + floor) for each in (10.0, 4.0, 0.0)]
    assert log_area(config, False, cell, results) == pytest.approx(logs[0] / 4 + logs[1] / 2 + logs[2] / 4)


# --- the plan --------------------------------------------------------------------------------------------------------


def test_five_learning_rates_and_more_if_the_best_is_at_the_edge() -> None:
    cell = cell_of()
    every = SWEEP["SGD"]
    assert rates(cell, Results()) == every[3:8]
    for best, found in ((0.3, every[3:8]), (3.0, every[3:9]), (3e-2, every[2:8]), (1e-3, every[1:8])):
        results = Results()

        def distance(config: Config, best: float = best) -> float:
            return 1.0 + abs(math.log(config.lr / best))

        for lr in every:
            for schedule in ("linear", "cosine", "constant"):
                config = cell.config("bare", schedule, lr, 0)
                results.add(with_curve(config, distance(config), averaged=distance(config)))
        assert rates(cell, results) == found


def test_ours_is_not_run_on_what_is_held_out_unless_asked() -> None:
    rows = cells({MLP.name: MLP, HELD_OUT.name: HELD_OUT}, DATA)
    for asked in (False, True):
        stages = dict(LongStudy(rows, with_held_out=asked).stages(Results()))
        mine = {config.workload for name in ("ours", "ours, other seeds") for config in stages[name]}
        assert mine == ({MLP.name, HELD_OUT.name} if asked else {MLP.name})
        assert {config.workload for config in stages["sweep, linear"]} == {MLP.name, HELD_OUT.name}
        assert len(stages["sweep, linear"]) == 5 * len(rows)
        assert stages["sweep, linear"][0].workload == MLP.name
    assert {config.workload for config in trials(rows, {"period": 4})} == {MLP.name}


def test_the_plan_does_not_depend_on_the_order_of_what_is_done() -> None:
    study = LongStudy(cells({MLP.name: MLP}, DATA), with_held_out=True)
    first = everything_long(study)
    again = Results()
    for each in reversed(list(first.records.values())):
        again.add(each)
    assert all(config in again for _, configs in study.stages(again) for config in configs)
    assert len(first) == pytest.approx(study.count(), abs=12)  # the best of two kinds share runs


# --- a whole battery, computed by hand -------------------------------------------------------------------------------

SHORT = {1 / 8: 4.0, 1 / 4: 2.0, 1 / 2: 1.5}
"""Tuned at the larger one of two learning rates; the smaller one is worse."""
THEIRS = {"momo": 1.2, "d-adaptation": 2.5}
"""Of other optimizers, under any schedule."""


def chosen_loss(config: Config, steps: int) -> tuple[float, float]:
    """The final loss at the last weights, and at averaged ones."""
    if config.method == "gen":
        return {"linear": (2.0, 0.0), "cosine": (0.5, 0.0), "constant": (3.0, math.sqrt(3.0))}[config.schedule]
    if config.method in THEIRS:
        return THEIRS[config.method], 9.0
    if config.steps < steps:
        better = SHORT[config.steps / steps]
        return (better if config.lr == 0.3 else better + 1.0), 9.0
    best = {
        # By seed: on the first one linear is the best, over all of them cosine is.
        ("linear", 0.1): (0.9, 1.2, 1.5),
        ("cosine", 0.1): (1.0, 1.0, 1.0),
        ("constant", 0.3): (1.1, 1.1, 1.1),
    }.get((config.schedule, config.lr), (3.0, 3.0, 3.0))[config.seed]
    return (best + 5.0, best) if config.schedule == "constant" else (best, 9.0)


def long_record(config: Config, steps: int = 4000) -> Record:
    loss, averaged = chosen_loss(config, steps)
    halfway = 8.0 if config.method == "gen" else 4.0
    return with_curve(config, loss, averaged if config.schedule == "constant" else None, halfway)


def everything_long(study: LongStudy) -> Results:
    results = Results()
    while True:
        todo = [each for _, configs in study.stages(results) for each in configs if each not in results]
        if not todo:
            return results
        for config in todo:
            results.add(long_record(config))


@pytest.fixture(scope="module")
def known() -> LongComparison:
    study = LongStudy([cell_of()], peers=frozenset(THEIRS))
    return LongComparison(study, everything_long(study))


def test_optimizers_of_others_are_compared_under_the_same_schedule(known: LongComparison) -> None:
    """On the first seed: tuned 1.0, ours 1.732 at averaged weights and 2.0 with a linear schedule."""
    lines = [[each.strip() for each in line.strip("|").split("|")] for line in peers_table(known, "SGD").splitlines()]
    assert lines[2:] == [
        ["D-Adaptation, no scheduler", "2.500", "2.500", "1.732", "1 of 1"],
        ["D-Adaptation, linear", "2.500", "2.500", "2.000", "1 of 1"],
        ["MoMo, no scheduler", "1.200", "1.200", "1.732", "0 of 1"],
    ]
    assert peers_table(known, "AdamW") == ""
    assert peers_table(LongComparison(known.study, Results()), "SGD") == ""


def test_tuned_is_the_best_over_all_seeds_of_the_best_of_each_kind(known: LongComparison) -> None:
    [cell] = known.study.cells
    chosen = known.tuned[cell]
    assert chosen is not None
    assert (chosen.kind, chosen.config.lr) == (COSINE, 0.1)
    first_seed_only = Results({key: each for key, each in known.results.records.items() if each.config.seed == 0})
    assert tuned(cell, first_seed_only).kind is LINEAR
    refined = {(each.schedule, each.lr, each.seed) for each in refinements(cell, known.results)}
    assert refined == {
        (*each, seed) for each in (("linear", 0.1), ("cosine", 0.1), ("constant", 0.3)) for seed in SEEDS[1:]
    }


def test_shorter_runs_are_at_two_learning_rates_and_on_other_seeds_at_the_better_one(known: LongComparison) -> None:
    [cell] = known.study.cells
    first = shorter_runs(cell, known.results, SEEDS[:1])
    assert [(each.steps, each.lr, each.schedule) for each in first] == [
        (steps, lr, "cosine") for steps in (500, 1000, 2000) for lr in (0.1, 0.3)
    ]
    rest = shorter_runs(cell, known.results, SEEDS[1:])
    assert [(each.steps, each.lr, each.seed) for each in rest] == [
        (steps, 0.3, seed) for steps in (500, 1000, 2000) for seed in (1, 2)
    ]
    assert known.curve(cell, SEEDS) == [(1 / 8, 4.0), (1 / 4, 2.0), (1 / 2, 1.5), (1.0, 1.0)]


@pytest.mark.parametrize(
    ("kind", "loss", "steps"),
    [
        (LINEAR, 2.0, 1 / 4),
        (COSINE, 0.5, 1.0),
        (CONSTANT, 3.0, 2.0 ** (-3 + math.log(4 / 3) / math.log(2))),  # between 1/8 at 4 and 1/4 at 2
        (AVERAGED, math.sqrt(3.0), math.sqrt(1 / 8)),  # halfway between 1/4 at 2 and 1/2 at 1.5
    ],
    ids=str,
)
def test_figures_of_each_kind(known: LongComparison, kind: object, loss: float, steps: float) -> None:
    figures = known.figures(known.study.cells[0], kind)
    assert figures.loss == pytest.approx(loss)
    assert figures.steps == pytest.approx(steps)
    # The logs of the losses differ by log 2 in the middle and by log(loss) at the end.
    assert figures.early == pytest.approx(math.exp(math.log(2.0) / 2 + math.log(loss) / 4))
    assert figures.is_final


def test_a_diverged_run_of_ours_counts_as_the_cap(known: LongComparison) -> None:
    [cell] = known.study.cells
    results = Results(dict(known.results.records))
    config = next(each for each in ours(cell, SEEDS) if each.schedule == "linear" and each.seed == 1)
    results.add(with_curve(config, math.inf))
    figures = LongComparison(known.study, results).figures(cell, LINEAR)
    assert (figures.loss, figures.steps, figures.early) == (CAP, 1 / 8, CAP)


def table(text: str, heading: str) -> dict[str, dict[str, str]]:
    lines = text.split(f"{heading}\n")[1].splitlines()
    found = takewhile(lambda line: line.startswith("|"), dropwhile(lambda line: not line.startswith("|"), lines))
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in found]
    return {row[0]: dict(zip(head, row, strict=True)) for row in rows}


def test_the_report_of_a_whole_long_battery(known: LongComparison) -> None:
    text = page(known, "command", ["file.png"])
    assert "Nothing: all runs are done." in text
    rows = table(text, "## Workloads that constants are set on")
    assert rows["linear: loss"]["worst"] == "2.000 (≤ 1.03)"
    assert rows["linear: steps"]["geometric mean; of steps, median"] == "0.250 (≥ 0.95)"
    assert rows["no scheduler, averaged: loss"]["worst"] == "1.732 (≤ 1.04)"
    assert rows["no scheduler, averaged: steps"]["worst"] == "0.354 (≥ 0.75)"
    assert rows["cosine: early"]["geometric mean; of steps, median"] == "1.189"  # the fourth root of 2
    row = table(text, "## Tuned")["long-digits-mlp, SGD"]
    assert (row["tuned"], row["best linear"], row["best cosine"]) == ("cosine", "1.2 at 0.1", "1 at 0.1")
    assert row["best no scheduler, averaged"] == "1.1 at 0.3"
    assert [row[f"tuned at {each:g}"] for each in FRACTIONS] == ["4", "2", "1.5"]
    assert (row["sweep"], row["at its edge"]) == ("15/15", "")


def test_the_report_of_nothing_and_of_a_part_says_what_is_missing() -> None:
    study = LongStudy([cell_of(), cell_of("long-vae")])
    assert "not known yet" in page(LongComparison(study, Results()), "command", [])
    results = Results()
    for config in (*sweep(study.cells[0], ("linear",)), *ours(study.cells[0], (0,))):
        results.add(long_record(config))
    text = page(LongComparison(study, results), "command", [])
    assert "2.222*" in text  # 2.0 / 0.9
    assert "## Workloads that are held out" in text


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_quick_form_and_trials_of_a_rule(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(job.FOLDER_VARIABLE, raising=False)
    monkeypatch.setattr(job, "LONG", {MLP.name: replace(MLP, steps=16)})
    command = ["battery", "--long", "--output", str(tmp_path), "--jobs", "1"]
    main([*command, "--quick"])
    assert sorted(each.name for each in tmp_path.iterdir()) == [
        "battery-long-quick-run.png",
        "battery-long-quick.md",
        "battery-long-quick.png",
    ]
    main([*command, "--only", "SGD bare constant"])
    assert len(results_file.read(tmp_path / "battery-long.jsonl")) >= 5
    main([*command, "--report"])
    main([*command, "--tune", "--set", "period=4", "--only", "SGD"])
    trial = results_file.read(tmp_path / "battery-long-tune.jsonl")
    assert len(trial) == 3
    assert all(each.config.options["period"] == 4 and not each.error for each in trial.records.values())
    assert "no scheduler, averaged: loss" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--held-out goes with --long"):
        main(["battery", "--held-out", "--output", str(tmp_path)])


def test_mechanisms_are_switched_off_in_long_runs_that_are_not_held_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(job.FOLDER_VARIABLE, raising=False)
    held_out = next(each for each in LONG.values() if each.is_held_out)
    monkeypatch.setattr(job, "LONG", {each.name: replace(each, steps=16) for each in (MLP, held_out)})
    monkeypatch.setattr(ablation, "MECHANISMS", {"annealing": ablation.MECHANISMS["annealing"]})
    main(["battery", "--long", "--ablation", "--output", str(tmp_path), "--jobs", "1", "--only", "seed 0"])
    results = results_file.read(tmp_path / "battery-long-ablation.jsonl")
    assert {config.workload for config in (each.config for each in results.records.values())} == {MLP.name}
    assert len(results) == 4  # two base optimizers, with and without a schedule
    assert "| annealing" in (tmp_path / "battery-long-ablation.md").read_text("utf-8")


def test_patterns_fit_long_runs() -> None:
    assert matches(cell_of().config("gen", "linear", 1e-5, 0), "long-digits-* SGD gen")
