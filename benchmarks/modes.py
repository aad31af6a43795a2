"""What a probe step costs in each mode, next to a plain training step, at three sizes of a transformer."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.optim import AdamW, Optimizer
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from benchmarks import text
from benchmarks.command import add_output, command_line, markdown_table
from benchmarks.training import single_thread
from gen_optim import GeNOptimizer
from gen_optim.directional import derivatives_along
from gen_optim.measuring import MODES, Line, Measurement, Mode
from gen_optim.quadratic import Parabola

SIZES = {"small": (64, 2), "medium": (192, 4), "large": (384, 6)}
"""Width and number of blocks."""

BATCH = 8

_READING = """\
Time: the median over rounds, in each of which every way takes one step, so that all meet the same machine. Memory: the
peak of what torch's allocator hands out during one step beyond parameters and the optimizer's state; gradients
count."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Gives a parser the options of this job."""
    add_output(parser)
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="steps of each kind (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="the small model alone, one round")


def run(options: argparse.Namespace) -> None:
    """Measures, prints the table and writes it."""
    sizes = ["small"] if options.quick else list(SIZES)
    rows = [row for size in sizes for row in measure(size, 1 if options.quick else options.rounds)]
    head = ["model", "step", "time", "over plain", "peak memory", "over plain"]
    page = "\n\n".join(
        [
            "# A probe step in each mode",
            f"{command_line()}, one CPU thread, batches of {BATCH} excerpts of {text.CONTEXT} characters",
            _READING,
            markdown_table(head, rows),
        ]
    )
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"modes{'-quick' if options.quick else ''}.md"
    path.write_text(page + "\n", "utf-8")
    print(f"{page}\n\ntable: {path}")


def measure(size: str, rounds: int) -> list[list[str]]:
    """Takes steps of every kind with one size of model.

    Args:
        size: A name in ``SIZES``.
        rounds: How often each.

    Returns:
        Rows of the table.
    """
    width, layers = SIZES[size]
    train, _ = text.load()
    torch.manual_seed(0)
    model = text.Transformer(train.alphabet, width=width, layers=layers)
    characters, following = next(text.batches(train, BATCH, seed=0))

    def loss_of(params: dict[str, Tensor]) -> Tensor:
        return cross_entropy(functional_call(model, params, characters).flatten(0, 1), following.flatten())

    def without_graph(line: Line) -> Measurement:
        line.move.write(0.0)
        names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
        steps = {names[parameter]: step for parameter, step in zip(*line.move.step(), strict=True)}
        found = derivatives_along(loss_of, dict(model.named_parameters()), steps, method="graph_free")
        value, slope, curvature = line.read(list(found))
        parabola = Parabola(value, slope / line.lr, curvature / line.lr / line.lr)
        return Measurement((0.0,), (value,), found.value, value, parabola)

    MODES["graph-free"] = Mode(without_graph)
    kinds: dict[str, Callable[[], Optimizer]] = {
        "plain": lambda: AdamW(model.parameters()),
        "approximate (2 probes)": lambda: _probing(model, "approximate"),
        "exact, double backward": lambda: _probing(model, "exact"),
        "exact, graph-free": lambda: _probing(model, "graph-free"),
    }
    steps = {
        name: _step(make(), model, lambda: loss_of(dict(model.named_parameters()))) for name, make in kinds.items()
    }
    with single_thread():
        for warm_up in steps.values():
            warm_up()
        times: dict[str, list[float]] = {name: [] for name in steps}
        for _ in tqdm(range(rounds), desc=f"{size} model", unit="round"):
            for name, step in steps.items():
                began = time.perf_counter()
                step()
                times[name].append(time.perf_counter() - began)
        memory = {name: _peak(step, model) for name, step in steps.items()}
    del MODES["graph-free"]
    count = sum(parameter.numel() for parameter in model.parameters())
    return [
        [
            f"{size}, {count / 1e6:.2g} M parameters",
            name,
            f"{1e3 * statistics.median(times[name]):.0f} ms",
            f"{statistics.median(times[name]) / statistics.median(times['plain']):.2f}",
            f"{memory[name] / 2**20:.0f} MiB",
            f"{memory[name] / memory['plain']:.2f}",
        ]
        for name in steps
    ]


def _probing(model: nn.Module, mode: str) -> Optimizer:
    return GeNOptimizer(AdamW(model.parameters()), mode=mode, rule="published", period=1)


def _step(optimizer: Optimizer, model: nn.Module, loss_of: Callable[[], Tensor]) -> Callable[[], None]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    def step() -> None:
        model.zero_grad()
        optimizer.step(closure)  # type: ignore[arg-type]

    return step


def _peak(step: Callable[[], None], model: nn.Module) -> int:
    """The most bytes that one step holds beyond what was there before; gradients are its own."""
    model.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    results = profiler.profiler.kineto_results
    changes = sorted((event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak
