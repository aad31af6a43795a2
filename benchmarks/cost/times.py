"""Times of lazy steps and of probe steps, taken in turns with what they are compared with, in one process."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.cost.cases import Case
from benchmarks.cost.methods import methods
from gen_optim import GeNOptimizer, RelaxedRule


@dataclass(frozen=True)
class Sample:
    """A time that was measured several times, in seconds.

    Attributes:
        values: One per round.
    """

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median."""
        return statistics.median(self.values)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The quartiles, between which half of the values are."""
        if len(self.values) < 2:
            return self.values[0], self.values[0]
        low, _, high = statistics.quantiles(self.values, n=4, method="inclusive")
        return low, high


def seconds(call: Callable[[], object]) -> float:
    """Returns the seconds that a call takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


@dataclass(frozen=True)
class LazyTimes:
    """What a lazy step takes beyond the base optimizer's step.

    Attributes:
        tensors: Number of parameters' tensors.
        bare: The base optimizer's step.
        with_probe: What ``step(probe=...)`` takes more, of a loop that calls ``backward()`` itself.
        with_closure: What ``step(closure)`` takes more, for a closure with a backward pass of its own.
    """

    tensors: int
    bare: Sample
    with_probe: Sample
    with_closure: Sample


def lazy(make: Callable[[list[nn.Parameter]], Optimizer], tensors: int, rounds: int) -> LazyTimes:
    """Takes lazy steps and bare ones in turns, with a closure that costs next to nothing.

    Args:
        make: Makes the base optimizer.
        tensors: Number of tensors, of 16 elements each.
        rounds: Steps of each kind.
    """

    def parameters() -> list[nn.Parameter]:
        made = [nn.Parameter(torch.zeros(16)) for _ in range(tensors)]
        for each in made:
            each.grad = torch.zeros(16)
        return made

    def closure_of(parameter: nn.Parameter) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            loss = parameter.sum()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        return closure

    theirs, mine = parameters(), parameters()
    bare, wrapped = make(theirs), GeNOptimizer(make(mine), rule=RelaxedRule(burn_in=0, period=10**9), average=False)
    bare_closure, closure = closure_of(theirs[0]), closure_of(mine[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the loss has no minimum
        wrapped.step(closure)
    rest = {name: [] for name in ("bare", "probe", "closure")}  # type: dict[str, list[float]]
    for index in range(rounds + 5):
        first = seconds(bare.step)
        second = seconds(lambda: wrapped.step(probe=closure))
        third = seconds(lambda: bare.step(bare_closure))  # type: ignore[arg-type]
        fourth = seconds(lambda: wrapped.step(closure))
        if index >= 5:
            rest["bare"].append(first)
            rest["probe"].append(second - first)
            rest["closure"].append(fourth - third)
    samples = (Sample(tuple(rest[name])) for name in ("bare", "probe", "closure"))
    return LazyTimes(tensors, *samples)


@dataclass(frozen=True)
class ProbeTimes:
    """What a probe step takes beyond a bare step.

    Attributes:
        bare: A bare training step.
        forward: A forward pass without gradients.
        clone: A copy of the parameters into new memory.
        copy: A copy of them into memory in use.
        extra: What each method spends on the learning rate.
    """

    bare: Sample
    forward: Sample
    clone: Sample
    copy: Sample
    extra: dict[str, Sample]

    @property
    def least_moves(self) -> float:
        """The least copies and moves: one clone, and nine times the parameters in or out of memory.

        That is three moves with two of them in and one out; or, looking back, a swap (two in, two out), a way back (one
        in, one out) and the slope (three in).
        """
        return self.clone.median + 9 / 2 * self.copy.median


def probes(case: Case, make: Callable[[list[nn.Parameter]], Optimizer], rounds: int, *, exact: bool) -> ProbeTimes:
    """Takes probe steps of each kind in turns.

    Args:
        case: What to train; all share the model.
        make: Makes the base optimizer.
        rounds: Probe steps of each kind.
        exact: Whether to include exact modes.
    """

    def forward() -> None:
        with torch.no_grad():
            case.loss()

    used = [each.detach().clone() for each in case.parameters]

    def copy() -> None:
        for target, source in zip(used, case.parameters, strict=True):
            target.copy_(source.detach())

    def clone() -> None:
        [each.detach().clone() for each in case.parameters]

    base = make(case.parameters)

    def bare() -> None:
        base.zero_grad()
        case.loss().backward()  # type: ignore[no-untyped-call]
        base.step()

    compared = {"bare": bare, "forward": forward, "clone": clone, "copy": copy}
    ready = {name: begin() for name, begin in methods(case, make, exact=exact).items()}
    taken: dict[str, list[float]] = {name: [] for name in (*compared, *ready)}
    for index in range(rounds + 1):  # the first to warm up
        for name, method in ready.items():
            extra = method.period()
            if index:
                taken[name].append(extra)
                taken["forward"].append(seconds(forward))  # next to each
        for name, call in compared.items():
            took = seconds(call)
            if index:
                taken[name].append(took)
    samples = {name: Sample(tuple(values)) for name, values in taken.items()}
    bare_step, no_grad, new, old = (samples[name] for name in compared)
    return ProbeTimes(bare_step, no_grad, new, old, {name: samples[name] for name in ready})
