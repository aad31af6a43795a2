"""Learning-rate-free optimizers of others, at the settings that their READMEs recommend, imported where used.

A package that is not installed costs its columns, nothing else.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import SGD, AdamW, Optimizer

from benchmarks.battery.config import SCHEDULES, Config
from benchmarks.battery.methods import (
    METHODS,
    MOMENTUM,
    WEIGHT_DECAY,
    Closure,
    Method,
    OurStepper,
    Stepper,
    base_optimizer,
)
from benchmarks.battery.task import Batch, Task
from gen_optim import GeNOptimizer

_SPARE = 7919
"""Added to a run's seed for batches of a peer's own, so that the training batches stay the same for all."""


def _quietly(make: Callable[[], Any]) -> Any:
    """Some constructors and probes print."""
    with contextlib.redirect_stdout(io.StringIO()):
        return make()


def _has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(module, _BatchNorm) for module in model.modules())


# --- Prodigy and D-Adaptation: lr = 1 times an estimate d -----------------------------------------------------------


class _Estimated(Stepper):
    def lr(self) -> float:
        """The estimate times its multiplier."""
        group = self.optimizer.param_groups[0]
        return float(group["d"]) * float(group["lr"])


def _prodigy(task: Task, config: Config) -> Stepper:
    prodigy = import_module("prodigyopt").Prodigy
    guarded = config.method == "prodigy-guarded"
    return _Estimated(
        _quietly(
            lambda: prodigy(
                task.parameters(),
                lr=1.0,
                weight_decay=WEIGHT_DECAY,
                use_bias_correction=guarded,
                safeguard_warmup=guarded,
            )
        )
    )


def _d_adaptation(task: Task, config: Config) -> Stepper:
    package = import_module("dadaptation")
    if config.base == "SGD":
        return _Estimated(package.DAdaptSGD(task.parameters(), lr=1.0, momentum=MOMENTUM))
    return _Estimated(
        _quietly(lambda: package.DAdaptAdam(task.parameters(), lr=1.0, weight_decay=WEIGHT_DECAY, decouple=True))
    )


# --- Schedule-free ---------------------------------------------------------------------------------------------------


class _ScheduleFree(Stepper):
    optimizer: Any

    def __init__(self, optimizer: Any, spare: Iterator[Batch]) -> None:
        super().__init__(optimizer)
        self.spare = spare
        optimizer.train()

    def finish(self, task: Task) -> nn.Module:
        """Moves the parameters to the average; statistics of batch normalisation are taken anew there."""
        self.optimizer.eval()
        if _has_batch_norm(task.model):
            with torch.no_grad():
                for batch in itertools.islice(self.spare, 50):
                    task.loss(task.model, batch)
        return task.model


def _schedule_free(task: Task, config: Config) -> Stepper:
    package = import_module("schedulefree")
    spare = task.batches(config.seed + _SPARE)
    warmup = config.steps // 20
    if config.method == "schedule-free-radam":
        return _ScheduleFree(package.RAdamScheduleFree(task.parameters(), weight_decay=WEIGHT_DECAY), spare)
    if config.base == "SGD":
        optimizer = package.SGDScheduleFree(task.parameters(), lr=1.0, momentum=MOMENTUM, warmup_steps=warmup)
    else:
        optimizer = package.AdamWScheduleFree(
            task.parameters(), lr=0.0025, weight_decay=WEIGHT_DECAY, warmup_steps=warmup
        )
    return _ScheduleFree(optimizer, spare)


# --- DoG -------------------------------------------------------------------------------------------------------------


class _DoG(Stepper):
    def __init__(self, optimizer: Optimizer, averager: Any) -> None:
        super().__init__(optimizer)
        self.averager = averager

    def step(self, closure: Closure) -> None:
        """A step, and the average of the iterates."""
        super().step(closure)
        self.averager.step()

    def lr(self) -> float:
        """The distance over gradients, of the first parameter where each has its own."""
        eta = self.optimizer.param_groups[0].get("eta")
        if eta is None:
            return float("nan")
        return float(eta[0] if isinstance(eta, (list, tuple)) else eta)

    def finish(self, task: Task) -> nn.Module:
        """The average."""
        averaged = self.averager.averaged_model
        assert isinstance(averaged, nn.Module)
        return averaged


def _dog(task: Task, config: Config) -> Stepper:
    package = import_module("dog")
    make = package.LDoG if config.method == "ldog" else package.DoG
    start = 1e-4 if _has_batch_norm(task.model) else 1e-6
    return _DoG(make(task.parameters(), reps_rel=start), package.PolynomialDecayAverager(task.model))


# --- MoMo ------------------------------------------------------------------------------------------------------------


class _MoMo(Stepper):
    optimizer: Any

    def step(self, closure: Closure) -> None:
        """A step, which needs the loss."""
        self.optimizer.step(loss=closure().detach())

    def lr(self) -> float:
        """Not told: ``lr`` is only its upper limit."""
        return float("nan")


def _momo(task: Task, config: Config) -> Stepper:
    package = import_module("momo")
    if config.base == "SGD":
        return _MoMo(package.Momo(task.parameters(), lr=1.0, beta=MOMENTUM))
    return _MoMo(package.MomoAdam(task.parameters(), lr=1e-2, weight_decay=WEIGHT_DECAY))


# --- Mechanic --------------------------------------------------------------------------------------------------------


class _Mechanized(Stepper):
    def lr(self) -> float:
        """The tuner's scale times the learning rate."""
        scale = self.optimizer.state["_mechanic"]["s"].sum()  # type: ignore[index]
        return float(scale) * super().lr()


