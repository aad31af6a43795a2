"""One training run, from a configuration to a record."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

import benchmarks.battery.peers  # noqa: F401  # enters them into METHODS, in each process that runs anything
from benchmarks.battery.config import SCHEDULES, Config
from benchmarks.battery.data import Data
from benchmarks.battery.methods import METHODS, OURS, Stepper, code_fingerprint
from benchmarks.battery.record import Record
from benchmarks.battery.task import Task
from benchmarks.battery.workloads import WORKLOADS

POINTS = 50
"""Points of the loss curve and of the trace of learning rates."""


def run(config: Config, data: Data) -> Record:
    """Trains as configured.

    Args:
        config: What to run.
        data: Where examples come from; must be what the configuration names.

    Returns:
        What was seen. An exception in the run is part of it, as ``error``.
    """
    began = time.perf_counter()
    code = code_fingerprint() if config.method in OURS else ""
    try:
        return _run(config, data, began, code)
    except Exception as error:  # noqa: BLE001  # whatever a peer raises must not end the battery, and is kept
        message = f"{type(error).__name__}: {error}"
        return Record(config=config, code=code, error=message, total_seconds=time.perf_counter() - began)


@torch.enable_grad()  # one that fails may have left gradients off
def _run(config: Config, data: Data, began: float, code: str) -> Record:
    workload = WORKLOADS[config.workload]
    source = data.source(workload.data)
    if (source, workload.version) != (config.source, config.version):
        raise ValueError(f"{config.workload} is version {workload.version} on {source}, not as configured: {config}")
    task = workload.make(config.seed, data)
    torch.manual_seed(config.seed)  # dropout and noise in the loss
    stepper = METHODS[config.method].build(task, config)
    initial = task.evaluate(task.model, task.training), task.evaluate(task.model, task.validation)
    trainer = _Trainer(task, stepper, config)
    trainer.train()
    model = stepper.finish(task)
    final = task.evaluate(model, task.training), task.evaluate(model, task.validation)
    diverged = any(not after <= before for before, after in zip(initial, final, strict=True))
    return Record(
        config=config,
        initial_train_loss=initial[0],
        initial_validation_loss=initial[1],
        train_loss=final[0],
        validation_loss=final[1],
        diverged=diverged or not all(map(math.isfinite, final)),
        steps=tuple(trainer.at),
        losses=tuple(trainer.losses),
        learning_rates=() if config.method == "bare" else tuple(trainer.learning_rates),
        extra_forwards=trainer.probes + stepper.extra_forwards,
        seconds=trainer.seconds,
        total_seconds=time.perf_counter() - began,
        code=code,
    )


class _Trainer:
    """The training loop and what it sees."""

    def __init__(self, task: Task, stepper: Stepper, config: Config) -> None:
        self.task, self.stepper, self.config = task, stepper, config
        self.at: list[int] = []
        self.losses: list[float] = []
        self.learning_rates: list[float] = []
        self.probes = 0
        self.seconds = 0.0

    def train(self) -> None:
        task, stepper, steps = self.task, self.stepper, self.config.steps
        optimizer = stepper.optimizer
        factor = SCHEDULES[self.config.schedule]
        # "constant" is no scheduler at all: that is what it shall tell about.
        is_scheduled = stepper.takes_schedule and self.config.schedule != "constant"
        scheduler = LambdaLR(optimizer, lambda step: factor(step, steps)) if is_scheduled else None
        stream = task.batches(self.config.seed)
        interval = max(1, steps // POINTS)
        recent: list[float] = []
        batch = next(stream)
        first: list[Tensor] = []

        def closure() -> Tensor:
            if stepper.is_probing:
                self.probes += 1
            optimizer.zero_grad()
            loss = task.loss(task.model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            if not first:
                first.append(loss.detach())
            return loss

        task.model.train()
        for step in range(1, steps + 1):
            began = time.perf_counter()
            first.clear()
            stepper.step(closure)
            lr = stepper.lr()
            if scheduler is not None:
                scheduler.step()
            loss = float(first[0])
            self.seconds += time.perf_counter() - began
            recent.append(loss)
            if step == 1 or step % interval == 0 or step == steps:
                self.at.append(step)
                self.losses.append(sum(recent) / len(recent))
                self.learning_rates.append(lr)
                recent.clear()
            if not math.isfinite(loss) and self._is_lost():
                break
            batch = next(stream)

    def _is_lost(self) -> bool:
        """Whether no step can bring the model back: a parameter that is NaN stays so."""
        return any(bool(parameter.isnan().any()) for parameter in self.task.parameters())
