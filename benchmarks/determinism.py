"""Initial weights that a seed decides, and computing on one thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def seeded(make: Callable[[], Model], seed: int) -> Model:
    """Makes a model whose initial weights the seed decides. The global random stream stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


@contextmanager
def single_thread() -> Iterator[None]:
    """Computes on one thread. The networks are so small that more threads slow each other down."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
