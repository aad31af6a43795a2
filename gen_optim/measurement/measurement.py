"""The loss along one step of the base optimizer, and what a mode makes of it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from gen_optim.closures.losses import Loss
from gen_optim.closures.session import Session
from gen_optim.rules import InitialSearch, Parabola

if TYPE_CHECKING:
    from torch import Tensor


class Path(Protocol):
    """A step of which any multiple can be written to the parameters."""

    def write(self, multiple: float) -> None:
        """Put the parameters at a multiple of the step: 0 is where it began, 1 where it ends."""


class StepLoss:
    """The loss along one step of the base optimizer, as a function of the multiple of the step.

    A mode evaluates it where it likes, at most once per point. Losses stay on their device until :meth:`read` averages
    them over the processes that train the model together and turns them into numbers to be minimised.

    The argument ``losses`` has what is known already, None being ignored. ``own_loss`` is the loss where the step
    began, on the batch that the step was computed from; infinite if it is not known. ``averaged`` puts averaged weights
    into the model, None if no average is kept. ``valid`` is the multiple at which the first call of the step has
    succeeded.

    Attributes:
        path: The step.
        lr: Its learning rate.
        session: The calls of the closure.
        losses: The losses evaluated so far, by multiple of the step.
        end_slope: The derivative of the loss along the whole step at its end; NaN if it is not known. Of DTensors it
            is this rank's share, whose mean over the ranks is the slope.
        excess_loss: How far the loss at the end is above that at averaged weights, estimated from the gradients at the
            end; NaN if it is not known, this rank's share of DTensors.
        own_loss: The argument of that name as a number to be minimised; infinite before the first :meth:`read`.
        differentiated: Scalars whose sum the gradients at the end belong to, if they are known.
        failure: The first exception that a point of the step has raised; None if there was none.
    """

    def __init__(
        self,
        path: Path,
        lr: float,
        session: Session,
        losses: Mapping[float, Loss | None],
        *,
        end_slope: Loss = math.nan,
        excess_loss: Loss = math.nan,
        own_loss: Loss = math.inf,
        differentiated: Sequence[Tensor] = (),
        averaged: Callable[[], AbstractContextManager[None]] | None = None,
        valid: float = 0.0,
    ) -> None:
        self.path = path
        self.lr = lr
        self.session = session
        self.losses = {multiple: loss for multiple, loss in losses.items() if loss is not None}
        self.end_slope = end_slope
        self.excess_loss = excess_loss
        self.own_loss = math.inf
        self.differentiated = differentiated
        self.failure: Exception | None = None
        self._averaged = averaged
        self._own_loss = own_loss
        self._valid = valid
        self._is_validated = False

    def evaluate(self, multiple: float) -> Loss:
        """The loss at a multiple of the step, one forward pass unless it is known already.

        An exception at a point other than ``valid`` counts as an infinite loss there, unless ``valid`` raises one too,
        which the next :meth:`read` finds out.

        Returns:
            A one-element tensor or a number; NaN if the evaluation failed at ``valid`` in a process group, whose ranks
            all raise at the next :meth:`read`.
        """
        if multiple not in self.losses:
            self.path.write(multiple)
            self.losses[multiple] = self.session.probe() if multiple == self._valid else self._probe()
        return self.losses[multiple]

    def _probe(self) -> Loss:
        try:
            return self.session.probe(keeps_failure=False)
        except Exception as failure:  # noqa: BLE001 - raised by read() if it is not the point's
            self.failure = self.failure or failure
            return self.session.worst

    def evaluate_averaged(self) -> Loss:
        """The loss at averaged weights, one forward pass; NaN if no average is kept. Exceptions count as above.

        Parameters that have no average are where the first call has succeeded.
        """
        if self._averaged is None:
            return math.nan
        self.path.write(self._valid)
        with self._averaged():
            return self._probe()

    def evaluate_with_graph(self, multiple: float) -> Tensor:
        """The loss at a multiple of the step as a tensor that can be differentiated twice.

        Raises:
            TypeError: If the closure returns no tensor with a graph.
        """
        self.path.write(multiple)
        loss = self.session.differentiable()
        self.losses.setdefault(multiple, loss.detach())
        return loss

    def read(self, losses: Sequence[Loss], others: Sequence[Loss] = ()) -> tuple[list[float], list[float]]:
        """Losses and their derivatives as numbers to be minimised, averaged over the ranks by one all-reduce.

        ``maximize=True`` negates ``losses``, and not ``others``.

        Raises:
            Exception: What a point of the step has raised on this rank, if ``valid`` raises an exception too; a
                RuntimeError on the other ranks.
        """
        [*numbers, self.own_loss], [*rest, failures] = self.session.read(
            [*losses, self._own_loss], [*others, float(self.failure is not None)]
        )
        if failures and not self._is_validated:  # all ranks know, and make the same calls
            self._validate()
        return numbers, rest

    def _validate(self) -> None:
        """Raise the failure of a point if the closure fails where its first call has succeeded, too."""
        self._is_validated = True
        self.path.write(self._valid)
        try:
            self.session.read([self.session.probe()])
        except Exception as error:
            if self.failure is None:
                raise
            raise self.failure from error

    def read_with_rounding(self, losses: Sequence[Loss]) -> tuple[tuple[float, ...], float]:
        """Losses as numbers to be minimised, and their relative rounding error.

        The error is averaged over the ranks, too: judgements depend on it, and a closure may return a tensor on one
        rank and a plain number on another.
        """
        numbers, [rounding] = self.read(losses, [self.session.rounding(losses)])
        return tuple(numbers), rounding


@dataclass(frozen=True)
class Measurement:
    """The loss along one step, as a probe step saw it.

    Attributes:
        learning_rates: Where it was evaluated.
        losses: The losses there.
        found: The parabola through them, or the outcome of the search for an initial learning rate.
        loss_start: The loss where the measured step began.
        loss_end: The loss where the measured step ended; None if the step has not been taken yet.
        excess_loss: How far that is above the loss at averaged weights; None if it is not known.
    """

    learning_rates: tuple[float, ...]
    losses: tuple[float, ...]
    found: Parabola | InitialSearch
    loss_start: float
    loss_end: float | None = None
    excess_loss: float | None = None

    @property
    def parabola(self) -> Parabola:
        """The parabola; NaN throughout if an initial learning rate was searched."""
        return self.found if isinstance(self.found, Parabola) else Parabola(self.loss_start, math.nan, math.nan)

    @property
    def optimal_lr(self) -> float | None:
        """The learning rate of the lowest loss; None if there is none."""
        return self.found.optimal_lr if isinstance(self.found, Parabola) else self.found.lr


class Mode(ABC):
    """How slope and curvature of the loss along a step are measured.

    A mode of your own implements :meth:`measure`, and says by ``looks_back`` whether it measures along the last step,
    when the next closure has evaluated where that ended, or along the step that is about to be taken.

    Args:
        tolerance: Relative rounding error of a loss, in machine epsilons of its dtype (in sixteenths of those if the
            loss, or what autocast computes it from, is of half precision). A slope or curvature that this alone can
            produce counts as unknown.

    Raises:
        ValueError: If ``tolerance`` is no finite number of at least 0.

    Example:
        >>> from gen_optim import LookAhead, Measurement, Parabola
        >>> class GradientOnly(LookAhead):  # a straight line through the losses at 0 and at the step
        ...     def measure(self, loss):
        ...         (start, end), _ = loss.read_with_rounding([loss.evaluate(0.0), loss.evaluate(1.0)])
        ...         line = Parabola(start, slope=(start - end) / loss.lr, curvature=0.0)
        ...         return Measurement((0.0, loss.lr), (start, end), line, start)

    Attributes:
        looks_back: Whether the last step is measured, and not the next one.
        tolerance: The option of that name.
    """

    looks_back: ClassVar[bool] = False

    def __init__(self, *, tolerance: float = 8.0) -> None:
        given: Any = tolerance
        if isinstance(given, bool) or not isinstance(given, Real) or not 0.0 <= float(given) < math.inf:
            raise ValueError(f"tolerance must be a finite number of at least 0, got {tolerance!r}")
        self.tolerance = float(tolerance)

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({options})"

    @abstractmethod
    def measure(self, loss: StepLoss) -> Measurement:
        """Measure the loss along a step; called once per probe step.

        Args:
            loss: The loss along the step. Looking ahead, the parameters are at multiple 1 when this is called. The loss
                where the closure was called is known unless a ``probe`` is given: at 0 looking ahead, at 1 looking
                back.
        """

    def check(self, parameters: Iterable[Tensor]) -> None:  # noqa: B027 - nothing to check in most modes
        """Refuse parameters that cannot be measured in this mode; called when the optimizer is constructed."""

    def around_calls(self) -> AbstractContextManager[None]:
        """What is entered around all calls of the closure in a probe step, for example a choice of kernels."""
        return nullcontext()
