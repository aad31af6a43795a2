"""What a run showed, and its form as a line of JSON."""

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
        validation_loss: At the end. Infinite if it is not finite.
        initial_train_loss: Before the first step, over the same examples.
        initial_validation_loss: Likewise.
        diverged: Whether a final loss is not finite or above the initial one.
        steps: The steps that the next two are of, about 50.
        losses: The mean loss of the batches since the previous of those steps.
        learning_rates: The learning rate that each of those steps used; empty for a bare optimizer, whose schedule
            determines them.
        evaluated: The steps after which the validation loss was evaluated: in long runs about 20, in short runs of ours
            without a scheduler the last one.
        validation_losses: The validation loss then.
        averaged_validation_losses: The validation loss at averaged weights then, if they were kept.
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
    evaluated: Sequence[int] = ()
    validation_losses: Sequence[float] = ()
    averaged_validation_losses: Sequence[float] = ()
    extra_forwards: int = 0
    seconds: float = 0.0
    total_seconds: float = 0.0
    code: str = ""
    error: str = ""

    def to_line(self) -> str:
        """Returns one line of strict JSON, which has no infinity: numbers that are not finite become null."""
        return json.dumps(_encode(asdict(self)), sort_keys=True, allow_nan=False)

    @classmethod
    def from_line(cls, line: str) -> Record:
        """Reads a line.

        Raises:
            ValueError: If the line is no record.
        """
        try:
            values = json.loads(line)
            config = Config(**values.pop("config"))
            for name in ("train_loss", "validation_loss", "initial_train_loss", "initial_validation_loss"):
                values[name] = _decode(values[name])
            for name in ("losses", "learning_rates", "validation_losses", "averaged_validation_losses"):
                values[name] = tuple(map(_decode, values.get(name, ())))
            for name in ("steps", "evaluated"):
                values[name] = tuple(values.get(name, ()))
            return cls(config=config, **values)
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
        """Adds a record, in place of an earlier one of the same configuration."""
        self.records[record.config.key] = record

    def get(self, config: Config) -> Record | None:
        """Returns the record of a configuration, or None if it has not been run."""
        return self.records.get(config.key)

    def __contains__(self, config: Config) -> bool:
        return config.key in self.records

    def __len__(self) -> int:
        return len(self.records)
