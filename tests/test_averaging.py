"""Averaged weights: the average itself, the swap, checkpoints, and torch's own AveragedModel."""

from __future__ import annotations

import copy
import gc
import io
import math
import pickle
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.functional import mse_loss
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel
from torch.overrides import TorchFunctionMode

from gen_optim import GeNOptimizer, RelaxedRule, averaging
from gen_optim.averaging import AveragedWeights, multi_power_average, power_average, refreshed_batch_norm
from tests import averaging_jobs
from tests.test_checkpoints import RESUMES
from tests.training import Training as GeNTraining
from tests.training import gen_adamw, gen_sgd, mlp, parameters_of, same, wrapped
from tests.workers import Pool

BASES: dict[str, Callable[[Any], Optimizer]] = {
    "adamw": lambda parameters: AdamW(parameters, lr=0.01),
    "sgd": lambda parameters: SGD(parameters, lr=0.1),
    "momentum": lambda parameters: SGD(parameters, lr=0.1, momentum=0.9),
}


class Walk:
    """Parameters that an optimizer moves at random, with their average and where they have been."""

    def __init__(self, *parameters: Tensor, make: str = "sgd", seed: int = 0, **options: Any) -> None:
        self.parameters = [nn.Parameter(each) if not isinstance(each, nn.Parameter) else each for each in parameters]
        self.optimizer = BASES[make](self.parameters)
        self.weights = AveragedWeights(self.optimizer, **options)
        self.generator = torch.Generator().manual_seed(seed)
        self.visited: list[list[Tensor]] = []

    def go(self, steps: int) -> Walk:
        for _ in range(steps):
            for each in self.parameters:
                if each.requires_grad:
                    each.grad = torch.randn(each.shape, generator=self.generator, dtype=torch.float64).to(each.dtype)
            self.optimizer.step()
            self.weights.update()
            self.visited.append(parameters_of(nn.ParameterList(self.parameters)))
        return self

    def average(self, index: int = 0) -> Tensor:
        return self.optimizer.state[self.parameters[index]]["gen_average"]

    def oracle(self, index: int = 0, every: int = 4, exponent: float = 16.0) -> Tensor:
        """The k-th of n updates weighs (k^p − (k − 1)^p) / n^p."""
        points = [point[index].to(torch.promote_types(point[index].dtype, torch.float64)) for point in self.visited]
        points = points[every - 1 :: every]
        n = len(points)
        terms = [((k / n) ** exponent - ((k - 1) / n) ** exponent) * points[k - 1] for k in range(1, n + 1)]
        return torch.stack(terms).sum(dim=0)


def values_inside(walk: Walk) -> list[Tensor]:
    with walk.weights.swapped():
        return [each.detach().clone() for each in walk.parameters]


# --- the excess loss --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("on_host", [False, True])
def test_the_excess_loss_over_an_average_at_the_minimum_is_exact(dtype: torch.dtype, on_host: bool) -> None:
    walk = Walk(torch.randn(5, dtype=dtype), torch.randn(3, 2, dtype=dtype), on_host=on_host).go(20)
    curvatures = [torch.rand(5), torch.rand(3, 2)]
    loss = torch.zeros((), dtype=torch.float64)
    for parameter, average, curvature in zip(walk.parameters, map(walk.average, (0, 1)), curvatures, strict=True):
        distance = parameter.detach().double() - average.double()
        loss += 0.5 * (curvature * distance**2).sum()
        parameter.grad = (curvature * distance).to(dtype)
    excess = walk.weights.excess_loss()
    assert excess.item() == pytest.approx(loss.item(), rel=1e-5 if dtype is not torch.bfloat16 else 1e-2)


def test_the_excess_loss_is_unknown_before_the_first_update_and_counts_no_parameter_without_a_gradient() -> None:
    walk = Walk(torch.randn(4), torch.randn(4))
    assert math.isnan(walk.go(3).weights.excess_loss())
    first, second = walk.go(9).parameters
    assert first.grad is not None
    second.grad = None
    expected = 0.5 * (first.grad * (first - walk.average())).sum().item()
    excess = walk.weights.excess_loss()
    assert excess.item() == pytest.approx(expected, rel=1e-5)


# --- the average ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64])
@pytest.mark.parametrize(("every", "exponent"), [(4, 16.0), (1, 3.0)])
def test_it_is_the_weighted_sum_of_where_the_parameters_have_been(
    make: str, dtype: torch.dtype, every: int, exponent: float
) -> None:
    walk = Walk(torch.randn(7, 5).to(dtype), torch.randn(()).to(dtype), make=make, every=every, exponent=exponent)
    walk.go(84)
    expected_dtype = torch.float32 if dtype.itemsize == 2 else dtype
    for index in range(2):
        assert walk.average(index).dtype == expected_dtype
        error = (walk.average(index) - walk.oracle(index, every, exponent)).abs().max()
        assert error < (1e-13 if dtype == torch.float64 else 2e-6)
    assert walk.weights.updates == 84 // every


def test_the_window_is_the_last_sixteenth_of_a_run_of_any_length() -> None:
    for steps in (400, 4000):
        walk = Walk(torch.zeros(()), every=1)
        walk.parameters[0].requires_grad_(True)
        ages = []
        for _ in range(steps):
            walk.parameters[0].grad = torch.tensor(-10.0)  # one a step
            walk.optimizer.step()
            walk.weights.update()
            ages.append(walk.parameters[0].item() - walk.average().item())
        assert ages[-1] / steps == pytest.approx(1 / 17, rel=0.05)


