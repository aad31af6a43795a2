"""Base optimizers as people use them: torch's implementations, tensor learning rates, and those of other people."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from gen_optim import GeNOptimizer, History, ProbeStatus, RelaxedRule
from tests import optimizers_of_others as others
from tests.training import Training, mlp, parameters_of

Make = Callable[[list[nn.Parameter]], Optimizer]


def from_package(package: str, name: str, **options: Any) -> Make:
    def make(parameters: list[nn.Parameter]) -> Optimizer:
        module = pytest.importorskip(package, reason=f"{package} is not installed")
        return getattr(module, name)(parameters, **options)

    return make


def trained(make: Make, steps: int = 60, device: str = "cpu") -> Training:
    training = Training.of(lambda parameters: GeNOptimizer(make(parameters)), mlp().to(device))
    training.inputs, training.targets = training.inputs.to(device), training.targets.to(device)
    training.train(steps)
    return training


# --- torch's own implementations --------------------------------------------------------------------------------------

IMPLEMENTATIONS: dict[str, dict[str, Any]] = {
    "for-loop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}


@pytest.mark.parametrize("make", [Adam, AdamW, SGD], ids=lambda make: make.__name__)
@pytest.mark.parametrize("implementation", ["foreach", "fused"])
def test_every_implementation_comes_to_the_same(make: Callable[..., Optimizer], implementation: str) -> None:
    plain, other = (
        trained(lambda parameters, name=name: make(parameters, lr=0.1, **IMPLEMENTATIONS[name]), steps=20)
        for name in ("for-loop", implementation)
    )
    assert other.optimizer.get_last_lr() == pytest.approx(plain.optimizer.get_last_lr(), rel=1e-3)
    for ours, theirs in zip(parameters_of(other.model), parameters_of(plain.model), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


TENSOR_LR: dict[str, tuple[str, dict[str, Any]]] = {
    "for-loop": ("cpu", {"foreach": False}),
    "fused": ("cpu", {"fused": True}),
    # torch steps these on an accelerator alone.
    "capturable": ("cuda", {"capturable": True}),
    "capturable, foreach": ("cuda", {"capturable": True, "foreach": True}),
    "capturable, fused": ("cuda", {"capturable": True, "fused": True}),
}


@pytest.mark.parametrize(("device", "options"), TENSOR_LR.values(), ids=TENSOR_LR)
def test_a_learning_rate_that_is_a_tensor_stays_that_tensor(device: str, options: dict[str, Any]) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU: torch steps capturable optimizers nowhere else")
    lr = torch.tensor(0.1, device=device)
    tensor = trained(lambda parameters: AdamW(parameters, lr=lr, **options), steps=20, device=device)
    plain = trained(lambda parameters: AdamW(parameters, lr=0.1), steps=20, device=device)
    [group] = tensor.optimizer.param_groups
    assert group["lr"] is lr
    assert lr.item() == pytest.approx(tensor.optimizer.get_last_lr()[0], rel=1e-6)
    assert tensor.optimizer.get_last_lr() == pytest.approx(plain.optimizer.get_last_lr(), rel=1e-3)


# --- other people's --------------------------------------------------------------------------------------------------

TAKEN: dict[str, Make] = {
    "Lion": from_package("lion_pytorch", "Lion", weight_decay=0.01),
    "8-bit AdamW": from_package("bitsandbytes.optim", "AdamW8bit", min_8bit_size=16),
    "8-bit Lion": from_package("bitsandbytes.optim", "Lion8bit", min_8bit_size=16),
    "8-bit SGD": from_package("bitsandbytes.optim", "SGD8bit", lr=0.1, momentum=0.9, min_8bit_size=16),
}


@pytest.mark.parametrize("make", TAKEN.values(), ids=TAKEN)
def test_an_optimizer_of_others_trains(make: Make) -> None:
    model = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 1))
    training = Training.of(lambda parameters: GeNOptimizer(make(parameters)), model)
    history = History()
    training.optimizer.register_probe_hook(history)
    losses = training.train(80)
    assert losses[-1] < 0.8 * losses[0]
    assert sum(record.status is ProbeStatus.FITTED for record in history) > len(history) / 2


@pytest.mark.parametrize("name", ["8-bit AdamW", "8-bit Lion", "8-bit SGD"])
def test_an_8_bit_optimizer_keeps_8_bits(name: str) -> None:
    base = trained(TAKEN[name]).optimizer.base_optim
    assert any(each["state1"].dtype == torch.uint8 for each in base.state.values())


REFUSED: dict[str, Make] = {
    "Prodigy": from_package("prodigyopt", "Prodigy"),
    "Prodigy, guarded": from_package("prodigyopt", "Prodigy", safeguard_warmup=True, use_bias_correction=True),
    "D-Adapted Adam": from_package("dadaptation", "DAdaptAdam"),
    "D-Adapted SGD": from_package("dadaptation", "DAdaptSGD"),
    "D-Adapted Lion": from_package("dadaptation", "DAdaptLion"),
    "schedule-free AdamW": from_package("schedulefree", "AdamWScheduleFree"),
    "schedule-free SGD": from_package("schedulefree", "SGDScheduleFree"),
    "schedule-free RAdam": from_package("schedulefree", "RAdamScheduleFree"),
}


@pytest.mark.parametrize("make", REFUSED.values(), ids=REFUSED)
def test_an_optimizer_that_adapts_its_own_learning_rate_is_refused(make: Make) -> None:
    base = make(list(mlp().parameters()))
    with pytest.raises(ValueError, match=rf"base_optim must.*{type(base).__name__} moves.*Use it bare, or wrap"):
        GeNOptimizer(base)


def test_the_refusal_says_what_is_wrong_if_the_update_is_proportional() -> None:
    base = REFUSED["Prodigy"](list(mlp().parameters()))
    with pytest.raises(ValueError, match=r"after steps at 2 times the learning rate Prodigy moves .*way covered"):
        GeNOptimizer(base)


def test_distance_over_gradients_is_refused() -> None:
    with pytest.raises(ValueError, match=r"DistanceOverGradients moves .*way covered"):
        GeNOptimizer(others.DistanceOverGradients(mlp().parameters()))


def test_weight_decay_in_the_gradient_is_no_memory_of_learning_rates() -> None:
    for decay in (1e-4, 0.1, 1.0):
        for make in (Adam, lambda p, weight_decay: SGD(p, lr=0.1, momentum=0.9, weight_decay=weight_decay)):
            GeNOptimizer(make(mlp().parameters(), weight_decay=decay))


@pytest.mark.filterwarnings("ignore:GeNOptimizer could not check")  # the twin's gradients have no graph
@pytest.mark.filterwarnings("ignore:Using backward")  # torch warns of create_graph=True
@pytest.mark.parametrize("options", [{}, {"mode": "approximate", "rule": "published", "period": 2}], ids=["", "ahead"])
def test_a_base_that_differentiates_gradients_once_more(options: dict[str, Any]) -> None:
    training = Training.of(lambda parameters: GeNOptimizer(others.AdaHessian(parameters, lr=0.1), **options))

    def closure() -> torch.Tensor:
        training.optimizer.zero_grad()
        loss = training.loss()
        loss.backward(create_graph=True)
        return loss

    losses = [training.optimizer.step(closure).detach().item() for _ in range(60)]
    training.optimizer.zero_grad()  # as torch advises: a gradient with a graph refers to its parameter
    assert losses[-1] < 0.5 * losses[0]
    assert training.probes > 10


@pytest.mark.filterwarnings("ignore:GeNOptimizer could not check")
@pytest.mark.filterwarnings("ignore:Using backward")
def test_such_a_base_in_a_loop_is_compared_with_the_average() -> None:
    rule = RelaxedRule(burn_in=2, period=1)
    training = Training.of(lambda parameters: GeNOptimizer(others.AdaHessian(parameters, lr=0.1), rule=rule))
    targets, losses = training.targets, []
    for _ in range(30):
        training.targets = targets + 0.1 * torch.randn_like(targets)  # without noise there is nothing to compare
        training.optimizer.zero_grad()
        loss = training.loss()
        loss.backward(create_graph=True)
        training.optimizer.step(probe=training.loss)
        losses.append(loss.item())
    training.optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert training.optimizer.last_probe.excess_loss is not None
