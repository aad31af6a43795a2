"""Small models, data and closures that the tests of the optimizer train."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gen_optim import GeNOptimizer, ProbeRecord
from gen_optim.measurement import MODES
from gen_optim.rules import RULES


def regression_data(size: int = 16, features: int = 4, *, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn(size, features, generator=generator, dtype=torch.float64)
    targets = torch.sin(inputs.sum(dim=1, keepdim=True)) + 0.1 * torch.randn(size, 1, generator=generator).double()
    return inputs.to(dtype), targets.to(dtype)


def mlp(
    *, seed: int = 0, dtype: torch.dtype = torch.float32, dropout: float = 0.0, norm: bool = False
) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [nn.Linear(4, 8), nn.BatchNorm1d(8) if norm else nn.Identity(), nn.Tanh(), nn.Dropout(dropout)]
        return nn.Sequential(*layers, nn.Linear(8, 1)).to(dtype)


def parameters_of(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def muon(parameters: Iterable[Tensor], **options: Any) -> torch.optim.Optimizer:
    """Muon of the matrices among the parameters; the test is skipped if torch has none."""
    if torch.__version__ < "2.9":
        pytest.skip("torch before 2.9 has no Muon")
    return torch.optim.Muon([each for each in parameters if each.dim() == 2], **options)


@dataclass
class Training:
    """A model, its data and an optimizer; counts what happens in its closure."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    inputs: Tensor
    targets: Tensor
    calls: int = 0
    probes: int = 0
    before_return: Callable[[Training], Any] = field(default=lambda training: None)

    @classmethod
    def of(cls, make: Callable[[list[Tensor]], torch.optim.Optimizer], model: nn.Module | None = None) -> Training:
        model = mlp() if model is None else model
        inputs, targets = regression_data(dtype=next(model.parameters()).dtype)
        return cls(model, make(list(model.parameters())), inputs, targets)

    def loss(self) -> Tensor:
        self.calls += 1
        self.probes += int(getattr(self.optimizer, "is_probing", False))
        loss = nn.functional.mse_loss(self.model(self.inputs), self.targets)
        self.before_return(self)
        return loss

    def closure(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.loss()
        loss.backward()
        return loss

    def train(self, steps: int, scheduler: Any = None) -> list[float]:
        losses = []
        for _ in range(steps):
            losses.append(torch.as_tensor(self.optimizer.step(self.closure)).item())
            if scheduler is not None:
                scheduler.step()
        return losses


_RULE_OPTIONS = {field.name for rule in RULES.values() for field in fields(rule)}


def wrapped(base: torch.optim.Optimizer, *, rule: Any = "relaxed", mode: Any = "lookback", **options: Any) -> Any:
    """A GeNOptimizer. Options of rules and modes may be given beside its own; those that the rule lacks are ignored."""
    if isinstance(rule, str):
        own = {field.name for field in fields(RULES[rule])}
        rule = RULES[rule](**{name: value for name, value in options.items() if name in own})
    if "tolerance" in options:
        mode = MODES[mode](tolerance=options["tolerance"])
    others = {name: value for name, value in options.items() if name not in {*_RULE_OPTIONS, "tolerance"}}
    return GeNOptimizer(base, rule=rule, mode=mode, **others)


def gen_adamw(parameters: Any, lr: float = 1e-3, **options: Any) -> GeNOptimizer:
    return wrapped(torch.optim.AdamW(parameters, lr=lr), **options)


def gen_sgd(parameters: Any, lr: float = 0.1, **options: Any) -> GeNOptimizer:
    return wrapped(torch.optim.SGD(parameters, lr=lr, momentum=0.9), **options)


def looking(parameters: Any, **options: Any) -> GeNOptimizer:
    """Looks back at every step."""
    return gen_sgd(parameters, **{"mode": "lookback", "rule": "published", "period": 1, **options})


def looks_back_next(optimizer: Any) -> bool:
    """Whether a checkpoint of the optimizer made now says that the next step looks back at the last one."""
    return bool(optimizer.state_dict()["param_groups"][0]["gen_start_lr"] > 0.0)


def accumulating(
    optimizer: GeNOptimizer,
    model: nn.Module,
    micro_batches: Sequence[Callable[[], Tensor]],
    *,
    clip: float | None = None,
    average: bool = True,
    is_known: bool = True,
) -> Callable[[], Tensor]:
    """The closure of a hand-written loop that adds up the gradients of micro-batches, and clips them.

    Args:
        optimizer: Whose step it is for.
        model: What is clipped.
        micro_batches: Each evaluates the loss of one.
        clip: The largest norm of the gradients; None to leave them alone.
        average: Whether the loss of the step is the mean of theirs, or the sum.
        is_known: Whether the optimizer can know that the gradients are those of the loss.
    """

    def closure() -> Tensor:
        optimizer.zero_grad(set_to_none=is_known)
        share, losses = len(micro_batches) if average else 1, []
        for loss_of in micro_batches:
            losses.append(loss_of())
            (losses[-1] / share).backward()
        if clip is not None and not optimizer.is_probing:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        return sum((loss.detach() for loss in losses), torch.zeros(())) / share

    return closure


def assert_ranks_train_as_one(
    ranks: Sequence[dict[str, Any]], history: Sequence[ProbeRecord], model: nn.Module, type_of_parameters: type
) -> None:
    """Two ranks, each of which tells what it has seen, agree, resume exactly, and equal one process.

    Args:
        ranks: Of each, the types of its parameters, its probe steps' statuses and learning rates, and the parameters
            that it has trained, in one go and resumed half way.
        history: The probe steps of one process on the joined batch.
        model: What that has trained.
        type_of_parameters: What those of the ranks must be.
    """
    one, other = ranks
    assert one == other
    assert one["types"] == {type_of_parameters}
    assert one["resumed"] == one["trained"]
    assert [status for status, _ in one["records"]] == [record.status for record in history]
    expected = [record.lr_after for record in history]
    assert [lr for _, lr in one["records"]] == pytest.approx(expected, rel=1e-3)
    torch.testing.assert_close([torch.tensor(each) for each in one["trained"]], parameters_of(model))