def test_increments_of_half_precision_are_not_rounded_away() -> None:
    walk = Walk(torch.full((1000,), 1.0, dtype=torch.bfloat16), every=1)
    walk.go(200)
    torch.testing.assert_close(walk.average().double(), walk.oracle(every=1), rtol=1e-6, atol=1e-6)
    [inside] = values_inside(walk)
    assert inside.dtype == torch.bfloat16
    assert torch.equal(inside, walk.average().to(torch.bfloat16))


def test_many_tensors_of_all_sizes_and_dtypes_at_once() -> None:
    sizes = [0, 1, 3, 40_000, 300_000, 2]
    tensors = [torch.randn(size).to(dtype) for size in sizes for dtype in (torch.float32, torch.bfloat16)]
    walk = Walk(*tensors, every=1).go(5)
    for index in range(len(tensors)):
        torch.testing.assert_close(walk.average(index).double(), walk.oracle(index, 1), rtol=1e-5, atol=1e-5)
    before = [each.detach().clone() for each in walk.parameters]
    inside = values_inside(walk)
    for index in range(len(tensors)):
        assert torch.equal(inside[index], walk.average(index).to(inside[index].dtype))
    assert same(before, [each.detach() for each in walk.parameters])


@pytest.mark.parametrize(
    "parameter",
    [
        torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last),
        torch.randn(300, 500).t(),
        torch.randn(600, 700)[::2, ::3],
    ],
    ids=["channels_last", "transposed", "strided"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_layouts(parameter: Tensor, dtype: torch.dtype) -> None:
    parameter = parameter.to(dtype) if dtype != parameter.dtype else parameter
    walk = Walk(parameter.detach(), every=1).go(6)
    torch.testing.assert_close(walk.average().double(), walk.oracle(every=1), rtol=1e-5, atol=1e-5)
    strides = walk.parameters[0].stride()
    before = walk.parameters[0].detach().clone()
    assert torch.equal(values_inside(walk)[0], walk.average().to(dtype))
    assert torch.equal(before, walk.parameters[0])
    assert walk.parameters[0].stride() == strides


def test_frozen_parameters_have_no_average_until_they_are_trained() -> None:
    walk = Walk(torch.zeros(3), torch.zeros(3), make="adamw")
    walk.parameters[1].requires_grad_(False)
    walk.go(8)
    assert not walk.optimizer.state.get(walk.parameters[1])
    walk.parameters[1].requires_grad_(True)
    walk.go(8)
    torch.testing.assert_close(walk.average(0).double(), walk.oracle(0))
    assert walk.average(1).abs().max() > 0.0
    walk.parameters[0].requires_grad_(False)  # as the closures of two networks do that train against each other
    walk.parameters[0].grad = None
    walk.go(8)
    torch.testing.assert_close(walk.average(0).double(), walk.oracle(0))


@pytest.mark.parametrize("make", BASES)
def test_the_base_can_still_initialize_the_state_of_a_parameter_without_gradients_so_far(make: str) -> None:
    used, unused = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    optimizer = BASES[make]([used, unused])
    weights = AveragedWeights(optimizer, every=1)
    for step in range(6):
        used.grad, unused.grad = torch.ones(3), torch.ones(3) if step > 2 else None
        optimizer.step()
        weights.update()
    assert torch.isfinite(optimizer.state[unused]["gen_average"]).all()
    twin = nn.Parameter(torch.zeros(3))
    bare = BASES[make]([twin])
    for _ in range(3):
        twin.grad = torch.ones(3)
        bare.step()
    assert torch.equal(unused, twin)


def test_a_parameter_added_later_begins_at_its_present_value_with_the_common_count() -> None:
    walk = Walk(torch.zeros(3), every=1).go(10)
    added = nn.Parameter(torch.full((3,), 5.0))
    walk.optimizer.add_param_group({"params": [added]})
    walk.parameters.append(added)
    assert torch.equal(values_inside(walk)[1], added)
    walk.go(1)
    assert torch.equal(walk.average(1), added)
    first = added.detach().clone()
    walk.go(1)
    weight = 1.0 - (1.0 - 1.0 / 12.0) ** 16
    torch.testing.assert_close(walk.average(1), torch.lerp(first, added.detach(), weight))


@pytest.mark.parametrize("how", ["replaced", "resized", "other dtype"])
def test_a_parameter_that_is_replaced_or_resized_is_noticed(how: str) -> None:
    walk = Walk(torch.zeros(3), torch.zeros(2), every=1).go(10)
    if how == "replaced":
        walk.parameters[0] = walk.optimizer.param_groups[0]["params"][0] = nn.Parameter(torch.full((4,), 5.0))
    elif how == "resized":
        walk.parameters[0].grad = None
        walk.parameters[0].data = torch.full((4,), 5.0)
    else:
        average = walk.average().clone()
        walk.parameters[0].grad = None
        walk.parameters[0].data = walk.parameters[0].data.double()
        assert torch.equal(values_inside(walk)[0], average.double())
        walk.go(1)
        assert walk.average().dtype == torch.float64
        return
    assert torch.equal(values_inside(walk)[0], torch.full((4,), 5.0))
    walk.go(1)
    assert torch.equal(walk.average(), walk.parameters[0])
    torch.testing.assert_close(walk.average(1).double(), walk.oracle(1, every=1))


def test_tied_weights_are_averaged_once() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    walk = Walk(*model.parameters(), every=1).go(20)
    assert len(walk.parameters) == 1
    torch.testing.assert_close(walk.average().double(), walk.oracle(every=1), rtol=1e-5, atol=1e-6)
    with walk.weights.swapped():
        assert torch.equal(model[1].weight, model[0].weight)
        assert not torch.equal(model[1].weight, walk.visited[-1][0])
    assert torch.equal(model[1].weight, walk.visited[-1][0])


@pytest.mark.parametrize("size", [5, 100_000])
def test_parameters_that_share_memory_come_back(size: int) -> None:
    memory = torch.randn(size)
    walk = Walk(memory, memory.view(-1), memory[: size // 2], every=1).go(3)
    before = memory.clone()
    for _ in range(3):
        values_inside(walk)
        assert torch.equal(memory, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("steps", [3, 40])
def test_an_average_that_is_not_finite_begins_again(bad: float, steps: int) -> None:
    walk = Walk(torch.zeros(3), torch.zeros(3), every=1).go(10)
    kept = walk.parameters[0].detach().clone()
    with torch.no_grad():
        walk.parameters[0].fill_(bad)
    walk.go(1)
    with torch.no_grad():
        walk.parameters[0].copy_(kept)
    walk.go(steps)
    inside = values_inside(walk)
    assert torch.isfinite(inside[0]).all()
    if steps == 3:
        assert torch.equal(inside[0], walk.parameters[0])
    else:
        assert not torch.equal(inside[0], walk.parameters[0])
    torch.testing.assert_close(walk.average(1).double(), walk.oracle(1, every=1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{"every": 0}, {"every": 1.5}, {"exponent": 0.0}, {"exponent": float("inf")}])
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be a positive"):
        AveragedWeights(SGD([nn.Parameter(torch.zeros(1))]), **options)


# --- the swap ---------------------------------------------------------------------------------------------------------


class Stop(BaseException):
    pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, Stop])
def test_the_parameters_are_back_whatever_happens_inside(error: type[BaseException], dtype: torch.dtype) -> None:
    walk = Walk(torch.randn(50, 50).to(dtype), torch.full((3,), float("nan")).to(dtype)).go(12)
    before, average = parameters_of(nn.ParameterList(walk.parameters)), walk.average().clone()

    def fail() -> None:
        assert walk.weights.is_swapped
        assert torch.equal(walk.parameters[0], average.to(dtype))
        raise error

    with pytest.raises(error), walk.weights.swapped():
        fail()
    assert not walk.weights.is_swapped
    assert torch.equal(before[0], walk.parameters[0])
    assert walk.parameters[1].isnan().all()
    assert torch.equal(average, walk.average())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("call", range(1, 25))
def test_interrupts_at_any_write_of_the_swap_itself(
    call: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    walk = Walk(*(torch.randn(50_000).to(dtype) for _ in range(4))).go(12)
    before = parameters_of(nn.ParameterList(walk.parameters))
    averages = [walk.average(index).clone() for index in range(4)]
    calls = 0

    def interrupted(targets: list[Tensor], sources: list[Tensor]) -> None:
        nonlocal calls
        calls += 1
        if calls == call and call % 2:
            raise KeyboardInterrupt
        torch._foreach_copy_(targets, sources)
        if calls == call:
            raise KeyboardInterrupt

    monkeypatch.setattr(averaging, "write", interrupted)
    try:
        with walk.weights.swapped():
            pass
    except KeyboardInterrupt:
        pass
    else:
        assert calls < call
    assert not walk.weights.is_swapped
    assert same(before, [each.detach() for each in walk.parameters])
    assert same(averages, [walk.average(index) for index in range(4)])


def test_a_block_that_is_left_without_an_end() -> None:
    walk = Walk(torch.randn(5)).go(12)
    before = walk.parameters[0].detach().clone()
    block = walk.weights.swapped()
    block.__enter__()
    assert not torch.equal(before, walk.parameters[0])
    del block
    gc.collect()
    assert torch.equal(before, walk.parameters[0])
    assert not walk.weights.is_swapped


def test_nested_blocks_change_nothing() -> None:
    walk = Walk(torch.randn(5)).go(12)
    before, average = walk.parameters[0].detach().clone(), walk.average().clone()
    with walk.weights.swapped():
        with walk.weights.swapped():
            assert torch.equal(walk.parameters[0], average)
        assert torch.equal(walk.parameters[0], average)
        assert walk.weights.is_swapped
    assert torch.equal(walk.parameters[0], before)


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_before_the_first_update_the_block_has_the_present_parameters(steps: int) -> None:
    walk = Walk(torch.randn(5)).go(steps)
    before = walk.parameters[0].detach().clone()
    with walk.weights.swapped():
        assert torch.equal(walk.parameters[0], before)
        assert walk.weights.is_swapped
    walk.weights.write()
    assert torch.equal(walk.parameters[0], before)


def test_what_needs_the_parameters_is_refused_inside() -> None:
    walk = Walk(torch.randn(5)).go(12)
    state = copy.deepcopy(walk.optimizer.state_dict())
    for refused in (
        walk.weights.update,
        walk.weights.write,
        lambda: walk.weights.take_from(state),
        lambda: copy.deepcopy(walk.weights),
        lambda: pickle.dumps(walk.weights),
    ):
        with walk.weights.swapped(), pytest.raises(RuntimeError, match="leave the block first"):
            refused()
    assert walk.weights.updates == 3


def test_a_backward_pass_through_values_from_inside_the_block_is_an_error() -> None:
    walk = Walk(torch.randn(5), torch.randn(5)).go(12)
    with walk.weights.swapped():
        loss = (walk.parameters[0] * walk.parameters[1]).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inside_of_other_modes(mode: Any) -> None:
    walk = Walk(torch.randn(5), torch.randn(5).bfloat16()).go(12)
    before = parameters_of(nn.ParameterList(walk.parameters))
    with mode(), walk.weights.swapped():
        torch.testing.assert_close(walk.parameters[0].double(), walk.oracle(0))
    assert same(before, [each.detach() for each in walk.parameters])
    walk.go(4)
    torch.testing.assert_close(walk.average().double(), walk.oracle(), rtol=1e-5, atol=1e-6)


def test_autocast_does_not_compute_with_weights_from_before() -> None:
    model = nn.Linear(4, 4, bias=False)
    walk = Walk(model.weight, every=1).go(20)
    inputs = torch.eye(4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outside = model(inputs)
        with walk.weights.swapped():
            inside = model(inputs)
            assert torch.equal(inside, model.weight.t().bfloat16())
        assert torch.equal(model(inputs), outside)
    assert not torch.equal(inside, outside)


def test_write_is_for_good() -> None:
    walk = Walk(torch.randn(5), torch.randn(5).bfloat16()).go(12)
    averages = [walk.average(index).clone() for index in range(2)]
    walk.weights.write()
    assert torch.equal(walk.parameters[0], averages[0])
    assert torch.equal(walk.parameters[1], averages[1].bfloat16())
    walk.go(4)  # and training may go on


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_averages_on_the_host(dtype: torch.dtype) -> None:
    near, far = Walk(torch.randn(9).to(dtype)), Walk(torch.randn(9).to(dtype), on_host=True)
    far.parameters[0].data.copy_(near.parameters[0].data)
    near.go(12), far.go(12)
    assert torch.equal(near.average(), far.average())
    assert same(values_inside(near), values_inside(far))


# --- memory and time --------------------------------------------------------------------------------------------------


class Allocated(torch.utils._python_dispatch.TorchDispatchMode):
    """The most memory that results of operations have taken at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.present = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {each.untyped_storage().data_ptr() for each in args if isinstance(each, Tensor)}
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            storage = result.untyped_storage()
            if storage.data_ptr() not in given | self._seen:
                size, address = storage.nbytes(), storage.data_ptr()
                self._seen.add(address)
                self.present += size
                self.peak = max(self.peak, self.present)
                weakref.finalize(storage, self._free, address, size)
        return result

    def _free(self, address: int, size: int) -> None:
        self._seen.discard(address)
        self.present -= size


@pytest.mark.parametrize(("dtype", "swap", "update"), [(torch.float32, 0.05, 0.05), (torch.bfloat16, 1.05, 0.05)])
def test_no_third_copy_is_made(dtype: torch.dtype, swap: float, update: float) -> None:
    walk = Walk(torch.randn(4_000_000).to(dtype), torch.randn(1_000_000).to(dtype), every=1).go(2)
    size = sum(each.nbytes for each in walk.parameters)
    with Allocated() as allocated:
        walk.weights.update()
    assert allocated.peak <= update * size
    with Allocated() as allocated, walk.weights.swapped():
        pass
    assert allocated.peak <= swap * size
    with Allocated() as allocated:
        walk.weights.write()
    assert allocated.peak <= 0.05 * size


def test_an_update_takes_less_than_a_few_copies() -> None:
    walk = Walk(*(torch.randn(1_000_000) for _ in range(4)), every=1).go(3)
    kept = [each.detach().clone() for each in walk.parameters]

    def best(function: Callable[[], object]) -> float:
        times = []
        for _ in range(7):
            begin = time.perf_counter()
            function()
            times.append(time.perf_counter() - begin)
        return min(times)

    copying = best(lambda: torch._foreach_copy_(kept, [each.detach() for each in walk.parameters]))
    assert best(walk.weights.update) < 8.0 * copying


class NoFunction(TorchFunctionMode):
    """Refuses every function of torch."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "grad" in func.__name__:  # what switches grad mode
            return func(*args, **(kwargs or {}))
        raise AssertionError(func.__name__)


def test_a_step_without_an_update_calls_no_function_of_torch() -> None:
    walk = Walk(*(torch.randn(10) for _ in range(5)), every=10**9).go(2)
    with NoFunction():
        for _ in range(10):
            walk.weights.update()


# --- checkpoints, copies ----------------------------------------------------------------------------------------------


class Training:
    """A model trained by a bare optimizer with averaged weights."""

    def __init__(self, make: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        self.model = mlp(seed=seed, dtype=dtype)
        self.optimizer = BASES[make](self.model.parameters())
        self.weights = AveragedWeights(self.optimizer)

    def train(self, first: int, last: int) -> None:
        for step in range(first, last):
            self.optimizer.zero_grad()
            inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
            output = self.model(inputs.to(next(self.model.parameters()).dtype))
            output.float().sub(inputs.sum(dim=1, keepdim=True)).square().mean().backward()
            self.optimizer.step()
            self.weights.update()

    def averages(self) -> list[Tensor]:
        return [self.optimizer.state[each]["gen_average"] for each in self.model.parameters()]

    def load(self, state_dict: dict[str, Any]) -> None:
        """What a wrapper does."""
        rest, averages = self.weights.take_from(state_dict)
        self.optimizer.load_state_dict(rest)
        self.weights.load(averages)


def by_torch_save(training: Training, resumed: Training) -> None:
    buffer = io.BytesIO()
    torch.save(training.optimizer.state_dict(), buffer)
    buffer.seek(0)
    resumed.load(torch.load(buffer, weights_only=True))


def by_distributed_state_dict(training: Training, resumed: Training, *, flatten: bool = False) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    saved = copy.deepcopy(get_optimizer_state_dict(training.model, training.optimizer, options=options))
    wrapper = Loading(resumed)
    resumed.train(0, 1)  # and the live optimizer has all names
    set_optimizer_state_dict(resumed.model, wrapper, saved, options=options)


def by_flat_distributed_state_dict(training: Training, resumed: Training) -> None:
    by_distributed_state_dict(training, resumed, flatten=True)


class Loading(Optimizer):
    """The least of a wrapper that loads averages."""

    def __init__(self, training: Training) -> None:
        self.__dict__.update(training.optimizer.__dict__)
        self._training = training

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._training.load(state_dict)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", BASES)
@pytest.mark.parametrize("steps", [1, 5, 8, 10])
@pytest.mark.parametrize("through", [by_torch_save, by_distributed_state_dict, by_flat_distributed_state_dict])
def test_resuming_is_exact(through: Any, make: str, dtype: torch.dtype, steps: int) -> None:
    training, resumed = Training(make, dtype), Training(make, dtype, seed=1)
    training.train(0, steps)
    through(training, resumed)
    resumed.model.load_state_dict(training.model.state_dict())
    assert {each.dtype for each in resumed.averages()} == {torch.float32}
    assert not {each.data_ptr() for each in resumed.averages()} & {each.data_ptr() for each in training.averages()}
    for each in (training, resumed):
        each.train(steps, 20)
    assert same(parameters_of(training.model), parameters_of(resumed.model))
    assert same(training.averages(), resumed.averages())
    assert resumed.weights.updates == 5


@pytest.mark.parametrize("make", BASES)
@pytest.mark.parametrize("how", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_copies_and_pickles_have_averages_of_their_own(how: Any, make: str) -> None:
    training = Training(make)
    training.train(0, 10)
    other = how(training)
    training.train(10, 20)
    other.train(10, 20)
    assert same(training.averages(), other.averages())
    with other.weights.swapped():
        assert same(parameters_of(other.model), training.averages())
    assert not {each.data_ptr() for each in other.averages()} & {each.data_ptr() for each in training.averages()}


@pytest.mark.parametrize("make", BASES)
def test_an_optimizer_loaded_without_help_goes_on_from_rounded_averages(make: str) -> None:
    training, resumed = Training(make, torch.bfloat16), Training(make, torch.bfloat16, seed=1)
    training.train(0, 10)
    resumed.optimizer.load_state_dict(copy.deepcopy(training.optimizer.state_dict()))
    resumed.model.load_state_dict(training.model.state_dict())
    assert resumed.weights.updates == 2
    training.train(10, 12), resumed.train(10, 12)
    for left, right in zip(training.averages(), resumed.averages(), strict=True):
        assert right.dtype == torch.float32
        torch.testing.assert_close(left, right, rtol=0.01, atol=0.001)


@pytest.mark.parametrize("make", BASES)
def test_a_checkpoint_without_averages_begins_again(make: str) -> None:
    training, resumed = Training(make), Training(make)
    bare = BASES[make](training.model.parameters())
    for _ in range(5):
        for each in training.model.parameters():
            each.grad = torch.ones_like(each)
        bare.step()
    resumed.train(0, 10)
    resumed.load(bare.state_dict())
    resumed.model.load_state_dict(training.model.state_dict())
    assert resumed.weights.updates == 0
    with resumed.weights.swapped():
        assert same(parameters_of(resumed.model), parameters_of(training.model))
    resumed.train(0, 4)
    assert same(parameters_of(resumed.model), resumed.averages())


@pytest.mark.parametrize("make", BASES)
def test_the_bare_optimizer_loads_the_checkpoint(make: str) -> None:
    training = Training(make)
    training.train(0, 10)
    model = copy.deepcopy(training.model)
    bare = BASES[make](model.parameters())
    bare.load_state_dict(copy.deepcopy(training.optimizer.state_dict()))
    training.train(10, 20)
    for step in range(10, 20):
        bare.zero_grad()
        inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        model(inputs).sub(inputs.sum(dim=1, keepdim=True)).square().mean().backward()
        bare.step()
    assert same(parameters_of(model), parameters_of(training.model))


def test_a_checkpoint_of_other_shapes_begins_again() -> None:
    walk, other = Walk(torch.zeros(3)).go(8), Walk(torch.zeros(4)).go(8)
    _, averages = other.weights.take_from(copy.deepcopy(other.optimizer.state_dict()))
    before = walk.average().clone()
    walk.weights.load(averages)
    assert torch.equal(walk.average(), before)


# --- AveragedModel ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("exponent", [16.0, 5.0])
@pytest.mark.parametrize("is_multi", [False, True])
def test_averaged_model_has_the_same_average_exactly(is_multi: bool, exponent: float, dtype: torch.dtype) -> None:
    walk = Walk(torch.randn(3, 5).to(dtype), torch.randn(()).to(dtype), every=1, exponent=exponent)
    model = nn.ParameterList(walk.parameters)
    averaged = (
        AveragedModel(model, multi_avg_fn=multi_power_average(exponent))
        if is_multi
        else AveragedModel(model, avg_fn=power_average(exponent))
    )
    for _ in range(40):
        walk.go(1)
        averaged.update_parameters(model)
        assert same(parameters_of(averaged), [walk.average(0), walk.average(1)])


@pytest.mark.parametrize("options", [{"avg_fn": power_average()}, {"multi_avg_fn": multi_power_average()}])
def test_averaged_model_with_buffers(options: dict[str, Any]) -> None:
    model = mlp(norm=True)
    averaged = AveragedModel(model, use_buffers=True, **options)
    means = []
    for _ in range(20):
        model(torch.randn(8, 4))
        averaged.update_parameters(model)
        means.append(model[1].running_mean.double())
    n = len(means)
    expected = sum(((k / n) ** 16 - ((k - 1) / n) ** 16) * means[k - 1] for k in range(1, n + 1))
    torch.testing.assert_close(averaged.module[1].running_mean.double(), expected, rtol=1e-5, atol=1e-6)
    assert averaged.module[1].num_batches_tracked == 20
    pickle.dumps(options)


@pytest.mark.parametrize("make", [power_average, multi_power_average])
def test_exponents_are_checked(make: Any) -> None:
    with pytest.raises(ValueError, match="exponent must be a positive number"):
        make(-1.0)


# --- BatchNorm --------------------------------------------------------------------------------------------------------


def batches() -> Iterator[tuple[Tensor, int]]:
    for seed in range(5):
        yield torch.randn(16, 4, generator=torch.Generator().manual_seed(seed)), seed


@pytest.mark.parametrize("error", [None, ValueError])
def test_batch_norm_statistics_are_those_of_the_average_inside_the_block(error: Any) -> None:
    model = mlp(norm=True, dropout=0.1)
    model[1].momentum = 0.2
    walk = Walk(*model.parameters(), every=1).go(30)
    model(torch.randn(8, 4))
    model.eval()
    model[3].train()
    before, outside = copy.deepcopy(model.state_dict()), model[0](torch.zeros(1, 4))
    inputs = torch.cat([each for each, _ in batches()])
    try:
        with walk.weights.swapped(), refreshed_batch_norm(model, batches()):
            assert not torch.equal(model[0](torch.zeros(1, 4)), outside)
            torch.testing.assert_close(model[1].running_mean, model[0](inputs).mean(dim=0))
            assert [each.training for each in model] == [False, False, False, True, False]
            assert model[1].momentum == 0.2
            if error:
                raise error
    except ValueError:
        assert error
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert model[1].momentum == 0.2
    assert [each.training for each in model] == [False, False, False, True, False]


def test_batches_that_fail_leave_the_model_as_it_was() -> None:
    model = mlp(norm=True).eval()
    before = copy.deepcopy(model.state_dict())

    def failing() -> Iterator[Tensor]:
        yield torch.randn(8, 4)
        raise ValueError("no data")

    with pytest.raises(ValueError, match="no data"), refreshed_batch_norm(model, failing(), device="cpu"):
        pytest.fail("unreachable")
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert model[1].momentum == 0.1
    assert not model.training
    assert not model[1].training


def test_without_batch_norm_no_batch_is_drawn() -> None:
    with refreshed_batch_norm(mlp(), (pytest.fail("drawn") for _ in range(1))):
        pass


# --- together with compilers and ranks --------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
def test_compiled_models_see_the_average() -> None:
    model = mlp()
    compiled = torch.compile(model, backend="aot_eager")
    walk = Walk(*model.parameters(), every=1).go(20)
    inputs = torch.randn(8, 4)
    outside = compiled(inputs)
    with walk.weights.swapped():
        assert torch.equal(compiled(inputs), model(inputs))
        assert not torch.equal(compiled(inputs), outside)
    assert torch.equal(compiled(inputs), outside)


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "tp"])
def test_ranks_average_as_one_process(pool: Pool, kind: str) -> None:
    alone = averaging_jobs.train("plain")
    ranks = pool.run(averaging_jobs.train, kind)
    assert ranks[0]["averaged"] == ranks[1]["averaged"]
    for name in ("averaged", "parameters"):
        for left, right in zip(ranks[0][name], alone[name], strict=True):
            torch.testing.assert_close(torch.tensor(left), torch.tensor(right), rtol=1e-9, atol=1e-12)
    mean = sum(each["loss"] for each in ranks) / 2
    assert mean == pytest.approx(alone["loss"], rel=1e-9)


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "tp"])
def test_ranks_compare_with_the_average_as_one_process(pool: Pool, kind: str) -> None:
    alone = averaging_jobs.compare("plain")
    assert all(alone["excess"])
    for rank in pool.run(averaging_jobs.compare, kind):
        assert rank["excess"] == pytest.approx(alone["excess"], rel=1e-6)
        for left, right in zip(rank["parameters"], alone["parameters"], strict=True):
            torch.testing.assert_close(torch.tensor(left), torch.tensor(right), rtol=1e-6, atol=1e-9)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", ["adamw", "sgd"])
@pytest.mark.parametrize(("flatten", "full"), [(False, False), (True, False), (False, True)])
def test_distributed_checkpoints(pool: Pool, make: str, flatten: bool, full: bool, tmp_path: Path) -> None:
    pool.run(averaging_jobs.resume, "fsdp", make, str(tmp_path), flatten, full)


def test_the_loss_of_the_average_is_lower_on_a_noisy_problem() -> None:
    model = mlp()
    walk = Walk(*model.parameters())
    inputs = torch.randn(256, 4, generator=torch.Generator().manual_seed(0))
    targets = torch.sin(inputs.sum(dim=1, keepdim=True))
    optimizer = SGD(model.parameters(), lr=0.3)
    walk.optimizer, walk.weights = optimizer, AveragedWeights(optimizer)
    for _ in range(800):
        index = torch.randint(256, (4,), generator=walk.generator)
        optimizer.zero_grad()
        mse_loss(model(inputs[index]), targets[index]).backward()
        optimizer.step()
        walk.weights.update()
    outside = mse_loss(model(inputs), targets).item()
    with walk.weights.swapped():
        assert mse_loss(model(inputs), targets).item() < outside


@pytest.mark.filterwarnings("ignore")
def test_lightnings_callback() -> None:
    pl = pytest.importorskip("lightning.pytorch")
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")
    if not hasattr(callbacks, "WeightAveraging"):
        pytest.skip("lightning has no WeightAveraging yet")

    class Module(pl.LightningModule):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = mlp(norm=True)

        def training_step(self, batch: Tensor) -> Tensor:
            return self.model(batch).square().mean()

        def on_train_batch_end(self, *args: Any) -> None:
            weights.update()
            averages[:] = [weights._optimizer.state[each]["gen_average"].clone() for each in self.parameters()]

        def configure_optimizers(self) -> Optimizer:
            nonlocal weights
            optimizer = SGD(self.parameters(), lr=0.1)
            weights = AveragedWeights(optimizer, every=1)
            return optimizer

    weights: Any = None
    averages: list[Tensor] = []
    module = Module()
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callbacks.WeightAveraging(avg_fn=power_average())],
    )
    trainer.fit(module, torch.utils.data.DataLoader(torch.randn(64, 4), batch_size=8))
    assert same(parameters_of(module), averages)


