"""Slow and obviously right: what the fast paths are compared to, in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Loss = Callable[[dict[str, Tensor]], Tensor]


def dense_derivatives(loss_fn: Loss, params: Mapping[str, Tensor]) -> tuple[float, Tensor, Tensor]:
    """Value, gradient and the whole Hessian, by torch.autograd's double backward, one column after the other."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in params.items()}
    with sdpa_kernel(SDPBackend.MATH):
        loss = loss_fn(leaves).reshape(())
    gradient = _flat(torch.autograd.grad(loss, list(leaves.values()), create_graph=True, materialize_grads=True))
    columns = [
        _flat(torch.autograd.grad(each, list(leaves.values()), retain_graph=True, materialize_grads=True))
        if each.requires_grad
        else torch.zeros_like(gradient)
        for each in gradient
    ]
    return loss.item(), gradient.detach(), torch.stack(columns).detach()


def derivatives_by_double_backward(
    loss_fn: Loss, params: Mapping[str, Tensor], direction: Mapping[str, Tensor]
) -> tuple[float, float, float]:
    """g(0), −g′(0) and g″(0) of g(α) = L(θ − αω): two reverse passes through one forward pass."""
    names = list(direction)
    leaves = {name: tensor.detach().clone().requires_grad_(name in direction) for name, tensor in params.items()}
    with sdpa_kernel(SDPBackend.MATH):
        loss = loss_fn(leaves).reshape(())
    if not loss.requires_grad:
        return loss.item(), 0.0, 0.0
    inputs = [leaves[name] for name in names]
    omega = _flat([direction[name] for name in names])
    slope = _flat(torch.autograd.grad(loss, inputs, create_graph=True, materialize_grads=True)) @ omega
    if not slope.requires_grad:
        return loss.item(), slope.item(), 0.0
    product = _flat(torch.autograd.grad(slope, inputs, materialize_grads=True))
    return loss.item(), slope.item(), (product @ omega).item()


def derivatives_by_differences(
    loss_fn: Loss, params: Mapping[str, Tensor], direction: Mapping[str, Tensor], width: float = 1e-2
) -> tuple[float, float, float]:
    """The same from values of the loss alone: central differences of eighth order."""

    def at(alpha: float) -> float:
        with torch.no_grad():
            moved = {name: t - alpha * direction[name] if name in direction else t for name, t in params.items()}
            return loss_fn(moved).item()

    first, second = (4 / 5, -1 / 5, 4 / 105, -1 / 280), (8 / 5, -1 / 5, 8 / 315, -1 / 560)
    here = at(0.0)
    pairs = [(at(-k * width), at(k * width)) for k in (1, 2, 3, 4)]
    slope = sum(weight * (low - high) for weight, (low, high) in zip(first, pairs, strict=True)) / width
    bend = sum(weight * (low + high - 2 * here) for weight, (low, high) in zip(second, pairs, strict=True))
    return here, slope, bend / width**2


def one_layer_optimum(weight: Tensor, bias: Tensor, inputs: Tensor, targets: Tensor, slopes: Tensor) -> float:
    """The optimal learning rate of plain SGD for ŷ = σ(Wx + b), σ piecewise linear, loss 1/(2M) Σ‖ŷ(xᵢ) − yᵢ‖².

    ``slopes`` are the diagonals of Dᵢ = diag(σ′(Wxᵢ + b)); σ passes through 0, so that ŷᵢ = Dᵢ(Wxᵢ + b). Summed in
    loops, as the formula reads:
    α* = M Σᵢⱼ (1 + xᵢᵀxⱼ)⟨DᵢDⱼeⱼ, eᵢ⟩ / Σᵢⱼₖ (1 + xᵢᵀxⱼ)(1 + xᵢᵀxₖ)⟨DᵢDⱼeⱼ, DᵢDₖeₖ⟩.
    """
    count = len(inputs)
    errors = [slopes[i] * (weight @ inputs[i] + bias) - targets[i] for i in range(count)]
    top = bottom = 0.0
    for i in range(count):
        pushed = [(1 + inputs[i] @ inputs[j]) * (slopes[i] * slopes[j] * errors[j]) for j in range(count)]
        top += sum(float(each @ errors[i]) for each in pushed)
        bottom += sum(float(left @ right) for left in pushed for right in pushed)
    return count * top / bottom


def _flat(tensors: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])
