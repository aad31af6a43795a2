"""gen_optim: the learning rate, found while training, by the generalized Newton's method."""

from gen_optim.control import ProbeStatus
from gen_optim.diagnostics import History, ProbeRecord
from gen_optim.directional import Derivatives, derivatives_along, loss_along, quadratic_model
from gen_optim.optimizer import GeNOptimizer
from gen_optim.proposing import optimizer_direction
from gen_optim.quadratic import Parabola
from gen_optim.repeating import check_closure

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
