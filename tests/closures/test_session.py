"""Calling a closure: the first call, probes, and what surrounds them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import backward as imported_backward
from torch.autograd import grad as imported_grad

from gen_optim.closures.session import ClosureCaller, Session
from gen_optim.distributed import Ranks
from tests.closures.probes import (
    INPUTS,
    Counting,
    Gradients,
    Reassigning,
    assert_same_buffers,
    buffers_of,
    call,
    call_and_probe,
    closure_of,
    draw,
    originals,
    parameters_of,
    session_of,
    stream_states,
)


def used() -> nn.Parameter:
    """A parameter whose gradient the caller has computed, for closures that return plain numbers."""
    parameter = nn.Parameter(torch.ones(()))
    parameter.grad = torch.ones(())
    return parameter


# --- the first call --------------------------------------------------------------------------------------------------


def test_first_call_has_gradients_enabled_whatever_the_caller_has() -> None:
    seen = []

    def closure() -> float:
        seen.append(torch.is_grad_enabled())
        return 1.0

    with torch.no_grad():
        call(closure, [used()])
        assert not torch.is_grad_enabled()
        session_of(closure, [used()]).first(closure)
        assert not torch.is_grad_enabled()
    assert seen == [True, True]


def test_call_refuses_what_is_no_loss() -> None:
    with pytest.raises(TypeError, match="closure must return the loss"):
        call(lambda: None)
    with pytest.raises(TypeError, match="closure must return the loss"):
        session_of(lambda: None, []).first(lambda: None)


def test_nothing_of_torch_is_replaced_in_a_lazy_step() -> None:
    model, before = nn.Linear(3, 1), originals()
    seen = []

    def closure() -> Tensor:
        seen.append(originals())
        return closure_of(model)()

    for _ in range(2):
        call(closure, parameters_of(model))
        assert seen.pop() == before


def test_the_first_call_and_probes_replace_what_is_documented_and_no_more() -> None:
    model, before = nn.Linear(3, 1), originals()
    differing = []

    def closure() -> Tensor:
        differing.append([one != other for one, other in zip(originals(), before, strict=True)])
        return closure_of(model)()

    call_and_probe(closure, parameters_of(model), probes=1)
    kept = [False] * (len(before) - 3)
    # torch.autograd's backward, not grad; and autocast's __enter__.
    assert differing == 2 * [[True, False, True, *kept]]


def test_probe_refuses_what_is_no_loss_and_names_the_caller() -> None:
    session = session_of(lambda: None, [], name="probe")
    with session.probing(), pytest.raises(TypeError, match=r"^probe must return"):
        session.probe()


def test_probed_loss_has_no_graph() -> None:
    weight = torch.ones(2, requires_grad=True)

    def penalised() -> Tensor:
        [gradient] = torch.autograd.grad(weight.pow(2).sum(), weight, create_graph=True)
        return gradient.pow(2).sum()

    for closure in (weight.sum, penalised):
        session = session_of(closure, [weight])
        with session.probing():
            loss = session.probe()
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
    caller = ClosureCaller()
    with outer():
        for _ in range(2):
            losses = call_and_probe(
                closure_of_model(model), gradients.tensors, caller=caller, after_first=gradients.remember
            )
            assert len(set(losses)) == 1
            gradients.assert_unchanged()


def test_imported_backward_finds_gradients_absent_in_every_probe() -> None:
    caller = ClosureCaller()
    model = nn.Linear(3, 1)
    seen: list[Tensor | None] = []

    def closure() -> Tensor:
        if caller.is_probing:
            seen.extend(parameter.grad for parameter in model.parameters())
        loss: Tensor = model(INPUTS).pow(2).mean()
        imported_backward(loss)
        return loss

    gradients = Gradients(parameters_of(model))
    call_and_probe(closure, gradients.tensors, caller=caller, after_first=gradients.remember, probes=3)
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

    caller = ClosureCaller()
    call_and_probe(counted, parameters_of(model), caller=caller)
    assert calls == 4
    call_and_probe(counted, parameters_of(model), caller=caller)
    assert calls == 7


@pytest.mark.parametrize(
    "error", [kind("mat1 and mat2 shapes cannot be multiplied") for kind in (RuntimeError, ValueError)]
)
def test_errors_of_the_closure_are_raised_as_they_are(error: Exception) -> None:
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise error
        return torch.tensor(1.0)

    with pytest.raises(type(error), match="mat1 and mat2") as caught:
        call_and_probe(closure, [used()])
    assert caught.value is error
    assert calls == (3 if isinstance(error, RuntimeError) else 2)


def test_the_error_without_a_graph_is_raised_if_the_one_with_a_graph_fails_too() -> None:
    calls = 0

    def closure() -> float:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise RuntimeError("the second call") if calls == 2 else KeyError("the third call")
        return 1.0

    caller = ClosureCaller()
    with pytest.raises(RuntimeError, match="the second call"):
        call_and_probe(closure, [used()], caller=caller)
    assert caller.needs_graph is None


@pytest.mark.parametrize("has_probed", [False, True])
def test_a_rank_among_others_repeats_no_probe_once_one_has_needed_no_graph(has_probed: bool) -> None:
    class Two(Ranks):
        def __len__(self) -> int:
            return 2

    calls, caller = [], ClosureCaller()

    def closure() -> float:
        calls.append(torch.is_grad_enabled())
        if len(calls) > has_probed:
            raise RuntimeError("on purpose")
        return 1.0

    session = Session(caller, [{"params": []}], [], closure, "probe", Two(), tolerance=1.0)
    with session.probing():
        if has_probed:
            session.probe()
        with pytest.raises(RuntimeError, match="on purpose"):
            session.probe()
    assert calls == ([False, False] if has_probed else [False, True])


# --- the surroundings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outer", [torch.enable_grad, torch.no_grad])
def test_probes_run_without_a_graph_and_leave_grad_mode_alone(outer: Callable[[], Any]) -> None:
    modes = []

    def closure() -> float:
        modes.append(torch.is_grad_enabled())
        return 1.0

    with outer():
        before = torch.is_grad_enabled()
        call_and_probe(closure, [used()])
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
        session = session_of(closure_of(model), parameters_of(model))
        first = session.first(closure_of(model))
        with session.probing():
            move()
            session.probe()
        with torch.no_grad():
            model.weight.copy_(before)
        assert closure_of(model)().item() == first.item()  # type: ignore[union-attr]


def test_attention_takes_no_other_kernel_in_probes() -> None:
    torch.manual_seed(0)
    layer, inputs = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval(), torch.randn(4, 16, 32)
    with torch.no_grad():
        fast = layer(inputs)
    assert not torch.equal(fast, layer(inputs)), "without gradients torch takes another kernel"
    assert len(set(call_and_probe(closure_of(layer, inputs), parameters_of(layer)))) == 1


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("trained", ["head", "prompt", "encoder"])
def test_an_encoder_with_a_padding_mask_computes_the_same_in_probes(trained: str) -> None:
    """Its fast path, which a frozen one takes with gradients enabled, too, fills padded positions with zeros."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1).eval()
    head, prompt = nn.Linear(8, 1), nn.Parameter(torch.randn(8))
    inputs, is_padding = torch.randn(4, 5, 8), torch.zeros(4, 5, dtype=torch.bool)
    is_padding[1:, 3:] = True
    parts = {"head": parameters_of(head), "prompt": [prompt], "encoder": list(encoder.parameters())}
    for name, parameters in parts.items():
        for each in parameters:
            each.requires_grad_(name == trained)

    def closure() -> Tensor:
        outputs = encoder(inputs + prompt, src_key_padding_mask=is_padding)
        loss: Tensor = head(outputs.mean(1)).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    modules = [encoder] if trained == "prompt" else []
    assert len(set(call_and_probe(closure, parts[trained], modules=modules))) == 1


