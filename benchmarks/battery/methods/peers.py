"""Learning-rate-free optimizers of others, at the settings that their READMEs recommend.

Packages are imported when they are used. One that is not installed only costs its columns.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import math
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from benchmarks import paper_authors
from benchmarks.battery.config import Config
from benchmarks.battery.methods.method import Method
from benchmarks.cdat import CDATRule
from benchmarks.optimizers import MOMENTUM, WEIGHT_DECAY, GeNStepper, base_optimizer
from benchmarks.paper_authors import ParabolaOfTheAuthors
from benchmarks.training import SCHEDULES, Closure, Stepper
from benchmarks.workloads import Batch, Task
from gen_optim import GeNOptimizer

_SPARE = 7919
"""Added to a run's seed for batches that only a peer uses, so that the training batches stay the same for all."""


def _quietly(make: Callable[[], Any]) -> Any:
    """Calls a constructor that prints."""
    with contextlib.redirect_stdout(io.StringIO()):
        return make()


def _has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(module, _BatchNorm) for module in model.modules())


# --- Prodigy and D-Adaptation: lr = 1 times an estimate d -----------------------------------------------------------


class _Estimated(Stepper):
    def lr(self) -> float:
        """Returns the estimate times its multiplier."""
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
        """Moves the parameters to the average, and takes the statistics of batch normalisation again there."""
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
        """Takes a step and updates the average of the iterates."""
        super().step(closure)
        self.averager.step()

    def lr(self) -> float:
        """Returns the distance over gradients, of the first parameter if each has its own."""
        eta = self.optimizer.param_groups[0].get("eta")
        if eta is None:
            return float("nan")
        return float(eta[0] if isinstance(eta, (list, tuple)) else eta)

    def finish(self, task: Task) -> nn.Module:
        """Returns the average."""
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
        """Takes a step, which needs the loss."""
        self.optimizer.step(loss=closure().detach())

    def lr(self) -> float:
        """Returns NaN: the optimizer does not say it, and its ``lr`` is only an upper limit."""
        return float("nan")


def _momo(task: Task, config: Config) -> Stepper:
    package = import_module("momo")
    if config.base == "SGD":
        return _MoMo(package.Momo(task.parameters(), lr=1.0, beta=MOMENTUM))
    return _MoMo(package.MomoAdam(task.parameters(), lr=1e-2, weight_decay=WEIGHT_DECAY))


# --- Mechanic --------------------------------------------------------------------------------------------------------


class _Mechanized(Stepper):
    def lr(self) -> float:
        """Returns the tuner's scale times the learning rate."""
        scale = self.optimizer.state["_mechanic"]["s"].sum()  # type: ignore[index]
        return float(scale) * super().lr()


def _mechanic(task: Task, config: Config) -> Stepper:
    mechanize = import_module("mechanic_pytorch").mechanize
    if config.base == "SGD":
        return _Mechanized(mechanize(SGD)(task.parameters(), lr=1.0, momentum=MOMENTUM))
    return _Mechanized(mechanize(AdamW)(task.parameters(), lr=1.0, weight_decay=WEIGHT_DECAY))


# --- The paper authors' own package ----------------------------------------------------------------------------------


class _PaperAuthors(Stepper):
    """Their training loop: a parabola between ``backward()`` and ``step()``, here at every eighth step."""

    takes_schedule = False
    period = 8

    def __init__(self, optimizer: Optimizer, task: Task, config: Config) -> None:
        super().__init__(optimizer)

        def loss(batch: Batch) -> Tensor:
            with torch.set_grad_enabled(task.differentiates):
                return task.loss(task.model, batch)

        self.parabola = ParabolaOfTheAuthors(task.model, loss, task.batches(config.seed + _SPARE))
        self.taken, self.config = 0, config

    def step(self, closure: Closure) -> None:
        """Takes a step, every eighth time after a parabola."""
        closure()
        factor = SCHEDULES[self.config.schedule](self.taken, self.config.steps)
        self.taken += 1
        if self.taken % self.period == 0:
            self.parabola.set_lr(self.optimizer, scale=factor)
        self.extra_forwards = self.parabola.forwards
        self.optimizer.step()


