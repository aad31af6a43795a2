"""Low precision around the optimizer, on the real components: autocast, gradient scaling, parameters in bfloat16."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from benchmarks import precision
from benchmarks.data import Data
from benchmarks.workloads import WORKLOADS
from gen_optim import GeNOptimizer, History, ProbeStatus
from tests.training import Training, gen_adamw, mlp, parameters_of, regression_data, same

HALF = [torch.bfloat16, torch.float16]


def low_precision_loss(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    inputs, targets = regression_data()
    with torch.autocast("cpu", dtype):
        return nn.functional.mse_loss(model(inputs), targets)


def scaled_step(
    model: nn.Module,
    optimizer: Optimizer,
    scaler: torch.amp.GradScaler,
    factor: float = 1.0,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor | None:
    optimizer.zero_grad()
    scaler.scale(factor * low_precision_loss(model, dtype)).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    options = {"probe": lambda: low_precision_loss(model, dtype)} if isinstance(optimizer, GeNOptimizer) else {}
    loss = scaler.step(optimizer, **options)
    scaler.update()
    return loss


# --- gradient scaling ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_grad_scaler_steps_it_with_a_probe(dtype: torch.dtype) -> None:
    model = mlp()
    optimizer, scaler = gen_adamw(model.parameters()), torch.amp.GradScaler("cpu")
    before = low_precision_loss(model).item()
    for _ in range(60):
        scaled_step(model, optimizer, scaler, dtype=dtype)
    assert low_precision_loss(model).item() < 0.5 * before
    assert optimizer.last_probe.status not in (ProbeStatus.NON_FINITE_LOSS, ProbeStatus.NON_FINITE_PROBE)


def test_the_base_optimizer_sees_unscaled_and_clipped_gradients() -> None:
    """So that its moments are those of the bare optimizer under the same scaler, wherever it is led."""
    seen: dict[str, list[Tensor]] = {"bare": [], "wrapped": []}
    for name, gradients in seen.items():
        model = mlp()
        base = SGD(model.parameters(), lr=0.1)
        base.register_step_pre_hook(
            lambda *_, to=gradients, of=model: to.extend(p.grad.clone() for p in of.parameters())
        )
        optimizer = base if name == "bare" else GeNOptimizer(base)
        scaled_step(model, optimizer, torch.amp.GradScaler("cpu", init_scale=2.0**10))
    assert same(seen["bare"], seen["wrapped"])
    assert torch.linalg.vector_norm(torch.cat([each.flatten() for each in seen["wrapped"]])).item() <= 1.0 + 1e-5


def test_a_fused_base_optimizer_is_given_unscaled_gradients() -> None:
    """A scaler leaves that to a fused optimizer itself, which here it does not see."""
    model = mlp()
    nn.functional.mse_loss(model(regression_data()[0]), regression_data()[1]).backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    seen: list[Tensor] = []
    base = AdamW(model.parameters(), fused=True)
    base.register_step_pre_hook(lambda *_: seen.extend(parameter.grad.clone() for parameter in model.parameters()))
    optimizer, scaler = GeNOptimizer(base), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer.zero_grad()
    inputs, targets = regression_data()
    scaler.scale(nn.functional.mse_loss(model(inputs), targets)).backward()
    scaler.step(optimizer, probe=lambda: nn.functional.mse_loss(model(inputs), targets))
    assert same(seen, expected)
    assert optimizer.last_probe.status is ProbeStatus.STARTED


def test_lazy_steps_under_a_grad_scaler_are_the_bare_optimizers() -> None:
    bare, wrapped = mlp(), mlp()
    theirs, ours = AdamW(bare.parameters(), lr=1e-2), GeNOptimizer(AdamW(wrapped.parameters(), lr=1e-2))
    scalers = [torch.amp.GradScaler("cpu") for _ in range(2)]
    for _ in range(5):
        scaled_step(bare, theirs, scalers[0])
        ours.zero_grad()
        scalers[1].scale(low_precision_loss(wrapped)).backward()
        scalers[1].unscale_(ours)
        nn.utils.clip_grad_norm_(wrapped.parameters(), 1.0)
        assert scalers[1].step(ours) is None  # no probe, no closure: the base optimizer's step
        scalers[1].update()
    assert same(parameters_of(bare), parameters_of(wrapped))


def test_a_step_that_a_grad_scaler_skips_leaves_it_untouched() -> None:
    model = mlp()
    optimizer, scaler = gen_adamw(model.parameters()), torch.amp.GradScaler("cpu")
    for _ in range(3):
        scaled_step(model, optimizer, scaler)
    kept, remembered, record = parameters_of(model), str(optimizer.state_dict()), optimizer.last_probe
    scale = scaler.get_scale()
    scaled_step(model, optimizer, scaler, factor=float("inf"))
    assert scaler.get_scale() == 0.5 * scale
    assert same(parameters_of(model), kept)
    assert str(optimizer.state_dict()) == remembered
    assert optimizer.last_probe is record
    scaled_step(model, optimizer, scaler)
    assert optimizer.last_probe.step == record.step + 1


@pytest.mark.parametrize("given", ["closure", "probe"])
def test_a_grad_scaler_steps_it_bare_with_what_the_constructor_was_given(given: str) -> None:
    """For frameworks that call ``scaler.step(optimizer)``; gradients are the caller's, computed before."""
    model = mlp()
    optimizer = GeNOptimizer(AdamW(model.parameters()), **{given: lambda: low_precision_loss(model)})
    scaler = torch.amp.GradScaler("cpu")
    seen: list[Tensor] = []
    optimizer.base_optim.register_step_pre_hook(lambda *_: seen.append(model[0].weight.grad.clone()))
    before = low_precision_loss(model).item()
    for _ in range(60):
        optimizer.zero_grad()
        scaler.scale(low_precision_loss(model)).backward()
        scaler.unscale_(optimizer)
        model[0].weight.grad.mul_(0.5)  # what the caller makes of the gradients is what the base optimizer gets
        expected = model[0].weight.grad.clone()
        scaler.step(optimizer)
        assert torch.equal(seen[-1], expected)
        scaler.update()
    assert low_precision_loss(model).item() < 0.5 * before
    assert optimizer.last_probe.status is not ProbeStatus.START_FAILED


