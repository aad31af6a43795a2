"""Results of a battery that nobody has run: cheap cells, records with losses of one's choice."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.battery.config import Config, cells
from benchmarks.battery.records import Record, Results
from benchmarks.battery.study import Study
from benchmarks.data import Data
from benchmarks.workloads import BATTERY

DATA = Data()
CHEAP = {name: BATTERY[name] for name in ("beale", "quadratic")}


def tiny(method: str = "bare", lr: float | None = 1e-2, workload: str = "beale", steps: int = 3) -> Config:
    cell = next(cell for cell in cells({workload: BATTERY[workload]}, DATA, steps) if cell.base == "SGD")
    return cell.config(method, "linear", lr, 0)


def record(config: Config, loss: float = 1.0, **values: object) -> Record:
    fields = {
        "train_loss": loss,
        "validation_loss": loss,
        "initial_train_loss": 10.0,
        "initial_validation_loss": 10.0,
        "diverged": not loss <= 10.0,
        "steps": (1, 2),
        "losses": (9.0, loss),
        "learning_rates": (1e-3, 1e-2),
        "extra_forwards": 1,
        "total_seconds": 0.5,
    }
    return Record(config=config, **{**fields, **values})


def everything(loss: Callable[[Config], float], study: Study) -> Results:
    """Results of a whole study, without a run; averaged weights have half the loss."""
    results = Results()
    while True:
        todo = [each for _, configs in study.stages(results) for each in configs if each not in results]
        if not todo:
            return results
        for config in todo:
            averaged = (0.5 * loss(config),) if config.schedule == "constant" else ()
            results.add(record(config, loss(config), averaged_validation_losses=averaged))
