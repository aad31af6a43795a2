"""The kept θ and θ_after, and writing any multiple of the step between them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from gen_optim.tensors.dtensor import local, placed_like
from gen_optim.tensors.foreach import clone, copy, lerp, near, room_for

__all__ = ["Move", "movable"]


def movable(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Those parameters that a step can change."""
    return [each for each in parameters if each.requires_grad or each.grad is not None]


class Move:
    """The base optimizer's step from θ to θ_after, of which any multiple can be written.

    Made before the base optimizer steps, it copies θ; :meth:`arrive` copies θ_after. From then on every point is
    computed from the two copies, and none by undoing another, so that nothing drifts however often it is called.

    Args:
        groups: The parameters that move, one sequence a parameter group. Of DTensors, each rank moves what it holds.
        on_host: Whether copies are in the host's memory.

    Example:
        >>> weight = torch.tensor([1.0])
        >>> move = Move([[weight]])
        >>> _ = weight.sub_(0.5)  # the base optimizer's step
        >>> move.arrive()
        >>> move.write(-1.0)
        >>> weight
        tensor([1.5000])
    """

    @torch.no_grad()
    def __init__(self, groups: Sequence[Sequence[Tensor]], *, on_host: bool = False) -> None:
        self._parameters = groups
        self._groups = [[local(parameter).detach() for parameter in group] for group in groups]
        self._before = [[clone(parameter, on_host=on_host) for parameter in group] for group in self._groups]
        # Taken now, so that memory which runs out does so before the base optimizer has moved anything.
        self._after = [[room_for(parameter, on_host=on_host) for parameter in group] for group in self._groups]
        self._has_arrived = False

    @torch.no_grad()
    def arrive(self) -> None:
        """Copy θ_after: where the parameters are now."""
        for group, after in zip(self._groups, self._after, strict=True):
            copy(after, group)
        self._has_arrived = True

    def cancel(self) -> None:
        """Go back to θ, wherever the base optimizer has left off."""
        self.write(0.0)

    @torch.no_grad()
    def step(self) -> tuple[list[Tensor], list[Tensor]]:
        """The parameters that are trained, and θ − θ_after of each."""
        points = [
            each
            for group in zip(self._parameters, self._before, self._after, strict=True)
            for each in zip(*group, strict=True)
            if each[0].requires_grad
        ]
        return [parameter for parameter, _, _ in points], [
            placed_like(torch.sub(*near([start, end], local(each).device)), each) for each, start, end in points
        ]

    def write(self, multiple: float) -> None:
        """Write ``torch.lerp(θ, θ_after, multiple)``; multiples 0 and 1 are θ and θ_after themselves."""
        self._write([multiple] * len(self._groups))

    def settle(self, multiples: Sequence[float]) -> None:
        """Write for good, one multiple a group; an interrupt in the middle is raised only when all is written."""
        try:
            self._write(multiples)
        except BaseException:
            self._write(multiples)
            raise

    @torch.no_grad()
    def _write(self, multiples: Sequence[float]) -> None:
        is_there, self._has_arrived = self._has_arrived, False
        for group, before, after, multiple in zip(self._groups, self._before, self._after, multiples, strict=True):
            if multiple == 1.0:
                if not is_there:
                    copy(group, after)
            elif multiple == 0.0:
                copy(group, before)
            else:
                lerp(group, before, after, multiple)
