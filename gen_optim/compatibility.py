"""Which base optimizers can be wrapped: those whose update is proportional to their present learning rate.

GeN reads the direction off one step at one learning rate and then moves to another, so a base optimizer's update must
be its learning rate times something that depends neither on it nor on those of the steps before. Some are not, without
saying so: that is measured on a twin, made of the same class and options, which takes a few steps on a handful of
numbers.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gen_optim.learning_rates import Group, check_lr, write_lr
from gen_optim.tensors.rng import RandomStreams, random_devices
from gen_optim.wrapper import without_global_hooks

__all__ = ["check_groups", "check_wrappable"]

_FURTHER = 1024.0
"""How many times the learning rate of one update is that of the other it is compared with; caps show themselves."""

_STEPS = 7
"""Steps of a twin; some optimizers stand still for the first five."""


def check_wrappable(base_optim: Any) -> None:
    """Refuse a base optimizer that GeN cannot wrap.

    Raises:
        TypeError: If it is no ``torch.optim.Optimizer``, or one that evaluates the closure itself.
        ValueError: As :func:`check_groups`; or if its update is not proportional to its learning rate, or depends on
            earlier ones.
    """
    name = type(base_optim).__name__
    if not isinstance(base_optim, Optimizer):
        raise TypeError(f"base_optim must be a torch.optim.Optimizer, such as AdamW(model.parameters()), got {name}")
    closure = inspect.signature(base_optim.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(
            f"base_optim must be able to step without a closure, but {name}.step requires one: it evaluates the loss "
            "itself, with a line search of its own. Use it bare, or wrap another optimizer."
        )
    check_groups(base_optim.param_groups)
    growth, memory = _growth_and_memory(base_optim)
    if abs(growth / _FURTHER - 1.0) > 0.01:  # not so where it is NaN
        raise ValueError(
            f"base_optim must make updates proportional to its learning rate, but at {_FURTHER:.0f} times the learning "
            f"rate {name} moves {growth:.3g} times as far. Use it bare, or wrap another optimizer, such as AdamW."
        )
    if abs(memory - 1.0) > 0.01:
        raise ValueError(
            "base_optim must take each step by the learning rate of that step alone, but after steps at "
            f"{_FURTHER:.0f} times the learning rate {name} moves {memory:.3g} times as far. Optimizers that estimate "
            "their own learning rate from the way covered, or average along it, do that: they and GeN would each "
            "correct what the other does. Use it bare, or wrap another optimizer, such as AdamW."
        )


def check_groups(groups: Sequence[Group]) -> None:
    """Refuse parameter groups whose steps GeN cannot measure.

    Raises:
        ValueError: If one lacks a learning rate or has one that is negative or not finite, or is ``differentiable``; if
            they disagree on ``maximize``.
    """
    for index, group in enumerate(groups):
        if "lr" not in group:
            raise ValueError(
                f"base_optim must have a learning rate in every group, but param_groups[{index}] has no 'lr'"
            )
        check_lr(index, group["lr"])
        if group.get("differentiable"):
            raise ValueError(
                f"base_optim must not be differentiable, but param_groups[{index}] has differentiable=True: what GeN "
                "writes to the parameters cannot be differentiated through. Construct it with differentiable=False."
            )
    if len({bool(group.get("maximize")) for group in groups}) > 1:
        raise ValueError(
            "base_optim must have the same maximize in all groups: one loss cannot be measured as both better and worse"
        )


def _growth_and_memory(base_optim: Optimizer) -> tuple[float, float]:
    """How a step of an optimizer of this class and these options depends on learning rates: its own, and earlier ones.

    Returns:
        How many times as long a step is at ``_FURTHER`` times the learning rate, and after steps at ``_FURTHER`` times
        the learning rate; NaN where no twin can be made or stepped, because the class asks for more than parameters
        and options, or is particular about gradients or devices.
    """
    streams = RandomStreams(random_devices(each for group in base_optim.param_groups for each in group["params"]))

    def length(earlier: float, last: float, *, decays: bool = True) -> float:
        streams.restore()  # all see the same noise, where there is any
        return torch.linalg.vector_norm(_last_update(base_optim, earlier, last, decays=decays)).item() or math.nan

    try:
        with warnings.catch_warnings(), without_global_hooks():
            warnings.simplefilter("ignore")
            growth = length(1.0, _FURTHER) / length(1.0, 1.0)
            # Where weight decay is part of the gradient, momentum remembers the way covered as it should.
            memory = length(_FURTHER, 1.0, decays=False) / length(1.0, 1.0, decays=False)
    except Exception:  # noqa: BLE001 - whatever a class demands of its parameters, it is no proof of anything
        return math.nan, math.nan
    finally:
        streams.restore()
    return growth, memory


def _last_update(base_optim: Optimizer, earlier: float, last: float, *, decays: bool) -> Tensor:
    """A twin's last update, from the point where it began, after steps at an earlier learning rate."""
    twin, parameters = _twin(base_optim)
    begin = [parameter.detach().clone() for parameter in parameters]
    if not decays:
        for group in twin.param_groups:
            group.update(dict.fromkeys({"weight_decay"}.intersection(group), 0.0))
    for step in range(_STEPS):
        is_last = step == _STEPS - 1
        for group, parameter, start in zip(twin.param_groups, parameters, begin, strict=True):
            write_lr(group, last if is_last else earlier)
            slope = torch.linspace(0.1 + step, 1.0, parameter.numel(), device=parameter.device, dtype=parameter.dtype)
            parameter.grad = slope.reshape(parameter.shape)
            if is_last:
                parameter.detach().copy_(start)
        twin.step()
    moved = [(parameter.detach() - start).flatten() for parameter, start in zip(parameters, begin, strict=True)]
    return torch.cat([update.to("cpu", torch.float64) for update in moved])


def _twin(base_optim: Optimizer) -> tuple[Optimizer, list[Tensor]]:
    """An optimizer of the same class and options over one small parameter a group, of the same number of axes."""
    options = inspect.signature(type(base_optim)).parameters
    groups: list[dict[str, Any]] = []
    parameters: list[Tensor] = []
    for group in base_optim.param_groups:
        like = group["params"][0]
        dtype = like.dtype if like.dtype in (torch.float32, torch.float64) else torch.float32
        parameter = torch.nn.Parameter(torch.full((2,) * max(like.dim(), 1), 0.5, device=like.device, dtype=dtype))
        kept = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        if isinstance(kept["lr"], Tensor):
            kept["lr"] = kept["lr"].detach().clone()
        groups.append({**kept, "params": [parameter]})
        parameters.append(parameter)
    defaults = {key: value for key, value in base_optim.defaults.items() if key in options}
    twin = type(base_optim)(groups, **defaults)
    if callable(train := getattr(twin, "train", None)):
        train()  # schedule-free ones step in this mode alone
    return twin, parameters
