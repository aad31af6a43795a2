"""The buffers of modules, which probes must leave as they were."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gen_optim.closures.modules import buffers_of, put_buffers, with_children


class BufferSnapshot:
    """The buffers of modules at a time, to be put back later.

    Contents are copied, those of the tensors in ``others`` too, and the tensors under their names remembered, since a
    module may register buffers or assign other tensors to them.
    """

    def __init__(self, modules: Iterable[nn.Module], others: Iterable[Tensor] = ()) -> None:
        self._buffers = {module: buffers_of(module) for module in modules}
        held = (each for buffers in self._buffers.values() for each in buffers.values() if each is not None)
        self._contents = {
            each: each.detach().clone() for each in dict.fromkeys([*held, *others]) if _can_be_written(each)
        }

    def later(self) -> BufferSnapshot:
        """Take another one of the same modules, of those that are below them now, and of the same tensors."""
        return BufferSnapshot(with_children(self._buffers), self._contents)

    @torch.no_grad()
    def restore(self) -> None:
        """Put back tensors and contents, whether they have changed or not: ``batch_norm`` bumps no version."""
        for module, buffers in self._buffers.items():
            if not _is_same(buffers_of(module), buffers):
                put_buffers(module, buffers)
        for buffer, copy in self._contents.items():
            if buffer.shape != copy.shape:
                buffer.resize_(copy.shape)
            buffer.copy_(copy)

    def changed(self) -> list[nn.Module]:
        """Return the modules that hold other tensors or contents."""
        changed = {each for each, copy in self._contents.items() if not _equal(each, copy)}
        return [
            module
            for module, buffers in self._buffers.items()
            if not _is_same(buffers_of(module), buffers) or not changed.isdisjoint(buffers.values())
        ]


def _is_same(left: dict[str, Tensor | None], right: dict[str, Tensor | None]) -> bool:
    """Whether the same tensors are under the same names in the same order."""
    return list(left) == list(right) and all(left[name] is right[name] for name in left)


def _equal(buffer: Tensor, copy: Tensor) -> bool:
    """Whether a buffer has the contents of its copy; NaN equals itself."""
    return buffer.shape == copy.shape and torch.allclose(buffer, copy, rtol=0.0, atol=0.0, equal_nan=True)


def _can_be_written(buffer: Tensor) -> bool:
    """Whether a tensor has contents, and torch can write to them in place: no elements share their memory."""
    if is_lazy(buffer) or buffer.is_nested or buffer.is_inference():
        return False
    return buffer.layout is not torch.strided or not any(
        size > 1 and stride == 0 for size, stride in zip(buffer.shape, buffer.stride(), strict=True)
    )
