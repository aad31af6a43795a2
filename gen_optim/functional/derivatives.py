"""The loss along a direction: its values, slope and curvature.

All functions take parameters as ``dict[str, Tensor]`` and are meant for :func:`torch.func.functional_call`. They use

    g(α) = L(θ − αω),    slope = −g′(0) = dL(θ)·ω,    curvature = g″(0) = d²L(θ)(ω, ω) = ωᵀHω

with the learning rate α and the direction ω, the update per unit of learning rate (Bu and Xu, "Gradient descent with
generalized Newton's method", ICLR 2025, arXiv:2407.02772, section 2).
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import grad_and_value, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from gen_optim.rules.parabola import Parabola
from gen_optim.tensors.rng import RandomStreams, random_devices
from gen_optim.tensors.scalars import summing_dtype

LossFunction = Callable[[dict[str, Tensor]], Tensor]
"""Maps parameters by name to the loss, a floating-point tensor with one element."""


class Derivatives(NamedTuple):
    """The loss at a point and its first two derivatives along a direction, as tensors without axes.

    Attributes:
        value: g(0) = L(θ).
        slope: −g′(0), in units of the loss per unit of learning rate; positive if the loss descends.
        curvature: g″(0), in units of the loss per squared unit of learning rate.
    """

    value: Tensor
    slope: Tensor
    curvature: Tensor


def loss_along(
    loss_fn: LossFunction,
    params: Mapping[str, Tensor],
    direction: Mapping[str, Tensor],
    learning_rates: Tensor | Sequence[float] | float,
    *,
    chunk_size: int | None = None,
) -> Tensor:
    """Evaluate the loss along a direction, g(α) = L(θ − αω), at several learning rates.

    All evaluations use the same random numbers, such as dropout masks, and the random streams end as after one
    evaluation. The function composes with the transforms of :mod:`torch.func` and with ``torch.compile``. Gradients
    pass through it; detach the parameters or call it under ``torch.no_grad()`` if they are not wanted.

    Args:
        loss_fn: Maps parameters by name to the loss. It must not depend on anything that it changes itself: pass
            copies of buffers that it writes, such as running statistics.
        params: The parameters θ by name.
        direction: The direction ω by name, with the parameters' shapes. Parameters that it lacks are not moved.
        learning_rates: The learning rates α, of any shape.
        chunk_size: Number of learning rates evaluated at once by ``vmap``, which needs memory for as many copies of
            the moved parameters and of the activations. None: all of them. 1: one after the other without ``vmap``,
            for functions that it does not support. (Under ``vmap``, as in every transform, torch draws the dropout
            masks of non-contiguous tensors in another order.)

    Returns:
        The losses, with the shape of ``learning_rates``.

    Raises:
        ValueError: If ``direction`` does not fit ``params``, or ``chunk_size`` is not positive.
        TypeError: If ``loss_fn`` does not return a floating-point tensor with one element.
        RuntimeError: If ``vmap`` does not support ``loss_fn``.

    Example:
        >>> params, direction = {"x": torch.tensor(3.0)}, {"x": torch.tensor(1.0)}
        >>> loss_along(lambda p: p["x"] ** 2, params, direction, [0.0, 1.0, 2.0])
        tensor([9., 4., 1.])
    """
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be None or at least 1, got {chunk_size}")
    _check_direction(params, direction)
    some = next(iter(params.values()))
    if isinstance(learning_rates, Tensor):
        rates = learning_rates.to(some.device)
    else:
        rates = torch.as_tensor(learning_rates, dtype=summing_dtype(some.device), device=some.device)

    def at(rate: Tensor) -> Tensor:
        moved = dict(params)
        for name, tensor in direction.items():
            moved[name] = _move(params[name], tensor, rate)
        return _check_loss(loss_fn(moved))

    flat = rates.reshape(-1)
    if flat.shape[0] == 0:
        return some.new_empty(rates.shape)
    losses = []
    chunks = torch.split(flat, flat.shape[0] if chunk_size is None else chunk_size)
    one_by_one = chunk_size == 1 or flat.shape[0] == 1
    streams = RandomStreams(random_devices(params.values())) if len(chunks) > 1 else None
    for chunk in chunks:
        if streams is not None:
            streams.restore()
        losses.append(at(chunk[0]).reshape(1) if one_by_one else _vectorized(at, chunk))
    return torch.cat(losses).reshape(rates.shape)


def derivatives_along(
    loss_fn: LossFunction,
    params: Mapping[str, Tensor],
    direction: Mapping[str, Tensor],
) -> Derivatives:
    """Differentiate the loss along a direction: value, slope −g′(0) = dL(θ)·ω and curvature g″(0) = ωᵀHω.

    The result is the ``jvp`` of the gradient (forward over reverse), one evaluation in about the memory of two
    training steps. If that fails, because an operation has no forward mode, the loss is evaluated again and the slope
    is differentiated in reverse mode (reverse over reverse), which takes more memory.

    The function composes with the transforms of :mod:`torch.func` (per-sample curvature by ``vmap``, derivatives of
    the slope by ``grad``) and with ``torch.compile``. Pass detached parameters unless autograd is to differentiate the
    result again. Derivatives of the curvature, third ones of the loss, are wrong in torch 2.13 through LayerNorm,
    BatchNorm and InstanceNorm, in every mode; write these layers out if you need them.

    Scaled-dot-product attention uses its math kernel, as the fused ones have no second derivative. A detached tensor
    counts as constant. At a kink the derivatives are those of torch's backward pass.

    Args:
        loss_fn: Maps parameters by name to the loss.
        params: The parameters θ by name.
        direction: The direction ω by name, with the parameters' shapes. Parameters that it lacks are not moved.

    Returns:
        Value, slope and curvature, tensors without axes in float32 or float64.

    Raises:
        ValueError: If ``direction`` does not fit ``params``.
        TypeError: If ``loss_fn`` does not return a floating-point tensor with one element.
        NotImplementedError: If an operation has no second derivative in either mode: torch's own error, which names
            the operation.

    Example:
        >>> params, direction = {"x": torch.tensor(3.0)}, {"x": torch.tensor(1.0)}
        >>> derivatives_along(lambda p: p["x"] ** 2, params, direction)
        Derivatives(value=tensor(9.), slope=tensor(6.), curvature=tensor(2.))
    """
    _check_direction(params, direction)
    moving = {name: params[name] for name in direction}
    if not moving:
        value = _check_loss(loss_fn(dict(params)))
        return Derivatives(value, torch.zeros_like(value), torch.zeros_like(value))

    def loss_of(theta: dict[str, Tensor]) -> Tensor:
        return _check_loss(loss_fn({**params, **theta}))

    streams = None
    if not torch.compiler.is_compiling():
        _load_forward_mode()
        streams = RandomStreams(random_devices(params.values()))
    with sdpa_kernel(SDPBackend.MATH), _uncompiled():
        try:
            value, slope, curvature = _forward_over_reverse(loss_of, moving, direction)
        except (NotImplementedError, RuntimeError) as first:  # no forward mode, or an error of the loss itself
            if streams is None:
                raise
            streams.restore()
            try:
                value, slope, curvature = _reverse_over_reverse(loss_of, moving, direction)
            except (NotImplementedError, RuntimeError):
                raise first from None
    return Derivatives(value.to(torch.promote_types(value.dtype, torch.float32)), slope, curvature)


def quadratic_model(
    loss_fn: LossFunction,
    params: Mapping[str, Tensor],
    direction: Mapping[str, Tensor],
) -> Parabola:
    """Return the parabola g(α) ≈ g(0) − slope · α + curvature · α² / 2 that touches the loss along a direction at 0.

    Its ``optimal_lr``, slope / curvature, is the learning rate of the generalized Newton's method (Bu and Xu,
    arXiv:2407.02772, eq. 5), and ``predict`` returns the modelled loss at any learning rate.

    Args:
        loss_fn: Maps parameters by name to the loss.
        params: The parameters θ by name.
        direction: The direction ω by name, with the parameters' shapes.

    Returns:
        The parabola, in Python numbers.

    Raises:
        ValueError, TypeError, NotImplementedError: As :func:`derivatives_along`.

    Example:
        >>> params, direction = {"x": torch.tensor(3.0)}, {"x": torch.tensor(1.0)}
        >>> quadratic_model(lambda p: p["x"] ** 2, params, direction).optimal_lr
        3.0
    """
    with torch.no_grad():
        found = derivatives_along(loss_fn, params, direction)
    return Parabola(*torch.stack([each.to(summing_dtype(each.device)) for each in found]).tolist())


# --- second derivatives ----------------------------------------------------------------------------------------------


def _forward_over_reverse(
    loss_of: LossFunction, params: dict[str, Tensor], direction: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    results = jvp(grad_and_value(loss_of), (params,), (dict(direction),))
    (gradient, value), (product, _) = results[0], results[1]
    return value, _dot(gradient, direction), _dot(product, direction)


def _reverse_over_reverse(
    loss_of: LossFunction, params: dict[str, Tensor], direction: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    def slope_of(theta: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        gradient, value = grad_and_value(loss_of)(theta)
        return _dot(gradient, direction), value

    product, (slope, value) = grad_and_value(slope_of, has_aux=True)(params)
    return value, slope, _dot(product, direction)


@functools.cache
def _load_forward_mode() -> None:
    """Load torch's decompositions for forward mode, which raises a deprecation warning inside torch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        jvp(torch.sin, (torch.zeros(()),), (torch.zeros(()),))


