"""Calling a closure without a trace: gradients, buffers, random streams, autocast, grad mode.

The first call of a step is the user's own, with gradients. Every later one, a probe, must see what the first one saw
(the same dropout masks, the same buffers) and leave nothing behind. The optimizer knows parameters only, never the
model, so modules are found while they are called.
"""

from __future__ import annotations

import functools
import random
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

__all__ = ["Evaluator", "Loss", "check_loss", "losses_to_floats", "rounding_of"]

Loss = Tensor | float
"""What a closure returns: a number or a one-element tensor."""


def check_loss(loss: Any, caller: str) -> Loss:
    """Return ``loss`` if it is one.

    Raises:
        TypeError: If it is neither a real number nor a one-element floating-point tensor; names the ``caller``.
    """
    if isinstance(loss, Tensor):
        if loss.numel() == 1 and loss.is_floating_point():
            return loss
        came = f"a tensor of shape {tuple(loss.shape)} and dtype {loss.dtype}"
        advice = "Reduce it, for example with .mean()" if loss.numel() != 1 else "Return a floating-point loss"
    elif isinstance(loss, Real):
        return float(loss)
    else:
        came = "None" if loss is None else f"an object of type {type(loss).__name__}"
        advice = "End it with `return loss`"
    raise TypeError(f"{caller} must return the loss as a float or a one-element tensor, but returned {came}. {advice}.")


def losses_to_floats(losses: Sequence[Loss]) -> list[float]:
    """Read losses, wherever they are, with one transfer per device at the most."""
    tensors = [loss.detach().reshape(()) for loss in losses if isinstance(loss, Tensor)]
    if not tensors:
        return [float(loss) for loss in losses]
    device = tensors[0].device
    read = iter(torch.stack([tensor.to(device, torch.float64) for tensor in tensors]).tolist())
    return [next(read) if isinstance(loss, Tensor) else float(loss) for loss in losses]


def rounding_of(losses: Iterable[Loss]) -> float:
    """The machine epsilon of the coarsest loss; a plain number is taken to come from torch's default dtype."""
    dtypes = {loss.dtype if isinstance(loss, Tensor) else torch.get_default_dtype() for loss in losses}
    return max(torch.finfo(dtype).eps for dtype in dtypes)


class _Watch(threading.local):
    """What the closure that this thread is calling does to gradients."""

    is_on = False
    is_suppressing = False
    saw_backward = False
    differentiated: list[Tensor] | None = None
    """Where to collect the tensors on which backward is called; None if nobody asks."""


class _Patch:
    """Replaces the functions that write gradients, for as long as any thread is inside.

    torch has no switch for this. ``Tensor.backward`` ends in ``torch.autograd.backward``, so that one function is
    enough; what the replacement does depends on the thread, and other threads keep their gradients.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._depth = 0
        self._undo = ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            self._depth += 1
            if self._depth == 1:
                for owner in (torch.autograd, nn.Module, torch.optim.Optimizer):
                    name = "backward" if owner is torch.autograd else "zero_grad"
                    original = getattr(owner, name)
                    setattr(owner, name, _watched(original, is_backward=owner is torch.autograd))
                    self._undo.callback(setattr, owner, name, original)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._depth -= 1
            if self._depth == 0:
                self._undo.close()


_watch = _Watch()
_patch = _Patch()


def _watched(original: Callable[..., Any], *, is_backward: bool) -> Callable[..., Any]:
    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if _watch.is_on:
            _watch.saw_backward |= is_backward
            if is_backward and _watch.differentiated is not None:
                _watch.differentiated += _summands(*args, **kwargs)
            if _watch.is_suppressing:
                return None
        return original(*args, **kwargs)

    return wrapper


def _summands(
    tensors: Tensor | Sequence[Tensor], grad_tensors: Tensor | Sequence[Tensor] | None = None, *_: Any, **__: Any
) -> list[Tensor]:
    """The scalars that ``torch.autograd.backward``, called with these arguments, adds up and differentiates."""
    tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    weights = (
        [grad_tensors] * len(tensors) if grad_tensors is None or isinstance(grad_tensors, Tensor) else grad_tensors
    )
    return [
        (tensor if weight is None else tensor * weight).sum() for tensor, weight in zip(tensors, weights, strict=True)
    ]


@contextmanager
def _watching_gradients(*, suppress: bool) -> Iterator[_Watch]:
    """Notice this thread's calls of backward, or make them, and those of ``zero_grad``, do nothing."""
    outer = (_watch.is_on, _watch.is_suppressing, _watch.saw_backward)
    with _patch:
        _watch.is_on, _watch.is_suppressing, _watch.saw_backward = True, suppress, False
        try:
            yield _watch
        finally:
            _watch.is_on, _watch.is_suppressing, _watch.saw_backward = outer


