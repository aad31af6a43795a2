"""Which base optimizers can be wrapped: those whose update is proportional to their learning rate.

GeN reads the direction off one step at one learning rate and then moves to another, so a base optimizer's update must
be its learning rate times something that does not depend on it. Some are not, without saying so: that is measured on
a twin, made of the same class and options, which takes a few steps on a handful of numbers.
"""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gen_optim.preserving import RandomStreams, random_devices
from gen_optim.scheduling import write_lr
from gen_optim.wrapping import without_global_hooks

__all__ = ["check_wrappable"]

_FURTHER = 1024.0
"""How many times the learning rate of one update is that of the other it is compared with; caps show themselves."""


def check_wrappable(base_optim: Any) -> None:
    """Refuse a base optimizer that GeN cannot wrap.

    Raises:
        TypeError: If it is no ``torch.optim.Optimizer``, or one that evaluates the closure itself.
        ValueError: If its groups lack a learning rate or disagree on ``maximize``, if it is ``differentiable``, or if
            its update is not proportional to its learning rate.
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
    for index, group in enumerate(base_optim.param_groups):
        if "lr" not in group:
            raise ValueError(
                f"base_optim must have a learning rate in every group, but param_groups[{index}] has no 'lr'"
            )
        if group.get("differentiable"):
            raise ValueError(
                f"base_optim must not be differentiable, but param_groups[{index}] has differentiable=True: what GeN "
                "writes to the parameters cannot be differentiated through. Construct it with differentiable=False."
            )
    if len({bool(group.get("maximize")) for group in base_optim.param_groups}) > 1:
        raise ValueError(
            "base_optim must have the same maximize in all groups: one loss cannot be measured as both better and worse"
        )
    growth = _growth(base_optim)
    if growth is not None and abs(growth / _FURTHER - 1.0) > 0.01:
        raise ValueError(
            f"base_optim must make updates proportional to its learning rate, but at {_FURTHER:.0f} times the learning "
            f"rate {name} moves {growth:.3g} times as far. Use it bare, or wrap another optimizer, such as AdamW."
        )


def _growth(base_optim: Optimizer) -> float | None:
    """How much further an optimizer of this class and these options moves at ``_FURTHER`` times the learning rate.

    Returns:
        The ratio of two updates, ``_FURTHER`` where they are proportional; None where no twin can be made or stepped,
        because the class asks for more than parameters and options, or is particular about gradients or devices.
    """
    streams = RandomStreams(random_devices(each for group in base_optim.param_groups for each in group["params"]))
    try:
        with warnings.catch_warnings(), without_global_hooks():
            warnings.simplefilter("ignore")
            once = _third_update(base_optim, 1.0)
            streams.restore()  # both see the same noise, where there is any
            further = _third_update(base_optim, _FURTHER)
    except Exception:  # noqa: BLE001 - whatever a class demands of its parameters, it is no proof of anything
        return None
    finally:
        streams.restore()
    length = torch.linalg.vector_norm(once).item()
    return torch.linalg.vector_norm(further).item() / length if 0.0 < length < float("inf") else None


def _third_update(base_optim: Optimizer, lr: float) -> Tensor:
    """The update of a twin at its third step, the first two being at learning rate 1."""
    twin, parameters = _twin(base_optim)
    before: list[Tensor] = []
    for step, step_lr in enumerate((1.0, 1.0, lr)):
        before = [parameter.detach().clone() for parameter in parameters]
        for group, parameter in zip(twin.param_groups, parameters, strict=True):
            write_lr(group, step_lr)
            slope = torch.linspace(0.1 + step, 1.0, parameter.numel(), device=parameter.device, dtype=parameter.dtype)
            parameter.grad = slope.reshape(parameter.shape)
        twin.step()
    moved = [(parameter.detach() - start).flatten() for parameter, start in zip(parameters, before, strict=True)]
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
    return type(base_optim)(groups, **defaults), parameters
