"""The command: ``python -m benchmarks battery``."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.battery import storing
from benchmarks.battery.comparing import Comparison
from benchmarks.battery.config import Cell, Config, cells
from benchmarks.battery.data import Data
from benchmarks.battery.record import Results
from benchmarks.battery.report import page, tuning_table
from benchmarks.battery.study import Study, matches, trial, tuning
from benchmarks.battery.summary import summary
from benchmarks.battery.working import work
from benchmarks.battery.workloads import WORKLOADS
from benchmarks.command import add_output, assignment, command_line

FOLDER_VARIABLE = "GEN_OPTIM_DATA"
QUICK_STEPS = 16


def add_options(parser: argparse.ArgumentParser) -> None:
    """Gives a parser the options of this job."""
    add_output(parser)
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="a folder with cifar10k.npz and tinyshakespeare.txt, for real images and text "
        f"(default: the environment variable {FOLDER_VARIABLE}, else data that dependencies embed)",
    )
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes (default: %(default)s)")
    parser.add_argument(
        "--only", metavar="PATTERN", help='runs whose line fits, as in "digits-* AdamW gen *"; * and ? stand for others'
    )
    parser.add_argument("--budget", type=float, metavar="MINUTES", help="start no run after so long")
    parser.add_argument("--retry", action="store_true", help="repeat runs that ended in an error")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--report", action="store_true", help="write the report of what is known, and run nothing")
    what.add_argument(
        "--quick",
        action="store_true",
        help=f"{QUICK_STEPS} steps of every workload with little, to see that all works; results in a temporary file",
    )
    what.add_argument("--tune", action="store_true", help="only our own rule, on one seed, for work on the rule")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        type=assignment,
        metavar="NAME=VALUE",
        help="with --tune: an argument of GeNOptimizer that is not its default",
    )


def run(options: argparse.Namespace) -> None:
    """Does what the options ask for."""
    folder = options.data or (Path(os.environ[FOLDER_VARIABLE]) if os.environ.get(FOLDER_VARIABLE) else None)
    if folder is not None and not folder.is_dir():
        raise SystemExit(f"--data or {FOLDER_VARIABLE} must name a folder, but there is none at {folder}")
    if options.jobs < 1:
        raise SystemExit(f"--jobs must be at least 1, but is {options.jobs}")
    if options.set and not options.tune:
        raise SystemExit("--set goes with --tune")
    data = Data(folder)
    options.output.mkdir(parents=True, exist_ok=True)
    if options.quick:
        _quick(options, data)
    elif options.tune:
        _tune(options, data)
    else:
        _battery(options, data)


def _battery(options: argparse.Namespace, data: Data) -> None:
    path = options.output / "battery.jsonl"
    results = storing.read(path)
    study = Study(_rows(data, results, report_only=options.report))
    if not options.report:
        if options.retry:
            results.records = {key: record for key, record in results.records.items() if not record.error}

        def pending(known: Results) -> Sequence[Config]:
            return [config for _, configs in study.stages(known) for config in configs if matches(config, options.only)]

        total = study.count() if options.only is None else None
        with storing.writing(path) as writer:
            work(pending, results, writer, data, jobs=options.jobs, total=total, minutes=options.budget)
    write_report(study, results, options.output, "battery")


def _rows(data: Data, results: Results, *, report_only: bool) -> list[Cell]:
    """The battery's cells; a report alone takes the data that most results are of, whatever data are at hand."""
    rows = cells(WORKLOADS, data)
    if not report_only:
        return rows
    counts: dict[tuple[str, str], int] = {}
    for record in results.records.values():
        place = record.config.workload, record.config.source
        counts[place] = counts.get(place, 0) + 1
    chosen = []
    for cell in rows:
        sources = {source: count for (name, source), count in counts.items() if name == cell.workload.name}
        source = max(sources, key=lambda each: sources[each], default=cell.source)
        chosen.append(Cell(cell.workload, cell.base, source, cell.steps))
    return chosen


def _quick(options: argparse.Namespace, data: Data) -> None:
    rows = cells(WORKLOADS, data, steps=QUICK_STEPS)
    plan = [config for config in trial(rows) if matches(config, options.only)]
    results = Results()
    with tempfile.TemporaryDirectory() as folder, storing.writing(Path(folder) / "battery-quick.jsonl") as writer:
        work(lambda _: plan, results, writer, data, jobs=options.jobs, minutes=options.budget)
    write_report(Study(rows), results, options.output, "battery-quick")


def _tune(options: argparse.Namespace, data: Data) -> None:
    path = options.output / "battery-tune.jsonl"
    results, known = storing.read(path), storing.read(options.output / "battery.jsonl")
    rows = cells(WORKLOADS, data)
    plan = [config for config in tuning(rows, dict(options.set)) if matches(config, options.only)]
    with storing.writing(path) as writer:
        work(lambda _: plan, results, writer, data, jobs=options.jobs, minutes=options.budget)
    chosen = {(config.workload, config.base) for config in plan}
    study = Study([cell for cell in rows if (cell.workload.name, cell.base) in chosen])
    print(f"{tuning_table(Comparison(study, known), plan, results)}\n\n{_command()}")


def write_report(study: Study, results: Results, folder: Path, stem: str) -> None:
    """Writes tables and pictures.

    Args:
        study: Which runs there are.
        results: What is known.
        folder: Where to write.
        stem: What file names begin with.
    """
    from benchmarks.battery.pictures import draw

    known = Comparison(study, results)
    pictures = draw(known, folder, stem)
    file = folder / f"{stem}.md"
    file.write_text(page(known, _command(), pictures), "utf-8")
    print(f"{summary(known)}\n\nreport:  {file}")
    for picture in pictures.values():
        print(f"picture: {folder / picture}")


def _command() -> str:
    return f"{command_line()}, one CPU thread a run"
