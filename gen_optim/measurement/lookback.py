"""Looking back: the loss along the last step, on the batch of the next one.

The next step's closure evaluates the loss at the end of the last step on a new batch, and its gradient there times the
step is the slope. One more evaluation, at the start point on the same batch, completes the parabola. The estimate is
unbiased, because the batch is not the one that the step was computed from, and costs a single forward pass.
"""

from __future__ import annotations

import math
from typing import ClassVar

from gen_optim.closures.losses import agree
from gen_optim.measurement.measurement import Measurement, Mode, StepLoss
from gen_optim.rules import Parabola, fit_parabola
from gen_optim.tensors.scalars import summing_dtype


class LookBack(Mode):
    """A parabola through the losses at both ends of the last step and the slope at its end, on a new batch.

    If the closure's backward pass is that of the loss, the slope comes from its gradients, before anything clips them,
    and one forward pass at the start is enough. If it is not, or if that is not known (the pass is that of a scaled or
    penalised loss, or the caller has computed the gradients), the loss is evaluated in the middle of the step, too, and
    at averaged weights if there are some and the rule asks for the excess loss.

    Args:
        tolerance: As in :class:`~gen_optim.Mode`.

    Example:
        >>> LookBack().looks_back
        True
    """

    looks_back: ClassVar[bool] = True

    def measure(self, loss: StepLoss) -> Measurement:
        """Fit the parabola to what is known at the end of the step, and the loss at its start."""
        end, start = loss.evaluate(1.0), loss.evaluate(0.0)
        differentiated = sum(each.detach().to(summing_dtype(each.device)) for each in loss.differentiated)
        # One reading decides for all ranks: what is NaN on one of them is NaN on all.
        (loss_start, loss_end, end_slope, excess_loss, of_gradients), [rounding] = loss.read(
            [start, end, loss.end_slope, loss.excess_loss, differentiated], [loss.session.rounding([start, end])]
        )
        learning_rates: tuple[float, ...] = (0.0, loss.lr)
        losses: tuple[float, ...] = (loss_start, loss_end)
        if not (math.isfinite(loss_start) and math.isfinite(loss_end)):
            parabola, excess_loss = Parabola(math.nan, math.nan, math.nan), math.nan
        elif math.isfinite(end_slope) and agree(of_gradients, loss_end, rounding):
            parabola = parabola_from_end(loss.lr, loss_start, loss_end, end_slope, rounding=rounding)
        else:  # the gradients do not belong to the loss
            (loss_middle, loss_averaged), _ = loss.read([loss.evaluate(0.5), loss.evaluate_averaged()])
            learning_rates, losses = (0.0, 0.5 * loss.lr, loss.lr), (loss_start, loss_middle, loss_end)
            parabola = fit_parabola(learning_rates, losses, rounding=rounding)
            excess_loss = loss_end - loss_averaged
        return Measurement(
            learning_rates, losses, parabola, loss_start, loss_end, excess_loss if math.isfinite(excess_loss) else None
        )


def parabola_from_end(lr: float, start: float, end: float, slope_at_end: float, *, rounding: float = 0.0) -> Parabola:
    """The parabola through the losses at both ends of a step, with its slope at the end.

    With g(1) and g′(1) at the end, in units of the step, g″ = 2 (g′(1) − g(1) + g(0)) and g′(0) = g′(1) − g″.

    ``slope_at_end`` is the derivative along the whole step, positive if the loss rises; ``rounding`` is the relative
    error of a loss.
    """
    curvature = 2.0 * (slope_at_end - end + start)
    slope = curvature - slope_at_end
    noise = 4.0 * rounding * max(abs(start), abs(end))
    return Parabola(start, slope / lr, curvature / lr / lr, noise / lr, noise / lr / lr)