# --- GeNOptimizer -----------------------------------------------------------------------------------------------------


def in_training(make: Any = gen_adamw, **options: Any) -> GeNTraining:
    return GeNTraining.of(lambda parameters: make(parameters, burn_in=4, period=3, **options))


def averages_of(training: GeNTraining) -> list[Tensor]:
    with training.optimizer.averaged():
        return parameters_of(training.model)


@pytest.mark.parametrize("make", [gen_adamw, gen_sgd])
def test_evaluating_the_average_changes_nothing_of_the_training(make: Any) -> None:
    training, other = in_training(make), in_training(make)
    for _ in range(30):
        assert training.train(1) == other.train(1)
        with training.optimizer.averaged(), torch.no_grad():
            training.model(training.inputs)
    assert same(parameters_of(training.model), parameters_of(other.model))
    assert same(averages_of(training), averages_of(other))
    assert not same(averages_of(training), parameters_of(training.model))
    training.optimizer.write_averaged()
    assert same(parameters_of(training.model), averages_of(other))


@pytest.mark.parametrize("average", [True, False])
def test_the_excess_loss_is_that_of_the_gradient_at_the_end_of_the_last_step(average: bool) -> None:
    torch.manual_seed(0)
    model = mlp()
    optimizer = GeNOptimizer(AdamW(model.parameters()), average=average)
    for step in range(1, 100):
        inputs, targets = torch.randn(8, 4), torch.randn(8, 1)
        gradients = torch.autograd.grad(mse_loss(model(inputs), targets), list(model.parameters()))
        averages = [optimizer.state[each].get("gen_average") for each in model.parameters()]
        expected = [
            0.5 * (gradient * (parameter.detach() - mean)).sum().item()
            for gradient, parameter, mean in zip(gradients, model.parameters(), averages, strict=True)
            if mean is not None
        ]
        optimizer.step(lambda: mse_loss(model(inputs), targets))  # noqa: B023
        record = optimizer.last_probe
        if record is None or record.step != step or record.loss_end is None:
            continue
        if not average or step < 25:
            assert record.excess_loss is None
        else:
            assert record.excess_loss == pytest.approx(sum(expected), rel=1e-4, abs=1e-6)
    state: Any = optimizer._context.controller.state
    assert (state.balance.excess_step > 0) is average