def test_is_probing_while_a_probe_runs_and_only_then() -> None:
    caller = ClosureCaller()
    seen = []

    def closure() -> float:
        seen.append(caller.is_probing)
        return 1.0

    assert not caller.is_probing
    call_and_probe(closure, [used()], caller=caller)
    assert seen == [False, True, True]
    assert not caller.is_probing


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
    caller = ClosureCaller([critic])
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
            call_and_probe(closure, parameters_of(model), caller=caller, after_first=remember)
        assert torch.is_grad_enabled() == grad_mode
    assert calls == failing_call
    gradients.assert_unchanged()
    if failing_call > 1:  # what a first call that fails has drawn and written is drawn and written, as without GeN
        assert stream_states() == streams
        assert_same_buffers(model, buffers)
    assert originals() == before
    assert not caller.is_probing

    weight = torch.ones((), requires_grad=True)
    (2 * weight).backward()  # type: ignore[no-untyped-call]
    assert weight.grad == 2.0


def test_steps_after_a_failed_one_probe_as_usual() -> None:
    caller, model = ClosureCaller(), nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5))

    def failing() -> Tensor:
        if caller.is_probing:
            raise ValueError("stop")
        return closure_of(model)()

    with pytest.raises(ValueError, match="stop"):
        call_and_probe(failing, parameters_of(model), caller=caller)
    assert len(set(call_and_probe(closure_of(model), parameters_of(model), caller=caller))) == 1


