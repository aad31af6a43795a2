"""Looking back: the point where a step began, kept until the next step's closure tells where it has led.

That closure evaluates the loss at the far end of the step on a new batch, and its gradient there times the step is the
slope. One more evaluation, at the kept point on the same batch, completes the parabola: an unbiased estimate, since
the batch is not the one that the step was made for, at the cost of a single forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gen_optim.distributed import dot, local, placed_like
from gen_optim.evaluating import Loss
from gen_optim.measuring import Measurement
from gen_optim.quadratic import Parabola, fit_parabola

__all__ = ["KeptPoint", "look_back", "parabola_from_end"]


class KeptPoint:
    """Where a step began. It outlives the step, by one; then parameters can be put there, and back again.

    One copy of the parameters is held at any time, of where they are not; a second one for a look half way.

    Args:
        parameters: Those that move. Of DTensors, each rank keeps what it holds.
        lr: The learning rate of the step, the scheduler's factor included.

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
    def __init__(self, parameters: Sequence[Tensor], lr: float) -> None:
        self.lr = lr
        self._start: list[Tensor | None] = [local(each).clone() for each in parameters]
        self._end: list[Tensor | None] = [None] * len(parameters)
        self._versions: list[int] | None = None
        self._parameters = parameters

    def arrive(self) -> None:
        """Note that the step has been taken; what is written to the parameters from now on is of other origin."""
        self._versions = [local(each)._version for each in self._parameters]

    def is_of(self, parameters: Sequence[Tensor]) -> bool:
        """Whether it tells where these parameters were before their last step, which nobody has changed since."""
        starts = [each for each in self._start if each is not None]
        if [each.shape for each in starts] != [local(each).shape for each in parameters]:
            return False
        return self._versions is None or self._versions == [local(each)._version for each in parameters]

    def rise(self) -> Tensor:
        """The slope of the loss at the end of the step in its direction: the gradients times the step, in float64.

        Where parameters are DTensors it is this rank's share, as :func:`dot` has it.
        """
        shares = [
            dot([each.grad], [placed_like(local(each.detach()) - start, each)])
            for each, start in zip(self._parameters, self._start, strict=True)
            if each.grad is not None and start is not None
        ]
        return torch.stack([share.to(shares[0].device) for share in shares]).sum() if shares else torch.zeros(())

    @torch.no_grad()
    def visit(self) -> None:
        """Put the parameters where the step began."""
        for index, (parameter, start) in enumerate(zip(self._parameters, self._start, strict=True)):
            assert start is not None, "it has been visited before"
            self._end[index] = local(parameter).clone()
            local(parameter).copy_(start)
            self._start[index] = None

    @torch.no_grad()
    def visit_middle(self) -> None:
        """Put them half way between there and where the step has led."""
        for index, (parameter, end) in enumerate(zip(self._parameters, self._end, strict=True)):
            assert end is not None, "its start comes first"
            self._start[index] = start = local(parameter).clone()
            torch.lerp(start, end, 0.5, out=local(parameter))

    def leave(self) -> None:
        """Put them back to where the step has led, for good: all copies are freed."""
        self._write(self._end)

    def stay(self) -> None:
        """Put them where the step began, for good: all copies are freed."""
        self._write(self._start)

    @torch.no_grad()
    def _write(self, contents: Sequence[Tensor | None]) -> None:
        def write() -> None:
            for parameter, content in zip(self._parameters, contents, strict=True):
                if content is not None:  # else it is there
                    local(parameter).copy_(content)

        try:
            write()
        except BaseException:  # an interrupt, which has to wait until all is written
            write()
            raise
        finally:
            self._start, self._end = [], []

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles keep; versions begin anew in them."""
        return {**self.__dict__, "_versions": None}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the learning rate, and the contents in the order of the parameters."""
        return {"lr": self.lr, "start": list(self._start)}

    @classmethod
    def load(cls, parameters: Sequence[Tensor], state_dict: dict[str, Any]) -> KeptPoint | None:
        """What :meth:`state_dict` has kept; None if it is of other parameters."""
        kept = cls([], state_dict["lr"])
        kept._start = [
            each.to(local(parameter), copy=True)
            for each, parameter in zip(state_dict["start"], parameters, strict=False)
        ]
        kept._end, kept._parameters = [None] * len(kept._start), parameters
        return kept if len(state_dict["start"]) == len(parameters) and kept.is_of(parameters) else None


def look_back(
    kept: KeptPoint,
    end: Loss | None,
    *,
    gradient_of: Sequence[Loss] | None,
    rise: Tensor | None,
    call: Callable[[], Loss],
    read: Callable[[Sequence[Loss]], list[float]],
    rounding: Callable[[Sequence[Loss]], float],
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

    Returns:
        The loss along the step, from where it began; ``arrival`` is the loss where it has led.
    """
    end = call() if end is None else end
    kept.visit()
    start = call()
    is_known = gradient_of is not None and rise is not None
    summed = sum((torch.as_tensor(each).detach().double() for each in gradient_of or ()), torch.zeros(()).double())
    # One reading decides for all ranks: what is known of the gradients must be known on each.
    known, loss, arrival, far_slope, differentiated, error = read(
        [float(is_known), start, end, rise if is_known and rise is not None else 0.0, summed, rounding([start, end])]
    )
    known, error = abs(known), abs(error)  # under ``maximize`` what is read changes its sign
    if not (math.isfinite(loss) and math.isfinite(arrival)):
        parabola = Parabola(math.nan, math.nan, math.nan)
    elif known == 1.0 and abs(differentiated - arrival) <= 2.0 * error * max(abs(arrival), abs(differentiated)):
        parabola = parabola_from_end(kept.lr, loss, arrival, far_slope, rounding=error)
    else:
        kept.visit_middle()
        [middle] = read([call()])
        learning_rates, losses = (0.0, 0.5 * kept.lr, kept.lr), (loss, middle, arrival)
        parabola = fit_parabola(learning_rates, losses, rounding=error)
        return Measurement(learning_rates, losses, start, loss, parabola, arrival)
    return Measurement((0.0, kept.lr), (loss, arrival), start, loss, parabola, arrival)


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
