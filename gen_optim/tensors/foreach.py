"""Going through parameter-shaped tensors piece by piece: large ones are cut up, small ones taken together.

What is computed on the way then stays in the processor's cache instead of being as large as the parameters, and many
small tensors are handled by one call. Where nothing is computed on the way, large tensors are better left whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

__all__ = ["clone", "copy", "inner_product", "lerp", "near", "pieces", "room_for", "summing_dtype", "write"]

_SIZE = 2**17
"""Elements of a piece on the CPU, by measurement: twice as many and allocations go to the system, which takes longer
than all else."""
_SIZE_ELSEWHERE = 2**22
"""Elements of a piece on another device, where each call costs microseconds; not measured."""
_SHARE = 100
"""Of all tensors together, a piece is at most this part,"""
_LEAST = 2**15
"""unless that is less than this: calls would take longer than what they do."""


def pieces(*lists: Sequence[Tensor], cut: bool = True) -> Iterator[tuple[list[Tensor], ...]]:
    """Corresponding pieces of tensors, in batches of one device and dtype that ``torch._foreach_*`` takes at once.

    Args:
        lists: Tensors in corresponding order and of corresponding shapes.
        cut: Whether to cut large tensors; else they come alone. Where they are, copies of a batch take next to
            nothing of the memory that all of them take.

    Yields:
        One list of pieces for each list of tensors. The pieces are views.
    """
    share = sum(each.numel() for each in lists[0]) // _SHARE if cut else _SIZE_ELSEWHERE
    batch: list[tuple[Tensor, ...]] = []
    kind, limit, room = None, 0, 0
    for row in zip(*lists, strict=True):
        first, size = row[0], row[0].numel()
        if kind != (present := (first.device, first.dtype)):
            kind, room = present, 0
            limit = max(_LEAST, min(share, _SIZE if first.device.type == "cpu" else _SIZE_ELSEWHERE))
        if size <= room:  # of many small tensors nearly all
            batch.append(row)
            room -= size
            continue
        for part in _cut(row, limit) if cut and size > limit else (row,):
            taken = part[0].numel()
            if taken > room:
                if batch:
                    yield tuple(map(list, zip(*batch, strict=True)))
                batch, room = [], limit
            batch.append(part)
            room -= taken
    if batch:
        yield tuple(map(list, zip(*batch, strict=True)))


def _cut(row: Sequence[Tensor], limit: int) -> list[tuple[Tensor, ...]]:
    if all(each.is_contiguous() for each in row):
        return list(zip(*(torch.split(each.view(-1), limit) for each in row), strict=True))
    length = row[0].shape[0] if row[0].ndim else 1
    return list(zip(*(torch.split(each, max(1, limit * length // each.numel())) for each in row), strict=True))


def room_for(tensor: Tensor, *, on_host: bool) -> Tensor:
    """Memory for a copy of a tensor: next to it, or on the host, pinned where a CUDA device reads and writes it."""
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda) if on_host else torch.empty_like(tensor)


def clone(tensor: Tensor, *, on_host: bool = False) -> Tensor:
    """A copy of a tensor: next to it, or on the host."""
    return room_for(tensor, on_host=True).copy_(tensor) if on_host else tensor.clone()


def near(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Tensors on a device; copies of those that are elsewhere."""
    return [each if each.device == device else each.to(device, non_blocking=True) for each in tensors]


def write(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copy each source of a batch to its target. Nobody waits for the host's contents to arrive on a device."""
    # The other way round somebody must: whoever saves a copy reads it without asking the device.
    torch._foreach_copy_(targets, sources, non_blocking=targets[0].device.type != "cpu")


def summing_dtype(device: torch.device) -> torch.dtype:
    """The dtype in which sums of many numbers are kept on a device: float64, or float32 on MPS, which lacks it."""
    return torch.float32 if device.type == "mps" else torch.float64


def copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source to its target."""
    for target, source in pieces(targets, sources, cut=False):
        write(target, source)


def lerp(targets: Sequence[Tensor], starts: Sequence[Tensor], ends: Sequence[Tensor], weight: float) -> None:
    """Write ``torch.lerp(start, end, weight)`` to each target, bit for bit; starts and ends may be on the host."""
    are_apart = any(start.device != target.device for start, target in zip(starts, targets, strict=True))
    for target, start, end in pieces(targets, starts, ends, cut=are_apart):
        there = near(end, target[0].device)
        if len(target) == 1:
            [here] = near(start, target[0].device)
            torch.lerp(here, there[0], weight, out=target[0])
        else:
            write(target, start)
            torch._foreach_lerp_(target, there, weight)


def inner_product(gradients: Sequence[Tensor], ends: Sequence[Tensor], starts: Sequence[Tensor]) -> Tensor:
    """The real part of ⟨gradients, ends − starts⟩; nothing as large as the tensors is made on the way.

    Starts may be on the host. The sum is in :func:`summing_dtype`.
    """
    shares: list[Tensor] = []
    for gradient, end, start in pieces(gradients, ends, starts):
        step = _flat(end) - _flat(near(start, end[0].device))
        slope = _flat(gradient)
        shares.append(torch.dot(slope, step.to(slope.dtype)))
    if not shares:
        return torch.zeros((), dtype=torch.float64)
    device = shares[0].device
    return torch.stack([each.to(device, summing_dtype(device)) for each in shares]).sum()


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors end to end, in real numbers of 32 bits at least."""
    flat = tensors[0].reshape(-1) if len(tensors) == 1 else torch._utils._flatten_dense_tensors(tensors)  # type: ignore[no-untyped-call]
    if flat.dtype in (torch.float32, torch.float64):
        return flat
    real = torch.view_as_real(flat.resolve_conj()).reshape(-1) if flat.is_complex() else flat
    return real.to(torch.promote_types(real.dtype, torch.float32))
