"""The package of the paper's authors, ``gen-optim`` 0.1.1, for any model and loss."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Generic, TypeVar

from torch import Tensor, nn
from torch.optim import Optimizer

B = TypeVar("B")

TITLE = "gen-optim 0.1.1"
PACKAGE = ("gen-optim", "GeN")
"""The distribution to install and the module to import."""


def is_installed() -> bool:
    """Returns whether the package can be imported."""
    return find_spec(PACKAGE[1]) is not None


class ParabolaOfTheAuthors(Generic[B]):
    """Their ``lr_parabola``, which sets an optimizer's learning rates between ``backward()`` and ``step()``.

    Args:
        model: The model.
        loss: Maps a batch to the loss of the model on it.
        batches: Batches to measure on, one per call.

    Attributes:
        forwards: The number of forward passes so far.
    """

    def __init__(self, model: nn.Module, loss: Callable[[B], Tensor], batches: Iterator[B]) -> None:
        self._lr_parabola: Callable[..., Any] = import_module(PACKAGE[1]).lr_parabola
        self._net = _LossModel(model, loss)
        self._batches = (_Movable(batch=batch) for batch in batches)

    @property
    def forwards(self) -> int:
        """The number of forward passes so far."""
        return self._net.calls

    def set_lr(self, optimizer: Optimizer, *, scale: float = 1.0) -> None:
        """Fits a parabola and sets the learning rates.

        Args:
            optimizer: The optimizer, whose parameters have gradients.
            scale: The factor of a schedule.
        """
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            # Their language task is the one that takes the loss from the model's output.
            self._lr_parabola(
                self._net, optimizer, tr_iter=self._batches, device="cpu", task="NLU", scale=scale, lr_factor=[-1, 0, 1]
            )


class _LossModel(nn.Module):
    """A model whose output has its loss, as the package expects it."""

    def __init__(self, model: nn.Module, loss: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.model, self.loss, self.calls = model, loss, 0

    def forward(self, *, batch: Any) -> _Output:
        self.calls += 1
        return _Output(self.loss(batch).detach())


@dataclass(frozen=True)
class _Output:
    loss: Tensor


class _Movable(dict[str, Any]):
    """A batch that the package can move to a device, which it is on already."""

    def to(self, device: str) -> _Movable:
        return self
