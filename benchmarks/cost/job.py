"""The job: measure, compare with the goals, write the page and the picture."""

from __future__ import annotations

import argparse
import math
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tqdm import tqdm

from benchmarks.command_line import add_output, command_line
from benchmarks.cost import growth
from benchmarks.cost.allocator import keeping_freed_memory
from benchmarks.cost.cases import BASES, CASES, Case
from benchmarks.cost.methods import FORWARDS, Bare, methods
from benchmarks.cost.times import LazyTimes, ProbeTimes, Sample, lazy, probes
from benchmarks.cost.traffic import extra_memory, traffic
from benchmarks.determinism import single_thread
from benchmarks.markdown import markdown_table

LAZY_GOAL = 25e-6
PROBE_GOAL, MOVES_GOAL, LOOP_GOAL = 1.10, 1.25, 1.15
MEMORY_GOALS = {"lookback": 1.02, "approximate": 2.02}
TRAFFIC_GOAL, LEAST_TRAFFIC = 1.3, 11
PERIOD = 8

_READING = """\
All ways take their steps in turns on the same model, after a round to warm up; figures are medians, with quartiles
where two more are given. **Extra** is what a probe step takes beyond the closure's call with gradients and the base
optimizer's step, both timed inside of that very step; looking back it is that of two steps, the one that keeps where it
began and the one that looks back. **Forwards** is the time of the forward passes that a mode cannot do without (looking
back one, approximate two), without gradients, timed between the steps. **And moves** adds the least copies: one clone,
and nine times the parameters in or out of memory, at the rates of this run. **Loop** is the extra of a whole period of
eight steps, computed from it and the lazy step of the first table (one tensor), over the same forward passes. Probes
are those of the published rule, which come at fixed intervals; a rule is arithmetic on a few numbers. The process keeps
the memory that it frees, as the caching allocators of GPUs do: pages that the system hands out anew cost more than the
copies in them. The transformer and the wide network take a third of the rounds, and three at least. **Peak
memory** is that of what torch's allocator hands out in these steps (by its profiler), above that of a bare step, over
the size of the parameters; **left behind** is there after them. **Traffic** counts, under a TorchDispatchMode and
without forward passes and base steps, how often the parameters' size goes into or comes out of an operation, over the
least: 11 (a clone, two; three moves, three each, or a swap, a way back and the slope). In brackets without temporaries
of small pieces, which stay in the cache; the goal is for these. Goals are for the first two modes. Batches are such
that forward passes dominate in the first three models; what smaller ones pay besides them is under growth."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Gives a parser the options of this job."""
    add_output(parser)
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="probe steps of each kind (%(default)s)")
    parser.add_argument("--only", choices=[*CASES, "lazy", "growth"], action="append", help="a part; may be repeated")
    parser.add_argument("--quick", action="store_true", help="small models only; fails on gross regressions")


@dataclass(frozen=True)
class Figures:
    """The measurements of a model.

    Attributes:
        case: The model.
        base: The name of the base optimizer.
        times: Times of its probe steps.
        memory: By method, the peak and what is left behind; empty if not measured.
        traffic: By mode, that of all tensors and that without small temporaries; empty if not measured.
    """

    case: Case
    base: str
    times: ProbeTimes
    memory: dict[str, tuple[float, float]]
    traffic: dict[str, tuple[float, float]]

    def over_forwards(self, mode: str) -> float:
        """Returns the extra time over that of the forward passes."""
        return self.times.extra[mode].median / (FORWARDS[mode] * self.times.forward.median)

    def over_least(self, mode: str) -> float:
        """Returns the extra time over that of the forward passes and the least copies."""
        least = FORWARDS[mode] * self.times.forward.median + self.times.least_moves
        return self.times.extra[mode].median / least

    def loop(self, mode: str, lazy_step: float) -> float:
        """Returns the extra time of a whole period over that of its forward passes."""
        rest = PERIOD - (2 if mode == "lookback" else 1)
        return (self.times.extra[mode].median + rest * lazy_step) / (FORWARDS[mode] * self.times.forward.median)


