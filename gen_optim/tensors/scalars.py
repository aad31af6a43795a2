"""Numbers that may be tensors: reading them, and the dtype in which they are summed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Scalar = Tensor | float
"""A number or a one-element tensor."""


def summing_dtype(device: torch.device) -> torch.dtype:
    """Return float64, or float32 on a device that has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def to_floats(numbers: Sequence[Scalar]) -> list[float]:
    """Read numbers from whatever devices they are on, with at most one transfer per device."""
    tensors = [number.detach().reshape(()) for number in numbers if isinstance(number, Tensor)]
    if not tensors:
        return [float(number) for number in numbers]
    device = tensors[0].device
    read = iter(torch.stack([tensor.to(device, summing_dtype(device)) for tensor in tensors]).tolist())
    return [next(read) if isinstance(number, Tensor) else float(number) for number in numbers]
