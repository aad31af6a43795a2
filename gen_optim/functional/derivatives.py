"""The loss along a direction: its value at any learning rate, its slope and curvature.

Functions of ``dict[str, Tensor]``, to be used with :func:`torch.func.functional_call`. Everything speaks of

    g(α) = L(θ − αω),    slope = −g′(0) = dL(θ)·ω,    curvature = g″(0) = d²L(θ)(ω, ω) = ωᵀHω

with the learning rate α and the direction ω, the update per unit of learning rate (Bu and Xu, "Gradient descent with
generalized Newton's method", ICLR 2025, arXiv:2407.02772, section 2).
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import grad_and_value, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from gen_optim.rules.parabola import Parabola
from gen_optim.tensors.foreach import summing_dtype
from gen_optim.tensors.rng import RandomStreams, random_devices

__all__ = ["Derivatives", "LossFunction", "derivatives_along", "loss_along", "quadratic_model"]

LossFunction = Callable[[dict[str, Tensor]], Tensor]
"""Maps parameters by name to the loss, a floating-point tensor of one element."""

_NO_FORWARD = re.compile(r"forward AD|derivative for|ZeroTensors are immutable")
"""What torch says where forward mode fails; the last, wrongly, of ``mse_loss`` to targets that are constant."""

_MISSING = re.compile(r"(?:forward AD with |derivative for '?)(?:aten::)?([\w.]+)'?")
"""What torch says where an operation has no derivative."""


class Derivatives(NamedTuple):
    """The loss at a point and its first two derivatives along a direction, as tensors without axes.

    Attributes:
        value: g(0) = L(θ).
        slope: −g′(0), in units of the loss per unit of learning rate; positive where the direction descends.
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
    """The loss along a direction, g(α) = L(θ − αω), without a graph.

    All evaluations see the same random numbers, dropout masks among them, and the random streams end where one
    evaluation would leave them. It composes with the transforms of :mod:`torch.func` and with ``torch.compile``;
    inside a transform, gradients pass through it.

    Args:
        loss_fn: Maps parameters by name to the loss. It must not depend on anything that it changes itself: give
            buffers that it writes, such as running statistics, as copies.
        params: The parameters θ by name.
        direction: The direction ω by name, each entry shaped as its parameter; parameters it lacks stay where they are.
        learning_rates: Where to evaluate; any shape.
        chunk_size: How many learning rates are evaluated at once, by ``vmap``, which takes memory for as many copies
            of the parameters that move, and of activations. None: all of them. 1: one after the other, without
            ``vmap``, for functions that it refuses. (Under ``vmap``, as in every transform, torch draws the dropout
            masks of tensors that are not contiguous in another order than without.)

    Returns:
        The losses, shaped as ``learning_rates``.

    Raises:
        ValueError: If ``direction`` does not fit ``params``, or ``chunk_size`` is not positive.
        TypeError: If ``loss_fn`` does not return a floating-point tensor of one element.
        RuntimeError: If ``vmap`` cannot vectorise ``loss_fn``.

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
    # Inside a transform there may be gradients to pass on; torch.func.grad would take no_grad for a wish to stop them.
    with nullcontext() if torch._C._are_functorch_transforms_active() else torch.no_grad():
        chunks = torch.split(flat, flat.shape[0] if chunk_size is None else chunk_size)
        one_by_one = chunk_size == 1 or flat.shape[0] == 1
        streams = RandomStreams(random_devices(params.values())) if len(chunks) > 1 else None
        for chunk in chunks:
            if streams is not None:
                streams.restore()
            losses.append(at(chunk[0]).reshape(1) if one_by_one else _vectorised(at, chunk))
    return torch.cat(losses).reshape(rates.shape)


def derivatives_along(
    loss_fn: LossFunction,
    params: Mapping[str, Tensor],
    direction: Mapping[str, Tensor],
) -> Derivatives:
    """Value, slope −g′(0) = dL(θ)·ω and curvature g″(0) = ωᵀHω of the loss along a direction.

    It is the ``jvp`` of the gradient (forward over reverse): one pass in about the memory of two training steps. It
    composes with the transforms of :mod:`torch.func` (per-sample curvature by ``vmap``, derivatives
    of the slope by ``grad``) and with ``torch.compile``. Where an operation has no forward mode, the gradient of the
    slope takes its place, in another evaluation. Pass detached parameters unless autograd is to differentiate
    the result once more. (Derivatives of the curvature, third ones of the loss, are wrong in torch 2.13 through
    LayerNorm, BatchNorm and InstanceNorm, in every mode; write these out where that is needed.)

    It uses the math kernel of scaled-dot-product attention: the fused ones have no second derivative. What is
    detached counts as constant. At a kink the result is what backward passes give.

    Args:
        loss_fn: Maps parameters by name to the loss.
        params: The parameters θ by name.
        direction: The direction ω by name, each entry shaped as its parameter; parameters it lacks stay where they are.

    Returns:
        Value, slope and curvature, tensors without axes, in float32 at least.

    Raises:
        ValueError: If ``direction`` does not fit ``params``.
        TypeError: If ``loss_fn`` does not return a floating-point tensor of one element.
        NotImplementedError: If an operation has no second derivative; names it.

    Example:
        >>> params, direction = {"x": torch.tensor(3.0)}, {"x": torch.tensor(1.0)}
        >>> derivatives_along(lambda p: p["x"] ** 2, params, direction)
        Derivatives(value=tensor(9.), slope=tensor(6.), curvature=tensor(2.))
    """
    _check_direction(params, direction)
    return _forward_over_reverse(loss_fn, params, direction)


def quadratic_model(
    loss_fn: LossFunction,
    params: Mapping[str, Tensor],
    direction: Mapping[str, Tensor],
) -> Parabola:
    """The parabola g(α) ≈ g(0) − slope · α + curvature · α² / 2 that touches the loss along a direction at 0.

    Its ``optimal_lr``, slope / curvature, is the learning rate of the generalized Newton's method (Bu and Xu,
    arXiv:2407.02772, eq. 5), and ``predict`` gives the modelled loss at any other.

    Args:
        loss_fn: As in :func:`derivatives_along`, the errors too.
        params: The parameters θ by name.
        direction: The direction ω by name.

    Returns:
        The parabola, in plain numbers.

    Example:
        >>> params, direction = {"x": torch.tensor(3.0)}, {"x": torch.tensor(1.0)}
        >>> quadratic_model(lambda p: p["x"] ** 2, params, direction).optimal_lr
        3.0
    """
    with torch.no_grad():
        found = derivatives_along(loss_fn, params, direction)
    return Parabola(*torch.stack([each.to(summing_dtype(each.device)) for each in found]).tolist())


# --- methods ---------------------------------------------------------------------------------------------------------


def _forward_over_reverse(
    loss_fn: LossFunction, params: Mapping[str, Tensor], direction: Mapping[str, Tensor]
) -> Derivatives:
    still = {name: tensor for name, tensor in params.items() if name not in direction}
    moving = {name: params[name] for name in direction}

    def gradient_of(theta: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        return grad_and_value(lambda each: _check_loss(loss_fn({**still, **each})))(theta)

    def slope_of(theta: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        gradient, value = gradient_of(theta)
        return _dot(gradient, direction), value

    if not torch.compiler.is_compiling():
        _load_forward_mode()
    if not moving:
        value = _check_loss(loss_fn(still))
        return Derivatives(value, torch.zeros_like(value), torch.zeros_like(value))
    streams = None if torch.compiler.is_compiling() else RandomStreams(random_devices(params.values()))
    with sdpa_kernel(SDPBackend.MATH), _uncompiled():
        try:
            results = jvp(gradient_of, (moving,), (dict(direction),))
            (gradient, value), (product, _) = results[0], results[1]
            slope = _dot(gradient, direction)
        except (NotImplementedError, RuntimeError) as error:
            if streams is None or not _NO_FORWARD.search(str(error)):
                raise
            streams.restore()
            try:  # the gradient of the slope, which takes more memory and no forward mode
                product, (slope, value) = grad_and_value(slope_of, has_aux=True)(moving)
            except (NotImplementedError, RuntimeError) as second:
                missing = _MISSING.search(str(second)) or _MISSING.search(str(error))
                if missing is None:
                    raise
                raise NotImplementedError(
                    f"{missing[1]} has no second derivative in torch {torch.__version__}. Take the slope and curvature "
                    "from probes (the approximate mode), or write the operation in others that have one."
                ) from second
    value = value.to(torch.promote_types(value.dtype, torch.float32))
    return Derivatives(value, slope, _dot(product, direction))


@functools.cache
def _load_forward_mode() -> None:
    """Have torch load what it needs for ``jvp``, which it does with a deprecation warning about itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        jvp(torch.sin, (torch.zeros(()),), (torch.zeros(()),))


