"""Calling a closure without a trace: gradients, buffers, random streams, autocast, grad mode.

The first call of a step is the user's own, with gradients. Every later one, a probe, must see what the first one saw
(the same dropout masks, the same buffers) and leave nothing behind. The optimizer knows parameters only, never the
model, so modules are found while they are called.
"""

from __future__ import annotations

import functools
import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn

from gen_optim.closures.buffers import Buffers
from gen_optim.closures.interception import WatchingGradients, watch, watching_autocast, watching_modules
from gen_optim.closures.losses import Closure, Loss, check_loss
from gen_optim.closures.modules import ParallelModules, owners_of
from gen_optim.tensors.rng import RandomStreams, random_devices

__all__ = ["Evaluator", "Session"]


class Evaluator:
    """Calls an optimizer's closures; one :meth:`session` a probe step.

    Attributes:
        is_probing: Whether a probe runs right now.
    """

    def __init__(self) -> None:
        self.is_probing = False
        self._loss_differentiates = False
        self._owners: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._owned: frozenset[int] = frozenset()

    def owners(self, parameters: Sequence[Tensor]) -> list[nn.Module]:
        """The modules to which the parameters belong, and those above them; looked for once, since that takes time."""
        identities = frozenset(map(id, parameters))
        if identities != self._owned:
            self._owners, self._owned = weakref.WeakSet(owners_of(parameters)), identities
        return list(self._owners)

    @staticmethod
    def call(closure: Closure) -> tuple[Loss, bool]:
        """Call ``closure`` with gradients enabled, as the user wrote it.

        Returns:
            The loss, and whether the closure ran a backward pass of its own.

        Raises:
            TypeError: If the closure does not return a loss.
        """
        with torch.enable_grad(), WatchingGradients(suppress=False) as watching:
            loss = check_loss(closure(), "closure")
        return loss, watching.saw_backward

    def session(self, parameters: Sequence[Tensor]) -> Session:
        """Begin the calls of a probe step.

        Args:
            parameters: All parameters of the optimizer.
        """
        return Session(self, parameters)


class Session:
    """The calls of one probe step; made by :meth:`Evaluator.session`.

    Attributes:
        computed_in: The dtypes to which autocast has cast operations in the calls so far.
    """

    def __init__(self, evaluator: Evaluator, parameters: Sequence[Tensor]) -> None:
        self._evaluator = evaluator
        self._parameters = parameters
        self.computed_in: set[torch.dtype] = set()
        self._devices = random_devices(parameters)
        self._device_types = {parameter.device.type for parameter in parameters} - {"meta"}
        self._random_before = RandomStreams(self._devices)
        owners = evaluator.owners(parameters)
        self._buffers = Buffers(owners)
        self._parallel = ParallelModules(owners)
        self._gradients: list[tuple[Tensor, Tensor | None]] = []

    def first(self, call: Callable[[], Loss]) -> Loss:
        """Make the first call, gradients included; later ones see what it saw."""
        with self._watching():
            loss = call()
        return loss.clone() if isinstance(loss, Tensor) else loss

    @contextmanager
    def probing(self) -> Iterator[None]:
        """Take gradients away, and put them, buffers and random streams back at the end."""
        self._buffers.end_first_call()
        # The base optimizer may have drawn from them since, for noise or for rounding.
        random_after = RandomStreams(self._devices)
        self._gradients = [(parameter, parameter.grad) for parameter in self.parameters()]
        fast_path = torch.backends.mha.get_fastpath_enabled()
        try:
            self._evaluator.is_probing = True
            # Without gradients, attention in evaluation mode would take another kernel than in the first call.
            torch.backends.mha.set_fastpath_enabled(False)
            with WatchingGradients(suppress=True):
                yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)
            self._evaluator.is_probing = False
            for parameter, gradient in self._gradients:
                parameter.grad = gradient
            self._gradients = []
            self._buffers.restore()
            random_after.restore()
            torch.clear_autocast_cache()

    def rewind(self) -> None:
        """Put buffers and random streams back to where the first call found them."""
        self._buffers.rewind()
        self._random_before.restore()

    def take_back(self) -> None:
        """Put buffers back to where the first call found them: that of a step taken back must not stay."""
        self._buffers.rewind()

    def parameters(self) -> Iterator[Tensor]:
        """Every parameter whose gradient a probe could touch: the optimizer's and those of the modules called."""
        theirs = (each for module in self._buffers.modules() for each in module._parameters.values())
        # By identity: a tensor's own hash is a call of Python's, of which there would be one a parameter.
        yield from {id(each): each for each in chain(self._parameters, theirs) if each is not None}.values()

    def probe(self, closure: Closure, caller: str) -> Loss:
        """Call ``closure`` once more, without gradients, as if it were the first time.

        Raises:
            TypeError: If it does not return a loss; names the ``caller``.
        """
        try:
            return self._replay(closure, caller)
        except RuntimeError as error:
            # A loss that differentiates inside (a physics-informed network, a gradient penalty) needs a graph, and so
            # do hooks on activations.
            if self._evaluator._loss_differentiates or not re.search(r"requires?[ _]grad", str(error)):
                raise
            self._evaluator._loss_differentiates = True
            return self._replay(closure, caller)
        except (AttributeError, TypeError) as error:
            if "NoneType" in str(error) and hasattr(error, "add_note"):  # from Python 3.11 on
                error.add_note(
                    f"This was a probe of GeNOptimizer, which calls the {caller} again with gradients absent (None). "
                    "Guard what reads them by `if not optimizer.is_probing`, or give step() a probe that does without."
                )
            raise

    def differentiable(self, closure: Closure, caller: str) -> Tensor:
        """Call ``closure`` once more, as if it were the first time, and return the loss with its graph.

        Where the closure returns a loss without one, it is the sum of what it calls ``backward()`` on.

        Raises:
            TypeError: If there is no graph to be had; names the ``caller``.
        """
        collected: list[Tensor] = []
        watch.differentiated = collected
        try:
            with self._replaying(with_graph=True):
                loss = check_loss(closure(), caller)
        finally:
            watch.differentiated = None
        if isinstance(loss, Tensor) and loss.requires_grad:
            return loss.reshape(())
        if any(each.requires_grad for each in collected):
            return functools.reduce(torch.add, collected)
        raise TypeError(
            f"{caller} must return a loss that has a graph, or call backward() on one, for mode='exact' to "
            "differentiate. Return the tensor itself, neither .item() nor .detach(), or use mode='approximate'."
        )

    def _replay(self, closure: Closure, caller: str) -> Loss:
        with self._replaying(with_graph=self._evaluator._loss_differentiates):
            loss = check_loss(closure(), caller)
        # Cloned: a closure may write all its losses into the same tensor.
        return loss.detach().clone() if isinstance(loss, Tensor) else loss

    @contextmanager
    def _replaying(self, *, with_graph: bool) -> Iterator[None]:
        """Let a closure see what the first call saw."""
        self.rewind()
        for parameter, _ in self._gradients:
            # Of the probe before, too: one that calls an imported ``backward`` cannot be kept from writing them.
            parameter.grad = None
        # An outer autocast keeps low-precision copies of the weights, which have moved since.
        torch.clear_autocast_cache()
        with (
            torch.set_grad_enabled(with_graph),
            self._watching(),
            self._parallel.replaying(self._buffers.modules),
        ):
            yield

    @contextmanager
    def _watching(self) -> Iterator[None]:
        with (
            watching_modules(self._buffers.enter, self._buffers.leave),
            watching_autocast(self.computed_in, self._device_types),
        ):
            yield
