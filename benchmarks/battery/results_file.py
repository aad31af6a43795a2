"""The results file: one JSON line per run, one writer, and nothing lost if a process is killed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from benchmarks.battery.records import Record, Results


def read(path: Path) -> Results:
    """Reads a results file; a last line that was cut off does not count.

    Args:
        path: The file. A missing one holds no results.

    Raises:
        ValueError: If a line other than the last is broken.
    """
    results = Results()
    if not path.exists():
        return results
    *whole, last = path.read_bytes().split(b"\n")
    for number, line in enumerate(whole, start=1):
        record = _parsed(line)
        if record is None:
            raise ValueError(f"{path}, line {number} is no record: {line[:80]!r}")
        results.add(record)
    record = _parsed(last)
    if record is not None:
        results.add(record)
    return results


class Writer:
    """Appends records to a results file and writes each to the disk at once.

    Args:
        file: The file, open for appending.
    """

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, record: Record) -> None:
        """Appends a record."""
        self._file.write(record.to_line() + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())


@contextmanager
def writing(path: Path) -> Iterator[Writer]:
    """Opens a results file for appending, as its only writer.

    Args:
        path: The file; made with its folder if missing. A last line that was cut off is removed.

    Raises:
        RuntimeError: If another process writes there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        _lock(file, path)
        _mend(path, file)
        yield Writer(file)


def _parsed(line: bytes) -> Record | None:
    try:
        return Record.from_line(line.decode("utf-8", "replace"))
    except ValueError:
        return None


def _mend(path: Path, file: TextIO) -> None:
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if _parsed(content[whole:]) is None:
        os.truncate(path, whole)
    else:  # only the end of the line is missing
        file.write("\n")
        file.flush()


def _lock(file: TextIO, path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # not on Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise RuntimeError(f"another battery writes to {path}; wait for it or choose another --output") from error