def run(options: argparse.Namespace) -> None:
    """Measures, prints the page and writes it with the picture; in short, fails on gross regressions."""
    if options.rounds < 1:
        raise SystemExit(f"--rounds must be at least 1, but is {options.rounds}")
    parts = options.only or (["mlp", "tiny", "lazy"] if options.quick else [*CASES, "lazy", "growth"])
    name = "-".join(["cost", *(["quick"] if options.quick else []), *(options.only or [])])
    options.output.mkdir(parents=True, exist_ok=True)
    with single_thread(), keeping_freed_memory():
        lazies = dict(_lazies(options.quick)) if "lazy" in parts else {}
        figures = [each for part in parts if part in CASES for each in _figures(part, options)]
        sections = [_head(), _lazy_section(lazies), *_sections(figures, lazies)]
        if "growth" in parts:
            sections.append(_growth_section(options, name))
    page = "\n\n".join(section for section in sections if section)
    path = options.output / f"{name}.md"
    path.write_text(page + "\n", "utf-8")
    print(f"{page}\n\ntable: {path}")
    if options.quick:
        _fail_on_regressions(figures, lazies)


# --- measuring -------------------------------------------------------------------------------------------------------


def _lazies(quick: bool) -> Iterator[tuple[str, list[LazyTimes]]]:
    counts = (1, 100) if quick else (1, 10, 100, 1000)
    for base in list(BASES)[: 1 if quick else None]:
        yield base, [lazy(BASES[base], count, 200 if count < 1000 else 100) for count in counts]


