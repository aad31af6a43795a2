"""The report: tables of the known results, and of missing runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from benchmarks.battery import scores
from benchmarks.battery.comparison import Baseline, Comparison
from benchmarks.battery.config import GIVEN, SEEDS, Cell, Config
from benchmarks.battery.methods import METHODS, OURS, PEERS
from benchmarks.battery.number_formats import NOTHING, bottom_lines, named, number
from benchmarks.battery.records import Record, Results
from benchmarks.battery.summary import summary
from benchmarks.battery.tables import (
    baselines_table,
    main_table,
    peer_table,
    starts_table,
    tuned_loss,
    workloads_table,
)
from benchmarks.markdown import markdown_table


def page(known: Comparison, command: str, pictures: Mapping[str, str]) -> str:
    """Returns the whole report.

    Args:
        known: What the results say.
        command: What made it.
        pictures: File names by title.
    """
    parts = [
        "# The battery: without a learning rate, against a tuned one",
        command,
        _READING,
        "## Summary",
        summary(known),
        _is_partial(known),
        *(f"![{title}]({file})" for title, file in pictures.items()),
    ]
    for method in OURS:
        parts += [f"## {METHODS[method].title}, {METHODS[method].note}", main_table(known, method)]
    parts += ["## Our rules by initial learning rate, over tuned", starts_table(known)]
    for base in dict.fromkeys(cell.base for cell in known.study.cells):
        parts += [f"## Peers, over tuned {base}", peer_table(known, base)]
    parts += ["## Settings of the peers", _peer_notes(known), _errors(known)]
    parts += ["## Baselines", _fixed_note(known), baselines_table(known)]
    parts += ["## Workloads", workloads_table(known)]
    parts += ["## Still missing", missing_table(known.study.stages, known.results), _mixed_code(known)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _is_partial(known: Comparison) -> str:
    absent = sum(run not in known.results for _, runs in known.study.stages(known.results) for run in runs)
    return "**Runs are still missing; see the end.** A star marks what they may change." if absent else ""


def _peer_notes(known: Comparison) -> str:
    lines = []
    for each in PEERS:
        absent = "" if each.name in known.study.peers else ", **not installed**"
        source = "" if each.package is None else f" (`{each.package[0]}`{absent})"
        lines.append(f"- {each.title}{source}: {each.note}.")
    return "\n".join(lines)


def _fixed_note(known: Comparison) -> str:
    found = {cell.base: fixed.config for cell in known.study.cells if (fixed := known.fixed[cell]) is not None}
    if not found:
        return "The fixed baselines are not known before all sweeps are finished."
    return " ".join(
        f"Fixed baseline of {base}: learning rate {config.lr:g}, {config.schedule}." for base, config in found.items()
    )


def missing_table(stages: Callable[[Results], Iterable[tuple[str, list[Config]]]], results: Results) -> str:
    """Returns the table of runs that are missing, by stage.

    Args:
        stages: Returns names and runs of the stages of a study.
        results: The known results.
    """
    rows = []
    for name, configs in stages(results):
        distinct = {config.key: config for config in configs}
        absent = sum(config not in results for config in distinct.values())
        if not distinct:
            rows.append([name, "not known yet", ""])
        elif absent:
            rows.append([name, str(absent), str(len(distinct))])
    if not rows:
        return "Nothing: all runs are done."
    return markdown_table(["stage", "runs missing", "of"], rows)


def _mixed_code(known: Comparison) -> str:
    codes = Counter(
        record.code for cell in known.study.cells for method in OURS for record in known.records(cell, method)
    )
    if len(codes) < 2:
        return ""
    found = ", ".join(f"{code} ({count} runs)" for code, count in codes.items())
    return f"**Runs of ours come from {len(codes)} versions of the code**: {found}."


def _errors(known: Comparison) -> str:
    planned = {config.key for _, configs in known.study.stages(known.results) for config in configs}
    lines = {
        f"- {METHODS[record.config.method].title}, {record.config.workload}, {record.config.base}: {record.error}"
        for key, record in known.results.records.items()
        if key in planned and record.error
    }
    return "\n".join(["These runs raised an error and count as diverged:", "", *sorted(lines)]) if lines else ""


def tuning_table(known: Comparison, configs: Sequence[Config], results: Results) -> str:
    """Returns the table of runs of our rule on one seed, over those tuned baselines that are known.

    Args:
        known: The battery's results, for the baselines.
        configs: The runs.
        results: What is known of them.
    """
    columns = list(dict.fromkeys((config.schedule, config.lr) for config in configs))
    by_place = {(each.workload, each.base, each.schedule, each.lr): each for each in configs}
    rows = []
    ratios: dict[int, list[float]] = {place: [] for place in range(3, 3 + 2 * len(columns), 2)}
    for cell in known.study.cells:
        row = [cell.name, tuned_loss(known, cell)]
        for (schedule, lr), column in zip(columns, ratios.values(), strict=True):
            config = by_place.get((cell.workload.name, cell.base, schedule, lr))
            record = None if config is None else results.get(config)
            ratio = _ratio_on_its_seed(cell, record, known.tuned[cell], known.results)
            if ratio is not None:
                column.append(ratio)
            row += [_loss(record), NOTHING if ratio is None else number(ratio)]
        rows.append(row)
    head = ["workload, base", "tuned loss"]
    for schedule, lr in columns:
        head += [f"{named(schedule)} from {lr:g}", "ratio"]
    return markdown_table(head, [*rows, *bottom_lines(len(head), ratios)])


def _loss(record: Record | None) -> str:
    if record is None:
        return NOTHING
    return "diverged" if record.diverged else f"{record.validation_loss:.4g}"


def _ratio_on_its_seed(cell: Cell, record: Record | None, tuned: Baseline | None, baselines: Results) -> float | None:
    reference = None if tuned is None else baselines.get(tuned.config)
    if record is None or reference is None:
        return None
    return scores.ratio_of(scores.score(record, cell.workload), scores.score(reference, cell.workload))


_READING = f"""\
Ratios of final validation losses; lower is better, 1 is the tuned baseline. *Tuned*: the best of 27 runs of the bare
optimizer, nine learning rates × (constant, linear, cosine), swept on seed {SEEDS[0]}. The best three, the best three
constant ones (for each that diverges there, the next best too) and the fixed one are then run on seeds
{", ".join(map(str, SEEDS))}, and the lowest mean is it. *Best constant*: the lowest mean of the constant ones.
*Fixed*: the one configuration of the 27 that does best over all workloads together on seed {SEEDS[0]}, one for each
base optimizer. Our runs begin at learning rates {", ".join(f"{lr:g}" for lr in GIVEN)}, on the same seeds; a ratio is
their mean over the mean of the baseline on the same seeds, and *spread* the largest loss over the smallest over the
initial learning rates, the worst of seeds and schedules. All runs of a workload and a seed have the same initial
weights and batches. *We are ahead on*: each against our rule under the same schedule, or
at averaged weights if there is none.

Losses that approach zero (Rosenbrock, Beale, the quadratics, the physics-informed network) are compared with a floor:
{scores.FLOOR:g} of the initial loss is added above and below the line. A run diverged if a final loss is not finite
or above the initial one. A ratio counts as {scores.CAP:g} at most, and as that where one of its runs diverged, be
it one of twelve. A run stalled if it ends above {scores.STALL:g} times the tuned loss. A star: runs are still missing
there, the figure is provisional."""
