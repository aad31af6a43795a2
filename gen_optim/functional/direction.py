"""The direction of an optimizer's next step, computed without taking the step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gen_optim.compatibility import check_wrappable
from gen_optim.learning_rates import write_lr
from gen_optim.tensors.rng import RandomStreams, random_devices
from gen_optim.wrapper import copy_optimizer, step_without_hooks

_FAR = (2.0**20, 2.0**10, 1.0)
"""Learning rates of the copy's step; the first one with a finite result is used. The longer the step, the smaller the
share of the parameters' rounding in the direction."""


_TOLERANCE = 0.1
"""Relative difference of two directions, beyond their rounding, from which on an update is not proportional."""


@torch.no_grad()
def optimizer_direction(
    optimizer: Optimizer, named_parameters: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]
) -> dict[str, Tensor]:
    """Return the update per unit of learning rate that an optimizer would make now: ω = (θ − θ_after) / α.

    Momentum, weight decay and everything else in the optimizer's update are included. With several parameter groups,
    α is the first learning rate that is not 0, and the other groups keep their ratios to it, so that θ − αω is the
    point after the optimizer's step.

    A copy of the optimizer, with its parameters, gradients and state, takes the step at a large learning rate: the
    update is proportional to the learning rate, and after a small step the difference of two parameters is inexact.
    The optimizer and the random streams are not changed, and no hooks are called.

    Args:
        optimizer: The optimizer; of a GeNOptimizer, the base optimizer is used. The gradients are its parameters'
            ``grad``.
        named_parameters: The parameters by name, as ``model.named_parameters()`` gives them. All of the optimizer's
            parameters must be among them.

    Returns:
        The direction ω by name, with the parameters' shapes. It is zero for parameters that have learning rate 0 or no
        gradient, and for those that the optimizer does not have.

    Raises:
        TypeError: If ``optimizer`` is not an optimizer, or requires a closure.
        ValueError: If its update is not proportional to its learning rate at all learning rates, or if
            ``named_parameters`` lacks one of its parameters.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([2.0]))
        >>> weight.grad = torch.tensor([1.0])
        >>> optimizer = torch.optim.SGD([weight], lr=1e-8, weight_decay=0.25)
        >>> optimizer_direction(optimizer, {"weight": weight})
        {'weight': tensor([1.5000])}
    """
    base: Optimizer = getattr(optimizer, "base_optim", optimizer)
    check_wrappable(base)
    named = dict(named_parameters.items() if isinstance(named_parameters, Mapping) else named_parameters)
    for index, group in enumerate(base.param_groups):
        if not set(named.values()).issuperset(group["params"]):
            raise ValueError(
                f"named_parameters must hold all parameters of the optimizer, but lacks some of param_groups[{index}]. "
                "Pass model.named_parameters() of the whole model."
            )
    rates = [float(group["lr"]) for group in base.param_groups]
    unit = next((rate for rate in rates if rate != 0.0), 1.0)
    ratios = [rate / unit for rate in rates]
    # The largest number in float16 is 65504.
    limit = min(torch.finfo(each.dtype).max for group in base.param_groups for each in group["params"]) / 16
    moved: dict[Tensor, Tensor] = {}
    for far in (far for far in _FAR if far == 1.0 or far * max(ratios) < limit):
        moved = _far_step(base, ratios, far)
        if all(bool(torch.isfinite(each).all()) for each in moved.values()):
            for parameter, half in _far_step(base, ratios, far / 2).items():
                rounding = 4.0 * torch.finfo(half.dtype).eps * parameter.norm() / far
                if (moved[parameter] - half).norm() > _TOLERANCE * half.norm() + rounding:
                    raise ValueError(
                        f"the update of {type(base).__name__} must be proportional to its learning rate at any "
                        "learning rate, and is so at small ones alone, as with weight decay after the update: set "
                        "weight_decay=0"
                    )
            break
    return {name: moved.get(tensor, torch.zeros_like(tensor)) for name, tensor in named.items()}


def _far_step(base: Optimizer, ratios: list[float], far: float) -> dict[Tensor, Tensor]:
    """Return the direction of each parameter that moves, from a copy's step at the learning rate ``far``."""
    duplicate, originals = _duplicate(base)
    for group, ratio in zip(duplicate.param_groups, ratios, strict=True):
        write_lr(group, far * ratio)
    streams = RandomStreams(random_devices(originals))
    try:
        step_without_hooks(duplicate)
    finally:
        streams.restore()
    return {
        originals[copied]: (originals[copied] - copied).div_(far)
        for group, ratio in zip(duplicate.param_groups, ratios, strict=True)
        for copied in group["params"]
        if ratio != 0.0
    }


def _duplicate(base: Optimizer) -> tuple[Optimizer, dict[Tensor, Tensor]]:
    """Copy an optimizer with its parameters, gradients and state; also return the original of each copied parameter."""
    originals: dict[Tensor, Tensor] = {}
    memo: dict[int, Any] = {}
    for group in base.param_groups:
        for parameter in group["params"]:
            copied = torch.nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
            copied.__dict__.update(parameter.__dict__)  # some optimizers read attributes of parameters
            copied.grad = None if parameter.grad is None else parameter.grad.detach().clone()
            originals[copied], memo[id(parameter)] = parameter, copied
    return copy_optimizer(base, memo), originals
