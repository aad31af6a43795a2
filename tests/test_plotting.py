"""Pictures: what is drawn is what was measured."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
from torch import Tensor

mpl.use("agg")

import matplotlib.pyplot as plt

from gen_optim import History, ProbeRecord, ProbeStatus
from gen_optim.plotting import plot_history, plot_loss_along, summary
from tests.training import Training, gen_adamw


@pytest.fixture(autouse=True)
def closed_figures() -> Any:
    yield
    plt.close("all")


def quadratic(params: dict[str, Tensor]) -> Tensor:
    return (params["x"] - 1.0).square().sum()


PARAMS, DIRECTION = {"x": torch.tensor([3.0])}, {"x": torch.tensor([1.0])}


def lines(ax: Any) -> dict[str, Any]:
    return {line.get_label(): line for line in ax.get_lines()}


def test_loss_and_parabola_along_the_direction_and_the_lowest_point() -> None:
    ax = plot_loss_along(quadratic, PARAMS, DIRECTION)
    drawn = lines(ax)
    rates, losses = drawn["loss"].get_data()
    assert (rates.min(), rates.max(), len(rates)) == (-2.0, 6.0, 41)
    assert losses == pytest.approx((3.0 - rates - 1.0) ** 2, abs=1e-5)
    assert drawn["parabola"].get_ydata() == pytest.approx(losses, abs=1e-5)
    assert [each[0] for each in drawn["lowest at 2"].get_data()] == pytest.approx([2.0, 0.0], abs=1e-6)


def test_given_axes_learning_rates_and_labels() -> None:
    _, ax = plt.subplots()
    assert plot_loss_along(quadratic, PARAMS, DIRECTION, [0.0, 1.0, 2.0], label="before", ax=ax) is ax
    plot_loss_along(quadratic, {"x": torch.tensor([2.0])}, DIRECTION, [0.0, 1.0, 2.0], label="after", ax=ax)
    drawn = lines(ax)
    assert drawn["loss (before)"].get_xdata().tolist() == [0.0, 1.0, 2.0]
    assert drawn["loss (before)"].get_color() != drawn["loss (after)"].get_color()


@pytest.mark.parametrize(
    "loss",
    [lambda p: -quadratic(p), lambda p: p["x"].sum(), lambda p: 0.0 * p["x"].sum() + 2.0],
    ids=["concave", "linear", "constant"],
)
def test_a_parabola_without_a_lowest_point_marks_none(loss: Any) -> None:
    ax = plot_loss_along(loss, PARAMS, DIRECTION)
    assert not any(label.startswith("lowest") for label in lines(ax))


def test_a_loss_that_explodes_leaves_the_panel() -> None:
    ax = plot_loss_along(lambda p: quadratic(p) + (p["x"] - 3.0).pow(4).sum() * 1e6, PARAMS, DIRECTION)
    assert ax.get_ylim()[1] < 100.0


def test_parameters_of_half_precision_are_drawn_at_the_learning_rates_given() -> None:
    params, direction = ({name: each.bfloat16() for name, each in some.items()} for some in (PARAMS, DIRECTION))
    ax = plot_loss_along(quadratic, params, direction, learning_rates=[0.0, 1.0 / 3.0, 2.0])
    assert lines(ax)["loss"].get_xdata() == pytest.approx([0.0, 1.0 / 3.0, 2.0])
    assert lines(ax)["loss"].get_ydata() == pytest.approx([4.0, (5.0 / 3.0) ** 2, 0.0], rel=0.02)


def test_parameters_stay_as_they_are() -> None:
    params = {"x": torch.tensor([3.0], requires_grad=True)}
    plot_loss_along(quadratic, params, DIRECTION)
    assert params["x"].item() == 3.0
    assert params["x"].grad is None


def record(step: int, status: ProbeStatus, optimum: float | None = 0.1) -> ProbeRecord:
    return ProbeRecord(step, (-1.0, 0.0, 1.0), (3.0, 2.0 / step, 1.0), 1.0, 1.0, optimum, 0.1, 0.1 * step, 0.5, status)


def history(*records: ProbeRecord) -> History:
    collected = History()
    for each in records:
        collected(None, each)
    return collected


def test_history_draws_losses_learning_rates_and_marks() -> None:
    run = history(
        record(1, ProbeStatus.STARTED), record(2, ProbeStatus.FITTED), record(3, ProbeStatus.CONCAVE, optimum=-1.0)
    )
    panels = plot_history(run)
    assert panels.shape == (2, 1)
    above, below = panels[:, 0]
    assert above.get_lines()[0].get_ydata() == pytest.approx([2.0, 1.0, 2.0 / 3.0])
    drawn = lines(below)
    assert drawn["chosen"].get_ydata() == pytest.approx([0.1, 0.2, 0.3])
    assert drawn["× scheduler's factor"].get_ydata() == pytest.approx([0.05, 0.1, 0.15])
    assert np.isnan(drawn["optimum"].get_ydata()).tolist() == [False, False, True]
    assert drawn["initial learning rate found"].get_xdata().tolist() == [1]
    assert drawn["concave: grown"].get_xdata().tolist() == [3]


def test_every_status_but_the_usual_one_has_a_mark_of_its_own() -> None:
    run = history(*(record(step, status) for step, status in enumerate(ProbeStatus, start=1)))
    marks = [line for line in plot_history(run)[1, 0].get_lines() if line.get_linestyle() == "None"]
    names = {line.get_label() for line in marks} - {"optimum"}
    assert len(names) == len(ProbeStatus) - 1
    assert len({str(line.get_marker()) for line in marks}) == len(marks)


def test_several_runs_stand_side_by_side() -> None:
    runs = {"first": history(record(1, ProbeStatus.FITTED)), "second": history(record(2, ProbeStatus.FITTED))}
    panels = plot_history(runs)
    assert panels.shape == (2, 2)
    assert [ax.get_title(loc="left") for ax in panels[0]] == ["first", "second"]
    _, own = plt.subplots(2, 2)
    assert (plot_history(runs, ax=own) == own).all()
    with pytest.raises(ValueError, match=r"ax must hold axes of shape \(2, 2\)"):
        plot_history(runs, ax=own[:, :1])


def test_a_real_run_and_an_empty_one() -> None:
    training, run = Training.of(gen_adamw), History()
    training.optimizer.register_probe_hook(run)
    plot_history(run)
    training.train(60)
    below = plot_history(run)[1, 0]
    assert lines(below)["chosen"].get_ydata()[-1] == training.optimizer.last_probe.lr_after
    assert math.isclose(lines(below)["initial learning rate found"].get_ydata()[0], run[0].lr_after)


def test_a_summary_shows_loss_learning_rate_slope_and_curvature_of_a_run() -> None:
    started = replace(record(1, ProbeStatus.STARTED), slope=math.nan, curvature=math.nan)
    concave = replace(record(3, ProbeStatus.CONCAVE), curvature=-2.0)
    run = history(started, record(2, ProbeStatus.FITTED), concave)
    panels = summary(run)
    assert panels.shape == (2, 2)
    (losses, slopes), (rates, curvatures) = panels
    assert losses.get_lines()[0].get_ydata() == pytest.approx(run.column("loss"))
    assert lines(rates)["chosen"].get_ydata() == pytest.approx([0.1, 0.2, 0.3])
    assert lines(rates)["concave: grown"].get_xdata().tolist() == [3]
    assert lines(slopes)["above 0"].get_xydata().tolist() == [[2.0, 1.0], [3.0, 1.0]]
    assert "below 0, without its sign" not in lines(slopes)
    assert lines(curvatures)["above 0"].get_xydata().tolist() == [[2.0, 1.0]]
    assert lines(curvatures)["below 0, without its sign"].get_xydata().tolist() == [[3.0, 2.0]]
    assert [ax.get_ylabel() for ax in panels.flat] == ["loss", "slope", "learning rate", "curvature"]


def test_a_summary_of_a_real_run_and_of_an_empty_one_on_given_axes() -> None:
    training, run = Training.of(gen_adamw), History()
    training.optimizer.register_probe_hook(run)
    summary(run)
    training.train(60)
    _, own = plt.subplots(2, 2)
    assert (summary(run, ax=own) == own).all()
    slopes = lines(own[0, 1])
    drawn = sum(len(slopes[name].get_xdata()) for name in slopes if name in ("above 0", "below 0, without its sign"))
    assert drawn == np.isfinite(run.column("slope")).sum() > 30
    with pytest.raises(ValueError, match=r"ax must hold axes of shape \(2, 2\)"):
        summary(run, ax=own[:1])


def test_matplotlib_is_imported_only_when_something_is_drawn() -> None:
    check = "import sys, gen_optim, gen_optim.plotting; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
