"""Operations on lists of parameter-shaped tensors, chunk by chunk.

Large tensors are cut into chunks and small ones are batched, so that temporaries stay in the processor's cache instead
of being as large as the parameters, and many small tensors take one call. An operation without temporaries leaves
large tensors whole, which is faster.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gen_optim.tensors.scalars import summing_dtype, to_floats

_SIZE = 2**17
"""Largest number of elements in a chunk on the CPU. Measured: with twice as many, allocations go to the operating
system and take longer than the arithmetic."""
_SIZE_ELSEWHERE = 2**22
"""Largest number of elements in a chunk on another device, where each call costs microseconds. Not measured."""
_SHARE = 100
"""A chunk holds at most one part in ``_SHARE`` of all elements, so that a copy of it takes little memory."""
_LEAST = 2**15
"""A chunk may hold this many elements whatever the share: the calls for smaller ones take longer than their work."""


def chunks(*lists: Sequence[Tensor], cut: bool = True) -> Iterator[tuple[list[Tensor], ...]]:
    """Iterate over corresponding chunks, which are views, of lists of tensors of the same order and shapes.

    Each batch has one device and one dtype per list, as ``torch._foreach_*`` needs it. With ``cut=True`` a copy of a
    batch takes about 1 % of the memory of all tensors; without it, each large tensor is a batch of its own.
    """
    share = sum(each.numel() for each in lists[0]) // _SHARE if cut else _SIZE_ELSEWHERE
    batch: list[tuple[Tensor, ...]] = []
    kind, limit, room = None, 0, 0
    for row in zip(*lists, strict=True):
        size = row[0].numel()
        if kind != (present := [(each.device, each.dtype) for each in row]):
            kind, room = present, -1  # nothing else fits into the batch, an empty tensor neither
            limit = max(_LEAST, min(share, _SIZE if row[0].device.type == "cpu" else _SIZE_ELSEWHERE))
        if size <= room:  # the common case with many small tensors
            batch.append(row)
            room -= size
            continue
        for chunk in _cut(row, limit) if cut and size > limit else (row,):
            taken = chunk[0].numel()
            if taken > room:
                if batch:
                    yield tuple(map(list, zip(*batch, strict=True)))
                batch, room = [], limit
            batch.append(chunk)
            room -= taken
    if batch:
        yield tuple(map(list, zip(*batch, strict=True)))


def _cut(row: Sequence[Tensor], limit: int) -> list[tuple[Tensor, ...]]:
    if all(each.is_contiguous() for each in row):
        return list(zip(*(torch.split(each.view(-1), limit) for each in row), strict=True))
    length = row[0].shape[0] if row[0].ndim else 1
    return list(zip(*(torch.split(each, max(1, limit * length // each.numel())) for each in row), strict=True))


def room_for(tensor: Tensor, *, on_host: bool, dtype: torch.dtype | None = None) -> Tensor:
    """Allocate memory for a copy of a tensor, on its device or in the host's memory, pinned for a CUDA device."""
    if on_host:
        return torch.empty_like(tensor, dtype=dtype, device="cpu", pin_memory=tensor.is_cuda)
    return torch.empty_like(tensor, dtype=dtype)


def clone(tensor: Tensor, *, on_host: bool) -> Tensor:
    """Copy a tensor, on its device or in the host's memory."""
    return room_for(tensor, on_host=True).copy_(tensor) if on_host else tensor.clone()


def near(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Return the tensors on a device; only those that are on another one are copied."""
    return [each if each.device == device else each.to(device, non_blocking=True) for each in tensors]


def write(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copy each source of a batch to its target; from the host to a device this does not block.

    A copy to the host blocks, since that is read without synchronizing, by ``torch.save`` for example.
    """
    torch._foreach_copy_(targets, sources, non_blocking=targets[0].device.type != "cpu")


def copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source to its target."""
    for target, source in chunks(targets, sources, cut=False):
        write(target, source)


def has_infinities(tensors: Sequence[Tensor]) -> bool:
    """Return whether an element of the tensors is infinite."""
    found = [torch.isinf(each).any() for (batch,) in chunks(tensors) for each in batch]
    return any(to_floats(found))


def lerp(
    targets: Sequence[Tensor],
    starts: Sequence[Tensor],
    ends: Sequence[Tensor],
    weight: float,
    *,
    keeps_infinities: bool = False,
) -> None:
    """Write ``torch.lerp(start, end, weight)`` to each target, with the same bits.

    Weights 0 and 1 give the exact start and end, which may be on the host. With ``keeps_infinities``, elements that are
    infinite at both ends stay so, which takes one more pass; otherwise they become NaN.
    """
    are_apart = any(start.device != target.device for start, target in zip(starts, targets, strict=True))
    for target, start, end in chunks(targets, starts, ends, cut=are_apart):
        there = near(end, target[0].device)
        if len(target) == 1:
            [here] = near(start, target[0].device)
            torch.lerp(here, there[0], weight, out=target[0])
        else:
            write(target, start)
            torch._foreach_lerp_(target, there, weight)
        if keeps_infinities:
            for present, one, other in zip(target, near(start, target[0].device), there, strict=True):
                present.copy_(torch.where(one == other, one, present))


def inner_product(
    gradients: Sequence[Tensor], ends: Sequence[Tensor], starts: Sequence[Tensor], *, keeps_infinities: bool = False
) -> Tensor:
    """Return the real part of ⟨gradients, ends − starts⟩, without temporaries as large as the tensors.

    ``starts`` may be on the host. With ``keeps_infinities``, elements that are infinite at both ends have not moved.
    The result is in :func:`~gen_optim.tensors.scalars.summing_dtype`, on the device of the first tensors; 0 on the CPU
    if there are none.
    """
    shares: list[Tensor] = []
    for gradient, end, start in chunks(gradients, ends, starts):
        here, there = flat(near(start, end[0].device)), flat(end)
        step = there - here
        if keeps_infinities:
            step = torch.where(here == there, 0.0, step)
        slope = flat(gradient)
        shares.append(torch.dot(slope, step.to(slope.dtype)))
    if not shares:
        return torch.zeros((), dtype=torch.float64)
    device = shares[0].device
    return torch.stack([each.to(device, summing_dtype(device)) for each in shares]).sum()


def squared_norms(starts: Sequence[Tensor], ends: Sequence[Tensor]) -> Tensor:
    """Return ‖ends − starts‖² and ‖starts‖² as a tensor, without temporaries as large as the tensors.

    ``starts`` may be on the host. Elements that are not finite do not count. The dtype and the device are as in
    :func:`inner_product`.
    """
    shares: list[Tensor] = []
    for end, start in chunks(ends, starts):
        here, there = flat(near(start, end[0].device)), flat(end)
        rows = torch.stack([there - here, here]).to(summing_dtype(here.device))
        shares.append(rows.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0).square_().sum(dim=1))
    if not shares:
        return torch.zeros(2, dtype=torch.float64)
    return torch.stack([each.to(shares[0].device) for each in shares]).sum(dim=0)


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenate tensors to one vector of real numbers, in float32 or float64."""
    vector = torch.cat([each.reshape(-1) for each in tensors]) if len(tensors) > 1 else tensors[0].reshape(-1)
    if vector.dtype in (torch.float32, torch.float64):
        return vector
    real = torch.view_as_real(vector.resolve_conj()).reshape(-1) if vector.is_complex() else vector
    return real.to(torch.promote_types(real.dtype, torch.float32))
