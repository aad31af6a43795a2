"""Parts of the command line that several jobs share."""

from __future__ import annotations

import argparse
import ast
import shlex
import sys
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
    """Returns the command that is running, without this machine's paths, and torch's version: the head of a page."""
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


def assignment(text: str) -> tuple[str, Any]:
    """Reads ``name=value`` for argparse; the value is a Python literal or else a string."""
    name, equals, value = text.partition("=")
    if not (name.isidentifier() and equals):
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, but is {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value
