"""What all jobs share: the option for where to write, the command as a line, tables in Markdown."""

from __future__ import annotations

import argparse
import ast
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


def add_output(parser: argparse.ArgumentParser) -> None:
    """Gives a parser the option ``--output``."""
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(__file__).parent / "results",
        metavar="DIR",
        help="where to write tables and pictures (default: benchmarks/results)",
    )


def command_line() -> str:
    """The command that runs now, without the paths of this machine, and torch's version: the head of a page."""
    arguments: list[str] = []
    skip = False
    for each in sys.argv[1:]:
        name = each.split("=", 1)[0]
        if skip:
            skip = False
        elif name in ("--data", "--output"):
            skip = "=" not in each
            arguments += ["--data", "DIR"] if name == "--data" else []
        else:
            arguments.append(each)
    return f"`{shlex.join(['python', '-m', 'benchmarks', *arguments])}`, torch {torch.__version__}"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, its first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [cells[0].ljust(widths[0])]
        padded += [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(head), line(rule), *map(line, rows)])


def assignment(text: str) -> tuple[str, Any]:
    """Reads ``name=value`` for argparse; the value is a Python literal or else a string."""
    name, equals, value = text.partition("=")
    if not (name.isidentifier() and equals):
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, but is {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value
