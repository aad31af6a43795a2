"""Noticing what a closure does: which modules it calls, what it does to gradients, and in which precision it computes.

torch has no hook for any that would do: module hooks make compiled modules compile anew, and nothing announces a
backward pass or an autocast. So some functions of torch are replaced while a closure runs, for the thread that runs it.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["WatchingGradients", "around_backward", "watch", "watching_autocast", "watching_modules"]


class _Watch(threading.local):
    """Who wants to know what of the closure that this thread is calling."""

    gradients: WatchingGradients | None = None
    """Who notices backward passes, or suppresses them; None if nobody does."""
    went_backward = False
    """Whether a backward pass came to its end while gradients were watched last, be it that the closure failed."""
    modules: tuple[Callable[[nn.Module], None], Callable[[nn.Module], None]] | None = None
    """What to call before and after a module is called; None inside of such a call, and where nobody asks."""
    differentiated: list[Tensor] | None = None
    """Where to collect the tensors on which backward is called; None if nobody asks."""
    around_backward: Callable[[list[Tensor]], AbstractContextManager[None]] | None = None
    """What to enter around a backward pass, with the scalars it differentiates; None inside, and if nobody asks."""
    autocast: set[torch.dtype] | None = None
    """Where to collect the dtypes to which operations are cast; None if nobody asks."""


class _Patch:
    """Functions of torch, replaced for as long as anybody needs it, by any number of threads.

    Args:
        replacements: What is replaced: an owner and the name of its function, and what makes the replacement of it.
    """

    def __init__(self, *replacements: tuple[Any, str, Callable[[Any], Any]]) -> None:
        self._replacements = replacements
        self._lock = threading.RLock()
        self._depth = 0
        self._originals: list[tuple[Any, str, Any]] = []

    def hold(self) -> None:
        """Replace them, unless somebody does already."""
        with self._lock:
            if self._depth == 0:
                try:
                    for owner, name, replace in self._replacements:
                        original = getattr(owner, name)
                        self._originals.append((owner, name, original))
                        setattr(owner, name, replace(original))
                except BaseException:  # an interrupt: all or nothing
                    self._restore()
                    raise
            self._depth += 1

    def release(self) -> None:
        """Put them back, unless somebody else still needs the replacements."""
        with self._lock:
            self._depth -= 1
            if self._depth == 0:
                self._restore()

    def _restore(self) -> None:
        while self._originals:
            setattr(*self._originals.pop())


watch = _Watch()


@functools.cache
def _watched(backward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(backward)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        watching = watch.gradients
        if watching is None:
            return backward(*args, **kwargs)
        if watching.is_suppressing:
            if watch.differentiated is not None:
                watch.differentiated += _summands(*args, **kwargs)
            return None
        around = watch.around_backward
        if around is None:
            result = backward(*args, **kwargs)
        else:
            # Not around the backward passes of checkpointed blocks, which are part of this one.
            watch.around_backward = None
            try:
                with around(_summands(*args, **kwargs)):
                    result = backward(*args, **kwargs)
            finally:
                watch.around_backward = around
        watching.saw_backward = True
        return result

    return wrapper


@functools.cache
def _suppressed(zero_grad: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(zero_grad)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        watching = watch.gradients
        return None if watching is not None and watching.is_suppressing else zero_grad(*args, **kwargs)

    return wrapper


def _summands(
    tensors: Tensor | Sequence[Tensor], grad_tensors: Tensor | Sequence[Tensor] | None = None, *_: Any, **__: Any
) -> list[Tensor]:
    """The scalars that ``torch.autograd.backward``, called with these arguments, adds up and differentiates."""
    tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    if not all(isinstance(each, Tensor) for each in tensors):  # edges of the graph, whose values nobody has
        return [torch.tensor(math.nan)]
    weights = (
        [grad_tensors] * len(tensors) if grad_tensors is None or isinstance(grad_tensors, Tensor) else grad_tensors
    )
    return [
        (tensor if weight is None else tensor * weight).sum() for tensor, weight in zip(tensors, weights, strict=True)
    ]


# ``Tensor.backward`` ends in this one.
_backward = _Patch((torch.autograd, "backward", _watched))
# Held in probes alone: Python looks up everything in modules anew after a change to their class, which a lazy step
# would feel in its forward pass.
_zero_grad = _Patch((nn.Module, "zero_grad", _suppressed), (torch.optim.Optimizer, "zero_grad", _suppressed))


class WatchingGradients:
    """While entered, notices this thread's calls of backward, or has them, and those of ``zero_grad``, do nothing.

    A class of its own because each lazy step enters one: a generator would take twice as long.

    Args:
        suppress: Whether they do nothing.

    Attributes:
        is_suppressing: Whether they do nothing.
        saw_backward: Whether a backward pass has come to its end.
    """

    __slots__ = ("_outer", "_patches", "is_suppressing", "saw_backward")

    def __init__(self, *, suppress: bool) -> None:
        self.is_suppressing, self.saw_backward = suppress, False
        self._patches = (_backward, _zero_grad) if suppress else (_backward,)

    def __enter__(self) -> Self:
        """Begin."""
        self._outer = watch.gradients
        for patch in self._patches:
            patch.hold()
        watch.gradients = self
        return self

    def __exit__(self, *_: object) -> None:
        """End."""
        watch.gradients, watch.went_backward = self._outer, self.saw_backward
        for patch in self._patches:
            patch.release()


@contextmanager
def around_backward(around: Callable[[list[Tensor]], AbstractContextManager[None]]) -> Iterator[None]:
    """Have ``around`` entered around this thread's backward passes, with the scalars that they differentiate."""
    outer, watch.around_backward = watch.around_backward, around
    try:
        yield
    finally:
        watch.around_backward = outer


