"""A Ctrl-C at any line of the package: after it nothing is left behind, and training goes on."""

from __future__ import annotations

import copy
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

import gen_optim
from gen_optim import GeNOptimizer
from tests.training import Training, parameters_of, wrapped

HOME = str(Path(gen_optim.__file__).parent)
SAMPLE = 30
"""The number of lines of a step that are interrupted, unless all are asked for by ``-m exhaustive``."""


class Lines:
    """While entered, counts the lines of the package that are executed, and interrupts before one of them.

    Args:
        at: The number of the line, from 0; None to interrupt none.

    Attributes:
        count: The number of lines so far.
        place: Where it interrupted.
    """

    def __init__(self, at: int | None = None) -> None:
        self.at, self.count, self.place = at, 0, ""

    def _trace(self, frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(HOME):
            return None
        if event == "line":
            self.count += 1
            if self.count - 1 == self.at:
                self.place = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                sys.settrace(None)
                raise KeyboardInterrupt
        return self._trace

    def __enter__(self) -> Any:
        self._before = sys.gettrace()
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)


def training(**options: Any) -> Training:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 1))
    of = Training.of(lambda p: wrapped(SGD(p, lr=0.05, momentum=0.9), **options), model)
    of.optimizer.base_optim.register_step_post_hook(hook)
    return of


def hook(*_: Any) -> None:
    """A hook of the base optimizer, which must still be there afterwards."""


LOOKING_BACK = {"rule": "published", "period": 2, "lr_max": 0.06, "lr_min": 0.05}
KINDS: dict[str, tuple[dict[str, Any], int]] = {
    "lazy": ({**LOOKING_BACK, "period": 9}, 3),
    "lazy, keeps its start": (LOOKING_BACK, 2),
    "looks back": (LOOKING_BACK, 3),
    "balances": ({"burn_in": 2, "period": 1}, 10),
    "searches": ({}, 0),
    "looks ahead": ({**LOOKING_BACK, "mode": "approximate", "period": 1}, 1),
    "exact": ({**LOOKING_BACK, "mode": "exact", "period": 1}, 1),
}
"""Options, and the number of steps before the one that is interrupted."""


class Scene:
    """A training before the step that is to be interrupted, from which it starts again and again."""

    def __init__(self, kind: str, ways: str) -> None:
        options, steps = KINDS[kind]
        torch.manual_seed(0)
        self.of, self.ways = training(**options), ways
        self.of.train(steps)
        self.model = copy.deepcopy(self.of.model.state_dict())
        self.state = copy.deepcopy(self.of.optimizer.state_dict())

    def again(self) -> None:
        """Put everything back."""
        self.of.model.load_state_dict(self.model)
        self.of.optimizer.load_state_dict(copy.deepcopy(self.state))
        self.of.optimizer._diagnostics.misses = 0  # of steps that were interrupted
        self.of.optimizer._context.has_warned_of_failure = True  # of probes that fail
        torch.manual_seed(1)

    def step(self) -> None:
        if self.ways == "closure":
            self.of.optimizer.step(self.of.closure)
        elif self.ways == "closure that fails where the last step ended":
            self.of.optimizer.step(self.failing)
        else:
            self.of.closure()
            self.of.optimizer.step(probe=self.of.loss)

    def failing(self) -> Tensor:
        if all(map(torch.equal, self.model.values(), self.of.model.state_dict().values())):
            raise ValueError("on purpose")
        return self.of.closure()


def legitimate(scene: Scene, ends: list[list[Tensor]]) -> bool:
    """Whether the parameters are at one of some points, up to rounding."""
    present = parameters_of(scene.of.model)
    return any(all(map(torch.allclose, present, end)) for end in ends)


def averages_of(scene: Scene) -> dict[int, Tensor]:
    """The averages by the number of the parameter."""
    state = scene.of.optimizer.base_optim.state
    parameters = enumerate(scene.of.model.parameters())
    return {number: state[each]["gen_average"].clone() for number, each in parameters if "gen_average" in state[each]}


