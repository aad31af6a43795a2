"""What the ranks of a process group do in the tests of distributed training; each function is called on every rank."""

from __future__ import annotations

import copy
import functools
import itertools
import math
import pickle
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from gen_optim import GeNOptimizer, History
from gen_optim.distributed import ranks_of
from gen_optim.tensors.dtensor import dot, gradient_dot, local
from tests.training import looks_back_next, mlp, regression_data, wrapped
from tests.workers import device

Numbers = list[Any]


def plain(model: nn.Module) -> nn.Module:
    return model


def ddp(model: nn.Module, **options: Any) -> nn.Module:
    return DistributedDataParallel(model, **options)


def fsdp(model: nn.Module, mesh: Any = None, **options: Any) -> nn.Module:
    mesh = init_device_mesh(device().type, (dist.get_world_size(),)) if mesh is None else mesh
    fully_shard(model[0], mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def hsdp(model: nn.Module) -> nn.Module:
    shape = (2, dist.get_world_size() // 2)
    return fsdp(model, init_device_mesh(device().type, shape, mesh_dim_names=("replicate", "shard")))


def tp(model: nn.Module, mesh: Any = None) -> nn.Module:
    mesh = init_device_mesh(device().type, (dist.get_world_size(),)) if mesh is None else mesh
    return parallelize_module(model, mesh, {"0": ColwiseParallel(), "4": RowwiseParallel()})


def fsdp_and_tp(model: nn.Module) -> nn.Module:
    shape = (dist.get_world_size() // 2, 2)
    mesh = init_device_mesh(device().type, shape, mesh_dim_names=("data", "tensor"))
    return fsdp(tp(model, mesh["tensor"]), mesh["data"])


WRAPS: dict[str, Callable[[nn.Module], nn.Module]] = {
    each.__name__: each for each in (plain, ddp, fsdp, hsdp, tp, fsdp_and_tp)
}


def data_of(kind: str, *, rank: int | None = None, size: int | None = None) -> tuple[Tensor, Tensor]:
    """This rank's part of the batch: ranks that hold parts of one replica see the same."""
    inputs, targets = regression_data(size=32, dtype=torch.float64)
    if kind in ("plain", "tp"):
        return inputs.to(_device()), targets.to(_device())
    rank, size = dist.get_rank() if rank is None else rank, dist.get_world_size() if size is None else size
    if kind == "fsdp_and_tp":
        rank, size = rank // 2, size // 2
    return inputs[rank::size].to(_device()), targets[rank::size].to(_device())


def _device() -> torch.device:
    return device() if dist.is_initialized() else torch.device("cpu")


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def numbers_of(model: nn.Module) -> Numbers:
    return [whole(each.detach()).cpu().tolist() for each in model.parameters()]


class Run:
    """A model in training on this rank's part of the data."""

    def __init__(self, kind: str, make: str = "adamw", *, norm: bool = False, wrap: Any = None, **options: Any) -> None:
        bare = mlp(dtype=torch.float64, norm=norm).to(_device())
        self.model = WRAPS[kind](bare) if wrap is None else wrap(bare)
        base: torch.optim.Optimizer
        if make == "adamw":
            base = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        else:
            base = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.optimizer = wrapped(base, **{"mode": "approximate", "burn_in": 10, "period": 4, **options})
        self.inputs, self.targets = data_of(kind)
        self.history = History()
        self.optimizer.register_probe_hook(self.history)
        self.calls = 0
        self.before_return: Callable[[], Any] = lambda: None

    def loss(self) -> Tensor:
        self.calls += 1
        return mse_loss(self.model(self.inputs), self.targets)

    def closure(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.loss()
        loss.backward()
        changed = self.before_return()
        return loss if changed is None else changed

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.optimizer.step(self.closure)

    def ranks_mean(self, number: Any) -> float:
        total = torch.as_tensor(number).detach().double().clone()
        dist.all_reduce(total)
        return (total / dist.get_world_size()).item()

    def result(self) -> dict[str, Any]:
        return {
            "lrs": self.history.column("lr_after").tolist(),
            "steps": [record.step for record in self.history],
            "statuses": [record.status.name for record in self.history],
            "losses": [list(record.losses) for record in self.history],
            "last_lr": self.optimizer.get_last_lr(),
            "parameters": numbers_of(self.model),
            "calls": self.calls,
        }


def train(kind: str, steps: int, ddp_options: Any = None, **options: Any) -> dict[str, Any]:
    run = Run(kind, wrap=None if ddp_options is None else functools.partial(ddp, **ddp_options), **options)
    run.train(steps)
    return run.result()


def train_without_a_minimum(kind: str) -> dict[str, Any]:
    """A loss that falls without end along the first direction."""
    run = Run(kind)
    run.loss = lambda: run.model(run.inputs).mean()  # type: ignore[method-assign]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.optimizer.step(run.closure)
    messages = [str(each.message) for each in caught]
    return {"lr": run.optimizer.get_last_lr()[0], "warned": sum("no minimum" in each for each in messages)}


def train_by(style: str, kind: str, steps: int, **options: Any) -> dict[str, Any]:
    """Train by another kind of closure than one that calls backward itself."""
    run = Run(kind, **options)

    def only_loss() -> Tensor:
        run.optimizer.zero_grad(set_to_none=False)
        return run.loss()

    with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce:
        for _ in range(steps):
            if style == "only_loss":
                run.optimizer.step(only_loss)
            else:
                run.optimizer.zero_grad()
                loss = run.loss()
                loss.backward()
                run.optimizer.step(probe=run.loss, loss=loss if style == "probe_and_loss" else None)
    return {"reductions": all_reduce.call_count, **run.result()}


def look_back_astray(kind: str, bad: float) -> dict[str, Any]:
    """The last rank alone meets a loss that is ``bad`` where a step has led: all take it back."""
    run = Run(kind, mode="lookback")
    run.train(6)
    before = numbers_of(run.model)
    run.train(1)

    def spoil() -> Tensor | None:
        is_it = dist.get_rank() == dist.get_world_size() - 1 and not run.optimizer.is_probing
        return torch.tensor(bad, dtype=torch.float64, device=device()) if is_it else None

    run.before_return = spoil
    run.train(1)
    is_back = numbers_of(run.model) == before
    run.before_return = lambda: None
    run.train(10)
    return {"is_back": is_back, **run.result()}


def restart(kind: str, writes: bool) -> dict[str, Any]:
    """A burn-in in which the loss of the last rank rose far; with ``writes``, that rank also writes to a parameter."""
    run = Run(kind, mode="lookback")
    first = numbers_of(run.model)
    run.train(6)
    is_last = dist.get_rank() == dist.get_world_size() - 1

    def spoil() -> Tensor | None:
        is_it = is_last and not run.optimizer.is_probing
        return torch.tensor(1e9, dtype=torch.float64, device=device()) if is_it else None

    run.before_return = spoil
    run.train(1)
    run.before_return = lambda: None
    if writes and is_last:
        with torch.no_grad():
            next(run.model.parameters()).mul_(1.0)
    while run.optimizer._context.controller.state.probes < 10:
        run.train(1)
    burn_in = run.result()
    is_back, has_state = numbers_of(run.model) == first, bool(run.optimizer.base_optim.state)
    run.train(20)
    return {"burn_in": burn_in, "is_back": is_back, "has_state": has_state, **run.result()}


def look_back_with_numbers(kind: str) -> dict[str, Any]:
    """One rank returns plain numbers; another zeroes its gradients in place for a while: all need the middle then."""
    run = Run(kind, mode="lookback")

    def closure() -> Any:
        is_unknown = dist.get_rank() == 1 and 6 <= len(run.history) < 9
        run.optimizer.zero_grad(set_to_none=not is_unknown)
        loss = run.loss()
        loss.backward()
        return loss.item() if dist.get_rank() == 0 else loss

    for _ in range(14):
        run.optimizer.step(closure)
    return {"evaluated": [len(record.losses) for record in run.history], **run.result()}


def gradients_of_one_rank(kind: str) -> dict[str, Any]:
    """The caller's gradients are zero in all shards but one: to be used all the same, on all ranks."""
    run = Run(kind)
    run.train(1)
    run.closure()
    for index, parameter in enumerate(run.model.parameters()):
        mine = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
        mine.mul_(0.0 if index or dist.get_rank() else 1.0)
    expected = [whole(each.grad).cpu().tolist() for each in run.model.parameters()]
    run.optimizer.step(run.loss)
    return {"before": expected, "after": [whole(each.grad).cpu().tolist() for each in run.model.parameters()]}


def gradients_added_by_the_caller(kind: str) -> dict[str, Any]:
    """To those that the last step has used: new ones, though the tensors are the same."""
    run = Run(kind)
    run.train(1)
    run.loss().backward()
    expected = [whole(each.grad).cpu().tolist() for each in run.model.parameters()]
    run.optimizer.step(run.loss)
    return {"before": expected, "after": [whole(each.grad).cpu().tolist() for each in run.model.parameters()]}


# --- what goes wrong on one rank -------------------------------------------------------------------------------------


def return_numbers_on_one_rank() -> dict[str, Any]:
    """A plain number is taken to be rounded more coarsely than the tensor that it comes from."""
    run = Run("ddp", "sgd", rule="relaxed", tolerance=1e4)

    def only_there() -> float | None:
        return 0.25 if dist.get_rank() == 1 else None

    run.before_return = only_there
    run.train(30)
    return run.result()


def exact_with_an_older_torch() -> str:
    """Constructs optimizers in exact mode while torch seems to be of an older version."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.12.1+cpu"))
        Run("plain", mode="exact")
        with pytest.raises(RuntimeError) as caught:
            Run("tp", mode="exact")
    return str(caught.value)


def join_with_uneven_batches() -> str:
    """Trains within DDP's ``join()``; rank 1 has one batch less."""
    run = Run("ddp")
    try:
        with run.model.join():
            run.train(4 - dist.get_rank())
    except RuntimeError as error:
        return str(error)
    return "trained"


def fail_before_the_model(call: int) -> dict[str, Any]:
    """A closure whose calls run no collectives fails before it has done anything."""
    run = Run("plain", process_group=dist.group.WORLD)
    run.train(3)
    first = run.calls

    def closure() -> Tensor:
        if dist.get_rank() == 1 and run.calls >= first + call:
            run.calls += 1
            raise KeyError("a bad example")
        return run.closure()

    with pytest.raises((KeyError, RuntimeError)) as caught:
        run.optimizer.step(closure)
    return {"error": caught.typename, "calls": run.calls - first}


def fail_before_backward(kind: str) -> str:
    """Where the others wait in the backward pass, whoever does not come says so at once; here all ranks do."""
    run = Run(kind)
    run.train(3)

    def closure() -> Tensor:
        run.optimizer.zero_grad()
        run.loss()
        raise KeyError("a bad example")

    before = numbers_of(run.model), run.optimizer.state_dict()["param_groups"]
    with pytest.raises(KeyError, match="a bad example"):
        run.optimizer.step(closure)
    assert before == (numbers_of(run.model), run.optimizer.state_dict()["param_groups"])
    return kind


def fail_on_one_rank(kind: str, steps: int, call: int, **options: Any) -> dict[str, Any]:
    """One call of the step after ``steps`` fails on the last rank, when its model has done what all ranks do."""
    run = Run(kind, **options)
    run.train(steps)
    first = run.calls

    def fail() -> None:
        if dist.get_rank() == dist.get_world_size() - 1 and run.calls > first + call:
            raise KeyError("a bad example")

    run.before_return = fail
    before = numbers_of(run.model)
    with pytest.raises((KeyError, RuntimeError)) as caught:
        run.train(1)
    run.before_return = lambda: None
    error = f"{caught.typename}: {caught.value}"
    calls = run.calls - first
    has_moved = numbers_of(run.model) != before
    run.train(6)
    return {"error": error, "step_calls": calls, "has_moved": has_moved, **run.result()}


def fail_where_only_a_probe_goes(kind: str, **options: Any) -> dict[str, Any]:
    """One call of a probe step fails on the last rank, and none where the first call of the step was."""
    run = Run(kind, **options)
    run.train(4)
    first = run.calls

    def fail() -> None:
        if dist.get_rank() == dist.get_world_size() - 1 and run.calls == first + 2:
            raise ValueError("scale must be positive")

    run.before_return = fail
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.train(1)
    warned = [str(each.message) for each in caught if "probe of GeNOptimizer raised" in str(each.message)]
    losses = run.optimizer.last_probe.losses
    run.train(8)
    return {"warned": len(warned), "is_infinite": math.inf in losses, **run.result()}


def nan_on_one_rank(kind: str, steps: int, call: int, **options: Any) -> dict[str, Any]:
    run = Run(kind, **options)
    run.train(steps)
    first = run.calls

    def spoil() -> Tensor | None:
        is_it = dist.get_rank() == 0 and run.calls == first + call + 1
        return torch.tensor(float("nan"), dtype=torch.float64, device=device()) if is_it else None

    run.before_return = spoil
    run.train(8)
    return run.result()


def fail_in_the_base(kind: str) -> dict[str, Any]:
    run = Run(kind)
    run.train(3)
    base, before = run.optimizer.base_optim, numbers_of(run.model)
    step = base.step

    def fail() -> None:
        if dist.get_rank() == 0:
            raise MemoryError("no room for the moments")
        step()

    base.step = fail  # type: ignore[method-assign]
    with pytest.raises((MemoryError, RuntimeError)) as caught:
        run.train(1)
    return {"error": caught.typename, "has_moved": numbers_of(run.model) != before, "calls": run.calls}


# --- who belongs together --------------------------------------------------------------------------------------------


def train_apart(process_group: str | None) -> dict[str, Any]:
    """Every rank trains a model of its own, for as long as it likes."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = Run("plain", process_group=process_group)
        run.targets = run.targets * (1 + dist.get_rank())
        run.train(5 + 7 * dist.get_rank())
    return {"warnings": [str(each.message) for each in caught], **run.result()}


def train_in_named_groups() -> dict[str, Any]:
    """Two models, each by two ranks that average gradients themselves."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine = groups[dist.get_rank() // 2]
    run = Run("plain", process_group=mine)
    run.inputs, run.targets = data_of("ddp")
    if dist.get_rank() >= 2:
        run.targets = 2.0 * run.targets

    def closure() -> Tensor:
        loss = run.closure()
        if not run.optimizer.is_probing:
            for parameter in run.model.parameters():
                dist.all_reduce(parameter.grad, group=mine)
                parameter.grad /= 2
        return loss

    for _ in range(20):
        run.optimizer.step(closure)
    twin = copy.deepcopy(run.optimizer)
    pickled = pickle.loads(pickle.dumps(run.optimizer))
    return {"copies": (twin.process_group, pickled.process_group), **run.result()}


def wrong_groups() -> list[str]:
    """What the constructor says to groups that cannot be."""
    mesh = init_device_mesh(device().type, (dist.get_world_size(),))
    groups = [dist.new_group([0]), dist.new_group([1])]
    mine, other = groups[dist.get_rank()], groups[1 - dist.get_rank()]
    model = fsdp(mlp())
    said = []
    for group in (mesh, other, mine, "local"):
        with pytest.raises((TypeError, ValueError)) as caught:
            GeNOptimizer(torch.optim.SGD(model.parameters()), process_group=group)  # type: ignore[arg-type]
        said.append(f"{caught.typename}: {caught.value}")
    return said


def older_fsdp() -> None:
    Run("ddp", wrap=FullyShardedDataParallel, process_group=dist.group.WORLD).train(1)


# --- what a probe leaves behind --------------------------------------------------------------------------------------


class Collectives(TorchDispatchMode):
    """Counts collectives, by name; ``CommDebugMode`` hooks into the backward pass, which probes leave out."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in func.name():
            self.counts[func.name().split("::")[1].strip("_")] += 1
        return func(*args, **(kwargs or {}))


def count_collectives(kind: str, mode: str) -> dict[str, list[Any]]:
    """How many collectives each step runs, of the bare base optimizer and wrapped; and which of those probe."""
    counts: dict[str, list[Any]] = {"is_probed": []}
    run = Run(kind, norm=kind == "ddp")
    with torch.no_grad(), Collectives() as collectives:
        run.model.eval()(run.inputs)
    counts["forward"] = [dict(collectives.counts)]
    for name in ("bare", "wrapped"):
        run = Run(kind, "sgd", norm=kind == "ddp", mode=mode, period=2, burn_in=0, rule="published")
        run.model.eval()  # a model in training would differ in the last bits of its statistics only
        optimizer = run.optimizer if name == "wrapped" else run.optimizer.base_optim
        counts[name] = []
        for _ in range(6):
            with Collectives() as collectives:
                optimizer.step(run.closure)
            counts[name].append(dict(collectives.counts))
            if name == "wrapped":
                counts["is_probed"].append(len(run.history) > sum(counts["is_probed"]))
    return counts


def buffers_under_ddp(evaluates: bool) -> dict[str, Any]:
    """Statistics that differ between ranks are sent around before a forward pass, unless the last had no gradients.

    Probes do as the step's first call did, and leave the next one to do as if there had been none.
    """
    run = Run("ddp", norm=True, rule="published", period=1)
    run.model.eval()
    statistics = run.model.module[1]
    seen, losses = [], []
    for step in range(3):
        with torch.no_grad():
            if evaluates:
                run.model(run.inputs)
            statistics.running_mean.fill_(1.0 + step + dist.get_rank())
        loss = run.optimizer.step(run.closure, probe=run.loss)
        losses.append(run.ranks_mean(loss))
        seen.append((statistics.running_mean[0].item(), run.model.require_forward_param_sync))
    return {"here": [record.losses[1] for record in run.history], "first": losses, "seen": seen}


def gradient_penalty(**options: Any) -> dict[str, Any]:
    """A loss that differentiates inside needs a graph in its probes, which awaits no backward pass all the same."""
    run = Run("ddp", wrap=functools.partial(ddp, **options))
    reductions, awaits_backward = [], set()
    run.model.register_forward_pre_hook(
        lambda model, _: awaits_backward.add((run.optimizer.is_probing, model.require_backward_grad_sync))
    )

    def hook(state, bucket):  # type: ignore[no-untyped-def]  # torch does not take annotations that are strings
        reductions.append(run.optimizer.is_probing)
        return allreduce_hook(None, bucket)

    run.model.register_comm_hook(None, hook)
    run.inputs.requires_grad_()

    def closure() -> Tensor:
        run.optimizer.zero_grad()
        loss = run.loss()
        [slope] = torch.autograd.grad(loss, run.inputs, create_graph=True)
        loss = loss + slope.square().sum()
        loss.backward()
        return loss

    for _ in range(20):
        run.optimizer.step(closure)
    return {"reductions": reductions, "awaits_backward": awaits_backward, **run.result()}


def parameters_after_steps() -> list[str]:
    """Of which types the parameters of a sharded model are after each step."""
    run = Run("fsdp", period=2, burn_in=0)
    types = set()
    for _ in range(4):
        run.optimizer.step(run.closure)
        types |= {type(each).__name__ for each in run.model.parameters()}
        states = [module._get_fsdp_state() for module in run.model.modules() if isinstance(module, FSDPModule)]
        if torch.__version__ >= "2.13":  # before, the order of a forward pass without a backward pass is kept
            assert not any(state._comm_ctx.post_forward_order for state in states)
    return sorted(types)


def fail_within_the_model(kind: str) -> dict[str, Any]:
    """A probe fails on all ranks while the model's forward pass is under way."""
    run = Run(kind)
    run.train(3)
    middle = run.model.module[2] if kind == "ddp" else run.model[2]

    def fail(*_: Any) -> None:
        if run.optimizer.is_probing:
            raise KeyError("in the middle")

    handle = middle.register_forward_pre_hook(fail)
    with pytest.raises(KeyError, match="in the middle"):
        run.train(1)
    handle.remove()
    run.train(8)
    return run.result()


# --- arithmetic on shards --------------------------------------------------------------------------------------------


def inner_products() -> list[tuple[float, float]]:
    """The inner product of tensors with all placements, reduced with another number, and what it should be."""
    size = dist.get_world_size()
    line = init_device_mesh(device().type, (size,))
    generator = torch.Generator().manual_seed(3)
    left, right = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64).to(device())
    expected = (left * right).sum().item()
    spreads: list[tuple[Any, list[Placement], list[Placement]]] = [
        (line, [Shard(0)], [Shard(0)]),
        (line, [Shard(1)], [Shard(1)]),
        (line, [Replicate()], [Replicate()]),
        (line, [Partial()], [Replicate()]),
        (line, [Partial("avg")], [Replicate()]),
    ]
    if size == 4:
        grid = init_device_mesh(device().type, (2, 2))
        spreads += [
            (grid, [Shard(0), Shard(1)], [Shard(0), Shard(1)]),
            (grid, [Replicate(), Shard(0)], [Replicate(), Shard(0)]),
            (grid, [Partial(), Shard(0)], [Replicate(), Shard(0)]),
        ]
    found = []
    for mesh, one, other in spreads:
        lefts = distribute_tensor(left, mesh, [Replicate() if each.is_partial() else each for each in one])
        summands = math.prod(mesh.size(axis) for axis, each in enumerate(one) if each == Partial("sum"))
        lefts = DTensor.from_local(lefts.to_local() / summands, mesh, one, run_check=False)
        rights = distribute_tensor(right, mesh, other)
        ranks = ranks_of(None, [rights])
        for them in (rights, local(rights)):
            product, rank = ranks.mean([dot([lefts, None, left], [them, right, right]), float(dist.get_rank())])
            assert rank == (size - 1) / 2
            found.append((product, 2.0 * expected))
    for one, other in itertools.permutations([Replicate(), Shard(0), Shard(1)], 2):
        lefts, rights = distribute_tensor(left, line, [one]), distribute_tensor(right, line, [other])
        [product] = ranks_of(None, [rights]).mean([dot([lefts], [rights])])
        found.append((product, expected))
        parameter = nn.Parameter(rights)
        parameter.grad = lefts
        [product] = ranks_of(None, [rights]).mean([gradient_dot([parameter], [torch.zeros_like(local(rights))])])
        found.append((product, expected))
    return found


# --- checkpoints -----------------------------------------------------------------------------------------------------


def save(kind: str, folder: str, through: str, mode: str, steps: int) -> dict[str, Any]:
    run = Run(kind, mode=mode)
    run.train(steps)
    if through == "torch.save":
        state = {"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()}
        torch.save(state, f"{folder}/{dist.get_rank()}.pt")  # shards differ between ranks
    else:
        model, optimizer = get_model_state_dict(run.model), get_optimizer_state_dict(run.model, run.optimizer)
        dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=folder)
    looks_back = looks_back_next(run.optimizer)
    run.train(20)
    return {"looks_back": looks_back, **run.result()}


def resume(kind: str, folder: str, through: str, mode: str) -> dict[str, Any]:
    run = Run(kind, mode=mode)
    go_backward_once(run)
    if through == "torch.save":
        state = torch.load(f"{folder}/{dist.get_rank()}.pt", weights_only=True)
        run.model.load_state_dict(state["model"])
        run.optimizer.load_state_dict(state["optimizer"])
    else:
        model, optimizer = get_model_state_dict(run.model), get_optimizer_state_dict(run.model, run.optimizer)
        state = {"model": model, "optimizer": optimizer}
        dcp.load(state, checkpoint_id=folder)
        set_model_state_dict(run.model, state["model"])
        set_optimizer_state_dict(run.model, run.optimizer, state["optimizer"])
    run.train(20)
    return run.result()


def go_backward_once(run: Run) -> None:
    """Have DistributedDataParallel see in which order gradients arrive: it lays out its buckets anew after that."""
    run.closure()
    run.optimizer.zero_grad()


def resume_in_buckets(is_bare: bool, is_warm: bool, **options: Any) -> tuple[Numbers, Numbers]:
    """The parameters after training as a whole, and after going on in another DistributedDataParallel half way."""

    def begin() -> Run:
        run = Run("ddp", "sgd", mode="lookback", wrap=functools.partial(ddp, **options))
        if is_bare:
            run.optimizer = run.optimizer.base_optim  # type: ignore[assignment]
        return run

    whole, resumed = begin(), begin()
    whole.train(13)
    if is_warm:
        go_backward_once(resumed)
    resumed.model.load_state_dict(copy.deepcopy(whole.model.state_dict()))
    resumed.optimizer.load_state_dict(copy.deepcopy(whole.optimizer.state_dict()))
    whole.train(20)
    resumed.train(20)
    return numbers_of(whole.model), numbers_of(resumed.model)
