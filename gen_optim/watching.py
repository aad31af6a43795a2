"""Noticing what a closure does: which modules it calls, and what it does to gradients.

torch has no hook for either that would do: module hooks make compiled modules compile anew, and nothing announces a
backward pass. So three functions of torch are replaced while a closure runs, for the thread that runs it.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["watch", "watching_gradients", "watching_modules"]


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


watch = _Watch()
_patch = _Patch()


@functools.cache
def _watched(original: Callable[..., Any], *, is_backward: bool) -> Callable[..., Any]:
    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if watch.is_on:
            watch.saw_backward |= is_backward
            if is_backward and watch.differentiated is not None:
                watch.differentiated += _summands(*args, **kwargs)
            if watch.is_suppressing:
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
def watching_gradients(*, suppress: bool) -> Iterator[None]:
    """Notice this thread's calls of backward, or make them, and those of ``zero_grad``, do nothing."""
    outer = (watch.is_on, watch.is_suppressing, watch.saw_backward)
    with _patch:
        watch.is_on, watch.is_suppressing, watch.saw_backward = True, suppress, False
        try:
            yield
        finally:
            watch.is_on, watch.is_suppressing, watch.saw_backward = outer


@contextmanager
def watching_modules(enter: Callable[[nn.Module], None], leave: Callable[[nn.Module], None]) -> Iterator[None]:
    """Have ``enter`` and ``leave`` called around this thread's calls of modules, outermost ones alone.

    Inside of those ``Module.__call__`` is as ever, so that what is compiled there sees no difference. Calls inside of
    a function that torch.compile traces are not noticed.
    """
    thread, original = threading.get_ident(), nn.Module.__call__
    is_over = False

    @functools.wraps(original)
    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if is_over or threading.get_ident() != thread or torch.compiler.is_compiling():
            return original(module, *args, **kwargs)
        nn.Module.__call__ = original  # type: ignore[method-assign]
        try:
            enter(module)
            try:
                return original(module, *args, **kwargs)
            finally:
                leave(module)
        finally:
            nn.Module.__call__ = call  # type: ignore[method-assign]

    nn.Module.__call__ = call  # type: ignore[method-assign]
    try:
        yield
    finally:
        is_over = True
        nn.Module.__call__ = original  # type: ignore[method-assign]
