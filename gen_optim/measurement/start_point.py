"""The point where a step began, kept until the next step's closure has evaluated the point where it ended."""

from __future__ import annotations

import hashlib
import math
import operator
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gen_optim.closures.losses import Loss
from gen_optim.tensors.dtensor import gradient_dot, is_dtensor, local, placed_like
from gen_optim.tensors.foreach import chunks, clone, copy, lerp, near, squared_norms, write
from gen_optim.tensors.interrupts import despite_interrupts, exchange


class StartPoint:
    """Where a step began. The parameters can be put there, or anywhere between there and the end of the step, and back.

    At any time it holds one copy of the parameters, of the end of the step that they are not at; a second copy is made
    only if a point between both ends is visited. Of a DTensor, each rank keeps its own part.

    ``lr`` is the learning rate of the step, with the scheduler's factor. ``loss`` is the loss at the start point, on
    the batch that the step was computed from; infinite if it is not known. ``copies`` are those to keep, if there are
    some: :meth:`present_copies` of the start point before, for example. With ``on_host`` the copies are in the host's
    memory. If ``keeps_infinities`` is set, elements that are infinite stay so between both ends, and do not count in
    the slope.

    Moves write to the parameters' ``data``, which autograd does not notice: a graph that holds them (that of gradients
    that the base optimizer differentiates once more) remains valid, since they are put back bit for bit.
    """

    @torch.no_grad()
    def __init__(
        self,
        parameters: Sequence[Tensor],
        lr: float,
        *,
        loss: Loss = math.inf,
        copies: list[Tensor] | None = None,
        on_host: bool = False,
    ) -> None:
        self.lr, self.loss = lr, loss
        self.keeps_infinities = False
        self._parameters = parameters
        self._on_host = on_host
        self._is_visited = self._was_left = self._has_stayed = False
        self._copies = self._copied() if copies is None else copies
        # Chunks of parameters, with the copies that hold the end of the step while the parameters are at its start.
        self._swapped: dict[int, tuple[list[Tensor], list[Tensor]]] = {}
        self._starts: list[Tensor] = []
        self._marks: list[tuple[int, int, int]] | None = None
        self._length = 0.0
        self._fingerprint_expected = 0

    def present_copies(self, parameters: Sequence[Tensor]) -> list[Tensor] | None:
        """The copies, if the parameters are the same and have just been put back to the values that the copies hold."""
        return self._copies if self._was_left and self.is_of_exactly(parameters) else None

    def _copied(self) -> list[Tensor]:
        return [clone(each, on_host=self._on_host) for each in self._locals()]

    def _locals(self) -> list[Tensor]:
        return [local(each) for each in self._parameters]

    def _targets(self) -> list[Tensor]:
        return [each.data for each in self._locals()]

    # --- whether it is still valid ------------------------------------------------------------------------------------

    def arrive(self, *, measures_length: bool = False) -> None:
        """Note that the step has been taken. Whatever is written to the parameters from now on comes from elsewhere.

        ``measures_length`` allows writes that do not lengthen the step: a clamp, or a projection onto a convex set that
        holds the start point. The step then ends where these leave the parameters.
        """
        self._marks = self.marks()
        self._length = self._present_length() if measures_length else 0.0

    def is_of(self, parameters: Sequence[Tensor]) -> bool:
        """Whether these parameters made the step, and nothing has written to them since.

        A parameter that has moved counts even if it is frozen now: closures of networks that train in turn switch
        ``requires_grad`` on and off between their steps. A parameter that has not moved does not count, whether it can
        move now or not, because it has the same value at both ends of the step.
        """
        return set(map(id, parameters)).issuperset(map(id, self._parameters)) and self.is_intact()

    def is_of_exactly(self, parameters: Sequence[Tensor]) -> bool:
        """Whether these parameters and no others made the step, in the same order."""
        return len(parameters) == len(self._parameters) and all(map(operator.is_, parameters, self._parameters))

    def is_intact(self) -> bool:
        """Whether nothing has written to the parameters since their step."""
        for kept, present in zip(self._copies, self._locals(), strict=True):
            is_near = self._on_host or kept.device == present.device  # copies on the host serve any device
            if kept.shape != present.shape or kept.dtype != present.dtype or not is_near:
                return False
        if self._fingerprint_expected:  # loaded or copied: tensor versions began again
            if self._fingerprint_expected != self.fingerprint():
                return False
            self._fingerprint_expected = 0
            self.arrive(measures_length=self._length > 0.0)
        if self._marks is None or self._marks == self.marks():
            return True
        return self._length > 0.0 and 0.0 < self._present_length() <= 1.001 * self._length

    @torch.no_grad()
    def _present_length(self) -> float:
        """The distance between both ends of the step; 0 for DTensors, of which each rank sees its own part."""
        if any(map(is_dtensor, self._parameters)):
            return 0.0
        return float(squared_norms(self._copies, self._locals())[0].sqrt())

    def marks(self) -> list[tuple[int, int, int]]:
        """What changes if a parameter is written, or gets other memory (``p.data = ...``).

        A write to a DTensor counts there, and one to this rank's part of it counts in the part alone.
        """
        pairs = zip(self._parameters, self._locals(), strict=True)
        return [(whole._version, part._version, part.data_ptr()) for whole, part in pairs]

    @torch.no_grad()
    def fingerprint(self) -> int:
        """A number that differs if a bit of either end of the step differs, with near certainty.

        0, which stands for an unknown fingerprint, if parameters are DTensors: each rank would see its own part, and
        the ranks might decide differently.
        """
        if not self._parameters or any(map(is_dtensor, self._parameters)):
            return 0
        # Sums of bits are exact in any order, and defined for numbers that are NaN.
        sums = [_bits(each).sum(dtype=torch.int64) for each in (*self._parameters, *self._copies)]
        numbers = torch.stack([each.to(sums[0].device) for each in sums]).tolist()
        return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=7).digest(), "big") or 1

    @torch.no_grad()
    def duplicate(self) -> StartPoint:
        """A start point of the same step with copies of its own, while the parameters are at the end of the step."""
        copies = [each.clone() for each in self._copies]
        point = StartPoint(self._parameters, self.lr, loss=self.loss, copies=copies, on_host=self._on_host)
        point.keeps_infinities = self.keeps_infinities
        return point

    # --- moving -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def end_slope(self) -> Loss:
        """The slope of the loss at the end of the step, along the whole step: the gradients times the step.

        NaN if a parameter has moved that has no gradient now: the slope is not known then. Of DTensors it is this
        rank's share, as :func:`~gen_optim.tensors.dtensor.gradient_dot` returns it.
        """
        for parameter, end, start in zip(self._parameters, self._locals(), self._copies, strict=True):
            is_known = parameter.grad is not None and parameter.requires_grad
            if not (is_known or torch.equal(near([start], end.device)[0], end)):
                return math.nan
        return gradient_dot(self._parameters, self._copies, keeps_infinities=self.keeps_infinities)

    @torch.no_grad()
    def write(self, multiple: float) -> None:
        """Put the parameters at ``torch.lerp(start, end, multiple)``; 0 is the start of the step and 1 its end."""
        if not self._is_visited:
            if multiple == 1.0:
                return
            self._swap()
        if not self._starts:
            if multiple == 0.0:
                return
            self._starts = self._copied()
        lerp(self._targets(), self._starts, self._copies, multiple, keeps_infinities=self.keeps_infinities)

    def _swap(self) -> None:
        for index, (present, kept) in enumerate(chunks(self._targets(), self._copies)):
            exchange(present, kept, partial(self._swapped.__setitem__, index, (present, kept)))
        self._is_visited = True

    @torch.no_grad()
    def leave(self) -> None:
        """Put the parameters back to the end of the step."""
        despite_interrupts(*(partial(write, *each) for each in self._swapped.values()))
        self._swapped, self._starts, self._was_left = {}, [], self._is_visited

    @torch.no_grad()
    def stay(self) -> None:
        """Put the parameters to the start of the step, for good; may be repeated."""
        if self._has_stayed:
            return
        if self._starts:
            despite_interrupts(partial(copy, self._targets(), self._starts))
        else:
            parts = enumerate(chunks(self._targets(), self._copies))
            rest = [(present, kept) for index, (present, kept) in parts if index not in self._swapped]
            despite_interrupts(*(partial(write, *each) for each in rest))
        self._swapped, self._starts, self._has_stayed = {}, [], True

    # --- copies, pickles and checkpoints ------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles keep; tensor versions begin again in them."""
        return {**self.__dict__, "_marks": None, "_fingerprint_expected": self.fingerprint()}

    def tensors(self) -> dict[Tensor, Tensor]:
        """The start of the step by parameter, DTensors if the parameters are; the copies in use, not clones of them."""
        return {
            parameter: placed_like(start, parameter)
            for parameter, start in zip(self._parameters, self._copies, strict=True)
        }

    @classmethod
    @torch.no_grad()
    def load(
        cls,
        starts: dict[Tensor, Tensor],
        lr: float,
        fingerprint: int,
        *,
        loss: float = math.inf,
        on_host: bool = False,
    ) -> StartPoint:
        """The start point of a step whose other end is where the parameters are, or will be when the model is loaded.

        ``fingerprint`` is compared with that of both ends when the start point is used; 0 if it is unknown.
        """
        copies = [clone(local(start).to(local(parameter)), on_host=on_host) for parameter, start in starts.items()]
        point = cls(list(starts), lr, loss=loss, copies=copies, on_host=on_host)
        point._fingerprint_expected = fingerprint
        return point


def _bits(tensor: Tensor) -> Tensor:
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return real.reshape(-1).view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[real.itemsize])
