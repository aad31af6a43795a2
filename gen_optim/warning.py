"""Warnings that point at the user's line, not at one of this package or of torch."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import torch

PATIENCE = 10
"""How many times in a row something is missing or overridden before the user is warned."""

_INTERNAL = tuple(str(Path(file).resolve().parent) + os.sep for file in (__file__, torch.__file__))


def warn(message: str) -> None:
    """Issue a ``UserWarning`` at the innermost line that belongs neither to this package nor to torch."""
    frame, level = sys._getframe(1), 2  # noqa: SLF001 - Python documents it
    while frame.f_back is not None and str(Path(frame.f_code.co_filename).resolve()).startswith(_INTERNAL):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
