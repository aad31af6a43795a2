"""The operations that jets know, and the derivatives of each.

Below, ``x0``, ``x1`` and ``x2`` are a jet's value, first and second derivative. Four kinds of rule cover most of it:

    linear       y_k = f(x_k)
    bilinear     y1 = f(a1, b0) + f(a0, b1),    y2 = f(a2, b0) + 2 f(a1, b1) + f(a0, b2)
    elementwise  y1 = f′(x0) x1,                y2 = f′(x0) x2 + f″(x0) x1²
    composed     written in operations that have rules

At kinks the derivatives are those of torch's backward passes. The tests prove each rule against forward over reverse.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_flatten

from gen_optim.jets import CONSTANT, RULES, Jet, jet, parts, refuse

__all__ = ["Operation", "rule", "sum_parts"]

Operation = OpOverload[..., Any]

CONSTANT |= {
    *("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like"),
    *("new_empty", "new_zeros", "new_ones", "new_full", "zero", "bernoulli"),
    *("floor", "ceil", "round", "trunc", "sign"),
}


def _only(func: Operation, args: tuple[Any, ...], kwargs: dict[str, Any], *positions: int) -> None:
    """Refuse jets anywhere but at ``positions``."""
    others = [arg for position, arg in enumerate(args) if position not in positions]
    if any(isinstance(each, Jet) for each in tree_flatten((others, kwargs))[0]):
        refuse(func, "with respect to an argument that depends on the parameters here")


def sum_parts(*terms: Tensor | None) -> Tensor | None:
    """The sum of what is not zero; None if nothing is."""
    present = [term for term in terms if term is not None]
    return sum(present[1:], start=present[0]) if present else None


# --- linear ----------------------------------------------------------------------------------------------------------


def _part(argument: Any, order: int) -> Any:
    """One part of an argument in which an operation is linear; zeros where it does not depend on t."""
    if isinstance(argument, (list, tuple)):
        return [_part(each, order) for each in argument]
    part = parts(argument)[order]
    if part is not None or argument is None:
        return part
    if isinstance(argument, Tensor):
        value = parts(argument)[0]
        return value.new_zeros(()).expand(value.shape)
    return 0


def _has_part(argument: Any, order: int) -> bool:
    return any(parts(each)[order] is not None for each in tree_flatten(argument)[0])


def _linear(*positions: int) -> Callable[..., Any]:
    """Linear in the arguments at ``positions`` together."""

    def rule(func: Operation, *args: Any, **kwargs: Any) -> Any:
        _only(func, args, kwargs, *positions)
        linear = [position for position in positions if position < len(args)]
        results: list[Any] = []
        for order in range(3):
            if not any(_has_part(args[position], order) for position in linear):
                results.append(None)
                continue
            changed = list(args)
            for position in linear:
                changed[position] = _part(args[position], order)
            results.append(func(*changed, **kwargs))
        if not isinstance(results[0], (list, tuple)):
            return jet(*results)
        count = len(results[0])
        return [jet(*each) for each in zip(*(each or [None] * count for each in results), strict=True)]

    return rule


for _names, _positions in {
    "neg clone _unsafe_view _to_copy sum mean cumsum flip roll repeat tril triu": (0,),
    "reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d": (0,),
    "avg_pool2d avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d": (0,),
    "upsample_nearest1d upsample_nearest2d upsample_linear1d upsample_bilinear2d upsample_bicubic2d": (0,),
    "im2col col2im diag_embed index index_select gather unsafe_split pixel_shuffle pixel_unshuffle cat stack": (0,),
    "add sub rsub lerp.Scalar select_scatter slice_scatter": (0, 1),
    "where": (1, 2),
    "masked_fill index_put constant_pad_nd": (0, 2),
    "index_add scatter.src scatter.value scatter_add": (0, 3),
}.items():
    RULES.update(dict.fromkeys(_names.split(), _linear(*_positions)))


def rule(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a rule under its names in aten."""

    def register(rule: Callable[..., Any]) -> Callable[..., Any]:
        RULES.update(dict.fromkeys(names, rule))
        return rule

    return register


@rule("fill", "copy")
def _fill(func: Operation, target: Tensor, value: Any, *args: Any) -> Any:
    first, second = (None if part is None else func(parts(target)[0], part, *args) for part in parts(value)[1:])
    return jet(func(parts(target)[0], parts(value)[0], *args), first, second)


