"""Doing the runs: several processes, one writer, progress and time left."""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Protocol

import torch
from tqdm import tqdm

from benchmarks.battery import running
from benchmarks.battery.config import Config
from benchmarks.battery.data import Data
from benchmarks.battery.methods import code_fingerprint
from benchmarks.battery.record import Record, Results
from benchmarks.battery.storing import Writer
from benchmarks.repeatable import single_thread

Pending = Callable[[Results], Sequence[Config]]
"""From what is known to what is to be run, in order; what is known already may be among it."""


class Workers(Protocol):
    """Where runs are done."""

    def submit(self, config: Config) -> Future[Record]:
        """Starts a run."""
        ...


def work(
    pending: Pending,
    results: Results,
    writer: Writer,
    data: Data,
    *,
    jobs: int,
    total: int | None = None,
    minutes: float | None = None,
) -> None:
    """Does what is pending and writes each record as it comes.

    Args:
        pending: Tells what is to be run; asked again after each run.
        results: What is known; taken over as it grows.
        writer: Where records are written.
        data: What the workloads train on.
        jobs: Processes beside this one; with 1, this one does the runs.
        total: How many runs there will be in the end, if ``pending`` does not know them all yet.
        minutes: After so long no run is started any more.
    """
    began = time.monotonic()
    clock = _Clock(results)
    planned = {config.key: config for config in pending(results)}
    progress = tqdm(
        total=max(total or 0, len(planned)),
        initial=sum(config in results for config in planned.values()),
        unit="run",
        mininterval=0.5 if sys.stderr.isatty() else 30.0,
        bar_format="{desc}: {n_fmt}/{total_fmt} runs |{bar:20}| {elapsed}{postfix}",
        desc="battery",
    )
    in_flight: dict[Future[Record], Config] = {}
    with progress, _workers(jobs, data) as workers:
        while True:
            todo = _open(pending, results)
            progress.total = max(progress.total, progress.n + len(todo))  # what is known may call for more
            running_keys = {config.key for config in in_flight.values()}
            waiting = [config for config in todo if config.key not in running_keys]
            is_over = minutes is not None and time.monotonic() - began > 60.0 * minutes
            while waiting and not is_over and len(in_flight) < jobs:
                config = waiting.pop(0)
                progress.set_description(str(config), refresh=False)
                in_flight[workers.submit(config)] = config
            if not in_flight:
                break
            done, _ = wait(in_flight, return_when=FIRST_COMPLETED)
            for future in done:
                del in_flight[future]
                record = _record_of(future)
                writer.write(record)
                results.add(record)
                clock.learn(record)
                if record.error:
                    progress.write(f"{record.config}: {record.error}")
                progress.update()
            progress.set_postfix_str(f"{_duration(clock.estimate(waiting) / jobs)} left", refresh=False)


def _record_of(future: Future[Record]) -> Record:
    try:
        record = future.result()
    except BrokenProcessPool:
        raise SystemExit(
            "A process of the battery was killed. What was done is kept; start it again to go on."
        ) from None
    return Record.from_line(record.to_line())  # as the file has it, so that a report made later says the same


def _open(pending: Pending, results: Results) -> list[Config]:
    """What is pending and not known, each once."""
    return list({config.key: config for config in pending(results) if config not in results}.values())


class _Inline:
    """This process."""

    def __init__(self, data: Data) -> None:
        self._data = data

    def submit(self, config: Config) -> Future[Record]:
        future: Future[Record] = Future()
        future.set_result(running.run(config, self._data))
        return future


class _Pool:
    """Processes of one thread each."""

    def __init__(self, pool: ProcessPoolExecutor, data: Data) -> None:
        self._pool, self._data = pool, data

    def submit(self, config: Config) -> Future[Record]:
        return self._pool.submit(running.run, config, self._data)


@contextmanager
def _workers(jobs: int, data: Data) -> Iterator[Workers]:
    if jobs == 1:
        with single_thread():
            yield _Inline(data)
        return
    # Forking a process that has used torch's threads can hang.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_begin)
    try:
        yield _Pool(pool, data)
    finally:
        pool.shutdown(cancel_futures=True)


def _begin() -> None:
    """In each process, before its first run."""
    torch.set_num_threads(1)
    code_fingerprint()  # of the code that was imported just now: it may change while the battery runs


class _Clock:
    """How long runs take, learned from those done."""

    def __init__(self, results: Results) -> None:
        self._seconds: dict[str, list[float]] = defaultdict(list)
        for record in results.records.values():
            self.learn(record)

    def learn(self, record: Record) -> None:
        for name in self._names(record.config):
            self._seconds[name].append(record.total_seconds)

    def estimate(self, configs: Sequence[Config]) -> float:
        """Seconds that the runs will take one after the other."""
        means = {name: sum(seconds) / len(seconds) for name, seconds in self._seconds.items()}
        total = 0.0
        for config in configs:
            known = [means[name] for name in self._names(config) if name in means]
            total += known[0] if known else 0.0
        return total

    @staticmethod
    def _names(config: Config) -> tuple[str, ...]:
        """From the most telling to the least."""
        return f"{config.workload} {config.method}", config.workload, ""


def _duration(seconds: float) -> str:
    if seconds < 90.0:
        return f"{seconds:.0f} s"
    return f"{seconds / 60.0:.0f} min" if seconds < 5400.0 else f"{seconds / 3600.0:.1f} h"
