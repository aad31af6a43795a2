"""A pool of processes that run functions together as the ranks of a process group."""

from __future__ import annotations

import datetime as dt
import os
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

_TIMEOUT = dt.timedelta(seconds=40)
"""After which a collective that somebody does not take part in fails, on a machine that is busy otherwise."""


@dataclass(frozen=True)
class Job:
    """A function of module level that all ranks run."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    size: int
    backend: str
    store: str


class FailedError(AssertionError):
    """What ranks raised."""


class Pool:
    """Processes that are started once, since that takes seconds, and take one job after the other.

    Args:
        folder: Where they may write.
    """

    def __init__(self, folder: Path) -> None:
        self._workers: list[tuple[mp.Process, Connection]] = []
        self._folder = folder
        self._jobs = 0

    def run(self, function: Callable[..., Any], *arguments: Any, size: int = 2, backend: str = "gloo") -> list[Any]:
        """Have ``size`` ranks call ``function(*arguments)`` in a process group of their own.

        Returns:
            What they return, by rank.

        Raises:
            FailedError: If any of them raises.
        """
        context = mp.get_context("spawn")
        while len(self._workers) < size:
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(len(self._workers), theirs), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))
        self._jobs += 1
        store = str(self._folder / f"store{self._jobs}")
        for _, connection in self._workers[:size]:
            connection.send(Job(function, arguments, size, backend, store))
        try:
            answers = [connection.recv() for _, connection in self._workers[:size]]
        except BaseException:  # one of them died, or pytest's time is up: the next job begins with new ones
            self.close()
            raise
        errors = [f"rank {rank}: {error}" for rank, (error, _) in enumerate(answers) if error]
        if errors:
            raise FailedError("\n".join(errors))
        return [result for _, result in answers]

    def close(self) -> None:
        """End the processes; a later job starts new ones."""
        for process, connection in self._workers:
            connection.close()
            process.terminate()
            process.join()
        self._workers = []


def device() -> torch.device:
    """Where this rank computes."""
    return torch.device("cuda", dist.get_rank()) if dist.get_backend() == "nccl" else torch.device("cpu")


@contextmanager
def process_group(rank: int, job: Job) -> Iterator[None]:
    """A default process group for one job, and the environment in which torchrun would start it."""
    for name, number in (("RANK", rank), ("WORLD_SIZE", job.size)):
        os.environ[name] = os.environ[f"LOCAL_{name}"] = str(number)
    if job.backend == "nccl":
        torch.cuda.set_device(rank)
    store = dist.FileStore(job.store, job.size)
    dist.init_process_group(job.backend, store=store, rank=rank, world_size=job.size, timeout=_TIMEOUT)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _work(rank: int, connection: Connection) -> None:
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "none"}
    torch.set_num_threads(1)
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        try:
            with warnings.catch_warnings(), process_group(rank, job):
                torch.manual_seed(0)
                connection.send(("", job.function(*job.arguments)))
        except BaseException:  # noqa: BLE001 - told to the test
            connection.send((traceback.format_exc(), None))