@pytest.mark.parametrize("clips", [True, False])
@pytest.mark.parametrize("average", [True, False])
def test_in_a_loop_that_calls_backward_the_excess_loss_is_that_over_the_average(average: bool, clips: bool) -> None:
    torch.manual_seed(0)
    data = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.2), nn.Linear(16, 1))
    optimizer = GeNOptimizer(AdamW(model.parameters()), average=average)
    compared = 0
    for step in range(1, 100):
        inputs, targets = torch.randn(8, 4, generator=data), torch.randn(8, 1, generator=data)

        def probe() -> Tensor:
            torch.manual_seed(7)
            return mse_loss(model(inputs), targets)  # noqa: B023

        optimizer.zero_grad()
        probe().backward()
        if clips:
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        with torch.no_grad():
            loss = probe().item()
            with optimizer.averaged():
                excess = loss - probe().item()
        before = [optimizer.state[each].get("gen_average") for each in model.parameters()]
        before = [each if each is None else each.clone() for each in before]
        optimizer.step(probe=probe)
        record = optimizer.last_probe
        if record is None or record.step != step or record.loss_end is None:
            continue
        if not average or step < 25:
            assert record.excess_loss is None
            continue
        assert record.excess_loss == pytest.approx(excess, rel=1e-4, abs=1e-6)
        compared += 1
        if step % 4:  # no update of the average
            assert all(map(torch.equal, before, (optimizer.state[each]["gen_average"] for each in model.parameters())))
    assert compared > 20 if average else compared == 0


