"""Autocast and gradient scaling around the optimizer, on the real components."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gen_optim import GeNOptimizer, ProbeStatus
from tests.training import gen_adamw, mlp, parameters_of, regression_data, same


def low_precision_loss(model: nn.Module) -> Tensor:
    inputs, targets = regression_data()
    with torch.autocast("cpu", torch.bfloat16):
        return nn.functional.mse_loss(model(inputs), targets)


def scaled_step(model: nn.Module, optimizer: GeNOptimizer, scaler: torch.amp.GradScaler, factor: float = 1.0) -> None:
    optimizer.zero_grad()
    scaler.scale(factor * low_precision_loss(model)).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer, probe=lambda: low_precision_loss(model))
    scaler.update()


def test_a_grad_scaler_steps_it_with_a_probe() -> None:
    model = mlp()
    optimizer, scaler = gen_adamw(model.parameters()), torch.amp.GradScaler("cpu")
    before = low_precision_loss(model).item()
    for _ in range(60):
        scaled_step(model, optimizer, scaler)
    assert low_precision_loss(model).item() < 0.5 * before
    assert optimizer.last_probe.status in (ProbeStatus.FITTED, ProbeStatus.CONCAVE, ProbeStatus.BELOW_NOISE)


def test_a_step_that_a_grad_scaler_skips_leaves_it_untouched() -> None:
    model = mlp()
    optimizer, scaler = gen_adamw(model.parameters()), torch.amp.GradScaler("cpu")
    for _ in range(3):
        scaled_step(model, optimizer, scaler)
    kept, remembered, record = parameters_of(model), str(optimizer.state_dict()), optimizer.last_probe
    scaled_step(model, optimizer, scaler, factor=float("inf"))
    assert same(parameters_of(model), kept)
    assert str(optimizer.state_dict()) == remembered
    assert optimizer.last_probe is record
    scaled_step(model, optimizer, scaler)
    assert optimizer.last_probe.step == record.step + 1


def test_an_autocast_around_the_step_changes_nothing() -> None:
    runs = []
    for outer in (False, True):
        model = mlp()
        optimizer = gen_adamw(model.parameters())
        for _ in range(5):
            with torch.autocast("cpu", torch.bfloat16, enabled=outer):
                optimizer.step(lambda model=model: low_precision_loss(model))
        runs.append(parameters_of(model))
    assert same(*runs)
