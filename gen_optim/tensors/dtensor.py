"""Parameters of which each rank holds a part."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeGuard, TypeVar

import torch
from torch import Tensor, nn

from gen_optim.tensors.foreach import summing_dtype

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor, Placement

__all__ = ["dot", "is_dtensor", "local", "parts_of", "placed_like", "whole"]

T = TypeVar("T")

_PLAIN = (Tensor, nn.Parameter)


def is_dtensor(tensor: object) -> TypeGuard[DTensor]:
    """Whether a tensor is a DTensor, without importing them: that takes a second."""
    if type(tensor) in _PLAIN:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, in the same memory; not differentiable."""
    if type(tensor) in _PLAIN or not is_dtensor(tensor):  # the former alone, without a call, for nearly all
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def placed_like(part: Tensor, tensor: Tensor) -> Tensor:
    """The tensor of which this rank holds ``part``, spread as ``tensor`` is."""
    if not is_dtensor(tensor):
        return part
    return type(tensor).from_local(
        part, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def whole(tensor: T) -> T:
    """A tensor with nothing left to gather or to add up, on every rank: plain tensors and numbers as they are."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor  # type: ignore[return-value]


def dot(left: Sequence[Tensor | None], right: Sequence[Tensor]) -> Tensor:
    """This rank's share of the inner product of two lists of tensors: the mean over the ranks is the whole.

    No rank communicates here. The share is scaled so that :meth:`Ranks.mean`, which reduces other numbers anyway,
    makes one sum of the parts and counts what several ranks hold alike once. Without DTensors it is the inner product.

    Args:
        left: Gradients, for example; None counts as zero.
        right: Tensors of the same shapes. Next to a DTensor on the left, one spread in the same way, or only what this
            rank holds of it.

    Returns:
        A scalar on the device of the tensors, in float64 where that device has it.

    Raises:
        ValueError: If two tensors are spread in different ways.
    """
    pairs = [(one, other) for one, other in zip(left, right, strict=True) if one is not None]
    device = local(right[0]).device if right else torch.device("cpu")
    total = torch.zeros((), dtype=summing_dtype(device), device=device)
    for one, other in pairs:
        mine, theirs = local(one).detach(), local(other).detach()
        total += parts_of(one, other) * torch.sum(mine.conj() * theirs).real.to(total)
    return total


def parts_of(left: Tensor, right: Tensor) -> int:
    """Into how many parts the inner product of two tensors falls."""
    if not is_dtensor(left):
        return 1
    theirs = right.placements if is_dtensor(right) else [None] * len(left.placements)
    sizes = [left.device_mesh.size(axis) for axis in range(left.device_mesh.ndim)]
    return math.prod(
        size for size, mine, other in zip(sizes, left.placements, theirs, strict=True) if _is_split(mine, other)
    )


def _is_split(left: Placement, right: Placement | None) -> bool:
    """Whether an inner product has to be summed along an axis of the mesh."""
    if left.is_partial():  # a gradient that nobody has added up yet
        if (right is None or right.is_replicate()) and getattr(left, "reduce_op", None) in ("sum", "avg"):
            return getattr(left, "reduce_op", None) == "sum"
    elif right is None or left == right:
        return not left.is_replicate()
    raise ValueError(f"tensors must be spread over the ranks in the same way, got {left} and {right}")
