"""gen_optim: the learning rate, found while training, by the generalized Newton's method."""

from gen_optim.control import ProbeStatus
from gen_optim.diagnostics import History, ProbeRecord
from gen_optim.optimizer import GeNOptimizer

__all__ = ["GeNOptimizer", "History", "ProbeRecord", "ProbeStatus"]

__version__ = "0.1.0"
