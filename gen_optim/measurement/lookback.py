"""Looking back: the point where a step began, kept until the next step's closure tells where it has led.

That closure evaluates the loss at the far end of the step on a new batch, and its gradient there times the step is the
slope. One more evaluation, at the kept point on the same batch, completes the parabola: an unbiased estimate, since
the batch is not the one that the step was made for, at the cost of a single forward pass.
"""

from __future__ import annotations

import math
import operator
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gen_optim.closures.losses import Loss
from gen_optim.measurement.interpolation import movable
from gen_optim.measurement.lookahead import Measurement
from gen_optim.rules.parabola import Parabola, fit_parabola
from gen_optim.tensors.dtensor import is_dtensor, local, parts_of
from gen_optim.tensors.foreach import clone, copy, inner_product, lerp, near, pieces, summing_dtype, write

__all__ = ["KeptPoint", "look_back", "parabola_from_end"]


class KeptPoint:
    """Where a step began. It outlives the step, by one; then parameters can be put there, and back again.

    One copy of the parameters is held at any time, of where they are not; a second one for a look half way.

    Args:
        parameters: Those that move. Of DTensors, each rank keeps what it holds.
        lr: The learning rate of the step, the scheduler's factor included.
        last: A point that they have just left, whose copy holds what is to be copied now.
        on_host: Whether copies are in the host's memory.

    Example:
        >>> weight = torch.tensor([1.0])
        >>> kept = KeptPoint([weight], lr=0.5)
        >>> _ = weight.sub_(0.5)  # the base optimizer's step
        >>> kept.visit()
        >>> weight
        tensor([1.])
        >>> kept.leave()
        >>> weight
        tensor([0.5000])
    """

    @torch.no_grad()
    def __init__(
        self, parameters: Sequence[Tensor], lr: float, *, last: KeptPoint | None = None, on_host: bool = False
    ) -> None:
        self.lr = lr
        self._parameters = parameters
        self._on_host = on_host
        self._is_visited = self._was_left = False
        serves = (
            last is not None
            and last._was_left
            and last._on_host == on_host
            and len(parameters) == len(last._parameters)
            and all(map(operator.is_, parameters, last._parameters))
        )
        self._copies: list[Tensor] = (
            last._copies if last is not None and serves else [clone(each, on_host=on_host) for each in self._locals()]
        )
        # Pieces of parameters, with the copies that hold what was there before.
        self._swapped: dict[int, tuple[list[Tensor], list[Tensor]]] = {}
        self._starts: list[Tensor] = []
        self._marks: list[tuple[int, int]] | None = None
        self._known: Tensor | None = None

    def _locals(self) -> list[Tensor]:
        return [local(each) for each in self._parameters]

    def arrive(self) -> None:
        """Note that the step has been taken; what is written to the parameters from now on is of other origin."""
        self._marks = self._present_marks()

    def is_of(self, parameters: Sequence[Tensor]) -> bool:
        """Whether it tells where these were before their last step, which nobody has changed since.

        Of two networks that train against each other, closures switch on and off which one requires gradients, and
        this may be asked in between: what has moved belongs to it either way, and what cannot move does not matter.
        """
        moved = set(map(id, self._parameters))
        present = [each for each in parameters if id(each) in moved or movable([each])]
        if len(present) != len(self._parameters) or not all(map(operator.is_, present, self._parameters)):
            return False
        return self.is_intact()

    def is_intact(self) -> bool:
        """Whether nobody has changed the parameters since their last step."""
        # Copies on the host are as good for any device.
        kind = _kind if self._on_host else _kind_and_place
        if list(map(kind, self._copies)) != list(map(kind, self._locals())):
            return False
        if self._known is not None:  # versions begin anew with what is loaded
            if not torch.equal(self._known.cpu(), self._fingerprint().cpu()):
                return False
            self._known = None
            self.arrive()
        return self._marks is None or self._marks == self._present_marks()

    def _present_marks(self) -> list[tuple[int, int]]:
        """What changes when somebody writes to a parameter, or puts other data in its place (``p.data = ...``)."""
        return [(each._version, each.data_ptr()) for each in self._locals()]

    @torch.no_grad()
    def rise(self) -> Tensor | None:
        """The slope of the loss at the end of the step in its direction: the gradients times the step.

        None where a parameter has moved whose gradient nobody has computed since: then it is not known.

        Where parameters are DTensors it is this rank's share, as :func:`~gen_optim.distributed.dot` has it.
        """
        alike: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}
        for parameter, end, start in zip(self._parameters, self._locals(), self._copies, strict=True):
            gradient = parameter.grad
            if gradient is not None and parameter.requires_grad:
                parts = parts_of(gradient, parameter)
                alike.setdefault(parts, []).append((_dense(local(gradient)), end, start))
            elif not torch.equal(near([start], end.device)[0], end):
                return None
        shares = [parts * inner_product(*zip(*tensors, strict=True)) for parts, tensors in alike.items()]
        return torch.stack([share.to(shares[0].device) for share in shares]).sum() if shares else torch.zeros(())

    @torch.no_grad()
    def visit(self) -> None:
        """Put the parameters where the step began, and where it has led in their place."""
        for index, (there, kept) in enumerate(pieces(self._locals(), self._copies)):
            end = [each.clone() for each in there]
            _in_spite_of_interrupts(
                partial(write, there, kept),
                partial(write, kept, end),
                partial(self._swapped.__setitem__, index, (there, kept)),
            )
        self._is_visited = True

    @torch.no_grad()
    def visit_middle(self) -> None:
        """Put them half way between there and where the step has led."""
        self._starts = [clone(each, on_host=self._on_host) for each in self._locals()]
        lerp(self._locals(), self._starts, self._copies, 0.5)

    @torch.no_grad()
    def leave(self) -> None:
        """Put them back to where the step has led."""
        _in_spite_of_interrupts(*(partial(write, *each) for each in self._swapped.values()))
        self._swapped, self._starts, self._was_left = {}, [], self._is_visited

    @torch.no_grad()
    def stay(self) -> None:
        """Put them where the step began, for good."""
        if self._starts:
            _in_spite_of_interrupts(partial(copy, self._locals(), self._starts))
        else:
            parts = enumerate(pieces(self._locals(), self._copies))
            rest = [(there, kept) for index, (there, kept) in parts if index not in self._swapped]
            _in_spite_of_interrupts(*(partial(write, *each) for each in rest))
        self._swapped, self._starts = {}, []

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles keep; versions begin anew in them."""
        return {**self.__dict__, "_marks": None, "_known": self._fingerprint()}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the learning rate, the copies in the order of the parameters, and a fingerprint.

        As everything that torch's optimizers hand out the copies are those in use. Later steps write to them.
        """
        return {"lr": self.lr, "start": list(self._copies), "fingerprint": self._fingerprint()}

    @torch.no_grad()
    def _fingerprint(self) -> Tensor:
        """What tells both ends of the step from others: sums of bits, exact in any order, and of numbers that are NaN.

        Empty where they are spread over ranks: each would see its own, and they might not go the same way.
        """
        if not self._parameters or any(map(is_dtensor, self._parameters)):
            return torch.zeros(0, dtype=torch.int64)
        sums = [_bits(each).sum(dtype=torch.int64) for each in (*self._parameters, *self._copies)]
        return torch.stack([each.to(sums[0].device) for each in sums])

    @classmethod
    def load(
        cls, parameters: Sequence[Tensor], state_dict: dict[str, Any], *, on_host: bool = False
    ) -> KeptPoint | None:
        """What :meth:`state_dict` has kept; None if it is of other parameters."""
        kept = cls([], state_dict["lr"], on_host=on_host)
        kept._copies = [
            clone(each.to(local(parameter)), on_host=on_host)
            for each, parameter in zip(state_dict["start"], parameters, strict=False)
        ]
        kept._parameters = parameters
        if len(state_dict["start"]) != len(parameters) or not kept.is_intact():
            return None
        # Compared later: the model may be loaded after its optimizer.
        kept._known = state_dict.get("fingerprint")
        return kept


