"""Runs each program bare and wrapped, and compares loss and what is left behind."""

from __future__ import annotations

import math
import random
import statistics
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from gen_optim import GeNOptimizer
from tests.programs.programs import PROGRAMS, Run

WORST = 1.5
"""The loss of the wrapped optimizer may be this many times that of the bare one, both averaged over the seeds."""
SEEDS = (0, 1, 2)
WRAPPED_LR = 1e-3
"""The learning rate given to wrapped optimizers: torch's default."""


def state_of_torch() -> dict[str, Any]:
    """Everything of torch that a wrapper could have changed for the rest of the process."""
    return {
        "gradients": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "kernels": [
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
        ],
        "functions": {
            (owner.__name__, name): value
            for owner in (torch.autograd, nn.Module, torch.optim.Optimizer, torch.Tensor, torch.autocast)
            for name, value in vars(owner).items()
            if callable(value) or "call" in name
        },
        "hooks": [
            len(value)
            for name, value in vars(nn.modules.module).items()
            if name.startswith("_global_") and hasattr(value, "__len__")
        ],
    }


def hooks_of(model: nn.Module) -> list[Any]:
    """The attributes and the numbers of hooks of each module of a model, and which parameters have hooks."""
    modules = [(sorted(vars(each)), len(each._forward_hooks), len(each._forward_pre_hooks)) for each in model.modules()]
    hooks = [bool(each._backward_hooks) or bool(each._post_accumulate_grad_hooks) for each in model.parameters()]
    return [*modules, *hooks]


def result_of(name: str, base: str, *, seed: int, is_wrapped: bool) -> tuple[float, list[Any]]:
    """Run a program; return its loss and the hooks of its models, after a check of torch's state."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    program = PROGRAMS[name]
    run = Run(base, WRAPPED_LR if is_wrapped else program.lrs[base], is_wrapped)
    before = state_of_torch()
    loss = program.run(run)
    after = state_of_torch()
    functions = after.pop("functions")
    # torch adds some of its own when they are used first.
    assert [name for name, each in before.pop("functions").items() if functions.get(name) is not each] == []
    assert after == before
    return loss, [hooks_of(model) for model in run.models]


CASES = [
    pytest.param(
        name,
        base,
        id=f"{name}-{base}",
        marks=[pytest.mark.xfail(strict=False, reason=program.fails[base])] if base in program.fails else [],
    )
    for name, program in PROGRAMS.items()
    for base in program.lrs
]


@pytest.mark.parametrize(("name", "base"), CASES)
def test_wrapped_optimizer_does_no_worse_than_the_bare_one(name: str, base: str) -> None:
    losses: dict[bool, list[float]] = {False: [], True: []}
    for seed in SEEDS:
        bare, hooks = result_of(name, base, seed=seed, is_wrapped=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what cannot be measured; what counts is how training ends
            wrapped, wrapped_hooks = result_of(name, base, seed=seed, is_wrapped=True)
        assert hooks == wrapped_hooks
        losses[False].append(bare)
        losses[True].append(wrapped)
        assert math.isfinite(wrapped), losses
    assert statistics.fmean(losses[True]) <= WORST * statistics.fmean(losses[False]), losses


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimization as it is usually written: a step needs the closure twice."""

    def __init__(self, parameters: Any, rho: float = 0.05, lr: float = 0.1) -> None:
        super().__init__(parameters, {"rho": rho, "lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is not None, "SAM requires a closure"
        closure = torch.enable_grad()(closure)
        parameters = [each for group in self.param_groups for each in group["params"]]
        ascents = [self.param_groups[0]["rho"] * torch.nn.functional.normalize(each.grad, dim=0) for each in parameters]
        torch._foreach_add_(parameters, ascents)
        closure()
        torch._foreach_sub_(parameters, ascents)
        for each in parameters:
            each.sub_(self.param_groups[0]["lr"] * each.grad)


def test_an_optimizer_that_calls_the_closure_itself_is_refused_when_it_is_wrapped() -> None:
    with pytest.raises((TypeError, ValueError), match="closure"):
        GeNOptimizer(SAM(nn.Linear(3, 1).parameters()))


def test_parameters_on_the_meta_device_are_refused_when_they_are_wrapped() -> None:
    with pytest.raises((TypeError, ValueError), match="meta"):
        GeNOptimizer(torch.optim.AdamW(nn.Linear(3, 1, device="meta").parameters()))
