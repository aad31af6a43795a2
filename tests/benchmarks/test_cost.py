"""What steps cost in memory and in moves of parameters, and that lazy steps do not look at every parameter."""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from benchmarks.__main__ import main
from benchmarks.cost.cases import BASES, Case
from benchmarks.cost.growth import slope
from benchmarks.cost.job import Figures
from benchmarks.cost.methods import FORWARDS, Bare, Wrapped, methods
from benchmarks.cost.times import ProbeTimes, Sample, lazy, probes
from benchmarks.cost.traffic import extra_memory, traffic
from gen_optim import GeNOptimizer

SGD_BASE = BASES["SGD, momentum"]


def large(width: int = 1024) -> Case:
    """Large next to its activations, so that a copy of the parameters shows in the peak."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4))
    return Case("large", model, torch.randn(2, width), torch.tensor([0, 1]))


@pytest.mark.parametrize(("mode", "copies"), [("lookback", 1.05), ("approximate", 2.05)])
def test_a_probe_step_takes_as_many_copies_as_it_must_and_leaves_none(mode: str, copies: float) -> None:
    case = large()
    makers = {mode: methods(case, SGD_BASE, exact=False)[mode]}
    peak, left = extra_memory(case, makers, Bare(case, SGD_BASE(case.parameters)))[mode]
    assert copies - 0.15 < peak < copies
    assert abs(left) < 0.01


@pytest.mark.parametrize("mode", FORWARDS)
def test_parameters_go_through_few_operations(mode: str) -> None:
    every, lasting = traffic(large(), mode, SGD_BASE)
    assert 8 < lasting < 1.3 * 11
    assert lasting <= every < 1.5 * 11


def test_looking_back_twice_in_a_row_takes_no_new_copy() -> None:
    case = large(64)
    optimizer = GeNOptimizer(SGD_BASE(case.parameters), rule="published", period=1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = case.loss()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    def addresses() -> list[int]:
        return [each["gen_start"].data_ptr() for each in optimizer.state_dict()["state"].values()]

    optimizer.step(closure)
    first = addresses()
    for _ in range(3):
        began = [each.detach().clone() for each in case.parameters]
        optimizer.step(closure)
        assert addresses() == first
        saved = [each["gen_start"] for each in optimizer.state_dict()["state"].values()]
        assert all(map(torch.equal, saved, began))


def test_a_step_does_not_keep_old_gradients_while_new_ones_are_computed() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = GeNOptimizer(SGD([weight], lr=0.1), rule="published", period=100)
    old: list[weakref.ref[Tensor]] = []
    alive: list[bool] = []

    def closure() -> Tensor:
        old.extend([] if weight.grad is None else [weakref.ref(weight.grad)])
        optimizer.zero_grad()
        alive.extend(each() is not None for each in old[-1:])
        loss = (weight**2).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    for _ in range(5):
        optimizer.step(closure)
    gc.collect()
    assert len(alive) >= 4
    assert not any(alive)


class _Counting(list[Any]):
    """Parameters that count how many of them are looked at."""

    looked = 0

    def __iter__(self) -> Any:
        for each in super().__iter__():
            self.looked += 1
            yield each


@pytest.mark.parametrize("mode", FORWARDS)
def test_a_lazy_step_looks_at_one_parameter_whatever_their_number(mode: str) -> None:
    weights = [nn.Parameter(torch.ones(2)) for _ in range(50)]

    class Quiet(SGD):
        def step(self, closure: Any = None) -> None:
            """Nothing, so that what is looked at is GeN's."""

    optimizer = GeNOptimizer(Quiet(weights, lr=0.1), mode=mode, rule="published", period=100, average=False)

    def closure() -> Tensor:
        for each in weights:
            each.grad = None
        loss = torch.stack(weights).square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    for _ in range(3):
        optimizer.step(closure)
    counted = optimizer.param_groups[0]["params"] = _Counting(weights)
    optimizer.step(closure)
    assert 1 <= counted.looked <= 4


def test_overhead_of_lazy_steps_does_not_grow_with_the_number_of_tensors() -> None:
    def grows() -> bool:
        few, many = lazy(SGD_BASE, 1, 40), lazy(SGD_BASE, 300, 40)
        # In microseconds it does grow a little, since the base optimizer's step empties the cache.
        return many.with_probe.median > 5 * few.with_probe.median + 0.2 * many.bare.median

    # A machine that is busy with something else can look like growth once, but what does grow does so each time.
    assert not all(grows() for _ in range(3))


def test_a_lazy_step_takes_time() -> None:
    times = lazy(SGD_BASE, 1, 40)
    assert 0.0 < times.with_probe.median < times.with_closure.median


def test_probe_times_are_those_of_all_ways() -> None:
    case = large(32)
    times = probes(case, SGD_BASE, 1, exact=True)
    assert {*FORWARDS, "exact"} <= set(times.extra)
    assert all(each.median > 0.0 for each in (times.bare, times.forward, times.clone, times.copy))


def test_figures_are_over_forward_passes_moves_and_a_whole_period() -> None:
    middle, clone, copy, lookback, approximate = (Sample((each,)) for each in (2.0, 3.0, 0.4, 2.2, 5.0))
    times = ProbeTimes(middle, middle, clone, copy, {"lookback": lookback, "approximate": approximate})
    figures = Figures(large(8), "SGD, momentum", times, {}, {})
    assert times.least_moves == pytest.approx(3.0 + 4.5 * 0.4)
    assert figures.over_forwards("lookback") == pytest.approx(1.1)
    assert figures.over_forwards("approximate") == pytest.approx(1.25)  # of two passes
    assert figures.over_least("lookback") == pytest.approx(2.2 / 6.8)
    assert figures.loop("lookback", 0.1) == pytest.approx((2.2 + 6 * 0.1) / 2.0)
    assert figures.loop("approximate", 0.1) == pytest.approx((5.0 + 7 * 0.1) / 4.0)


def test_a_part_of_the_measurement_has_a_page_of_its_own(tmp_path: Path) -> None:
    main(["cost", "--only", "lazy", "--quick", "--output", str(tmp_path)])
    assert [each.name for each in tmp_path.iterdir()] == ["cost-quick-lazy.md"]
    with pytest.raises(SystemExit, match="--rounds must be at least 1"):
        main(["cost", "--rounds", "0", "--output", str(tmp_path)])


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
def test_memory_that_is_freed_is_not_asked_for_again() -> None:
    program = """
import resource, torch
from benchmarks.cost.allocator import keeping_freed_memory
size = 1 << 24  # of float32: above what glibc keeps by itself
with keeping_freed_memory():
    for _ in range(40):  # the aligned block that is asked for does not fit into its predecessor at once
        torch.ones(size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(size)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
assert faults < 0.1 * 4 * size / resource.getpagesize(), faults
"""
    subprocess.run([sys.executable, "-c", program], check=True)  # glibc heeds it on the main thread alone


def test_what_is_not_the_learning_rates_does_not_count() -> None:
    case = large(32)
    seen: list[bool] = []
    method = Wrapped(case, SGD_BASE(case.parameters), "approximate", counts_forwards=False)
    method.on_others = seen.append
    assert method.period() > 0.0
    assert seen == [True, False] * 4  # the closure with gradients, the base's step, two probes


def test_slope_is_the_exponent() -> None:
    assert slope([1.0, 10.0, 100.0], [3.0, 30.0, 300.0]) == pytest.approx(1.0)
    assert slope([1.0, 10.0, 100.0], [2.0, 200.0, 20000.0]) == pytest.approx(2.0)
