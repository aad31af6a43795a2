"""The buffers of modules, which a probe must leave as they were."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

__all__ = ["Buffers"]


class Buffers:
    """The buffers of the modules that a closure calls: as they were before its first call, and after.

    A buffer is kept as the tensor it is, wherever that stands, and the names under which a module holds its buffers
    are kept only where a call of the module changes them. For ``torch.func.functional_call`` lends modules other
    buffers, and what stands in a module while it is called need not be its own.

    Args:
        owners: Modules whose buffers are kept whether they are called or not.
    """

    def __init__(self, owners: Iterable[nn.Module] = ()) -> None:
        self._before, self._after = _Snapshot(), _Snapshot()
        self._modules: dict[nn.Module, None] = {}
        self._entered: dict[nn.Module, dict[str, Tensor | None]] = {}
        self._is_first = True
        # Those to which the optimizer's parameters belong may change theirs in methods that nobody notices.
        self._owned = self._look_at(owners)

    def modules(self) -> list[nn.Module]:
        """All modules that have been called, those below them, and the owners."""
        return list(self._modules)

    def enter(self, module: nn.Module) -> None:
        """Keep what a module and all below it hold, which is about to be called."""
        self._entered = self._look_at(module.modules())

    def leave(self, _: nn.Module) -> None:
        """Notice which modules hold other buffers than before the call."""
        self._compare(self._entered)
        self._entered = {}

    def _look_at(self, modules: Iterable[nn.Module]) -> dict[nn.Module, dict[str, Tensor | None]]:
        held = {each: dict(each._buffers.items()) for each in modules}
        self._modules.update(dict.fromkeys(held))
        for buffers in filter(None, held.values()):
            self._before.keep(buffers.values())
            if not self._is_first:  # what only a probe comes to see must end as it was before that probe
                self._after.keep(buffers.values())
        return held

    def _compare(self, before: Mapping[nn.Module, dict[str, Tensor | None]]) -> None:
        for module, held in before.items():
            if not held and not len(module._buffers):
                continue
            now = dict(module._buffers.items())
            if list(now) != list(held) or any(now[name] is not buffer for name, buffer in held.items()):
                self._before.names.setdefault(module, held)
                if not self._is_first:
                    self._after.names.setdefault(module, held)

    def end_first_call(self) -> None:
        """Keep what all of them hold after the first call."""
        self._compare(self._owned)
        self._is_first = False
        self._after.keep(self._before.contents)
        for module in self._before.names:
            self._after.names[module] = dict(module._buffers)
            self._after.keep(module._buffers.values())

    def rewind(self) -> None:
        """Put everything back to where the first call found it."""
        self._before.restore()

    def restore(self) -> None:
        """Put everything back to where the first call left it."""
        self._after.restore()


class _Snapshot:
    """Tensors with copies of their contents, and the names under which some modules hold them."""

    def __init__(self) -> None:
        self.contents: dict[Tensor, Tensor | None] = {}
        self.names: dict[nn.Module, Mapping[str, Tensor | None]] = {}

    def keep(self, buffers: Iterable[Tensor | None]) -> None:
        """Copy the contents of those not kept before."""
        for buffer in buffers:
            if buffer is not None and buffer not in self.contents:
                self.contents[buffer] = _copy(buffer)

    @torch.no_grad()
    def restore(self) -> None:
        """Put names and contents back; unseen, since ``batch_norm`` writes without a trace in ``_version``."""
        for module, held in self.names.items():
            module._buffers.clear()
            module._buffers.update(held)
        for buffer, copy in self.contents.items():
            if copy is not None:
                if buffer.shape != copy.shape:
                    buffer.resize_(copy.shape)
                buffer.copy_(copy)


def _copy(buffer: Tensor) -> Tensor | None:
    """A copy, or None of what torch refuses to write to in place, or what has no contents to go back to."""
    if is_lazy(buffer) or torch._C._functorch.is_functorch_wrapped_tensor(buffer):
        return None  # torch.func's own tensors are gone when the call is over
    if buffer.is_nested or buffer.is_inference():
        return None
    if buffer.layout is torch.strided and torch._debug_has_internal_overlap(buffer) == 1:
        return None
    return buffer.detach().clone()