@rule("embedding")
def _embedding(func: Operation, weight: Tensor, indices: Tensor, *args: Any) -> Any:
    if any(args[1:2]):
        refuse(func, "with scale_grad_by_freq=True, whose backward is not the derivative")
    w0, w1, w2 = parts(weight)
    others = (None if part is None else func(part, indices, *args) for part in (w1, w2))
    return jet(func(w0, indices, *args), *others)


@rule("native_dropout")
def _native_dropout(func: Operation, x: Tensor, p: float, train: bool | None) -> Any:
    x0, x1, x2 = parts(x)
    y0, mask = func(x0, p, train)
    kept = mask.to(x0.dtype) * (1.0 / (1.0 - p) if train is not False and p < 1.0 else 1.0)
    return jet(y0, *(None if part is None else part * kept for part in (x1, x2))), mask


@rule("nll_loss_forward", "nll_loss2d_forward")
def _nll_loss(func: Operation, x: Tensor, *args: Any) -> Any:
    _only(func, args, {})
    x0, x1, x2 = parts(x)
    y0, total = func(x0, *args)
    return jet(y0, *(None if part is None else func(part, *args)[0] for part in (x1, x2))), total


# --- bilinear --------------------------------------------------------------------------------------------------------


def _leibniz(product: Callable[[Any, Any], Tensor], a: Any, b: Any) -> tuple[Tensor | None, Tensor | None]:
    """First and second derivative of ``product(a, b)``."""
    (a0, a1, a2), (b0, b1, b2) = parts(a), parts(b)
    first = sum_parts(None if a1 is None else product(a1, b0), None if b1 is None else product(a0, b1))
    second = sum_parts(
        None if a2 is None else product(a2, b0),
        None if a1 is None or b1 is None else product(a1, b1) * 2,
        None if b2 is None else product(a0, b2),
    )
    return first, second


@rule("mul", "mm", "bmm", "mv", "dot", "vdot")
def _product(func: Operation, a: Any, b: Any, **kwargs: Any) -> Any:
    return jet(func(parts(a)[0], parts(b)[0], **kwargs), *_leibniz(lambda u, v: func(u, v, **kwargs), a, b))


