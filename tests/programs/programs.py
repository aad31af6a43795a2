"""Small training programs, written as users write them.

Each program trains a small model and returns the loss that it reached. It makes its optimizers with
:meth:`Run.optimizer` and registers its models with :meth:`Run.model`; ``test_programs`` runs it with the bare and with
the wrapped optimizer and compares. A program uses the public interface only.
"""

from __future__ import annotations

import copy
import io
import math
import random
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, Normal
from torch.nn import functional
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    LambdaLR,
    LinearLR,
    MultiStepLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)
from torch.optim.swa_utils import AveragedModel

from gen_optim import GeNOptimizer

BASES: dict[str, Callable[..., Optimizer]] = {
    "sgd": lambda parameters, **options: SGD(parameters, momentum=0.9, **options),
    "adamw": AdamW,
}


@dataclass
class Run:
    """One run of a program.

    Attributes:
        base: Name of the base optimizer, "sgd" or "adamw".
        lr: The learning rate given to the base optimizer: a decent one if it runs bare, 1e-3 if it is wrapped.
        is_wrapped: Whether the optimizers are wrapped.
        models: The models that the program registered.
    """

    base: str
    lr: float
    is_wrapped: bool
    models: list[nn.Module] = field(default_factory=list)

    def optimizer(self, parameters: Iterable[Any], *, scale: float = 1.0, **options: Any) -> Any:
        """Make an optimizer whose learning rate is ``scale`` times that of the run."""
        base = BASES[self.base](parameters, **{"lr": scale * self.lr, **options})
        return GeNOptimizer(base) if self.is_wrapped else base

    def model(self, model: nn.Module) -> Any:
        """Register a model, whose hooks are compared before and after."""
        self.models.append(model)
        return model

    def net(self, inputs: int = 4, outputs: int = 1, width: int = 16) -> Any:
        """Make and register a network with one hidden layer."""
        return self.model(nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, outputs)))

    def averaged(self, optimizer: Any) -> AbstractContextManager[None]:
        """Have averaged weights to evaluate, as one does without a scheduler; a bare optimizer has none."""
        return optimizer.averaged() if self.is_wrapped else nullcontext()  # type: ignore[no-any-return]

    def step(self, optimizer: Any, probe: Callable[[], Tensor]) -> None:
        """Take a step after the loop has called ``backward()``."""
        optimizer.step(probe=probe) if self.is_wrapped else optimizer.step()


@dataclass(frozen=True)
class Program:
    """A program with a decent learning rate per base optimizer.

    Attributes:
        run: Runs it and returns the loss reached.
        lrs: Learning rates of the bare optimizer, by name of the base optimizer.
        fails: Why it fails today, by name of the base optimizer.
    """

    run: Callable[[Run], float]
    lrs: dict[str, float]
    fails: dict[str, str]


PROGRAMS: dict[str, Program] = {}


def program(
    sgd: float | None, adamw: float | None, fails: dict[str, str] | str = ""
) -> Callable[[Callable[[Run], float]], Callable[[Run], float]]:
    """Add a function to the list; a learning rate of None leaves a base optimizer out."""
    lrs = {name: lr for name, lr in (("sgd", sgd), ("adamw", adamw)) if lr is not None}
    reasons = fails if isinstance(fails, dict) else dict.fromkeys(lrs, fails) if fails else {}

    def add(run: Callable[[Run], float]) -> Callable[[Run], float]:
        PROGRAMS[run.__name__] = Program(run, lrs, reasons)
        return run

    return add


# --- data ------------------------------------------------------------------------------------------------------------


class Data:
    """A regression problem with noise: y = sin(x · w) + x · v + noise."""

    def __init__(self, size: int = 512, features: int = 4, noise: float = 0.3) -> None:
        w, v = torch.randn(features), torch.randn(features)
        self.x = torch.randn(size, features)
        self.y = (torch.sin(self.x @ w) + self.x @ v + noise * torch.randn(size))[:, None]

    def batches(self, steps: int, size: int = 32) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(steps):
            chosen = torch.randint(len(self.x), (size,))
            yield self.x[chosen], self.y[chosen]

    def loss(self, model: Callable[[Tensor], Tensor]) -> float:
        with torch.no_grad():
            return functional.mse_loss(model(self.x), self.y).item()


