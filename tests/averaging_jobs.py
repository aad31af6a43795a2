"""What the ranks of a process group do in the tests of averaged weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.nn.functional import mse_loss

from gen_optim import GeNOptimizer, History
from gen_optim.averaging import AveragedWeights
from tests.rank_jobs import WRAPS, data_of, numbers_of, whole
from tests.training import mlp


class Run:
    """A model in training by a bare optimizer, with averaged weights."""

    def __init__(self, kind: str, make: str = "adamw", *, seed: int = 0) -> None:
        self.model: nn.Module = WRAPS[kind](mlp(seed=seed, dtype=torch.float64))
        parameters = self.model.parameters()
        self.optimizer = (
            torch.optim.AdamW(parameters, lr=0.01) if make == "adamw" else torch.optim.SGD(parameters, lr=0.1)
        )
        self.weights = AveragedWeights(self.optimizer)
        self.inputs, self.targets = data_of(kind)

    def loss(self) -> Tensor:
        return mse_loss(self.model(self.inputs), self.targets)

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.loss().backward()
            self.optimizer.step()
            self.weights.update()

    def averages(self) -> list[Tensor]:
        return [self.optimizer.state[each]["gen_average"] for each in self.model.parameters()]


def train(kind: str) -> dict[str, Any]:
    """Training with an evaluation of the averaged weights in the middle and at the end."""
    run = Run(kind)
    run.train(10)
    for _ in range(2):  # a forward pass without a backward pass leaves modules of fully_shard gathered
        with torch.no_grad(), run.weights.swapped():
            run.loss()
    run.train(10)
    with torch.no_grad():
        before = run.loss().item()
        with run.weights.swapped():
            inside = whole(run.loss()).item()
            averaged = numbers_of(run.model)
        assert run.loss().item() == before
    run.train(1)
    types = {type(each) for each in run.averages()}
    assert types == ({Tensor} if kind in ("plain", "ddp") else {DTensor}), types
    return {"loss": inside, "averaged": averaged, "parameters": numbers_of(run.model)}


def compare(kind: str) -> dict[str, Any]:
    """A loop that calls ``backward()`` itself, whose probe steps evaluate the loss at the averaged weights."""
    model: nn.Module = WRAPS[kind](mlp(dtype=torch.float64))
    optimizer, history = GeNOptimizer(torch.optim.AdamW(model.parameters())), History()
    optimizer.register_probe_hook(history)
    inputs, targets = data_of(kind)
    for step in range(40):
        wave = torch.sin(step * inputs.sum(-1, keepdim=True))

        def probe() -> Tensor:
            return mse_loss(model(inputs), targets + 0.3 * wave)  # noqa: B023

        optimizer.zero_grad()
        probe().backward()
        optimizer.step(probe=probe)
    return {"excess": [each.excess_loss for each in history][-10:], "parameters": numbers_of(model)}


def resume(kind: str, make: str, folder: str, flatten: bool, full: bool) -> None:
    """Save through torch.distributed.checkpoint, load in a new run, and compare with going on."""
    options = StateDictOptions(flatten_optimizer_state_dict=flatten, full_state_dict=full)
    run, resumed = Run(kind, make), Run(kind, make, seed=1)
    run.train(10)
    resumed.train(1)  # so that it has averages to load into
    if full:
        state = {
            "model": copy.deepcopy(get_model_state_dict(run.model, options=options)),
            "optimizer": copy.deepcopy(get_optimizer_state_dict(run.model, run.optimizer, options=options)),
        }
    else:
        state = {
            "model": get_model_state_dict(run.model),
            "optimizer": get_optimizer_state_dict(run.model, run.optimizer, options=options),
        }
        dcp.save(state, checkpoint_id=folder)
        state = {
            "model": get_model_state_dict(resumed.model),
            "optimizer": get_optimizer_state_dict(resumed.model, resumed.optimizer, options=options),
        }
        dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(resumed.model, state["model"], options=options)
    set_optimizer_state_dict(resumed.model, resumed.optimizer, state["optimizer"], options=options)
    for each in (run, resumed):
        each.train(10)
    assert numbers_of(run.model) == numbers_of(resumed.model)
    assert resumed.weights.updates == 5
    for left, right in zip(run.averages(), resumed.averages(), strict=True):
        assert torch.equal(whole(left), whole(right))
