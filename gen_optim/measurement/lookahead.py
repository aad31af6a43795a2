"""Looking ahead: the loss at several multiples of the step that the base optimizer proposes."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable

from gen_optim.measurement.interpolation import Interpolation
from gen_optim.measurement.measurement import Measurement, Mode, StepLoss
from gen_optim.rules import InitialSearch, fit_parabola, search_initial_lr
from gen_optim.rules.initial_search import LARGEST


class LookAhead(Mode):
    """A parabola through the losses at several multiples of the next step, on the batch of its gradients.

    Through −1, 0 and 1 it is approximate GeN (Bu and Xu, arXiv:2407.02772, section 3). Through more points the parabola
    is fitted by least squares. Each point costs one forward pass; the loss at 0 is that of the closure's first call.

    The step fits the noise of its own batch, so that the slope is overestimated. This mode is for
    ``rule="published"``, or for a ``probe`` that evaluates another batch.

    Args:
        multiples: Where the loss is evaluated, in multiples of the step: at least three different numbers, one of them
            positive. 0 is added if it is missing.
        tolerance: As in :class:`~gen_optim.Mode`.

    Raises:
        ValueError: If ``multiples`` are not as said above, or not finite.

    Example:
        >>> LookAhead(multiples=(-2, -1, 0, 1, 2)).multiples
        (-2.0, -1.0, 0.0, 1.0, 2.0)
    """

    def __init__(self, multiples: Iterable[float] = (-1, 0, 1), *, tolerance: float = 8.0) -> None:
        super().__init__(tolerance=tolerance)
        multiples = tuple(multiples)
        points = sorted({float(each) for each in multiples})
        if len(points) < 3 or not all(map(math.isfinite, points)):
            raise ValueError(
                "multiples must hold at least three different finite numbers to fix a parabola, for example "
                f"(-1, 0, 1), got {multiples}"
            )
        if points[-1] <= 0.0:
            raise ValueError(
                "multiples must hold a positive number, a point ahead along the step, for example (-1, 0, 1), got "
                f"{multiples}"
            )
        self.multiples = tuple(sorted({0.0, *points}))

    def measure(self, loss: StepLoss) -> Measurement:
        """Fit a parabola through the losses at all multiples."""
        # The parameters are at 1, so that this point needs no move.
        for multiple in sorted(self.multiples, key=lambda each: (each != 1.0, -each)):
            loss.evaluate(multiple)
        losses, rounding = loss.read_with_rounding([loss.evaluate(multiple) for multiple in self.multiples])
        learning_rates = tuple(multiple * loss.lr for multiple in self.multiples)
        parabola = fit_parabola(learning_rates, losses, rounding=rounding)
        return Measurement(learning_rates, losses, parabola, losses[self.multiples.index(0.0)])


_LONGEST = LARGEST**10
"""The learning rate of the longest step along which one is searched."""

_SIZE = 0.1
"""Root mean square that smaller parameters count as, zero ones among them, if a step is compared with them."""


def measure_initial_search(loss: StepLoss) -> Measurement:
    """Search along the first step for the learning rate of the lowest loss; not at all if the loss is not finite."""
    (start,), rounding = loss.read_with_rounding([loss.evaluate(0.0)])
    if not math.isfinite(start):
        return Measurement((0.0,), (start,), InitialSearch(None, (), ()), start)
    found = search_initial_lr(
        lambda multiple: loss.read([loss.evaluate(multiple)])[0][0],
        start,
        rounding=rounding,
    )
    learning_rates = tuple(multiple * loss.lr for multiple in found.learning_rates)
    lr, is_bounded = None if found.lr is None else found.lr * loss.lr, True
    if found.lr is not None and found.lr >= LARGEST:
        assert isinstance(loss.path, Interpolation), "a search looks ahead"
        # The norms are those of all ranks, which have found the same and are all here.
        _, [step, start, count] = loss.read([], loss.path.norms())
        size = math.sqrt(step / max(start, _SIZE**2 * count, sys.float_info.min))
        if size * LARGEST > 1.0:
            # The loss still falls at a step longer than the parameters: it has no minimum that a search could find.
            # Training begins with a short step, and grows as the loss allows.
            lr, is_bounded = loss.lr / size, False
        elif loss.lr < _LONGEST:
            lr = None  # the step is too short to tell the direction from the rounding of the parameters
    search = InitialSearch(lr, learning_rates, found.losses, is_bounded)
    return Measurement((0.0, *learning_rates), (start, *found.losses), search, start)


def searched_lr(failures: int) -> float:
    """The learning rate of the step along which an initial learning rate is searched.

    It is large because the direction is a difference of parameters, whose rounding would drown that of a small step. It
    is larger after each search that found nothing, in case the gradients are very small, in a cycle of eleven.
    """
    return LARGEST ** (failures % 11)
