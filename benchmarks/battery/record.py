"""What a run showed, and how that is written as a line of JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.battery.config import Config

_DIGITS = 5


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a run showed.

    Attributes:
        config: What was run.
        train_loss: At the end, over a sample of the training examples.
        validation_loss: At the end. Infinite where it is not finite.
        initial_train_loss: Before the first step, over the same examples.
        initial_validation_loss: Likewise.
        diverged: Whether a final loss is not finite or above the initial one.
        steps: Steps of which the next two tell, about 50.
        losses: The mean loss of the batches since the previous of those steps.
        learning_rates: The learning rate that each of those steps used; none for a bare optimizer, whose schedule says
            it all.
        extra_forwards: Evaluations of the loss that only served to choose a learning rate.
        seconds: Of the training steps.
        total_seconds: With set-up and evaluation.
        code: The fingerprint of our code, for our methods.
        error: What went wrong, if the run could not be done.
    """

    config: Config
    train_loss: float = math.inf
    validation_loss: float = math.inf
    initial_train_loss: float = math.inf
    initial_validation_loss: float = math.inf
    diverged: bool = True
    steps: Sequence[int] = ()
    losses: Sequence[float] = ()
    learning_rates: Sequence[float] = ()
    extra_forwards: int = 0
    seconds: float = 0.0
    total_seconds: float = 0.0
    code: str = ""
    error: str = ""

    def to_line(self) -> str:
        """One line of strict JSON, which has no infinity: null stands for what is not finite."""
        return json.dumps(_encode(asdict(self)), sort_keys=True, allow_nan=False)

    @classmethod
    def from_line(cls, line: str) -> Record:
        """Reads a line.

        Raises:
            ValueError: If it is none.
        """
        try:
            values = json.loads(line)
            config = Config(**values.pop("config"))
            for name in ("train_loss", "validation_loss", "initial_train_loss", "initial_validation_loss"):
                values[name] = _decode(values[name])
            for name in ("losses", "learning_rates"):
                values[name] = tuple(map(_decode, values[name]))
            return cls(config=config, **{**values, "steps": tuple(values["steps"])})
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a record: {line[:80]!r}") from error


def _encode(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        # The configuration is the key and keeps all its digits.
        return {name: each if name == "config" else _encode(each) for name, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_encode(each) for each in value]
    return value


def _decode(value: float | None) -> float:
    return math.inf if value is None else float(value)


@dataclass
class Results:
    """Records by the keys of their configurations.

    Attributes:
        records: The latest of each key.
    """

    records: dict[str, Record] = field(default_factory=dict)

    def add(self, record: Record) -> None:
        """Takes a record in; a later one takes the place of an earlier one."""
        self.records[record.config.key] = record

    def get(self, config: Config) -> Record | None:
        """The record of a configuration, if it has been run."""
        return self.records.get(config.key)

    def __contains__(self, config: Config) -> bool:
        return config.key in self.records

    def __len__(self) -> int:
        return len(self.records)
