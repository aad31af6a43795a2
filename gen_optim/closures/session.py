"""Calling a closure again without leaving a trace: gradients, buffers, random streams, autocast, grad mode.

The first call of a step is the user's own, with gradients. Every later one, a probe, must see what the first one saw
(the same dropout masks, the same buffers) and leave nothing behind.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gen_optim.closures.buffers import BufferSnapshot
from gen_optim.closures.gradients import GradientOrigin, GradientWatch, Measure, Source
from gen_optim.closures.interception import BackwardHandler, Interception, WeightCaches, repair
from gen_optim.closures.losses import Closure, Loss, check_loss, copied, rounding_of
from gen_optim.closures.modules import ParallelModules, owners_of, parameters_of, with_children
from gen_optim.distributed import Ranks
from gen_optim.tensors.dtensor import whole
from gen_optim.tensors.interrupts import Unfinished
from gen_optim.tensors.rng import RandomStreams, random_devices
from gen_optim.warning import PATIENCE, warn

Group = dict[str, Any]

_ATTENTION = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


class ClosureCaller:
    """Calls the closures of one optimizer.

    ``modules`` are called besides those that own the optimizer's parameters. ``unfinished`` ends the step that is being
    taken. ``needs_graph`` says whether probes are called with gradients enabled, for losses that differentiate inside
    (a physics-informed network, a gradient penalty) or hook activations; None until a probe has returned.
    """

    def __init__(self, modules: Sequence[nn.Module] = ()) -> None:
        self.modules = tuple(modules)
        self.is_probing = False
        self.needs_graph: bool | None = None
        self.unfinished = Unfinished()
        self._differentiates: dict[object, bool] = {}
        self._missing_gradients = 0
        self._owners: list[weakref.ref[nn.Module]] = []
        self._owned: frozenset[int] | None = None

    def call(self, closure: Closure, groups: Sequence[Group]) -> Loss:
        """Call ``closure`` with gradients enabled, and differentiate its loss if it has not provided gradients."""
        repair()
        watch = GradientWatch(groups)
        self.unfinished.add(watch.end)
        try:
            watch.begin()
            with torch.enable_grad():
                loss = check_loss(closure(), "closure")
        finally:
            watch.end()
        self.unfinished.drop(watch.end)
        self.complete(closure, loss, watch)
        return loss

    def complete(self, closure: Closure, loss: Loss, watch: GradientWatch) -> bool:
        """Differentiate ``loss`` if its closure leaves that to the optimizer; return whether it did.

        A closure that has ever computed gradients itself leaves them out on purpose if it does not: its loss is
        infinite, or its batch is empty. The same holds for a closure that returns a loss that is not finite, or a
        tensor without a graph, before it has shown what it does. There are no gradients in such a step.
        """
        # Closures of the same code count as one, since loops define a new one per batch.
        code = getattr(getattr(closure, "func", closure), "__code__", type(closure))
        source = watch.find(loss)
        if source is not Source.NONE:
            if source is Source.CLOSURE:
                self._differentiates[code] = False
            return False
        known = self._differentiates.get(code)
        if known is False:
            return False
        if isinstance(loss, Tensor) and not loss.requires_grad:
            self._warn_of_missing_gradients()
            return False
        if known is None and isinstance(loss, Tensor):
            if not math.isfinite(whole(loss.detach()).item()):
                return False
            self._differentiates[code] = True
        return watch.differentiate(loss)

    def _warn_of_missing_gradients(self) -> None:
        self._missing_gradients += 1
        if self._missing_gradients == PATIENCE:
            warn(
                f"{PATIENCE} steps had no gradients: the closure neither called backward() nor returned a loss that "
                "has a graph. Return the tensor itself, neither .item() nor .detach()."
            )

    def owners(self, parameters: Sequence[Tensor]) -> list[nn.Module]:
        """Return the modules that a closure is known to call: ``modules``, the owners of parameters, all below them.

        If ``modules`` own all of the parameters, no others are looked for. Otherwise, and always under
        ``torch.distributed``, all modules alive are looked through for the owners and those above them, such as a
        DistributedDataParallel; once per set of parameters.
        """
        wanted = frozenset(map(id, parameters))
        if wanted != self._owned:
            unowned = wanted.difference(*(map(id, parameters_of(each)) for each in with_children(self.modules)))
            if dist.is_available() and dist.is_initialized():
                unowned = wanted
            found = owners_of([each for each in parameters if id(each) in unowned]) if unowned else []
            self._owners, self._owned = list(map(weakref.ref, found)), wanted
        return with_children([*self.modules, *(each for owner in self._owners if (each := owner()) is not None)])


class Session:
    """The closure calls of one probe step.

    ``modules`` are those that the closures are known to call (:meth:`ClosureCaller.owners`). ``probed_name`` is the
    argument that ``probed`` comes from, for error messages. ``tolerance`` is the relative error of a loss, in units of
    rounding. A failure on this one of the ``ranks`` is kept until the next :meth:`read`. ``origin`` says what the first
    call has differentiated.
    """

    def __init__(
        self,
        caller: ClosureCaller,
        groups: Sequence[Group],
        modules: Sequence[nn.Module],
        probed: Closure,
        probed_name: Literal["closure", "probe"],
        ranks: Ranks,
        *,
        tolerance: float,
    ) -> None:
        repair()
        self._caller, self._groups, self.ranks, self._tolerance = caller, groups, ranks, tolerance
        self._probed, self._probed_name = probed, probed_name
        self._parameters: list[Tensor] = [each for group in groups for each in group["params"]]
        self._sign = -1.0 if groups[0].get("maximize") else 1.0
        self.modules = modules
        self._parallel = ParallelModules(self.modules)
        # With gradients disabled, attention in evaluation mode takes another kernel (its "fast path"), whose loss
        # differs by rounding, and with a padding mask by far more.
        self._has_fast_attention = any(isinstance(each, _ATTENTION) and not each.training for each in self.modules)
        self._buffers_before = self._buffers_after = BufferSnapshot(self.modules)
        self._devices = random_devices(self._parameters)
        self._device_types = {each.device.type for each in self._parameters} - {"meta"}
        self._random_before = RandomStreams(self._devices)
        self._computed_in: set[torch.dtype] = set()
        self.origin = GradientOrigin(groups)
        self._gradients: list[tuple[Tensor, Tensor | None]] = []

    def first(self, closure: Closure, measure: Measure = tuple) -> Loss:
        """Call ``closure`` with gradients enabled; probes will see what this call saw.

        As :meth:`ClosureCaller.call`, but backward passes are followed: ``measure`` is called at the end of each,
        before the closure can clip the gradients, for instance. The loss is cloned, since closures may write each loss
        to the same tensor. It is NaN after a failure that the other ranks are told of.
        """
        origin = self.origin = GradientOrigin(self._groups, measure)

        def call() -> Loss:
            watch, interception = GradientWatch(self._groups), self._intercepting(origin.watch)
            ending_with = self._caller.unfinished.ending_with
            with torch.enable_grad(), ending_with(watch.end), ending_with(interception.end):
                watch.begin()
                interception.begin()
                loss = check_loss(closure(), "closure")
            if self._caller.complete(closure, loss, watch):
                origin.note(loss)
            loss = whole(loss)
            return loss.clone() if isinstance(loss, Tensor) else loss

        return self.ranks.attempt(call, instead=math.nan, went_backward=lambda: origin.saw_backward)

    @contextmanager
    def probing(self) -> Iterator[None]:
        """Take gradients away, and put them, buffers and random streams back at the end."""
        self._buffers_after = self._buffers_before.later()
        # Of this moment: the base optimizer may have drawn random numbers since the first call.
        random_after = RandomStreams(self._devices)
        self._gradients = [(each, each.grad) for each in self.parameters()]
        self._weight_caches = WeightCaches()

        def undo() -> None:
            self._caller.is_probing = False
            for parameter, gradient in self._gradients:
                parameter.grad = gradient
            random_after.restore()
            self._buffers_after.restore()
            self._weight_caches.restore()

        with self._caller.unfinished.ending_with(undo):
            self._caller.is_probing = True
            yield

    def probe(self, *, keeps_failure: bool = True) -> Loss:
        """Call the probed closure as if for the first time, without gradients, and return its loss without a graph.

        If there are other ranks, a failure is kept for the next :meth:`read` and the loss is NaN, unless
        ``keeps_failure`` is False.
        """
        return self.ranks.attempt(self._probe, instead=math.nan) if keeps_failure else self._probe()

    def differentiable(self) -> Tensor:
        """Call the probed closure as if for the first time, and return its loss with a graph.

        If the closure returns a loss without one, that is the sum of what it calls ``backward()`` on; if neither has
        one, a TypeError is raised. Failures are raised, not kept.
        """
        collected: list[Tensor] = []
        loss = self._replay(with_graph=True, on_backward=lambda _, scalars: collected.extend(scalars()))
        if isinstance(loss, Tensor) and loss.requires_grad:
            return whole(loss.reshape(()))
        if any(each.requires_grad for each in collected):
            return whole(functools.reduce(torch.add, collected))
        raise TypeError(
            f"{self._probed_name} must return a loss that has a graph, or call backward() on one, for mode='exact' to "
            "differentiate. Return the tensor itself, neither .item() nor .detach(), or use mode='approximate'."
        )

    def read(self, losses: Sequence[Loss], others: Sequence[Loss] = ()) -> tuple[list[float], list[float]]:
        """Read numbers, averaged over the ranks by one all-reduce, so that they are the same on all ranks.

        ``losses``, which may be derivatives of losses, are negated under ``maximize``, to be minimised; ``others`` are
        not. A rank that has kept a failure raises it here, and the others a RuntimeError.
        """
        numbers = self.ranks.mean([*losses, *others])
        return [self._sign * each for each in numbers[: len(losses)]], numbers[len(losses) :]

    @property
    def worst(self) -> float:
        """The loss that is infinitely bad: −∞ under ``maximize``."""
        return self._sign * math.inf

    def rounding(self, losses: Sequence[Loss]) -> float:
        """Return the relative error of losses of this step, on this rank."""
        return self._tolerance * rounding_of(losses, self._computed_in)

    def revert_buffers(self) -> None:
        """Put buffers back to where the first call found them, for a step that is reverted."""
        self._buffers_before.restore()

    def rewind(self) -> None:
        """Put buffers and random streams back to where the first call found them."""
        self.revert_buffers()
        self._random_before.restore()

    def parameters(self) -> list[Tensor]:
        """Return every parameter whose gradient is kept: the optimizer's, and those of the known modules."""
        theirs = (each for module in self.modules for each in parameters_of(module))
        # By identity: hashing a tensor calls Python code.
        return list({id(each): each for each in (*self._parameters, *theirs)}.values())

    def _probe(self) -> Loss:
        """Call the probed closure without gradients if it can do without a graph.

        A loss that differentiates inside raises a RuntimeError then, as do many other failures. So the call is repeated
        with gradients enabled, and if it succeeds, later probes have them enabled from the start. Ranks that make
        an unequal number of calls hang. So with several ranks a call is repeated only if none has succeeded before:
        then all ranks fail. Later failures may be those of one rank.
        """
        caller = self._caller
        with_graph = caller.needs_graph is True
        try:
            loss = self._replay(with_graph=with_graph)
        except RuntimeError as error:
            if with_graph or (len(self.ranks) > 1 and caller.needs_graph is False):
                raise
            with_graph = True
            try:
                loss = self._replay(with_graph=True)
            except Exception:  # noqa: BLE001 - the first error is raised
                raise error from None
        caller.needs_graph = with_graph
        return copied(loss)

    def _replay(self, *, with_graph: bool, on_backward: BackwardHandler = lambda _run, _scalars: None) -> Loss:
        """Call the probed closure in the state that the first call found."""
        self.rewind()
        # Before each probe: a ``backward`` that was imported by name is not replaced, and writes to them.
        for parameter, _ in self._gradients:
            parameter.grad = None
        self._weight_caches.clear()
        interception, ending_with = self._intercepting(on_backward), self._caller.unfinished.ending_with
        with (
            torch.set_grad_enabled(with_graph or self._has_fast_attention),
            ending_with(interception.end),
            ending_with(self._parallel.end_replay),
        ):
            interception.begin()
            self._parallel.begin_replay()
            try:
                result = self._probed()
            except Exception as error:
                if hasattr(error, "add_note"):  # from Python 3.11 on
                    error.add_note(
                        f"This was a probe of GeNOptimizer, which calls the {self._probed_name} again with gradients "
                        "absent (None). If that is what failed, guard it by `if not optimizer.is_probing`, or give "
                        "step() a probe."
                    )
                raise
        return check_loss(result, self._probed_name)

    def _intercepting(self, on_backward: BackwardHandler) -> Interception:
        return Interception(on_backward, self._computed_in, self._device_types)
