"""Pictures of the loss along a direction and of a training run's history; needs matplotlib (extra ``plot``).

Every function draws on the axes given as ``ax=`` or on new ones, returns them, and shows nothing. The pictures are
legible in grey.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gen_optim.functional.derivatives import loss_along, quadratic_model
from gen_optim.records import History
from gen_optim.rules import Parabola, ProbeStatus

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_history", "plot_loss_along", "summary"]

_MARKS: dict[ProbeStatus, tuple[str, str]] = {
    ProbeStatus.STARTED: ("*", "initial learning rate found"),
    ProbeStatus.START_FAILED: ("X", "none found"),
    ProbeStatus.CONCAVE: ("^", "concave: grown"),
    ProbeStatus.GROWING: ("1", "far out: grown"),
    ProbeStatus.UNSTABLE: ("2", "unstable: lowered"),
    ProbeStatus.NO_MINIMUM: ("_", "no minimum"),
    ProbeStatus.BELOW_NOISE: ("|", "below noise"),
    ProbeStatus.NON_FINITE_LOSS: ("x", "loss not finite"),
    ProbeStatus.NON_FINITE_PROBE: ("v", "probe not finite: cut"),
    ProbeStatus.REVERTED: ("<", "reverted: cut"),
    ProbeStatus.EXPLODED: ("P", "exploded: cut"),
    ProbeStatus.RESTARTED: ("o", "restarted"),
}
"""Marker and label of every status but the usual one, a fitted parabola."""


def plot_loss_along(
    loss_fn: Callable[[dict[str, Tensor]], Tensor],
    params: Mapping[str, Tensor],
    direction: Mapping[str, Tensor],
    learning_rates: Sequence[float] | None = None,
    *,
    label: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw g(α) = L(θ − αω) over learning rates α, with its second-order parabola at 0 and the parabola's lowest point.

    Args:
        loss_fn: The loss as a function of the parameters, a scalar.
        params: The parameters θ.
        direction: The direction ω, tensors of the same names and shapes, for example from
            :func:`gen_optim.optimizer_direction`.
        learning_rates: Where to evaluate the loss. By default 41 values from −1 to 3 optimal learning rates; if the
            parabola has no lowest point, the unit is the absolute value of slope / curvature.
        label: The name of this loss in the legend.
        ax: The axes to draw on; new ones by default.

    Returns:
        The axes.

    Raises:
        ImportError: If matplotlib is not installed.

    Example:
        >>> ax = plot_loss_along(  # doctest: +SKIP
        ...     lambda params: loss_fn(functional_call(model, params, inputs), targets),
        ...     dict(model.named_parameters()),
        ...     optimizer_direction(optimizer, dict(model.named_parameters())),
        ... )
    """
    ax = _axes(1, 1)[0, 0] if ax is None else ax
    parabola = quadratic_model(loss_fn, dict(params), dict(direction))
    rates = np.linspace(-1.0, 3.0, 41) * _scale(parabola) if learning_rates is None else np.asarray(learning_rates)
    like = next(iter(params.values()))
    grid = torch.as_tensor(rates, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
    with torch.no_grad():
        losses = loss_along(loss_fn, dict(params), dict(direction), grid, chunk_size=1).float().cpu().numpy()
    name = "" if label is None else f" ({label})"
    [line] = ax.plot(rates, losses, "-", color=_grey(ax), linewidth=2, label=f"loss{name}")
    predicted = np.array([parabola.predict(rate) for rate in rates.tolist()])
    _keep_in_view(ax, losses, predicted)
    ax.plot(rates, predicted, "--", color=line.get_color(), linewidth=1.2, label=f"parabola{name}")
    if parabola.optimal_lr is not None:
        ax.plot(
            [parabola.optimal_lr],
            [parabola.predict(parabola.optimal_lr)],
            "*",
            color=line.get_color(),
            markersize=13,
            markerfacecolor="white",
            label=f"lowest at {parabola.optimal_lr:.3g}{name}",
        )
    ax.axvline(0.0, color="0.8", linewidth=0.8, zorder=0)
    ax.set_xlabel("learning rate along the direction")
    ax.set_ylabel("loss")
    ax.legend(frameon=False)
    return ax


def plot_history(
    history: History | Mapping[str, History], *, ax: npt.NDArray[np.object_] | None = None
) -> npt.NDArray[np.object_]:
    """Draw the probe steps of one or several runs, one column per run: the loss above, the learning rate below.

    Probe steps that did not end with a fitted parabola are marked on the learning rate.

    Args:
        history: The history of a run, or several by name.
        ax: Axes of shape ``(2, number of runs)``; new ones by default, rows sharing their scales.

    Returns:
        The axes, shape ``(2, number of runs)``.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If ``ax`` has another shape.

    Example:
        >>> panels = plot_history({"AdamW": first, "SGD": second})  # doctest: +SKIP
    """
    runs = {"": history} if isinstance(history, History) else dict(history)
    panels = _panels(2, len(runs), ax, of="one column per run")
    for (above, below), (name, run) in zip(panels.T, runs.items(), strict=True):
        _draw_loss(above, run)
        _draw_learning_rate(below, run)
        above.set_title(name, loc="left")
    panels[0, 0].set_ylabel("loss")
    panels[1, 0].set_ylabel("learning rate")
    return panels


def summary(history: History, *, ax: npt.NDArray[np.object_] | None = None) -> npt.NDArray[np.object_]:
    """Draw what the probe steps of a run have seen and decided: loss, learning rate, slope and curvature.

    Probe steps that did not end with a fitted parabola are marked on the learning rate. Slope and curvature are along
    the direction, per unit of learning rate. Their scales are logarithmic; negative values have a mark of their own.

    Args:
        history: The history of the run.
        ax: Axes of shape ``(2, 2)``; new ones by default.

    Returns:
        The axes, shape ``(2, 2)``: loss and slope above, learning rate and curvature below.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If ``ax`` has another shape.

    Example:
        >>> panels = summary(history)  # doctest: +SKIP
        >>> panels[0, 0].figure.savefig("run.png")  # doctest: +SKIP
    """
    panels = _panels(2, 2, ax, of="loss and slope above, learning rate and curvature below", sharey="none")
    (loss, slope), (learning_rate, curvature) = panels
    _draw_loss(loss, history)
    _draw_learning_rate(learning_rate, history)
    _draw_signed(slope, history, "slope")
    _draw_signed(curvature, history, "curvature")
    curvature.set_xlabel("step")
    for panel, name in ((loss, "loss"), (learning_rate, "learning rate")):
        panel.set_ylabel(name)
    return panels


def _draw_loss(ax: Axes, run: History) -> None:
    losses = run.column("loss")
    ax.plot(run.column("step"), losses, "-", color="0.15", linewidth=1.2)
    if len(losses) and losses.min() > 0:
        ax.set_yscale("log")
    ax.grid(alpha=0.25)


def _draw_learning_rate(ax: Axes, run: History) -> None:
    steps, chosen, optimal = run.column("step"), run.column("lr_after"), run.column("optimal_lr")
    with np.errstate(invalid="ignore"):
        optimal = np.where(optimal > 0, optimal, np.nan)  # an optimum behind has no logarithm
    ax.plot(steps, optimal, ".", color="0.7", markersize=4, label="optimum", zorder=1)
    ax.plot(steps, chosen, "-", color="0.15", linewidth=1.8, label="chosen")
    if (run.column("factor") != 1.0).any():
        ax.plot(steps, chosen * run.column("factor"), "--", color="0.15", linewidth=1.0, label="× scheduler's factor")
    for status, (marker, name) in _MARKS.items():
        marked = np.array([record.status is status for record in run], dtype=bool)
        if marked.any():
            ax.plot(steps[marked], chosen[marked], marker, color="0.15", markerfacecolor="white", label=name)
    ax.set_yscale("log")
    ax.set_xlabel("step")
    ax.grid(alpha=0.25)
    ax.legend(frameon=False, fontsize="small")


def _draw_signed(ax: Axes, run: History, name: str) -> None:
    """Draw a number of either sign by its size, on a logarithmic scale."""
    steps, values = run.column("step"), run.column(name)
    for signed, marker, label in ((values, ".", "above 0"), (-values, "x", "below 0, without its sign")):
        shown = signed > 0  # not NaN
        if shown.any():
            ax.plot(steps[shown], signed[shown], marker, color="0.15", markersize=4, label=label)
            ax.legend(frameon=False, fontsize="small")
    ax.set_yscale("log")
    ax.set_ylabel(name)
    ax.grid(alpha=0.25)


def _keep_in_view(ax: Axes, losses: npt.NDArray[np.float64], predicted: npt.NDArray[np.float64]) -> None:
    """Cut off a loss that grows far above its parabola, which would flatten everything else."""
    bottom, top = min(np.nanmin(losses), predicted.min()), predicted.max() + np.ptp(predicted)
    if not losses.max() <= top and bottom < top:
        room = 0.05 * (top - bottom)
        ax.set_ylim(bottom - room, top + room)


def _scale(parabola: Parabola) -> float:
    """The scale of learning rates on which the parabola shows its shape."""
    if not parabola.is_finite or parabola.slope == 0.0:
        return 1.0
    if parabola.curvature == 0.0:
        return abs((parabola.value or 1.0) / parabola.slope)
    return abs(parabola.slope / parabola.curvature)


def _grey(ax: Axes) -> str:
    """A different shade for each loss on the same axes."""
    drawn = sum(str(line.get_label()).startswith("loss") for line in ax.get_lines())
    return ("0.1", "0.5", "0.7")[drawn % 3]


def _panels(
    rows: int, columns: int, ax: npt.NDArray[np.object_] | None, *, of: str, sharey: Literal["row", "none"] = "row"
) -> npt.NDArray[np.object_]:
    """The axes given if they have this shape, or new ones."""
    panels: npt.NDArray[np.object_] = _axes(rows, columns, sharey) if ax is None else np.asarray(ax, dtype=object)
    if panels.shape != (rows, columns):
        raise ValueError(f"ax must hold axes of shape {(rows, columns)}, {of}, got shape {panels.shape}")
    return panels


def _axes(rows: int, columns: int, sharey: Literal["row", "none"] = "row") -> Any:
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("gen_optim.plotting needs matplotlib: pip install matplotlib") from error
    size = (5.5 * columns, 3.5 * rows)
    _, ax = plt.subplots(rows, columns, figsize=size, squeeze=False, sharex="col", sharey=sharey, layout="constrained")
    return ax
