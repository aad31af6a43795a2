"""The loss that a closure returns: which values are accepted, and how exact they are."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from gen_optim.tensors.dtensor import whole
from gen_optim.tensors.scalars import Scalar

Loss = Scalar
"""What a closure returns: a number or a one-element tensor."""
Closure = Callable[[], Any]
"""A closure, whose return value is checked by :func:`check_loss`."""

DIFFERENT = 1e-4
"""Relative difference from which on two losses at the same point differ by more than their rounding. Kernels that add
numbers in any order stay below it in float32; another batch does not."""


def check_callable(name: str, value: Closure | None) -> Closure | None:
    """Return the argument ``name`` if it can be called or is None; raise a TypeError if not."""
    if value is not None and not callable(value):
        raise TypeError(f"{name} must be a callable that returns the loss, or None, got {type(value).__name__}")
    return value


def check_given_loss(loss: Any) -> Loss:
    """Return the argument ``loss`` if it is a real number or a one-element floating-point tensor, else raise."""
    return _checked(loss, "loss must be a float or a one-element tensor, but got", "Give the loss itself")


def check_loss(loss: Any, caller: str) -> Loss:
    """Return ``loss``, the return value of ``caller``, if it is one; as :func:`check_given_loss`."""
    expected = f"{caller} must return the loss as a float or a one-element tensor, but returned"
    advice = (
        "End it with `return loss`. If a framework has passed this closure, as Lightning does in manual optimization "
        "for a step() without one, give step() a closure or a probe, or use the framework's integration"
    )
    return _checked(loss, expected, advice if loss is None else "Return the loss alone, as a tensor")


def _checked(loss: Any, expected: str, advice: str) -> Loss:
    if isinstance(loss, Tensor):
        if loss.numel() == 1 and loss.is_floating_point():
            return loss
        came = f"a tensor of shape {tuple(loss.shape)} and dtype {loss.dtype}"
        advice = "Reduce it, for example with .mean()" if loss.numel() != 1 else "Make it a floating-point loss"
    elif not isinstance(loss, bool) and isinstance(loss, Real):
        return float(loss)
    else:
        came = "None" if loss is None else f"an object of type {type(loss).__name__}"
    raise TypeError(f"{expected} {came}. {advice}.")


def copied(loss: Loss) -> Loss:
    """Return a loss without its graph, and with memory of its own: closures may write each loss to the same tensor."""
    return whole(loss.detach()).clone() if isinstance(loss, Tensor) else loss


def agree(one: float, other: float, rounding: float) -> bool:
    """Return whether two losses, each with this relative error, may be the same one."""
    return abs(one - other) <= 2.0 * rounding * max(abs(one), abs(other))


def rounding_of(losses: Iterable[Loss], computed_in: Collection[torch.dtype] = ()) -> float:
    """Return the unit of rounding of the coarsest dtype in which losses were returned, or computed (under autocast).

    For a dtype of at least 32 bits it is the machine epsilon. For a smaller one it is a sixteenth of that: sums of
    half-precision numbers are accumulated in float32, so that the loss is rounded once, at the end, and the errors of
    many activations largely cancel (measured: a quarter of an epsilon and less in the median). Plain numbers count as
    torch's default dtype.
    """
    dtypes = {loss.dtype if isinstance(loss, Tensor) else torch.get_default_dtype() for loss in losses}
    infos = map(torch.finfo, dtypes.union(computed_in))
    return max(info.eps / 16.0 if info.bits < 32 else info.eps for info in infos)