def test_parameters_without_an_average_are_compared_where_the_step_has_ended() -> None:
    """Those of a group that has just been added; and if a checkpoint lacks all averages, nothing is known."""
    torch.manual_seed(0)
    trunk, head = nn.Linear(4, 16), nn.Linear(16, 1)
    optimizer, compared = GeNOptimizer(AdamW(trunk.parameters()), rule=RelaxedRule(burn_in=2, period=1)), []
    for step in range(1, 20):
        inputs, targets = torch.randn(8, 4), 3.0 * torch.randn(8, 1)

        def probe() -> Tensor:
            return mse_loss(head(torch.tanh(trunk(inputs))), targets)  # noqa: B023

        if step == 10:
            optimizer.add_param_group({"params": head.parameters()})
        if step == 16:
            for state in optimizer.state.values():
                del state["gen_average"]
        optimizer.zero_grad()
        head.zero_grad()
        loss = probe()
        loss.backward()
        with torch.no_grad(), optimizer.averaged():
            excess = loss.item() - probe().item()
        optimizer.step(probe=probe)
        record = optimizer.last_probe
        assert record is not None
        if step == 16:
            assert record.excess_loss is None
        elif record.excess_loss is not None:
            assert record.excess_loss == pytest.approx(excess, rel=1e-4, abs=1e-6)
            compared.append(step)
    assert {10, 11, 12} < set(compared)