def closure_of(optimizer: Any, loss_of: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The closure that torch's documentation shows."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        return loss

    return closure


def fit(model: Any, optimizer: Any, batches: Iterable[tuple[Tensor, Tensor]], *schedulers: Any) -> None:
    """Train on batches, with any schedulers stepped after each."""
    for x, y in batches:
        optimizer.step(closure_of(optimizer, lambda x=x, y=y: functional.mse_loss(model(x), y)))  # type: ignore[misc]
        for scheduler in schedulers:
            scheduler.step()


def fit_with(run: Run, make_scheduler: Callable[[Any], Any], steps: int = 300) -> float:
    """Train a network under a scheduler."""
    data, model = Data(), run.net()
    optimizer = run.optimizer(model.parameters())
    fit(model, optimizer, data.batches(steps), make_scheduler(optimizer))
    return data.loss(model)


# --- schedulers ------------------------------------------------------------------------------------------------------


@program(sgd=0.05, adamw=0.03)
def cosine_with_warm_restarts(run: Run) -> float:
    return fit_with(run, lambda optimizer: CosineAnnealingWarmRestarts(optimizer, T_0=100), steps=350)


@program(sgd=0.05, adamw=0.03)
def cosine_past_its_period(run: Run) -> float:
    return fit_with(run, lambda optimizer: CosineAnnealingLR(optimizer, T_max=100), steps=320)


@program(sgd=0.05, adamw=0.03)
def cyclic_learning_rate(run: Run) -> float:
    return fit_with(
        run, lambda optimizer: CyclicLR(optimizer, run.lr / 100, run.lr, step_size_up=50, cycle_momentum=False)
    )


@program(sgd=0.1, adamw=0.05)
def one_cycle(run: Run) -> float:
    return fit_with(run, lambda optimizer: OneCycleLR(optimizer, run.lr, total_steps=301))


@program(sgd=0.05, adamw=0.03)
def second_warmup_in_the_middle(run: Run) -> float:
    def scheduler(optimizer: Any) -> Any:
        down, up = LinearLR(optimizer, 1.0, 0.001, 150), LinearLR(optimizer, 0.001, 1.0, 20)
        return SequentialLR(optimizer, [down, up], [150])

    return fit_with(run, scheduler)


@program(sgd=0.05, adamw=0.03)
def factor_that_is_zero_at_times(run: Run) -> float:
    return fit_with(run, lambda optimizer: LambdaLR(optimizer, lambda step: float(step % 20 != 0)))


@program(sgd=0.05, adamw=0.03)
def plateau_reduction_that_is_undone(run: Run) -> float:
    data, model = Data(), run.net()
    optimizer = run.optimizer(model.parameters())
    scheduler = ReduceLROnPlateau(optimizer, factor=0.1, patience=2)
    for epoch in range(10):
        before = optimizer.param_groups[0]["lr"]
        fit(model, optimizer, data.batches(30))
        scheduler.step(data.loss(model) if epoch != 5 else math.inf)
        if epoch == 6:
            optimizer.param_groups[0]["lr"] = before
    return data.loss(model)


@program(sgd=0.03, adamw=0.03)
def learning_rate_as_a_new_tensor_at_each_step(run: Run) -> float:
    """A manual value at each step, which the wrapper uses as it is."""
    data, model = Data(), run.net()
    optimizer = run.optimizer(model.parameters())
    for step, batch in enumerate(data.batches(300)):
        optimizer.param_groups[0]["lr"] = torch.tensor(0.03 * (1 - step / 300))
        fit(model, optimizer, [batch])
    return data.loss(model)


# --- parameter groups ------------------------------------------------------------------------------------------------


@program(
    sgd=0.05,
    adamw=0.03,
    fails={"sgd": "2.5 times the loss with one thread: one seed of three ends four times above the bare one"},
)
def body_unfrozen_at_the_learning_rate_shown(run: Run) -> float:
    data, model = Data(), run.net()
    body, head = model[0], model[2]
    optimizer = run.optimizer(head.parameters())
    scheduler = ConstantLR(optimizer, 1.0)
    fit(model, optimizer, data.batches(50), scheduler)
    optimizer.add_param_group({"params": body.parameters(), "lr": optimizer.param_groups[0]["lr"]})
    fit(model, optimizer, data.batches(200), scheduler)
    return data.loss(model)


@program(
    sgd=0.05,
    adamw=0.03,
    fails={"sgd": "2.5 times the loss with one thread: one seed of three ends four times above the bare one"},
)
def body_that_is_frozen_at_first(run: Run) -> float:
    data, model = Data(), run.net()
    optimizer = run.optimizer(model.parameters())
    model[0].requires_grad_(False)
    fit(model, optimizer, data.batches(50))
    model[0].requires_grad_(True)
    fit(model, optimizer, data.batches(200))
    return data.loss(model)


@program(
    sgd=0.02,
    adamw=0.03,
    fails={"sgd": "5 times the loss: one seed of three ends 44 times above the bare one"},
)
def two_adapters_in_turn(run: Run) -> float:
    """One optimizer over two low-rank adapters, one of which is frozen at every other step."""
    data = Data()
    body, left, right = run.net(4, 8), run.model(nn.Linear(8, 1)), run.model(nn.Linear(4, 1))
    body.requires_grad_(False)
    optimizer = run.optimizer([*left.parameters(), *right.parameters()])

    def model(x: Tensor) -> Tensor:
        return left(body(x)) + right(x)

    for step, batch in enumerate(data.batches(400)):
        left.requires_grad_(step % 2 == 0)
        right.requires_grad_(step % 2 == 1)
        fit(model, optimizer, [batch])
    return data.loss(model)


@program(
    sgd=0.05,
    adamw=0.03,
    fails={"sgd": "9.7 times the loss: the burn-in moves all centers out of reach, where gradients vanish"},
)
def parameters_replaced_in_groups(run: Run) -> float:
    """Densification: points are added now and then, as when Gaussians are split."""
    data = Data(features=2, noise=0.3)
    x, y = data.x, data.y[:, 0]
    centers, heights = nn.Parameter(torch.randn(4, 2)), nn.Parameter(torch.zeros(4))
    optimizer = run.optimizer([{"params": [centers]}, {"params": [heights]}])

    def loss_of() -> Tensor:
        chosen = torch.randint(len(x), (64,))
        centers, heights = (group["params"][0] for group in optimizer.param_groups)
        weights = torch.exp(-torch.cdist(x[chosen], centers).square() / 2)
        return (weights @ heights - y[chosen]).square().mean()

    losses = []
    for step in range(400):
        if step % 80 == 79 and step < 300:
            for group in optimizer.param_groups:
                old = group["params"][0]
                group["params"][0] = nn.Parameter(torch.cat([old.detach(), old.detach()[:2] + 0.1]))
                optimizer.state.pop(old, None)
        losses.append(optimizer.step(closure_of(optimizer, loss_of)).item())
    return sum(losses[-50:]) / 50


# --- losses without a lowest point -----------------------------------------------------------------------------------


@program(sgd=0.02, adamw=0.02)
def entropy_temperature(run: Run) -> float:
    """The temperature of soft actor-critic: its loss is linear in it, and the entropy answers to it."""
    log_alpha = nn.Parameter(torch.zeros(()))
    optimizer = run.optimizer([log_alpha])
    for _ in range(300):
        entropy = log_alpha.detach() + 0.3 * torch.randn(32)
        optimizer.step(closure_of(optimizer, lambda e=entropy: (log_alpha * (e - 1.5)).mean()))  # type: ignore[misc]
    return 0.02 + (log_alpha.item() - 1.5) ** 2


@program(
    sgd=None,
    adamw=0.02,
    fails={"adamw": "1400 times the loss: the learning rate grows while the slopes along the multiplier agree"},
)
def lagrange_multiplier(run: Run) -> float:
    """Minimize |x − 1|² subject to Σ x = 1; the multiplier's optimizer maximizes."""
    x, multiplier = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(()))
    primal, dual = run.optimizer([x]), run.optimizer([multiplier], maximize=True)

    def lagrangian() -> Tensor:
        return (x - 1 + 0.1 * torch.randn(4)).square().sum() + multiplier * (x.sum() - 1)

    for _ in range(400):
        primal.step(closure_of(primal, lagrangian))
        dual.step(closure_of(dual, lagrangian))
    return 0.02 + (x.detach() - 0.25).square().sum().item()


