"""Finding the modules that a closure calls, and undoing what parallel ones do in a probe.

This file uses private names of torch, each with a comment that says what it is for.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gen_optim.tensors.dtensor import is_dtensor

_FSDP = "torch.distributed.fsdp"


def check_modules(modules: Any) -> tuple[nn.Module, ...]:
    """Return the option ``modules`` as a tuple; raise a TypeError if it is neither a module nor modules."""
    if isinstance(modules, nn.Module):
        return (modules,)
    advice = "must be a torch.nn.Module or a sequence of them"
    if isinstance(modules, (str, dict)) or not isinstance(modules, Iterable):
        raise TypeError(f"modules {advice}, got {type(modules).__name__}")
    found = tuple(modules)
    for each in found:
        if not isinstance(each, nn.Module):
            came = f"a class, {each.__name__}" if isinstance(each, type) else type(each).__name__
            raise TypeError(f"modules {advice}, got one that contains {came}")
    return found


def with_children(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Return modules and all modules below them, each once."""
    return _reached(modules, children_of)


def _reached(modules: Iterable[nn.Module], next_to: Callable[[nn.Module], list[nn.Module]]) -> list[nn.Module]:
    found: dict[nn.Module, None] = {}
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        if module not in found:
            found[module] = None
            waiting += next_to(module)
    return list(found)


def children_of(module: nn.Module) -> list[nn.Module]:
    """Return the modules directly below one."""
    return [child for _, child in nn.Module.named_children(module)]  # not the method, which classes override


def owners_of(parameters: Iterable[Tensor]) -> list[nn.Module]:
    """Return the modules that own parameters, and those above them, among all modules alive.

    An optimizer is given parameters, which do not refer to their modules. This walks over all objects, once per set of
    parameters, which takes 40 ms at 174,000 objects. It is the fallback for parameters that no module in ``modules=``
    owns. Without it, users would have to name the model to keep its batch normalisation from seeing probes, and the
    DistributedDataParallel around it to have losses averaged.
    """
    wanted = {id(parameter) for parameter in parameters}
    modules = live_modules()
    parents: dict[int, list[nn.Module]] = {}
    for module in modules:
        for child in children_of(module):
            parents.setdefault(id(child), []).append(module)
    owners = (each for each in modules if not wanted.isdisjoint(map(id, parameters_of(each))))
    return _reached(owners, lambda module: parents.get(id(module), []))


def parameters_of(module: nn.Module) -> list[Tensor]:
    """Return a module's own parameters."""
    return [parameter for _, parameter in nn.Module.named_parameters(module, recurse=False)]


def live_modules() -> list[nn.Module]:
    """Return all modules alive, by a walk over all objects."""
    # By type, since some proxies load what they represent when asked for their class. ``_modules`` is the last
    # attribute that the constructor sets: without it, a module is not ready to be asked for anything.
    return [each for each in gc.get_objects() if issubclass(type(each), nn.Module) and "_modules" in vars(each)]


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """Return a module's own buffers by name, None included."""
    # named_buffers(recurse=False) leaves out those that are None: one that a call sets to None would seem removed.
    return dict(module._buffers)


def put_buffers(module: nn.Module, buffers: dict[str, Tensor | None]) -> None:
    """Have a module hold exactly these buffers, in this order."""
    # register_buffer appends, and would have to be told which ones are persistent; state_dict() would change its order.
    module._buffers.clear()
    module._buffers.update(buffers)


class ParallelModules:
    """The parallel modules that a closure calls, as they were before its first call.

    ``DistributedDataParallel`` broadcasts buffers before a forward pass and prepares a backward pass after it.
    ``fully_shard`` gathers parameters, and records their order. A probe runs no backward pass to end that. A
    FullyShardedDataParallel, whose parameters cannot be found, and a module within ``join()`` are refused.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        modules = list(modules)
        fsdp = sys.modules.get(_FSDP)
        if fsdp is not None and any(isinstance(each, fsdp.FullyShardedDataParallel) for each in modules):
            raise RuntimeError(
                "GeNOptimizer works with torch.distributed.fsdp.fully_shard, but the parameters belong to a "
                "FullyShardedDataParallel module, the older of the two. Apply fully_shard to the model instead."
            )
        self._sharded = [each for each in modules if is_fully_sharded(each)]
        self._replicas = [each for each in modules if isinstance(each, DistributedDataParallel)]
        # No public name says whether a module is within join(). Without it, the process would hang or abort.
        if any(each._join_config.enable for each in self._replicas):
            raise RuntimeError(
                "GeNOptimizer cannot measure the loss within DistributedDataParallel.join(): a rank that has run out "
                "of data answers the backward passes of the others, and not their probes. Give all ranks equally many "
                "batches, for example with DistributedSampler or drop_last=True."
            )
        self._broadcasts = [each.require_forward_param_sync for each in self._replicas]
        self._kept: list[tuple[bool, bool]] = []  # empty before the first replay

    def begin_replay(self) -> None:
        """Let the modules do in a probe what they did in the first call, except for gradients."""
        self._kept = [(each.require_forward_param_sync, each.require_backward_grad_sync) for each in self._replicas]
        release(self._sharded)  # a backward pass leaves parameters gathered: those from before the step
        for replica, broadcasts in zip(self._replicas, self._broadcasts, strict=True):
            # A forward pass without gradients turns broadcasting off for the next one.
            replica.require_forward_param_sync = broadcasts
            replica.require_backward_grad_sync = False

    def end_replay(self) -> None:
        """Undo that; may be repeated."""
        for replica, (broadcasts, reduces) in zip(self._replicas, self._kept, strict=False):
            replica.require_forward_param_sync = broadcasts
            replica.require_backward_grad_sync = reduces
        release(self._sharded)


def release(modules: Iterable[nn.Module]) -> None:
    """Have modules of ``fully_shard`` hold shards again, and forget the forward pass whose end they await."""
    for module in modules:
        if is_fully_sharded(module):
            wrapped: Any = module
            if not hasattr(wrapped, "reset_iter_state"):  # torch < 2.13
                wrapped.reshard()
            # reset_iter_state() is refused below the root, and no public name says which module that is. It is None
            # before the first forward pass.
            elif wrapped._get_fsdp_state()._is_root:
                wrapped.reset_iter_state()


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether ``fully_shard`` has been applied to a module."""
    fsdp = sys.modules.get(_FSDP)  # not imported, not applied
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def check_twice_differentiable(parameters: Iterable[Tensor]) -> None:
    """Refuse parameters whose loss cannot be differentiated twice.

    That is so under ``fully_shard``, and of DTensors before torch 2.13, whose second derivatives are silently wrong.
    """
    parameters = list(parameters)
    if _FSDP in sys.modules and any(map(is_fully_sharded, owners_of(parameters))):
        raise RuntimeError(
            "mode='exact' differentiates the loss twice, which fully_shard does not support: the gradients that it "
            "hands out have no graph. Use mode='approximate', or DistributedDataParallel."
        )
    if torch.__version__ < "2.13" and any(map(is_dtensor, parameters)):
        raise RuntimeError(
            "mode='exact' needs torch 2.13 or newer under tensor parallelism, but this is torch "
            f"{torch.__version__}, whose second derivatives of DTensors are wrong. Use mode='approximate'."
        )