def test_an_interrupt_at_the_average_leaves_parameters_and_average_in_place() -> None:
    model = mlp()
    optimizer = GeNOptimizer(AdamW(model.parameters()))
    torch.manual_seed(0)

    def train(steps: int, interrupted: bool = False) -> None:
        for _ in range(steps):
            inputs, targets = torch.randn(8, 4), torch.randn(8, 1)

            def probe() -> Tensor:
                if interrupted and optimizer._averages.is_swapped:
                    raise KeyboardInterrupt
                return mse_loss(model(inputs), targets)  # noqa: B023

            optimizer.zero_grad()
            probe().backward()
            kept = parameters_of(model)
            try:
                optimizer.step(probe=probe)
            except KeyboardInterrupt:
                assert not optimizer._averages.is_swapped
                assert not same(parameters_of(model), kept), "the step is finished"
                assert math.isfinite(optimizer._averages.excess_loss())
                return
        assert not interrupted, "no probe has been at the average"

    train(30)
    train(20, interrupted=True)
    train(20)
    assert optimizer.last_probe is not None
    assert optimizer.last_probe.excess_loss is not None


def test_a_step_and_a_checkpoint_inside_the_block_are_refused() -> None:
    training = in_training()
    training.train(8)
    optimizer = training.optimizer
    state = copy.deepcopy(optimizer.state_dict())
    for refused in (
        lambda: optimizer.step(training.closure),
        optimizer.state_dict,
        lambda: optimizer.load_state_dict(state),
        lambda: copy.deepcopy(optimizer),
        optimizer.write_averaged,
    ):
        with optimizer.averaged(), pytest.raises(RuntimeError, match="leave the block first"):
            refused()
    training.train(1)


