"""Processes that train one model together, and the mean of what they measure.

All ranks must choose the same learning rate, bit for bit, and call the closure equally often: otherwise they would wait
for each other for ever. So every number that a decision depends on is averaged first. An exception on one rank is kept
until the next average, by which all ranks learn of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gen_optim.tensors.dtensor import is_dtensor, local
from gen_optim.tensors.scalars import Scalar, to_floats
from gen_optim.warning import warn

T = TypeVar("T")
Instead = TypeVar("Instead")


class Ranks:
    """The processes that measure one loss together, each on its own part of the data; made for one step.

    It reduces over the groups one after the other; together they hold all ranks that take part. A process that trains
    alone has none: nothing is reduced then, and failures are raised at once. ``is_joined`` says whether backward passes
    of different ranks wait for each other.
    """

    def __init__(
        self, groups: Sequence[dist.ProcessGroup] = (), device: torch.device | None = None, *, is_joined: bool = False
    ) -> None:
        self._groups = tuple(groups)
        self._is_joined = is_joined
        self._size = math.prod(group.size() for group in groups)
        self._device = _device_for(groups[0], device) if groups else None
        self._failure: Exception | None = None

    def __len__(self) -> int:
        """The number of processes that take part."""
        return self._size

    def attempt(
        self, call: Callable[[], T], *, instead: Instead, went_backward: Callable[[], bool] | None = None
    ) -> T | Instead:
        """Make a call that may fail on this rank alone.

        If other ranks take part, a failure is kept for the next :meth:`mean` and ``instead`` is returned, so that this
        rank goes on making the same calls as they do. If a call runs a backward pass and ``went_backward`` says that it
        did not complete, the other ranks wait in the collectives of that pass, and would mistake later ones for these.
        Such a failure is raised at once, and the others learn of it from their process group.
        """
        try:
            return call()
        except Exception as error:
            leaves_others = self._is_joined and went_backward is not None and not went_backward()
            if leaves_others or not self.keep(error):
                raise
            return instead

    def keep(self, failure: BaseException) -> bool:
        """Keep a failure that this rank alone may have met for the next :meth:`mean`; return whether it is kept.

        The first failure counts. Interrupts are not kept, nor is any failure of a process that trains alone.
        """
        if not self._groups or not isinstance(failure, Exception):
            return False
        self._failure = self._failure or failure
        return True

    def mean(self, numbers: Sequence[Scalar]) -> list[float]:
        """The mean of each number over the ranks, the same bits on all of them: one all-reduce (one a group).

        Every rank must pass equally many. For a sum over shards, pass what :func:`~gen_optim.tensors.dtensor.dot`
        returns. NaN on one rank is NaN on all. A rank that has kept a failure raises it here, and the others a
        RuntimeError.
        """
        if not self._groups:
            return to_floats(numbers)
        flag = 0.0 if self._failure is None else 1.0
        scalars = [torch.as_tensor(each).detach().reshape(()) for each in (*numbers, flag)]
        sums = torch.stack([each.to(self._device, torch.float64) for each in scalars])
        try:
            for group in self._groups:
                dist.all_reduce(sums, group=group)
        except Exception as error:
            if self._failure is None:
                raise
            raise self._failure from error  # the failure is why this call did not match those of the other ranks
        *means, failures = sums.tolist()
        if self._failure is not None:
            raise self._failure
        if failures:
            raise RuntimeError(
                f"the step failed on {failures:.0f} of {self._size} ranks, and not on this one, which raises all the "
                "same because the ranks must stay together. The error of those that failed says why."
            )
        return [total / self._size for total in means]


def _device_for(group: dist.ProcessGroup, device: torch.device | None) -> torch.device:
    """A device on which a group can reduce: that of the parameters if possible, which may be offloaded to another."""
    # For example "cpu:gloo,cuda:nccl".
    capable = [each.partition(":")[0] for each in dist.get_backend_config(group).split(",")]
    if device is not None and device.type in capable:
        return device
    return torch.device(capable[0] if "cpu" not in capable else "cpu")


def ranks_of(
    process_group: Any, parameters: Sequence[Tensor], modules: Iterable[nn.Module] = (), *, warns: bool = False
) -> Ranks:
    """Return the processes that train these parameters together.

    If ``process_group`` is None, they are those of the DistributedDataParallel modules and of the meshes of the
    parameters that are DTensors; ``"local"`` is this process alone. With ``warns``, it warns if there are several
    processes and nothing says whether they train one model.
    """
    groups: list[dist.ProcessGroup]
    meshes = list(dict.fromkeys(each.device_mesh for each in parameters if is_dtensor(each)))
    replicas = [each for each in modules if isinstance(each, DistributedDataParallel)]
    if process_group is None:
        groups = []
        for mesh in meshes:
            world = dist.group.WORLD  # one all-reduce instead of one per axis of the mesh
            groups += [world] if world is not None and mesh.size() == world.size() else mesh.get_all_groups()
        groups += [each.process_group for each in replicas]
    elif isinstance(process_group, str) and process_group == "local":
        groups = []
    elif dist.is_available() and isinstance(process_group, dist.ProcessGroup):
        groups = [process_group]
    elif dist.is_available() and process_group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(
            "process_group must be one that this process is a member of, got the one that new_group() returns to all "
            "others. Give each process its own group, or 'local'."
        )
    else:
        raise TypeError(
            "process_group must be None, 'local' or a torch.distributed.ProcessGroup, got "
            f"{process_group!r}. Of a DeviceMesh give mesh.get_group()."
        )
    if process_group is not None and meshes:
        members = set(dist.get_process_group_ranks(process_group) if groups else [dist.get_rank()])
        missing = sorted(set().union(*(mesh.mesh.flatten().tolist() for mesh in meshes)) - members)
        if missing:
            raise ValueError(
                f"process_group must hold all ranks that parameters are spread over, but lacks {missing}: they hold "
                "parts of the same model. Leave it at None, which takes the parameters' own mesh."
            )
    if warns and process_group is None and not groups and processes() > 1:
        warn(
            f"GeNOptimizer runs in {processes()} processes and has found neither a DistributedDataParallel module nor "
            "DTensors: each process chooses a learning rate of its own. If they train one model together, give it "
            "process_group=torch.distributed.group.WORLD; if each trains a model of its own, process_group='local'."
        )
    device = local(parameters[0]).device if parameters else None
    return Ranks(_without_subsets(groups), device, is_joined=bool(meshes or replicas))


def _without_subsets(groups: Sequence[dist.ProcessGroup]) -> list[dist.ProcessGroup]:
    """The groups of more than one rank that no other group contains."""
    members = {group: frozenset(dist.get_process_group_ranks(group)) for group in groups}
    kept: list[dist.ProcessGroup] = []
    for group in sorted(members, key=lambda each: -len(members[each])):  # stable: as the parameters have them
        if len(members[group]) > 1 and not any(members[group] <= members[each] for each in kept):
            kept.append(group)
    return kept


def processes() -> int:
    """The number of processes that train; 1 without ``torch.distributed``."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
