"""What a closure returns: checked, read as numbers, and how exact it is."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from gen_optim.tensors.foreach import summing_dtype

__all__ = ["Closure", "Loss", "check_callable", "check_loss", "losses_to_floats", "rounding_of"]

Loss = Tensor | float
"""What a closure returns: a number or a one-element tensor."""
Closure = Callable[[], Any]
"""A closure: who wrote it may return anything, and is told so where that is no loss."""


def check_callable(name: str, value: Closure | None) -> Closure | None:
    """Return a closure if it is one, or None.

    Raises:
        TypeError: If it cannot be called; says its ``name``.
    """
    if value is not None and not callable(value):
        raise TypeError(f"{name} must be a callable that returns the loss, or None, got {type(value).__name__}")
    return value


def check_loss(loss: Any, caller: str) -> Loss:
    """Return ``loss`` if it is one.

    Raises:
        TypeError: If it is neither a real number nor a one-element floating-point tensor; names the ``caller``.
    """
    if isinstance(loss, Tensor):
        if loss.numel() == 1 and loss.is_floating_point():
            return loss
        came = f"a tensor of shape {tuple(loss.shape)} and dtype {loss.dtype}"
        advice = "Reduce it, for example with .mean()" if loss.numel() != 1 else "Return a floating-point loss"
    elif not isinstance(loss, bool) and isinstance(loss, Real):
        return float(loss)
    else:
        came = "None" if loss is None else f"an object of type {type(loss).__name__}"
        advice = "End it with `return loss`"
    raise TypeError(f"{caller} must return the loss as a float or a one-element tensor, but returned {came}. {advice}.")


def losses_to_floats(losses: Sequence[Loss]) -> list[float]:
    """Read losses, wherever they are, with one transfer per device at the most."""
    tensors = [loss.detach().reshape(()) for loss in losses if isinstance(loss, Tensor)]
    if not tensors:
        return [float(loss) for loss in losses]
    device = tensors[0].device
    read = iter(torch.stack([tensor.to(device, summing_dtype(device)) for tensor in tensors]).tolist())
    return [next(read) if isinstance(loss, Tensor) else float(loss) for loss in losses]


def rounding_of(losses: Iterable[Loss], computed_in: Collection[torch.dtype] = ()) -> float:
    """The unit of rounding of the coarsest dtype: that of a loss, or one it was computed in.

    It is the machine epsilon, and a sixteenth of it for dtypes below 32 bits: sums of their numbers add up in float32,
    so that a loss is rounded once, at the end, and the errors of many activations largely cancel (by measurement to a
    quarter of an epsilon and less in the median). A plain number is taken to come from torch's default dtype.
    """
    dtypes = {loss.dtype if isinstance(loss, Tensor) else torch.get_default_dtype() for loss in losses}
    infos = map(torch.finfo, dtypes.union(computed_in))
    return max(info.eps / 16.0 if info.bits < 32 else info.eps for info in infos)
