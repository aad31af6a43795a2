"""Closures and modules that leave traces, and calls of them as a step makes them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from gen_optim.closures.losses import Closure, Loss
from gen_optim.closures.session import ClosureCaller, Session
from gen_optim.distributed import Ranks
from gen_optim.tensors.scalars import to_floats

INPUTS = torch.linspace(-1.0, 1.0, 24).reshape(8, 3)


def session_of(
    closure: Callable[[], Any],
    parameters: list[Tensor],
    *,
    caller: ClosureCaller | None = None,
    modules: Sequence[nn.Module] = (),
    name: Literal["closure", "probe"] = "closure",
) -> Session:
    """The session of a step that probes ``closure``."""
    groups = [{"params": parameters}]
    caller = caller or ClosureCaller(modules)
    return Session(caller, groups, caller.owners(parameters), closure, name, Ranks(), tolerance=1.0)


@contextmanager
def begun(watch: Any) -> Iterator[Any]:
    """What has a beginning and an end, as a context."""
    watch.begin()
    try:
        yield watch
    finally:
        watch.end()


def call(closure: Closure, parameters: Sequence[Tensor] = ()) -> Loss:
    """The loss of a lazy step."""
    return ClosureCaller().call(closure, [{"params": list(parameters)}])


def call_and_probe(
    closure: Callable[[], Any],
    parameters: list[Tensor],
    *,
    probes: int = 2,
    before_probe: Callable[[], object] = lambda: None,
    after_first: Callable[[], object] = lambda: None,
    caller: ClosureCaller | None = None,
    modules: Sequence[nn.Module] = (),
) -> list[float]:
    """The losses of a step's calls of ``closure``: the first one and the probes."""
    session = session_of(closure, parameters, caller=caller, modules=modules)
    losses = [session.first(closure)]
    after_first()
    with session.probing():
        for _ in range(probes):
            before_probe()
            losses.append(session.probe())
    return to_floats(losses)


def closure_of(model: nn.Module, inputs: Tensor = INPUTS) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        model.zero_grad()
        loss: Tensor = model(inputs).pow(2).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    return closure


def parameters_of(*models: nn.Module) -> list[Tensor]:
    return [parameter for model in models for parameter in model.parameters()]


def stream_states() -> list[Any]:
    numpy_state = np.random.get_state(legacy=True)
    return [random.getstate(), tuple(map(str, numpy_state)), torch.get_rng_state().tolist()]


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), torch.rand(1).item()


def buffers_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def assert_same_buffers(model: nn.Module, expected: dict[str, Tensor]) -> None:
    buffers = dict(model.named_buffers())
    assert buffers.keys() == expected.keys()
    for name, buffer in buffers.items():
        assert torch.equal(buffer, expected[name]), name


class Counting(nn.Module):
    """Adds the number of times it was called to its inputs."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def count(self) -> None:
        self.calls += 1

    def forward(self, inputs: Tensor) -> Tensor:
        self.count()
        return inputs + self.calls


class Reassigning(Counting):
    def count(self) -> None:
        self.calls = self.calls + 1


class Gradients:
    """The gradients of tensors after the first call."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors

    def remember(self) -> None:
        self.gradients = [tensor.grad for tensor in self.tensors]
        self.copies = [None if gradient is None else gradient.clone() for gradient in self.gradients]

    def assert_unchanged(self) -> None:
        for tensor, gradient, copy in zip(self.tensors, self.gradients, self.copies, strict=True):
            assert tensor.grad is gradient
            assert gradient is None or torch.equal(gradient, copy)  # type: ignore[arg-type]


def originals() -> tuple[object, ...]:
    """What of torch could be replaced."""
    return (
        torch.autograd.backward,
        torch.autograd.grad,
        torch.autocast.__enter__,
        Tensor.backward,
        nn.Module.zero_grad,
        nn.Module.__call__,
        vars(nn.Module)["_compiled_call_impl"],
        torch.optim.Optimizer.zero_grad,
        dict(torch_module._global_forward_pre_hooks),
    )
