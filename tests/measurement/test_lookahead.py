import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from gen_optim.closures.losses import Loss, losses_to_floats
from gen_optim.measurement.interpolation import Move
from gen_optim.measurement.lookahead import MODES, Line, Measurement, differentiate, probe_around, search, searched_lr
from gen_optim.rules.initial_search import StartSearch
from gen_optim.rules.parabola import Parabola

EPSILON32 = torch.finfo(torch.float32).eps
DOUBLE = torch.float64


class Parabolic:
    """A weight that a step at ``lr`` has moved from 0 to −lr, and a loss of the given slope and curvature there."""

    def __init__(
        self,
        lr: float,
        *,
        slope: float = 2.0,
        curvature: float = 4.0,
        dtype: torch.dtype | None = DOUBLE,
        known: bool = True,
        tolerance: float = 0.0,
        loss: Callable[[float], float] | None = None,
    ) -> None:
        self.slope, self.curvature, self.dtype, self.function = slope, curvature, dtype, loss
        self.weight = torch.zeros(1, dtype=DOUBLE, requires_grad=True)
        self.evaluated: list[float] = []
        self.reads: list[int] = []
        here = self.call() if known else None
        self.evaluated.clear()
        move = Move([[self.weight]])
        self.weight.data.fill_(-lr)
        move.arrive()
        self.line = Line(
            move=move,
            lr=lr,
            here=here,
            call=self.call,
            call_with_graph=self.call_with_graph,
            read=self.read,
            tolerance=tolerance,
        )

    def call(self) -> Loss:
        lr = -self.weight.item()
        self.evaluated.append(lr)
        if self.function is not None:
            return self.function(lr)
        loss = 1.0 - self.slope * lr + 0.5 * self.curvature * lr * lr
        return loss if self.dtype is None else torch.tensor(loss, dtype=self.dtype)

    def call_with_graph(self) -> Tensor:
        return (1.0 + self.slope * self.weight + 0.5 * self.curvature * self.weight**2).sum()

    def read(self, losses: Sequence[Loss]) -> list[float]:
        self.reads.append(len(losses))
        return losses_to_floats(losses)


# --- probes ----------------------------------------------------------------------------------------------------------


def test_probes_are_one_step_behind_and_one_ahead() -> None:
    case = Parabolic(lr=0.1)
    measurement = probe_around(case.line)
    assert case.evaluated == [0.1, -0.1]  # first where the parameters are
    assert measurement.learning_rates == (-0.1, 0.0, 0.1)
    assert measurement.losses == pytest.approx((1.22, 1.0, 0.82))
    assert measurement.loss == 1.0
    assert measurement.raw is case.line.here


def test_loss_where_the_step_began_is_evaluated_where_it_is_not_known() -> None:
    case = Parabolic(lr=0.1, known=False)
    measurement = probe_around(case.line)
    assert sorted(case.evaluated) == [-0.1, 0.0, 0.1]
    assert measurement.losses == pytest.approx((1.22, 1.0, 0.82))
    assert measurement.raw == torch.tensor(1.0)


@pytest.mark.parametrize("lr", [1e-6, 0.1, 100.0])
def test_probes_give_slope_curvature_and_optimum_per_unit_of_learning_rate(lr: float) -> None:
    case = Parabolic(lr, slope=2.0 / lr, curvature=4.0 / lr**2)
    measurement = probe_around(case.line)
    assert measurement.parabola.slope == pytest.approx(2.0 / lr)
    assert measurement.parabola.curvature == pytest.approx(4.0 / lr**2)
    assert measurement.optimal_lr == pytest.approx(0.5 * lr)


def test_probed_losses_are_read_all_at_once() -> None:
    case = Parabolic(lr=0.1)
    probe_around(case.line)
    assert case.reads == [4]  # with their rounding


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, None], ids=str)
def test_noise_is_the_tolerance_times_the_rounding_of_the_losses(dtype: torch.dtype | None) -> None:
    case = Parabolic(lr=0.5, dtype=dtype, tolerance=8.0)
    measurement = probe_around(case.line)
    # Half precision adds up in float32 and is rounded once.
    rounding = (0.5 if dtype == torch.bfloat16 else 8.0) * torch.finfo(dtype or torch.float32).eps
    assert max(measurement.losses) == 2.5
    assert measurement.parabola.curvature_noise == pytest.approx(4 * rounding * 2.5 / 0.5**2)
    assert measurement.parabola.slope_noise == pytest.approx(rounding * 2.5 / 0.5)


def test_probe_that_is_not_finite_makes_a_parabola_that_says_so() -> None:
    case = Parabolic(lr=0.1, loss=lambda lr: 1.0 if lr <= 0 else math.nan)
    measurement = probe_around(case.line)
    assert measurement.loss == 1.0
    assert not measurement.parabola.is_finite
    assert measurement.optimal_lr is None


# --- differentiation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lr", [1e-6, 0.1, 100.0])
@pytest.mark.parametrize("known", [True, False])
def test_derivatives_are_per_unit_of_learning_rate(lr: float, known: bool) -> None:
    case = Parabolic(lr, slope=3.0, curvature=-5.0, known=known)
    measurement = differentiate(case.line)
    assert measurement.parabola.slope == pytest.approx(3.0)
    assert measurement.parabola.curvature == pytest.approx(-5.0)
    assert (measurement.learning_rates, measurement.losses, measurement.loss) == ((0.0,), (1.0,), 1.0)


