"""Whose gradients a step uses: those of the closure, of the caller, or its own; and of what they are the gradients.

A closure may run backward itself, or only return the loss. In the latter case gradients that the caller has computed
since the last step are used, and where there are none the loss is differentiated here. Looking at every parameter
would cost more than a lazy step may, so one gradient stands for all: the first one, of a parameter that is trained.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from gen_optim.closures.losses import Loss
from gen_optim.tensors.dtensor import is_dtensor, local, whole

__all__ = ["GradientMark", "GradientOrigin", "complete_gradients", "mark_used"]

_USED = "_gen_used_version"
"""Set on a gradient when a step has used it. The mark goes where the tensor goes: ids are recycled."""


class GradientMark(NamedTuple):
    """The gradient that stands for all, as it was before the closure was called.

    Attributes:
        gradient: The gradient, which it does not keep alive while a new one is computed; None if there is none.
        version: Its version then.
    """

    gradient: weakref.ref[Tensor] | None
    version: int

    @property
    def is_fresh(self) -> bool:
        """Whether it had changed since the last step."""
        gradient = None if self.gradient is None else self.gradient()
        return gradient is not None and getattr(gradient, _USED, None) != self.version

    @classmethod
    def of(cls, groups: Sequence[dict[str, Any]]) -> GradientMark:
        """Look at the gradients of an optimizer's parameter groups."""
        gradient = _first_gradient(groups)
        if gradient is None:
            return cls(None, 0)
        return cls(weakref.ref(gradient), _version(gradient))


def mark_used(groups: Sequence[dict[str, Any]]) -> None:
    """Note that a step has used the present gradients."""
    gradient = _first_gradient(groups)
    if gradient is not None:
        setattr(gradient, _USED, _version(gradient))


class GradientOrigin:
    """Of what the gradients are the gradients that a closure leaves.

    Watched while the closure runs: each backward pass adds what it differentiates, and gradients that were there
    before, or were written to afterwards, are those of nothing in particular.

    Args:
        groups: The optimizer's parameter groups.
    """

    def __init__(self, groups: Sequence[dict[str, Any]]) -> None:
        self._groups = groups
        self._differentiated: list[Tensor] = []
        self._left: list[tuple[int, int]] | None = None
        self._is_clean = True

    @contextmanager
    def around_backward(self, differentiated: list[Tensor]) -> Iterator[None]:
        """Watch a backward pass, which differentiates these scalars."""
        found = self._gradients()
        self._is_clean &= found == (self._left or [])
        yield
        self._differentiated += [whole(each.detach()) for each in differentiated]
        self._left = self._gradients()

    def note(self, loss: Loss) -> None:
        """Take notice that the loss has been differentiated for the closure, with nothing there before."""
        self._differentiated = [whole(torch.as_tensor(loss).detach())]
        self._left, self._is_clean = self._gradients(), True

    def differentiated(self) -> list[Tensor] | None:
        """Numbers of whose sum the present gradients are the gradients; None where that is not known."""
        is_known = self._is_clean and self._left is not None and self._left == self._gradients()
        return self._differentiated if is_known else None

    def _gradients(self) -> list[tuple[int, int]]:
        return [(id(each), _version(each)) for each in _gradients(self._groups)]


def complete_gradients(groups: Sequence[dict[str, Any]], loss: Loss, before: GradientMark) -> bool:
    """Differentiate ``loss`` unless there are gradients to use; for closures that ran no backward of their own.

    Args:
        groups: The optimizer's parameter groups.
        loss: What the closure returned.
        before: The gradients before it was called.

    Returns:
        Whether it has differentiated the loss.

    Raises:
        TypeError: If there is nothing to use, and the loss has no graph either.
    """
    gradient = _first_gradient(groups)
    has_graph = isinstance(loss, Tensor) and loss.requires_grad
    if gradient is not None:
        if before.gradient is None or gradient is not before.gradient():
            return False  # the closure has assigned it
        is_new = before.is_fresh or _version(gradient) != before.version
        # Zeros are what zero_grad(set_to_none=False) leaves, be it in the closure or before: no gradient of a loss.
        if is_new and (not has_graph or any(bool(whole(each.any())) for each in _gradients(groups))):
            return False
    if not has_graph:
        raise TypeError(
            "closure must either call backward() or return a loss that has a graph, but it did not call backward(), "
            f"no gradients were computed since the last step, and it returned {_describe(loss)}. "
            "Return the tensor itself, neither .item() nor .detach()."
        )
    trained = [parameter for group in groups for parameter in group["params"] if parameter.requires_grad]
    if not trained:
        return False
    for parameter in trained:
        parameter.grad = None
    # Into these alone: gradients of another network would pass for fresh ones when its own optimizer steps. Only where
    # ``fully_shard`` gathers parameters, those that the loss was computed from are others.
    inputs = None if any(map(is_dtensor, trained)) else trained
    cast(Tensor, loss).backward(inputs=inputs)  # type: ignore[no-untyped-call]
    return True


def _describe(loss: Loss) -> str:
    return "a tensor that does not require grad" if isinstance(loss, Tensor) else "a plain number"


def _gradients(groups: Sequence[dict[str, Any]]) -> Iterator[Tensor]:
    # One generator, not one in another: each lazy step begins it twice, for the first gradient.
    for group in groups:
        for parameter in group["params"]:
            if parameter.requires_grad and (gradient := parameter.grad) is not None:
                yield gradient


def _version(gradient: Tensor) -> int:
    """How often a gradient was written; ``fully_shard`` adds to what this rank holds of a DTensor."""
    return local(gradient)._version


def _first_gradient(groups: Sequence[dict[str, Any]]) -> Tensor | None:
    return next(_gradients(groups), None)
