"""TensorBoard."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from gen_optim.integrations.logging import logging_hook
from gen_optim.optimizer import GeNOptimizer
from gen_optim.records import ProbeRecord

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["tensorboard_hook"]


def tensorboard_hook(writer: SummaryWriter, *, prefix: str = "gen/") -> Callable[[GeNOptimizer, ProbeRecord], None]:
    """Make a probe hook that writes the scalars of :func:`~gen_optim.integrations.logging.logging_hook`.

    Args:
        writer: Where to write.
        prefix: Put before each name.

    Returns:
        What :meth:`~gen_optim.GeNOptimizer.register_probe_hook` takes.

    Example:
        >>> from torch.utils.tensorboard import SummaryWriter  # doctest: +SKIP
        >>> handle = optimizer.register_probe_hook(tensorboard_hook(SummaryWriter("runs")))  # doctest: +SKIP
    """

    def write(numbers: dict[str, float], step: int) -> None:
        for name, number in numbers.items():
            writer.add_scalar(name, number, step)

    return logging_hook(write, prefix=prefix)
