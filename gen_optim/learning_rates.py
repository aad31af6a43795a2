"""The scheduler's factor, the learning rates in force, and those that somebody wrote by hand.

The groups of an optimizer share one learning rate α, each at its own ratio; a scheduler multiplies that by a factor.
``param_groups[i]["lr"]`` has two writers besides the user: this package where no scheduler is attached, and the
scheduler where one is, because it computes its next value from the one it wrote. What has to be remembered of a group
stands in the group itself, as plain numbers, so that every kind of checkpoint carries it.
"""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import compress
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CyclicLR, LRScheduler, OneCycleLR, ReduceLROnPlateau
from torch.optim.swa_utils import SWALR

__all__ = ["Group", "LearningRates", "check_lr", "write_lr"]

Group = dict[str, Any]

_RATIO = "gen_ratio"
"""The group's learning rate over α; 0 where the group is frozen."""
_WRITTEN = "gen_written_lr"
"""What stood in ``group["lr"]`` when this package last wrote or saw it; another value comes from a hand."""
_USED = "gen_last_lr"
"""The learning rate of the last step."""
_SCHEDULED = "gen_scheduled"
"""Whether a scheduler has been noticed."""
_PEAK = "gen_peak_lr"
"""The top of a scheduler that may rise above the ``initial_lr`` (CyclicLR, OneCycleLR, SWALR); 0 for all others."""

_LOOKS = 16
"""How often in a row a scheduler is looked for in vain; a look takes tens of milliseconds."""


