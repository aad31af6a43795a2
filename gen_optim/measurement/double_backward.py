"""Exact mode: slope and curvature of a loss by differentiating it twice."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gen_optim.closures.losses import Loss
from gen_optim.closures.modules import check_twice_differentiable
from gen_optim.measurement.interpolation import Interpolation
from gen_optim.measurement.measurement import Measurement, Mode, StepLoss
from gen_optim.rules import Parabola
from gen_optim.tensors.dtensor import dot


class Exact(Mode):
    """Slope and curvature by differentiating the closure's loss twice, at the point where the next step begins.

    Exact GeN (Bu and Xu, arXiv:2407.02772, section 2), for one more forward pass, its backward pass, and a double
    backward pass. It measures on the batch of the gradients, and is for ``rule="published"`` or a ``probe`` on
    another batch.

    Args:
        tolerance: As in :class:`~gen_optim.Mode`.

    Raises:
        RuntimeError: At a probe step, if an operation in the loss has no second derivative; names it. When the
            optimizer is constructed, if the parameters belong to a module sharded by ``fully_shard``.
    """

    def measure(self, loss: StepLoss) -> Measurement:
        """Differentiate the loss twice where the step begins."""
        path = loss.path
        assert isinstance(path, Interpolation), "the step that is about to be taken"

        def derivatives() -> tuple[Loss, Loss, Loss]:
            value = loss.evaluate_with_graph(0.0)
            return value.detach(), *slope_and_curvature(value, *path.step())

        again, *along = loss.session.ranks.attempt(derivatives, instead=(math.nan,) * 3)
        (value, slope, curvature), _ = loss.read([loss.losses.get(0.0, again), *along])
        return Measurement((0.0,), (value,), Parabola(value, slope / loss.lr, curvature / loss.lr / loss.lr), value)

    def check(self, parameters: Iterable[Tensor]) -> None:
        """Refuse parameters whose loss cannot be differentiated twice.

        Raises:
            RuntimeError: If they belong to a module to which ``fully_shard`` has been applied.
        """
        check_twice_differentiable(parameters)

    def around_calls(self) -> AbstractContextManager[None]:
        """Choose kernels that have a second derivative.

        Of the kernels of ``scaled_dot_product_attention`` only the one written in elementary operations has one. Each
        kernel draws dropout in its own way, so that all calls of a step have to use the same.
        """
        return sdpa_kernel(SDPBackend.MATH)


def slope_and_curvature(loss: Tensor, parameters: Sequence[Tensor], step: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """First and second derivative of a loss along a step u, ∇L(θ)·u and uᵀ∇²L(θ)u, by double backward.

    They are slope and curvature of L(θ − αu) at α = 0 (Bu and Xu, arXiv:2407.02772, eq. 4), in float64. Where
    parameters are DTensors, they are this rank's shares: their mean over the ranks is meant. The graph of ``loss`` is
    freed. If an operation in it has no second derivative, a RuntimeError names it.
    """
    try:
        # With a seed that requires a gradient, functions marked as once differentiable show themselves.
        seed = torch.ones_like(loss, requires_grad=True)
        gradients: tuple[Tensor | None, ...] = torch.autograd.grad(
            loss, parameters, seed, create_graph=True, allow_unused=True
        )
        slope = dot(gradients, step)
        # What does not depend on the parameters any more has no second derivative to add.
        curved = [(each, u) for each, u in zip(gradients, step, strict=True) if each is not None and each.requires_grad]
        if not curved:
            return slope, torch.zeros_like(slope)
        of, along = zip(*curved, strict=True)
        _refuse_once_differentiable(of)
        products = torch.autograd.grad(of, parameters, grad_outputs=along, allow_unused=True)
    except (RuntimeError, NotImplementedError) as error:
        raise RuntimeError(
            "mode='exact' needs the second derivative of the loss along the step, which some operations and models "
            "compiled by torch.compile do not have. Use mode='approximate', which only evaluates the loss. torch says: "
            f"{error}"
        ) from error
    return slope, dot(products, step)


def _refuse_once_differentiable(gradients: Sequence[Tensor]) -> None:
    """Raise what torch raises when it differentiates such a function twice; on a way to parameters it never does.

    The backward pass of such a function ends in a node that raises, behind which the graph is cut: its second
    derivative would silently count as zero.
    """
    nodes = [each.grad_fn for each in gradients]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if node is not None:
            if node.name() == "torch::autograd::Error":
                raise RuntimeError("trying to differentiate twice a function that was marked with @once_differentiable")
            fresh = [each for each, _ in node.next_functions if each not in seen]
            seen.update(fresh)
            nodes += fresh
