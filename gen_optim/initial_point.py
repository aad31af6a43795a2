"""The point where training began, kept for as long as training may begin anew there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from gen_optim.closures.buffers import Buffers
from gen_optim.measurement.start_point import StartPoint
from gen_optim.tensors.interrupts import despite_interrupts


class InitialPoint:
    """Where training began: the parameters that it moves, the buffers of ``modules``, an optimizer without state.

    Copies of parameters are in the host's memory; of a DTensor, each rank keeps its own part. They are of no use once
    something else than the optimizer has written to the parameters, or others are trained: going back would undo that.
    """

    def __init__(self, optimizer: Optimizer, parameters: Sequence[Tensor], modules: Iterable[nn.Module]) -> None:
        self._optimizer, self._parameters = optimizer, list(map(id, parameters))
        self._start = StartPoint(parameters, 0.0, on_host=True)
        self._buffers = Buffers(modules)

    @staticmethod
    def is_at(optimizer: Optimizer) -> bool:
        """Whether an optimizer has no state: none of ours to look into, and none elsewhere, as those of torch."""
        return type(optimizer).__module__.startswith("torch.optim.") and not any(optimizer.state.values())

    def is_of(self, parameters: Sequence[Tensor]) -> bool:
        """Whether these parameters are trained, and nothing has written to them since :meth:`arrive`."""
        return self._parameters == list(map(id, parameters)) and self.is_intact()

    def is_intact(self) -> bool:
        """Whether nothing has written to the parameters since :meth:`arrive`."""
        return self._start.is_intact()

    def arrive(self) -> None:
        """Note that the optimizer, or something that has undone what it did, has written to the parameters."""
        self._start.arrive()

    def restore(self) -> None:
        """Put everything back; may be repeated."""
        despite_interrupts(self._start.stay, self._buffers.rewind, self._optimizer.state.clear)