class _AnnouncedCall:
    """Stands in for ``Module._compiled_call_impl``, which each call of a module looks up first.

    ``Module.__call__`` would be more obvious, but to replace that Python rewrites a slot of each of the hundreds of
    classes of modules: of a probe step, that took two milliseconds.
    """

    def __get__(self, module: nn.Module | None, _: object = None) -> Callable[..., Any] | None:
        compiled = None if module is None else vars(module).get("_compiled_call_impl")
        if module is None or torch.compiler.is_compiling() or watch.modules is None:
            return compiled
        return functools.partial(_announce, module, module._call_impl if compiled is None else compiled)

    def __set__(self, module: nn.Module, compiled: Callable[..., Any] | None) -> None:
        vars(module)["_compiled_call_impl"] = compiled


def _announce(module: nn.Module, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    assert watch.modules is not None, "looked up by this thread, for this call"
    (enter, leave), watch.modules = watch.modules, None
    # Inside, classes are as ever: what is compiled there must see no difference.
    _module_call.release()
    try:
        enter(module)
        try:
            return call(*args, **kwargs)
        finally:
            leave(module)
    finally:
        _module_call.hold()
        watch.modules = (enter, leave)


_announced_call = _AnnouncedCall()
_module_call = _Patch((nn.Module, "_compiled_call_impl", lambda _: _announced_call))


@contextmanager
def watching_modules(enter: Callable[[nn.Module], None], leave: Callable[[nn.Module], None]) -> Iterator[None]:
    """Have ``enter`` and ``leave`` called around this thread's calls of modules, outermost ones alone.

    Calls inside of a function that torch.compile traces are not noticed.
    """
    outer = watch.modules
    _module_call.hold()
    try:
        watch.modules = (enter, leave)
        yield
    finally:
        watch.modules = outer
        _module_call.release()


@functools.cache
def _noted(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def enter(context: torch.autocast) -> Any:
        entered = original(context)
        if watch.autocast is not None:
            watch.autocast |= _autocast_dtypes([context.device])
        return entered

    return enter


_autocast = _Patch((torch.autocast, "__enter__", _noted))


def _autocast_dtypes(device_types: Iterable[str]) -> set[torch.dtype]:
    return {torch.get_autocast_dtype(each) for each in device_types if torch.is_autocast_enabled(each)}


@contextmanager
def watching_autocast(dtypes: set[torch.dtype], device_types: Iterable[str]) -> Iterator[None]:
    """Add the dtypes of autocasts to ``dtypes``: those in force on the devices already, and those this thread enters.

    Autocasts inside of a function that torch.compile traces are not noticed.
    """
    outer = watch.autocast
    _autocast.hold()
    try:
        watch.autocast = dtypes
        dtypes |= _autocast_dtypes(device_types)
        yield
    finally:
        watch.autocast = outer
        _autocast.release()
