"""The point where training began, kept for as long as training may have to restart there."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.optim import Optimizer

from gen_optim.measurement.start_point import StartPoint
from gen_optim.tensors.dtensor import local
from gen_optim.tensors.interrupts import despite_interrupts


class InitialPoint:
    """The parameters that training moves, as they were before the first step of an optimizer without state.

    Copies are in the host's memory; of a DTensor, each rank keeps its own part. A restart would undo what something
    else than the optimizer has written to the parameters: :meth:`is_of` says whether that has happened.
    """

    def __init__(self, optimizer: Optimizer, parameters: Sequence[Tensor]) -> None:
        self._optimizer, self._parameters = optimizer, list(map(id, parameters))
        copies = [local(each).detach().to("cpu", copy=True) for each in parameters]  # not pinned: hardly ever read
        self._start = StartPoint(parameters, 0.0, copies=copies, on_host=True)

    @staticmethod
    def can_be_kept(optimizer: Optimizer) -> bool:
        """Whether the optimizer is torch's own, which keeps all of its state in ``state``, and has none yet."""
        is_known = f"{type(optimizer).__module__}.".startswith("torch.optim.")
        return is_known and not any(optimizer.state.values())

    def is_of(self, parameters: Sequence[Tensor]) -> bool:
        """Whether training moves these parameters, and nothing has written to them since :meth:`arrive`."""
        return self._parameters == list(map(id, parameters)) and self.is_intact()

    def is_intact(self) -> bool:
        """Whether nothing has written to the parameters since :meth:`arrive`."""
        return self._start.is_intact()

    def arrive(self) -> None:
        """Note that the optimizer, or something that has undone what it did, has written to the parameters."""
        self._start.arrive()

    def restore(self) -> None:
        """Put the parameters back, for good, and clear the optimizer's state; may be repeated."""
        despite_interrupts(self._start.stay, self._optimizer.state.clear)
