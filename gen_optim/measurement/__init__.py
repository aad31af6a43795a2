"""How the loss along one step is measured: by looking back, by looking ahead, or by differentiation."""

from gen_optim.measurement.double_backward import Exact
from gen_optim.measurement.lookahead import LookAhead
from gen_optim.measurement.lookback import LookBack
from gen_optim.measurement.measurement import Measurement, Mode, StepLoss

__all__ = ["MODES", "Exact", "LookAhead", "LookBack", "Measurement", "Mode", "StepLoss", "make_mode"]

MODES: dict[str, type[Mode]] = {"lookback": LookBack, "approximate": LookAhead, "exact": Exact}
"""Modes by the name that ``GeNOptimizer(mode=...)`` takes."""


def make_mode(mode: str | Mode) -> Mode:
    """Return the mode of a name, or the mode itself.

    Raises:
        ValueError: If there is no mode of that name.
        TypeError: If ``mode`` is neither a name nor a mode.
    """
    if isinstance(mode, Mode):
        return mode
    if not isinstance(mode, str):
        raise TypeError(f"mode must be a name or a Mode, such as LookAhead(multiples=(-1, 0, 1)), got {mode!r}")
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(map(repr, MODES))}, or a Mode, got {mode!r}")
    return MODES[mode]()
