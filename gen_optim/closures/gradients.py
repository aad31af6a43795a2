"""The gradients that a step uses: whether the closure computed them, and which scalar they belong to.

A closure may call ``backward()`` itself, or only return the loss. In the latter case gradients that the caller has
computed since the last step are used, and if there are none, the loss is differentiated here. Looking at every
parameter would cost more than a lazy step may, so the first gradient of a trained parameter represents all.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gen_optim.closures.losses import Loss
from gen_optim.tensors.dtensor import is_dtensor, local, whole

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle


_USED = "_gen_used_version"
"""Attribute of a gradient that a step has used: its version then. It is kept on the tensor because ids are recycled."""


Measure = Callable[[], tuple[Loss, ...]]
"""Measures numbers of the present gradients."""


class Source(Enum):
    """Where the gradients of a step come from."""

    CLOSURE = "the closure has called backward() or written them"
    CALLER = "the caller has computed them since the last step"
    NONE = "there are none, or only those that the last step has used"


class GradientWatch:
    """Notices whether a closure provides gradients, and computes them if it does not.

    The first gradient is looked at before and after the call. If it is another tensor, the closure has assigned it. If
    it is the same tensor, written to, either a backward pass has added to it, which a hook on its parameter notices,
    or something else has written to it: the closure, which may have filled it with zeros, or ``fully_shard``, which
    need not call the hook.

    It is no context manager because each lazy step uses one: a generator would take twice as long.
    """

    __slots__ = ("_groups", "_handle", "_has_accumulated", "_is_fresh", "_parameter", "_seen", "_version")

    def __init__(self, groups: Sequence[dict[str, Any]]) -> None:
        self._groups = groups
        self._has_accumulated = False
        self._handle: RemovableHandle | None = None
        self._parameter, gradient = _first_with_gradient(groups)
        if gradient is None:
            self._seen, self._version, self._is_fresh = None, 0, False
        else:
            self._seen = weakref.ref(gradient)  # not kept alive while a new one is computed
            self._version = _version(gradient)
            self._is_fresh = getattr(gradient, _USED, None) != self._version

    def begin(self) -> None:
        """Begin: the closure is about to be called."""
        if self._parameter is not None:
            self._handle = self._parameter.register_post_accumulate_grad_hook(self._note)  # type: ignore[no-untyped-call]

    def end(self) -> None:
        """End: the closure has returned. May be repeated."""
        if self._handle is not None:
            self._handle.remove()

    def _note(self, _: Tensor) -> None:
        self._has_accumulated = True

    def find(self, loss: Loss) -> Source:
        """Return where the gradients come from. If ``loss`` has no graph, gradients that are all zero count, too."""
        if self._has_accumulated:
            return Source.CLOSURE
        _, gradient = _first_with_gradient(self._groups)
        if gradient is None:
            return Source.NONE
        if self._seen is None or gradient is not self._seen():
            return Source.CLOSURE
        is_written = _version(gradient) != self._version
        has_graph = isinstance(loss, Tensor) and loss.requires_grad
        # Zeros are left by zero_grad(set_to_none=False), here or before the step: not the gradient of a loss.
        if (is_written or self._is_fresh) and (
            not has_graph or any(bool(whole(each.any())) for each in _gradients(self._groups))
        ):
            return Source.CLOSURE if is_written else Source.CALLER
        return Source.NONE

    def differentiate(self, loss: Loss) -> bool:
        """Compute gradients that the closure has not provided; return whether any parameter is trained."""
        if not isinstance(loss, Tensor):
            raise TypeError(
                "closure must either call backward() or return a loss that has a graph, but it did not call "
                "backward(), no gradients were computed since the last step, and it returned a plain number. "
                "Return the tensor itself, neither .item() nor .detach()."
            )
        trained = [parameter for group in self._groups for parameter in group["params"] if parameter.requires_grad]
        if not trained:
            return False
        for each in trained:
            each.grad = None
        # Only these: another network's gradients would count as fresh when its own optimizer steps. ``fully_shard``
        # computes the loss from gathered parameters, which are other tensors.
        inputs = None if any(map(is_dtensor, trained)) else trained
        loss.backward(inputs=inputs)  # type: ignore[no-untyped-call]
        return True


def mark_used(groups: Sequence[dict[str, Any]]) -> None:
    """Note that a step has used the present gradients."""
    _, gradient = _first_with_gradient(groups)
    if gradient is not None:
        setattr(gradient, _USED, _version(gradient))


class GradientOrigin:
    """Tracks which scalars the gradients of a closure belong to, and measures these gradients.

    Each backward pass adds the scalars that it differentiates. They are unknown if there were gradients before the
    first pass, or if gradients were written to between passes. What is written after the last one, by clipping for
    instance, does not matter: ``measure`` is called at the end of each pass, if the scalars are known.
    ``adds_to_used`` says whether the first pass has added to gradients that the last step has used.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], measure: Measure = tuple) -> None:
        self._groups, self._measure = groups, measure
        self._scalars: list[Tensor] = []
        self._left: list[tuple[int, int]] | None = None
        self._is_clean = True
        self.saw_backward = self.adds_to_used = False
        self._measured: tuple[Loss, ...] = ()

    def watch(self, run: Callable[[], None], scalars: Callable[[], list[Tensor]]) -> None:
        """Run a backward pass, and note what it differentiates; a ``BackwardHandler``."""
        self._is_clean &= self._gradients() == (self._left or [])
        differentiated = scalars()
        used = _used_gradient(self._groups) if self._left is None else None
        run()
        self.adds_to_used |= used is not None and getattr(used, _USED) != _version(used)
        self._scalars += [whole(each.detach()) for each in differentiated]
        self._end_pass()
        self.saw_backward = True

    def note(self, loss: Loss) -> None:
        """Note that the gradients have just been computed from ``loss``, with none there before."""
        self._scalars, self._is_clean = [whole(torch.as_tensor(loss).detach())], True
        self._end_pass()

    def differentiated(self) -> tuple[list[Tensor], tuple[Loss, ...]] | None:
        """Return scalars that were differentiated, and what was measured of the gradients of their sum.

        None if it is unknown what was differentiated.
        """
        return (self._scalars, self._measured) if self._is_clean and self._left is not None else None

    def _end_pass(self) -> None:
        self._left = self._gradients()
        self._measured = self._measure() if self._is_clean else ()

    def _gradients(self) -> list[tuple[int, int]]:
        return [(id(each), _version(each)) for each in _gradients(self._groups)]


def _gradients(groups: Sequence[dict[str, Any]]) -> Iterator[Tensor]:
    for group in groups:
        for parameter in group["params"]:
            if parameter.requires_grad and (gradient := parameter.grad) is not None:
                yield gradient


def _used_gradient(groups: Sequence[dict[str, Any]]) -> Tensor | None:
    """Return the first gradient if the last step has used it and nothing has written to it since."""
    _, gradient = _first_with_gradient(groups)
    return gradient if gradient is not None and getattr(gradient, _USED, None) == _version(gradient) else None


def _first_with_gradient(groups: Sequence[dict[str, Any]]) -> tuple[Tensor | None, Tensor | None]:
    """Return the first trained parameter that has a gradient, and that gradient. Each lazy step calls it often."""
    for group in groups:
        for parameter in group["params"]:
            if parameter.requires_grad and (gradient := parameter.grad) is not None:
                return parameter, gradient
    return None, None


def _version(gradient: Tensor) -> int:
    """Return how often a gradient was written. ``fully_shard`` writes to the local part of a DTensor."""
    return local(gradient)._version
