"""Noticing calls of modules: outermost ones, of one thread, unseen by what is compiled."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from gen_optim.watching import _Patch, watching_modules
from tests.training import Training, gen_adamw, mlp


class Nested(nn.Module):
    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 1) if inner is None else inner

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.inner(inputs)


def test_only_outermost_calls_are_noticed_and_each_of_them() -> None:
    calls: list[str] = []
    first, second = Nested(), nn.Linear(4, 1)
    original = nn.Module.__call__
    with watching_modules(
        lambda module: calls.append(f"enter {type(module).__name__}"),
        lambda module: calls.append(f"leave {type(module).__name__}"),
    ):
        assert nn.Module.__call__ is not original
        first(torch.zeros(1, 4)), second(torch.zeros(1, 4))
    assert calls == ["enter Nested", "leave Nested", "enter Linear", "leave Linear"]
    assert nn.Module.__call__ is original


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_call_that_fails_is_left_too(error: type[BaseException]) -> None:
    calls: list[str] = []
    model = Nested()

    def fail(*_: object) -> None:
        raise error("on purpose")

    model.inner.register_forward_hook(fail)
    original = nn.Module.__call__
    with pytest.raises(error), watching_modules(lambda _: calls.append("enter"), lambda _: calls.append("leave")):
        model(torch.zeros(1, 4))
    assert calls == ["enter", "leave"]
    assert nn.Module.__call__ is original


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
    original = nn.Module.__call__
    models = [mlp(seed=seed, norm=True) for seed in range(3)]

    def train(model: nn.Module) -> None:
        Training.of(gen_adamw, model).train(20)

    threads = [threading.Thread(target=train, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert nn.Module.__call__ is original
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
