"""gen_optim: the learning rate, found while training, by the generalized Newton's method."""

from gen_optim.closure_check import check_closure
from gen_optim.functional.derivatives import Derivatives, derivatives_along, loss_along, quadratic_model
from gen_optim.functional.direction import optimizer_direction
from gen_optim.optimizer import GeNOptimizer
from gen_optim.records import History, ProbeRecord
from gen_optim.rules.base import ProbeStatus
from gen_optim.rules.parabola import Parabola

__all__ = [
    "Derivatives",
    "GeNOptimizer",
    "History",
    "Parabola",
    "ProbeRecord",
    "ProbeStatus",
    "check_closure",
    "derivatives_along",
    "loss_along",
    "optimizer_direction",
    "quadratic_model",
]

__version__ = "0.1.0"
