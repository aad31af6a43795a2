"""Probe hooks for loggers."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from gen_optim import History
from gen_optim.integrations.logging import logging_hook
from gen_optim.integrations.tensorboard import tensorboard_hook
from tests import documentation
from tests.training import Training, gen_adamw, mlp


def test_every_probe_step_is_logged_with_its_step() -> None:
    training = Training.of(gen_adamw)
    logged: list[tuple[dict[str, float], int]] = []
    training.optimizer.register_probe_hook(logging_hook(lambda numbers, step: logged.append((numbers, step))))
    training.optimizer.register_probe_hook(history := History())
    losses = training.train(60)
    assert [step for _, step in logged] == [record.step for record in history]
    assert [numbers["gen/loss"] for numbers, _ in logged] == pytest.approx(
        [losses[record.step - 1] for record in history]
    )
    assert [numbers["gen/learning_rate"] for numbers, _ in logged] == [record.lr_after for record in history]
    # The first step's search fits no parabola.
    assert set(logged[0][0]) == {"gen/learning_rate", "gen/loss", "gen/optimal_lr"}
    assert set(logged[1][0]) >= {"gen/slope", "gen/curvature"}
    assert all(math.isfinite(number) for numbers, _ in logged for number in numbers.values())


def test_every_parameter_group_has_its_learning_rate() -> None:
    model = mlp()
    groups = [{"params": model[0].parameters(), "lr": 1e-3}, {"params": model[-1].parameters(), "lr": 2e-3}]
    training = Training.of(lambda _: gen_adamw(groups), model)
    logged: list[dict[str, float]] = []
    training.optimizer.register_probe_hook(logging_hook(lambda numbers, _: logged.append(numbers), prefix=""))
    training.train(3)
    assert logged[-1]["learning_rate/1"] == pytest.approx(2 * logged[-1]["learning_rate/0"])


def test_a_logger_must_be_callable() -> None:
    with pytest.raises(TypeError, match="log must be a callable"):
        logging_hook(None)  # type: ignore[arg-type]


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs the extra tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    training = Training.of(gen_adamw)
    training.optimizer.register_probe_hook(history := History())
    with SummaryWriter(tmp_path) as writer:
        training.optimizer.register_probe_hook(tensorboard_hook(writer))
        training.train(55)
    events = EventAccumulator(str(tmp_path)).Reload()
    rates = events.Scalars("gen/learning_rate")
    assert [event.step for event in rates] == [record.step for record in history]
    assert torch.tensor([event.value for event in rates]).allclose(torch.tensor(history.column("lr_after")).float())
    assert len(events.Scalars("gen/curvature")) > 30


def test_the_script_of_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard", reason="needs the extra tensorboard")
    monkeypatch.chdir(tmp_path)
    names = documentation.run("logging.md")
    assert names["losses"][-1] < 0.5 * names["losses"][0]
    assert list((tmp_path / "runs").iterdir())
