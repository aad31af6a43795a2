"""One training run, from a configuration to a record."""

from __future__ import annotations

import math
import time

import torch

from benchmarks.averages import EVERY, evaluate_average, power_law_average
from benchmarks.battery.ablation import without
from benchmarks.battery.config import Config
from benchmarks.battery.methods import METHODS, OURS, code_fingerprint
from benchmarks.battery.records import Record
from benchmarks.data import Data
from benchmarks.training import SCHEDULES, train
from benchmarks.workloads import WORKLOADS, Task

POINTS = 50
"""Points of the loss curve and of the trace of learning rates."""
EVALUATIONS = 20
"""Points of the validation curve of a long run."""
_BETWEEN = 16
"""The least number of steps between them."""
_STATISTICS_SEED = 3 * 10**6
"""Added to a run's seed for the batches that give the statistics of batch normalisation at averaged weights."""


def run(config: Config, data: Data) -> Record:
    """Trains as configured.

    Args:
        config: The run.
        data: Loads the data set, which must be the one that the configuration names.

    Returns:
        What the run showed. An exception in the run is part of it, as ``error``.
    """
    began = time.perf_counter()
    code = code_fingerprint() if config.method in OURS else ""
    try:
        with without(config.options.get("without")):
            return _run(config, data, began, code)
    except Exception as error:  # noqa: BLE001  # whatever a peer raises must not end the battery, and is kept
        message = f"{type(error).__name__}: {error}"
        return Record(config=config, code=code, error=message, total_seconds=time.perf_counter() - began)


@torch.enable_grad()  # a run that failed may have left gradients disabled
def _run(config: Config, data: Data, began: float, code: str) -> Record:
    workload = WORKLOADS[config.workload]
    source = data.source(workload.data)
    if (source, workload.version) != (config.source, config.version):
        raise ValueError(f"{config.workload} is version {workload.version} on {source}, not as configured: {config}")
    task = workload.make(config.seed, data)
    torch.manual_seed(config.seed)  # dropout and noise in the loss
    stepper = METHODS[config.method].build(task, config)
    initial = task.evaluate(task.model, task.training), task.evaluate(task.model, task.validation)

    # "constant" attaches no scheduler at all, since that is the case that it measures.
    is_scheduled = stepper.takes_schedule and config.schedule != "constant"
    factor = SCHEDULES[config.schedule] if is_scheduled else None
    interval = max(1, config.steps // POINTS)
    at, losses, learning_rates, recent = [], [], [], []
    extra_forwards, seconds = 0, 0.0
    curve = None
    if workload.suite == "long":
        curve = _ValidationCurve(task, config, max(_BETWEEN, config.steps // EVALUATIONS))
    elif config.method in OURS and config.schedule == "constant":
        curve = _ValidationCurve(task, config, config.steps)
    for step in train(task, stepper, task.batches(config.seed), steps=config.steps, factor=factor):
        seconds += step.seconds
        extra_forwards = step.extra_forwards
        recent.append(step.loss)
        if step.number == 1 or step.number % interval == 0 or step.number == config.steps:
            at.append(step.number)
            losses.append(sum(recent) / len(recent))
            learning_rates.append(step.lr)
            recent.clear()
        if not math.isfinite(step.loss) and _is_lost(task):
            break
        if curve is not None:
            curve.follow(step.number)

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
        steps=tuple(at),
        losses=tuple(losses),
        learning_rates=() if config.method == "bare" else tuple(learning_rates),
        evaluated=() if curve is None else tuple(curve.at),
        validation_losses=() if curve is None else tuple(curve.losses),
        averaged_validation_losses=() if curve is None else tuple(curve.averaged),
        extra_forwards=extra_forwards,
        seconds=seconds,
        total_seconds=time.perf_counter() - began,
        code=code,
    )


class _ValidationCurve:
    """The validation loss every ``interval`` steps of a run; without a scheduler also that at averaged weights."""

    def __init__(self, task: Task, config: Config, interval: int) -> None:
        self._task, self._config, self._interval = task, config, interval
        self._average = power_law_average(task.model) if config.schedule == "constant" else None
        self.at: list[int] = []
        self.losses: list[float] = []
        self.averaged: list[float] = []

    def follow(self, step: int) -> None:
        """Takes a step into account."""
        if self._average is not None and step % EVERY == 0:
            self._average.update_parameters(self._task.model)
        if step % self._interval == 0 or step == self._config.steps:
            self.at.append(step)
            self.losses.append(self._task.evaluate(self._task.model, self._task.validation))
            if self._average is not None:
                seed = self._config.seed + _STATISTICS_SEED
                self.averaged.append(evaluate_average(self._average, self._task, seed))


def _is_lost(task: Task) -> bool:
    """Whether no step can bring the model back: a parameter that is NaN stays NaN."""
    return any(bool(parameter.isnan().any()) for parameter in task.parameters())
