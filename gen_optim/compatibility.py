"""Which base optimizers can be wrapped: those whose update is proportional to their present learning rate.

GeN computes the direction from one step at one learning rate and then moves to another. So a base optimizer's update
must be its learning rate times something that depends neither on that learning rate nor on those of earlier steps.
Some optimizers break this without saying so. That is measured on a twin: an optimizer of the same class and options,
which takes a few steps on a handful of numbers. The base optimizer itself is not changed.
"""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedParameter
from torch.optim import Optimizer

from gen_optim.learning_rates import Group, check_lr, write_lr
from gen_optim.tensors.rng import RandomStreams, random_devices
from gen_optim.warning import warn
from gen_optim.wrapper import copy_optimizer, step_without_hooks

_TOLERANCE = 0.01
"""Relative error up to which an update counts as proportional. Weight decay after the update, (θ − αu)(1 − αw), is
proportional up to αw, which is less at learning rates of training."""

_POSITION = 0.05
"""Relative error up to which an update counts as independent of earlier learning rates. Trust ratios depend on where
the parameters are, which is a little elsewhere after earlier steps at other learning rates."""

_NEAR = 2.0
"""Ratio of the two learning rates that are compared in the range of training."""

_FAR = 1024.0
"""Ratio of the two learning rates by which caps, and estimates that are made from the way covered, show themselves."""

_LARGE = 32.0
"""Ratio of two updates above which an optimizer is refused for steps before it at ``_FAR`` times the learning rate.
Less comes from what depends on where the parameters are, as a trust ratio does: parameters go far in such steps."""

_STEPS = range(7, 13)
"""Numbers of steps after which an update is looked at. Some optimizers stand still in the first five. Those that
synchronise slow weights at every k-th step, k up to 12, do so at one of these."""

_MOST_COPIED = 2**24
"""Number of elements up to which all parameters are copied for a twin that cannot be made of smaller ones."""


