"""Whether a closure returns the same loss each time it is called at the same parameters, as probing supposes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from gen_optim.closures.losses import losses_to_floats, rounding_of
from gen_optim.optimizer import GeNOptimizer
from gen_optim.warning import warn

__all__ = ["check_closure"]


def check_closure(optimizer: GeNOptimizer, closure: Callable[[], Any], *, probes: int = 3) -> tuple[float, ...]:
    """Warn if a closure does not return the same loss when it is called again at the same parameters.

    A probe step compares the losses of several calls, and takes any difference for the work of the parameters that it
    has moved. So the calls must see the same data and the same random numbers. This calls the closure as a step would,
    once with gradients and then as probes, but moves nothing in between: what still differs would pass for slope and
    curvature. Call it once before training, or when something looks odd.

    Parameters, gradients, buffers and the global random streams are left as they were. What else the closure does,
    such as drawing from a data loader or logging, is done ``probes + 1`` times.

    Args:
        optimizer: The optimizer that the closure will be given to.
        closure: The closure, or probe, for its ``step``.
        probes: How often it is called besides the call with gradients; at least 1.

    Returns:
        The loss of the call with gradients, then those of the probes.

    Raises:
        TypeError: If ``optimizer`` is no :class:`GeNOptimizer`, or the closure returns no loss.
        ValueError: If ``probes`` is below 1.

    Warns:
        UserWarning: If the losses differ by more than their rounding (the optimizer's ``tolerance``).

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = GeNOptimizer(torch.optim.SGD([weight], lr=0.1))
        >>> check_closure(optimizer, lambda: (weight**2).sum())
        (3.0, 3.0, 3.0, 3.0)
    """
    if not isinstance(optimizer, GeNOptimizer):
        raise TypeError(f"optimizer must be a GeNOptimizer, got {type(optimizer).__name__}")
    if probes < 1:
        raise ValueError(f"probes must be at least 1, got {probes}")
    evaluator = optimizer._evaluator
    everything = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    # The first probe comes first: it touches no gradients, and after it all modules are known whose gradients to keep.
    scout = evaluator.session(everything)
    with scout.probing():
        probed = [scout.probe(closure, "closure")]
    gradients = [(parameter, parameter.grad) for parameter in scout.parameters()]
    session = evaluator.session(everything)
    try:
        for parameter, _ in gradients:
            parameter.grad = None
        first = session.first(lambda: evaluator.call(closure)[0])
        with session.probing():
            probed += [session.probe(closure, "closure") for _ in range(probes - 1)]
    finally:
        session.rewind()
        for parameter, gradient in gradients:
            parameter.grad = gradient
    losses = tuple(losses_to_floats([first, *probed]))
    if all(map(math.isfinite, losses)):
        noise = optimizer._tolerance * rounding_of([first, *probed], session.computed_in) * max(map(abs, losses))
        _warn_of_differences(losses, noise)
    elif any(map(math.isfinite, losses)):
        _warn_of_differences(losses, 0.0)
    return losses


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