# --- autocast ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("place", ["around", "in the closure", "in the model"])
def test_a_session_notices_in_what_autocast_computes(dtype: torch.dtype, place: str) -> None:
    model = nn.Linear(4, 1)
    if place == "in the model":  # as Accelerate does it
        model.forward = torch.autocast("cpu", dtype)(model.forward)  # type: ignore[method-assign]

    def closure() -> Tensor:
        with torch.autocast("cpu", dtype, enabled=place == "in the closure"):
            return model(torch.ones(2, 4)).float().mean()

    enter, probed = torch.autocast.__enter__, closure if place != "around" else lambda: 1.0
    for has_first_call in (True, False):
        session = session_of(probed, parameters_of(model), name="probe")
        assert session.rounding([1.0]) == torch.finfo(torch.float32).eps
        with torch.autocast("cpu", dtype, enabled=place == "around"):
            if has_first_call and place != "around":
                session.first(closure)
            else:
                with session.probing():
                    session.probe()
        assert session.rounding([1.0]) == torch.finfo(dtype).eps / 16.0
    assert torch.autocast.__enter__ is enter


def test_an_autocast_that_is_off_or_another_threads_is_not_noticed() -> None:
    def autocast(enabled: bool) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            return weight.sum()

    weight = nn.Parameter(torch.ones(1))
    session = session_of(weight.sum, [weight])
    session.first(lambda: autocast(enabled=False))

    def elsewhere() -> Tensor:
        thread = threading.Thread(target=autocast, args=[True])
        thread.start()
        thread.join()
        return weight.sum()

    session.first(elsewhere)
    single, half = (torch.finfo(dtype).eps for dtype in (torch.float32, torch.bfloat16))
    assert session.rounding([1.0]) == single
    with torch.autocast("cpu", torch.bfloat16):
        session.first(weight.sum)
    assert session.rounding([1.0]) == half / 16.0


# --- random streams --------------------------------------------------------------------------------------------------


def test_probes_see_the_dropout_masks_of_the_first_call() -> None:
    model = nn.Sequential(nn.Linear(3, 32), nn.Dropout(0.5), nn.Linear(32, 1))
    losses = call_and_probe(closure_of(model), parameters_of(model), probes=3)
    assert len(set(losses)) == 1


def test_every_step_has_dropout_masks_of_its_own() -> None:
    model = nn.Sequential(nn.Linear(3, 32), nn.Dropout(0.5), nn.Linear(32, 1))
    closure = closure_of(model)
    first, second = (call_and_probe(closure, parameters_of(model))[0] for _ in range(2))
    assert first != second


def test_probes_draw_what_the_first_call_drew_from_every_global_stream() -> None:
    draws = []

    def closure() -> float:
        draws.append(draw())
        return 1.0

    call_and_probe(closure, [used()], probes=3)
    assert len(draws) == 4
    assert len(set(draws)) == 1


@pytest.mark.parametrize("probe_draws", [0, 1, 100])
def test_random_streams_end_as_after_the_first_call(probe_draws: int) -> None:
    caller = ClosureCaller()

    def closure() -> float:
        for _ in range(probe_draws if caller.is_probing else 2):
            draw()
        return 1.0

    def remember() -> None:
        expected.extend(stream_states())

    expected: list[Any] = []
    call_and_probe(closure, [used()], caller=caller, after_first=remember)
    assert stream_states() == expected


def test_random_streams_end_where_they_were_without_a_first_call() -> None:
    before = stream_states()
    draws = []

    def closure() -> float:
        draws.append(draw())
        return 1.0

    session = session_of(closure, [], name="probe")
    with session.probing():
        for _ in range(2):
            session.probe()
    assert draws[0] == draws[1]
    assert stream_states() == before


# --- calls with a graph ----------------------------------------------------------------------------------------------


def differentiate(closure: Callable[[], Any], parameters: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The gradients of a closure: of the first call, and of one more with a graph."""
    session = session_of(closure, parameters)
    session.first(closure)
    assert parameters[0].grad is not None
    expected = parameters[0].grad.clone()
    with session.probing():
        [gradient] = torch.autograd.grad(session.differentiable(), parameters[:1])
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
    session = session_of(lambda: 1.0, [], name="probe")
    with (
        session.probing(),
        pytest.raises(TypeError, match=r"probe must return a loss that has a graph.*mode='approximate'"),
    ):
        session.differentiable()


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("maximize", [False, True])
def test_losses_alone_are_negated_under_maximize(maximize: bool) -> None:
    groups = [{"params": [], "maximize": maximize}]
    session = Session(ClosureCaller(), groups, [], lambda: 1.0, "closure", Ranks(), tolerance=4.0)
    sign = -1.0 if maximize else 1.0
    assert session.read([1.0, torch.tensor(2.0)], [3.0, torch.tensor(4.0)]) == ([sign, 2.0 * sign], [3.0, 4.0])
    assert session.rounding([1.0]) == 4.0 * torch.finfo(torch.float32).eps
