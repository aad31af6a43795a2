"""More operations that jets know, most as compositions of others: normalisations, softmax, losses, statistics, gates.

torch computes these in one kernel, whose own forward-mode derivative is not always differentiable a second time: that
of the normalisations holds mean and variance fixed, and is silently wrong. Written out, they follow the chain rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from gen_optim.jet_rules import Operation, rule, sum_parts
from gen_optim.jets import jet, parts, refuse

__all__: list[str] = []


def _composed(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function of the operation's own arguments."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        def compute(_: Operation, *args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

        rule(name)(compute)
        return function

    return register


# --- normalisations --------------------------------------------------------------------------------------------------


def _normalise(x: Tensor, axes: list[int], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(x − mean) / √(variance + eps) over ``axes``, the mean and 1 / √(variance + eps); at least in float32."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = x.mean(axes, keepdim=True)
    centred = x - mean
    scale = torch.rsqrt((centred * centred).mean(axes, keepdim=True) + eps)
    return centred * scale, mean, scale


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None, shape: Sequence[int]) -> Tensor:
    if weight is not None:
        x = x * weight.view(shape)
    return x if bias is None else x + bias.view(shape)


@_composed("native_layer_norm")
def _layer_norm(x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float) -> Any:
    y, mean, scale = _normalise(x, list(range(-len(shape), 0)), eps)
    return _affine(y, weight, bias, shape).to(x.dtype), mean, scale


@_composed("native_group_norm")
def _group_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None,
    batch: int, channels: int, _: int, groups: int, eps: float,
) -> Any:  # fmt: skip
    y, mean, scale = _normalise(x.reshape(batch, groups, -1), [-1], eps)
    y = _affine(y.reshape(x.shape), weight, bias, (channels, *(1,) * (x.dim() - 2)))
    return y.to(x.dtype), mean.squeeze(-1), scale.squeeze(-1)


def _with_statistics(
    func: Operation, x: Tensor, weight: Tensor | None, bias: Tensor | None,
    mean: Tensor | None, variance: Tensor | None, training: bool, momentum: float, eps: float,
) -> Any:  # fmt: skip
    shape = (-1, *(1,) * (x.dim() - 2))
    if training:
        y, mean_now, scale = _normalise(x, [axis for axis in range(x.dim()) if axis != 1], eps)
        saved = [mean_now.flatten(), scale.flatten()]
        if mean is not None and variance is not None:
            count = x.numel() / x.shape[1]
            unbiased = (saved[1] ** -2 - eps) * (count / (count - 1))
            for running, now in ((mean, saved[0]), (variance, unbiased)):
                running.copy_(torch.lerp(running, parts(now)[0].to(running.dtype), momentum))
    elif mean is None or variance is None:
        raise ValueError("batch_norm in evaluation mode needs running statistics")
    else:
        y = (x - mean.view(shape)) * torch.rsqrt(variance + eps).view(shape)
        saved = [x.new_empty(0), x.new_empty(0)]
    y = _affine(y, weight, bias, shape).to(x.dtype)
    return (y, *saved, *[x.new_empty(0, dtype=torch.uint8)] * (len(func._schema.returns) - 3))


rule("native_batch_norm", "cudnn_batch_norm", "_native_batch_norm_legit")(_with_statistics)
_with_statistics.writes_buffers = True  # type: ignore[attr-defined]


@rule("_native_batch_norm_legit.no_stats")
def _without_statistics(
    func: Operation, x: Tensor, weight: Tensor | None, bias: Tensor | None, training: bool, momentum: float, eps: float
) -> Any:
    return _with_statistics(func, x, weight, bias, None, None, training, momentum, eps)


@_composed("_weight_norm_interface")
def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Any:
    norm = _norm(v, 2.0, [axis for axis in range(v.dim()) if axis != dim], keepdim=True)
    return v * (g / norm), norm


# --- softmax ---------------------------------------------------------------------------------------------------------


def _log_probability(x: Tensor, p: Tensor, dim: Any) -> tuple[Tensor | None, Tensor | None]:
    """The derivatives u1, u2 of x − logsumexp(x): u1 = x1 − E x1 and u2 = x2 − E(x2 + u1²) under probabilities p."""
    _, x1, x2 = parts(x)
    u1 = None if x1 is None else x1 - (p * x1).sum(dim, keepdim=True)
    moment = sum_parts(x2, None if u1 is None else u1 * u1)
    expected = None if moment is None else (p * moment).sum(dim, keepdim=True)
    return u1, None if expected is None else (-expected if x2 is None else x2 - expected)


@rule("_softmax", "_safe_softmax")
def _softmax(func: Operation, x: Tensor, dim: int, *args: Any) -> Any:
    y0 = func(parts(x)[0], dim, *args)
    u1, u2 = _log_probability(x, y0, dim)
    second = sum_parts(u2, None if u1 is None else u1 * u1)
    return jet(y0, None if u1 is None else y0 * u1, None if second is None else y0 * second)


@rule("_log_softmax")
def _log_softmax(func: Operation, x: Tensor, dim: int, half_to_float: bool) -> Any:
    y0 = func(parts(x)[0], dim, half_to_float)
    return jet(y0, *_log_probability(x, y0.exp(), dim))


@rule("logsumexp")
def _logsumexp(func: Operation, x: Tensor, dim: Any, keepdim: bool = False) -> Any:
    x0, x1, x2 = parts(x)
    p = torch.exp(x0 - func(x0, dim, True))
    u1, _ = _log_probability(x, p, dim)
    moment = sum_parts(x2, None if u1 is None else u1 * u1)
    first, second = (None if part is None else (p * part).sum(dim, keepdim=keepdim) for part in (x1, moment))
    return jet(func(x0, dim, keepdim), first, second)


# --- losses ----------------------------------------------------------------------------------------------------------


def _reduce(x: Tensor, reduction: int) -> Tensor:
    return x if reduction == 0 else x.mean() if reduction == 1 else x.sum()


@_composed("mse_loss")
def _mse_loss(x: Tensor, target: Tensor, reduction: int = 1) -> Any:
    error = x - target
    return _reduce(error * error, reduction)


@_composed("smooth_l1_loss")
def _smooth_l1_loss(x: Tensor, target: Tensor, reduction: int = 1, beta: float = 1.0) -> Any:
    error = x - target
    size = error.abs()
    if beta == 0:
        return _reduce(size, reduction)
    return _reduce(torch.where(size < beta, 0.5 / beta * error * error, size - 0.5 * beta), reduction)


@_composed("huber_loss")
def _huber_loss(x: Tensor, target: Tensor, reduction: int = 1, delta: float = 1.0) -> Any:
    error = x - target
    size = error.abs()
    return _reduce(torch.where(size <= delta, 0.5 * error * error, delta * (size - 0.5 * delta)), reduction)


@_composed("binary_cross_entropy")
def _binary_cross_entropy(x: Tensor, target: Tensor, weight: Tensor | None = None, reduction: int = 1) -> Any:
    loss = (target - 1) * torch.log1p(-x).clamp(min=-100) - target * torch.log(x).clamp(min=-100)
    return _reduce(loss if weight is None else loss * weight, reduction)


@_composed("binary_cross_entropy_with_logits")
def _binary_cross_entropy_with_logits(
    x: Tensor, target: Tensor, weight: Tensor | None = None,
    positive: Tensor | None = None, reduction: int = 1,
) -> Any:  # fmt: skip
    share = 1.0 if positive is None else (positive - 1) * target + 1
    loss = (1 - target) * x - share * logsigmoid(x)
    return _reduce(loss if weight is None else loss * weight, reduction)


# --- statistics ------------------------------------------------------------------------------------------------------


@_composed("var.correction")
def _var(
    x: Tensor, dim: Sequence[int] | None = None, *,
    correction: float | None = None, keepdim: bool = False,
) -> Any:  # fmt: skip
    axes = list(dim) if dim else list(range(x.dim()))
    count = math.prod(x.shape[axis] for axis in axes)
    centred = x - x.mean(axes, keepdim=True)
    return (centred * centred).sum(axes, keepdim=keepdim) / (count - (1 if correction is None else correction))


@_composed("std.correction")
def _std(x: Tensor, *args: Any, **kwargs: Any) -> Any:
    return _var(x, *args, **kwargs).sqrt()


@_composed("var_mean.correction")
def _var_mean(x: Tensor, dim: Sequence[int] | None = None, **kwargs: Any) -> Any:
    axes = list(dim) if dim else list(range(x.dim()))
    return _var(x, dim, **kwargs), x.mean(axes, keepdim=kwargs.get("keepdim", False))


def _norm(x: Tensor, order: float | None, dim: Sequence[int] | None, keepdim: bool) -> Tensor:
    axes = list(dim) if dim else list(range(x.dim()))
    if order is None or order == 2:
        return (x * x).sum(axes, keepdim=keepdim).sqrt()
    if order == 1:
        return x.abs().sum(axes, keepdim=keepdim)
    if order == math.inf:
        return x.abs().amax(axes, keepdim=keepdim)
    return x.abs().pow(order).sum(axes, keepdim=keepdim).pow(1 / order)


@rule("linalg_vector_norm")
def _vector_norm(
    func: Operation, x: Tensor, order: float = 2, dim: Sequence[int] | None = None, keepdim: bool = False,
    *, dtype: torch.dtype | None = None,
) -> Any:  # fmt: skip
    if order <= 0:
        refuse(func, f"of order {order}")
    return _norm(x if dtype is None else x.to(dtype), order, dim, keepdim)


@rule("norm.Scalar", "norm.ScalarOpt_dim")
def _old_norm(
    func: Operation, x: Tensor, order: float | None = 2, dim: Sequence[int] | None = None, keepdim: bool = False
) -> Any:
    return _vector_norm(func, x, 2 if order is None else order, dim, keepdim)


# --- arithmetic, gates, and backward passes inside a loss ------------------------------------------------------------


def _glu(x: Tensor, dim: int = -1) -> Tensor:
    a, b = x.chunk(2, dim)
    return a * torch.sigmoid(b)


_COMPOSITIONS: dict[str, Callable[..., Tensor]] = {
    "addcmul": lambda x, a, b, *, value=1: x + value * (a * b),
    "addcdiv": lambda x, a, b, *, value=1: x + value * (a / b),
    "lerp.Tensor": lambda x, end, weight: x + weight * (end - x),
    "pow.Scalar": lambda base, x: torch.exp(x * math.log(base)),
    "exp2": lambda x: torch.exp(x * math.log(2)),
    "log2": lambda x: torch.log(x) / math.log(2),
    "log10": lambda x: torch.log(x) / math.log(10),
    "tan": lambda x: torch.sin(x) / torch.cos(x),
    "sinh": lambda x: 0.5 * (torch.exp(x) - torch.exp(-x)),
    "cosh": lambda x: 0.5 * (torch.exp(x) + torch.exp(-x)),
    "mish": lambda x: x * torch.tanh(softplus(x)),
    "glu": _glu,
    "_prelu_kernel": lambda x, weight: torch.where(x > 0, x, weight * x),
    "tanh_backward": lambda gradient, y: gradient * (1 - y * y),
    "sigmoid_backward": lambda gradient, y: gradient * (y * (1 - y)),
    "threshold_backward": lambda gradient, x, at: torch.where(x <= at, 0.0, gradient),
}
for _name, _function in _COMPOSITIONS.items():
    _composed(_name)(_function)