def test_the_average_is_kept_under_a_scheduler_too() -> None:
    training = in_training()
    training.train(20, torch.optim.lr_scheduler.LinearLR(training.optimizer, 1.0, 0.0, total_iters=40))
    assert all("gen_average" in each for each in training.optimizer.state.values())
    assert not same(averages_of(training), parameters_of(training.model))


@pytest.mark.parametrize("steps", [0, 1, 5, 9])
@pytest.mark.parametrize("make", [gen_adamw, gen_sgd, lambda each, **options: wrapped(SGD(each), **options)])
@pytest.mark.parametrize("resume", RESUMES)
def test_every_kind_of_checkpoint_has_the_average(resume: Any, make: Any, steps: int) -> None:
    training = in_training(make, mode="approximate")
    training.train(steps)
    resumed = resume(training)
    assert same(averages_of(resumed), averages_of(training))
    training.train(8)
    resumed.train(8)
    assert same(averages_of(resumed), averages_of(training))


def test_a_fresh_optimizer_s_state_dict_has_what_distributed_checkpoints_load_into() -> None:
    for make in BASES.values():
        model = mlp()
        optimizer = GeNOptimizer(make(model.parameters()))
        state = get_optimizer_state_dict(model, optimizer)["state"]
        assert all("gen_average" in state[name] for name, _ in model.named_parameters())
        assert optimizer.param_groups[0]["gen_average_steps"] == 0


