from __future__ import annotations

import math

import torch
from torch import Tensor

from gen_optim.tensors.scalars import to_floats


def test_numbers_of_every_kind_are_read_in_order() -> None:
    losses: list[Tensor | float] = [
        1,
        torch.tensor(2.5, requires_grad=True),
        3.5,
        torch.tensor([4.5], dtype=torch.bfloat16),
        torch.tensor([[math.inf]], dtype=torch.float64),
    ]
    assert to_floats(losses) == [1.0, 2.5, 3.5, 4.5, math.inf]


def test_reading_float64_numbers_keeps_every_digit() -> None:
    value = 1.0 + 2.0**-50
    assert to_floats([torch.tensor(value, dtype=torch.float64), torch.tensor(1.0)]) == [value, 1.0]


def test_plain_numbers_are_read_without_any_tensor() -> None:
    assert to_floats([1.0, 2]) == [1.0, 2.0]
    assert to_floats([]) == []
