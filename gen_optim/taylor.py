"""A function and its first two derivatives along a direction, in one evaluation without a graph."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from gen_optim import jet_compositions, jet_rules
from gen_optim.jets import ADVICE, Jet, Parts, jet, parts

__all__ = ["propagate"]

_RULES = (jet_rules, jet_compositions)  # imported for the rules that they register
_CUSTOM_ALLOWED = {"CheckpointFunction"}  # it runs its function as it is


def propagate(
    function: Callable[[dict[str, Tensor]], Tensor], parameters: Mapping[str, Tensor], direction: Mapping[str, Tensor]
) -> Parts:
    """``function`` and its first two derivatives at t = 0 along ``parameters + t · direction``, without a graph.

    Args:
        function: Maps the parameters to one tensor.
        parameters: Where to differentiate.
        direction: What they move along, for all of them or some.

    Returns:
        Value, first and second derivative; None for a derivative that is zero because nothing depends on t.

    Raises:
        NotImplementedError: If the function uses an operation without a proven rule, or a custom autograd function.

    Example:
        >>> value, first, second = propagate(lambda p: p["x"] ** 3, {"x": torch.tensor(2.0)}, {"x": torch.tensor(1.0)})
        >>> value.item(), first.item(), second.item()
        (8.0, 12.0, 12.0)
    """
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with torch.no_grad(), _refusing_custom_functions():
        torch.backends.mha.set_fastpath_enabled(False)  # a fused kernel, which has no derivatives
        try:
            moving = {name: tensor.detach() for name, tensor in parameters.items()}
            moving.update({name: jet(moving[name], tensor.detach(), None) for name, tensor in direction.items()})
            return parts(function(moving))
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)


class _Refusing(threading.local):
    is_on = False


_refusing = _Refusing()
_lock = threading.Lock()
_depth = 0
_apply = torch.autograd.Function.__dict__["apply"]


@contextmanager
def _refusing_custom_functions() -> Iterator[None]:
    """Refuse ``torch.autograd.Function`` in this thread: its backward may be anything, so it is not proven."""
    global _depth  # noqa: PLW0603

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        involved = any(isinstance(each, Jet) for each in tree_flatten((args, kwargs))[0])
        if _refusing.is_on and involved and cls.__name__ not in _CUSTOM_ALLOWED:
            raise NotImplementedError(
                f"graph_free cannot see the derivative of the custom autograd function {cls.__name__}. {ADVICE}"
            )
        return _apply.__get__(None, cls)(*args, **kwargs)

    outer = _refusing.is_on
    with _lock:
        _depth += 1
        if _depth == 1:
            torch.autograd.Function.apply = classmethod(apply)  # type: ignore[assignment,method-assign]
    _refusing.is_on = True
    try:
        yield
    finally:
        _refusing.is_on = outer
        with _lock:
            _depth -= 1
            if _depth == 0:
                torch.autograd.Function.apply = _apply  # type: ignore[method-assign]