def _uncompiled() -> AbstractContextManager[Any]:
    """Leaves compiled models inside a loss uncompiled, which transforms cannot see through."""
    return nullcontext() if torch.compiler.is_compiling() else torch.compiler.set_stance("force_eager")


def _dot(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Tensor:
    """The sum of products, in float32 at least."""
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
            raise ValueError(f"direction must move parameters only, but params has no {name!r}")
        if tensor.shape != params[name].shape:
            raise ValueError(
                f"direction must be shaped as the parameters, but direction[{name!r}] has shape {tuple(tensor.shape)} "
                f"and params[{name!r}] {tuple(params[name].shape)}"
            )


def _check_loss(loss: Tensor) -> Tensor:
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss_fn must return a tensor, got {type(loss).__name__}")
    if loss.numel() != 1 or not loss.is_floating_point():
        raise TypeError(
            f"loss_fn must return a floating-point tensor of one element, got shape {tuple(loss.shape)} and dtype "
            f"{loss.dtype}. Reduce it, for example with .mean()"
        )
    return loss.reshape(())


def _move(parameter: Tensor, direction: Tensor, rate: Tensor) -> Tensor:
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    return (parameter.to(dtype) - rate.to(dtype) * direction.to(dtype)).to(parameter.dtype)


def _vectorised(at: Callable[[Tensor], Tensor], rates: Tensor) -> Tensor:
    try:
        with sdpa_kernel(SDPBackend.MATH), _uncompiled():  # the fused kernels have no rule for vmap
            return vmap(at, randomness="same")(rates)
    except RuntimeError as error:
        raise RuntimeError(
            f"loss_fn cannot be evaluated at several learning rates at once: {error}\nPass chunk_size=1 to evaluate "
            "them one after the other."
        ) from error