@program(sgd=0.5, adamw=0.05)
def policy_gradient(run: Run) -> float:
    """REINFORCE on a bandit with ten arms; returns 1 − the expected reward."""
    rewards = torch.linspace(0.0, 1.0, 10)
    logits = nn.Parameter(torch.zeros(10))
    optimizer = run.optimizer([logits])
    for _ in range(300):
        arms = torch.multinomial(logits.detach().softmax(0), 32, replacement=True)
        reward = rewards[arms] + 0.1 * torch.randn(32)
        advantage = reward - reward.mean()
        optimizer.step(closure_of(optimizer, lambda a=arms, r=advantage: -(logits.log_softmax(0)[a] * r).mean()))  # type: ignore[misc]
    return 1.05 - float(logits.detach().softmax(0) @ rewards)


@program(
    sgd=None,
    adamw=0.005,
    fails={
        "adamw": "35 times the loss: the generator overshoots, its learning rate grows while the critic lags behind"
    },
)
def critic_with_clipped_weights(run: Run) -> float:
    """A Wasserstein GAN in one dimension; the generator shifts noise to 2."""
    shift, critic = nn.Parameter(torch.zeros(())), run.net(1, 1)
    player, judge = run.optimizer([shift]), run.optimizer(critic.parameters())
    for _ in range(150):
        real, noise = 2 + torch.randn(32, 1), torch.randn(32, 1)
        judge.step(closure_of(judge, lambda r=real, n=noise: critic(n + shift.detach()).mean() - critic(r).mean()))  # type: ignore[misc]
        with torch.no_grad():
            for weight in critic.parameters():
                weight.clamp_(-0.5, 0.5)
        player.step(closure_of(player, lambda n=noise: -critic(n + shift).mean()))  # type: ignore[misc]
    return 0.1 + (shift.item() - 2) ** 2


