"""The command: ``python -m benchmarks battery``."""

from __future__ import annotations

import argparse
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Protocol

from benchmarks.battery import ablation, results_file
from benchmarks.battery.comparison import Comparison
from benchmarks.battery.config import Cell, Config, cells
from benchmarks.battery.long.report import LongComparison, groups, trial_table
from benchmarks.battery.long.report import page as long_page
from benchmarks.battery.long.report import summary as long_summary
from benchmarks.battery.long.study import LongStudy, quick_trial, trials
from benchmarks.battery.records import Results
from benchmarks.battery.report import page, tuning_table
from benchmarks.battery.study import Study, matches, trial, tuning
from benchmarks.battery.summary import summary
from benchmarks.battery.workers import work
from benchmarks.command_line import add_output, assignment, command_line
from benchmarks.data import Data
from benchmarks.workloads import BATTERY, LONG, Workload

FOLDER_VARIABLE = "GEN_OPTIM_DATA"
QUICK_STEPS = 16
_SHOWN = "long-text-transformer", "AdamW"
"""The cell of which a single run is drawn."""


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
        "--only", metavar="PATTERN", help='runs whose line fits, as in "digits-* AdamW gen *", with wildcards * and ?'
    )
    parser.add_argument("--budget", type=float, metavar="MINUTES", help="start no run after so long")
    parser.add_argument("--retry", action="store_true", help="repeat runs that ended in an error")
    parser.add_argument(
        "--long",
        action="store_true",
        help="long runs instead: networks at ten times the length with data that do not run out, and how many steps of "
        "a tuned run ours are worth. About 900 runs, four to five hours on two free cores with the real data; "
        "it resumes where it was interrupted",
    )
    parser.add_argument(
        "--held-out", action="store_true", help="with --long: our rule also on the workloads that are held out"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--report", action="store_true", help="write the report of the known results, and run nothing")
    what.add_argument(
        "--quick",
        action="store_true",
        help=f"a few runs of {QUICK_STEPS} steps, to see that all works; results in a temporary file",
    )
    what.add_argument(
        "--tune",
        action="store_true",
        help="only our own rule, on one seed, for work on the rule; with --long on the workloads that are not held out",
    )
    what.add_argument(
        "--ablation",
        action="store_true",
        help="the default rule with one mechanism switched off at a time, with and without a schedule; it resumes",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        type=assignment,
        metavar="NAME=VALUE",
        help="with --tune: an option of the rule that is not its default",
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
    if options.held_out and not options.long:
        raise SystemExit("--held-out goes with --long")
    data = Data(folder)
    options.output.mkdir(parents=True, exist_ok=True)
    battery = LongBattery(options, data) if options.long else ShortBattery(options, data)
    if options.ablation:
        battery.ablate()
    elif options.quick:
        battery.quick()
    elif options.tune:
        battery.tune()
    else:
        battery.run()


class AnyStudy(Protocol):
    """A plan of runs in stages."""

    @property
    def cells(self) -> Sequence[Cell]:
        """Workloads with base optimizers."""

    def stages(self, results: Results) -> Iterator[tuple[str, list[Config]]]:
        """Yields names and runs of the stages."""

    def count(self) -> int:
        """Returns the number of runs, about."""


class Battery(ABC):
    """The commands of a battery with the options of the command line.

    Args:
        options: The options.
        data: Loads the data sets.

    Attributes:
        stem: What file names begin with.
        workloads: The workloads.
    """

    stem: ClassVar[str]
    workloads: Mapping[str, Workload]

    def __init__(self, options: argparse.Namespace, data: Data) -> None:
        self.options, self.data = options, data

    @abstractmethod
    def study(self, cells: Sequence[Cell]) -> AnyStudy:
        """Returns the whole plan."""

    @abstractmethod
    def trial(self, cells: Sequence[Cell]) -> Sequence[Config]:
        """Returns the runs of the quick form."""

    @abstractmethod
    def tuning(self, cells: Sequence[Cell]) -> Sequence[Config]:
        """Returns the runs for work on the rule."""

    @abstractmethod
    def tuning_table(self, cells: Sequence[Cell], known: Results, plan: Sequence[Config], trials: Results) -> str:
        """Returns the table of runs for work on the rule.

        Args:
            cells: The cells of the runs.
            known: The battery's results, for the baselines.
            plan: The runs.
            trials: Their results.
        """

    @abstractmethod
    def write_report(self, cells: Sequence[Cell], results: Results, stem: str) -> None:
        """Writes tables and pictures."""

    def run(self) -> None:
        """Executes the runs that are missing and writes the report."""
        options = self.options
        path = options.output / f"{self.stem}.jsonl"
        results = results_file.read(path)
        rows = self._rows(results)
        study = self.study(rows)
        if not options.report:
            if options.retry:
                results.records = {key: record for key, record in results.records.items() if not record.error}

            def pending(known: Results) -> Sequence[Config]:
                return [each for _, configs in study.stages(known) for each in configs if matches(each, options.only)]

            total = study.count() if options.only is None else None
            with results_file.writing(path) as writer:
                work(pending, results, writer, self.data, jobs=options.jobs, total=total, minutes=options.budget)
        self.write_report(rows, results, self.stem)

    def quick(self) -> None:
        """Executes a few short runs and writes the report of them."""
        options = self.options
        rows = cells(self.workloads, self.data, steps=QUICK_STEPS)
        plan = [config for config in self.trial(rows) if matches(config, options.only)]
        results, stem = Results(), f"{self.stem}-quick"
        with tempfile.TemporaryDirectory() as folder:
            self._execute(plan, results, Path(folder) / f"{stem}.jsonl")
        self.write_report(rows, results, stem)

    def tune(self) -> None:
        """Executes runs of our own rule and prints a table of them."""
        options = self.options
        path = options.output / f"{self.stem}-tune.jsonl"
        results, known = results_file.read(path), results_file.read(options.output / f"{self.stem}.jsonl")
        rows = cells(self.workloads, self.data)
        plan = [config for config in self.tuning(rows) if matches(config, options.only)]
        self._execute(plan, results, path)
        chosen = {(config.workload, config.base) for config in plan}
        shown = [cell for cell in rows if (cell.workload.name, cell.base) in chosen]
        print(f"{self.tuning_table(shown, known, plan, results)}\n\n{_command()}")

    def ablate(self) -> None:
        """Executes the runs without one mechanism each that are missing, and writes the report of them.

        Workloads that are held out decide nothing, and are left out.
        """
        options = self.options
        path = options.output / f"{self.stem}-ablation.jsonl"
        results, known = results_file.read(path), results_file.read(options.output / f"{self.stem}.jsonl")
        rows = [cell for cell in cells(self.workloads, self.data) if not cell.workload.is_held_out]
        plan = [config for config in ablation.plan(rows) if matches(config, options.only)]
        self._execute(plan, results, path)
        both = Results({**known.records, **results.records})
        report = path.with_suffix(".md")
        report.write_text(ablation.page(rows, both, _command()), "utf-8")
        print(f"report:  {report}")

    def _execute(self, plan: Sequence[Config], results: Results, path: Path) -> None:
        """Executes those runs of a plan that are missing, and adds them to the results and their file."""
        with results_file.writing(path) as writer:
            work(lambda _: plan, results, writer, self.data, jobs=self.options.jobs, minutes=self.options.budget)

    def _rows(self, results: Results) -> list[Cell]:
        """The cells; a report alone takes the data that most results are of, whatever data there are."""
        rows = cells(self.workloads, self.data)
        if not self.options.report:
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


class ShortBattery(Battery):
    """The command ``battery``."""

    stem = "battery"

    def __init__(self, options: argparse.Namespace, data: Data) -> None:
        super().__init__(options, data)
        self.workloads = BATTERY

    def study(self, cells: Sequence[Cell]) -> Study:
        """Returns the whole plan."""
        return Study(cells)

    def trial(self, cells: Sequence[Cell]) -> Sequence[Config]:
        """Returns the runs of the quick form."""
        return trial(cells)

    def tuning(self, cells: Sequence[Cell]) -> Sequence[Config]:
        """Returns the runs for work on the rule."""
        return tuning(cells, dict(self.options.set))

    def tuning_table(self, cells: Sequence[Cell], known: Results, plan: Sequence[Config], trials: Results) -> str:
        """Returns the table of runs for work on the rule."""
        return tuning_table(Comparison(Study(cells), known), plan, trials)

    def write_report(self, cells: Sequence[Cell], results: Results, stem: str) -> None:
        """Writes tables and pictures."""
        write_report(Study(cells), results, self.options.output, stem)


class LongBattery(Battery):
    """The command ``battery --long``."""

    stem = "battery-long"

    def __init__(self, options: argparse.Namespace, data: Data) -> None:
        super().__init__(options, data)
        self.workloads = LONG

    def study(self, cells: Sequence[Cell]) -> LongStudy:
        """Returns the whole plan."""
        return LongStudy(cells, with_held_out=self.options.held_out)

    def trial(self, cells: Sequence[Cell]) -> Sequence[Config]:
        """Returns the runs of the quick form."""
        return quick_trial(cells)

    def tuning(self, cells: Sequence[Cell]) -> Sequence[Config]:
        """Returns the runs for work on the rule."""
        return trials(cells, dict(self.options.set))

    def tuning_table(self, cells: Sequence[Cell], known: Results, plan: Sequence[Config], trials: Results) -> str:
        """Returns the table of runs for work on the rule."""
        both = Results({**known.records, **trials.records})
        by_cell = {
            cell: [each for each in plan if (each.workload, each.base) == (cell.workload.name, cell.base)]
            for cell in cells
        }
        return trial_table(LongComparison(LongStudy(cells), both, lambda cell: by_cell[cell]))

    def write_report(self, cells: Sequence[Cell], results: Results, stem: str) -> None:
        """Writes tables and a picture."""
        from benchmarks.battery.long.pictures import draw, draw_run

        folder: Path = self.options.output
        known = LongComparison(self.study(cells), results)
        report, pictures = folder / f"{stem}.md", [folder / f"{stem}-run.png", folder / f"{stem}.png"]
        draw_run(
            known, next((cell for cell in cells if (cell.workload.name, cell.base) == _SHOWN), cells[0]), pictures[0]
        )
        draw(known, pictures[1])
        report.write_text(long_page(known, _command(), [picture.name for picture in pictures]), "utf-8")
        tables = [f"{title}\n\n{long_summary(known, group)}" for title, group in groups(known.study.cells).items()]
        shown = "\n".join(f"picture: {picture}" for picture in pictures)
        print("\n\n".join(tables) + f"\n\nreport:  {report}\n{shown}")


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