class LearningRates:
    """Reads and writes the learning rates of an optimizer's groups.

    Args:
        owners: The optimizers to which a scheduler may be attached.
    """

    def __init__(self, *owners: Optimizer) -> None:
        self._owners = [weakref.ref(each) for each in owners]  # a cycle would keep the model until a collection
        self._read_before: dict[int, tuple[weakref.ref[Tensor], int, float]] = {}
        self._writer: weakref.ref[LRScheduler] | None = None
        self._looks_left = _LOOKS

    def all_zero(self, groups: Sequence[Group]) -> bool:
        """Whether every ``group["lr"]`` is 0."""
        return all(self._read(group["lr"]) == 0.0 for group in groups)

    def stand(self, groups: Sequence[Group], lr: float) -> bool:
        """Whether every group holds what a step at α uses, by this package's hand and nobody else's."""
        for group in groups:
            rate = group["lr"]
            # A tensor is left to the other methods, which read it no more often than they must.
            is_own = type(rate) is float and rate == group.get(_WRITTEN) == group[_USED] == lr * group[_RATIO]
            if not is_own or group[_SCHEDULED] or "initial_lr" in group:
                return False
        return True

    def marks(self, groups: Sequence[Group]) -> list[Any]:
        """What changes when somebody writes a learning rate; no tensor is read for that."""
        rates = [group["lr"] for group in groups]
        return [(id(rate), rate._version) if isinstance(rate, Tensor) else rate for rate in rates]

    def begin(self, groups: Sequence[Group]) -> float:
        """Take over groups of which nothing is remembered.

        Returns:
            α, the learning rate of the first unfrozen group without a scheduler's factor; 0 if all are frozen.

        Raises:
            ValueError: If a learning rate is negative or not finite.
        """
        for group in groups:
            self._enter(group, ratio=0.0)
        return self._share(groups, [self._read(group.get("initial_lr", group["lr"])) for group in groups])

    def join(self, groups: Sequence[Group], index: int, lr: float, *, brings_lr: bool) -> None:
        """Let a group that was added later take part: at its own learning rate, or at ratio 1 if it brings none.

        Raises:
            ValueError: If that is negative or not finite.
        """
        group = groups[index]
        if not brings_lr:
            # A default that is a tensor is shared by all groups that took it.
            group["lr"] = group["lr"].clone().fill_(lr) if isinstance(group["lr"], Tensor) else lr
        own = self._read(group["lr"])
        check_lr(index, own)
        self._enter(group, ratio=own / lr if lr else 0.0)
        if any(each[_SCHEDULED] for each in groups[:index]):
            # Schedulers that compute the next value from the present one write this group too.
            group.setdefault("initial_lr", own)
            group[_SCHEDULED] = True
        if not lr:  # all others are frozen: as if a hand had written this one, it sets α
            group[_WRITTEN] = 0.0

    def refresh(self, groups: Sequence[Group], lr: float, default_lr: Any) -> float | None:
        """Take in what others did to the groups since the last step.

        Args:
            groups: The optimizer's parameter groups.
            lr: The learning rate α.
            default_lr: The learning rate that the base optimizer gives to a group that brings none.

        Returns:
            The new α where a hand has written a learning rate, else None.

        Raises:
            ValueError: If a learning rate is negative or not finite.
        """
        for index, group in enumerate(groups):
            if _RATIO not in group:
                self.join(groups, index, lr, brings_lr=group["lr"] is not default_lr and group["lr"] != default_lr)
        if any("initial_lr" in group for group in groups):
            self._find_writer(groups)
        chosen = [self._chosen(group, lr) for group in groups]
        if chosen == self.shares(groups, lr):
            return None
        chosen_lr = self._share(groups, chosen) or lr
        for group in groups:
            group[_WRITTEN] = self._read(group["lr"])
        return chosen_lr

    def shares(self, groups: Sequence[Group], lr: float) -> list[float]:
        """Each group's part of α, without a scheduler's factor; 0 for frozen groups."""
        return [lr * group[_RATIO] for group in groups]

    def factors(self, groups: Sequence[Group]) -> list[float]:
        """Each group's factor from its scheduler; 1 without one."""
        return [self._factor(group) for group in groups]

    def factor(self, groups: Sequence[Group]) -> float:
        """The factor of the first group that moves, for whose learning rate measurements are; 0 where none does."""
        return next((factor for factor in map(self._factor, compress(groups, self.shares(groups, 1.0))) if factor), 0.0)

    @contextmanager
    def in_force(self, groups: Sequence[Group], rates: Sequence[float]) -> Iterator[None]:
        """Let the base optimizer step at ``rates``; what stood in the groups comes back afterwards."""
        stood = [self._read(group["lr"]) for group in groups]
        try:
            for group, rate in zip(groups, rates, strict=True):
                self._write(group, rate)
            yield
        finally:
            for group, rate in zip(groups, stood, strict=True):
                self._write(group, rate)

    def settle(self, groups: Sequence[Group], lr: float, used: Sequence[float]) -> None:
        """Write α to the groups that no scheduler writes, and note what the step used."""
        if self.stand(groups, lr) and used == [group[_USED] for group in groups]:
            return
        for group, share, rate in zip(groups, self.shares(groups, lr), used, strict=True):
            if not group[_SCHEDULED]:
                self._write(group, share)
            group[_WRITTEN] = self._read(group["lr"])
            # Without a scheduler the two agree even where the lr is a tensor that cannot hold every float.
            group[_USED] = group[_WRITTEN] if rate == share and not group[_SCHEDULED] else rate

    def last_lr(self, groups: Sequence[Group]) -> list[float]:
        """The learning rates that the last step used."""
        return [group.get(_USED, self._read(group["lr"])) for group in groups]

    def _enter(self, group: Group, *, ratio: float) -> None:
        lr = self._read(group["lr"])
        group.update({_RATIO: ratio, _WRITTEN: lr, _USED: lr, _SCHEDULED: False, _PEAK: 0.0})

    def _share(self, groups: Sequence[Group], rates: Sequence[float]) -> float:
        """Set the ratios to those of ``rates`` and return α, the first that is not 0."""
        for index, rate in enumerate(rates):
            check_lr(index, rate)
        lr = next((rate for rate in rates if rate > 0.0), 0.0)
        for group, rate in zip(groups, rates, strict=True):
            group[_RATIO] = rate / lr if lr else 0.0
        return lr

    def _find_writer(self, groups: Sequence[Group]) -> None:
        """Find the scheduler that wrote the present learning rates, unless it is the one that did before.

        Several may have been attached one after the other, and what a factor is relative to depends on which one it is.
        """
        present = [self._read(group["lr"]) for group in groups]

        def has_written(scheduler: LRScheduler) -> bool:
            return [float(rate) for rate in getattr(scheduler, "_last_lr", [])] == present

        writer = None if self._writer is None else self._writer()
        if writer is None or not has_written(writer):
            if not self._looks_left:
                return
            self._looks_left -= 1
            owners = [owner for each in self._owners if (owner := each()) is not None]
            writers = [each for each in _attached(owners) if has_written(each)]
            if not writers:
                if not any(group[_PEAK] for group in groups):
                    for group in groups:  # after ``gc.freeze()`` no scheduler is found, but OneCycleLR leaves this
                        group[_PEAK] = self._read(group.get("max_lr", 0.0))
                return
            # One that is part of a SequentialLR or ChainedScheduler comes before the whole if it knows its peak; SWALR
            # waits beside another one for its time.
            writer = max(writers, key=lambda each: isinstance(each, CyclicLR | OneCycleLR) - isinstance(each, SWALR))
            self._writer, self._looks_left = weakref.ref(writer), _LOOKS
        elif not isinstance(writer, SWALR):
            return
        for index, group in enumerate(groups):
            group[_PEAK] = self._read(_peak(writer, index, group))

    def _chosen(self, group: Group, lr: float) -> float:
        """The learning rate that holds for a group now, without a factor: GeN's own or one written by hand."""
        share: float = lr * group[_RATIO]
        if "initial_lr" not in group:
            stands = self._read(group["lr"])
            return share if stands == group[_WRITTEN] else stands
        if group[_SCHEDULED]:
            return share
        group[_SCHEDULED] = True
        initial = self._read(group["initial_lr"])
        # A scheduler took the lr that it found for its initial one: a hand may have written that just before. Those
        # with a max_lr were told their own.
        return share if group[_PEAK] or initial == group[_WRITTEN] else initial

    def _factor(self, group: Group) -> float:
        if not group[_SCHEDULED]:
            return 1.0
        nominal = group[_PEAK] or self._read(group["initial_lr"])
        return self._read(group["lr"]) / nominal if nominal else 1.0

    def _read(self, number: Any) -> float:
        """A learning rate as a float. A tensor is read only after it was written, since reading synchronises."""
        if not isinstance(number, Tensor):
            return float(number)
        known = self._read_before.get(id(number))
        if known is None or known[0]() is not number or known[1] != number._version:
            return self._remember(number, float(number))
        return known[2]

    def _remember(self, number: Tensor, value: float) -> float:
        self._read_before[id(number)] = (weakref.ref(number), number._version, value)
        return value

    def _write(self, group: Group, rate: float) -> None:
        """Set ``group["lr"]``; a tensor that holds the rate already is not written, and what is written not read."""
        lr = group["lr"]
        if not isinstance(lr, Tensor):
            group["lr"] = rate
        elif self._read(lr) != (rounded := torch.tensor(rate, dtype=lr.dtype).item()):
            write_lr(group, rate)
            self._remember(lr, rounded)


