"""What is replaced while a probe step calls its closure: for one thread, for that long, and after interrupts too."""

from __future__ import annotations

import gc
import threading
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch._dynamo.utils import counters

from gen_optim.closures import interception
from gen_optim.closures.interception import Interception, _Replacement, repair
from tests.closures.probes import begun, closure_of, originals, session_of
from tests.training import Training, gen_adamw, mlp

Scalars = Callable[[], list[Tensor]]


@pytest.fixture(autouse=True)
def _leaves_torch_as_it_was() -> Iterator[None]:
    before = originals()
    yield
    assert originals() == before


class Passes:
    """Notes backward passes: what each differentiates, and whether the weight had a gradient before and after."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.seen: list[tuple[list[float], bool, bool]] = []

    def note(self, run: Callable[[], None], scalars: Scalars) -> None:
        before, differentiated = self.weight.grad is not None, [each.item() for each in scalars()]
        run()
        self.seen.append((differentiated, before, self.weight.grad is not None))

    def intercepted(self) -> Interception:
        return Interception(self.note, set(), ["cpu"])


@pytest.fixture
def weight() -> Tensor:
    return torch.ones(2, requires_grad=True)


def ignoring(dtypes: set[torch.dtype] | None = None) -> Interception:
    return Interception(lambda run, scalars: None, set() if dtypes is None else dtypes, ["cpu"])


# --- backward passes -------------------------------------------------------------------------------------------------


def test_backward_passes_are_handled_with_what_they_differentiate(weight: Tensor) -> None:
    passes = Passes(weight)
    with begun(passes.intercepted()):
        weight.sum().backward()
        torch.autograd.backward(weight * 3.0, torch.tensor([1.0, 2.0]))
    weight.sum().backward()  # not handled
    assert passes.seen == [([2.0], False, True), ([9.0], True, True)]


def test_backward_passes_of_an_inner_interception_are_its_own(weight: Tensor) -> None:
    passes = Passes(weight)
    with begun(passes.intercepted()):
        with begun(ignoring()):
            weight.sum().backward()
        assert weight.grad is None
        weight.sum().backward()
    assert len(passes.seen) == 1


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_backward_passes_within_a_backward_pass_are_part_of_it(weight: Tensor, use_reentrant: bool) -> None:
    passes = Passes(weight)
    with begun(passes.intercepted()):
        for _ in range(2):
            block = torch.utils.checkpoint.checkpoint(torch.square, weight, use_reentrant=use_reentrant)
            block.sum().backward()
    assert [each for each, _, _ in passes.seen] == [[2.0], [2.0]]
    assert torch.equal(weight.grad, torch.full((2,), 4.0))


def test_an_error_in_a_backward_pass_leaves_the_next_one_handled(weight: Tensor) -> None:
    passes = Passes(weight)
    with begun(passes.intercepted()):
        loss = weight.sum()
        loss.register_hook(lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            loss.backward()
        weight.sum().backward()
    assert [each for each, _, _ in passes.seen] == [[2.0]]


def test_backward_passes_of_other_threads_are_not_handled(weight: Tensor) -> None:
    with begun(ignoring()):
        thread = threading.Thread(target=lambda: weight.sum().backward())
        thread.start()
        thread.join()
    assert weight.grad is not None


def test_backward_of_a_tensor_ends_in_the_function_that_is_replaced(weight: Tensor) -> None:
    """If torch changes that, probes write gradients, and looking back always takes two forward passes."""
    with begun(ignoring()):
        weight.sum().backward()
        torch.autograd.backward(weight.sum())
        assert weight.grad is None
        [gradient] = torch.autograd.grad(weight.sum(), weight)  # not replaced
    assert torch.equal(gradient, torch.ones(2))


# --- autocast --------------------------------------------------------------------------------------------------------


def test_the_dtypes_of_autocasts_are_noted() -> None:
    """If torch changes how an autocast is entered, losses computed in bfloat16 count as exact."""
    dtypes: set[torch.dtype] = set()
    with torch.autocast("cpu", torch.float16), begun(ignoring(dtypes)):
        assert dtypes == {torch.float16}
        with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
            pass
        assert dtypes == {torch.float16, torch.bfloat16}
    dtypes.clear()
    with begun(ignoring(dtypes)):
        torch.autocast("cpu", torch.bfloat16)(lambda: None)()  # as a decorator
    assert dtypes == {torch.bfloat16}


# --- interrupts ------------------------------------------------------------------------------------------------------


def test_an_interrupt_while_attributes_are_replaced_leaves_none_replaced() -> None:
    values = SimpleNamespace(first=1, second=2)

    def interrupted(_: int) -> int:
        raise KeyboardInterrupt

    class Holder:
        pass

    replacement = _Replacement((values, "first", lambda _: 10), (values, "second", interrupted))
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            replacement.hold(Holder())
        gc.collect()
        replacement.repair()
        assert values == SimpleNamespace(first=1, second=2)


def test_a_lock_that_an_interrupt_in_another_thread_has_left_held_does_not_stop_training() -> None:
    values = SimpleNamespace(first=1)
    replacement = _Replacement((values, "first", lambda _: 10))
    interrupted = threading.Thread(target=replacement._lock.acquire)
    interrupted.start()
    interrupted.join()
    holder = ignoring()
    replacement.hold(holder)
    assert values.first == 10
    replacement.release(holder)
    assert values.first == 1


@pytest.mark.parametrize("begins", ["a lazy step", "a probe step"])
def test_what_an_interrupt_leaves_replaced_passes_calls_through_and_is_repaired_by_the_next_step(begins: str) -> None:
    model, before = mlp(), originals()
    entered = ignoring()
    entered.begin()  # and never ended
    assert originals() != before
    del entered
    assert originals() != before
    model(torch.ones(1, 4)).sum().backward()
    assert model[0].weight.grad is not None
    training = Training.of(gen_adamw, model)
    if begins == "a lazy step":
        training.optimizer._context.caller.call(training.closure, training.optimizer.param_groups)
    else:
        session_of(closure_of(model), list(model.parameters()))
    assert originals() == before


def test_repairing_leaves_alone_what_another_thread_has_replaced(weight: Tensor) -> None:
    with begun(ignoring()):
        thread = threading.Thread(target=repair)
        thread.start()
        thread.join()
        weight.sum().backward()
        assert weight.grad is None


def test_threads_that_overlap_leave_torch_as_it_was() -> None:
    models = [mlp(seed=seed, norm=True) for seed in range(3)]

    def train(model: nn.Module) -> None:
        Training.of(gen_adamw, model).train(20)

    threads = [threading.Thread(target=train, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [model[1].num_batches_tracked.item() for model in models] == [20, 20, 20]
    assert interception._active() is None


# --- compiled models -------------------------------------------------------------------------------------------------


class Nested(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, inputs: Tensor) -> Tensor:
        return self.inner(inputs)


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
