from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from gen_optim.closures.losses import check_loss, rounding_of


@pytest.mark.parametrize(
    "loss", [torch.tensor(1.5), torch.tensor([1.5]), torch.tensor([[1.5]]), torch.tensor(1.5, dtype=torch.bfloat16)]
)
def test_one_element_tensor_is_a_loss_as_it_is(loss: Tensor) -> None:
    assert check_loss(loss, "closure") is loss


@pytest.mark.parametrize("loss", [1.5, np.float32(1.5), np.float64(1.5)])
def test_real_number_is_a_loss(loss: float) -> None:
    checked = check_loss(loss, "closure")
    assert type(checked) is float
    assert checked == 1.5


def test_whole_number_is_a_loss() -> None:
    assert check_loss(2, "closure") == 2.0


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, ["closure", "returned None", "return loss"]),
        ("1.0", ["closure", "type str"]),
        ([1.0], ["closure", "type list"]),
        ((torch.tensor(1.0), None), ["closure", "type tuple", "Return the loss alone, as a tensor"]),
        (np.array(1.5), ["closure", "type ndarray", "Return the loss alone, as a tensor"]),
        (1j, ["closure", "type complex"]),
        (torch.ones(3), ["closure", "shape (3,)", "float32", ".mean()"]),
        (torch.ones(0), ["closure", "shape (0,)", ".mean()"]),
        (torch.tensor(1), ["closure", "int64", "floating-point"]),
        (torch.tensor(1j), ["closure", "complex64", "floating-point"]),
    ],
)
def test_what_is_no_loss_is_refused_with_what_came_and_what_to_do(value: object, words: list[str]) -> None:
    with pytest.raises(TypeError) as caught:
        check_loss(value, "closure")
    assert all(word in str(caught.value) for word in words)


def test_refusal_names_the_caller() -> None:
    with pytest.raises(TypeError, match=r"^probe must return the loss"):
        check_loss(None, "probe")


def test_rounding_is_that_of_the_coarsest_loss() -> None:
    def epsilon(dtype: torch.dtype) -> float:
        return torch.finfo(dtype).eps

    double, half = torch.tensor(1.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.bfloat16)
    assert rounding_of([double]) == epsilon(torch.float64)
    assert rounding_of([double, 1.0]) == epsilon(torch.float32)
    assert rounding_of([double, half]) == epsilon(torch.bfloat16) / 16
    assert rounding_of([double], {torch.float16}) == epsilon(torch.float16) / 16