def _kind(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
    return tensor.shape, tensor.dtype


def _kind_and_place(tensor: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return tensor.shape, tensor.dtype, tensor.device


def _dense(tensor: Tensor) -> Tensor:
    return tensor if tensor.layout is torch.strided else tensor.to_dense()


def _bits(tensor: Tensor) -> Tensor:
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return real.reshape(-1).view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[real.itemsize])


def _exact(number: Tensor) -> Tensor:
    return number.detach().to(summing_dtype(number.device))


def _in_spite_of_interrupts(*writes: Callable[[], object]) -> None:
    """Write one after the other; an interrupt in the middle is raised when all is written."""
    rest = deque(writes)
    try:
        while rest:
            rest[0]()
            rest.popleft()
    except BaseException:
        for write in rest:
            write()
        raise


def look_back(
    kept: KeptPoint,
    end: Loss | None,
    *,
    gradient_of: Sequence[Loss] | None,
    rise: Tensor | None,
    call: Callable[[], Loss],
    read: Callable[[Sequence[Loss]], list[float]],
    rounding: Callable[[Sequence[Loss]], float],
    is_alone: bool = False,
) -> Measurement:
    """Measure the loss along the last step on a batch that it was not made for.

    Where the gradients at the end of the step are those of the loss, they give its slope there, and one evaluation
    where the step began is enough. Where they are not, or nobody knows (they were clipped, scaled, or computed by the
    caller), the loss is evaluated half way too. The parameters end where the step began.

    Args:
        kept: Where the step began.
        end: The loss where it has led; None where that has to be evaluated.
        gradient_of: What the gradients are known to be those of: numbers that add up to the loss, if it is that.
        rise: The gradients times the step.
        call: Evaluates the loss where the parameters are.
        read: Turns losses into numbers to be minimised, the same on all ranks.
        rounding: The relative error of losses.
        is_alone: Whether no other rank takes part, whose gradients this one would have to ask for.

    Returns:
        The loss along the step, from where it began; ``arrival`` is the loss where it has led.
    """

    def half_way() -> Loss:
        kept.visit_middle()
        return call()

    end = call() if end is None else end
    kept.visit()
    start = call()
    is_known = gradient_of is not None and rise is not None
    summed = sum(_exact(torch.as_tensor(each)) for each in gradient_of or ())
    middle = half_way() if is_alone and not is_known else None  # before the reading, so that there is only one
    # One reading decides for all ranks: what is known of the gradients must be known on each.
    known, loss, arrival, far_slope, differentiated, error, between = read(
        [
            float(is_known),
            start,
            end,
            rise if is_known and rise is not None else 0.0,
            summed,
            rounding([start, end]),
            0.0 if middle is None else middle,
        ]
    )
    known, error = abs(known), abs(error)  # under ``maximize`` what is read changes its sign
    if not (math.isfinite(loss) and math.isfinite(arrival)):
        parabola = Parabola(math.nan, math.nan, math.nan)
    elif known == 1.0 and abs(differentiated - arrival) <= 2.0 * error * max(abs(arrival), abs(differentiated)):
        parabola = parabola_from_end(kept.lr, loss, arrival, far_slope, rounding=error)
    else:
        if middle is None:
            [between] = read([half_way()])
        learning_rates, losses = (0.0, 0.5 * kept.lr, kept.lr), (loss, between, arrival)
        parabola = fit_parabola(learning_rates, losses, rounding=error)
        return Measurement(learning_rates, losses, end, loss, parabola, arrival)
    return Measurement((0.0, kept.lr), (loss, arrival), end, loss, parabola, arrival)


def parabola_from_end(lr: float, start: float, end: float, slope_at_end: float, *, rounding: float = 0.0) -> Parabola:
    """The parabola through the losses at both ends of a step, with its slope at the far one.

    With g(1) and g′(1) at the end, in units of the step, g″ = 2 (g′(1) − g(1) + g(0)) and g′(0) = g′(1) − g″.

    Args:
        lr: The learning rate of the step.
        start: The loss where it began.
        end: The loss where it has led.
        slope_at_end: The derivative of the loss there along the whole step; positive where it rises.
        rounding: The relative error of a loss.

    Example:
        >>> parabola = parabola_from_end(0.5, start=1.0, end=0.5, slope_at_end=-0.5)  # 1 − 0.5 s, a straight line
        >>> parabola.slope, parabola.curvature
        (1.0, 0.0)
    """
    curvature = 2.0 * (slope_at_end - end + start)
    slope = curvature - slope_at_end
    noise = 4.0 * rounding * max(abs(start), abs(end))
    return Parabola(start, slope / lr, curvature / lr / lr, noise / lr, noise / lr / lr)