def _paper_authors(task: Task, config: Config) -> Stepper:
    lr = 1e-2 if config.base == "SGD" else 1e-4
    return _PaperAuthors(base_optimizer(task.parameters(), config.base, lr), task, config)


_DECAY = f"weight decay {WEIGHT_DECAY:g} as in AdamW"

# --- SaLSA: an Armijo line search on averages ------------------------------------------------------------------------


class _SaLSA(Stepper):
    takes_schedule = False
    optimizer: Any

    def __init__(self, optimizer: Any, task: Task) -> None:
        super().__init__(optimizer)
        self.task = task

    def step(self, closure: Closure) -> None:
        """Takes a step, which evaluates the loss again until it has fallen enough."""

        def evaluate(backwards: bool = False) -> Tensor:
            with torch.set_grad_enabled(backwards or self.task.differentiates):
                return closure() if backwards else closure(differentiates=False)

        with contextlib.redirect_stdout(io.StringIO()):
            self.optimizer.step(evaluate)
        self.extra_forwards = self.optimizer.state["n_forwards"] - self.optimizer.state["step"]

    def lr(self) -> float:
        """Returns the step size of the last search."""
        return float(self.optimizer.step_size)


def _salsa(task: Task, _: Config) -> Stepper:
    package = import_module("salsa.SaLSA")
    return _SaLSA(package.SaLSA(task.parameters()), task)


# --- what most people do ---------------------------------------------------------------------------------------------


class _Scheduled(Stepper):
    """An optimizer with a schedule of its own."""

    takes_schedule = False

    def __init__(self, optimizer: Optimizer, scheduler: LRScheduler) -> None:
        super().__init__(optimizer)
        self.scheduler = scheduler
        self._used = math.nan

    def step(self, closure: Closure) -> None:
        """Takes a step, and one of the schedule."""
        super().step(closure)
        self._used = super().lr()
        self.scheduler.step()

    def lr(self) -> float:
        """Returns the learning rate that the last step used."""
        return self._used


def _usual(task: Task, config: Config) -> Stepper:
    optimizer = base_optimizer(task.parameters(), config.base, 1e-3)
    warmup = max(1, config.steps // 20)
    rises = LinearLR(optimizer, 1.0 / warmup, total_iters=warmup)
    falls = CosineAnnealingLR(optimizer, max(1, config.steps - warmup))
    return _Scheduled(optimizer, SequentialLR(optimizer, [rises, falls], [warmup]))


# --- a rule of others, on our measurements ----------------------------------------------------------------------------


def _edge(task: Task, config: Config) -> Stepper:
    base = base_optimizer(task.parameters(), config.base, 1e-3)  # for its first parabola alone
    return GeNStepper(GeNOptimizer(base, rule=CDATRule(period=1), mode="approximate"))


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
        name="salsa",
        title="SaLSA",
        bases=("AdamW",),
        schedules=("constant",),
        build=_salsa,
        package=("SaLSa-Optimizer", "salsa"),
        note="defaults, no weight decay; it seeds random numbers by the clock: runs with dropout or noise differ",
    ),
    Method(
        name="usual",
        title="AdamW at 1e-3",
        bases=("AdamW",),
        schedules=("cosine",),
        build=_usual,
        note="torch's default learning rate, warm-up over 5 % of the steps, then cosine: what most people do",
    ),
    Method(
        name="gen-optim",
        title=paper_authors.TITLE,
        bases=("SGD", "AdamW"),
        schedules=("constant", "linear"),
        build=_paper_authors,
        package=paper_authors.PACKAGE,
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
        '`rule=CDATRule(period=1), mode="approximate"`, from 1e-3',
    ),
)
