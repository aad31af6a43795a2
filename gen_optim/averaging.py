"""Averaged weights: a power-law average of the parameters, and a context in which the model has it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import update_bn

from gen_optim.closures.buffers import BufferSnapshot
from gen_optim.closures.losses import Loss
from gen_optim.closures.modules import owners_of, release
from gen_optim.tensors.dtensor import gradient_dot, is_dtensor, local
from gen_optim.tensors.foreach import chunks, copy, near, room_for, write
from gen_optim.tensors.interrupts import despite_interrupts, exchange
from gen_optim.tensors.scalars import to_floats
from gen_optim.wrapper import take_entry

_AVERAGE = "gen_average"
"""The entry of a parameter's state for its average."""
_STEPS = "gen_average_steps"
"""The entry of the first parameter group for the number of steps."""
_REPAIR_PERIOD = 16
"""Updates between two searches for averages that are not finite; each one waits for the device."""


class AveragedWeights:
    r"""Averages the parameters of an optimizer over the last part of a run of any length.

    The average is a power-law average (Karras and co-authors, "Analyzing and improving the training dynamics of
    diffusion models", 2023, arXiv:2312.02696). Its n-th update is

    .. math:: \bar\theta \leftarrow \bar\theta + (1 - \beta_n)(\theta - \bar\theta), \quad \beta_n = (1 - 1/n)^p,

    so that the k-th parameters weigh :math:`(k^p - (k - 1)^p) / n^p` in it, p being the ``exponent``. With p = 16 the
    window is about the last sixteenth of the run, whenever the run ends. An update is due every ``every`` steps; groups
    and state of the optimizer are read at each call.

    Averages are in float32 for half precision, in the parameter's dtype otherwise. With ``on_host`` they are in the
    host's memory, pinned for CUDA, except those of DTensors. Of a DTensor each rank averages its part. A parameter with
    ``requires_grad=False`` gets none. A parameter that is added later, or that changes its shape or placement, begins
    at its present value with the common count. An average that is not finite begins again.

    The average of a parameter ``p`` is ``optimizer.state[p]["gen_average"]``, and the number of steps is
    ``optimizer.param_groups[0]["gen_average_steps"]``, so that every kind of checkpoint, copy and pickle has them.
    Two rules make that safe:

    - Optimizers initialize the state of a parameter when it is empty. An average is added only after the optimizer has
      stepped on the parameter: when there is state, or a gradient and no state (plain SGD).
    - ``Optimizer.load_state_dict`` casts state to the parameter's dtype, which would round the float32 average of a
      bfloat16 parameter. :meth:`take_from` takes the averages out before the optimizer loads, and :meth:`load` puts
      them in afterwards. If the optimizer is loaded without these two, the average continues from the rounded values.
    """

    def __init__(self, optimizer: Optimizer, *, every: int = 4, exponent: float = 16.0, on_host: bool = False) -> None:
        if every < 1 or every != int(every):
            raise ValueError(f"every must be a positive integer, got {every!r}")
        self._optimizer = optimizer
        self._every = every
        self._exponent = _check_exponent(exponent)
        self.on_host = on_host
        self._swap: _Swap | None = None
        optimizer.param_groups[0].setdefault(_STEPS, 0)

    @property
    def updates(self) -> int:
        """The number of updates so far."""
        return self._steps // self._every

    @property
    def is_known(self) -> bool:
        """Whether a parameter has an average that was updated; a checkpoint may lack them."""
        state = self._optimizer.state
        return self.updates > 0 and any(_AVERAGE in state.get(each, ()) for each in self._parameters())

    @property
    def is_swapped(self) -> bool:
        """Whether the parameters are the average now, inside :meth:`swapped`."""
        return self._swap is not None

    @property
    def _steps(self) -> int:
        # A checkpoint of an optimizer without averages has no such number.
        return int(self._optimizer.param_groups[0].get(_STEPS, 0))

    def _parameters(self) -> Iterator[Tensor]:
        return chain.from_iterable(group["params"] for group in self._optimizer.param_groups)

    # --- updates ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def update(self, *, begins: bool = True) -> None:
        """Count a step, and update the average if it is due.

        To be called after the optimizer has stepped and before gradients are set to None. If it has not stepped, new
        averages must not begin (``begins``): it would take a state that holds nothing else for its own.
        """
        self.refuse_if_swapped("update()")
        steps = self._optimizer.param_groups[0][_STEPS] = self._steps + 1
        updates, rest = divmod(steps, self._every)
        if rest:
            if steps == 1 and begins:
                self.begin()
            return
        pairs = self._pairs(begins=begins)
        _average(*pairs, _weight(updates, self._exponent))
        if updates % _REPAIR_PERIOD == 0:
            _repair(*pairs)

    def forget(self) -> None:
        """Begin a new average at the next :meth:`update`, when training restarts."""
        self._optimizer.param_groups[0][_STEPS] = 0

    @torch.no_grad()
    def begin(self) -> None:
        """Allocate averages that do not exist yet, with the present values.

        Distributed checkpoints load only what the state dictionary has after a step at learning rate 0.
        """
        self._pairs(begins=True)

    @torch.no_grad()
    def excess_loss(self) -> Loss:
        r"""Estimate the loss minus that at the average, from the gradients at the present parameters.

        It is :math:`\frac12 \nabla L(\theta) \cdot (\theta - \bar\theta)`. If the average is the lowest point of a
        parabola between the two, that is exact. Parameters whose gradient is None count as zero. It is NaN if elements
        of a parameter are infinite, and before the first update.

        Returns:
            A number or one-element tensor, of DTensors this rank's share.
        """
        averages = self._averages() if self.updates else {}
        return 0.5 * gradient_dot(list(averages), list(averages.values())) if averages else math.nan

    def _pairs(self, *, begins: bool = False) -> tuple[list[Tensor], list[Tensor]]:
        """Return this rank's parts of the parameters that have an average, and of the averages."""
        averages = self._averages(begins=begins)
        return list(map(local, averages)), list(averages.values())

    def _averages(self, *, begins: bool = False) -> dict[Tensor, Tensor]:
        """Return this rank's parts of the averages, by parameter; with ``begins``, missing ones begin now."""
        averages: dict[Tensor, Tensor] = {}
        states = self._optimizer.state
        for parameter in self._parameters():
            state = states.get(parameter)
            found = state.get(_AVERAGE) if state else None
            average = None if found is None else self._fitted(parameter, found)
            if average is None and begins and parameter.requires_grad and (state or parameter.grad is not None):
                average = self._copied(parameter, parameter)
            if average is not None:
                if average is not found:
                    states.setdefault(parameter, {})[_AVERAGE] = average
                averages[parameter] = local(average)
        return averages

    def _fitted(self, parameter: Tensor, average: Tensor) -> Tensor | None:
        """Return an average in the dtype and place of a parameter's; None if it has another shape or placement."""
        if average.shape != parameter.shape or _placements(average) != _placements(parameter):
            return None
        device = torch.device("cpu") if self._is_on_host(parameter) else local(parameter).device
        if average.dtype == _dtype(parameter) and local(average).device == device:
            return average
        return self._copied(parameter, average)

    def _copied(self, parameter: Tensor, values: Tensor) -> Tensor:
        """Return an average of a parameter that begins at ``values``."""
        average = room_for(parameter, on_host=self._is_on_host(parameter), dtype=_dtype(parameter))
        local(average).copy_(local(values))
        return average

    def _is_on_host(self, parameter: Tensor) -> bool:
        return self.on_host and not is_dtensor(parameter)

    # --- the average in the model -------------------------------------------------------------------------------------

    @contextmanager
    def swapped(self, *, is_probe: bool = False) -> Iterator[None]:
        """Context in which the parameters are the average; they are put back at its end, bit for bit.

        They are back whatever happens inside, exceptions and ``KeyboardInterrupt`` included. Inside, the average's
        memory has the parameters, so that the swap allocates one chunk; for parameters in half precision it
        allocates a copy in their dtype. Nothing should write to the parameters inside: that would change the average,
        or in half precision be lost.

        Before the first update the block has the present parameters. A nested block changes nothing.

        ``is_probe`` says that the block is within a step, whose session drops what is cached of the parameters. Their
        versions do not change then, so that graphs that hold them remain valid.
        """
        if self._swap is not None:
            yield
            return
        parameters, averages = self._repaired_pairs()
        self._swap = (
            _Swap([each.data for each in parameters], averages, lambda: None)
            if is_probe
            else _Swap(parameters, averages, self._forget_cached)
        )
        try:
            self._swap.enter()
            yield
        finally:
            self.leave()

    def leave(self) -> None:
        """End :meth:`swapped`, if it was interrupted before it could; may be repeated."""
        if self._swap is not None:
            # An error that is no interrupt (memory that has run out) leaves it swapped, for update() to refuse.
            despite_interrupts(self._swap.leave, partial(setattr, self, "_swap", None))

    def write(self) -> None:
        """Write the average into the parameters for good. Before the first update it changes nothing."""
        self.refuse_if_swapped("writing the average into the model")
        parameters, averages = self._repaired_pairs()
        with torch.no_grad():
            despite_interrupts(partial(copy, parameters, averages), self._forget_cached)

    @torch.no_grad()
    def _repaired_pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        parameters, averages = self._pairs() if self.updates else ([], [])
        _repair(parameters, averages)
        return parameters, averages

    def _forget_cached(self) -> None:
        """Drop the copies of parameters that autocast and ``fully_shard`` may hold from before a write."""
        torch.clear_autocast_cache()
        if sharded := list(filter(is_dtensor, self._parameters())):
            release(owners_of(sharded))

    def refuse_if_swapped(self, what: str) -> None:
        """Raise a RuntimeError inside :meth:`swapped`, for ``what`` needs the parameters themselves."""
        if self.is_swapped:
            raise RuntimeError(
                f"{what} is not possible inside averaged(), where the model has the averaged weights: leave the block "
                "first"
            )

    # --- checkpoints, copies ------------------------------------------------------------------------------------------

    def take_from(self, state_dict: Mapping[str, Any]) -> tuple[dict[str, Any], dict[int, Tensor]]:
        """Return the optimizer's state dictionary without averages, and these by position, for :meth:`load`."""
        self.refuse_if_swapped("loading the optimizer")
        return take_entry(state_dict, _AVERAGE)

    @torch.no_grad()
    def load(self, averages: Mapping[int, Tensor]) -> None:
        """Load averages that :meth:`take_from` has returned, when the optimizer has loaded the rest.

        Averages are copied. Those of another shape than the parameter's begin again.
        """
        parameters = list(self._parameters())
        for position, average in averages.items():
            parameter = parameters[position]
            if (fitted := self._fitted(parameter, average)) is not None:
                state = self._optimizer.state.setdefault(parameter, {})
                state[_AVERAGE] = fitted.clone() if fitted is average else fitted
        self._optimizer.param_groups[0].setdefault(_STEPS, 0)

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles keep; they have averages and parameters of their own."""
        self.refuse_if_swapped("copying the optimizer")
        return self.__dict__.copy()


class _Swap:
    """An exchange of parameters with their averages that can be undone, chunk by chunk; ``then`` follows each way."""

    def __init__(self, parameters: Sequence[Tensor], averages: Sequence[Tensor], then: Callable[[], None]) -> None:
        self._parameters, self._averages, self._then = parameters, averages, then
        self._exchanged: dict[int, tuple[list[Tensor], list[Tensor]]] = {}

    @torch.no_grad()
    def enter(self) -> None:
        """Write the averages to the parameters."""
        for index, (parameters, averages) in enumerate(chunks(self._parameters, self._averages)):
            # An average in another dtype has no room for the parameter: a copy of it in the parameter's dtype has.
            room = [each.to(parameters[0].dtype) for each in averages]
            exchange(parameters, room, partial(self._exchanged.__setitem__, index, (parameters, room)))
        self._then()

    @torch.no_grad()
    def leave(self) -> None:
        """Write the parameters back that are not back yet: in reverse order, since some may share memory."""
        while self._exchanged:
            index = max(self._exchanged)
            exchange(*self._exchanged[index], partial(self._exchanged.pop, index, None))
        self._then()


def _average(parameters: Sequence[Tensor], averages: Sequence[Tensor], weight: float) -> None:
    """Move each average to its parameter by a part of the distance."""
    if weight == 1.0:
        copy(averages, parameters)
        return
    kinds = [[(each.device, each.dtype) for each in tensors] for tensors in (parameters, averages)]
    for ends, targets in chunks(parameters, averages, cut=kinds[0] != kinds[1]):  # cut if there are temporaries
        dtype = targets[0].dtype
        means = near(targets, ends[0].device)  # the parameters' device computes
        torch._foreach_lerp_(means, ends if ends[0].dtype == dtype else [each.to(dtype) for each in ends], weight)
        if means[0] is not targets[0]:
            write(targets, means)


def _repair(parameters: list[Tensor], averages: list[Tensor]) -> None:
    """Begin averages that are not finite again, at the present parameters."""
    norms = to_floats(torch._foreach_norm(averages)) if averages else ()
    for parameter, average, norm in zip(parameters, averages, norms, strict=True):
        if not math.isfinite(norm):
            average.copy_(parameter)


def _placements(tensor: Tensor) -> object:
    return tensor.placements if is_dtensor(tensor) else None


def _dtype(parameter: Tensor) -> torch.dtype:
    """Return the dtype of a parameter's average."""
    return torch.promote_types(parameter.dtype, torch.float32)