def _peak(writer: LRScheduler, index: int, group: Group) -> Any:
    if isinstance(writer, CyclicLR):
        return writer.max_lrs[index]
    if isinstance(writer, OneCycleLR):
        return group["max_lr"]
    if isinstance(writer, SWALR) and writer.last_epoch > 0:
        # Chosen for the learning rate given, which nobody had to choose: above that it is the top, and not many times.
        return max(group["swa_lr"], group["initial_lr"])
    return 0.0


def check_lr(index: int, rate: Any) -> None:
    """Refuse the learning rate of a group that no step can be taken at.

    Raises:
        ValueError: If it is no number, negative or not finite.
    """
    if not (isinstance(rate, Real | Tensor) and 0.0 <= float(rate) < math.inf):
        raise ValueError(f"param_groups[{index}]['lr'] must be a finite number of at least 0, got {rate!r}")


def write_lr(group: Group, rate: float) -> None:
    """Set ``group["lr"]``; a tensor stays the same tensor."""
    if isinstance(group["lr"], Tensor):
        with torch.no_grad():
            group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def _attached(owners: Sequence[Optimizer]) -> list[LRScheduler]:
    """The schedulers that refer to one of ``owners``; they leave no other trace by which to find them."""
    referrers = gc.get_referrers(*owners)
    # What refers to a scheduler's attributes is the scheduler, where the attributes are a dictionary of their own.
    referrers += gc.get_referrers(*(each for each in referrers if isinstance(each, dict) and "last_epoch" in each))
    found = {id(each): each for each in referrers if isinstance(each, LRScheduler)}
    return [each for each in found.values() if not isinstance(each, ReduceLROnPlateau)]