def _mechanic(task: Task, config: Config) -> Stepper:
    mechanize = import_module("mechanic_pytorch").mechanize
    if config.base == "SGD":
        return _Mechanized(mechanize(SGD)(task.parameters(), lr=1.0, momentum=MOMENTUM))
    return _Mechanized(mechanize(AdamW)(task.parameters(), lr=1.0, weight_decay=WEIGHT_DECAY))


# --- The paper authors' own package ----------------------------------------------------------------------------------


class _Probed(nn.Module):
    """A model whose output has its loss, as the package's language tasks want it."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.model, self.task, self.calls = task.model, task, 0

    def forward(self, *, batch: Batch) -> Any:
        """The loss on a batch, as ``.loss``."""
        self.calls += 1
        with torch.set_grad_enabled(self.task.differentiates):
            return _Output(self.task.loss(self.model, batch).detach())


@dataclass(frozen=True)
class _Output:
    loss: Tensor


class _Movable(dict[str, Any]):
    def to(self, device: str) -> _Movable:
        """All is on one device."""
        return self


class _PaperAuthors(Stepper):
    """Their training loop: ``lr_parabola`` between ``backward()`` and ``step()``, here at every eighth step."""

    takes_schedule = False
    period = 8

    def __init__(self, optimizer: Optimizer, task: Task, config: Config) -> None:
        super().__init__(optimizer)
        self.choose = import_module("GeN").lr_parabola
        self.net = _Probed(task)
        self.batches = (_Movable(batch=batch) for batch in task.batches(config.seed + _SPARE))
        self.taken, self.config = 0, config

    def step(self, closure: Closure) -> None:
        """A step, and every eighth time a parabola before it."""
        closure()
        factor = SCHEDULES[self.config.schedule](self.taken, self.config.steps)
        self.taken += 1
        if self.taken % self.period == 0:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                _quietly(
                    lambda: self.choose(
                        self.net, self.optimizer, tr_iter=self.batches, device="cpu", task="NLU", scale=factor
                    )
                )
        self.extra_forwards = self.net.calls
        self.optimizer.step()


def _paper_authors(task: Task, config: Config) -> Stepper:
    return _PaperAuthors(base_optimizer(task, config.base, 1e-2 if config.base == "SGD" else 1e-4), task, config)


_DECAY = f"weight decay {WEIGHT_DECAY:g} as in AdamW"

# --- a rule of others, on our measurements ----------------------------------------------------------------------------


def _edge(task: Task, config: Config) -> Stepper:
    base = base_optimizer(task, config.base, 1e-3)  # for its first parabola alone
    return OurStepper(GeNOptimizer(base, rule="cdat", mode="approximate", period=1))


PEERS = (
    Method(
        name="prodigy",
        title="Prodigy",
        bases=("AdamW",),
        schedules=("constant", "cosine"),
        build=_prodigy,
        package=("prodigyopt", "prodigyopt"),
        note=f"lr 1, {_DECAY}; no schedule or cosine, as its README recommends",
    ),
    Method(
        name="prodigy-guarded",
        title="Prodigy, guarded",
        bases=("AdamW",),
        schedules=("constant", "cosine"),
        build=_prodigy,
        package=("prodigyopt", "prodigyopt"),
        note="with bias correction and safeguarded warm-up",
    ),
    Method(
        name="d-adaptation",
        title="D-Adaptation",
        bases=("SGD", "AdamW"),
        schedules=("constant", "linear"),
        build=_d_adaptation,
        package=("dadaptation", "dadaptation"),
        note=f"lr 1; DAdaptSGD with momentum {MOMENTUM:g}, DAdaptAdam with decoupled {_DECAY}",
    ),
    Method(
        name="schedule-free",
        title="schedule-free",
        bases=("SGD", "AdamW"),
        schedules=("constant",),
        build=_schedule_free,
        package=("schedulefree", "schedulefree"),
        note=f"default learning rates (SGD 1, AdamW 0.0025), {_DECAY}, warm-up over 5 % of the steps; "
        "batch statistics taken anew at the end, as its README asks",
    ),
    Method(
        name="schedule-free-radam",
        title="schedule-free RAdam",
        bases=("AdamW",),
        schedules=("constant",),
        build=_schedule_free,
        package=("schedulefree", "schedulefree"),
        note=f"defaults, {_DECAY}",
    ),
    Method(
        name="dog",
        title="DoG",
        bases=("SGD",),
        schedules=("constant",),
        build=_dog,
        package=("dog-optimizer", "dog"),
        note="with its averaging of iterates; first step 1e-6, with batch normalisation 1e-4, as its README recommends",
    ),
    Method(
        name="ldog",
        title="L-DoG",
        bases=("SGD",),
        schedules=("constant",),
        build=_dog,
        package=("dog-optimizer", "dog"),
        note="likewise, layer by layer",
    ),
    Method(
        name="momo",
        title="MoMo",
        bases=("SGD", "AdamW"),
        schedules=("constant",),
        build=_momo,
        package=("momo-opt", "momo"),
        note=f"Momo with lr 1, MomoAdam with lr 0.01 and {_DECAY}; lower bound 0",
    ),
    Method(
        name="mechanic",
        title="Mechanic",
        bases=("SGD", "AdamW"),
        schedules=("constant", "linear"),
        build=_mechanic,
        package=("mechanic-pytorch", "mechanic_pytorch"),
        note="defaults, on SGD with momentum and on AdamW, lr 1",
    ),
    Method(
        name="gen-optim",
        title="gen-optim 0.1.1",
        bases=("SGD", "AdamW"),
        schedules=("constant", "linear"),
        build=_paper_authors,
        package=("gen-optim", "GeN"),
        note="the paper authors' package: AdamW from 1e-4 as in its README, SGD (not named there) from 1e-2, a "
        "parabola every 8 steps on a batch of its own, its `scale` for the horizon",
    ),
    Method(
        name="cdat",
        title="CDAT",
        bases=("SGD", "AdamW"),
        schedules=("constant", "linear"),
        build=_edge,
        note="the rule of arXiv:2407.06183 on the edge (2) with averages of 0.9, as a rule of ours: "
        '`rule="cdat", mode="approximate", period=1`, from 1e-3',
    ),
)

for _peer in PEERS:
    METHODS[_peer.name] = _peer
