"""Copies of the parameters in the host's memory: where they are, and that nothing else is different."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.overrides import TorchFunctionMode

from gen_optim.measurement.interpolation import Interpolation
from gen_optim.measurement.start_point import StartPoint
from tests.training import Training, gen_adamw, gen_sgd, looks_back_next, mlp, parameters_of, same

MODES = ["lookback", "approximate", "exact"]


# --- on a device that is not there: tensors without contents know where they are, and refuse to be mixed --------------


@pytest.fixture
def on_cuda() -> Iterator[list[Tensor]]:
    """Parameters on a CUDA device, a large one among them, of which the contents are nowhere."""
    with FakeTensorMode(), torch.no_grad():
        parameters = [nn.Parameter(torch.empty(size, device="cuda")) for size in ((3000, 3000), (7,), (5, 3))]
        for each in parameters:
            each.grad = torch.empty_like(each)
        yield parameters


def devices(tensors: list[Tensor]) -> set[str]:
    return {each.device.type for each in tensors}


@pytest.mark.parametrize("on_host", [True, False])
@pytest.mark.parametrize("ending", ["leave", "stay"])
@pytest.mark.parametrize("half_way", [True, False])
def test_a_start_point_is_where_it_was_asked_to_be(
    on_cuda: list[Tensor], on_host: bool, ending: str, half_way: bool
) -> None:
    start_point = StartPoint(on_cuda, 0.1, on_host=on_host)
    assert start_point.is_of(on_cuda)
    slope = start_point.end_slope()
    assert slope is not None
    assert slope.device.type == "cuda"
    start_point.write(0.0)
    if half_way:
        start_point.write(0.5)
    assert devices([*start_point._copies, *start_point._starts]) == {"cpu" if on_host else "cuda"}
    getattr(start_point, ending)()
    loaded = StartPoint.load(start_point.tensors(), 0.1, 0, on_host=not on_host)
    assert devices(loaded._copies) == {"cuda" if on_host else "cpu"}
    assert devices(on_cuda) == {"cuda"}


@pytest.mark.parametrize("on_host", [True, False])
def test_a_move_is_where_it_was_asked_to_be(on_cuda: list[Tensor], on_host: bool) -> None:
    move = Interpolation([on_cuda[:1], on_cuda[1:]], on_host=on_host)
    move.arrive()
    for multiple in (0.0, -1.0, 0.5, 1.0):
        move.write(multiple)
    for copies in (*move._before, *move._after):
        assert devices(copies) == {"cpu" if on_host else "cuda"}
    _, steps = move.step()
    move.settle([0.3, 0.6])
    assert devices([*steps, *on_cuda]) == {"cuda"}


# --- on the host itself, and spread over ranks ------------------------------------------------------------------------


class Allocations(TorchFunctionMode):
    """Counts tensors that are made for copies on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.on_host = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.on_host += function is torch.empty_like and (kwargs or {}).get("device") == "cpu"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("make", [gen_adamw, gen_sgd])
def test_training_is_the_same_to_the_bit(make: Callable[..., Any], mode: str) -> None:
    found = []
    for offload in (False, True):
        torch.manual_seed(0)
        training = Training.of(
            lambda parameters, offload=offload: make(parameters, mode=mode, burn_in=5, offload_copies=offload),
            mlp(dropout=0.1, norm=True),
        )
        with Allocations() as allocations:
            training.train(12)
        assert (allocations.on_host > len(parameters_of(training.model))) == offload  # the first ones are kept there
        found.append((training.optimizer.get_last_lr(), parameters_of(training.model)))
    assert found[0][0] == found[1][0]
    assert same(found[0][1], found[1][1])


@pytest.mark.parametrize("loads_with", [True, False])
def test_a_checkpoint_goes_on_to_the_bit_wherever_copies_are(loads_with: bool) -> None:
    def make(offload: bool) -> Training:
        return Training.of(lambda parameters: gen_sgd(parameters, offload_copies=offload))

    whole = make(True)
    whole.train(5)
    assert looks_back_next(whole.optimizer)
    file = io.BytesIO()
    torch.save((whole.model.state_dict(), whole.optimizer.state_dict()), file)
    file.seek(0)
    parts = make(loads_with)
    model, optimizer = torch.load(file)
    parts.model.load_state_dict(model)
    parts.optimizer.load_state_dict(optimizer)
    twin = copy.deepcopy(whole.optimizer)
    assert twin.offload_copies
    whole.train(5)
    parts.train(5)
    assert parts.optimizer.get_last_lr() == whole.optimizer.get_last_lr()
    assert same(parameters_of(parts.model), parameters_of(whole.model))


def test_parameters_that_are_spread_over_ranks(mesh_of_one: DeviceMesh) -> None:
    found = []
    for offload in (False, True):
        weight = nn.Parameter(DTensor.from_local(torch.linspace(-1.0, 2.0, 6), mesh_of_one, [Shard(0)]))
        optimizer = gen_sgd([weight], offload_copies=offload)
        for _ in range(6):
            optimizer.step(lambda weight=weight: (weight**4).sum())
        assert optimizer.last_probe is not None
        assert optimizer.last_probe.step == 6
        found.append(weight.to_local().detach())
    assert torch.equal(*found)
    assert not torch.equal(found[0], torch.linspace(-1.0, 2.0, 6))


# --- on a device ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_copies_of_parameters_on_a_device_are_pinned_and_training_is_the_same(mode: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a device besides the host: no CUDA device here")
    found = []
    for offload in (False, True):
        torch.manual_seed(0)
        training = Training.of(
            lambda parameters, offload=offload: gen_adamw(parameters, mode=mode, burn_in=20, offload_copies=offload),
            mlp().cuda(),
        )
        training.inputs, training.targets = training.inputs.cuda(), training.targets.cuda()
        training.train(10)
        start_point = training.optimizer._context.start_point
        assert (start_point is not None) == (mode == "lookback")
        if start_point is not None:
            assert all(each.is_cuda != offload and each.is_pinned() == offload for each in start_point._copies)
        found.append((training.optimizer.get_last_lr(), parameters_of(training.model)))
    assert found[0][0] == found[1][0]
    assert same(found[0][1], found[1][1])