def are_legitimate(present: dict[int, Tensor], averages: list[dict[int, Tensor]], ends: list[list[Tensor]]) -> bool:
    """Whether averages are those before or after a step, or some of them have just begun, where parameters were."""
    for known in averages:
        if present.keys() == known.keys() and all(torch.allclose(each, known[at]) for at, each in present.items()):
            return True
    return not averages[0] and all(any(torch.allclose(each, end[at]) for end in ends) for at, each in present.items())


def state_of_torch() -> dict[str, Any]:
    return {
        "backward": torch.autograd.backward,
        "autocast": torch.autocast.__enter__,
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "gradients": torch.is_grad_enabled(),
        "kernels": (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()),
    }


def check(scene: Scene, ends: list[list[Tensor]], lrs: list[float], batches: int, place: str) -> None:
    """What must hold after an interrupt, before the next step and after it."""
    of, optimizer = scene.of, scene.of.optimizer
    assert isinstance(optimizer, GeNOptimizer)
    assert legitimate(scene, ends), f"parameters at a probe point: {place}"
    assert list(optimizer.base_optim._optimizer_step_post_hooks.values()) == [hook], place
    assert not optimizer.is_probing, place
    assert any(optimizer.param_groups[0]["lr"] == pytest.approx(lr) for lr in lrs), place
    norm: Any = of.model[1]
    assert norm.num_batches_tracked in (batches, batches + 1), place
    of.closure()
    assert all(each.grad is not None for each in of.model.parameters()), f"backward does nothing: {place}"
    batches = int(norm.num_batches_tracked)
    scene.step()
    assert norm.num_batches_tracked in (batches, batches + 1), place
    assert optimizer._context.controller._manual_steps == 0, f"taken for a manual value: {place}"
    assert not any(each._post_accumulate_grad_hooks for each in of.model.parameters()), f"a hook stayed: {place}"


CASES = [(kind, "closure") for kind in KINDS] + [
    *((kind, "probe") for kind in ("searches", "looks back", "balances", "lazy")),
    ("balances", "closure that fails where the last step ended"),
]


def interrupt(sample: int | None, kind: str, ways: str) -> None:
    """Interrupt a step at this many of its lines, or at all."""
    scene = Scene(kind, ways)
    expected = state_of_torch()
    scene.again()
    scene.step()  # what a training looks up once
    scene.again()
    batches = int(scene.of.model[1].num_batches_tracked)  # type: ignore[index]
    start, lr = parameters_of(scene.of.model), scene.of.optimizer.param_groups[0]["lr"]
    averages = [averages_of(scene)]
    with Lines() as lines:
        scene.step()
    after, rates = parameters_of(scene.of.model), scene.of.optimizer.get_last_lr()
    averages.append(averages_of(scene))
    # Where the step ends, where it began, and where it ends as a lazy step.
    lazy = [s + (a - s) * lr / rates[0] for s, a in zip(start, after, strict=True)] if rates[0] else start
    ends, lrs = [start, after, lazy], [lr, scene.of.optimizer.param_groups[0]["lr"]]
    assert lines.count > SAMPLE
    for at in range(0, lines.count, 1 if sample is None else lines.count // sample):
        scene.again()
        with suppress(KeyboardInterrupt), Lines(at) as interrupted:
            scene.step()
        assert interrupted.place, "the step has as many lines each time"
        message = f"averages hold something else: {interrupted.place}"
        assert are_legitimate(averages_of(scene), averages, ends), message
        check(scene, ends, lrs, batches, f"line {at} of {lines.count}, {interrupted.place}")
        assert state_of_torch() == expected, interrupted.place


@pytest.mark.parametrize(("kind", "ways"), CASES)
def test_an_interrupt_leaves_nothing_behind(kind: str, ways: str) -> None:
    interrupt(SAMPLE, kind, ways)


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("kind", "ways"), CASES)
def test_an_interrupt_at_any_line_leaves_nothing_behind(kind: str, ways: str) -> None:
    interrupt(None, kind, ways)
