"""Checks a closure: does it return the same loss twice, and does it call modules that probes would change?"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from itertools import filterfalse
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gen_optim.closures.buffers import BufferSnapshot
from gen_optim.closures.losses import check_callable, check_loss, copied
from gen_optim.closures.modules import children_of, live_modules, parameters_of, with_children
from gen_optim.closures.session import Session
from gen_optim.distributed import Ranks
from gen_optim.optimizer import GeNOptimizer
from gen_optim.tensors.scalars import to_floats
from gen_optim.warning import warn


def check_closure(optimizer: GeNOptimizer, closure: Callable[[], Any], *, probes: int = 3) -> tuple[float, ...]:
    """Warn if a closure is unfit to be probed.

    A probe step compares the losses of several calls and attributes any difference to the parameters that it has
    moved. So the calls must see the same data and the same random numbers. This function calls the closure as a step
    would, once with gradients and then as probes, but moves nothing: differences would count as slope and curvature.

    It also looks for modules that the closure changes and the optimizer does not know: those that own none of its
    parameters and are not in ``modules=``, such as a discriminator with batch normalisation.

    Parameters, gradients, buffers and the global random streams are left as they were. Other effects of the closure,
    such as drawing from a data loader or logging, happen ``probes + 1`` times. Call it once before training, or when
    a run looks odd.

    Args:
        optimizer: The optimizer that the closure is for.
        closure: The closure, or probe, for its ``step``.
        probes: How often it is called besides the call with gradients; at least 1.

    Returns:
        The loss of the call with gradients, then those of the probes.

    Raises:
        TypeError: If ``optimizer`` is no :class:`GeNOptimizer`, or the closure returns no loss.
        ValueError: If ``probes`` is below 1.

    Warns:
        UserWarning: If the losses differ by more than their rounding (the ``tolerance`` of the optimizer's mode), or
            probes change buffers or gradients of modules that the optimizer does not know.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = GeNOptimizer(torch.optim.SGD([weight], lr=0.1))
        >>> check_closure(optimizer, lambda: (weight**2).sum())
        (3.0, 3.0, 3.0, 3.0)
    """
    if not isinstance(optimizer, GeNOptimizer):
        raise TypeError(f"optimizer must be a GeNOptimizer, got {type(optimizer).__name__}")
    check_callable("closure", closure)
    if probes < 1:
        raise ValueError(f"probes must be at least 1, got {probes}")
    caller = optimizer._context.caller  # noqa: SLF001 - what a step uses, too
    groups, tolerance = optimizer.param_groups, optimizer.mode.tolerance
    modules = caller.owners([each for group in groups for each in group["params"]])
    session = Session(caller, groups, modules, closure, "closure", Ranks(), tolerance=tolerance)
    known = set(modules)
    others = _Others([each for each in live_modules() if each not in known])
    gradients = [(each, each.grad) for each in (*session.parameters(), *others.parameters)]
    try:
        for parameter, _ in gradients:
            parameter.grad = None
        with torch.enable_grad():
            first = copied(check_loss(closure(), "closure"))
        others.end_first_call()
        with session.probing():
            probed = [session.probe() for _ in range(probes)]
        changed = others.changed()
    finally:
        session.rewind()
        others.rewind()
        for parameter, gradient in gradients:
            parameter.grad = gradient
    losses = tuple(to_floats([first, *probed]))
    if all(map(math.isfinite, losses)):
        _warn_of_differences(losses, session.rounding([first, *probed]) * max(map(abs, losses)))
    elif any(map(math.isfinite, losses)):
        _warn_of_differences(losses, 0.0)
    if changed:
        _warn_of_modules(changed)
    return losses


class _Others:
    """The modules alive that an optimizer does not know, and all of their parameters."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = modules
        self._before = self._after = BufferSnapshot(modules)
        self.parameters = [parameter for module in modules for parameter in parameters_of(module)]

    def end_first_call(self) -> None:
        """Take their present state as that after the first call."""
        self._after = self._before.later()
        self._gradients = {id(each): (each.grad, _version(each.grad)) for each in self.parameters}

    def changed(self) -> list[nn.Module]:
        """Return the outermost of those whose buffers or gradients have changed since."""
        changed = set(self._after.changed())
        changed.update(module for module in self._modules if any(map(self._has_changed, parameters_of(module))))
        below = {child for module in self._modules for child in children_of(module)}
        return [each for each in self._modules if each not in below and changed.intersection(with_children([each]))]

    def rewind(self) -> None:
        """Put their buffers back to where the first call found them."""
        self._before.restore()

    def _has_changed(self, parameter: Tensor) -> bool:
        gradient, version = self._gradients.get(id(parameter), (parameter.grad, _version(parameter.grad)))
        return parameter.grad is not gradient or _version(gradient) != version


def _version(gradient: Tensor | None) -> int:
    return 0 if gradient is None else gradient._version


def _size(module: nn.Module) -> int:
    return sum(each.numel() for each in filterfalse(is_lazy, module.parameters()))


def _warn_of_modules(changed: Collection[nn.Module]) -> None:
    names = ", ".join(f"{type(each).__name__} ({_size(each)} parameters)" for each in changed)
    warn(
        f"Probes of the closure change buffers or gradients of modules that own none of the optimizer's parameters: "
        f"{names}. GeNOptimizer does not know them and cannot put them back. Name them in its option modules=: one "
        "module, or several."
    )


def _warn_of_differences(losses: tuple[float, ...], noise: float) -> None:
    def differ(values: tuple[float, ...]) -> bool:
        return not max(values) - min(values) <= noise

    first, *probed = losses
    if differ(tuple(probed)):
        cause = (
            "Does the closure draw its data, or random numbers from a generator of its own? Draw them before, outside "
            "of the closure, or from the global generators, which probes rewind."
        )
    elif differ(losses):
        cause = (
            f"With gradients it returned {first!r}, as a probe {probed[0]!r}. Does it, or the model, do something else "
            "when gradients are disabled or when it is called for the first time?"
        )
    else:
        return
    warn(
        f"The closure returns different losses at the same parameters: {', '.join(f'{loss:.9g}' for loss in losses)}. "
        f"GeNOptimizer would take the difference for slope and curvature. {cause}"
    )
