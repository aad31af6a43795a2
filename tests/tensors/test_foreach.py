from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gen_optim.tensors import foreach as module
from gen_optim.tensors.foreach import chunks, copy, has_infinities, inner_product, lerp, squared_norms
from gen_optim.tensors.scalars import summing_dtype

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64]
SHAPES = [(), (0,), (1,), (3, 2), (7,), (5, 4, 3), (40,), (9, 7)]


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SIZE", 16)
    monkeypatch.setattr(module, "_LEAST", 1)
    monkeypatch.setattr(module, "_SHARE", 1)


def tensors(seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(shape, generator=generator, dtype=dtype) for shape in SHAPES]
    # Neither contiguous: one is cut along its first dimension, the other one is small.
    return [*made, torch.randn(8, 9, generator=generator, dtype=dtype).t(), made[3].t()]


def test_every_element_is_in_one_chunk_and_chunks_are_views() -> None:
    several = tensors(0)
    for each in several:
        each.zero_()
    for (batch,) in chunks(several):
        for chunk in batch:
            chunk.add_(1.0)
    several.pop()  # which shares its memory with another one
    assert all(torch.equal(each, torch.full_like(each, 2.0 if each.shape == (3, 2) else 1.0)) for each in several)


def test_batches_are_no_larger_than_a_chunk_and_of_one_dtype() -> None:
    batches = [batch for (batch,) in chunks([*tensors(0), *tensors(0, torch.float64)])]
    assert all(sum(each.numel() for each in batch) <= 16 for batch in batches)
    assert all(len({each.dtype for each in batch}) == 1 for batch in batches)
    assert max(map(len, batches)) > 2


def test_large_tensors_come_alone_where_they_are_not_cut() -> None:
    batches = [batch for (batch,) in chunks(tensors(0), cut=False)]
    assert [each.shape for batch in batches for each in batch] == [each.shape for each in tensors(0)]
    assert all(len(batch) == 1 for batch in batches if any(each.numel() > 16 for each in batch))


def test_chunks_of_several_lists_correspond_whatever_their_strides() -> None:
    left, right = tensors(0), [each.contiguous() for each in tensors(0)]
    for mine, theirs in chunks(left, right):
        assert all(map(torch.equal, mine, theirs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight", [-1.0, 1e-3, 0.3, 0.5, 0.999, 40.0])
def test_lerp_is_that_of_torch_bit_for_bit(dtype: torch.dtype, weight: float) -> None:
    starts, ends, targets = tensors(0, dtype), tensors(1, dtype), tensors(2, dtype)
    targets[-1] = targets[-1].clone()
    lerp(targets, starts, ends, weight)
    assert all(map(torch.equal, targets, (torch.lerp(a, b, weight) for a, b in zip(starts, ends, strict=True))))


def test_copies_are_equal_and_are_none_of_their_sources() -> None:
    sources = tensors(0)
    targets = [torch.empty_like(each) for each in sources]
    copy(targets, sources)
    assert all(map(torch.equal, targets, sources))
    sources[4].add_(1.0)
    assert not torch.equal(targets[4], sources[4])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inner_product_is_that_in_double_precision(dtype: torch.dtype) -> None:
    gradients, ends, starts = tensors(0, dtype), tensors(1, dtype), tensors(2, dtype)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    expected = sum(
        torch.sum(g.to(wide).conj() * (e.to(wide) - s.to(wide))).real
        for g, e, s in zip(gradients, ends, starts, strict=True)
    )
    found = inner_product(gradients, ends, starts)
    assert found.dtype == torch.float64
    assert found.item() == pytest.approx(float(expected), rel=1e-6, abs=1e-5 if dtype != torch.float64 else 1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms_are_those_in_double_precision_of_the_elements_that_are_finite(dtype: torch.dtype) -> None:
    starts, ends = tensors(0, dtype), tensors(1, dtype)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    step = sum((e.to(wide) - s.to(wide)).abs().square().sum() for s, e in zip(starts, ends, strict=True))
    start = sum(s.to(wide).abs().square().sum() for s in starts)
    expected = torch.stack([torch.as_tensor(step), torch.as_tensor(start)])
    found = squared_norms(starts, ends)
    assert found.dtype == torch.float64
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    starts.append(torch.tensor([torch.inf, torch.nan, -torch.inf]))
    ends.append(torch.tensor([torch.inf, 1.0, 2.0]))
    assert torch.equal(squared_norms(starts, ends), found)


def test_inner_product_of_gradients_that_are_conjugated_lazily() -> None:
    gradient, end, start = (torch.randn(5, dtype=torch.complex64) for _ in range(3))
    assert gradient.conj().is_conj()
    expected = torch.sum(gradient * (end - start)).real
    assert inner_product([gradient.conj()], [end], [start]).item() == pytest.approx(expected.item(), rel=1e-5)


def test_sums_are_in_double_precision_where_a_device_has_that() -> None:
    assert summing_dtype(torch.device("cpu")) is torch.float64
    assert summing_dtype(torch.device("cuda", 1)) is torch.float64
    assert summing_dtype(torch.device("mps")) is torch.float32


def test_nothing_has_no_chunks() -> None:
    assert list(chunks([], [])) == []
    assert inner_product([], [], []) == 0.0
    assert squared_norms([], []).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("weight", [-1.0, 1e-3, 0.5, 40.0])
def test_infinities_that_do_not_move_stay_where_they_are(weight: float) -> None:
    starts, ends = tensors(0), tensors(1)
    targets, expected = [each.clone() for each in starts], [each.clone() for each in starts]
    lerp(expected, starts, ends, weight)
    slope = inner_product(tensors(2), ends, starts)
    several = [*starts], [*ends]
    assert not has_infinities(starts)
    for each in several:
        each.append(torch.tensor([-torch.inf, 1.0, torch.inf]))
    assert has_infinities(starts + several[0])
    targets.append(torch.zeros(3))
    lerp(targets, *several, weight, keeps_infinities=True)
    assert torch.equal(targets.pop(), several[0][-1])
    assert all(map(torch.equal, targets, expected))  # the same bits elsewhere
    gradients = [*tensors(2), torch.zeros(3)]
    assert inner_product(gradients, several[1], several[0], keeps_infinities=True) == slope
