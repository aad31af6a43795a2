"""What tests of Accelerate, and of the Trainer that is built upon it, do to its global state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType


@contextmanager
def forgotten_afterwards() -> Iterator[None]:
    """Leave nothing of the accelerators made inside."""
    try:
        yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def let_it_shard() -> None:
    """Have the next accelerator shard on CPUs, where Accelerate leaves out its plugin for ``fully_shard``.

    It takes the processes for those of GPUs, as far as it asks; all that it does then runs on CPUs too.
    """
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
