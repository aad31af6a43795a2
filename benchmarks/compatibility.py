"""Optimizers of other packages, wrapped: which are accepted and train, which are refused, and which fail."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import pkgutil
import sys
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from tqdm import tqdm

from benchmarks.command_line import add_output, command_line
from benchmarks.determinism import single_thread
from benchmarks.markdown import markdown_table
from gen_optim import GeNOptimizer

STEPS = 200
LEARNED = 0.5
"""An optimizer trains if the last loss is below this part of the first one."""

Make = Callable[..., Optimizer]


@dataclass(frozen=True)
class Outcome:
    """What became of an optimizer.

    Attributes:
        kind: "trains", "does not train", "refused", "fails", or "not constructed".
        reason: Why it does not train; the loss that was reached if it does.
    """

    kind: str
    reason: str


KINDS = ("trains", "refused", "does not train", "fails", "not constructed")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Gives a parser the options of this job."""
    add_output(parser)
    parser.add_argument("--quick", action="store_true", help="5 steps of five optimizers per package; no table is kept")


def run(options: argparse.Namespace) -> None:
    """Tries all optimizers of the packages that are installed, prints the table and writes it."""
    found = {name: list(classes()) for name, classes in PACKAGES.items() if importlib.util.find_spec(name)}
    if options.quick:
        found = {name: classes[:5] for name, classes in found.items()}
    outcomes: dict[str, dict[str, Outcome]] = {}
    with single_thread(), tqdm(total=sum(map(len, found.values())), unit="optimizer") as progress:
        for package, classes in found.items():
            for each in classes:
                outcomes.setdefault(package, {})[each.__name__] = outcome_of(each, 5 if options.quick else STEPS)
                progress.update()
    text = page(outcomes)
    print(text)
    if not options.quick:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "compatibility.md").write_text(text + "\n", "utf-8")


def page(outcomes: dict[str, dict[str, Outcome]]) -> str:
    """Returns the page: counts by package, and the reason for each optimizer that does not train."""
    counts = {package: Counter(each.kind for each in those.values()) for package, those in outcomes.items()}
    head = [f"{DISTRIBUTIONS[package]} {version(DISTRIBUTIONS[package])}" for package in counts]
    rows = [[kind, *(str(count[kind]) for count in counts.values())] for kind in KINDS]
    about = (
        f"Each optimizer is wrapped, with default arguments, and trains a small classifier for {STEPS} steps. It "
        f"trains if the last loss is below {LEARNED} times the first. A learning rate that has no default is 1e-3."
    )
    parts = [
        f"# Optimizers of other packages\n\n{command_line()}, one CPU thread, one seed",
        about,
        markdown_table(["", *head], rows),
    ]
    for title, (package, those) in zip(head, outcomes.items(), strict=True):
        trained = ", ".join(name for name, each in those.items() if each.kind == "trains")
        others = [[name, f"{each.kind}: {each.reason}"] for name, each in those.items() if each.kind != "trains"]
        parts.append(f"## {title}\n\nAccepted, and train: {trained or 'none'}.")
        if others:
            parts.append(markdown_table([f"`{package}`", "what happens"], others))
    return "\n\n".join(parts)


# --- one optimizer ----------------------------------------------------------------------------------------------------


def outcome_of(make: Make, steps: int = STEPS) -> Outcome:
    """Wraps an optimizer, trains with it, and returns what became of it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            has_lr = inspect.signature(make).parameters.get("lr")
            needs_lr = has_lr is not None and has_lr.default is inspect.Parameter.empty
            base = make(list(model.parameters()), **({"lr": 1e-3} if needs_lr else {}))
        except Exception as error:  # noqa: BLE001 - it wants other arguments, or something else that is not here
            return Outcome("not constructed", _first_line(error))
        try:
            optimizer = GeNOptimizer(base)
        except Exception as error:  # noqa: BLE001
            is_meant = str(error).startswith(("base_optim must", "param_groups["))
            return (
                Outcome("refused", str(error).partition(". ")[0]) if is_meant else Outcome("fails", _first_line(error))
            )
        try:
            first, last = train(model, optimizer, steps)
        except Exception as error:  # noqa: BLE001 - that is what is to be seen
            return Outcome("fails", _first_line(error))
    return Outcome("trains" if last < LEARNED * first else "does not train", f"loss {first:.3g} to {last:.3g}")


def train(model: nn.Module, optimizer: Optimizer, steps: int) -> tuple[float, float]:
    """Trains a classifier of four overlapping clusters; returns the loss on all data before and after."""
    generator = torch.Generator().manual_seed(0)
    centers = 2.0 * torch.randn(4, 8, generator=generator)
    labels = torch.randint(4, (1024,), generator=generator)
    inputs = centers[labels] + torch.randn(1024, 8, generator=generator)
    # Optimizers that need second derivatives say so by name alone.
    needs_graph = type(getattr(optimizer, "base_optim", optimizer)).__name__ in ("AdaHessian", "Adahessian", "SophiaH")

    def loss_of(chosen: Tensor) -> Tensor:
        return cross_entropy(model(inputs[chosen]), labels[chosen])

    def whole() -> float:
        with torch.no_grad():
            return loss_of(torch.arange(1024)).item()

    first = whole()
    for _ in range(steps):
        chosen = torch.randint(1024, (64,), generator=generator)

        def closure(chosen: Tensor = chosen) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(chosen)
            loss.backward(create_graph=needs_graph)  # type: ignore[no-untyped-call]
            return loss

        optimizer.step(closure)  # type: ignore[arg-type]
    return first, whole()


def _first_line(error: BaseException) -> str:
    text = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {text[:150]}".replace("|", "\\|")


# --- the packages -----------------------------------------------------------------------------------------------------


def _classes(module: types.ModuleType, package: str) -> Iterator[type[Optimizer]]:
    """Yields the optimizers that a module shows and that its package defines."""
    for _, each in sorted(vars(module).items()):
        if inspect.isclass(each) and issubclass(each, Optimizer) and each.__module__.partition(".")[0] == package:
            yield each


def _plain(package: str) -> Iterator[type[Optimizer]]:
    yield from _classes(importlib.import_module(package), package)


def _heavyball() -> Iterator[type[Optimizer]]:
    """Its optimizers without compilation, which would take minutes for each."""
    vars(importlib.import_module("heavyball.utils"))["compile_mode"] = None
    yield from _plain("heavyball")


def _timm() -> Iterator[type[Optimizer]]:
    """The optimizers of timm alone: the package as a whole imports torchvision."""
    [folder] = importlib.util.find_spec("timm").submodule_search_locations  # type: ignore[union-attr,misc]
    for name, path in (("timm", Path(folder)), ("timm.optim", Path(folder) / "optim")):
        package = types.ModuleType(name)
        package.__path__ = [str(path)]
        sys.modules.setdefault(name, package)
    for each in pkgutil.iter_modules([str(Path(folder) / "optim")]):
        if not each.name.startswith(("_", "optim_factory")):
            module = importlib.import_module(f"timm.optim.{each.name}")
            yield from (found for found in _classes(module, "timm") if found.__module__ == module.__name__)


PACKAGES: dict[str, Callable[[], Iterator[type[Optimizer]]]] = {
    "pytorch_optimizer": partial(_plain, "pytorch_optimizer"),
    "timm": _timm,
    "torch_optimizer": partial(_plain, "torch_optimizer"),
    "optimi": partial(_plain, "optimi"),
    "heavyball": _heavyball,
}
DISTRIBUTIONS = {**{name: name.replace("_", "-") for name in PACKAGES}, "optimi": "torch-optimi"}
"""The distributions that hold the packages."""
