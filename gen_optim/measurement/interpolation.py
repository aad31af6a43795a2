"""Any multiple of a step, interpolated between its two ends."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from gen_optim.tensors.dtensor import local, placed_like, step_norms
from gen_optim.tensors.foreach import clone, copy, lerp, near, room_for
from gen_optim.tensors.interrupts import despite_interrupts


class Interpolation:
    """The base optimizer's step from θ to θ_after, of which any multiple can be written to the parameters.

    It copies θ when it is made, before the base optimizer steps; :meth:`arrive` copies θ_after. Every point is computed
    from the two copies, and none by undoing another, so that nothing drifts however many points are visited.

    ``groups`` are the parameters that move, by parameter group; of a DTensor, each rank moves its own part. With
    ``on_host`` the copies are in the host's memory. With ``keeps_infinities`` elements that are infinite stay so
    between both ends, which takes one more pass.
    """

    @torch.no_grad()
    def __init__(
        self, groups: Sequence[Sequence[Tensor]], *, on_host: bool = False, keeps_infinities: bool = False
    ) -> None:
        self._parameters, self._keeps_infinities = groups, keeps_infinities
        self._groups = [[local(parameter).detach() for parameter in group] for group in groups]
        self._before = [[clone(parameter, on_host=on_host) for parameter in group] for group in self._groups]
        # Allocated now, so that a lack of memory shows before the base optimizer has moved anything.
        self._after = [[room_for(parameter, on_host=on_host) for parameter in group] for group in self._groups]
        self._is_at_end = False

    @torch.no_grad()
    def arrive(self) -> None:
        """Copy θ_after, the present values of the parameters."""
        for group, after in zip(self._groups, self._after, strict=True):
            copy(after, group)
        self._is_at_end = True

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

    @torch.no_grad()
    def norms(self) -> tuple[Tensor, Tensor, float]:
        """This rank's shares of the squared norms of the step and of θ, and of the number of elements."""
        parameters, before, after = (list(chain(*each)) for each in (self._parameters, self._before, self._after))
        return step_norms(parameters, before, after)

    def write(self, multiple: float) -> None:
        """Write ``torch.lerp(θ, θ_after, multiple)``; multiples 0 and 1 are exactly θ and θ_after."""
        self._write([multiple] * len(self._groups))

    def settle(self, multiples: Sequence[float]) -> None:
        """Write for good, one multiple per group. An interrupt in the middle is raised when everything is written."""
        despite_interrupts(partial(self._write, multiples))

    @torch.no_grad()
    def _write(self, multiples: Sequence[float]) -> None:
        is_at_end, self._is_at_end = self._is_at_end, False
        for group, before, after, multiple in zip(self._groups, self._before, self._after, multiples, strict=True):
            if multiple == 1.0:
                if not is_at_end:
                    copy(group, after)
            elif multiple == 0.0:
                copy(group, before)
            else:
                lerp(group, before, after, multiple, keeps_infinities=self._keeps_infinities)
