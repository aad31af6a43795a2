"""Warnings point at the line of whoever uses the package."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import gen_optim
from gen_optim.warning import warn

OURS, TORCHS, USERS = gen_optim.__file__, torch.__file__, "/somewhere/training.py"
NEIGHBOUR = str(Path(OURS).parent) + "_runs.py"


def through(files: list[str]) -> Callable[[], None]:
    """A function that warns, called by others that stand in ``files``, the innermost first."""
    call: Callable[..., None] = warn
    for source, file in zip(["call('on purpose')", *["call()"] * len(files)], files, strict=False):
        names = {"call": call}
        exec(compile(f"def outer(): {source}", file, "exec"), names)
        call = names["outer"]
    return call


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ([OURS], __file__),
        ([OURS, TORCHS, OURS, TORCHS], __file__),
        ([OURS, USERS], USERS),
        ([OURS, TORCHS, USERS, TORCHS], USERS),
        ([OURS, NEIGHBOUR, USERS], NEIGHBOUR),
    ],
)
def test_a_warning_points_at_the_innermost_line_outside_of_the_package_and_of_torch(
    files: list[str], expected: str
) -> None:
    with pytest.warns(UserWarning, match="on purpose") as caught:
        through(files)()
    assert caught[0].filename == expected
