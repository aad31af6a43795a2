"""What parallel modules do besides their forward pass, done again for each probe or undone after it.

DistributedDataParallel sends buffers around before a forward pass and prepares for the backward pass after it;
``fully_shard`` gathers parameters and notes in which order. A probe has no backward pass that would clear that up.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ["ParallelModules", "check_twice_differentiable", "is_fully_sharded", "owners_of", "release"]

_FSDP = "torch.distributed.fsdp"


class ParallelModules:
    """The parallel modules that a closure calls, as they were before its first call.

    Args:
        owners: Modules to which the optimizer's parameters belong.

    Raises:
        RuntimeError: If one of them is wrapped in FullyShardedDataParallel, which does not say where parameters are.
    """

    def __init__(self, owners: Iterable[nn.Module]) -> None:
        owners = list(owners)
        fsdp = sys.modules.get(_FSDP)
        if fsdp is not None and any(isinstance(each, fsdp.FullyShardedDataParallel) for each in owners):
            raise RuntimeError(
                "GeNOptimizer works with torch.distributed.fsdp.fully_shard, but the parameters belong to a "
                "FullyShardedDataParallel module, the older of the two. Apply fully_shard to the model instead."
            )
        self._sends_buffers = {each: each.require_forward_param_sync for each in _replicas(owners)}

    @contextmanager
    def replaying(self, modules: Callable[[], Iterable[nn.Module]]) -> Iterator[None]:
        """Let them do in a probe what they did in the first call, no gradients apart, and leave no trace of it.

        Args:
            modules: All modules known to be called, which may be more afterwards.
        """
        kept = [
            (each, each.require_forward_param_sync, each.require_backward_grad_sync) for each in _replicas(modules())
        ]
        release(modules())  # units that the step's backward pass has left gathered hold the parameters from before it
        try:
            for replica, sends_buffers, _ in kept:
                # A forward pass without gradients turns the former off, for the next one to know.
                replica.require_forward_param_sync = self._sends_buffers.get(replica, sends_buffers)
                replica.require_backward_grad_sync = False
            yield
        finally:
            for replica, sends_buffers, reduces_gradients in kept:
                replica.require_forward_param_sync = sends_buffers
                replica.require_backward_grad_sync = reduces_gradients
            release(modules())


def release(modules: Iterable[nn.Module]) -> None:
    """Have ``fully_shard``'s modules hold shards again, and forget the forward pass that they await the end of."""
    for module in modules:
        if is_fully_sharded(module):
            wrapped: Any = module
            if not hasattr(wrapped, "reset_iter_state"):  # torch < 2.13
                wrapped.reshard()
            elif wrapped._get_fsdp_state()._is_root:  # None before it has ever been called
                wrapped.reset_iter_state()


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether ``fully_shard`` has been applied to a module."""
    fsdp = sys.modules.get(_FSDP)  # who has not imported it has not applied it
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def check_twice_differentiable(parameters: Iterable[Tensor]) -> None:
    """Refuse parameters whose loss cannot be differentiated twice.

    Raises:
        RuntimeError: If they belong to a module to which ``fully_shard`` has been applied.
    """
    if _FSDP in sys.modules and any(map(is_fully_sharded, owners_of(parameters))):
        raise RuntimeError(
            "mode='exact' differentiates the loss twice, which fully_shard does not support: the gradients that it "
            "hands out have no graph. Use mode='approximate', or DistributedDataParallel."
        )


def _replicas(modules: Iterable[nn.Module]) -> list[DistributedDataParallel]:
    return [each for each in modules if isinstance(each, DistributedDataParallel)]


def owners_of(parameters: Iterable[Tensor]) -> list[nn.Module]:
    """The modules to which parameters belong, and those above them, among all modules there are."""
    wanted = {id(parameter) for parameter in parameters}
    # By type, since asking some proxies for their class makes them load what they stand for.
    modules = [each for each in gc.get_objects() if issubclass(type(each), nn.Module) and "_parameters" in vars(each)]
    parents: dict[int, list[nn.Module]] = {}
    for module in modules:
        for child in module._modules.values():
            parents.setdefault(id(child), []).append(module)
    found: dict[nn.Module, None] = {}
    rising = [each for each in modules if any(id(parameter) in wanted for parameter in each._parameters.values())]
    while rising:
        module = rising.pop()
        if module not in found:
            found[module] = None
            rising += parents.get(id(module), [])
    return list(found)
