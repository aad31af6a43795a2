import random

import pytest
import torch
from torch import Tensor, nn

from gen_optim.measurement.interpolation import Interpolation

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64]
MULTIPLES = [-1.0, 1e-3, 0.3, 0.5, 0.75, 1.5, 40.0]


def random_tensor(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def moved(dtype: torch.dtype = torch.float32, groups: int = 1) -> tuple[list[list[Tensor]], Interpolation]:
    """Groups of two parameters each, that have gone from their first to their second values, and the move."""
    parameters: list[list[Tensor]] = [
        [
            nn.Parameter(random_tensor(5, 3, seed=group, dtype=dtype)),
            nn.Parameter(random_tensor(4, seed=9, dtype=dtype)),
        ]
        for group in range(groups)
    ]
    move = Interpolation(parameters)
    with torch.no_grad():
        for group in parameters:
            for parameter in group:
                parameter.sub_(0.1 * random_tensor(*parameter.shape, seed=7, dtype=dtype))
    move.arrive()
    return parameters, move


def copies(groups: list[list[Tensor]]) -> list[Tensor]:
    return [parameter.detach().clone() for group in groups for parameter in group]


def assert_equal(groups: list[list[Tensor]], expected: list[Tensor]) -> None:
    for parameter, other in zip((each for group in groups for each in group), expected, strict=True):
        assert torch.equal(parameter, other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("multiple", MULTIPLES)
def test_written_point_is_the_lerp_bit_for_bit(dtype: torch.dtype, multiple: float) -> None:
    parameters, move = moved(dtype)
    after = copies(parameters)
    move.write(0.0)
    before = copies(parameters)
    move.write(multiple)
    assert_equal(parameters, [torch.lerp(start, end, multiple) for start, end in zip(before, after, strict=True)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_multiples_0_and_1_are_both_ends_bit_for_bit(dtype: torch.dtype) -> None:
    weight = nn.Parameter(random_tensor(64, seed=0, dtype=dtype))
    before, after = weight.detach().clone(), random_tensor(64, seed=1, dtype=dtype) * 1e3
    move = Interpolation([[weight]])
    weight.data.copy_(after)
    move.arrive()
    for multiple, end in [(-1.0, None), (0.0, before), (1.0, after), (0.3, None), (1.0, after), (0.0, before)]:
        move.write(multiple)
        assert end is None or torch.equal(weight, end)


@pytest.mark.parametrize("end", [float("nan"), float("inf")])
def test_multiple_0_forgets_a_step_that_is_not_finite(end: float) -> None:
    weight = torch.tensor([1.0, 2.0])
    move = Interpolation([[weight]])
    weight.fill_(end)
    move.arrive()
    move.write(0.5)
    move.write(0.0)
    assert torch.equal(weight, torch.tensor([1.0, 2.0]))


def test_ends_too_far_apart_to_subtract_are_both_exact() -> None:
    weight = torch.tensor([-3e38, 3e38])
    move = Interpolation([[weight]])
    weight.neg_()
    move.arrive()
    move.write(0.0)
    assert torch.equal(weight, torch.tensor([-3e38, 3e38]))
    move.write(1.0)
    assert torch.equal(weight, torch.tensor([3e38, -3e38]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_any_number_of_writes_leaves_no_drift(dtype: torch.dtype) -> None:
    parameters, move = moved(dtype)
    after = copies(parameters)
    move.write(0.0)
    before = copies(parameters)
    source = random.Random(0)
    for _ in range(1000):
        move.write(source.choice([-1.0, 0.0, 1.0, source.uniform(-100.0, 100.0)]))
    move.write(0.0)
    assert_equal(parameters, before)
    move.write(1.0)
    assert_equal(parameters, after)


def test_a_point_is_the_same_whatever_was_written_before() -> None:
    parameters, move = moved(torch.bfloat16)
    move.write(0.3)
    expected = copies(parameters)
    for multiple in (-1.0, 7.0, 0.0, 1.0, 1e6):
        move.write(multiple)
        move.write(0.3)
        assert_equal(parameters, expected)


def test_non_contiguous_parameters_are_written_in_place() -> None:
    storage = torch.arange(24.0).reshape(4, 6)
    column, transposed = storage[:, 0], storage[:, 2:].t()
    untouched = storage[:, 1].clone()
    move = Interpolation([[column, transposed]])
    before = [column.clone(), transposed.clone()]
    column.sub_(1.0)
    transposed.mul_(0.5)
    move.arrive()
    move.write(0.25)
    assert torch.equal(column, torch.lerp(before[0], before[0] - 1.0, 0.25))
    assert torch.equal(transposed, torch.lerp(before[1], before[1] * 0.5, 0.25))
    assert torch.equal(storage[:, 0], column)
    assert torch.equal(storage[:, 1], untouched)
    move.write(0.0)
    assert torch.equal(storage, torch.arange(24.0).reshape(4, 6))


def test_channels_last_parameters_keep_their_layout() -> None:
    weight = random_tensor(2, 3, 4, 4, seed=0).to(memory_format=torch.channels_last)
    move = Interpolation([[weight]])
    before = weight.clone()
    weight.mul_(0.5)
    move.arrive()
    move.write(0.5)
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(weight, torch.lerp(before, before * 0.5, 0.5))


@pytest.mark.parametrize("shape", [(), (0,), (1,)])
def test_parameters_of_any_size_are_written(shape: tuple[int, ...]) -> None:
    weight = torch.ones(shape)
    move = Interpolation([[weight]])
    weight.zero_()
    move.arrive()
    move.write(0.25)
    assert torch.equal(weight, torch.full(shape, 0.75))


def test_groups_settle_at_a_multiple_each() -> None:
    parameters, move = moved(groups=3)
    after = copies(parameters)
    move.write(0.0)
    before = copies(parameters)
    move.settle([0.0, 1.0, 0.3])
    lerped = [torch.lerp(start, end, 0.3) for start, end in zip(before[4:], after[4:], strict=True)]
    assert_equal(parameters, [*before[:2], *after[2:4], *lerped])


def test_a_multiple_too_few_or_too_many_is_refused() -> None:
    _, move = moved(groups=2)
    for multiples in ([0.5], [0.5, 0.5, 0.5]):
        with pytest.raises(ValueError, match="zip"):
            move.settle(multiples)


@pytest.mark.parametrize("writes", ["_foreach_copy_", "_foreach_lerp_"])
@pytest.mark.parametrize("interrupted_call", range(2))
def test_settling_ends_before_an_interrupt_is_raised(
    monkeypatch: pytest.MonkeyPatch, interrupted_call: int, writes: str
) -> None:
    parameters, move = moved(groups=2)
    move.settle([0.3, 0.6])
    expected = copies(parameters)
    move.write(-1.0)

    calls = 0
    write = getattr(torch, writes)

    def interrupted(*args: object, **kwargs: object) -> None:
        nonlocal calls
        calls += 1
        if calls == interrupted_call + 1:
            raise KeyboardInterrupt
        write(*args, **kwargs)

    monkeypatch.setattr(torch, writes, interrupted)
    with pytest.raises(KeyboardInterrupt):
        move.settle([0.3, 0.6])
    assert_equal(parameters, expected)


def test_arrival_is_written_again_once_the_parameters_have_left_it() -> None:
    parameters, move = moved()
    after = copies(parameters)
    move.write(-1.0)
    for group in parameters:
        for parameter in group:
            parameter.data.zero_()
    move.write(1.0)
    assert_equal(parameters, after)


def test_an_interrupted_write_is_no_longer_where_the_step_has_led(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters, move = moved(groups=2)
    after = copies(parameters)

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(torch, "_foreach_lerp_", interrupted)  # when half of the write is done
        with pytest.raises(KeyboardInterrupt):
            move.write(-1.0)
    move.settle([1.0, 1.0])
    assert_equal(parameters, after)


def test_parameters_stay_the_same_leaves_that_require_grad() -> None:
    weight = nn.Parameter(torch.ones(3))
    address = weight.data_ptr()
    move = Interpolation([[weight]])
    weight.data.mul_(0.5)
    move.arrive()
    for multiple in (-1.0, 0.0, 0.5, 1.0):
        move.write(multiple)
    assert weight.data_ptr() == address
    assert weight.is_leaf
    assert weight.requires_grad
    (2 * weight).sum().backward()  # type: ignore[no-untyped-call]
    assert torch.equal(weight.grad, torch.full((3,), 2.0))  # type: ignore[arg-type]


def test_moving_records_no_graph_and_leaves_gradients_alone() -> None:
    weight = nn.Parameter(torch.ones(3))
    gradient = torch.ones(3)
    weight.grad = gradient
    with torch.enable_grad():
        move = Interpolation([[weight]])
        weight.data.mul_(0.5)
        move.arrive()
        move.write(0.5)
        move.settle([0.25])
        assert torch.is_grad_enabled()
    assert weight.grad is gradient
    assert weight.grad_fn is None


def test_a_graph_made_before_a_write_notices_it() -> None:
    weight = nn.Parameter(torch.ones(3))
    move = Interpolation([[weight]])
    weight.data.mul_(0.5)
    move.arrive()
    loss = (weight**2).sum()
    move.write(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()  # type: ignore[no-untyped-call]


def test_copies_do_not_follow_the_parameters() -> None:
    weight = torch.ones(2)
    move = Interpolation([[weight]])
    weight.fill_(3.0)
    move.arrive()
    weight.fill_(99.0)
    move.write(0.5)
    assert torch.equal(weight, torch.full((2,), 2.0))


def test_nothing_to_move_is_fine() -> None:
    move = Interpolation([[], []])
    move.arrive()
    move.write(0.5)
    move.settle([0.1, 0.2])
