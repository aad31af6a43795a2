from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import SGD

from gen_optim import GeNOptimizer
from gen_optim.tensors.rng import RandomStreams, random_devices
from tests.training import Training, mlp, parameters_of, regression_data, same


def draw() -> list[float]:
    return [
        random.random(),
        float(np.random.rand()),
        torch.rand(()).item(),
        float(np.random.normal()),
        random.gauss(0, 1),
    ]


def test_all_streams_repeat_after_a_restore_as_often_as_wanted() -> None:
    draw()  # numpy and Python keep the second of two normal numbers for the next call
    streams = RandomStreams([])
    first = draw()
    for _ in range(2):
        streams.restore()
        assert draw() == first
    assert draw() != first


def test_generators_of_the_user_are_not_touched() -> None:
    generators = torch.Generator().manual_seed(0), np.random.default_rng(0), random.Random(0)
    streams = RandomStreams([])

    def own() -> list[float]:
        return [torch.rand((), generator=generators[0]).item(), generators[1].random(), generators[2].random()]

    first = own()
    streams.restore()
    assert all(a != b for a, b in zip(first, own(), strict=True))


def test_the_cpu_and_the_meta_device_are_no_random_devices() -> None:
    assert random_devices([nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, device="meta"))]) == set()


class NoisySGD(SGD):
    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                drawn.append(torch.randn(()).item())
                parameter.grad += drawn[-1]
        super().step()
        return loss


drawn: list[float] = []


def test_a_base_optimizer_that_draws_at_random_draws_new_numbers_in_each_step() -> None:
    models = mlp(), mlp()
    wrapped = GeNOptimizer(
        NoisySGD(models[0].parameters(), lr=0.01),
        mode="approximate",
        rule="published",
        period=1,
        lr_min=0.01,
        lr_max=0.01,
    )
    bare = NoisySGD(models[1].parameters(), lr=0.01)
    runs = []
    for model, optimizer in zip(models, (wrapped, bare), strict=True):
        drawn.clear()
        torch.manual_seed(0)
        Training(model, optimizer, *regression_data()).train(4)
        runs.append(list(drawn))
    assert runs[0] == runs[1]
    assert len(set(runs[0])) == 16
    assert same(parameters_of(models[0]), parameters_of(models[1]))