# --- the same average for torch's AveragedModel -----------------------------------------------------------------------


def power_average(exponent: float = 16.0) -> Callable[[Tensor, Tensor, Tensor | int], Tensor]:
    """Return an ``avg_fn`` for ``torch.optim.swa_utils.AveragedModel``: the average of ``GeNOptimizer.averaged()``.

    Lightning's ``WeightAveraging`` takes it too. ``AveragedModel`` keeps averages in the model's dtype, so that in
    bfloat16 small updates are rounded away. Buffers of integers (``use_buffers=True``) have their newest value.

    Args:
        exponent: The exponent p; the window is about the last 1/p of the updates.

    Raises:
        ValueError: If ``exponent`` is not a positive number.

    Example:
        >>> from torch.optim.swa_utils import AveragedModel
        >>> averaged = AveragedModel(torch.nn.Linear(2, 1), avg_fn=power_average())
    """
    return partial(_averaged, exponent=_check_exponent(exponent))


def multi_power_average(
    exponent: float = 16.0,
) -> Callable[[tuple[Tensor, ...] | list[Tensor], tuple[Tensor, ...] | list[Tensor], Tensor | int], None]:
    """Return a ``multi_avg_fn`` for ``torch.optim.swa_utils.AveragedModel``, which averages all parameters at once.

    On a GPU it is faster than :func:`power_average`, and gives the same average.

    Args:
        exponent: The exponent p; the window is about the last 1/p of the updates.

    Raises:
        ValueError: If ``exponent`` is not a positive number.

    Example:
        >>> from torch.optim.swa_utils import AveragedModel
        >>> averaged = AveragedModel(torch.nn.Linear(2, 1), multi_avg_fn=multi_power_average())
    """
    return partial(_average_in_place, exponent=_check_exponent(exponent))


