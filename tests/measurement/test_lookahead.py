"""Looking ahead: probes at multiples of a step, its derivatives, and the search for an initial learning rate."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gen_optim import Exact, GeNOptimizer, LookAhead, Mode
from gen_optim.closures.losses import Loss
from gen_optim.measurement import MODES, Measurement, StepLoss, lookahead, make_mode
from gen_optim.measurement.interpolation import Interpolation
from gen_optim.measurement.lookahead import measure_initial_search, searched_lr
from gen_optim.rules import InitialSearch, Parabola, fit_parabola
from tests.measurement.recorded import RecordedSession
from tests.training import Training, gen_sgd

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
        start = self.call() if known else None
        self.evaluated.clear()
        step = Interpolation([[self.weight]])
        self.weight.data.fill_(-lr)
        step.arrive()
        self.session: Any = RecordedSession(self.call, with_graph=self.call_with_graph, tolerance=tolerance)
        self.loss = StepLoss(step, lr, self.session, {0.0: start})

    def call(self) -> Loss:
        lr = -self.weight.item()
        self.evaluated.append(lr)
        if self.function is not None:
            return self.function(lr)
        loss = 1.0 - self.slope * lr + 0.5 * self.curvature * lr * lr
        return loss if self.dtype is None else torch.tensor(loss, dtype=self.dtype)

    def call_with_graph(self) -> Tensor:
        return (1.0 + self.slope * self.weight + 0.5 * self.curvature * self.weight**2).sum()


# --- probes ----------------------------------------------------------------------------------------------------------


def test_probes_are_one_step_behind_and_one_ahead() -> None:
    case = Parabolic(lr=0.1)
    measurement = LookAhead().measure(case.loss)
    assert case.evaluated == [0.1, -0.1]  # first where the parameters are
    assert measurement.learning_rates == (-0.1, 0.0, 0.1)
    assert measurement.losses == pytest.approx((1.22, 1.0, 0.82))
    assert measurement.loss_start == 1.0
    assert measurement.loss_end is None


def test_loss_at_the_start_is_evaluated_if_it_is_not_known() -> None:
    case = Parabolic(lr=0.1, known=False)
    measurement = LookAhead().measure(case.loss)
    assert sorted(case.evaluated) == [-0.1, 0.0, 0.1]
    assert measurement.losses == pytest.approx((1.22, 1.0, 0.82))
    assert case.loss.losses[0.0] == torch.tensor(1.0)


@pytest.mark.parametrize("lr", [1e-6, 0.1, 100.0])
def test_probes_give_slope_curvature_and_optimum_per_unit_of_learning_rate(lr: float) -> None:
    case = Parabolic(lr, slope=2.0 / lr, curvature=4.0 / lr**2)
    measurement = LookAhead().measure(case.loss)
    assert measurement.parabola.slope == pytest.approx(2.0 / lr)
    assert measurement.parabola.curvature == pytest.approx(4.0 / lr**2)
    assert measurement.optimal_lr == pytest.approx(0.5 * lr)


def test_probed_losses_are_read_all_at_once() -> None:
    case = Parabolic(lr=0.1)
    LookAhead().measure(case.loss)
    assert case.session.reads == [4]  # with their rounding


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, None], ids=str)
def test_noise_is_the_tolerance_times_the_rounding_of_the_losses(dtype: torch.dtype | None) -> None:
    case = Parabolic(lr=0.5, dtype=dtype, tolerance=8.0)
    measurement = LookAhead().measure(case.loss)
    # Half precision adds up in float32 and is rounded once.
    rounding = (0.5 if dtype == torch.bfloat16 else 8.0) * torch.finfo(dtype or torch.float32).eps
    assert max(measurement.losses) == 2.5
    assert measurement.parabola.curvature_noise == pytest.approx(4 * rounding * 2.5 / 0.5**2)
    assert measurement.parabola.slope_noise == pytest.approx(rounding * 2.5 / 0.5)


def test_probe_that_is_not_finite_makes_a_parabola_that_says_so() -> None:
    case = Parabolic(lr=0.1, loss=lambda lr: 1.0 if lr <= 0 else math.nan)
    measurement = LookAhead().measure(case.loss)
    assert measurement.loss_start == 1.0
    assert not measurement.parabola.is_finite
    assert measurement.optimal_lr is None


# --- more points -----------------------------------------------------------------------------------------------------


def test_five_points_are_fitted_by_least_squares() -> None:
    noisy = {-2.0: 0.3, -1.0: -0.2, 0.0: 0.1, 1.0: 0.25, 2.0: -0.4}
    case = Parabolic(lr=1.0, loss=lambda lr: 1.0 - 2.0 * lr + 2.0 * lr * lr + noisy[lr])
    parabola = LookAhead((-2, -1, 0, 1, 2)).measure(case.loss).parabola
    points = np.array(sorted(noisy))
    second, first, value = np.polyfit(points, [1.0 - 2.0 * x + 2.0 * x * x + noisy[x] for x in points], 2)
    assert (parabola.value, parabola.slope, parabola.curvature) == pytest.approx((value, -first, 2.0 * second))
    assert case.evaluated == [1.0, 2.0, -1.0, -2.0]


def test_zero_is_added_since_its_loss_is_known() -> None:
    assert LookAhead((-1, 0.5, 1)).multiples == (-1.0, 0.0, 0.5, 1.0)
    case = Parabolic(lr=0.1)
    measurement = LookAhead((0.5, 1, 2)).measure(case.loss)
    assert measurement.loss_start == 1.0
    assert measurement.optimal_lr == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("multiples", "message"),
    [
        ((), "three different"),
        ((-1, 1), "three different"),
        ((1, 1, 1, 0), "three different"),
        ((-2, -1, 0), "positive"),
        ((-1, 0, math.inf), "three different finite"),
        ((-1, 0, math.nan), "three different finite"),
    ],
)
def test_points_that_fix_no_parabola_are_refused(multiples: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"multiples must hold .*{message}"):
        LookAhead(multiples)


def test_multiples_may_come_from_a_generator_and_are_named_if_they_are_refused() -> None:
    assert LookAhead(each for each in (-1, 0, 1)).multiples == (-1.0, 0.0, 1.0)
    with pytest.raises(ValueError, match=r"got \(0, 1\)"):
        LookAhead(each for each in (0, 1))


def test_an_optimizer_probes_at_the_multiples_of_its_mode() -> None:
    mode = LookAhead(multiples=(-2, -1, 0, 1, 2))
    training = Training.of(lambda p: gen_sgd(p, mode=mode, rule="published", period=1))
    training.train(2)
    assert isinstance(training.optimizer, GeNOptimizer)
    assert training.optimizer.mode is mode
    assert training.optimizer.last_probe is not None
    assert training.optimizer.last_probe.multiples == pytest.approx((-2.0, -1.0, 0.0, 1.0, 2.0))
    assert training.probes == 1 + 2 * 4  # one more in the first step, to compare


# --- differentiation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lr", [1e-6, 0.1, 100.0])
@pytest.mark.parametrize("known", [True, False])
def test_derivatives_are_per_unit_of_learning_rate(lr: float, known: bool) -> None:
    case = Parabolic(lr, slope=3.0, curvature=-5.0, known=known)
    measurement = Exact().measure(case.loss)
    assert measurement.parabola.slope == pytest.approx(3.0)
    assert measurement.parabola.curvature == pytest.approx(-5.0)
    assert (measurement.learning_rates, measurement.losses, measurement.loss_start) == ((0.0,), (1.0,), 1.0)


def test_derivatives_agree_with_probes_on_a_parabola() -> None:
    exact, probed = Exact().measure(Parabolic(lr=0.3).loss), LookAhead().measure(Parabolic(lr=0.3).loss)
    assert exact.optimal_lr == pytest.approx(probed.optimal_lr)


def test_derivatives_are_read_with_the_loss_all_at_once_and_no_probe_is_made() -> None:
    case = Parabolic(lr=0.1)
    Exact().measure(case.loss)
    assert case.session.reads == [3]
    assert case.evaluated == []


# --- the initial search ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lr", [1e-3, 1.0, 50.0])
@pytest.mark.parametrize("optimum", [1e-6, 1e-2, 1.0, 1e3])
@pytest.mark.parametrize("known", [True, False])
def test_search_is_in_learning_rates_whatever_the_step(lr: float, optimum: float, known: bool) -> None:
    case = Parabolic(lr, slope=1.0 / optimum, curvature=1.0 / optimum**2, known=known)
    measurement = measure_initial_search(case.loss)
    assert isinstance(measurement.found, InitialSearch)
    assert measurement.optimal_lr is not None
    if optimum > 500 * lr:  # the loss falls for longer than a parameter that begins at 0 is taken to be large
        assert not measurement.found.is_bounded
        assert measurement.optimal_lr == pytest.approx(0.1)  # the length of the step is the learning rate
        return
    assert measurement.found.is_bounded
    assert optimum / 2 <= measurement.optimal_lr <= 2 * optimum
    assert measurement.learning_rates[0] == 0.0
    evaluated = case.evaluated if known else case.evaluated[1:]
    assert evaluated == pytest.approx(list(measurement.learning_rates[1:]))


def test_what_is_out_of_reach_of_a_step_too_short_to_tell_the_direction_is_not_found() -> None:
    case = Parabolic(1e-6, slope=1.0, curvature=1.0)  # 1024 times the step is a hundredth of the parameter's scale
    assert measure_initial_search(case.loss).optimal_lr is None


def test_search_is_along_ever_longer_steps_in_a_cycle() -> None:
    assert [searched_lr(failures) for failures in range(12)] == [1024.0**power for power in (*range(11), 0)]
    assert max(searched_lr(failures) for failures in range(11)) == lookahead._LONGEST


def test_search_reports_every_evaluation_and_the_loss_where_the_step_began() -> None:
    case = Parabolic(lr=1.0)
    measurement = measure_initial_search(case.loss)
    assert len(measurement.losses) == len(measurement.learning_rates) == 1 + len(case.evaluated)
    assert measurement.loss_start == measurement.losses[0] == 1.0
    assert measurement.losses == pytest.approx([1.0 - 2.0 * lr + 2.0 * lr**2 for lr in measurement.learning_rates])


def test_search_has_no_parabola() -> None:
    parabola = measure_initial_search(Parabolic(lr=1.0).loss).parabola
    assert math.isnan(parabola.slope)
    assert math.isnan(parabola.curvature)
    assert not parabola.is_finite


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nothing_is_searched_from_a_loss_that_is_not_finite(bad: float) -> None:
    case = Parabolic(lr=1.0, loss=lambda lr: bad)
    measurement = measure_initial_search(case.loss)
    assert case.evaluated == []
    assert measurement.optimal_lr is None
    assert measurement.learning_rates == (0.0,)
    assert measurement.losses == pytest.approx((bad,), nan_ok=True)


@pytest.mark.parametrize(("tolerance", "is_found"), [(8.0, False), (1.0, True)])
def test_descent_within_the_rounding_finds_nothing(tolerance: float, is_found: bool) -> None:
    case = Parabolic(lr=1.0, loss=lambda lr: 1.0 - 2 * EPSILON32 if lr else 1.0, tolerance=tolerance)
    assert (measure_initial_search(case.loss).optimal_lr is not None) == is_found


# --- measurements and modes ------------------------------------------------------------------------------------------


def test_optimum_of_a_measurement_is_that_of_what_was_found() -> None:
    found = Parabola(1.0, 2.0, 2.0)
    fitted = Measurement((-1.0, 0.0, 1.0), (4.0, 1.0, 0.0), found, 1.0)
    assert fitted.optimal_lr == 1.0
    assert fitted.parabola is found
    assert Measurement((0.0,), (1.0,), InitialSearch(0.25, (), ()), 1.0).optimal_lr == 0.25
    assert Measurement((0.0,), (1.0,), InitialSearch(None, (), ()), 1.0).optimal_lr is None


@pytest.mark.parametrize("name", MODES)
def test_names_are_shorthands_of_modes(name: str) -> None:
    assert type(make_mode(name)) is MODES[name]
    assert repr(make_mode(name)).startswith(MODES[name].__name__)


@pytest.mark.parametrize("mode", ["magic", "", "LookBack"])
def test_unknown_names_are_refused(mode: str) -> None:
    with pytest.raises(ValueError, match=rf"mode must be one of 'lookback', .*, got '{mode}'"):
        make_mode(mode)


@pytest.mark.parametrize("mode", [None, 3, LookAhead])
def test_what_is_no_mode_is_refused(mode: Any) -> None:
    with pytest.raises(TypeError, match="mode must be a name or a Mode"):
        make_mode(mode)


@pytest.mark.parametrize("mode", MODES.values())
@pytest.mark.parametrize("tolerance", [-1.0, math.inf, math.nan, "8", True, None])
def test_a_tolerance_that_is_no_error_is_refused(mode: type[Mode], tolerance: Any) -> None:
    with pytest.raises(ValueError, match="tolerance must be a finite number of at least 0"):
        mode(tolerance=tolerance)


def kernels_of_attention() -> dict[str, bool]:
    backends = torch.backends.cuda
    return {
        "math": backends.math_sdp_enabled(),  # type: ignore[no-untyped-call]
        "flash": backends.flash_sdp_enabled(),  # type: ignore[no-untyped-call]
        "memory-efficient": backends.mem_efficient_sdp_enabled(),  # type: ignore[no-untyped-call]
    }


def test_only_exact_mode_chooses_kernels() -> None:
    kernels = kernels_of_attention()
    with LookAhead().around_calls():
        assert kernels_of_attention() == kernels
    with Exact().around_calls():
        assert kernels_of_attention() == {"math": True, "flash": False, "memory-efficient": False}
    assert kernels_of_attention() == kernels


# --- a mode of one's own ---------------------------------------------------------------------------------------------


class Forward(Mode):
    """Slope from the gradients' own descent, curvature from one point ahead."""

    def measure(self, loss: StepLoss) -> Measurement:
        points = (0.0, 0.5, 1.0)
        losses, _ = loss.read_with_rounding([loss.evaluate(each) for each in points])
        start, middle, end = losses
        curvature = 4.0 * (start - 2.0 * middle + end)
        parabola = Parabola(start, (start - end + 0.5 * curvature) / loss.lr, curvature / loss.lr**2)
        return Measurement(tuple(each * loss.lr for each in points), losses, parabola, start)


