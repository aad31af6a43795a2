"""Every configuration of every optimizer in torch's own test registry, wrapped and bare, side by side."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import ASGD, LBFGS, Adafactor, Rprop
from torch.testing._internal.common_optimizers import optim_db

from gen_optim import GeNOptimizer, ProbeStatus
from tests.training import mlp, parameters_of, regression_data, same, wrapped

SEARCHED_LR = 1.0  # at which the base optimizer takes the step along which the start is searched
REFUSED = {ASGD, Adafactor, LBFGS, Rprop}
CASES = [
    pytest.param(info, inputs, id=f"{info.name}-{inputs.desc.replace(' ', '_') or index}")
    for info in optim_db
    for index, inputs in enumerate(info.optim_inputs_func(device="cpu"))
    if info.optim_cls not in REFUSED
]


class SparseModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(6, 3, sparse=True)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.embedding(inputs[:, 0].abs().long() % 6).sum(dim=1, keepdim=True)


def make_model(info: Any) -> nn.Module:
    if info.only_supports_sparse_grads:
        return SparseModel()
    model = mlp()
    if info.name == "Muon":  # matrices only
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.dim() == 2)
    return model


def make_base(info: Any, kwargs: dict[str, Any], model: nn.Module) -> torch.optim.Optimizer:
    return info.optim_cls([each for each in model.parameters() if each.requires_grad], **copy.deepcopy(kwargs))


def lr_of(optimizer: torch.optim.Optimizer) -> float:
    return float(optimizer.param_groups[0]["lr"])


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def make_closure(model: nn.Module, optimizer: torch.optim.Optimizer, sign: float) -> Any:
    inputs, targets = regression_data()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = sign * nn.functional.mse_loss(model(inputs), targets)
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize(("info", "inputs"), CASES)
@pytest.mark.parametrize("rule", ["published", "relaxed"])
def test_lazy_steps_equal_the_bare_optimizer_and_probe_steps_the_lerp(info: Any, inputs: Any, rule: str) -> None:
    wrapped_model, bare_model = make_model(info), make_model(info)
    bare = make_base(info, inputs.kwargs, bare_model)
    optimizer = wrapped(
        make_base(info, inputs.kwargs, wrapped_model), mode="approximate", rule=rule, period=3, burn_in=1
    )
    sign = -1.0 if optimizer.param_groups[0].get("maximize") else 1.0
    closure, bare_closure = make_closure(wrapped_model, optimizer, sign), make_closure(bare_model, bare, sign)
    probe_steps = 0
    for _ in range(8):
        seen, lr_before = optimizer.last_probe, lr_of(optimizer)
        optimizer.step(closure)
        bare_closure()
        record = optimizer.last_probe
        before = parameters_of(bare_model)
        is_start = record is not seen and record.status is ProbeStatus.STARTED
        set_lr(bare, SEARCHED_LR if is_start else lr_before)
        bare.step()
        if record is not seen:
            probe_steps += 1
            multiple = record.lr_after / (SEARCHED_LR if is_start else record.lr_before)
            with torch.no_grad():
                for parameter, start in zip(bare_model.parameters(), before, strict=True):
                    parameter.copy_(torch.lerp(start, parameter, multiple))
        assert same(parameters_of(wrapped_model), parameters_of(bare_model))
        assert lr_of(optimizer) == pytest.approx(optimizer.get_last_lr()[0], rel=0, abs=0)
    assert probe_steps == 3
    for mine, theirs in zip(wrapped_model.parameters(), bare_model.parameters(), strict=True):
        for name, value in bare.state.get(theirs, {}).items():
            assert torch.equal(torch.as_tensor(optimizer.state[mine][name]), torch.as_tensor(value)), name
        assert set(optimizer.state.get(mine, {})) - {"gen_average"} == set(bare.state.get(theirs, {}))


@pytest.mark.parametrize("cls", sorted(REFUSED, key=lambda cls: cls.__name__), ids=lambda cls: cls.__name__)
def test_those_whose_update_is_not_proportional_are_refused(cls: type[torch.optim.Optimizer]) -> None:
    model = mlp()
    with pytest.raises((TypeError, ValueError), match=cls.__name__):
        GeNOptimizer(cls(model.parameters()))
