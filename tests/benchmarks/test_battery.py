"""The battery: workloads, runs, the results file, the plan, the report."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.battery import job, results_file
from benchmarks.battery.comparison import Comparison
from benchmarks.battery.config import GIVEN, SEEDS, SWEEP, Cell, Config, cells
from benchmarks.battery.methods import METHODS, PEERS, code_fingerprint
from benchmarks.battery.records import Record, Results
from benchmarks.battery.report import page
from benchmarks.battery.runs import POINTS, run
from benchmarks.battery.study import Study, matches, other_seed, refinements, sweep, trial, tuning
from benchmarks.battery.workers import work
from benchmarks.data import KINDS, Data
from benchmarks.optimizers import BASES
from benchmarks.training import SCHEDULES
from benchmarks.workloads import BATTERY, Task
from tests.benchmarks.battery_results import CHEAP, DATA, record, tiny

# --- workloads -------------------------------------------------------------------------------------------------------


def test_a_process_that_only_runs_knows_the_peers() -> None:
    """Workers are started anew, and import nothing but what runs a configuration."""
    program = "from benchmarks.battery.runs import METHODS; assert 'cdat' in METHODS"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("name", BATTERY)
def test_a_workload_is_the_same_for_the_same_seed_and_another_for_another(name: str) -> None:
    state = torch.get_rng_state()
    first, second, other = (BATTERY[name].make(seed, DATA) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, first.model.state_dict().values(), second.model.state_dict().values()))
    assert not all(map(torch.equal, first.parameters(), other.parameters()))
    streams = first.batches(3), second.batches(3)
    for _ in range(3):
        assert all(map(torch.equal, *map(next, streams)))
    loss = first.evaluate(first.model, first.validation)
    assert math.isfinite(loss)
    assert loss == second.evaluate(second.model, second.validation)
    assert first.model.training


def test_workloads_have_what_the_report_needs() -> None:
    families = {each.family for each in BATTERY.values()}
    assert families == {"digits", "images", "text", "tables", "science", "generative", "fine-tuning", "classics"}
    for each in BATTERY.values():
        assert each.steps >= 300
        assert each.data in KINDS


@pytest.mark.parametrize("name", BATTERY)
def test_every_method_takes_a_step_on_every_workload(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Task, "evaluate", lambda self, model, batches: 1.0)
    for cell in cells({name: BATTERY[name]}, DATA, steps=1):
        for method in METHODS.values():
            if cell.base in method.bases and method.is_installed:
                lr = None if method.package else 1e-3
                seen = run(cell.config(method.name, method.schedules[-1], lr, 0), DATA)
                assert seen.error == "", f"{seen.config}: {seen.error}"
                assert all(map(math.isfinite, seen.losses))


def test_data_of_a_folder_are_used_where_they_are(tmp_path: Path) -> None:
    (tmp_path / "tinyshakespeare.txt").write_text("to be or not to be\n" * 200, "utf-8")
    data = Data(tmp_path)
    assert (data.source("text"), data.source("images"), data.source("digits")) == ("shakespeare", "digits", "digits")
    assert data.text()[0].alphabet == len(set("to be or not to be\n"))
    task = BATTERY["text-lstm"].make(0, data)
    assert math.isfinite(task.evaluate(task.model, task.validation))


# --- runs ------------------------------------------------------------------------------------------------------------


def test_a_run_repeats_itself_and_tells_what_it_saw() -> None:
    config = tiny("gen", 1e-5, "digits-mlp", steps=120)
    first, second = run(config, DATA), run(config, DATA)
    assert replace(first, seconds=0.0, total_seconds=0.0) == replace(second, seconds=0.0, total_seconds=0.0)
    assert (first.steps[0], first.steps[-1]) == (1, 120)
    assert POINTS <= len(first.steps) == len(first.losses) == len(first.learning_rates) <= 2 * POINTS
    assert first.extra_forwards >= 50  # one a probe step of the burn-in, and the start
    assert first.code == code_fingerprint()
    assert not first.diverged
    assert first.validation_loss < first.initial_validation_loss


def test_a_run_that_explodes_ends_early_and_says_so() -> None:
    seen = run(tiny(lr=1e6, workload="rosenbrock", steps=600), DATA)
    assert seen.diverged
    assert seen.steps[-1] < 100
    assert Record.from_line(seen.to_line()).validation_loss == math.inf


def test_an_exception_is_kept_as_an_error() -> None:
    seen = run(tiny("bare", None), DATA)
    assert "learning rate" in seen.error
    assert seen.diverged


def test_schedules_go_from_one_towards_zero() -> None:
    for name, factor in SCHEDULES.items():
        assert factor(0, 300) == 1.0
        assert factor(299, 300) == (1.0 if name == "constant" else pytest.approx(0.0, abs=0.01))


def test_a_bare_run_without_a_horizon_is_the_optimizer_alone() -> None:
    cell = Cell(BATTERY["quadratic"], "SGD", "generated", 10)
    seen = run(cell.config("bare", "constant", 0.1, 0), DATA)
    task = BATTERY["quadratic"].make(0, DATA)
    optimizer = torch.optim.SGD(task.parameters(), lr=0.1, momentum=0.9)
    stream = task.batches(0)
    for _ in range(10):
        optimizer.zero_grad()
        task.loss(task.model, next(stream)).backward()
        optimizer.step()
    assert seen.validation_loss == task.evaluate(task.model, task.validation)


# --- the plan --------------------------------------------------------------------------------------------------------


def test_every_run_has_a_key_of_its_own() -> None:
    study = Study(cells(BATTERY, DATA), frozenset(each.name for each in PEERS))
    runs = {config.key: config for _, configs in study.stages(Results()) for config in configs}
    assert len(set(runs.values())) == len(runs)
    bare = [config for config in runs.values() if config.method == "bare"]
    assert len(bare) == 27 * len(BATTERY) * len(BASES)
    ours = [config for config in runs.values() if config.method == "gen"]
    assert len(ours) == len(SEEDS) * len(GIVEN) * len(SCHEDULES) * len(BATTERY) * len(BASES)
    for key, config in runs.items():
        assert Config(**json.loads(key)) == config


def test_rates_of_the_sweep_are_half_a_decade_apart() -> None:
    for rates in SWEEP.values():
        assert len(rates) == 9
        for low, high in pairwise(rates):
            assert high / low == pytest.approx(10**0.5, rel=0.06)


def test_the_best_of_a_finished_sweep_are_refined_and_the_fixed_baseline_follows() -> None:
    rows = [cell for cell in cells(CHEAP, DATA) if cell.base == "SGD"]
    results = Results()
    first = rows[0]
    for place, config in enumerate(sweep(first)):
        assert refinements(first, results) == []
        results.add(record(config, 1.0 + 0.1 * abs(place - 20)))  # among the cosine ones
    chosen = refinements(first, results)
    assert {(config.lr, config.schedule) for config in chosen} == {
        *((sweep(first)[place].lr, "cosine") for place in (19, 20, 21)),
        *((sweep(first)[place].lr, "constant") for place in (6, 7, 8)),
    }
    assert {config.seed for config in chosen} == {1, 2}
    # What diverges on another seed is no baseline: the next best is tried in its place.
    results.add(record(other_seed(sweep(first)[20], first, 2), math.inf))
    more = {config.key: config for config in refinements(first, results)}.keys() - {config.key for config in chosen}
    assert len(more) == 2  # one more configuration, on two seeds
    stages = dict(Study(rows, frozenset()).stages(results))
    assert stages["fixed baseline"] == []
    for place, config in enumerate(sweep(rows[1])):
        results.add(record(config, 1.0 + 0.1 * abs(place - 20)))
    stages = dict(Study(rows, frozenset()).stages(results))
    assert {(config.lr, config.schedule) for config in stages["fixed baseline"]} == {(SWEEP["SGD"][2], "cosine")}


def test_peers_that_are_not_installed_are_not_planned_but_named() -> None:
    study = Study(cells(CHEAP, DATA), frozenset())
    stages = dict(study.stages(Results()))
    assert stages["peers"] == stages["peers, other seeds"] == []
    text = page(Comparison(study, Results()), "command", {})
    assert text.count("**not installed**") == sum(each.package is not None for each in PEERS)


def test_tuning_covers_every_workload_with_the_code_in_its_key() -> None:
    plan = tuning(cells(BATTERY, DATA), {"period": 4})
    assert {(config.workload, config.base) for config in plan} == {(name, base) for name in BATTERY for base in BASES}
    assert all(config.options == {"code": code_fingerprint(), "period": 4} for config in plan)
    assert run(replace(plan[0], steps=2), DATA).error == ""


def test_patterns() -> None:
    config = tiny("gen", 1e-5)
    assert matches(config, None)
    assert matches(config, "beale sgd gen *")
    assert matches(config, "GEN linear")
    assert not matches(config, "adamw")


# --- the results file ------------------------------------------------------------------------------------------------


def test_a_record_survives_its_line() -> None:
    seen = record(tiny(), 0.125, error="a\nb")
    assert Record.from_line(seen.to_line()) == seen
    assert "\n" not in seen.to_line()


def test_a_torn_last_line_is_dropped_and_work_goes_on_behind_it(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    done, torn = record(tiny(lr=1e-3)), record(tiny(lr=1e-2))
    path.write_text(done.to_line() + "\n" + torn.to_line()[:50], "utf-8")
    results = results_file.read(path)
    assert (len(results), done.config in results) == (1, True)
    with results_file.writing(path) as writer:
        work(lambda _: [done.config, torn.config], results, writer, DATA, jobs=1)
    assert [Record.from_line(line).config for line in path.read_text().splitlines()] == [done.config, torn.config]


def test_a_last_line_without_its_end_counts(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(record(tiny(lr=1e-3)).to_line(), "utf-8")
    with results_file.writing(path) as writer:
        writer.write(record(tiny(lr=1e-2)))
    assert len(results_file.read(path)) == 2


def test_a_broken_line_in_the_middle_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text("{}\n" + record(tiny()).to_line() + "\n", "utf-8")
    with pytest.raises(ValueError, match="line 1"):
        results_file.read(path)


def test_there_is_one_writer(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    with results_file.writing(path), pytest.raises(RuntimeError, match="another battery"), results_file.writing(path):
        pass


def test_no_run_is_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 0

    def counted(config: Config, data: Data) -> Record:
        nonlocal count
        count += 1
        return record(config)

    monkeypatch.setattr("benchmarks.battery.runs.run", counted)
    plan = [tiny(lr=1e-3), tiny(lr=1e-2), tiny(lr=1e-3)]
    for _ in range(2):
        results = results_file.read(tmp_path / "results.jsonl")
        with results_file.writing(tmp_path / "results.jsonl") as writer:
            work(lambda _: plan, results, writer, DATA, jobs=1)
    assert count == 2


def test_no_run_is_started_after_the_budget(tmp_path: Path) -> None:
    results = Results()
    with results_file.writing(tmp_path / "results.jsonl") as writer:
        work(lambda _: [tiny()], results, writer, DATA, jobs=1, minutes=0.0)
    assert len(results) == 0


def test_processes_find_what_one_finds(tmp_path: Path) -> None:
    plan = [tiny(lr=1e-3), tiny(lr=1e-2)]
    found = []
    for jobs in (1, 2):
        results = Results()
        with results_file.writing(tmp_path / f"{jobs}.jsonl") as writer:
            work(lambda _: plan, results, writer, DATA, jobs=jobs)
        found.append([results.get(config) for config in plan])
    for one, two in zip(*found, strict=True):
        assert one is not None
        assert two is not None
        assert one.losses == two.losses


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_writes_a_report_resumes_and_reports_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(job.FOLDER_VARIABLE, raising=False)
    monkeypatch.setattr(job, "BATTERY", {"beale": replace(BATTERY["beale"], steps=20)})
    command = ["battery", "--output", str(tmp_path), "--jobs", "1"]
    with results_file.writing(tmp_path / "battery.jsonl") as writer:
        rows = cells({"beale": BATTERY["beale"]}, DATA, steps=20)
        writer.write(run(rows[1].config("bare", "linear", SWEEP["AdamW"][0], 0), DATA))
    main([*command, "--only", "AdamW bare linear"])
    assert len((tmp_path / "battery.jsonl").read_text("utf-8").splitlines()) == 9
    main([*command, "--report"])
    assert str(tmp_path / "battery.md") in capsys.readouterr().out
    assert str(tmp_path) not in (tmp_path / "battery.md").read_text("utf-8")
    assert {path.name for path in tmp_path.iterdir()} == {
        "battery.jsonl",
        "battery.md",
        "battery-ratios.png",
        "battery-learning-rates.png",
        "battery-losses.png",
    }
    main([*command, "--tune", "--set", "period=4", "--only", "SGD"])
    assert len(results_file.read(tmp_path / "battery-tune.jsonl")) == 4


def test_quick_covers_every_workload_and_leaves_no_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {config.workload for config in trial(cells(BATTERY, DATA, steps=2))} == set(BATTERY)
    monkeypatch.setattr(job, "BATTERY", CHEAP)
    main(["battery", "--quick", "--jobs", "1", "--output", str(tmp_path)])
    pictures = {f"battery-quick-{name}.png" for name in ("ratios", "learning-rates", "losses")}
    assert {path.name for path in tmp_path.iterdir()} == {"battery-quick.md", *pictures}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "/no/such/folder"], "must name a folder"),
        (["--jobs", "0"], "at least 1"),
        (["--set", "period=4"], "goes with --tune"),
    ],
)
def test_options_that_make_no_sense_are_refused(arguments: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=message):
        main(["battery", "--output", str(tmp_path), *arguments])


def test_the_command_on_the_page_names_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["x", "battery", "--data", "/a/b", "--output=/c", "--jobs", "2"])
    assert job._command().startswith("`python -m benchmarks battery --data DIR --jobs 2`")