def test_derivatives_agree_with_probes_on_a_parabola() -> None:
    exact, probed = differentiate(Parabolic(lr=0.3).line), probe_around(Parabolic(lr=0.3).line)
    assert exact.optimal_lr == pytest.approx(probed.optimal_lr)


def test_derivatives_are_read_with_the_loss_all_at_once_and_no_probe_is_made() -> None:
    case = Parabolic(lr=0.1)
    differentiate(case.line)
    assert case.reads == [3]
    assert case.evaluated == []


# --- the start -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lr", [1e-3, 1.0, 50.0])
@pytest.mark.parametrize("optimum", [1e-6, 1e-2, 1.0, 1e3])
@pytest.mark.parametrize("known", [True, False])
def test_start_is_searched_in_learning_rates_whatever_the_step(lr: float, optimum: float, known: bool) -> None:
    case = Parabolic(lr, slope=1.0 / optimum, curvature=1.0 / optimum**2, known=known)
    measurement = search(case.line)
    assert isinstance(measurement.found, StartSearch)
    if optimum > 500 * lr:  # out of reach: so short a step does not tell the direction from rounding
        assert measurement.optimal_lr is None
        return
    assert measurement.optimal_lr is not None
    assert optimum / 2 <= measurement.optimal_lr <= 2 * optimum
    assert measurement.learning_rates[0] == 0.0
    evaluated = case.evaluated if known else case.evaluated[1:]
    assert evaluated == pytest.approx(list(measurement.learning_rates[1:]))


def test_start_is_searched_along_ever_longer_steps_in_a_cycle() -> None:
    assert [searched_lr(failures) for failures in range(8)] == [1024.0**power for power in (0, 1, 2, 3, 4, 5, 6, 0)]
    assert searched_lr(-1) == 1024.0**6


def test_start_out_of_reach_of_the_longest_step_is_taken_all_the_same() -> None:
    lr = searched_lr(-1)
    measurement = search(Parabolic(lr, slope=1e-6 / lr, curvature=1e-12 / lr**2).line)
    assert measurement.optimal_lr is not None
    assert measurement.optimal_lr >= 1024.0 * lr


def test_start_reports_every_evaluation_and_the_loss_where_the_step_began() -> None:
    case = Parabolic(lr=1.0)
    measurement = search(case.line)
    assert len(measurement.losses) == len(measurement.learning_rates) == 1 + len(case.evaluated)
    assert measurement.loss == measurement.losses[0] == 1.0
    assert measurement.losses == pytest.approx([1.0 - 2.0 * lr + 2.0 * lr**2 for lr in measurement.learning_rates])


def test_start_has_no_parabola() -> None:
    parabola = search(Parabolic(lr=1.0).line).parabola
    assert math.isnan(parabola.slope)
    assert math.isnan(parabola.curvature)
    assert not parabola.is_finite


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_no_start_is_searched_from_a_loss_that_is_not_finite(bad: float) -> None:
    case = Parabolic(lr=1.0, loss=lambda lr: bad)
    measurement = search(case.line)
    assert case.evaluated == []
    assert measurement.optimal_lr is None
    assert measurement.learning_rates == (0.0,)
    assert measurement.losses == pytest.approx((bad,), nan_ok=True)


@pytest.mark.parametrize(("tolerance", "is_found"), [(8.0, False), (1.0, True)])
def test_descent_within_the_rounding_is_no_start(tolerance: float, is_found: bool) -> None:
    case = Parabolic(lr=1.0, loss=lambda lr: 1.0 - 2 * EPSILON32 if lr else 1.0, tolerance=tolerance)
    assert (search(case.line).optimal_lr is not None) == is_found


# --- measurements and modes ------------------------------------------------------------------------------------------


def test_optimum_of_a_measurement_is_that_of_what_was_found() -> None:
    found = Parabola(1.0, 2.0, 2.0)
    fitted = Measurement((-1.0, 0.0, 1.0), (4.0, 1.0, 0.0), 1.0, 1.0, found)
    assert fitted.optimal_lr == 1.0
    assert fitted.parabola is found
    assert Measurement((0.0,), (1.0,), 1.0, 1.0, StartSearch(0.25, (), ())).optimal_lr == 0.25
    assert Measurement((0.0,), (1.0,), 1.0, 1.0, StartSearch(None, (), ())).optimal_lr is None


def test_modes_measure_by_probes_and_by_differentiation() -> None:
    assert MODES["approximate"].measure is probe_around
    assert MODES["exact"].measure is differentiate


def kernels_of_attention() -> dict[str, bool]:
    backends = torch.backends.cuda
    return {
        "math": backends.math_sdp_enabled(),  # type: ignore[no-untyped-call]
        "flash": backends.flash_sdp_enabled(),  # type: ignore[no-untyped-call]
        "memory-efficient": backends.mem_efficient_sdp_enabled(),  # type: ignore[no-untyped-call]
    }


def test_only_exact_mode_chooses_kernels() -> None:
    assert MODES["approximate"].kernels is nullcontext
    kernels = kernels_of_attention()
    with MODES["exact"].kernels():
        assert kernels_of_attention() == {"math": True, "flash": False, "memory-efficient": False}
    assert kernels_of_attention() == kernels
