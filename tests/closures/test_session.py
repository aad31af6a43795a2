"""Calling a closure: what it returns, the first call, probes, and what surrounds them."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import backward as imported_backward
from torch.autograd import grad as imported_grad

from gen_optim.closures.losses import check_loss, losses_to_floats, rounding_of
from gen_optim.closures.session import Evaluator
from tests.closures.probes import (
    INPUTS,
    Counting,
    Gradients,
    Reassigning,
    assert_same_buffers,
    buffers_of,
    call_and_probe,
    closure_of,
    draw,
    originals,
    parameters_of,
    stream_states,
)

# --- what a closure returns ------------------------------------------------------------------------------------------


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
        ((torch.tensor(1.0), None), ["closure", "type tuple"]),
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


def test_losses_of_every_kind_are_read_in_order() -> None:
    losses: list[Tensor | float] = [
        1,
        torch.tensor(2.5, requires_grad=True),
        3.5,
        torch.tensor([4.5], dtype=torch.bfloat16),
        torch.tensor([[math.inf]], dtype=torch.float64),
    ]
    assert losses_to_floats(losses) == [1.0, 2.5, 3.5, 4.5, math.inf]


def test_reading_float64_losses_keeps_every_digit() -> None:
    value = 1.0 + 2.0**-50
    assert losses_to_floats([torch.tensor(value, dtype=torch.float64), torch.tensor(1.0)]) == [value, 1.0]


def test_plain_numbers_are_read_without_any_tensor() -> None:
    assert losses_to_floats([1.0, 2]) == [1.0, 2.0]
    assert losses_to_floats([]) == []


def test_rounding_is_that_of_the_coarsest_loss() -> None:
    def epsilon(dtype: torch.dtype) -> float:
        return torch.finfo(dtype).eps

    double, half = torch.tensor(1.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.bfloat16)
    assert rounding_of([double]) == epsilon(torch.float64)
    assert rounding_of([double, 1.0]) == epsilon(torch.float32)
    assert rounding_of([double, half]) == epsilon(torch.bfloat16) / 16
    assert rounding_of([double], {torch.float16}) == epsilon(torch.float16) / 16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("place", ["around", "in the closure", "in the model"])
def test_a_session_notices_in_what_autocast_computes(dtype: torch.dtype, place: str) -> None:
    model = nn.Linear(4, 1)
    if place == "in the model":  # as Accelerate does it
        model.forward = torch.autocast("cpu", dtype)(model.forward)  # type: ignore[method-assign]

    def closure() -> Tensor:
        with torch.autocast("cpu", dtype, enabled=place == "in the closure"):
            return model(torch.ones(2, 4)).float().mean()

    enter = torch.autocast.__enter__
    for has_first_call in (True, False):
        session = Evaluator().session(list(model.parameters()))
        with torch.autocast("cpu", dtype, enabled=place == "around"):
            if has_first_call and place != "around":
                session.first(closure)
            else:
                with session.probing():
                    session.probe(closure if place != "around" else lambda: 1.0, "probe")
        assert session.computed_in == {dtype}
    assert torch.autocast.__enter__ is enter


def test_an_autocast_that_is_off_or_another_threads_is_not_noticed() -> None:
    def autocast(enabled: bool) -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            return 1.0

    session = Evaluator().session([nn.Parameter(torch.ones(1))])
    session.first(lambda: autocast(enabled=False))

    def elsewhere() -> float:
        thread = threading.Thread(target=autocast, args=[True])
        thread.start()
        thread.join()
        return 1.0

    session.first(elsewhere)
    assert session.computed_in == set()
    with torch.autocast("cpu", torch.bfloat16):
        session.first(lambda: 1.0)
    assert session.computed_in == {torch.bfloat16}


# --- the first call --------------------------------------------------------------------------------------------------


def test_first_call_has_gradients_enabled_whatever_the_caller_has() -> None:
    seen = []

    def closure() -> float:
        seen.append(torch.is_grad_enabled())
        return 1.0

    with torch.no_grad():
        Evaluator.call(closure)
        assert not torch.is_grad_enabled()
    assert seen == [True]


def test_call_says_whether_the_closure_ran_backward() -> None:
    weight = torch.ones(2, requires_grad=True)

    def with_method() -> Tensor:
        loss = weight.sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    def with_function() -> Tensor:
        loss = weight.sum()
        torch.autograd.backward(loss)
        return loss

    assert Evaluator.call(with_method)[1]
    assert Evaluator.call(with_function)[1]
    assert torch.equal(weight.grad, torch.full((2,), 2.0))  # type: ignore[arg-type]
    assert not Evaluator.call(weight.sum)[1]


def test_backward_outside_of_a_call_is_not_taken_for_the_closure() -> None:
    Evaluator.call(closure_of(nn.Linear(3, 1)))
    weight = torch.ones(2, requires_grad=True)
    weight.sum().backward()  # type: ignore[no-untyped-call]
    assert not Evaluator.call(lambda: 1.0)[1]


def test_call_refuses_what_is_no_loss() -> None:
    with pytest.raises(TypeError, match="closure must return the loss"):
        Evaluator.call(lambda: None)


def test_probe_refuses_what_is_no_loss_and_names_the_caller() -> None:
    evaluator = Evaluator()
    with (
        nullcontext(evaluator.session([])) as session,
        session.probing(),
        pytest.raises(TypeError, match=r"^probe must return"),
    ):
        session.probe(lambda: None, "probe")


def test_probed_loss_has_no_graph() -> None:
    evaluator = Evaluator()
    weight = torch.ones(2, requires_grad=True)

    def penalised() -> Tensor:
        [gradient] = torch.autograd.grad(weight.pow(2).sum(), weight, create_graph=True)
        return gradient.pow(2).sum()

    for closure in (weight.sum, penalised):
        with nullcontext(evaluator.session([weight])) as session, session.probing():
            loss = session.probe(closure, "closure")
        assert isinstance(loss, Tensor)
        assert not loss.requires_grad


# --- losses that differentiate inside --------------------------------------------------------------------------------


def inner_derivative(gradient: Callable[..., Any], backward: Callable[..., Any]) -> Callable[[nn.Module], Any]:
    def closure_of_model(model: nn.Module) -> Callable[[], Tensor]:
        inputs = INPUTS.clone().requires_grad_()

        def closure() -> Tensor:
            model.zero_grad()
            [derivative] = gradient(model(inputs).sum(), inputs, create_graph=True)
            loss: Tensor = derivative.pow(2).mean() + model(inputs).mean()
            backward(loss)
            return loss

        return closure

    return closure_of_model


@pytest.mark.parametrize(
    "closure_of_model",
    [
        pytest.param(inner_derivative(torch.autograd.grad, Tensor.backward), id="method"),
        pytest.param(inner_derivative(imported_grad, Tensor.backward), id="imported grad"),
        pytest.param(inner_derivative(imported_grad, imported_backward), id="imported grad and backward"),
        pytest.param(
            inner_derivative(imported_grad, lambda loss: torch.autograd.backward([loss])), id="functional backward"
        ),
    ],
)
@pytest.mark.parametrize("outer", [torch.enable_grad, torch.no_grad])
def test_loss_that_differentiates_inside_is_probed(
    closure_of_model: Callable[[nn.Module], Callable[[], Tensor]], outer: Callable[[], Any]
) -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 1))
    gradients = Gradients(parameters_of(model))
    evaluator = Evaluator()
    with outer():
        for _ in range(2):
            losses = call_and_probe(
                closure_of_model(model), gradients.tensors, evaluator=evaluator, after_first=gradients.remember
            )
            assert len(set(losses)) == 1
            gradients.assert_unchanged()


def test_imported_backward_finds_gradients_absent_in_every_probe() -> None:
    evaluator = Evaluator()
    model = nn.Linear(3, 1)
    seen: list[Tensor | None] = []

    def closure() -> Tensor:
        if evaluator.is_probing:
            seen.extend(parameter.grad for parameter in model.parameters())
        loss: Tensor = model(INPUTS).pow(2).mean()
        imported_backward(loss)
        return loss

    gradients = Gradients(parameters_of(model))
    call_and_probe(closure, gradients.tensors, evaluator=evaluator, after_first=gradients.remember, probes=3)
    assert all(gradient is None for gradient in seen)
    gradients.assert_unchanged()


@pytest.mark.parametrize(
    "watch",
    [
        pytest.param(lambda hidden: hidden.register_hook(lambda gradient: gradient.clamp(-1.0, 1.0)), id="hook"),
        pytest.param(lambda hidden: hidden.retain_grad(), id="retained gradient"),
    ],
)
def test_loss_that_hooks_an_activation_is_probed(watch: Callable[[Tensor], object]) -> None:
    model = nn.Linear(3, 1)

    def closure() -> Tensor:
        model.zero_grad()
        hidden = model(INPUTS)
        watch(hidden)
        loss: Tensor = hidden.pow(2).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    gradients = Gradients(parameters_of(model))
    losses = call_and_probe(closure, gradients.tensors, after_first=gradients.remember)
    assert len(set(losses)) == 1
    gradients.assert_unchanged()


def test_loss_that_differentiates_inside_is_called_twice_in_its_first_probe_only() -> None:
    model, calls = nn.Linear(3, 1), 0
    closure = inner_derivative(torch.autograd.grad, Tensor.backward)(model)

    def counted() -> Any:
        nonlocal calls
        calls += 1
        return closure()

    evaluator = Evaluator()
    call_and_probe(counted, parameters_of(model), evaluator=evaluator)
    assert calls == 4
    call_and_probe(counted, parameters_of(model), evaluator=evaluator)
    assert calls == 7


def test_errors_of_the_closure_are_raised_as_they_are() -> None:
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
        return torch.tensor(1.0)

    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        call_and_probe(closure, [])
    assert calls == 2


# --- the surroundings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outer", [torch.enable_grad, torch.no_grad])
def test_probes_run_without_a_graph_and_leave_grad_mode_alone(outer: Callable[[], Any]) -> None:
    modes = []

    def closure() -> float:
        modes.append(torch.is_grad_enabled())
        return 1.0

    with outer():
        before = torch.is_grad_enabled()
        call_and_probe(closure, [])
        assert torch.is_grad_enabled() == before
    assert modes == [True, False, False]


def test_probes_inside_an_outer_autocast_see_the_moved_weights() -> None:
    model = nn.Linear(3, 1)

    @torch.no_grad()
    def double() -> None:
        for parameter in model.parameters():
            parameter.mul_(2.0)

    with torch.autocast("cpu", torch.bfloat16):
        first, second, third = call_and_probe(closure_of(model), parameters_of(model), before_probe=double)
    assert second == pytest.approx(4 * first, rel=0.05)
    assert third == pytest.approx(16 * first, rel=0.05)


def test_what_follows_the_probes_inside_an_outer_autocast_sees_the_present_weights() -> None:
    model = nn.Linear(3, 1)
    before = model.weight.detach().clone()

    @torch.no_grad()
    def move() -> None:
        model.weight.add_(10.0)

    with torch.autocast("cpu", torch.bfloat16):
        evaluator = Evaluator()
        with nullcontext(evaluator.session(parameters_of(model))) as session:
            first = session.first(lambda: evaluator.call(closure_of(model))[0])
            with session.probing():
                move()
                session.probe(closure_of(model), "closure")
            with torch.no_grad():
                model.weight.copy_(before)
        assert closure_of(model)().item() == first.item()  # type: ignore[union-attr]


@pytest.mark.parametrize("enabled", [True, False])
def test_attention_takes_no_other_kernel_in_probes(enabled: bool) -> None:
    torch.backends.mha.set_fastpath_enabled(enabled)
    try:
        flags = []
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
        inputs = torch.randn(2, 5, 8)

        def closure() -> Tensor:
            flags.append(torch.backends.mha.get_fastpath_enabled())
            return closure_of(layer, inputs)()

        losses = call_and_probe(closure, parameters_of(layer))
        assert len(set(losses)) == 1
        assert flags == [enabled, False, False]
        assert torch.backends.mha.get_fastpath_enabled() == enabled
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_is_probing_while_a_probe_runs_and_only_then() -> None:
    evaluator = Evaluator()
    seen = []

    def closure() -> float:
        seen.append(evaluator.is_probing)
        return 1.0

    assert not evaluator.is_probing
    call_and_probe(closure, [], evaluator=evaluator)
    assert seen == [False, True, True]
    assert not evaluator.is_probing


def test_what_is_patched_is_as_before_afterwards() -> None:
    before = originals()
    model = nn.Linear(3, 1)
    call_and_probe(closure_of(model), parameters_of(model))
    assert originals() == before


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("failing_call", [1, 2, 3])
@pytest.mark.parametrize("outer", [torch.enable_grad, torch.no_grad])
def test_everything_is_put_back_when_a_call_raises(
    error: type[BaseException], failing_call: int, outer: Callable[[], Any]
) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), Reassigning(), nn.Dropout(0.5), nn.Linear(4, 1))
    critic = nn.Linear(1, 1)
    tensors = parameters_of(model, critic)
    gradients = Gradients(tensors)
    streams: list[Any] = []
    buffers: dict[str, Tensor] = {}
    evaluator = Evaluator()
    calls = 0

    def remember() -> None:
        gradients.remember()
        streams[:] = stream_states()
        buffers.update(buffers_of(model))

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        draw()
        if calls > 1:
            critic.zero_grad()
        loss: Tensor = critic(model(INPUTS)).pow(2).mean()
        if calls == failing_call:
            raise error("stop")
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    before = originals()
    remember()
    with outer():
        grad_mode = torch.is_grad_enabled()
        with pytest.raises(error, match="stop"):
            call_and_probe(closure, parameters_of(model), evaluator=evaluator, after_first=remember)
        assert torch.is_grad_enabled() == grad_mode
    assert calls == failing_call
    gradients.assert_unchanged()
    if failing_call > 1:  # what a first call that fails has drawn and written is drawn and written, as without GeN
        assert stream_states() == streams
        assert_same_buffers(model, buffers)
    assert originals() == before
    assert torch.backends.mha.get_fastpath_enabled()
    assert not evaluator.is_probing

    weight = torch.ones((), requires_grad=True)
    (2 * weight).backward()  # type: ignore[no-untyped-call]
    assert weight.grad == 2.0


def test_steps_after_a_failed_one_probe_as_usual() -> None:
    evaluator, model = Evaluator(), nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5))

    def failing() -> Tensor:
        if evaluator.is_probing:
            raise ValueError("stop")
        return closure_of(model)()

    with pytest.raises(ValueError, match="stop"):
        call_and_probe(failing, parameters_of(model), evaluator=evaluator)
    assert len(set(call_and_probe(closure_of(model), parameters_of(model), evaluator=evaluator))) == 1


# --- calls with a graph ----------------------------------------------------------------------------------------------


def differentiate(closure: Callable[[], Any], parameters: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The gradients of a closure: of the first call, and of one more with a graph."""
    evaluator = Evaluator()
    with nullcontext(evaluator.session(parameters)) as session:
        loss = session.first(lambda: evaluator.call(closure)[0])
        expected = parameters[0].grad
        if expected is None:
            [expected] = torch.autograd.grad(loss, parameters[:1])  # type: ignore[arg-type]
        expected = expected.clone()
        with session.probing():
            [gradient] = torch.autograd.grad(session.differentiable(closure, "closure"), parameters[:1])
    return expected, gradient


