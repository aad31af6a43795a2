"""Compiled models, activation checkpointing and accumulated gradients, on the real components."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.optim import AdamW
from torch.optim.lr_scheduler import LinearLR
from torch.utils.checkpoint import checkpoint

from gen_optim import GeNOptimizer, ProbeStatus, check_closure
from tests.training import Training, gen_adamw, gen_sgd, mlp, parameters_of, regression_data, same, wrapped

# torch warns of itself: where inductor is imported, and where tracing goes on after a graph break.
pytestmark = [
    pytest.mark.timeout(600),  # a compiler runs
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]

# --- torch.compile ---------------------------------------------------------------------------------------------------


class Network(nn.Module):
    """Dropout, batch normalisation, and a graph break in the middle or none."""

    def __init__(self, breaks: int = 0, *, dropout: float = 0.2, norm: bool = True) -> None:
        super().__init__()
        self.layers = mlp(dropout=dropout, norm=norm)
        self.breaks = breaks

    def forward(self, inputs: Tensor) -> Tensor:
        inputs = self.layers[:3](inputs)
        if self.breaks:
            torch._dynamo.graph_break()
        return self.layers[3:](inputs)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled_training(model: nn.Module, compiled: Callable[..., Any], **options: Any) -> Training:
    training = Training.of(lambda parameters: gen_adamw(parameters, **options), model)
    training.model = compiled  # type: ignore[assignment]
    return training


def compilations() -> int:
    return counters["stats"]["unique_graphs"]


BACKENDS = ["eager", "inductor"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("breaks", [0, 1])
def test_a_compiled_model_is_compiled_once_with_gradients_and_once_without(backend: str, breaks: int) -> None:
    model = Network(breaks)
    training = compiled_training(model, torch.compile(model, backend=backend), burn_in=3, period=4)
    scheduler = LinearLR(training.optimizer, 1.0, 0.0, total_iters=40)
    losses = training.train(1, scheduler)  # the first probe step, in which a start is found
    assert training.probes > 3
    assert compilations() == 2 * (1 + breaks)
    assert sum(counters["graph_break"].values()) == 2 * breaks
    found = set()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(30):
            losses += training.train(1, scheduler)
            found.add(training.optimizer.get_last_lr()[0])
        training.optimizer.param_groups[0]["lr"] *= 2.0  # by hand
        losses += training.train(1)
    assert len(found) > 20
    assert compilations() == 2 * (1 + breaks)
    assert sum(counters["graph_break"].values()) == 2 * breaks
    assert sum(losses[-5:]) < sum(losses[:5])


@pytest.mark.parametrize("backend", BACKENDS)
def test_probes_of_a_compiled_model_see_the_dropout_masks_of_the_call_with_gradients(backend: str) -> None:
    model = Network(dropout=0.5)
    # Graphs with and without gradients may round differently; other masks would change the loss by much more.
    training = compiled_training(model, torch.compile(model, backend=backend), tolerance=64.0)
    losses = check_closure(training.optimizer, training.closure)  # a warning is an error here
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-5)


def test_compiling_changes_nothing_but_rounding() -> None:
    runs = []
    for how in ("not", "module", "in place", "loss"):
        model = Network(dropout=0.0, norm=False)
        training = compiled_training(model, model)
        if how == "module":
            training.model = torch.compile(model)  # type: ignore[assignment]
        elif how == "in place":
            model.compile(backend="eager")
        elif how == "loss":
            training.loss = torch.compile(training.loss, backend="eager")  # type: ignore[method-assign]
        training.train(12)
        runs.append((training.optimizer.get_last_lr()[0], parameters_of(model)))
    (lr, parameters), *others = runs
    for other_lr, other in others:
        assert other_lr == pytest.approx(lr, rel=1e-3)
        torch.testing.assert_close(other, parameters, rtol=1e-3, atol=1e-4)


def test_a_probe_of_a_compiled_model_leaves_its_buffers_alone() -> None:
    model = Network()
    compiled = torch.compile(model, backend="eager")
    training = compiled_training(model, compiled)
    training.train(4)
    assert training.probes > 0
    assert model.layers[1].num_batches_tracked.item() == 4


# --- activation checkpointing ----------------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant: bool | None) -> None:
        super().__init__()
        self.layers = mlp(dropout=0.3)
        self.use_reentrant = use_reentrant

    def forward(self, inputs: Tensor) -> Tensor:
        first, inner, head = self.layers[0](inputs), self.layers[1:-1], self.layers[-1]
        if self.use_reentrant is None:
            return head(inner(first))
        return head(checkpoint(inner, first, use_reentrant=self.use_reentrant))


# As in every evaluation without gradients.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("make", [gen_adamw, gen_sgd])
def test_activation_checkpointing_changes_nothing(make: Callable[..., GeNOptimizer], use_reentrant: bool) -> None:
    runs = []
    for variant in (None, use_reentrant):
        torch.manual_seed(0)
        training = Training.of(make, Checkpointed(variant))
        training.train(20)
        runs.append((training.optimizer.get_last_lr(), parameters_of(training.model)))
    assert runs[0][0] == runs[1][0]
    assert same(runs[0][1], runs[1][1])


# --- accumulated gradients -------------------------------------------------------------------------------------------

MICRO_BATCHES = 4


def in_a_closure(model: nn.Module, optimizer: GeNOptimizer, inputs: Tensor, targets: Tensor) -> None:
    batches = list(zip(inputs.chunk(MICRO_BATCHES), targets.chunk(MICRO_BATCHES), strict=True))

    def closure() -> Tensor:
        optimizer.zero_grad()
        total = torch.zeros((), dtype=inputs.dtype)
        for micro_inputs, micro_targets in batches:
            loss = nn.functional.mse_loss(model(micro_inputs), micro_targets) / MICRO_BATCHES
            loss.backward()
            total += loss.detach()
        return total

    optimizer.step(closure)


def with_a_probe(model: nn.Module, optimizer: GeNOptimizer, inputs: Tensor, targets: Tensor) -> None:
    batches = list(zip(inputs.chunk(MICRO_BATCHES), targets.chunk(MICRO_BATCHES), strict=True))

    def losses() -> Iterator[Tensor]:
        for micro_inputs, micro_targets in batches:
            yield nn.functional.mse_loss(model(micro_inputs), micro_targets) / MICRO_BATCHES

    optimizer.zero_grad()
    for loss in losses():
        loss.backward()
    optimizer.step(probe=lambda: sum(losses()))


def at_once(model: nn.Module, optimizer: GeNOptimizer, inputs: Tensor, targets: Tensor) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(inputs), targets)
        loss.backward()
        return loss

    optimizer.step(closure)


# Looking back, a probe is called half way too: on a loss that is no parabola, another one is found.
@pytest.mark.parametrize(
    ("accumulate", "mode"), [(in_a_closure, "approximate"), (in_a_closure, "lookback"), (with_a_probe, "approximate")]
)
@pytest.mark.parametrize("make", [gen_adamw, gen_sgd])
def test_micro_batches_come_to_what_the_whole_batch_does(
    make: Callable[..., GeNOptimizer], accumulate: Callable[..., None], mode: str
) -> None:
    inputs, targets = regression_data(dtype=torch.float64)
    runs = []
    for step in (at_once, accumulate):
        model = mlp(dtype=torch.float64)
        optimizer = make(model.parameters(), mode=mode)
        for _ in range(60):
            step(model, optimizer, inputs, targets)
        assert optimizer.last_probe.status is ProbeStatus.FITTED
        runs.append((optimizer.get_last_lr()[0], parameters_of(model)))
    assert runs[1][0] == pytest.approx(runs[0][0], rel=1e-6)
    torch.testing.assert_close(runs[1][1], runs[0][1], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("accumulate", [in_a_closure, with_a_probe])
def test_dropout_differs_between_micro_batches_and_not_between_probes(accumulate: Callable[..., None]) -> None:
    inputs, targets = regression_data()
    torch.manual_seed(0)
    model = mlp(dropout=0.5)
    optimizer = gen_adamw(model.parameters(), mode="approximate")
    masks: list[list[Tensor]] = []

    def note(_: nn.Module, __: Any, output: Tensor) -> None:
        if optimizer.is_probing:
            masks[-1].append(output.detach() == 0.0)

    model[3].register_forward_hook(note)
    for _ in range(3):
        masks.append([])
        accumulate(model, optimizer, inputs, targets)
    for step in masks[1:]:
        rounds = [torch.cat(step[begin : begin + MICRO_BATCHES]) for begin in range(0, len(step), MICRO_BATCHES)]
        assert len(rounds) in (2, 3)
        assert same(rounds[1:], [rounds[0]] * (len(rounds) - 1))
        first, *others = step[:MICRO_BATCHES]
        assert not any(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("has_closure", [True, False])
def test_a_compiled_function_may_hold_the_whole_step(has_closure: bool) -> None:
    training = Training.of(lambda parameters: gen_adamw(parameters, burn_in=3, period=2))

    @torch.compile(backend="eager")
    def train() -> None:
        if has_closure:
            training.optimizer.step(training.closure)
        else:
            loss = training.loss()
            loss.backward()
            training.optimizer.step(probe=training.loss)
            training.optimizer.zero_grad()

    before = training.loss().item()
    for _ in range(12):
        train()
    assert training.optimizer.last_probe.step > 1
    assert training.loss().item() < before


# --- synchronisation -------------------------------------------------------------------------------------------------


@pytest.fixture(params=["plain", "capturable"])
def on_gpu(request: pytest.FixtureRequest) -> Iterator[Training]:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU: nothing else has a synchronisation to count")

    def make(parameters: list[Tensor]) -> GeNOptimizer:
        is_capturable = request.param == "capturable"
        lr = torch.tensor(1e-3, device="cuda") if is_capturable else 1e-3
        return wrapped(AdamW(parameters, lr=lr, capturable=is_capturable), burn_in=2, period=4)

    training = Training.of(make, mlp(dropout=0.3, norm=True).cuda())
    training.inputs, training.targets = training.inputs.cuda(), training.targets.cuda()
    training.train(4)
    yield training
    torch.cuda.set_sync_debug_mode("default")


def test_a_lazy_step_does_not_synchronise_and_a_probe_step_at_most_once(on_gpu: Training) -> None:
    counts: dict[str, list[int]] = {"lazy": [], "probe": []}
    for _ in range(8):
        probes = on_gpu.probes
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            on_gpu.optimizer.step(on_gpu.closure)
            torch.cuda.set_sync_debug_mode("default")
        kind = "lazy" if on_gpu.probes == probes else "probe"
        counts[kind].append(sum("synchronizing" in str(each.message) for each in caught))
    assert counts["lazy"] == [0] * 6
    assert len(counts["probe"]) == 2
    assert max(counts["probe"]) <= 1