def test_a_mode_of_ones_own_trains() -> None:
    training = Training.of(lambda p: gen_sgd(p, mode=Forward(), rule="published", period=1))
    losses = training.train(30)
    assert isinstance(training.optimizer, GeNOptimizer)
    assert training.optimizer.last_probe is not None
    assert training.optimizer.last_probe.multiples == pytest.approx((0.0, 0.5, 1.0))
    assert losses[-1] < 0.7 * losses[0]


class Ahead(Mode):
    """A mode that never evaluates the loss where the step begins."""

    def measure(self, loss: StepLoss) -> Measurement:
        points = (0.5, 1.0, 2.0)
        losses, _ = loss.read_with_rounding([loss.evaluate(each) for each in points])
        learning_rates = tuple(each * loss.lr for each in points)
        parabola = fit_parabola(learning_rates, losses, rounding=0.0)
        return Measurement(learning_rates, losses, parabola, parabola.value)


def test_a_mode_of_ones_own_need_not_evaluate_the_loss_that_step_returns() -> None:
    training = Training.of(lambda p: gen_sgd(p, mode=Ahead(), rule="published", period=1))
    for _ in range(3):
        training.optimizer.zero_grad()
        training.loss().backward()
        loss = training.optimizer.step(probe=training.loss)
        assert loss is not None
        assert float(loss) > 0.0
