"""DTensors: what this rank holds of a parameter, and inner products over all ranks."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeGuard, TypeVar

import torch
from torch import Tensor, nn

from gen_optim.tensors.foreach import flat, inner_product, squared_norms
from gen_optim.tensors.scalars import summing_dtype

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor, Placement


T = TypeVar("T")

_PLAIN = (Tensor, nn.Parameter)


def is_dtensor(tensor: object) -> TypeGuard[DTensor]:
    """Return whether a tensor is a DTensor, without importing ``torch.distributed.tensor``, which takes a second."""
    if type(tensor) in _PLAIN:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor, in the same memory and without a graph; a plain tensor itself."""
    if type(tensor) in _PLAIN or not is_dtensor(tensor):  # the first test alone decides for nearly all tensors
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def placed_like(part: Tensor, tensor: Tensor) -> Tensor:
    """Make a DTensor like ``tensor`` of this rank's ``part``, without communication; ``part`` for a plain one."""
    if not is_dtensor(tensor):
        return part
    return type(tensor).from_local(
        part, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def whole(tensor: T) -> T:
    """Return the full tensor on every rank: a DTensor gathered and reduced, anything else unchanged."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor  # type: ignore[return-value]


def dot(left: Sequence[Tensor | None], right: Sequence[Tensor]) -> Tensor:
    """Return this rank's share of the real part of the inner product, which is the mean of the shares over the ranks.

    There is no communication here: the share is scaled for :meth:`Ranks.mean`, which reduces other numbers anyway, so
    that split tensors are summed and replicated ones count once. Without DTensors the share is the inner product. None
    on the left counts as zero. Right of a DTensor is another one, or this rank's part of one with the same placements.
    Only a DTensor whose placements are others than those on its right is redistributed, as torch's arithmetic does.

    The share is in :func:`~gen_optim.tensors.scalars.summing_dtype`, on the device of the tensors.
    """
    pairs = [(one, other) for one, other in zip(left, right, strict=True) if one is not None]
    device = local(right[0]).device if right else torch.device("cpu")
    total = torch.zeros((), dtype=summing_dtype(device), device=device)
    for one, other in pairs:
        matched = _matched(one, other)
        mine, theirs = local(matched).detach(), local(other).detach()
        total += parts_of(matched) * torch.sum(flat([mine]) * flat([theirs])).to(total)
    return total


def gradient_dot(parameters: Sequence[Tensor], starts: Sequence[Tensor], *, keeps_infinities: bool = False) -> Tensor:
    """Return this rank's share of ⟨gradients, parameters − starts⟩; parameters without a gradient count as zero.

    ``starts`` are this rank's parts, and may be on the host. The share is as in :func:`dot`, and ``keeps_infinities``
    as in :func:`~gen_optim.tensors.foreach.inner_product`.
    """
    alike: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for parameter, start in zip(parameters, starts, strict=True):
        if parameter.grad is not None and parameter.requires_grad:
            gradient = _matched(parameter.grad, parameter)
            parts = parts_of(gradient)
            alike.setdefault(parts, []).append((local(gradient).to_dense(), local(parameter), start))
    shares = [
        parts * inner_product(*zip(*tensors, strict=True), keeps_infinities=keeps_infinities)
        for parts, tensors in alike.items()
    ]
    return torch.stack([share.to(shares[0].device) for share in shares]).sum() if shares else torch.zeros(())


def step_norms(
    parameters: Sequence[Tensor], starts: Sequence[Tensor], ends: Sequence[Tensor]
) -> tuple[Tensor, Tensor, float]:
    """Return this rank's shares of ‖ends − starts‖², of ‖starts‖² and of the number of elements, as :func:`dot` does.

    ``starts`` and ``ends`` are this rank's parts of the parameters' values. For the norms see
    :func:`~gen_optim.tensors.foreach.squared_norms`.
    """
    alike: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for parameter, start, end in zip(parameters, starts, ends, strict=True):
        alike.setdefault(parts_of(parameter), []).append((start, end))
    norms = [parts * squared_norms(*zip(*tensors, strict=True)) for parts, tensors in alike.items()]
    step, start_norm = torch.stack([each.to(norms[0].device) for each in norms] or [torch.zeros(2)]).sum(dim=0)
    return step, start_norm, sum(parts * float(end.numel()) for parts, tensors in alike.items() for _, end in tensors)


def parts_of(tensor: Tensor) -> int:
    """Return the number of ranks whose parts have to be summed in an inner product of a tensor."""
    if not is_dtensor(tensor):
        return 1
    axes = zip(tensor.device_mesh.shape, tensor.placements, strict=True)
    return math.prod(size for size, placement in axes if _is_split(placement))


def _is_split(placement: Placement) -> bool:
    return not placement.is_replicate() and getattr(placement, "reduce_op", "sum") == "sum"


def _matched(left: Tensor, right: Tensor) -> Tensor:
    """Return ``left`` with the placements of ``right`` if both are DTensors."""
    if not (is_dtensor(left) and is_dtensor(right)):
        return left
    if all(map(_match, left.placements, right.placements)):
        return left
    return left.redistribute(placements=right.placements)


def _match(left: Placement, right: Placement) -> bool:
    # A gradient that has not been reduced yet: the reduction of the inner product is that of the gradient.
    is_unreduced = left.is_partial() and getattr(left, "reduce_op", None) in ("sum", "avg")
    return left == right or (is_unreduced and right.is_replicate())
