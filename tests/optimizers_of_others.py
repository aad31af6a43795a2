"""Optimizers that behave like those of other packages, written for tests."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer


class Elementary(Optimizer):
    """Gradient descent, one parameter at a time: subclasses override :meth:`update`."""

    def __init__(self, params: Any, lr: float = 1e-3, **options: Any) -> None:
        super().__init__(params, {"lr": lr, **options})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.update(parameter, parameter.grad, self.state[parameter], group)

    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        parameter.sub_(group["lr"] * gradient)


class DecayAfterwards(Elementary):
    """Adam that decays weights after the update, as SOAP, SPlus, GaLore and Adan do."""

    def __init__(self, params: Any, lr: float = 3e-3, weight_decay: float = 0.01) -> None:
        super().__init__(params, lr, weight_decay=weight_decay)

    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        first = state.setdefault("first", torch.zeros_like(parameter)).lerp_(gradient, 0.1)
        second = state.setdefault("second", torch.zeros_like(parameter)).lerp_(gradient.square(), 0.01)
        parameter.sub_(group["lr"] * first / (second.sqrt() + 1e-8))
        parameter.mul_(1.0 - group["lr"] * group["weight_decay"])


class LARS(Elementary):
    """Momentum of gradients scaled by a trust ratio, which depends on where the parameters are."""

    def __init__(self, params: Any, lr: float = 1.0, weight_decay: float = 0.01) -> None:
        super().__init__(params, lr, weight_decay=weight_decay)

    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        direction = gradient + group["weight_decay"] * parameter
        trust = 1e-3 * parameter.norm() / direction.norm()
        momentum = state.setdefault("momentum", torch.zeros_like(parameter)).mul_(0.9).add_(trust * direction)
        parameter.sub_(group["lr"] * momentum)


class LAMB(DecayAfterwards):
    """Adam scaled by a trust ratio."""

    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        before = parameter.clone()
        super().update(parameter, gradient, state, {"lr": 1.0, "weight_decay": 0.0})
        adam = before - parameter + group["weight_decay"] * before
        parameter.copy_(before - group["lr"] * before.norm() / adam.norm() * adam)


class LaProp(Elementary):
    """Its momentum adds up updates that include the learning rate."""

    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        momentum = state.setdefault("momentum", torch.zeros_like(parameter)).mul_(0.9).add_(group["lr"] * gradient)
        parameter.sub_(momentum)


class MADGRAD(Elementary):
    """Dual averaging: steps from the initial point by a sum of gradients weighted by learning rates."""

    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        begin = state.setdefault("begin", parameter.clone())
        weight = group["lr"] * math.sqrt(state.setdefault("step", 0) + 1)
        state["step"] += 1
        total = state.setdefault("sum", torch.zeros_like(parameter)).add_(weight * gradient)
        squares = state.setdefault("squares", torch.zeros_like(parameter)).add_(weight * gradient.square())
        parameter.lerp_(begin - total / (squares.pow(1 / 3) + 1e-6), 0.1)


class DistanceOverGradients(Elementary):
    """DoG (Ivgi, Hinder and Carmon, ICML 2023) with a learning rate in front: proportional to it, at each step."""

    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        begin = state.setdefault("begin", parameter.clone())
        state["farthest"] = max(state.get("farthest", 1e-6), float((parameter - begin).norm()))
        state["squares"] = state.get("squares", 0.0) + float(gradient.norm()) ** 2
        parameter.sub_(group["lr"] * state["farthest"] / math.sqrt(state["squares"]) * gradient)


class Ranger(Elementary):
    """Synchronises slow weights at every sixth step."""

    def __init__(self, params: Any, lr: float = 1e-3, k: int = 6) -> None:
        super().__init__(params, lr, k=k)

    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        slow = state.setdefault("slow", parameter.clone())
        super().update(parameter, gradient, state, group)
        state["step"] = state.get("step", 0) + 1
        if state["step"] % group["k"] == 0:
            parameter.copy_(slow.lerp_(parameter, 0.5))


class AdaHessian(Elementary):
    """Divides by the diagonal of the Hessian, for which it differentiates gradients once more, as SophiaH does too."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        parameters = [each for group in self.param_groups for each in group["params"] if each.grad is not None]
        signs = [torch.randint_like(each, 2) * 2.0 - 1.0 for each in parameters]
        gradients = [each.grad for each in parameters]
        products = torch.autograd.grad(gradients, parameters, signs)  # type: ignore[arg-type]
        for parameter, sign, product in zip(parameters, signs, products, strict=True):
            mean = self.state[parameter].setdefault("mean", torch.zeros_like(parameter))
            mean.lerp_((sign * product).abs(), 0.1)
            parameter.sub_(self.param_groups[0]["lr"] * parameter.grad / (mean + 0.1))


class Caching(Elementary):
    """Keeps a cache in its groups, as RAdam does, in which a step at another learning rate leaves traces."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, lr, cache=[None] * 10)

    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        state["step"] = state.get("step", 0) + 1
        slot = (state["step"], group["lr"])
        if slot not in group["cache"]:
            group["cache"][state["step"] % 10] = slot
        parameter.sub_(group["lr"] * gradient)


class Outer(Optimizer):
    """Holds another optimizer and shares its groups, without its parent's set-up."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.param_groups, self.defaults = optimizer.param_groups, optimizer.defaults
        self.state: Any = defaultdict(dict)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["slow"] = parameter.detach().clone()
        self.steps = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.optimizer.step()
        self.steps += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                self.synchronise(parameter, self.state[parameter]["slow"])

    def synchronise(self, parameter: Tensor, slow: Tensor) -> None:
        """Write to a parameter after the step of the optimizer inside."""


class Lookahead(Outer):
    """Goes half of the way from the slow weights at every fifth step."""

    k = 5

    def synchronise(self, parameter: Tensor, slow: Tensor) -> None:
        if self.steps % self.k == 0:
            parameter.copy_(slow.lerp_(parameter, 0.5))


class ScheduleFree(Outer):
    """Evaluates gradients at an average of the points where the optimizer inside has been."""

    def synchronise(self, parameter: Tensor, slow: Tensor) -> None:
        slow.lerp_(parameter, 1.0 / self.steps)
        parameter.lerp_(slow, 0.9)


class TRAC(Outer):
    """Scales the way from the initial point."""

    def synchronise(self, parameter: Tensor, slow: Tensor) -> None:
        parameter.copy_(slow + math.tanh(0.1 * self.steps) * (parameter - slow))


class SAM(Outer):
    """Steps to where the loss is sharpest, and calls the closure there."""

    def step(self, closure: Callable[[], Tensor] | None = None) -> None:  # type: ignore[override]
        assert closure is not None, "SAM requires closure, but it was not provided"
        for parameter in self.param_groups[0]["params"]:
            parameter.detach().add_(0.05 * parameter.grad)
        closure()
        self.optimizer.step()


def lookahead(params: Any) -> Optimizer:
    return Lookahead(SGD(params, lr=0.1, momentum=0.9))
