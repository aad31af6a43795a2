"""Averaged weights: a power-law average of the parameters, and blocks in which the model has it."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import update_bn

from gen_optim.closures.buffers import Buffers
from gen_optim.closures.modules import owners_of, release
from gen_optim.tensors.dtensor import is_dtensor, local
from gen_optim.tensors.foreach import chunks, clone, copy, near, write
from gen_optim.tensors.interrupts import despite_interrupts, exchanging

__all__ = ["AveragedWeights", "multi_power_average", "power_average", "refreshed_batch_norm"]

Pair = tuple[Tensor, Tensor]
"""A parameter and its average."""
Chunks = list[Tensor]

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

    so that the k-th parameters weigh :math:`(k^p - (k - 1)^p) / n^p` in it. With p = 16 the window is about the last
    sixteenth of the run, whenever the run ends.

    Each parameter that is trained has one average of its shape and memory layout: in float32 for half precision, in
    the parameter's dtype otherwise. Of a DTensor each rank averages its part, without communication.

    **Where the average is kept.** The average of a parameter ``p`` is ``optimizer.state[p]["gen_average"]``, beside the
    optimizer's own state, and the number of steps is ``optimizer.param_groups[0]["gen_average_steps"]``. So every kind
    of checkpoint, copy and pickle has them, those of ``torch.distributed.checkpoint`` included, flattened or not: they
    keep nothing else than state per parameter and numbers per group, and load only names that the live optimizer has.
    Two rules make that safe:

    - Optimizers initialize the state of a parameter when it is empty. An average is added only after the optimizer has
      stepped on the parameter: when there is state, or a gradient and no state (plain SGD).
    - ``Optimizer.load_state_dict`` casts state to the parameter's dtype, which would round the float32 average of a
      bfloat16 parameter. :meth:`take_from` takes the averages out before the optimizer loads, and :meth:`load` puts
      them in afterwards. If the optimizer is loaded without these two, the average continues from the rounded values.

    **Which parameters.** A parameter with ``requires_grad=False`` has no average. A parameter that is frozen later
    keeps its average, and updates go on. A parameter that is added later, or whose shape or placement has changed,
    begins at its present value with the common count. One that changes its device or dtype takes its average along. If
    the average is not finite, because the parameters were not, it begins again at the present value; this is looked
    for at every sixteenth update and at each swap.

    Args:
        optimizer: The optimizer whose parameters are averaged. Its groups and state are read at each call.
        every: Steps per update.
        exponent: The exponent p. The window is about the last 1/p of the run.
        on_host: Whether averages are in the host's memory, pinned for CUDA, instead of on the parameter's device.
            Averages of DTensors are always on their device.

    Raises:
        ValueError: If ``every`` is not a positive integer or ``exponent`` is not a positive number.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([0.0]))
        >>> optimizer = torch.optim.SGD([weight], lr=0.1)
        >>> weights = AveragedWeights(optimizer, every=1)
        >>> for _ in range(100):
        ...     weight.grad = torch.tensor([-1.0])
        ...     optimizer.step()
        ...     weights.update()
        >>> weight
        Parameter containing:
        tensor([10.0000], requires_grad=True)
        >>> with weights.swapped():
        ...     weight
        Parameter containing:
        tensor([9.4604], requires_grad=True)
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
    def is_swapped(self) -> bool:
        """Whether the parameters are the average now, inside :meth:`swapped`."""
        return self._swap is not None

    @property
    def _steps(self) -> int:
        # A checkpoint of an optimizer without averages has no such number.
        return int(self._optimizer.param_groups[0].get(_STEPS, 0))

    # --- updates -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def update(self) -> None:
        """Count a step, and update the average if it is due.

        To be called after the optimizer has stepped and before gradients are set to None.

        Raises:
            RuntimeError: Inside :meth:`swapped`.
        """
        self.refuse_if_swapped("update()")
        steps = self._optimizer.param_groups[0][_STEPS] = self._steps + 1
        updates, rest = divmod(steps, self._every)
        if rest:
            if steps == 1:
                self.begin()
            return
        pairs = self._pairs(begins=True)
        _average(pairs, _weight(updates, self._exponent))
        if updates % _REPAIR_PERIOD == 0:
            _repair(pairs)

    @torch.no_grad()
    def begin(self) -> None:
        """Allocate averages that do not exist yet, with the present values.

        :meth:`update` does so. It is of use after a step that counts for nothing: ``torch.distributed.checkpoint``
        steps a new optimizer with learning rate 0 and loads only what its state dictionary then has.
        """
        self._pairs(begins=True)

    def _pairs(self, *, begins: bool = False) -> list[Pair]:
        """The parameters that have an average, with it; averages that are missing begin now or are left out."""
        pairs: list[Pair] = []
        states = self._optimizer.state
        for parameter in chain.from_iterable(group["params"] for group in self._optimizer.param_groups):
            state = states.get(parameter)
            found = state.get(_AVERAGE) if state else None
            average = None if found is None else self._fitted(parameter, found)
            if average is None and begins and parameter.requires_grad and (state or parameter.grad is not None):
                average = self._room(parameter)
                local(average).copy_(local(parameter))
            if average is not None:
                if average is not found:
                    states.setdefault(parameter, {})[_AVERAGE] = average
                pairs.append((parameter, average))
        return pairs

    def _fitted(self, parameter: Tensor, average: Tensor) -> Tensor | None:
        """The average with the dtype and in the place that it should have; None if it belongs to other parameters."""
        if average.shape != parameter.shape or is_dtensor(average) != is_dtensor(parameter):
            return None
        if is_dtensor(parameter) and is_dtensor(average) and parameter.placements != average.placements:
            return None
        here, there = local(average), local(parameter)
        if here.dtype == _dtype(there) and here.device == self._device(parameter):
            return average
        moved = self._room(parameter)
        local(moved).copy_(here)
        return moved

    def _room(self, parameter: Tensor) -> Tensor:
        device = self._device(parameter)
        is_pinned = device.type == "cpu" and local(parameter).is_cuda
        if not is_pinned:
            return torch.empty_like(parameter, dtype=_dtype(parameter), device=device, requires_grad=False)
        return torch.empty_like(parameter, dtype=_dtype(parameter), device=device, pin_memory=True, requires_grad=False)

    def _device(self, parameter: Tensor) -> torch.device:
        return torch.device("cpu") if self.on_host and not is_dtensor(parameter) else local(parameter).device

    # --- the average in the model --------------------------------------------------------------------------------

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Have the average in the parameters inside the block, and the parameters back afterwards, bit for bit.

        They are back whatever happens inside, exceptions and ``KeyboardInterrupt`` included. Inside, the average's
        memory has the parameters, so that the swap allocates one chunk; for parameters in half precision it
        allocates a copy in their dtype. Nothing should write to the parameters inside: that would change the average,
        or in half precision be lost.

        Before the first update the block has the present parameters. A nested block changes nothing.

        Example:
            >>> with weights.swapped():  # doctest: +SKIP
            ...     torch.save(model.state_dict(), "model.pt")
        """
        if self._swap is not None:
            yield
            return
        pairs = self._pairs() if self.updates else []
        with torch.no_grad():
            _repair(pairs)
        swap = self._swap = _Swap(pairs, on_host=self.on_host)
        try:
            swap.enter()
            yield
        finally:
            # An error that is no interrupt (memory that has run out) leaves it swapped, for update() to refuse.
            despite_interrupts(swap.leave, partial(setattr, self, "_swap", None))

    @torch.no_grad()
    def write(self) -> None:
        """Write the average into the parameters for good. Before the first update it changes nothing.

        Raises:
            RuntimeError: Inside :meth:`swapped`.
        """
        self.refuse_if_swapped("writing the average into the model")
        pairs = self._pairs() if self.updates else []
        _repair(pairs)
        parameters, averages = [local(each) for each, _ in pairs], [local(each) for _, each in pairs]
        despite_interrupts(partial(copy, parameters, averages))
        _forget_cached(pairs)

    def refuse_if_swapped(self, what: str) -> None:
        """Raise an error if the parameters are the average now.

        Args:
            what: What needs the parameters themselves, for the message.

        Raises:
            RuntimeError: Inside :meth:`swapped`.
        """
        if self.is_swapped:
            raise RuntimeError(
                f"{what} is not possible inside averaged(), where the model has the averaged weights: leave the block "
                "first"
            )

    # --- checkpoints, copies -------------------------------------------------------------------------------------

    def take_from(self, state_dict: Mapping[str, Any]) -> tuple[dict[str, Any], dict[int, Tensor]]:
        """Take the averages out of a state dictionary of the optimizer, which is left as it is.

        Args:
            state_dict: As ``Optimizer.state_dict()`` returns it. Parameters may have names instead of numbers.

        Returns:
            A copy of it without averages, for the optimizer to load, and the averages, for :meth:`load`.

        Raises:
            RuntimeError: Inside :meth:`swapped`.
        """
        self.refuse_if_swapped("loading the optimizer")
        names: Iterable[Hashable] = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        positions = {name: position for position, name in enumerate(names)}
        averages: dict[int, Tensor] = {}
        states: dict[Hashable, Any] = {}
        for name, state in state_dict["state"].items():
            if name in positions and isinstance(state, Mapping) and _AVERAGE in state:
                averages[positions[name]] = state[_AVERAGE]
                state = {key: value for key, value in state.items() if key != _AVERAGE}  # noqa: PLW2901
                if not state:
                    continue
            states[name] = state
        return {**state_dict, "state": states}, averages

    @torch.no_grad()
    def load(self, averages: Mapping[int, Tensor]) -> None:
        """Load averages that :meth:`take_from` has returned, when the optimizer has loaded the rest.

        Averages are copied. Those of another shape than the parameter's begin again.
        """
        parameters = list(chain.from_iterable(group["params"] for group in self._optimizer.param_groups))
        for position, average in averages.items():
            parameter = parameters[position]
            fitted = self._fitted(parameter, average)
            if fitted is not None:
                state = self._optimizer.state.setdefault(parameter, {})
                state[_AVERAGE] = fitted.clone() if fitted is average else fitted
        self._optimizer.param_groups[0].setdefault(_STEPS, 0)

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles keep; they have averages and parameters of their own.

        Raises:
            RuntimeError: Inside :meth:`swapped`.
        """
        self.refuse_if_swapped("copying the optimizer")
        return self.__dict__.copy()


class _Swap:
    """An exchange of parameters with their averages that can be undone, chunk by chunk.

    Args:
        pairs: Parameters and averages.
        on_host: Whether copies are in the host's memory.
    """

    def __init__(self, pairs: Sequence[Pair], *, on_host: bool) -> None:
        self._pairs = pairs
        self._on_host = on_host
        # What takes the parameters back, by chunk in the order of the exchange.
        self._undo: dict[int, list[Callable[[], object]]] = {}

    @torch.no_grad()
    def enter(self) -> None:
        """Write the averages to the parameters."""
        there, kept = [local(each) for each, _ in self._pairs], [local(each) for _, each in self._pairs]
        for kind in _kinds(there, kept):
            # An average in the parameter's dtype has room for the parameter; of others, the parameter is copied.
            is_exchange = kind[0][0].dtype == kind[1][0].dtype
            for parameters, averages in chunks(*kind, cut=is_exchange):
                (self._exchange if is_exchange else self._overwrite)(parameters, averages)
        _forget_cached(self._pairs)

    @torch.no_grad()
    def leave(self) -> None:
        """Write back those parameters that are not back yet."""
        # In the reverse order, for parameters that share memory.
        writes: list[Callable[[], object]] = []
        for index in sorted(self._undo, reverse=True):
            writes += [*self._undo[index], partial(self._undo.pop, index, None)]
        despite_interrupts(*writes)
        _forget_cached(self._pairs)

    def _exchange(self, parameters: Chunks, averages: Chunks) -> None:
        despite_interrupts(
            *exchanging(parameters, averages),
            partial(self._undo.__setitem__, len(self._undo), exchanging(parameters, averages)),
        )

    def _overwrite(self, parameters: Chunks, averages: Chunks) -> None:
        copies = [clone(each, on_host=self._on_host) for each in parameters]
        despite_interrupts(
            partial(write, parameters, averages),
            partial(self._undo.__setitem__, len(self._undo), [partial(write, parameters, copies)]),
        )


def _average(pairs: Sequence[Pair], weight: float) -> None:
    """Move each average to its parameter by a part of the distance."""
    there, kept = [local(each) for each, _ in pairs], [local(each) for _, each in pairs]
    if weight == 1.0:
        copy(kept, there)
        return
    for parameters, averages in _kinds(there, kept):
        # The parameters' device computes. Chunks, if copies are made on the way.
        device, dtype = parameters[0].device, averages[0].dtype
        is_apart, is_cast = averages[0].device != device, parameters[0].dtype != dtype
        for chunk, target in chunks(parameters, averages, cut=is_apart or is_cast):
            ends = [each.to(dtype) for each in chunk] if is_cast else chunk
            means = near(target, device)
            if len(means) == 1:
                means[0].lerp_(ends[0], weight)
            else:
                torch._foreach_lerp_(means, ends, weight)
            if is_apart:
                write(target, means)


def _repair(pairs: Sequence[Pair]) -> None:
    """Begin averages that are not finite again, at the present parameters."""
    there, kept = [local(each) for each, _ in pairs], [local(each) for _, each in pairs]
    for parameters, averages in _kinds(there, kept):
        norms = torch.stack(torch._foreach_norm(averages))
        if not torch.isfinite(norms).all():
            for parameter, average, norm in zip(parameters, averages, norms.tolist(), strict=True):
                if not math.isfinite(norm):
                    average.copy_(parameter)


def _kinds(parameters: Sequence[Tensor], averages: Sequence[Tensor]) -> Iterable[tuple[list[Tensor], list[Tensor]]]:
    """Parameters and averages, sorted by dtypes and devices; empty ones are left out."""
    kinds: dict[Hashable, tuple[list[Tensor], list[Tensor]]] = {}
    for parameter, average in zip(parameters, averages, strict=True):
        if parameter.numel():
            kind = (parameter.dtype, parameter.device, average.dtype, average.device)
            of_kind = kinds.setdefault(kind, ([], []))
            of_kind[0].append(parameter)
            of_kind[1].append(average)
    return kinds.values()


def _forget_cached(pairs: Sequence[Pair]) -> None:
    """Have nobody compute with copies of the parameters from before they were written to."""
    torch.clear_autocast_cache()
    parameters = [each for each, _ in pairs]
    if any(map(is_dtensor, parameters)):  # modules of fully_shard may still be gathered
        release(owners_of(parameters))


def _dtype(parameter: Tensor) -> torch.dtype:
    """The dtype of a parameter's average."""
    if parameter.dtype in (torch.float32, torch.float64, torch.complex64, torch.complex128):
        return parameter.dtype
    return torch.complex64 if parameter.is_complex() else torch.float32


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
    weight = _weight(int(num_averaged) + 1, exponent)
    is_averaged = averages[0].is_floating_point() or averages[0].is_complex()
    _average(list(zip(parameters, averages, strict=True)), weight if is_averaged else 1.0)


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
    buffers = Buffers(model.modules())
    modes = {module: module.training for module in model.modules()}
    momenta = {module: module.momentum for module in modes if hasattr(module, "momentum")}
    try:
        try:
            update_bn(batches, model, torch.device(device) if isinstance(device, str) else device)
        finally:  # update_bn changes both, and leaves them so after an exception
            for module, is_training in modes.items():
                module.training = is_training
            for module, momentum in momenta.items():
                module.momentum = momentum
        yield
    finally:
        buffers.end_first_call()  # which notes the buffers that have been replaced
        buffers.rewind()