def check_wrappable(base_optim: Any) -> None:
    """Refuse a base optimizer that GeN cannot wrap, with a TypeError or a ValueError.

    It must step without a closure, pass :func:`check_groups`, and make updates proportional to its present learning
    rate alone. If no twin could be made or stepped, a warning says that this is not known.
    """
    name = type(base_optim).__name__
    if not isinstance(base_optim, Optimizer):
        got = f"the class {base_optim.__name__}" if isinstance(base_optim, type) else name
        raise TypeError(
            f"base_optim must be a torch.optim.Optimizer, got {got}. Parameters and options belong to that: "
            "GeNOptimizer(torch.optim.AdamW(model.parameters()))"
        )
    closure = inspect.signature(base_optim.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise _closure_required(name)
    check_groups(base_optim.param_groups)
    errors = []
    streams = RandomStreams(random_devices(each for group in base_optim.param_groups for each in group["params"]))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for make in _twin_makers(base_optim):
                try:
                    departure = _departure(make, streams)
                except Exception as error:  # noqa: BLE001 - classes may demand anything of parameters and gradients
                    errors.append(error)
                    continue
                if departure is None:
                    return
                raise ValueError(departure.format(name=name))
            if errors and _steps_with_closure_alone(base_optim):
                raise _closure_required(name)
    finally:
        streams.restore()
    if not errors:  # there are no parameters
        return
    warn(
        f"GeNOptimizer could not check whether updates of {name} are proportional to its learning rate: a twin of it "
        f"failed with {type(errors[0]).__name__}: {errors[0]}. If they are not, the learning rates found will be wrong."
    )


def check_groups(groups: Sequence[Group]) -> None:
    """Refuse parameter groups whose steps GeN cannot measure, with a ValueError."""
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
        if any(isinstance(each, Tensor) and each.is_meta for each in _parameters(group)):
            raise ValueError(
                f"base_optim must have parameters with data, but param_groups[{index}] has some on the meta device. "
                "Materialize the model first, for example with model.to_empty(device=...), and load its weights."
            )
        if any(isinstance(each, UninitializedParameter) for each in _parameters(group)):
            raise ValueError(
                f"base_optim must have parameters with data, but param_groups[{index}] has some of lazy modules, which "
                "are not initialized yet. Call the model once on a batch before you construct the optimizer."
            )
    if len({bool(group.get("maximize")) for group in groups}) > 1:
        raise ValueError(
            "base_optim must have the same maximize in all groups: one loss cannot be measured as both better and worse"
        )


def _parameters(group: Group) -> list[Any]:
    """Return the parameters of a group, which may be a single tensor or name them before it is added."""
    params = group.get("params", ())
    if isinstance(params, list | tuple):
        return [each[1] if isinstance(each, tuple) else each for each in params]
    return [params] if isinstance(params, Tensor) else []


def _closure_required(name: str) -> TypeError:
    return TypeError(
        f"base_optim must be able to step without a closure, but {name}.step requires one: it evaluates the loss "
        "itself, once or several times a step. Use it bare, or wrap another optimizer."
    )


# --- how an update depends on learning rates --------------------------------------------------------------------------


@dataclass
class _Twin:
    """An optimizer that may be stepped, and the parameters that it moves, by group."""

    optimizer: Optimizer
    is_sparse: bool = False

    @property
    def parameters(self) -> list[list[Tensor]]:
        """The parameters of each group."""
        return [group["params"] for group in self.optimizer.param_groups]

    def step(self, number: int, rates: Sequence[float]) -> None:
        """Take the step of this number, with gradients that depend on it alone, at a learning rate for each group."""
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            write_lr(group, rate)
            for each in group["params"]:
                slope = torch.linspace(0.1 + number, 1.0, each.numel(), device=each.device, dtype=torch.float32)
                gradient = slope.to(each.dtype).reshape(each.shape)
                each.grad = gradient.to_sparse() if self.is_sparse else gradient
        step_without_hooks(self.optimizer)

    def positions(self) -> list[list[Tensor]]:
        """Return copies of the parameters."""
        return [[each.detach().clone() for each in parameters] for parameters in self.parameters]


_Update = list[Tensor]
"""The update of each group, flattened, in float64 on the CPU."""


def _updates(
    make: Callable[[], _Twin],
    streams: RandomStreams,
    steps: int,
    earlier: float,
    last: float,
    *,
    near: bool = False,
    returns: bool = False,
) -> list[_Update]:
    """Return the updates of a twin in steps at the learning rate ``earlier``, but the last one at ``last``.

    The random streams are put back at first, so that all twins see the same noise. With ``near``, both are multiples of
    learning rates of training. With ``returns``, the last step begins where the first one did, and weights do not
    decay: with long steps decay would be all there is, and if it is part of the gradient, momentum remembers the way
    covered, as it should.
    """
    streams.restore()
    twin = make()
    start = twin.positions()
    rates = [min(max(float(group["lr"]), 1e-3), 1.0) if near else 1.0 for group in twin.optimizer.param_groups]
    if returns:
        for group in twin.optimizer.param_groups:
            group.update(dict.fromkeys({"weight_decay"}.intersection(group), 0.0))
    updates = []
    for number in range(steps):
        is_last = number == steps - 1
        if returns and is_last:
            for parameter, value in zip(chain(*twin.parameters), chain(*start), strict=True):
                parameter.detach().copy_(value)
        before = twin.positions()
        twin.step(number, [(last if is_last else earlier) * rate for rate in rates])
        updates.append(
            [
                torch.cat([(new.detach() - old).flatten() for new, old in zip(*each, strict=True)]).double().cpu()
                for each in zip(twin.parameters, before, strict=True)
            ]
        )
    return updates


def _departure(make: Callable[[], _Twin], streams: RandomStreams) -> str | None:
    """Return how an optimizer departs from proportional updates, as an error message with its ``{name}`` left out."""
    updates = partial(_updates, make, streams)
    usual = updates(_STEPS[-1], 1.0, 1.0, near=True)
    for steps in _STEPS:
        longer = updates(steps, 1.0, _NEAR, near=True)[-1]
        if _differ(longer, usual[steps - 1], times=_NEAR, tolerance=_TOLERANCE):
            return _unproportional(_NEAR, _ratio(longer, usual[steps - 1]))
    first = _STEPS[0]
    here, after = (updates(first, earlier, 1.0, near=True, returns=True)[-1] for earlier in (1.0, _NEAR))
    if _differ(after, here, times=1.0, tolerance=_POSITION):
        return _remembering(_NEAR, _ratio(after, here))
    here = updates(first, 1.0, 1.0, returns=True)[-1]
    growth = _ratio(updates(first, 1.0, _FAR, returns=True)[-1], here)
    if growth < (1.0 - _TOLERANCE) * _FAR:  # more than that is no cap
        return _unproportional(_FAR, growth)
    memory = _ratio(updates(first, _FAR, 1.0, returns=True)[-1], here)
    return _remembering(_FAR, memory) if memory > _LARGE or memory < 1.0 / _LARGE else None


def _unproportional(times: float, growth: float) -> str:
    return (
        f"base_optim must make updates proportional to its learning rate, but at {times:.0f} times the learning rate "
        f"{{name}} moves {growth:.3g} times as far, or elsewhere. Optimizers that limit their learning rate, or that "
        "average parameters with copies that they keep, do that. Use it bare, or wrap another optimizer, such as AdamW."
    )


def _remembering(times: float, memory: float) -> str:
    return (
        "base_optim must take each step by the learning rate of that step alone, but after steps at "
        f"{times:.0f} times the learning rate {{name}} moves {memory:.3g} times as far, or elsewhere. Optimizers that "
        "estimate their own learning rate from the way covered, or average along it, do that: they and GeN would each "
        "correct what the other does. Use it bare, or wrap another optimizer, such as AdamW."
    )


def _ratio(update: _Update, other: _Update) -> float:
    """Return how many times as long the first is; NaN if that is not known."""
    lengths = [torch.linalg.vector_norm(torch.cat(each)).item() for each in (update, other)]
    return lengths[0] / lengths[1] if lengths[1] and math.isfinite(lengths[1]) else math.nan


def _differ(update: _Update, usual: _Update, *, times: float, tolerance: float) -> bool:
    """Return whether the update of a group is not so many times the usual one, up to rounding of the parameters."""
    return any(
        torch.linalg.vector_norm(one - times * other).item()
        > tolerance * torch.linalg.vector_norm(times * other).item() + times * 1e-6 * math.sqrt(one.numel())
        for one, other in zip(update, usual, strict=True)
    )


# --- twins ------------------------------------------------------------------------------------------------------------


def _twin_makers(base_optim: Optimizer) -> Iterator[Callable[[], _Twin]]:
    """Yield ways of making a twin, the most reliable first; any may fail."""
    if not any(group["params"] for group in base_optim.param_groups):
        return
    for is_sparse in (False, True):
        yield lambda is_sparse=is_sparse: _Twin(_constructed(base_optim), is_sparse)  # type: ignore[misc]
        yield lambda is_sparse=is_sparse: _Twin(_copied(base_optim, is_small=True), is_sparse)  # type: ignore[misc]
    if sum(each.numel() for group in base_optim.param_groups for each in group["params"]) <= _MOST_COPIED:
        yield lambda: _Twin(_copied(base_optim, is_small=False))


def _small(like: Tensor) -> Tensor:
    """Return a parameter of few elements, of the same number of axes as another."""
    dtype = like.dtype if like.dtype in (torch.float32, torch.float64) else torch.float32
    return torch.nn.Parameter(torch.full((2,) * max(like.dim(), 1), 0.5, device=like.device, dtype=dtype))


def _constructed(base_optim: Optimizer) -> Optimizer:
    """Return an optimizer made by the constructor of the same class, with one small parameter in each group."""
    accepted = inspect.signature(type(base_optim)).parameters
    groups: dict[Any, dict[str, Any]] = {}
    for group in base_optim.param_groups:
        if group["params"]:
            options = {key: value for key, value in group.items() if key not in ("params", "param_names")}
            small = _small(group["params"][0])
            if small.device.type == "cpu" and "capturable" in options:
                options["capturable"] = False  # torch steps capturable optimizers on accelerators alone
            # One of several groups that differ in the learning rate alone is enough.
            kind = str({**options, "lr": None}), small.dim(), small.dtype, small.device
            # Options may be mutable: caches, lists.
            groups.setdefault(kind, {**copy.deepcopy(options), "params": [small]})
    defaults = {key: copy.deepcopy(value) for key, value in base_optim.defaults.items() if key in accepted}
    return _in_train_mode(type(base_optim)(list(groups.values()), **defaults))


def _copied(base_optim: Optimizer, *, is_small: bool) -> Optimizer:
    """Return a copy of an optimizer, for classes whose constructors ask for more than parameters and options.

    With ``is_small``, each group has only its first parameter in the copy, and a small one. Tensors of the state that
    are equal to their parameter are equal to it in the copy, others of its shape are zero.
    """
    memo: dict[int, Any] = {}
    for group in base_optim.param_groups:
        for each in group["params"]:
            copied = _small(each) if is_small else torch.nn.Parameter(each.detach().clone())
            memo[id(each)] = copied
            for value in _tensors_of_state(base_optim, each) if is_small else ():
                if value.shape == each.shape:
                    memo[id(value)] = copied.detach().clone().mul_(float(torch.equal(value, each)))
    twin = copy_optimizer(base_optim, memo)
    twin.param_groups[:] = [group for group in twin.param_groups if group["params"]]
    for group in twin.param_groups:
        del group["params"][1 if is_small else len(group["params"]) :]
    return _in_train_mode(twin)


def _tensors_of_state(optimizer: Optimizer, parameter: Tensor) -> list[Tensor]:
    """Return the tensors that an optimizer, and optimizers inside it, keep for a parameter."""
    found = [
        value
        for value in vars(optimizer).values()
        if isinstance(value, dict)
        for value in (value.get(parameter, {}) or {}).values()
        if isinstance(value, Tensor)
    ]
    inner = [each for each in vars(optimizer).values() if isinstance(each, Optimizer)]
    return found + [value for each in inner for value in _tensors_of_state(each, parameter)]


def _in_train_mode(optimizer: Optimizer) -> Optimizer:
    if callable(train := getattr(optimizer, "train", None)):
        train()  # schedule-free optimizers step in this mode alone
    return optimizer


def _steps_with_closure_alone(base_optim: Optimizer) -> bool:
    """Return whether a twin that cannot step without a closure can with one."""
    for make in (partial(_constructed, base_optim), partial(_copied, base_optim, is_small=True)):
        try:
            twin = make()
            parameters = [each for group in twin.param_groups for each in group["params"]]

            def closure() -> Tensor:
                for each in parameters:  # noqa: B023 - called in this iteration
                    each.grad = torch.ones_like(each)
                return torch.ones(())

            closure()
            twin.step(closure)  # type: ignore[arg-type]
        except Exception:  # noqa: BLE001 - it says nothing about closures
            continue
        return True
    return False