# --- autocast --------------------------------------------------------------------------------------------------------


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


RULE_OF = {"approximate": "published", "lookback": "relaxed"}
"""The relaxed rule wants slopes of another batch than the one that the step is made for."""


def final_loss(dtype: torch.dtype, mode: str, *, stored: bool = False, steps: int = 200) -> tuple[float, History]:
    """Train the digits MLP under autocast, or with everything in that dtype."""
    task, history = WORKLOADS["digits-mlp"].make(0, Data()), History()
    if stored:
        task.model.to(dtype)
    optimizer = GeNOptimizer(AdamW(task.model.parameters()), mode=mode, rule=RULE_OF[mode])
    optimizer.register_probe_hook(history)
    is_cast = dtype != torch.float32 and not stored
    return precision.final_loss(task, optimizer, steps, dtype if is_cast else None), history


@pytest.mark.parametrize(
    ("dtype", "mode"),
    [
        (torch.bfloat16, "approximate"),
        (torch.float16, "approximate"),
        (torch.float16, "lookback"),
        (torch.bfloat16, "lookback"),
    ],
)
def test_autocast_trains_as_single_precision_does(dtype: torch.dtype, mode: str) -> None:
    full, full_history = final_loss(torch.float32, mode)
    loss, history = final_loss(dtype, mode)
    assert loss < (1.3 if mode == "approximate" else 2.0) * full
    # Where the horizon ends, little is left to tell one learning rate from another, least of all in low precision.
    assert 1 / 5 < history[-1].lr_after / full_history[-1].lr_after < 5


@pytest.mark.parametrize("mode", ["approximate", "lookback"])
def test_parameters_and_losses_in_bfloat16_train_too(mode: str) -> None:
    full, _ = final_loss(torch.float32, mode)
    loss, history = final_loss(torch.bfloat16, mode, stored=True)
    assert loss < 2.5 * full + 0.01
    seen = statuses(history)
    assert seen.count(ProbeStatus.FITTED) + seen.count(ProbeStatus.CONCAVE) > len(history) / 2


def statuses(history: Iterable[object]) -> list[ProbeStatus]:
    return [record.status for record in history]


def test_a_tiny_learning_rate_under_autocast_is_not_judged_from_noise() -> None:
    """At a three thousandth of what it found, low precision hides the parabola: never cut further, and grown again."""
    for dtype in HALF:
        training = Training.of(gen_adamw)
        inputs, targets = regression_data(512)
        probed: list[ProbeStatus] = []

        def closure(training: Training = training, dtype: torch.dtype = dtype) -> Tensor:
            training.optimizer.zero_grad()
            with torch.autocast("cpu", dtype):
                loss = nn.functional.mse_loss(training.model(inputs), targets)  # noqa: B023
            loss.backward()
            return loss

        for _ in range(60):
            training.optimizer.step(closure)
        training.optimizer.param_groups[0]["lr"] /= 3000.0
        written = training.optimizer.param_groups[0]["lr"]
        training.optimizer.register_probe_hook(lambda _, record, probed=probed: probed.append(record.status))
        for _ in range(80):
            training.optimizer.step(closure)
        hidden = probed.count(ProbeStatus.BELOW_NOISE) + probed.count(ProbeStatus.CONCAVE)
        assert hidden >= len(probed) / 2
        assert training.optimizer.get_last_lr()[0] >= 0.9 * written


@pytest.mark.parametrize("make", [AdamW, lambda p: SGD(p, lr=0.1, momentum=0.9)], ids=["AdamW", "SGD"])
def test_no_parameter_in_bfloat16_changes_by_being_probed(make: type[Optimizer]) -> None:
    """What a frozen step leaves is θ itself: none is restored by arithmetic."""
    model = mlp(dtype=torch.bfloat16)
    optimizer = GeNOptimizer(make(model.parameters()))
    training = Training(model, optimizer, *regression_data(dtype=torch.bfloat16))
    training.train(10)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 0.0)
    before = parameters_of(model)
    probes = training.probes
    training.train(10, scheduler)
    assert training.probes > probes
    assert same(parameters_of(model), before)