def _averaged(average: Tensor, parameter: Tensor, num_averaged: Tensor | int, *, exponent: float) -> Tensor:
    if not (average.is_floating_point() or average.is_complex()):
        return parameter
    return torch.lerp(average, parameter, _weight(int(num_averaged) + 1, exponent))


@torch.no_grad()
def _average_in_place(
    averages: Sequence[Tensor], parameters: Sequence[Tensor], num_averaged: Tensor | int, *, exponent: float
) -> None:
    is_averaged = averages[0].is_floating_point() or averages[0].is_complex()
    _average(parameters, averages, _weight(int(num_averaged) + 1, exponent) if is_averaged else 1.0)


def _weight(update: int, exponent: float) -> float:
    """The weight of the present parameters at an update, from 1 on: 1 − (1 − 1/n)^p."""
    return 1.0 if update == 1 else -math.expm1(exponent * math.log1p(-1.0 / update))


def _check_exponent(exponent: float) -> float:
    if not 0.0 < exponent < math.inf:
        raise ValueError(f"exponent must be a positive number, got {exponent!r}")
    return float(exponent)


# --- BatchNorm --------------------------------------------------------------------------------------------------------


@contextmanager
def refreshed_batch_norm(
    model: nn.Module, batches: Iterable[Any], *, device: torch.device | str | int | None = None
) -> Iterator[None]:
    """Have BatchNorm statistics of the present weights inside the block, and all buffers as before afterwards.

    The statistics that training has gathered belong to the weights of training, not to their average. They are
    gathered again by ``torch.optim.swa_utils.update_bn``, in one pass over batches of training data. To keep them for
    good, for averaged weights that are written into the model, call ``update_bn`` itself.

    Args:
        model: The model. In the block, its modules are in the modes (training, evaluation) in which they were before.
        batches: A loader; of each batch that is a list or tuple the first element is the model's input.
        device: The device to which inputs are moved; None if they are there.

    Example:
        >>> with optimizer.averaged(), refreshed_batch_norm(model, loader):  # doctest: +SKIP
        ...     accuracy = evaluate(model)
    """
    buffers = BufferSnapshot(model.modules())
    attributes = [
        (module, name, getattr(module, name))
        for module in model.modules()
        for name in ("training", "momentum")
        if hasattr(module, name)
    ]
    try:
        try:
            update_bn(batches, model, torch.device(device) if isinstance(device, str) else device)
        finally:  # update_bn changes both, and leaves them so after an exception
            for module, name, value in attributes:
                setattr(module, name, value)
        yield
    finally:
        buffers.restore()