def test_an_optimizer_without_average_drops_that_of_a_checkpoint() -> None:
    training, without = in_training(), in_training(average=False)
    training.train(8)
    without.optimizer.load_state_dict(training.optimizer.state_dict())
    assert not any("gen_average" in each for each in without.optimizer.state.values())


def test_half_precision_is_averaged_and_saved_in_float32() -> None:
    trainings = [
        GeNTraining.of(lambda each: gen_adamw(each, burn_in=4, period=3), mlp(dtype=torch.bfloat16)) for _ in range(2)
    ]
    trainings[0].train(10)
    trainings[1].optimizer.load_state_dict(copy.deepcopy(trainings[0].optimizer.state_dict()))
    for one, other in zip(*(each.optimizer.state.values() for each in trainings), strict=True):
        assert one["gen_average"].dtype == torch.float32
        assert torch.equal(one["gen_average"], other["gen_average"])


def test_no_average_begins_in_a_step_that_is_not_taken() -> None:
    """A parameter whose state would hold nothing else seems set up to the base optimizer."""
    walk = Walk(torch.zeros(2), make="adamw")
    walk.parameters[0].grad = torch.ones(2)
    for _ in range(8):
        walk.weights.update(begins=False)
    assert not walk.optimizer.state[walk.parameters[0]]