@program(sgd=0.02, adamw=0.02)
def maximum_of_something_unbounded(run: Run) -> float:
    """Maximize a mean return; the loop keeps the weights on the unit sphere."""
    mean = torch.linspace(-1, 1, 8)
    weights = nn.Parameter(torch.full((8,), 8**-0.5))
    optimizer = run.optimizer([weights], maximize=True)
    for _ in range(300):
        returns = mean + 0.5 * torch.randn(16, 8)
        optimizer.step(closure_of(optimizer, lambda r=returns: (r @ weights).mean()))  # type: ignore[misc]
        with torch.no_grad():
            weights.div_(weights.norm().clamp(min=1.0))
    return 0.05 + float(mean.norm() - mean @ weights.detach())


# --- several steps on one batch, closures that change ----------------------------------------------------------------


@program(sgd=0.007, adamw=0.007)
def several_epochs_on_each_rollout(run: Run) -> float:
    """PPO's way with data: eight steps on one batch, then the next batch."""
    data, model = Data(noise=1.0), run.net(width=32)
    optimizer = run.optimizer(model.parameters())
    for batch in data.batches(60, size=16):
        fit(model, optimizer, [batch] * 8)
    return data.loss(model)


@program(sgd=0.05, adamw=0.03)
def closure_that_draws_its_batch(run: Run) -> float:
    data, model = Data(noise=1.0), run.net()
    optimizer = run.optimizer(model.parameters())
    loader = data.batches(10_000)

    def loss_of() -> Tensor:
        x, y = next(loader)
        return functional.mse_loss(model(x), y)

    for _ in range(300):
        optimizer.step(closure_of(optimizer, loss_of))
    return data.loss(model)


@program(sgd=0.05, adamw=0.03)
def closure_that_steps_another_optimizer(run: Run) -> float:
    data, model, bias = Data(), run.net(), nn.Parameter(torch.zeros(()))
    optimizer, inner = run.optimizer(model.parameters()), SGD([bias], lr=0.02)

    for x, y in data.batches(300):

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            inner.zero_grad()
            loss = functional.mse_loss(model(x) + bias, y)
            loss.backward()
            inner.step()
            return loss

        optimizer.step(closure)
    return data.loss(lambda x: model(x) + bias)


@program(sgd=0.05, adamw=0.03)
def recurrent_state_carried_over(run: Run) -> float:
    """Truncated backpropagation through time: the closure keeps the hidden state for the next batch."""
    cell, out = run.model(nn.RNNCell(1, 16)), run.model(nn.Linear(16, 1))
    optimizer = run.optimizer([*cell.parameters(), *out.parameters()])
    hidden, losses = torch.zeros(8, 16), []
    phase = torch.rand(8) * 6
    for step in range(200):
        times = (step * 5 + torch.arange(6.0))[:, None] * 0.5 + phase
        wave = torch.sin(times)[..., None] + 0.2 * torch.randn(6, 8, 1)

        def closure(wave: Tensor = wave) -> Tensor:
            nonlocal hidden
            optimizer.zero_grad()
            state, loss = hidden, torch.zeros(())
            for now, then in pairwise(wave):
                state = cell(now, state)
                loss = loss + functional.mse_loss(out(state), then) / 5
            loss.backward()
            hidden = state.detach()
            return loss

        losses.append(optimizer.step(closure).item())
    return sum(losses[-40:]) / 40