def _uncompiled() -> AbstractContextManager[Any]:
    """Run compiled models inside a loss uncompiled, since transforms cannot differentiate them."""
    return nullcontext() if torch.compiler.is_compiling() else torch.compiler.set_stance("force_eager")


def _dot(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Tensor:
    """Return the inner product, in float32 or float64."""
    products = []
    for name, tensor in b.items():
        dtype = torch.promote_types(tensor.dtype, torch.float32)
        products.append((a[name].to(dtype) * tensor.to(dtype)).sum())
    return torch.stack(products).sum()


# --- arguments -------------------------------------------------------------------------------------------------------


def _check_direction(params: Mapping[str, Tensor], direction: Mapping[str, Tensor]) -> None:
    if not params:
        raise ValueError("params must hold at least one parameter, got none")
    for name, tensor in direction.items():
        if name not in params:
            raise ValueError(f"direction must have the names of parameters, but params has no {name!r}")
        if tensor.shape != params[name].shape:
            raise ValueError(
                f"direction must have the parameters' shapes, but direction[{name!r}] has shape {tuple(tensor.shape)} "
                f"and params[{name!r}] {tuple(params[name].shape)}"
            )


def _check_loss(loss: Tensor) -> Tensor:
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss_fn must return a tensor, got {type(loss).__name__}")
    if loss.numel() != 1 or not loss.is_floating_point():
        raise TypeError(
            f"loss_fn must return a floating-point tensor with one element, got shape {tuple(loss.shape)} and dtype "
            f"{loss.dtype}. Reduce it, for example with .mean()"
        )
    return loss.reshape(())


def _move(parameter: Tensor, direction: Tensor, rate: Tensor) -> Tensor:
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    return (parameter.to(dtype) - rate.to(dtype) * direction.to(dtype)).to(parameter.dtype)


def _vectorized(at: Callable[[Tensor], Tensor], rates: Tensor) -> Tensor:
    try:
        with sdpa_kernel(SDPBackend.MATH), _uncompiled():  # vmap does not support the fused kernels
            return vmap(at, randomness="same")(rates)
    except RuntimeError as error:
        raise RuntimeError(
            f"loss_fn could not be evaluated at several learning rates at once: {error}\nIf it can be at one, "
            "pass chunk_size=1 to evaluate them one after the other."
        ) from error
