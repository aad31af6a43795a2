"""Records of probe steps, and their history."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gen_optim.measurement import Measurement
from gen_optim.rules import Decision, ProbeStatus, RuleState


@dataclass(frozen=True)
class ProbeRecord:
    """What a probe step saw and decided, in plain numbers: enough to repeat the decision.

    Learning rates are those of the first unfrozen parameter group. Under ``maximize=True`` the losses are the negatives
    of what the closure returned, so that they are minimised.

    Attributes:
        step: The number of the step, counted from 1.
        multiples: Where the loss was evaluated, in multiples of ``lr_before``.
        losses: The losses there, in the same order; averaged over the processes that train the model together.
        slope: ``−g′(0)`` along the direction per unit of learning rate; NaN if no parabola was fitted.
        curvature: ``g″(0)``; NaN if no parabola was fitted.
        optimal_lr: The learning rate of the lowest loss, of the parabola or of the initial search; None if there is
            none.
        lr_before: The learning rate α before the step, without a scheduler's factor.
        lr_after: The learning rate α chosen, without a scheduler's factor.
        factor: The scheduler's factor: the step taken is at ``lr_after · factor``.
        status: Why it was chosen.
        slope_noise: How large a slope rounding alone can produce.
        curvature_noise: How large a curvature rounding alone can produce.
        loss_end: The loss where the measured step ended; None if it had not been taken yet.
        excess_loss: How far that is above the loss at averaged weights, an estimate; None if it is not known,
            or the rule does not ask for it.
    """

    step: int
    multiples: tuple[float, ...]
    losses: tuple[float, ...]
    slope: float
    curvature: float
    optimal_lr: float | None
    lr_before: float
    lr_after: float
    factor: float
    status: ProbeStatus
    slope_noise: float = 0.0
    curvature_noise: float = 0.0
    loss_end: float | None = None
    excess_loss: float | None = None

    @classmethod
    def of(cls, before: RuleState, measurement: Measurement, decision: Decision, factor: float) -> ProbeRecord:
        """The record of what was measured, and of what was decided from it."""
        return cls(
            step=decision.state.step,
            multiples=tuple(lr / before.lr for lr in measurement.learning_rates),
            losses=measurement.losses,
            slope=measurement.parabola.slope,
            curvature=measurement.parabola.curvature,
            optimal_lr=measurement.optimal_lr,
            lr_before=before.lr,
            lr_after=decision.state.lr,
            factor=factor,
            status=decision.status,
            slope_noise=measurement.parabola.slope_noise,
            curvature_noise=measurement.parabola.curvature_noise,
            loss_end=measurement.loss_end,
            excess_loss=measurement.excess_loss,
        )

    @property
    def loss(self) -> float:
        """The loss where the step began; NaN if it was not evaluated."""
        if self.loss_end is not None:  # looking back, the step begins where the measured one ended
            return self.loss_end
        return self.loss_start

    @property
    def loss_start(self) -> float:
        """The loss where the measured step began; NaN if it was not evaluated."""
        return dict(zip(self.multiples, self.losses, strict=True)).get(0.0, math.nan)

    def __str__(self) -> str:
        """The record as a sentence.

        Example:
            >>> print(optimizer.last_probe)  # doctest: +SKIP
            Step 57 (fitted): the last step took the loss from 0.41 to 0.388, 0.011 above that at averaged weights, the
            parabola is lowest at 0.0213, and the learning rate goes from 0.0178 to 0.0187.
        """
        if self.loss_end is None:
            losses = f"the loss is {self.loss:.3g}"
        else:
            losses = f"the last step took the loss from {self.loss_start:.3g} to {self.loss_end:.3g}"
        is_parabola = math.isfinite(self.slope)
        if self.optimal_lr is not None and self.optimal_lr <= 0.0:
            lowest = "the parabola is lowest behind where the step began"
        elif self.optimal_lr is not None:
            what = "the parabola" if is_parabola else "it"
            if self.status in (ProbeStatus.NO_MINIMUM, ProbeStatus.CONCAVE):  # the rule went by an average of several
                what = "this parabola alone"
            lowest = f"{what} is lowest at {self.optimal_lr:.3g}"
        else:
            lowest = "the parabola has no lowest point" if is_parabola else "no lowest point was found"
        above = ""
        if self.excess_loss is not None:
            side = "below" if self.excess_loss < 0.0 else "above"
            above = f", {abs(self.excess_loss):.3g} {side} that at averaged weights"
        if self.lr_before == self.lr_after:
            rate = f"stays at {self.lr_after:.3g}"
        else:
            rate = f"goes from {self.lr_before:.3g} to {self.lr_after:.3g}"
        factor = "" if self.factor == 1.0 else f", times the scheduler's factor {self.factor:.3g}"
        status = self.status.value.replace("_", " ")
        return f"Step {self.step} ({status}): {losses}{above}, {lowest}, and the learning rate {rate}{factor}."

    def to_dict(self) -> dict[str, Any]:
        """The record as a dictionary of plain numbers, lists and strings.

        Example:
            >>> import json
            >>> line = json.dumps(optimizer.last_probe.to_dict())  # doctest: +SKIP
        """
        return asdict(self) | {
            "multiples": list(self.multiples),
            "losses": list(self.losses),
            "status": self.status.value,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ProbeRecord:
        """The record from what :meth:`to_dict` returned.

        Raises:
            TypeError: If a field is missing or unknown.
            ValueError: If the status is unknown.
        """
        readers: dict[str, Callable[[Any], Any]] = {"multiples": tuple, "losses": tuple, "status": ProbeStatus}
        return cls(**{name: readers[name](value) if name in readers else value for name, value in values.items()})


_OTHERS = ("step", "multiples", "losses", "status")
_NUMBERS = ("step", "loss", *(each.name for each in fields(ProbeRecord) if each.name not in _OTHERS))


class History:
    """The records of an optimizer's probe steps.

    It is a probe hook: register it, train, then read it.

    Example:
        >>> history = History()
        >>> handle = optimizer.register_probe_hook(history)  # doctest: +SKIP
        >>> history.column("lr_after")  # after training; one number a probe step
        array([], dtype=float64)
    """

    def __init__(self) -> None:
        self.records: list[ProbeRecord] = []

    def __call__(self, optimizer: object, record: ProbeRecord) -> None:
        """Append ``record``; the signature of a probe hook."""
        self.records.append(record)

    def __repr__(self) -> str:
        return f"History of {len(self)} probe steps"

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[ProbeRecord]:
        return iter(self.records)

    def __getitem__(self, index: int) -> ProbeRecord:
        return self.records[index]

    def column(self, name: str) -> npt.NDArray[np.float64]:
        """A numeric field of all records, shape ``(len(self),)``; NaN where it is None.

        Args:
            name: ``step``, ``loss``, ``slope``, ``curvature``, ``optimal_lr``, ``lr_before``, ``lr_after``, ``factor``
                or another number of a :class:`ProbeRecord`.

        Raises:
            AttributeError: If records have no such number.
        """
        if name not in _NUMBERS:
            raise AttributeError(
                f"name must be one of {', '.join(_NUMBERS)}, got {name!r}; columns() has the statuses, too"
            )
        values = [getattr(record, name) for record in self.records]
        return np.array([np.nan if value is None else value for value in values], dtype=np.float64)

    def columns(self) -> dict[str, list[Any]]:
        """All records as the columns of a data frame, one row per probe step.

        Numbers that are None are NaN, and a status is its value. ``multiples`` and ``losses``, which are of different
        lengths, are left out; :meth:`to_dicts` has them.

        Example:
            >>> frame = pandas.DataFrame(history.columns())  # doctest: +SKIP
        """
        numbers = {name: self.column(name).tolist() for name in _NUMBERS if name != "step"}
        steps, statuses = [record.step for record in self], [record.status.value for record in self]
        return {"step": steps, "status": statuses, **numbers}

    def save_csv(self, path: str | PathLike[str]) -> None:
        """Write the :meth:`columns` to a CSV file with a header, for a spreadsheet; :meth:`save` keeps everything.

        Example:
            >>> history.save_csv("history.csv")  # doctest: +SKIP
        """
        columns = self.columns()
        with Path(path).open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([columns, *zip(*columns.values(), strict=True)])

    def save(self, path: str | PathLike[str]) -> None:
        """Write all records to a file, one line of JSON each.

        As in Python's ``json``, numbers that are not finite are written as ``NaN`` and ``Infinity``.

        Example:
            >>> history.save("history.jsonl")  # doctest: +SKIP
            >>> history = History.load("history.jsonl")  # doctest: +SKIP
        """
        Path(path).write_text("".join(json.dumps(each) + "\n" for each in self.to_dicts()), "utf-8")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> History:
        """Read what :meth:`save` wrote.

        Raises:
            OSError: If there is no such file.
            TypeError, ValueError: If a line is no record.
        """
        history = cls()
        for line in Path(path).read_text("utf-8").splitlines():
            history.records.append(ProbeRecord.from_dict(json.loads(line)))
        return history

    def to_dicts(self) -> list[dict[str, Any]]:
        """All records as plain dictionaries, in order."""
        return [record.to_dict() for record in self.records]
