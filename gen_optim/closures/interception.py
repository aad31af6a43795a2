"""Functions of torch that are replaced while a probe step calls its closure.

A lazy step replaces nothing. In a probe step these are replaced, for the thread that runs it and for as long as a call
of the closure lasts:

- ``torch.autograd.backward``, in which ``Tensor.backward`` ends. In a probe it does nothing: a closure written for
  ``torch.optim`` calls it each time. In the first call it reports which scalar is differentiated. If that is the
  loss, the gradients give its slope, and looking back takes one forward pass; without it, two or three.
- ``torch.autocast.__enter__``, which reports the dtype. A closure enters autocast inside and leaves it before it
  returns, so that ``torch.is_autocast_enabled`` says nothing before or after the call. A loss computed in bfloat16 and
  returned in float32 would be taken for exact. Without it, small perceptrons under bfloat16 autocast (AdamW, 800 steps,
  4 seeds, with and without decay) ended at a mean squared error of 0.0104 instead of 0.0058 in the geometric mean; as
  classifiers at a cross-entropy of 0.142 instead of 0.151.

torch's caches of weights are cleared between probes (:class:`WeightCaches`).

Replacements are shared by all threads and counted. They refer to what installed them weakly: if an interrupt prevents
an exit, they pass calls through as soon as that object is gone, and the next step removes them.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from gen_optim.tensors.interrupts import Unfinished

BackwardHandler = Callable[[Callable[[], None], Callable[[], list[Tensor]]], None]
"""Handles a backward pass. Its arguments run the pass, and return the scalars whose sum it differentiates."""


class Interception:
    """From :meth:`begin` to :meth:`end`, handles the thread's backward passes and notes the dtypes of its autocasts.

    ``on_backward`` is called in place of ``torch.autograd.backward``. Backward passes inside of a backward pass
    (checkpointed blocks) are part of that, and are not handled. To ``dtypes`` are added those of the autocasts in force
    now on ``device_types`` and of those entered, except inside of a function that ``torch.compile`` traces.
    """

    def __init__(self, on_backward: BackwardHandler, dtypes: set[torch.dtype], device_types: Iterable[str]) -> None:
        self._on_backward = on_backward
        self._dtypes = dtypes
        self._device_types = device_types
        self._outer = _thread.active
        self._is_in_backward = False

    def begin(self) -> None:
        """Begin to intercept."""
        _functions.hold(self)
        _thread.active = weakref.ref(self)
        self.note_autocast(self._device_types)

    def end(self) -> None:
        """End it; may be repeated."""
        _thread.active = self._outer
        _functions.release(self)

    def backward(self, original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        """Handle a call of ``torch.autograd.backward``."""
        if self._is_in_backward:
            original(*args, **kwargs)
            return
        self._is_in_backward = True
        try:
            self._on_backward(lambda: original(*args, **kwargs), lambda: _summands(*args, **kwargs))
        finally:
            self._is_in_backward = False

    def note_autocast(self, device_types: Iterable[str]) -> None:
        """Note the dtypes of the autocasts in force."""
        self._dtypes |= {torch.get_autocast_dtype(each) for each in device_types if torch.is_autocast_enabled(each)}


class WeightCaches:
    """Tensors that torch has computed from the weights and keeps, to be forgotten in probes and put back.

    An outer autocast keeps low-precision copies of the weights, and ``torch.nn.utils.parametrize.cached()`` keeps
    parametrized ones, which only a private name gives access to. With these, probes would see the weights of the first
    call: all losses are equal, and a network with weight normalization ended at a loss of 4.2 instead of 0.6.
    """

    def __init__(self) -> None:
        self._parametrized = dict(parametrize._cache)

    def clear(self) -> None:
        """Forget what is kept; called when the weights have moved."""
        torch.clear_autocast_cache()
        parametrize._cache.clear()

    def restore(self) -> None:
        """Put back what was kept at first; called when the weights are back."""
        self.clear()
        parametrize._cache.update(self._parametrized)


def repair() -> None:
    """Undo replacements that an interrupt has left behind; called when a step begins."""
    _functions.repair()


class _Thread(threading.local):
    active: weakref.ref[Interception] | None = None
    """The interception that is in force for this thread."""


_thread = _Thread()


def _active() -> Interception | None:
    return None if _thread.active is None else _thread.active()


def _intercepted_backward(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def backward(*args: Any, **kwargs: Any) -> None:
        interception = _active()
        if interception is None:
            original(*args, **kwargs)
        else:
            interception.backward(original, *args, **kwargs)

    return backward


def _intercepted_autocast(original: Callable[[torch.autocast], Any]) -> Callable[[torch.autocast], Any]:
    @functools.wraps(original)
    def enter(autocast: torch.autocast) -> Any:
        entered = original(autocast)
        interception = _active()
        if interception is not None:
            interception.note_autocast([autocast.device])
        return entered

    return enter


def _summands(
    tensors: Tensor | Sequence[Tensor], grad_tensors: Tensor | Sequence[Tensor] | None = None, *_: Any, **__: Any
) -> list[Tensor]:
    """Return the scalars that ``torch.autograd.backward(...)`` sums and differentiates; NaN for edges of the graph."""
    tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    if not all(isinstance(each, Tensor) for each in tensors):
        return [torch.tensor(float("nan"))]
    weights = (
        [grad_tensors] * len(tensors) if grad_tensors is None or isinstance(grad_tensors, Tensor) else grad_tensors
    )
    return [
        (tensor if weight is None else tensor * weight).sum() for tensor, weight in zip(tensors, weights, strict=True)
    ]


class _Replacement:
    """Attributes that are replaced while anything holds them, from any number of threads.

    Each is given as its owner, its name, and a function that returns the new value for the old one.
    """

    def __init__(self, *attributes: tuple[Any, str, Callable[[Any], Any]]) -> None:
        self._attributes = attributes
        self._lock = threading.RLock()
        self._holders: weakref.WeakSet[object] = weakref.WeakSet()
        self._originals: list[tuple[Any, str, Any]] = []

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock, or a new one if an interrupt in another thread has left it held: it is needed for a moment."""
        lock = self._lock
        if not lock.acquire(timeout=1.0):
            lock = self._lock = threading.RLock()
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def hold(self, holder: object) -> None:
        """Replace the attributes, unless they are replaced already."""
        with self._locked():
            self.repair()
            self._holders.add(holder)
            if not self._originals:
                for owner, name, replaced in self._attributes:
                    original = getattr(owner, name)
                    self._originals.append((owner, name, original))  # first: an interrupt may come in between
                    setattr(owner, name, replaced(original))

    def release(self, holder: object) -> None:
        """Restore the attributes, unless something else holds them."""
        with self._locked():
            self._holders.discard(holder)
            self.repair()

    def repair(self) -> None:
        """Restore the attributes if they are replaced and nothing holds them."""
        if self._originals and not self._holders:
            with self._locked():
                while self._originals and not self._holders:
                    setattr(*self._originals[-1])
                    self._originals.pop()


_functions = _Replacement(
    (torch.autograd, "backward", _intercepted_backward),
    (torch.autocast, "__enter__", _intercepted_autocast),
)


@contextmanager
def postponed_step_hooks(optimizer: torch.optim.Optimizer, unfinished: Unfinished) -> Iterator[Callable[[], None]]:
    """Keep an optimizer's step post hooks from being called inside the context; yield what calls them later.

    torch has no public way to do that: it needs the table ``_optimizer_step_post_hooks``. Without it, hooks that write
    to the parameters or average them would run at a point that is only tried out. Optimizers that skip their parent's
    set-up have no such table, and no hooks. torch's global hooks are not postponed.
    """
    table: dict[int, Callable[..., Any]] = getattr(optimizer, "_optimizer_step_post_hooks", {})

    def call_hooks() -> None:
        for hook in list(table.values()):
            hook(optimizer, (optimizer,), {})

    with unfinished.ending_with(partial(table.update, dict(table))):
        table.clear()
        yield call_hooks
