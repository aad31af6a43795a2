"""The direction that an optimizer would take now, without taking it."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gen_optim.compatibility import check_wrappable
from gen_optim.learning_rates import write_lr
from gen_optim.tensors.rng import RandomStreams, random_devices
from gen_optim.wrapper import without_global_hooks

__all__ = ["optimizer_direction"]

_FAR = (2.0**20, 2.0**10, 1.0)
"""Learning rates of the twin's step, the first one with a finite result: the further it goes, the less of the direction
drowns in the rounding of the parameters."""


@torch.no_grad()
def optimizer_direction(
    optimizer: Optimizer, named_parameters: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]
) -> dict[str, Tensor]:
    """The update per unit of learning rate that an optimizer would make now: ω = (θ − θ_after) / α.

    Weight decay, momentum and all else that the optimizer does are included. With several parameter groups, α is the
    learning rate of the first group whose learning rate is not 0, and the other groups' are taken in their present
    ratio to it: moving to θ − αω is what the optimizer's step does.

    A twin takes the step, a copy of the optimizer with its parameters, gradients and state, at a large learning rate:
    an update is proportional to the learning rate, and the difference of two parameters is inexact where the step is
    small. Nothing of the optimizer itself, nor any random stream, is changed. Its hooks are not called.

    Args:
        optimizer: The optimizer, or a GeNOptimizer, whose base optimizer is meant then. Its parameters' ``grad`` are
            the gradients of the step.
        named_parameters: The parameters by name, ``model.named_parameters()``; all that the optimizer moves and others
            if wanted.

    Returns:
        The direction ω by name, shaped as the parameters; zeros for those that would not move, which are frozen by
        learning rate 0, without gradient, or not the optimizer's.

    Raises:
        TypeError: If ``optimizer`` is no optimizer, or one that requires a closure.
        ValueError: If its update is not proportional to its learning rate, or ``named_parameters`` lacks one of its
            parameters.

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
    known = {id(tensor) for tensor in named.values()}
    for index, group in enumerate(base.param_groups):
        if any(id(parameter) not in known for parameter in group["params"]):
            raise ValueError(
                f"named_parameters must hold all parameters of the optimizer, but lacks some of param_groups[{index}]. "
                "Pass model.named_parameters() of the whole model."
            )
    rates = [float(group["lr"]) for group in base.param_groups]
    unit = next((rate for rate in rates if rate != 0.0), 1.0)
    ratios = [rate / unit for rate in rates]
    # float16 ends at 65504.
    limit = min(torch.finfo(each.dtype).max for group in base.param_groups for each in group["params"]) / 16
    moved: dict[int, Tensor] = {}
    for far in (far for far in _FAR if far == 1.0 or far * max(ratios) < limit):
        moved = _far_step(base, ratios, far)
        if all(bool(torch.isfinite(each).all()) for each in moved.values()):
            break
    return {name: moved.get(id(tensor), torch.zeros_like(tensor)) for name, tensor in named.items()}


def _far_step(base: Optimizer, ratios: list[float], far: float) -> dict[int, Tensor]:
    """The direction of every parameter that moves, by its id, from a twin's step at the learning rate ``far``."""
    twin, parameters = _twin(base)
    for group, ratio in zip(twin.param_groups, ratios, strict=True):
        write_lr(group, far * ratio)
    streams = RandomStreams(random_devices(parameters))
    try:
        with without_global_hooks():
            twin.step()
    finally:
        streams.restore()
    return {
        id(parameter): (parameter - copied).div_(far)
        for group, ratio in zip(twin.param_groups, ratios, strict=True)
        for copied in group["params"]
        if ratio != 0.0
        for parameter in [parameters[copied]]
    }


def _twin(base: Optimizer) -> tuple[Optimizer, dict[Tensor, Tensor]]:
    """A copy of an optimizer with its parameters, gradients and state, and the original of each parameter.

    Not by ``copy.deepcopy``, which keeps state and groups only and drops whatever a class of one's own has besides.
    """
    originals: dict[Tensor, Tensor] = {}
    memo: dict[int, Any] = {}
    for group in base.param_groups:
        for parameter in group["params"]:
            copied = torch.nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
            copied.__dict__.update(parameter.__dict__)  # marks that some optimizers go by
            copied.grad = None if parameter.grad is None else parameter.grad.detach().clone()
            originals[copied], memo[id(parameter)] = parameter, copied
    twin: Optimizer = object.__new__(type(base))
    for name, value in vars(base).items():
        if name == "step":
            continue  # a scheduler's, which counts
        twin.__dict__[name] = OrderedDict() if name.startswith("_optimizer_") else copy.deepcopy(value, memo)
    return twin, originals
