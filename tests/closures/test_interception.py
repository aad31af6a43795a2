"""Noticing calls of modules: outermost ones, of one thread, unseen by what is compiled."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.utils.checkpoint
from torch import nn
from torch._dynamo.utils import counters

from gen_optim.closures.interception import WatchingGradients, _Patch, around_backward, watching_modules
from tests.training import Training, gen_adamw, mlp


class Nested(nn.Module):
    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 1) if inner is None else inner

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.inner(inputs)


def is_as_ever() -> bool:
    """Whether nothing of torch's modules is replaced."""
    return vars(nn.Module)["_compiled_call_impl"] is None


def test_only_outermost_calls_are_noticed_and_each_of_them() -> None:
    calls: list[str] = []
    first, second = Nested(), nn.Linear(4, 1)
    with watching_modules(
        lambda module: calls.append(f"enter {type(module).__name__}"),
        lambda module: calls.append(f"leave {type(module).__name__}"),
    ):
        assert not is_as_ever()
        first(torch.zeros(1, 4)), second(torch.zeros(1, 4))
    assert calls == ["enter Nested", "leave Nested", "enter Linear", "leave Linear"]
    assert is_as_ever()


@pytest.mark.parametrize("wrap", [torch.compile, torch.jit.script, torch.fx.symbolic_trace])
def test_calls_of_any_kind_of_module_are_noticed(wrap: Callable[[nn.Module], nn.Module]) -> None:
    calls: list[nn.Module] = []
    module, inputs = nn.Linear(4, 1), torch.ones(1, 4)
    expected = module(inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scripting is deprecated
        other = wrap(module)
    in_place = copy.deepcopy(module)
    in_place.compile(backend="eager")
    with watching_modules(calls.append, lambda _: None):
        assert torch.equal(other(inputs), expected)
        assert torch.equal(in_place(inputs), expected)
        module.compile(backend="eager")
        assert torch.equal(module(inputs), expected)
    assert calls == [other, in_place, module]
    assert torch.equal(module(inputs), expected)


def test_arguments_may_have_any_name() -> None:
    class Named(nn.Module):
        def forward(self, *, module: int, call: int) -> int:
            return module + call

    with watching_modules(lambda _: None, lambda _: None):
        assert Named()(module=1, call=2) == 3


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_call_that_fails_is_left_too(error: type[BaseException]) -> None:
    calls: list[str] = []
    model = Nested()

    def fail(*_: object) -> None:
        raise error("on purpose")

    model.inner.register_forward_hook(fail)
    with pytest.raises(error), watching_modules(lambda _: calls.append("enter"), lambda _: calls.append("leave")):
        model(torch.zeros(1, 4))
    assert calls == ["enter", "leave"]
    assert is_as_ever()


def test_other_threads_are_not_noticed() -> None:
    calls: list[nn.Module] = []
    model = Nested()
    with watching_modules(calls.append, calls.append):
        thread = threading.Thread(target=model, args=(torch.zeros(1, 4),))
        thread.start()
        thread.join()
    assert calls == []


@pytest.mark.parametrize("how", ["whole", "in place", "a part"])
def test_a_compiled_model_is_compiled_once_for_each_grad_mode_and_without_a_warning(how: str) -> None:
    torch.compiler.reset()
    counters.clear()
    model = mlp(norm=True)
    compiled: nn.Module = Nested(model)
    if how == "whole":
        compiled = torch.compile(compiled, backend="aot_eager")
    elif how == "in place":
        compiled.compile(backend="aot_eager")
    else:
        model[4] = torch.compile(model[4], backend="aot_eager")
    training = Training.of(lambda parameters: gen_adamw(parameters, burn_in=3, period=4), compiled)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's compiler warns of itself
        warnings.filterwarnings("error", message=".*global hooks")
        training.train(1)
        graphs = counters["stats"]["unique_graphs"]
        losses = training.train(20)
    assert graphs == 2
    assert counters["stats"]["unique_graphs"] == graphs
    assert losses[-1] < losses[0]
    assert model[1].num_batches_tracked.item() == 21


def test_threads_that_overlap_leave_torch_as_it_was() -> None:
    models = [mlp(seed=seed, norm=True) for seed in range(3)]

    def train(model: nn.Module) -> None:
        Training.of(gen_adamw, model).train(20)

    threads = [threading.Thread(target=train, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert is_as_ever()
    assert [model[1].num_batches_tracked.item() for model in models] == [20, 20, 20]


def test_an_interrupt_while_functions_are_replaced_leaves_none_replaced() -> None:
    class Owner:
        first = second = staticmethod(len)

    def interrupted(original: object) -> object:
        raise KeyboardInterrupt

    patch = _Patch((Owner, "first", lambda original: abs), (Owner, "second", interrupted))  # type: ignore[arg-type]
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            patch.hold()
        assert Owner.first is Owner.second is len


# --- backward passes -------------------------------------------------------------------------------------------------


class Passes:
    """Notes backward passes: what each differentiates, and whether the weight had a gradient before and after."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight
        self.seen: list[tuple[list[float], bool, bool]] = []

    @contextmanager
    def around(self, differentiated: list[torch.Tensor]) -> Iterator[None]:
        before = self.weight.grad is not None
        yield
        self.seen.append(([each.item() for each in differentiated], before, self.weight.grad is not None))


def test_backward_passes_are_entered_and_left_with_what_they_differentiate() -> None:
    weight = torch.ones(2, requires_grad=True)
    passes = Passes(weight)
    with WatchingGradients(suppress=False), around_backward(passes.around):
        weight.sum().backward()
        torch.autograd.backward(weight * 3.0, torch.tensor([1.0, 2.0]))
    weight.sum().backward()  # unseen
    assert passes.seen == [([2.0], False, True), ([9.0], True, True)]


def test_backward_passes_are_unseen_outside_of_a_closure_and_where_they_do_nothing() -> None:
    weight = torch.ones(2, requires_grad=True)
    passes = Passes(weight)
    with around_backward(passes.around):
        weight.sum().backward()
        with WatchingGradients(suppress=True):
            weight.sum().backward()
    assert passes.seen == []


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_backward_passes_within_a_backward_pass_are_part_of_it(use_reentrant: bool) -> None:
    weight = torch.ones(2, requires_grad=True)
    passes = Passes(weight)
    with WatchingGradients(suppress=False), around_backward(passes.around):
        for _ in range(2):
            block = torch.utils.checkpoint.checkpoint(torch.square, weight, use_reentrant=use_reentrant)
            block.sum().backward()
    assert [each for each, _, _ in passes.seen] == [[2.0], [2.0]]
    assert torch.equal(weight.grad, torch.full((2,), 4.0))


def test_an_error_in_a_backward_pass_leaves_the_next_one_noticed() -> None:
    weight = torch.ones(2, requires_grad=True)
    passes = Passes(weight)
    with WatchingGradients(suppress=False), around_backward(passes.around):
        loss = weight.sum()
        loss.register_hook(lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            loss.backward()
        weight.sum().backward()
    assert [each for each, _, _ in passes.seen] == [[2.0]]


def test_backward_passes_of_other_threads_are_not_noticed() -> None:
    weight = torch.ones(2, requires_grad=True)
    passes = Passes(weight)
    with WatchingGradients(suppress=False), around_backward(passes.around):
        thread = threading.Thread(target=lambda: weight.sum().backward())
        thread.start()
        thread.join()
    assert passes.seen == []
    assert weight.grad is not None