@rule("addmm", "baddbmm", "addmv")
def _add_product(func: Operation, bias: Any, a: Any, b: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    y0 = func(parts(bias)[0], parts(a)[0], parts(b)[0], beta=beta, alpha=alpha)
    terms = (
        sum_parts(
            None if product is None else product * alpha, None if part is None else (part * beta).expand(y0.shape)
        )
        for product, part in zip(_leibniz(torch.matmul, a, b), parts(bias)[1:], strict=True)
    )
    return jet(y0, *terms)


@rule("convolution")
def _convolution(func: Operation, x: Any, weight: Any, bias: Any, *args: Any) -> Any:
    y0 = func(parts(x)[0], parts(weight)[0], parts(bias)[0], *args)
    shape = (-1, *(1,) * len(args[0]))  # the channels, and the axes that the stride has
    products = _leibniz(lambda u, v: func(u, v, None, *args), x, weight)
    terms = (
        sum_parts(product, None if part is None else part.view(shape).expand(y0.shape))
        for product, part in zip(products, parts(bias)[1:], strict=True)
    )
    return jet(y0, *terms)


@rule("div")
def _div(func: Operation, a: Any, b: Any, *, rounding_mode: str | None = None) -> Any:
    if rounding_mode is not None:
        refuse(func, "with a rounding_mode")
    (a0, a1, a2), (b0, b1, b2) = parts(a), parts(b)
    y0 = torch.div(a0, b0)
    # From y b = a: y1 = (a1 − y0 b1) / b0 and y2 = (a2 − 2 y1 b1 − y0 b2) / b0.
    first = sum_parts(a1, None if b1 is None else -y0 * b1)
    y1 = None if first is None else first / b0
    second = sum_parts(a2, None if y1 is None or b1 is None else -2 * y1 * b1, None if b2 is None else -y0 * b2)
    return jet(y0, y1, None if second is None else second / b0)


# --- elementwise -----------------------------------------------------------------------------------------------------


def _chain(x: Any, y0: Tensor, slope: Tensor, bend: Tensor | None) -> Tensor:
    """The jet of f(x) from y0 = f(x0), f′(x0) and f″(x0), which is None where f is piecewise linear."""
    _, x1, x2 = parts(x)
    first = None if x1 is None else slope * x1
    second = sum_parts(None if x2 is None else slope * x2, None if x1 is None or bend is None else bend * x1 * x1)
    return jet(y0, first, second)


Derivatives = Callable[..., tuple[Tensor, Tensor | None]]


def _elementwise(derivatives: Derivatives, *, of_output: bool = False) -> Callable[..., Any]:
    """``derivatives(x0, *args)`` are f′(x0) and f″(x0) of f with constant arguments ``args``; or ``(y0, *args)``."""

    def rule(func: Operation, x: Any, *args: Any, **kwargs: Any) -> Any:
        _only(func, args, kwargs)
        x0 = parts(x)[0]
        y0 = func(x0, *args, **kwargs)
        return _chain(x, y0, *derivatives(y0 if of_output else x0, *args, **kwargs))

    return rule


def _power(x: Tensor, p: Any) -> tuple[Tensor, Tensor]:
    # Not p xᵖ⁻¹ alone: at x = 0 that is 0 · ∞ for the exponents 0 and 1.
    p = torch.as_tensor(p, dtype=x.dtype, device=x.device)
    q = p * (p - 1)
    return torch.where(p == 0, 0, p * x.pow(p - 1)), torch.where(q == 0, 0, q * x.pow(p - 2))


def _sigmoid(s: Tensor) -> tuple[Tensor, Tensor]:
    return s * (1 - s), s * (1 - s) * (1 - 2 * s)


def _erf(x: Tensor) -> tuple[Tensor, Tensor]:
    slope = 2 / math.sqrt(math.pi) * torch.exp(-x * x)
    return slope, -2 * x * slope


def _gelu(x: Tensor, *, approximate: str = "none") -> tuple[Tensor, Tensor]:
    if approximate == "none":
        density = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
        return 0.5 * torch.erfc(-x * math.sqrt(0.5)) + x * density, (2 - x * x) * density
    scale, cube = math.sqrt(2 / math.pi), 0.044715
    t, u1, u2 = torch.tanh(scale * (x + cube * x**3)), scale * (1 + 3 * cube * x * x), 6 * scale * cube * x
    t1 = (1 - t * t) * u1
    return 0.5 * (1 + t) + 0.5 * x * t1, t1 + 0.5 * x * ((1 - t * t) * u2 - 2 * t * t1 * u1)


def _silu(x: Tensor) -> tuple[Tensor, Tensor]:
    s = torch.sigmoid(x)
    s1, s2 = _sigmoid(s)
    return s + x * s1, 2 * s1 + x * s2


def _softplus(x: Tensor, beta: float = 1, threshold: float = 20) -> tuple[Tensor, Tensor]:
    s, is_linear = torch.sigmoid(beta * x), beta * x > threshold
    return torch.where(is_linear, 1, s), torch.where(is_linear, 0, beta * s * (1 - s))


def _elu(x: Tensor, alpha: float = 1, scale: float = 1, inner: float = 1) -> tuple[Tensor, Tensor]:
    e = scale * alpha * inner * torch.exp(inner * x.clamp(max=0))
    # A number among the arguments of where would be rounded to torch's default dtype.
    return torch.where(x > 0, torch.full_like(x, scale), e), torch.where(x > 0, 0, inner * e)


def _clamp(x: Tensor, low: Any = None, high: Any = None) -> tuple[Tensor, None]:
    inside = torch.ones_like(x, dtype=torch.bool) if low is None else x >= low
    return (inside if high is None else inside & (x <= high)).to(x.dtype), None


def _inside(x: Tensor, low: float, high: float) -> Tensor:
    return ((x > low) & (x < high)).to(x.dtype)


_OF_INPUT: dict[str, Derivatives] = {
    "log": lambda x: (1 / x, -1 / (x * x)),
    "log1p": lambda x: (1 / (1 + x), -1 / (1 + x) ** 2),
    "sin": lambda x: (torch.cos(x), -torch.sin(x)),
    "cos": lambda x: (-torch.sin(x), -torch.cos(x)),
    "atan": lambda x: (1 / (1 + x * x), -2 * x / (1 + x * x) ** 2),
    "erf": _erf,
    "pow.Tensor_Scalar": _power,
    "pow.Tensor_Tensor": _power,
    "gelu": _gelu,
    "silu": _silu,
    "softplus": _softplus,
    "elu": _elu,
    "celu": lambda x, alpha=1: _elu(x, alpha, 1, 1 / alpha),
    "relu": lambda x: ((x > 0).to(x.dtype), None),
    "leaky_relu": lambda x, slope=0.01: (slope + (1 - slope) * (x > 0).to(x.dtype), None),
    "threshold": lambda x, *limits: ((x > limits[0]).to(x.dtype), None),
    "hardtanh": lambda x, low=-1, high=1: (_inside(x, low, high), None),
    "hardsigmoid": lambda x: (_inside(x, -3, 3) / 6, None),
    "hardswish": lambda x: (torch.where(x >= 3, 1, torch.where(x <= -3, 0, x / 3 + 0.5)), _inside(x, -3, 3) / 3),
    "abs": lambda x: (torch.sgn(x), None),
    "clamp": _clamp,
    "clamp_min": _clamp,
    "clamp_max": lambda x, high: _clamp(x, None, high),
}
_OF_OUTPUT: dict[str, Derivatives] = {
    "exp": lambda y: (y, y),
    "expm1": lambda y: (y + 1, y + 1),
    "sqrt": lambda y: (0.5 / y, -0.25 / y**3),
    "rsqrt": lambda y: (-0.5 * y**3, 0.75 * y**5),
    "reciprocal": lambda y: (-y * y, 2 * y**3),
    "tanh": lambda y: (1 - y * y, -2 * y * (1 - y * y)),
    "sigmoid": _sigmoid,
}
RULES.update({name: _elementwise(each) for name, each in _OF_INPUT.items()})
RULES.update({name: _elementwise(each, of_output=True) for name, each in _OF_OUTPUT.items()})


@rule("log_sigmoid_forward")
def _log_sigmoid(func: Operation, x: Tensor) -> Any:
    y0, buffer = func(parts(x)[0])
    s = torch.sigmoid(-parts(x)[0])
    return _chain(x, y0, s, -s * (1 - s)), buffer


# --- choosing --------------------------------------------------------------------------------------------------------


@rule("maximum", "minimum")
def _maximum(func: Operation, a: Tensor, b: Tensor) -> Any:
    a0, b0 = parts(a)[0], parts(b)[0]
    y0 = func(a0, b0)
    share = ((a0 == y0).to(y0.dtype) - (b0 == y0).to(y0.dtype) + 1) / 2  # ties go to both
    return jet(y0, *torch.add(share * a, (1 - share) * b)._parts[1:])  # type: ignore[attr-defined]


@rule("amax", "amin", "max.default", "min.default")
def _extremum(func: Operation, x: Tensor, dim: Any = (), keepdim: bool = False) -> Any:
    x0, x1, x2 = parts(x)
    whole = func._overloadname == "default" and func._schema.name in ("aten::max", "aten::min")
    y0 = func(x0) if whole else func(x0, dim, True)
    chosen = (x0 == y0).to(x0.dtype)
    dim = [] if whole else dim
    share = chosen / chosen.sum(dim, keepdim=True)  # ties share
    first, second = (None if part is None else (share * part).sum(dim, keepdim=keepdim) for part in (x1, x2))
    return jet(y0 if whole else func(x0, dim, keepdim), first, second)


def _gather(x: Any, index: Tensor, dim: int) -> list[Tensor | None]:
    return [None if part is None else torch.gather(part, dim, index) for part in parts(x)[1:]]


@rule("max.dim", "min.dim", "median.dim")
def _extremum_at(func: Operation, x: Tensor, dim: int, keepdim: bool = False) -> Any:
    values, index = func(parts(x)[0], dim, True)
    chosen = jet(values, *_gather(x, index, dim))
    return (chosen, index) if keepdim else (chosen.squeeze(dim), index.squeeze(dim))


@rule("sort", "topk")
def _order(func: Operation, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    values, index = func(parts(x)[0], *args, **kwargs)
    at = 1 if func._schema.name == "aten::topk" else 0
    dim = kwargs.get("dim", args[at] if len(args) > at else -1)
    return jet(values, *_gather(x, index, dim)), index


@rule("max_pool2d_with_indices", "max_pool3d_with_indices", "adaptive_max_pool2d", "adaptive_max_pool3d")
def _max_pool(func: Operation, x: Tensor, size: Any, *args: Any) -> Any:
    values, index = func(parts(x)[0], size, *args)
    axes = 3 if "pool3d" in func._schema.name else 2
    flat = [None if part is None else part.flatten(-axes) for part in parts(x)[1:]]
    chosen = (None if part is None else part.gather(-1, index.flatten(-axes)).view(index.shape) for part in flat)
    return jet(values, *chosen), index
