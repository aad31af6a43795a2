"""Executes runs in several processes, writes their records and shows progress."""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.battery import runs
from benchmarks.battery.config import Config
from benchmarks.battery.methods import code_fingerprint
from benchmarks.battery.records import Record, Results
from benchmarks.battery.results_file import Writer
from benchmarks.data import Data
from benchmarks.determinism import single_thread

Pending = Callable[[Results], Sequence[Config]]
"""From the known results to the runs to execute, in order; those that are known already may be among them."""


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
    """Executes what is pending and writes each record as it comes.

    Args:
        pending: Returns the runs to execute; called again after each run.
        results: The known results, which grow.
        writer: Writes the records.
        data: Loads the data sets.
        jobs: The number of processes. If it is 1, this process executes the runs.
        total: The number of runs at the end, if ``pending`` does not know them all yet.
        minutes: The time after which no run is started.
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
    with progress, _executor(jobs) as executor:
        while True:
            todo = _open(pending, results)
            progress.total = max(progress.total, progress.n + len(todo))  # what is known may call for more
            running = {config.key for config in in_flight.values()}
            waiting = [config for config in todo if config.key not in running]
            is_over = minutes is not None and time.monotonic() - began > 60.0 * minutes
            while waiting and not is_over and len(in_flight) < jobs:
                config = waiting.pop(0)
                progress.set_description(str(config), refresh=False)
                in_flight[executor.submit(runs.run, config, data)] = config
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
            "A process of the battery was killed. The finished runs are kept; start the battery again to continue."
        ) from None
    return Record.from_line(record.to_line())  # as the file has it, so that a report made later says the same


def _open(pending: Pending, results: Results) -> list[Config]:
    """What is pending and not known, each once."""
    return list({config.key: config for config in pending(results) if config not in results}.values())


class _ThisProcess(Executor):
    """Executes each call at once, in this process."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


@contextmanager
def _executor(jobs: int) -> Iterator[Executor]:
    """Processes of one thread each."""
    if jobs == 1:
        with single_thread():
            yield _ThisProcess()
        return
    # Forking a process that has used torch's threads can hang.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_begin)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _begin() -> None:
    """Prepares a process for its runs."""
    torch.set_num_threads(1)
    code_fingerprint()  # of the code that was just imported: it may change while the battery runs


class _Clock:
    """Estimates how long runs take from those that are done."""

    def __init__(self, results: Results) -> None:
        self._seconds: dict[str, list[float]] = defaultdict(list)
        for record in results.records.values():
            self.learn(record)

    def learn(self, record: Record) -> None:
        for name in self._names(record.config):
            self._seconds[name].append(record.total_seconds / record.config.steps)

    def estimate(self, configs: Sequence[Config]) -> float:
        """Returns the seconds that the runs will take one after the other."""
        means = {name: sum(seconds) / len(seconds) for name, seconds in self._seconds.items()}
        total = 0.0
        for config in configs:
            known = [means[name] for name in self._names(config) if name in means]
            total += config.steps * known[0] if known else 0.0
        return total

    @staticmethod
    def _names(config: Config) -> tuple[str, ...]:
        """Sets of runs that this one is in, the smallest first."""
        return f"{config.workload} {config.method}", config.workload, ""


def _duration(seconds: float) -> str:
    if seconds < 90.0:
        return f"{seconds:.0f} s"
    return f"{seconds / 60.0:.0f} min" if seconds < 5400.0 else f"{seconds / 3600.0:.1f} h"