def tasks_in_turn(run: Run, count: int) -> float:
    """One network with a shared body and a head per task; the tasks differ in the scale of their targets."""
    datas = [Data(256) for _ in range(count)]
    for index, data in enumerate(datas):
        data.y *= 3.0**index
    body, heads = run.model(nn.Linear(4, 16)), [run.model(nn.Linear(16, 1)) for _ in range(count)]
    optimizer = run.optimizer([*body.parameters(), *(each for head in heads for each in head.parameters())])
    rounds = zip(*(data.batches(480 // count) for data in datas), strict=True)
    for batches in rounds:
        for head, batch in zip(heads, batches, strict=True):
            fit(lambda x, head=head: head(torch.tanh(body(x))), optimizer, [batch])
    return sum(
        data.loss(lambda x, head=head: head(torch.tanh(body(x))))  # type: ignore[misc]
        for head, data in zip(heads, datas, strict=True)
    )


@program(sgd=0.005, adamw=0.03)
def two_tasks_in_turn(run: Run) -> float:
    return tasks_in_turn(run, 2)


@program(sgd=0.0003, adamw=0.03)
def four_tasks_in_turn(run: Run) -> float:
    return tasks_in_turn(run, 4)


# --- exceptions and losses that are not finite -----------------------------------------------------------------------


@program(
    sgd=0.01,
    adamw=0.02,
    fails={"sgd": "three times the loss: steps beside the wall throw the scale far out, where gradients vanish"},
)
def learned_standard_deviation(run: Run) -> float:
    """``Normal`` raises a ValueError if its scale is not positive."""
    data, model, std = Data(noise=1.0), run.model(nn.Linear(4, 1)), nn.Parameter(torch.ones(()))
    data.y *= 0.2
    optimizer = run.optimizer([*model.parameters(), std])
    for x, y in data.batches(300):
        optimizer.step(closure_of(optimizer, lambda x=x, y=y: -Normal(model(x), std).log_prob(y).mean()))  # type: ignore[misc]
    with torch.no_grad():
        return 1.5 + float(-Normal(model(data.x), std).log_prob(data.y).mean())


@program(sgd=0.01, adamw=0.02)
def learned_loss_weights(run: Run) -> float:
    """Two losses weighted by learned variances, L₁/2σ₁² + L₂/2σ₂² + log σ₁σ₂."""
    data, model, sigma = Data(), run.net(4, 2), nn.Parameter(torch.ones(2))
    optimizer = run.optimizer([*model.parameters(), sigma])

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        errors = (model(x) - torch.cat([y, x.square().sum(1, keepdim=True)], dim=1)).square().mean(0)
        return (errors / (2 * sigma.square()) + sigma.abs().log()).sum()

    for x, y in data.batches(300):
        optimizer.step(closure_of(optimizer, lambda x=x, y=y: loss_of(x, y)))  # type: ignore[misc]
    with torch.no_grad():
        return 2.0 + loss_of(data.x, data.y).item()


@program(sgd=0.05, adamw=0.02)
def cross_entropy_of_raw_probabilities(run: Run) -> float:
    """``binary_cross_entropy`` raises if a probability leaves [0, 1]."""
    rate, probabilities = torch.tensor([0.3, 0.5, 0.6]), nn.Parameter(torch.full((3,), 0.5))
    optimizer = run.optimizer([probabilities], weight_decay=0.0)
    for _ in range(200):
        drawn = torch.bernoulli(rate.expand(32, 3))
        optimizer.step(
            closure_of(optimizer, lambda d=drawn: functional.binary_cross_entropy(probabilities.expand(32, 3), d))  # type: ignore[misc]
        )
    return functional.binary_cross_entropy(probabilities.detach(), rate).item()


@program(
    sgd=0.01,
    adamw=0.02,
    fails={"sgd": "1.5 times the loss or more, depending on rounding: steps beside the wall are long"},
)
def covariance_that_must_be_positive_definite(run: Run) -> float:
    """A Gaussian fitted by its raw covariance matrix, whose Cholesky factorization may fail."""
    factor = torch.tensor([[1.0, 0.0], [0.6, 0.5]])
    mean, raw = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.eye(2))
    optimizer = run.optimizer([mean, raw], weight_decay=0.0)

    def loss_of(drawn: Tensor) -> Tensor:
        covariance = (raw + raw.mT) / 2
        return -MultivariateNormal(mean, covariance, validate_args=False).log_prob(drawn).mean()

    for _ in range(200):
        drawn = torch.randn(64, 2) @ factor.mT + 1
        optimizer.step(closure_of(optimizer, lambda d=drawn: loss_of(d)))  # type: ignore[misc]
    with torch.no_grad():
        return loss_of(torch.randn(4096, 2) @ factor.mT + 1).item()


@program(sgd=0.05, adamw=0.03)
def guard_that_raises_at_a_loss_that_is_not_finite(run: Run) -> float:
    data, model = Data(), run.net()
    optimizer = run.optimizer(model.parameters())

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        loss = functional.mse_loss((8 * model(x)).exp().log() / 8, y)  # overflows at 11
        if not math.isfinite(loss.item()):
            raise FloatingPointError("loss is not finite")
        return loss

    for x, y in data.batches(250):
        optimizer.step(closure_of(optimizer, lambda x=x, y=y: loss_of(x, y)))  # type: ignore[misc]
    with run.averaged(optimizer):
        return data.loss(model)


@program(sgd=0.05, adamw=0.03)
def backward_left_out_if_the_loss_is_not_finite(run: Run) -> float:
    data, model = Data(), run.net()
    optimizer = run.optimizer(model.parameters())
    for step, (x, y) in enumerate(data.batches(250)):
        if step % 40 == 3:
            x[0] = math.inf

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean() + 0 * x.sum()
            if torch.isfinite(loss):
                loss.backward()
            return loss

        optimizer.step(closure)
    with run.averaged(optimizer):
        return data.loss(model)


@program(sgd=0.05, adamw=0.03)
def batches_without_targets(run: Run) -> float:
    """A batch may have no labelled row; its loss is a constant."""
    data, model = Data(), run.net()
    optimizer = run.optimizer(model.parameters())
    for step, (x, y) in enumerate(data.batches(250)):
        is_labelled = torch.rand(len(x)) < (0.0 if step % 20 == 0 else 0.5)

        def closure(x: Tensor = x, y: Tensor = y, chosen: Tensor = is_labelled) -> Tensor:
            optimizer.zero_grad()
            loss = torch.zeros(())
            if chosen.any():
                loss = functional.mse_loss(model(x[chosen]), y[chosen])
                loss.backward()
            return loss

        optimizer.step(closure)
    return data.loss(model)


# --- scales ----------------------------------------------------------------------------------------------------------


@program(sgd=0.001, adamw=0.03)
def summed_losses_of_uneven_batches(run: Run) -> float:
    data, model = Data(), run.net()
    optimizer = run.optimizer(model.parameters())
    for _ in range(300):
        [(x, y)] = data.batches(1, size=random.choice([1, 4, 16, 64]))
        optimizer.step(closure_of(optimizer, lambda x=x, y=y: (model(x) - y).square().sum()))  # type: ignore[misc]
    return data.loss(model)


def scaled(run: Run, factor: float, offset: float = 0.0) -> float:
    """Train on a loss that is multiplied and moved."""
    data, model = Data(), run.net()
    optimizer = run.optimizer(model.parameters())
    for x, y in data.batches(300):
        optimizer.step(closure_of(optimizer, lambda x=x, y=y: factor * functional.mse_loss(model(x), y) + offset))  # type: ignore[misc]
    return data.loss(model)


@program(sgd=0.05, adamw=0.03)
def loss_with_a_large_offset(run: Run) -> float:
    return scaled(run, 1.0, 1e6)


@program(sgd=0.05e30, adamw=None)
def loss_that_is_tiny(run: Run) -> float:
    return scaled(run, 1e-30)


@program(sgd=0.05e-30, adamw=None)
def loss_that_is_huge(run: Run) -> float:
    return scaled(run, 1e30)


@program(sgd=0.05, adamw=0.03)
def parameter_with_harmless_infinities(run: Run) -> float:
    """A mask of −inf is a parameter of the model; its softmax ignores these entries."""
    data, model = Data(features=6), run.net(6)
    mask = nn.Parameter(torch.tensor([0.0, 0.0, 0.0, 0.0, -math.inf, -math.inf]))
    optimizer = run.optimizer([*model.parameters(), mask], weight_decay=0.0)
    data.y = data.y + data.x[:, :1]
    fit(lambda x: model(x * 4 * mask.softmax(0)), optimizer, data.batches(250))
    return data.loss(lambda x: model(x * 4 * mask.softmax(0)))


# --- loops that write to parameters ----------------------------------------------------------------------------------


@program(sgd=0.05, adamw=0.03)
def clamp_after_each_step_that_changes_nothing(run: Run) -> float:
    data, model = Data(), run.net()
    optimizer = run.optimizer(model.parameters())
    for batch in data.batches(300):
        fit(model, optimizer, [batch])
        with torch.no_grad():
            for weight in model.parameters():
                weight.clamp_(-100, 100)
    return data.loss(model)


@program(sgd=0.05, adamw=0.03)
def averaged_weights_and_best_model_kept(run: Run) -> float:
    data, model = Data(), run.net()
    optimizer, average = run.optimizer(model.parameters()), run.model(AveragedModel(model))
    best, state = math.inf, {}
    for _ in range(6):
        for batch in data.batches(40):
            fit(model, optimizer, [batch])
            average.update_parameters(model)
        if data.loss(model) < best:
            best, state = data.loss(model), copy.deepcopy(model.state_dict())
    model.load_state_dict(state)
    return min(data.loss(model), data.loss(average))


# --- loops of other kinds --------------------------------------------------------------------------------------------


@program(
    sgd=0.02,
    adamw=0.03,
    fails={"sgd": "1.7 times the loss on one of two processors: one seed of three ends seven times above the bare one"},
)
def micro_batches_with_clipped_gradients(run: Run) -> float:
    data, model = Data(), run.net()
    optimizer = run.optimizer(model.parameters())
    for _ in range(200):
        batches = list(data.batches(4, size=8))
        optimizer.zero_grad()
        for x, y in batches:
            (functional.mse_loss(model(x), y) / 4).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        run.step(
            optimizer,
            lambda batches=batches: sum(functional.mse_loss(model(x), y) / 4 for x, y in batches),  # type: ignore[misc]
        )
    return data.loss(model)


@program(sgd=0.05, adamw=0.03)
def closure_that_returns_a_number(run: Run) -> float:
    data, model = Data(), run.net()
    optimizer = run.optimizer(model.parameters())
    for x, y in data.batches(250):

        def closure(x: Tensor = x, y: Tensor = y) -> float:
            optimizer.zero_grad()
            loss = functional.mse_loss(model(x), y)
            if loss.requires_grad:  # as in torch's own closures for line searches
                loss.backward()
            return loss.item()

        optimizer.step(closure)
    with run.averaged(optimizer):
        return data.loss(model)


@program(sgd=0.05, adamw=0.03)
def gradients_assigned_from_autograd_grad(run: Run) -> float:
    data, model = Data(), run.net()
    optimizer = run.optimizer(model.parameters())
    for x, y in data.batches(250):

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            loss = functional.mse_loss(model(x), y)
            if torch.is_grad_enabled():
                gradients = torch.autograd.grad(loss, list(model.parameters()))
                for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                    parameter.grad = gradient
            return loss

        optimizer.step(closure)
    with run.averaged(optimizer):
        return data.loss(model)


@program(
    sgd=0.1,
    adamw=0.01,
    fails="1.6 and 6 times the loss: where slopes are noise, the burn-in lowers the learning rate a hundredfold, since "
    "its falls are larger than its growth",
)
def exclusive_or_among_distractors(run: Run) -> float:
    """A target without a linear part: the loss is flat at first, and its slopes are noise."""
    x = torch.randn(512, 8)
    y = torch.sign(x[:, :1] * x[:, 1:2])
    model = run.net(8, width=32)
    optimizer = run.optimizer(model.parameters())
    for _ in range(94):
        for rows in torch.randperm(512).split(32):
            optimizer.step(closure_of(optimizer, lambda rows=rows: functional.mse_loss(model(x[rows]), y[rows])))  # type: ignore[misc]
    with run.averaged(optimizer), torch.no_grad():
        return functional.mse_loss(model(x), y).item()


@program(sgd=0.05, adamw=0.03)
def sharpness_aware_closure(run: Run) -> float:
    """The closure moves the weights uphill for its backward pass, and back."""
    data, model = Data(), run.net()
    optimizer = run.optimizer(model.parameters())
    parameters = list(model.parameters())

    for x, y in data.batches(300):

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            with torch.enable_grad():
                uphill = torch.autograd.grad(functional.mse_loss(model(x), y), parameters)
            radius = 0.05 / torch.nn.utils.get_total_norm(uphill)
            kept = [each.detach().clone() for each in parameters]
            with torch.no_grad():
                for parameter, each in zip(parameters, uphill, strict=True):
                    parameter.add_(radius * each)
            loss = functional.mse_loss(model(x), y)
            loss.backward()
            with torch.no_grad():
                for parameter, each in zip(parameters, kept, strict=True):
                    parameter.copy_(each)
            return loss

        optimizer.step(closure)
    with run.averaged(optimizer):
        return data.loss(model)


@program(sgd=0.02, adamw=0.03)
def gradient_penalty(run: Run) -> float:
    data, model = Data(), run.net()
    optimizer = run.optimizer(model.parameters())

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        output = model(x)
        [slope] = torch.autograd.grad(output.sum(), x, create_graph=True)
        return functional.mse_loss(output, y) + 0.01 * slope.square().sum(1).mean()

    for x, y in data.batches(200):
        optimizer.step(closure_of(optimizer, lambda x=x, y=y: loss_of(x, y)))  # type: ignore[misc]
    with run.averaged(optimizer):
        return data.loss(model)


@program(sgd=0.05, adamw=0.03)
def dropout_and_batch_norm(run: Run) -> float:
    data = Data(noise=0.5)
    model = run.model(nn.Sequential(nn.Linear(4, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 1)))
    optimizer = run.optimizer(model.parameters())
    fit(model, optimizer, data.batches(250, size=64), MultiStepLR(optimizer, [150, 200], 0.1))
    model.eval()
    return data.loss(model)


@program(sgd=0.002, adamw=0.01)
def variational_autoencoder(run: Run) -> float:
    """The closure draws the latent variables."""
    data = torch.randn(512, 2) @ torch.randn(2, 6) + 0.1 * torch.randn(512, 6)
    encoder, decoder = run.net(6, 4), run.net(2, 6)
    optimizer = run.optimizer([*encoder.parameters(), *decoder.parameters()])

    def loss_of(x: Tensor) -> Tensor:
        mean, log_variance = encoder(x).chunk(2, dim=1)
        latent = mean + (log_variance / 2).exp() * torch.randn_like(mean)
        divergence = (mean.square() + log_variance.exp() - log_variance - 1).sum(1) / 2
        return ((decoder(latent) - x).square().sum(1) / 0.5 + divergence).mean()

    for _ in range(300):
        batch = data[torch.randint(512, (64,))]
        optimizer.step(closure_of(optimizer, lambda b=batch: loss_of(b)))  # type: ignore[misc]
    with torch.no_grad():
        return loss_of(data).item()


@program(sgd=0.05, adamw=0.03)
def mixed_precision(run: Run) -> float:
    data, model = Data(), run.net()
    optimizer = run.optimizer(model.parameters())

    def predict(x: Tensor) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(x)

    for x, y in data.batches(200):
        optimizer.step(closure_of(optimizer, lambda x=x, y=y: functional.mse_loss(predict(x).float(), y)))  # type: ignore[misc]
    with run.averaged(optimizer):
        return data.loss(model)


@program(sgd=0.05, adamw=0.03)
def cross_validation(run: Run) -> float:
    """A new model and a new optimizer per fold."""
    data, losses = Data(), []
    for _ in range(3):
        model = run.net()
        optimizer = run.optimizer(model.parameters())
        fit(model, optimizer, data.batches(120))
        losses.append(data.loss(model))
    return sum(losses) / 3


@program(sgd=0.02, adamw=0.03)
def target_network(run: Run) -> float:
    """Q-learning of a random walk with a target network that is copied at times."""
    model, data = run.net(4, 1), Data()
    target = run.model(copy.deepcopy(model))
    optimizer = run.optimizer(model.parameters())
    for step, (x, y) in enumerate(data.batches(300)):
        if step % 30 == 0:
            target.load_state_dict(model.state_dict())
        with torch.no_grad():
            wanted = y + 0.5 * target(x)
        fit(model, optimizer, [(x, wanted)])
    return data.loss(lambda x: 0.5 * model(x))


@program(sgd=0.05, adamw=0.03)
def task_that_changes_half_way(run: Run) -> float:
    before, after, model = Data(), Data(), run.net()
    optimizer = run.optimizer(model.parameters())
    fit(model, optimizer, before.batches(150))
    fit(model, optimizer, after.batches(250))
    return after.loss(model)


# --- checkpoints, interrupts and threads -----------------------------------------------------------------------------


@program(sgd=0.05, adamw=0.03)
def training_that_is_resumed(run: Run) -> float:
    data, model = Data(), run.net()
    optimizer = run.optimizer(model.parameters())
    scheduler = CosineAnnealingLR(optimizer, 300)
    for _ in range(3):
        fit(model, optimizer, data.batches(100), scheduler)
        file = io.BytesIO()
        torch.save([each.state_dict() for each in (model, optimizer, scheduler)], file)
        file.seek(0)
        model = run.net()
        optimizer = run.optimizer(model.parameters())
        scheduler = CosineAnnealingLR(optimizer, 300)
        for each, state in zip((model, optimizer, scheduler), torch.load(file), strict=True):
            each.load_state_dict(state)
    return data.loss(model)


@program(sgd=0.05, adamw=0.03)
def checkpoint_that_does_not_fit(run: Run) -> float:
    """Loading a damaged checkpoint fails, and the program goes on without it."""
    data, model = Data(), run.net()
    optimizer = run.optimizer(model.parameters())
    fit(model, optimizer, data.batches(60))
    broken = copy.deepcopy(optimizer.state_dict())
    del broken["param_groups"][0]["weight_decay"]
    for group in broken["param_groups"]:
        for key in [key for key in group if key.startswith("gen_")]:
            group[key] = "?"
    with suppress(Exception):
        optimizer.load_state_dict(broken)
    optimizer.param_groups[0].setdefault("weight_decay", 0.0)
    fit(model, optimizer, data.batches(200))
    return data.loss(model)


@program(sgd=0.05, adamw=0.03)
def interrupt_that_is_caught(run: Run) -> float:
    """A user presses Ctrl-C now and then to look at the model, and goes on."""
    data, model = Data(), run.net()
    optimizer = run.optimizer(model.parameters())
    calls = 0

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls % 37 == 0:
            raise KeyboardInterrupt
        return functional.mse_loss(model(x), y)

    for x, y in data.batches(300):
        with suppress(KeyboardInterrupt):
            optimizer.step(closure_of(optimizer, lambda x=x, y=y: loss_of(x, y)))  # type: ignore[misc]
    return data.loss(model)


@program(sgd=0.05, adamw=0.03)
def two_trainings_in_two_threads(run: Run) -> float:
    """Two models with attention, each trained by its own thread."""
    losses: list[float] = []

    def train(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(64, 5, 4, generator=generator)
        y = x.mean(dim=1).sum(dim=1, keepdim=True).sin() + 0.3 * torch.randn(64, 1, generator=generator)
        optimizer = run.optimizer(models[seed].parameters())
        for _ in range(100):
            optimizer.step(closure_of(optimizer, lambda: functional.mse_loss(models[seed](x).mean(dim=1)[:, :1], y)))
        losses.append(functional.mse_loss(models[seed](x).mean(dim=1)[:, :1], y).item())

    models = [run.model(nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)) for _ in range(2)]
    threads = [threading.Thread(target=train, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(losses) < 2:
        raise RuntimeError("a thread has failed")
    return sum(losses) / 2
