"""Plain tensors, which every function must let through; DTensors need ranks and are tested in test_distributed."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from gen_optim.tensors.dtensor import dot, is_dtensor, local, parts_of, placed_like, step_norms, whole

PLAIN = [torch.ones(2), nn.Parameter(torch.ones(2)), nn.Buffer(torch.ones(2))]


@pytest.mark.parametrize("tensor", PLAIN, ids=lambda each: type(each).__name__)
def test_plain_tensors_pass_unchanged(tensor: torch.Tensor) -> None:
    assert not is_dtensor(tensor)
    assert local(tensor) is tensor
    assert whole(tensor) is tensor
    assert placed_like(tensor, tensor) is tensor
    assert parts_of(tensor) == 1


def test_numbers_are_whole() -> None:
    assert whole(0.5) == 0.5


def test_inner_product_of_plain_tensors() -> None:
    left = [torch.tensor([1.0, 2.0]), None, torch.tensor([1.0j])]
    right = [torch.tensor([3.0, 4.0]), torch.ones(3), torch.tensor([2.0j])]
    assert dot(left, right) == 13.0
    assert dot(left, right).dtype is torch.float64
    assert dot([], []) == 0.0


def test_inner_product_in_half_precision_is_summed_in_single() -> None:
    ones = torch.full((4096,), 16.0, dtype=torch.float16)
    assert dot([ones], [ones]) == 16.0**2 * 4096


def test_norms_of_a_step_of_plain_tensors() -> None:
    starts, ends = [torch.tensor([3.0, 4.0]), torch.tensor(0.0)], [torch.tensor([3.0, 5.0]), torch.tensor(2.0)]
    assert step_norms(ends, starts, ends) == (5.0, 25.0, 3.0)
    assert step_norms([], [], []) == (0.0, 0.0, 0.0)


def test_lists_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="longer"):
        dot([torch.ones(1)], [torch.ones(1), torch.ones(1)])


def test_asking_does_not_import_dtensors() -> None:
    code = (
        "import sys, torch; from gen_optim.tensors.dtensor import is_dtensor; assert not is_dtensor(torch.ones(1)); "
        "sys.exit('torch.distributed.tensor' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