def test_call_with_a_graph_sees_what_the_first_call_saw() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), Counting(), nn.Linear(8, 1))
    twin_buffers: dict[str, Tensor] = {}

    def closure() -> Tensor:
        loss = closure_of(model)()
        twin_buffers.update(twin_buffers or buffers_of(model))
        return loss

    expected, gradient = differentiate(closure, parameters_of(model))
    assert torch.equal(gradient, expected)
    assert_same_buffers(model, twin_buffers)


def test_graph_is_that_of_the_backward_calls_where_the_loss_has_none() -> None:
    model = nn.Linear(3, 1)

    def closure() -> Any:
        model.zero_grad()
        halves = [model(half).pow(2).sum() / len(INPUTS) for half in INPUTS.chunk(2)]
        halves[0].backward()
        torch.autograd.backward(halves[1:])
        return sum(half.item() for half in halves)

    expected, gradient = differentiate(closure, parameters_of(model))
    assert torch.allclose(gradient, expected)


def test_graph_of_weighted_backward_calls_is_weighted() -> None:
    model = nn.Linear(3, 1)

    def closure() -> Any:
        model.zero_grad()
        outputs = model(INPUTS).squeeze(1)
        outputs.backward(torch.arange(8.0))
        return outputs.sum().item()

    expected, gradient = differentiate(closure, parameters_of(model))
    assert torch.allclose(gradient, expected)


def test_loss_without_any_graph_is_refused_with_what_to_do() -> None:
    evaluator = Evaluator()
    with (
        nullcontext(evaluator.session([])) as session,
        session.probing(),
        pytest.raises(TypeError, match=r"probe must return a loss that has a graph.*mode='approximate'"),
    ):
        session.differentiable(lambda: 1.0, "probe")
