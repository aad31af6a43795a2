"""Tensors that carry two derivatives: the graph-free way to a loss's slope and curvature.

A :class:`Jet` is a tensor x(t) with x(0), x′(0) and x″(0). Operations between jets follow the rules of second-order
Taylor arithmetic, so that a function evaluated once at ``θ + t ω`` gives its value and both derivatives along ω, and
what is alive at any time is what a forward pass without a graph keeps, three times at the most.

An operation is known by its rule in :mod:`gen_optim.jet_rules`, each of which is proven in the tests against forward
over reverse; torch's compositions of such operations are known too. Every other operation is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_flatten, tree_map_only

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["ADVICE", "CONSTANT", "RULES", "Jet", "Parts", "jet", "parts", "refuse"]

Parts = tuple[Any, Tensor | None, Tensor | None]
"""Value, first and second derivative; None stands for zeros."""

Rule = Callable[..., Any]
"""``rule(operation, *args, **kwargs)``, where tensors among the arguments may be jets."""

RULES: dict[str, Rule] = {}
"""The rule of an operation, by its name in aten, with an overload where the overloads differ."""

CONSTANT: set[str] = {"detach"}
"""Operations whose result does not depend on their input, as far as derivatives go."""

ADVICE = 'Use method="forward_over_reverse", or take the slope and curvature from probes (the approximate mode).'
_LAYOUT = {"as_strided", "_reshape_alias"}  # what these show depends on how the tensor lies in memory


class Jet(Tensor):
    """A tensor with its first and second derivative along a direction; made by :func:`jet`.

    What writes in place replaces the parts of the jet, never the tensors that it was made of. A view remembers the
    jet it looks at, and how, so that it sees what is written there later, and the other way round.
    """

    _parts: Parts
    _root: Jet | None
    _look: Callable[[Tensor], Tensor]
    _writes: int

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, value: Tensor, first: Tensor | None, second: Tensor | None) -> Self:
        """Make a tensor that looks like ``value`` and holds no data of its own."""
        made: Self = Tensor._make_wrapper_subclass(
            cls, value.shape, strides=value.stride(), dtype=value.dtype, device=value.device
        )
        made._parts, made._root, made._writes = (value, first, second), None, 0
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return "Jet(value={}, first={}, second={})".format(*parts(self))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: OpOverload[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Apply an operation to jets.

        Raises:
            NotImplementedError: If there is no rule for the operation.
        """
        kwargs = kwargs or {}
        name, schema = func._schema.name.removeprefix("aten::"), func._schema
        rule = RULES.get(f"{name}.{func._overloadname}") or RULES.get(name)
        if rule is not None and (not schema.is_mutable or getattr(rule, "writes_buffers", False)):
            return rule(func, *args, **kwargs)
        if name in CONSTANT:
            return _without_derivatives(func, args, kwargs)
        if schema.is_mutable:
            return _write(func, name, args, kwargs)
        if name == "view" and func._overloadname == "dtype":
            refuse(func)  # the bits of a derivative mean nothing
        if schema.returns and schema.returns[0].alias_info is not None and name not in _LAYOUT:
            return _view(func, name, args, kwargs)
        result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        result = _without_derivatives(func, args, kwargs)
        if any(isinstance(each, Tensor) and _is_inexact(each) for each in tree_flatten(result)[0]):
            refuse(func)
        return result  # integers, truth values and Python numbers have no derivative


def jet(value: Tensor, first: Tensor | None, second: Tensor | None) -> Tensor:
    """A jet of these parts, or ``value`` itself where both derivatives are zero. Broadcasts and casts to ``value``."""
    if first is None and second is None:
        return value
    fitted = (None if each is None else each.to(value.dtype).expand(value.shape) for each in (first, second))
    return Jet(value, *fitted)


def parts(x: Any) -> Parts:
    """Value, first and second derivative of a jet, or of a constant, which is anything else."""
    if not isinstance(x, Jet):
        return x, None, None
    if x._root is not None and x._writes != x._root._writes:
        x._parts = _each(x._look, parts(x._root))
        x._writes = x._root._writes
    return x._parts


def refuse(operation: OpOverload[..., Any], detail: str = "") -> None:
    """Raise NotImplementedError for an operation that has no proven rule."""
    raise NotImplementedError(f"graph_free has no proven derivative for {operation}{detail and ' ' + detail}. {ADVICE}")


def _is_inexact(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _each(function: Callable[[Tensor], Tensor], of: Parts) -> Parts:
    value, first, second = (None if part is None else function(part) for part in of)
    return value, first, second


def _without_derivatives(func: OpOverload[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    args, kwargs = tree_map_only(Jet, lambda x: parts(x)[0], (args, kwargs))
    return func(*args, **kwargs)


def _view(func: OpOverload[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operation that only looks at its first argument otherwise: linear, and the result sees later writes."""
    base, *rest = args
    # The derivatives need not lie in memory as the value does.
    look: Callable[..., Any] = torch.reshape if name == "view" else func
    of_base, root = (None, base) if base._root is None else (base._look, base._root)

    def seen(index: int | None) -> Tensor:
        def look_at_base(part: Tensor) -> Tensor:
            result = look(part, *rest, **kwargs)
            return result if index is None else result[index]  # type: ignore[no-any-return]

        def look_at_root(part: Tensor) -> Tensor:
            return look_at_base(part if of_base is None else of_base(part))

        made = Jet(*_each(look_at_base, parts(base)))
        made._root, made._look, made._writes = root, look_at_root, root._writes
        return made

    result = look(parts(base)[0], *rest, **kwargs)
    return seen(None) if isinstance(result, Tensor) else [seen(index) for index in range(len(result))]


def _write(func: OpOverload[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operation in place: as its functional twin, whose result the jet takes over."""
    target, twin = args[0], getattr(torch.ops.aten, name.removesuffix("_"), None)
    if not name.endswith("_") or twin is None or func._overloadname not in twin.overloads():
        refuse(func)
    if not isinstance(target, Jet):
        refuse(func, "into a tensor that does not depend on the parameters; build it with torch.cat, stack or where")
    result = getattr(twin, func._overloadname)(*args, **kwargs)
    new = _each(lambda part: part.to(target.dtype).expand(target.shape), parts(result))
    root = target._root
    if root is None:
        target._parts = new
        target._writes += 1
        return target
    whole: list[Tensor | None] = []
    for old_part, new_part in zip(parts(root), new, strict=True):
        if old_part is None and new_part is None:
            whole.append(None)
            continue
        # In the memory layout that the view was made for.
        fresh = torch.empty_strided(root.shape, root.stride(), dtype=root.dtype, device=root.device)
        fresh = fresh.zero_() if old_part is None else fresh.copy_(old_part)
        seen = target._look(fresh)
        _ = seen.zero_() if new_part is None else seen.copy_(new_part)
        whole.append(fresh)
    root._parts = (whole[0], whole[1], whole[2])
    root._writes += 1
    return target