class _RandomStreams:
    """The state of every global random stream, taken at construction."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._python = random.getstate()
        self._numpy = np.random.get_state()  # noqa: NPY002 - the global stream is what closures draw from
        self._torch = torch.get_rng_state()
        self._devices = [(device, torch.get_device_module(device).get_rng_state(*_index(device))) for device in devices]

    def restore(self) -> None:
        random.setstate(self._python)
        np.random.set_state(self._numpy)  # noqa: NPY002
        torch.set_rng_state(self._torch)
        for device, state in self._devices:
            torch.get_device_module(device).set_rng_state(state, *_index(device))


def _index(device: torch.device) -> tuple[torch.device, ...]:
    """What the random-state functions of a device's module take; the one for MPS knows a single device."""
    return () if device.type == "mps" else (device,)


def _random_devices(parameters: Iterable[Tensor]) -> set[torch.device]:
    """The devices besides the CPU whose random stream a closure may draw from."""
    devices = {parameter.device for parameter in parameters if parameter.device.type not in ("cpu", "meta")}
    # Not asked for where nothing has used it yet: that alone would take up memory there.
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        devices.add(torch.device("cuda", torch.cuda.current_device()))
    return devices


class _Buffers:
    """The buffers of modules: which tensors they were, and what stood in them."""

    def __init__(self) -> None:
        self._kept: dict[nn.Module, dict[str, tuple[Tensor | None, Tensor | None]]] = {}

    def keep(self, modules: Iterable[nn.Module]) -> None:
        """Copy the buffers of the modules not kept before."""
        for module in modules:
            if module not in self._kept:
                self._kept[module] = {name: (buffer, _copy(buffer)) for name, buffer in module._buffers.items()}

    def keep_tree(self, module: nn.Module) -> None:
        """Copy the buffers of a module and all below it."""
        if module not in self._kept:
            self.keep(module.modules())

    def modules(self) -> list[nn.Module]:
        return list(self._kept)

    @torch.no_grad()
    def restore(self) -> None:
        """Put back the tensors, those that were reassigned included, and their contents.

        Contents are copied back unseen: ``batch_norm`` writes its statistics without a trace in ``_version``.
        """
        for module, kept in self._kept.items():
            for name in [name for name in module._buffers if name not in kept]:
                del module._buffers[name]
            for name, (buffer, copy) in kept.items():
                module._buffers[name] = buffer
                if buffer is not None and copy is not None:
                    if buffer.shape != copy.shape:
                        buffer.resize_(copy.shape)
                    buffer.copy_(copy)


def _copy(buffer: Tensor | None) -> Tensor | None:
    # What torch itself refuses to write in place, such as an expanded tensor, cannot have been changed in place.
    if buffer is None or torch._debug_has_internal_overlap(buffer) == 1:
        return None
    return buffer.detach().clone()


class Evaluator:
    """Calls an optimizer's closures; one :meth:`session` a probe step.

    Attributes:
        is_probing: Whether a probe runs right now.
    """

    def __init__(self) -> None:
        self.is_probing = False
        self._loss_differentiates = False

    @staticmethod
    def call(closure: Callable[[], Any]) -> tuple[Loss, bool]:
        """Call ``closure`` with gradients enabled, as the user wrote it.

        Returns:
            The loss, and whether the closure ran a backward pass of its own.

        Raises:
            TypeError: If the closure does not return a loss.
        """
        with torch.enable_grad(), _watching_gradients(suppress=False) as watch:
            loss = check_loss(closure(), "closure")
            return loss, watch.saw_backward

    @contextmanager
    def session(self, parameters: Sequence[Tensor]) -> Iterator[Session]:
        """Calls that belong to one step, at the end of which all is as after the first of them."""
        session = Session(self, parameters)
        try:
            yield session
        finally:
            session.close()


