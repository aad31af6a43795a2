"""gen_optim: the learning rate, found while training, by the generalized Newton's method."""

from gen_optim.averaging import multi_power_average, power_average, refreshed_batch_norm
from gen_optim.closure_check import check_closure
from gen_optim.functional.derivatives import Derivatives, derivatives_along, loss_along, quadratic_model
from gen_optim.functional.direction import optimizer_direction
from gen_optim.measurement import Exact, LookAhead, LookBack, Measurement, Mode, StepLoss
from gen_optim.optimizer import GeNOptimizer
from gen_optim.records import History, ProbeRecord
from gen_optim.rules import (
    Decision,
    InitialSearch,
    Parabola,
    ProbeStatus,
    PublishedRule,
    RelaxedRule,
    Rule,
    RuleState,
    fit_parabola,
)

__all__ = [
    "Decision",
    "Derivatives",
    "Exact",
    "GeNOptimizer",
    "History",
    "InitialSearch",
    "LookAhead",
    "LookBack",
    "Measurement",
    "Mode",
    "Parabola",
    "ProbeRecord",
    "ProbeStatus",
    "PublishedRule",
    "RelaxedRule",
    "Rule",
    "RuleState",
    "StepLoss",
    "check_closure",
    "derivatives_along",
    "fit_parabola",
    "loss_along",
    "multi_power_average",
    "optimizer_direction",
    "power_average",
    "quadratic_model",
    "refreshed_batch_norm",
]

__version__ = "0.2.0"