def _figures(part: str, options: argparse.Namespace) -> Iterator[Figures]:
    case = CASES[part]()
    is_slow = part in ("wide", "transformer")
    rounds = 5 if options.quick else max(3, options.rounds // 3) if is_slow else options.rounds
    bases = list(BASES)[: 1 if options.quick else None]
    if part == "wide":  # the moments of AdamW take much memory: once is enough
        bases.remove("AdamW, foreach")
    for base in tqdm(bases, desc=case.name, unit="base optimizer"):
        make = BASES[base]
        is_first = base == bases[0]  # nothing but time depends on the base optimizer
        exact = is_first and not options.quick and part != "wide"
        times = probes(case, make, rounds, exact=exact)
        makers = methods(case, make, exact=exact)
        memory = extra_memory(case, makers, Bare(case, make(case.parameters))) if is_first else {}
        flow = {mode: traffic(case, mode, make) for mode in FORWARDS} if is_first else {}
        yield Figures(case, base, times, memory, flow)


# --- telling ---------------------------------------------------------------------------------------------------------


def _head() -> str:
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    machine = f"{platform.machine()}, {_processor()}, {os.cpu_count()} cores"
    setting = f"{command_line()}, one CPU thread, {machine}, load average {load:.1f}"
    return f"# What it costs\n\n{setting}\n\n{_READING}"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:  # noqa: PTH123 - no file of this project's
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown processor"


def _verdict(value: float, goal: float) -> str:
    return "yes" if value <= goal else "**no**"


def _lazy_section(lazies: dict[str, list[LazyTimes]]) -> str:
    if not lazies:
        return ""
    rows = [
        [
            base,
            f"{each.tensors}",
            f"{1e6 * each.bare.median:.0f} µs",
            _micros(each.with_probe.median, *each.with_probe.quartiles),
            _micros(each.with_closure.median, *each.with_closure.quartiles),
            _lazy_verdict(each.with_probe, each.bare.median),
            _lazy_verdict(each.with_closure, each.bare.median),
        ]
        for base, times in lazies.items()
        for each in times
    ]
    head = ["base optimizer", "tensors", "bare step", "`step(probe=...)`", "`step(closure)`", "reached", "with closure"]
    what = (
        "What a lazy step takes more than the base optimizer's, of a loop that calls `backward()` itself and of one\n"
        "with a closure. The goal is 25 µs, or 1 % of the bare optimizer's step where that is more (stricter than\n"
        "1 % of a training step). Unclear: quartiles on both sides of it. A negative figure is noise."
    )
    return f"## Lazy steps\n\n{what}\n\n{markdown_table(head, rows)}"


def _lazy_verdict(overhead: Sample, bare: float) -> str:
    low, high = overhead.quartiles
    goal = max(LAZY_GOAL, 0.01 * bare)
    return "unclear" if low <= goal < high else _verdict(overhead.median, goal)


def _micros(*seconds: float) -> str:
    middle, low, high = (f"{1e6 * each:.0f}" for each in seconds)
    return f"{middle} µs ({low} to {high})"


def _sections(figures: Sequence[Figures], lazies: dict[str, list[LazyTimes]]) -> Iterator[str]:
    if not figures:
        return
    rows = [row for each in figures for row in _time_rows(each, lazies)]
    head = ["model", "base optimizer", "mode", "forwards", "extra", "over forwards", "and moves", "loop", "reached"]
    yield f"## Probe steps\n\n{markdown_table(head, rows)}"
    rows = [row for each in figures if each.memory for row in _size_rows(each)]
    head = ["model", "mode", "peak memory", "left behind", "reached", "traffic / 11", "reached"]
    yield f"## Memory and moves\n\n{markdown_table(head, rows)}"


def _time_rows(figures: Figures, lazies: dict[str, list[LazyTimes]]) -> Iterator[list[str]]:
    times, forward = figures.times, figures.times.forward.median
    lazy_step = lazies[figures.base][0].with_probe.median if lazies else math.nan
    for name, extra in times.extra.items():
        label = f"{figures.case.name}, {_millions(figures.case.size)}"
        row = [
            label,
            figures.base,
            name,
            f"{1e3 * FORWARDS.get(name, 2) * forward:.1f} ms",
            f"{1e3 * extra.median:.1f} ms",
        ]
        if name in FORWARDS:
            over, least = figures.over_forwards(name), figures.over_least(name)
            loop = f"{figures.loop(name, lazy_step):.2f}" if lazies else "-"
            low, high = (each / (FORWARDS[name] * forward) for each in extra.quartiles)
            reached = _verdict(least, MOVES_GOAL) if figures.case.bound == "copies" else _verdict(over, PROBE_GOAL)
            yield [*row, f"{over:.2f} ({low:.2f} to {high:.2f})", f"{least:.2f}", loop, reached]
        else:
            yield [*row, f"{extra.median / (2 * forward):.2f}", "", "", ""]


def _size_rows(figures: Figures) -> Iterator[list[str]]:
    for name, (peak, left) in figures.memory.items():
        row = [f"{figures.case.name}, {_millions(figures.case.size)}", name, f"{peak:.2f}", f"{abs(left):.2f}"]
        if name in FORWARDS:
            every, lasting = (each / LEAST_TRAFFIC for each in figures.traffic[name])
            moved = [f"{every:.2f} ({lasting:.2f})", _verdict(lasting, TRAFFIC_GOAL)]
            yield [*row, _verdict(peak, MEMORY_GOALS[name]), *moved]
        else:
            yield [*row, "", "", ""]


def _millions(size: int) -> str:
    return f"{size / 1e6:.2g} M" if size >= 1e5 else f"{size / 1e3:.0f} k"


def _growth_section(options: argparse.Namespace, name: str) -> str:
    base = "SGD, momentum"
    sizes = growth.SIZES[:3] if options.quick else growth.SIZES
    counts = growth.COUNTS[:3] if options.quick else growth.COUNTS
    by_size = list(growth.measure(BASES[base], [(size, 16) for size in sizes], 5))
    by_count = list(growth.measure(BASES[base], [(64 * count, count) for count in counts], 5))
    picture = options.output / f"{name}.png"
    growth.draw(by_size, by_count, picture)
    rows = [
        [f"{point.parameters:.0e}", f"{point.tensors}", *(f"{1e3 * each.median:.2f} ms" for each in point.seconds)]
        for point in (*by_size, *by_count)
    ]
    for points, what, least in ((by_size, "parameters", 10**6), (by_count, "tensors", 100)):
        large = [point for point in points if getattr(point, what) >= least]
        if len(large) > 1:
            sizes_of = [float(getattr(point, what)) for point in large]
            fits = [
                growth.slope(sizes_of, [point.seconds[line].median for point in large])
                for line in range(len(growth.LINES))
            ]
            rows.append([f"slope in {what}", f"from {least:.0e}", *(f"{fit:.2f}" for fit in fits)])
    table = markdown_table(["parameters", "tensors", *growth.LINES], rows)
    return f"## Growth\n\n{base}. Slopes are exponents: 1 is linear.\n\n![Cost over size]({picture.name})\n\n{table}"


def _fail_on_regressions(figures: Sequence[Figures], lazies: dict[str, list[LazyTimes]]) -> None:
    """Checks ratios against limits that are so far from the goals that a busy machine does not matter."""
    failures = []
    for each in figures:
        for mode in FORWARDS:
            checks = {
                "time over forward passes": (each.over_forwards(mode), 3.0 if each.case.bound == "forwards" else 40.0),
                "peak memory": (each.memory[mode][0], MEMORY_GOALS[mode] + 0.3),
                "traffic": (each.traffic[mode][0] / LEAST_TRAFFIC, 2.0),
            }
            failures += [
                f"{each.case.name}, {mode}: {what} {value:.2f} > {limit}"
                for what, (value, limit) in checks.items()
                if not value <= limit
            ]
    for base, times in lazies.items():
        first, *_, last = times
        if last.with_probe.median > 10 * first.with_probe.median + 0.5 * last.bare.median:
            failures.append(f"{base}: a lazy step's overhead grows with the number of tensors")
    if failures:
        raise SystemExit("\n".join(["gross regressions:", *failures]))