class Session:
    """The calls of one probe step; made by :meth:`Evaluator.session`."""

    def __init__(self, evaluator: Evaluator, parameters: Sequence[Tensor]) -> None:
        self._evaluator = evaluator
        self._parameters = parameters
        self._devices = _random_devices(parameters)
        self._random_before = _RandomStreams(self._devices)
        self._random_after = self._random_before
        self._buffers_before = _Buffers()
        self._buffers_after = self._buffers_before

    def first(self, call: Callable[[], Loss]) -> Loss:
        """Make the first call, gradients included; later ones see what it saw."""
        with self._finding_modules():
            loss = call()
        self._random_after = _RandomStreams(self._devices)
        self._buffers_after = _Buffers()
        self._buffers_after.keep(self._buffers_before.modules())
        return loss

    @contextmanager
    def probing(self) -> Iterator[None]:
        """Take gradients away, and put them, buffers and random streams back at the end."""
        gradients = [(parameter, parameter.grad) for parameter in self._all_parameters()]
        fast_path = torch.backends.mha.get_fastpath_enabled()
        try:
            self._evaluator.is_probing = True
            # Without gradients, attention in evaluation mode would take another kernel than in the first call.
            torch.backends.mha.set_fastpath_enabled(False)
            for parameter, _ in gradients:
                parameter.grad = None
            with _watching_gradients(suppress=True):
                yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)
            self._evaluator.is_probing = False
            for parameter, gradient in gradients:
                parameter.grad = gradient
            self.close()

    def probe(self, closure: Callable[[], Any], caller: str) -> Loss:
        """Call ``closure`` once more, without gradients, as if it were the first time.

        Raises:
            TypeError: If it does not return a loss; names the ``caller``.
        """
        try:
            return self._replay(closure, caller)
        except RuntimeError as error:
            # A loss that differentiates inside (a physics-informed network, a gradient penalty) needs a graph.
            if self._evaluator._loss_differentiates or "does not require grad" not in str(error):
                raise
            self._evaluator._loss_differentiates = True
            return self._replay(closure, caller)

    def differentiable(self, closure: Callable[[], Any], caller: str) -> Tensor:
        """Call ``closure`` once more, as if it were the first time, and return the loss with its graph.

        Where the closure returns a loss without one, it is the sum of what it calls ``backward()`` on.

        Raises:
            TypeError: If there is no graph to be had; names the ``caller``.
        """
        collected: list[Tensor] = []
        _watch.differentiated = collected
        try:
            with self._replaying(with_graph=True):
                loss = check_loss(closure(), caller)
        finally:
            _watch.differentiated = None
        if isinstance(loss, Tensor) and loss.requires_grad:
            return loss.reshape(())
        if any(each.requires_grad for each in collected):
            return functools.reduce(torch.add, collected)
        raise TypeError(
            f"{caller} must return a loss that has a graph, or call backward() on one, for mode='exact' to "
            "differentiate. Return the tensor itself, neither .item() nor .detach(), or use mode='approximate'."
        )

    def close(self) -> None:
        """Put buffers and random streams back as they were after the first call."""
        self._buffers_after.restore()
        self._random_after.restore()
        torch.clear_autocast_cache()

    def _replay(self, closure: Callable[[], Any], caller: str) -> Loss:
        with self._replaying(with_graph=self._evaluator._loss_differentiates):
            loss = check_loss(closure(), caller)
        return loss.detach() if isinstance(loss, Tensor) else loss

    @contextmanager
    def _replaying(self, *, with_graph: bool) -> Iterator[None]:
        """Let a closure see what the first call saw."""
        self._buffers_before.restore()
        self._random_before.restore()
        # An outer autocast keeps low-precision copies of the weights, which have moved since.
        torch.clear_autocast_cache()
        with torch.set_grad_enabled(with_graph), self._finding_modules():
            yield

    @contextmanager
    def _finding_modules(self) -> Iterator[None]:
        """Keep the buffers of every module at the moment it is first called."""

        def see(module: nn.Module, _: Any) -> None:
            if not torch.compiler.is_compiling():
                self._buffers_before.keep_tree(module)
                # One that only a probe calls must end as it was before that probe.
                if self._evaluator.is_probing:
                    self._buffers_after.keep_tree(module)

        handle = register_module_forward_pre_hook(see)
        try:
            yield
        finally:
            handle.remove()

    def _all_parameters(self) -> Iterator[Tensor]:
        """Every parameter whose gradient a probe could touch: the optimizer's and those of the modules called."""
        theirs = (each for module in self._buffers_before.modules() for each in module._parameters.values())
        yield from dict.fromkeys(each for each in chain(self._parameters, theirs) if each is not None)
