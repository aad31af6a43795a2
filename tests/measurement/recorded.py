"""A session whose closure is a function of the parameters, and which records what is asked of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from gen_optim.closures.losses import Loss, rounding_of
from gen_optim.distributed import Ranks
from gen_optim.tensors.scalars import to_floats


class RecordedSession:
    """Stands in for ``Session``: evaluates a function, and records readings."""

    worst = math.inf

    def __init__(
        self,
        call: Callable[[], Loss],
        *,
        with_graph: Callable[[], Tensor] | None = None,
        tolerance: float = 0.0,
        ranks: Any = None,
    ) -> None:
        self.call, self.with_graph, self.tolerance = call, with_graph, tolerance
        self.ranks = Ranks() if ranks is None else ranks
        self.reads: list[int] = []

    def probe(self, *, keeps_failure: bool = True) -> Loss:
        return self.call()

    def differentiable(self) -> Tensor:
        assert self.with_graph is not None
        return self.with_graph()

    def rounding(self, losses: Sequence[Loss]) -> float:
        return self.tolerance * rounding_of(losses)

    def read(self, losses: Sequence[Loss], others: Sequence[Loss] = ()) -> tuple[list[float], list[float]]:
        self.reads.append(len(losses) + len(others) - 2)  # without what a StepLoss adds
        return to_floats(losses), to_floats(others)
