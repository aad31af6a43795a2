"""Learning rates of parameter groups: their ratios, a scheduler's factors, and manual values.

The groups of an optimizer share one learning rate α. Group i is stepped at α · ratio_i · factor_i: the ratio is that
of the group, the factor is what a learning-rate scheduler makes of it (1 without a scheduler).

``param_groups[i]["lr"]`` has two writers besides the user. Without a scheduler this module writes α · ratio_i there.
With a scheduler it leaves the value alone, because schedulers compute the next value from the last one.

A factor is relative to the group's nominal learning rate:

- ``group["max_lr"]`` if there is one. OneCycleLR writes it. CyclicLR does not show its upper limit: write it yourself,
  ``for group in optimizer.param_groups: group["max_lr"] = 0.1``; otherwise the factor is relative to ``base_lr``.
- else ``group["initial_lr"]``, which every scheduler writes. With ``group["swa_lr"]``, which SWALR writes, the factor
  is at most 1.

Both keys stay in the group when another scheduler is attached. After OneCycleLR, the factor of a second scheduler is
relative to ``max_lr`` too, as its learning rate would be without this package; ``del group["max_lr"]`` ends that.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import compress
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from gen_optim.tensors.interrupts import Unfinished

Group = dict[str, Any]

_KEYS = {
    "ratio": "gen_ratio",
    "written_lr": "gen_written_lr",
    "last_lr": "gen_last_lr",
    "is_scheduled": "gen_scheduled",
}
"""The attributes of a :class:`GroupRate` that checkpoints carry, and their keys in a parameter group."""

_NOMINAL = ("initial_lr", "max_lr", "min_lr", "swa_lr")
"""Learning rates that schedulers write to the groups that exist when they are attached."""


class GroupRate:
    """What is remembered of the learning rate of one parameter group.

    ``ratio`` is its learning rate over α; 0 if the group is frozen. ``written_lr`` is ``group["lr"]`` when it was last
    written or accepted; another value is a manual one. ``last_lr`` is that of the last step, the scheduler's factor
    included.
    """

    def __init__(self, group: Group) -> None:
        self.group = group
        self.ratio = 0.0
        self._read: dict[str, tuple[Tensor, int, float]] = {}
        self.written_lr = self.last_lr = self.read("lr")
        self.is_scheduled = False

    def to_numbers(self) -> dict[str, float | bool]:
        """Return the entries of the group that a checkpoint carries."""
        return {key: getattr(self, name) for name, key in _KEYS.items()}

    @classmethod
    def from_numbers(cls, group: Group) -> GroupRate:
        """Read what :meth:`to_numbers` has written to a group."""
        rate = cls(group)
        for name, key in _KEYS.items():
            setattr(rate, name, group.get(key, getattr(rate, name)))
        return rate

    def read(self, key: str) -> float:
        """Return a learning rate of the group as a float.

        A tensor is read again only after it was written or replaced, since reading synchronises with its device.
        """
        value = self.group[key]
        if not isinstance(value, Tensor):
            return float(value)
        last = self._read.get(key)
        if last is None or last[0] is not value or last[1] != value._version:
            last = self._read[key] = (value, value._version, float(value))
        return last[2]

    def write(self, rate: float) -> None:
        """Set ``group["lr"]``. A tensor stays the same tensor, and is not written if it holds the rate already."""
        lr = self.group["lr"]
        if not isinstance(lr, Tensor):
            self.group["lr"] = rate
        elif self.read("lr") != (rounded := torch.tensor(rate, dtype=lr.dtype).item()):
            write_lr(self.group, rate)
            self._read["lr"] = (lr, lr._version, rounded)

    def nominal_lr(self) -> float:
        """Return the learning rate that a scheduler's factor is relative to; ``group["lr"]`` without a scheduler."""
        # Optimizers of optimi have a max_lr of None.
        keys = (key for key in ("max_lr", "initial_lr") if self.group.get(key) is not None)
        nominal = self.read(next(keys, "lr"))
        return max(nominal, self.read("lr")) if "swa_lr" in self.group else nominal

    def factor(self) -> float:
        """Return the scheduler's factor; 1 without a scheduler."""
        if not self.is_scheduled or "initial_lr" not in self.group:
            return 1.0
        nominal = self.nominal_lr()
        return self.read("lr") / nominal if nominal else 1.0

    def chosen(self, lr: float) -> float:
        """Return the group's learning rate without a factor: its part of α, or a manual value."""
        share = lr * self.ratio
        if "initial_lr" not in self.group:
            shown = self.read("lr")
            return share if shown == self.written_lr else shown
        if self.is_scheduled:
            return share
        self.is_scheduled = True
        # A scheduler takes the present lr for its initial_lr. If that is not the value written last, the user wrote it
        # just before. Schedulers with a max_lr have an initial_lr of their own.
        initial_lr = self.read("initial_lr")
        return share if self.group.get("max_lr") is not None or initial_lr == self.written_lr else initial_lr


class LearningRates:
    """Reads and writes the learning rates of an optimizer's parameter groups, which it recognises by identity.

    Groups that appear without an announcement (``base_optim.add_param_group``, ``base_optim.load_state_dict``, another
    list of groups) are taken in by :meth:`update`: their numbers are read if they carry some, otherwise they join as in
    :meth:`join`.
    """

    def __init__(self) -> None:
        self._rates: list[GroupRate] = []

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write what is remembered of each group to it, as plain numbers."""
        for rate in self._rates:
            rate.group.update(rate.to_numbers())

    def load_from(self, groups: Iterable[Group]) -> bool:
        """Read what :meth:`save` has written to the groups; return whether any carried numbers, or forget all."""
        self._rates = [GroupRate.from_numbers(group) for group in groups if _KEYS["ratio"] in group]
        return bool(self._rates)

    @staticmethod
    def check_numbers(groups: Sequence[Mapping[str, Any]]) -> None:
        """Check the numbers that groups of a checkpoint carry; a group carries all of them or none."""
        for index, group in enumerate(groups):
            if not any(key in group for key in _KEYS.values()):
                continue
            for key in _KEYS.values():
                if key not in group:
                    raise ValueError(f"param_groups[{index}] of the state dict must have {key!r}, which is missing")
                is_flag = key == _KEYS["is_scheduled"]
                if not (isinstance(group[key], bool) if is_flag else _is_rate(group[key])):
                    expected = "True or False" if is_flag else "a finite number of at least 0"
                    raise ValueError(
                        f"param_groups[{index}][{key!r}] of the state dict must be {expected}, got {group[key]!r}"
                    )

    # --- groups ------------------------------------------------------------------------------------------------------

    def begin(self, groups: Sequence[Group]) -> float:
        """Start with groups of which nothing is remembered, and return α; 0 if all are frozen."""
        self._rates = [GroupRate(group) for group in groups]
        return self._set_ratios([rate.nominal_lr() for rate in self._rates])

    def join(self, group: Group, lr: float, *, brings_lr: bool) -> None:
        """Take in a group that was added to the optimizer.

        A group with an lr joins at the ratio of that to the lr which the first unfrozen group shows now, whether or
        not a scheduler wrote it. A group without one joins at ratio 1. If a scheduler is attached, the group gets the
        first group's factor. If all other groups are frozen, α becomes the group's own lr at the next step.
        """
        first = next((rate for rate in self._rates if rate.ratio > 0.0), None)
        shown = lr if first is None else first.read("lr")
        if not brings_lr:
            # Groups that take a default share it if it is a tensor.
            group["lr"] = torch.full_like(group["lr"], shown) if isinstance(group["lr"], Tensor) else shown
        check_lr(len(self._rates), group["lr"])
        joined = GroupRate(group)
        if first is None:
            joined.written_lr = 0.0  # so that the lr counts as a manual value, which sets α
        elif shown:
            joined.ratio = joined.written_lr / shown
        else:  # the scheduler's factor is 0 now
            joined.ratio = joined.written_lr / first.nominal_lr() if joined.written_lr else 1.0
        if first is not None:
            joined.is_scheduled = first.is_scheduled
            for key in _NOMINAL:
                if first.group.get(key) is not None:
                    group.setdefault(key, joined.ratio * first.read(key))
        self._rates.append(joined)

    def is_unchanged(self, groups: Sequence[Group], lr: float) -> bool:
        """Return whether all groups show what a step at α uses, nothing else was written, and no scheduler attached.

        For tensors it is always False: reading them is left to the methods that have to.
        """
        if len(groups) != len(self._rates):
            return False
        rates = iter(self._rates)  # each lazy step calls this, and zip takes twice as long for one group
        for group in groups:
            rate = next(rates)
            shown = group["lr"]
            if (
                group is not rate.group
                or type(shown) is not float
                or not shown == rate.written_lr == rate.last_lr == lr * rate.ratio
                or rate.is_scheduled
                or "initial_lr" in group
            ):
                return False
        return True

    def update(self, groups: Sequence[Group], lr: float, default_lr: Any) -> float | None:
        """Take in what others did since the last step: groups that came or went, schedulers, manual values.

        Return the new α if the user wrote a learning rate, else None. Groups whose lr is ``default_lr`` brought none.
        """
        for index, group in enumerate(groups):
            if not isinstance(group["lr"], Tensor):  # reading one waits for its device
                check_lr(index, group["lr"])
        self._recognise(groups, lr, default_lr)
        chosen = [rate.chosen(lr) for rate in self._rates]
        if chosen == self.shares(lr):
            return None
        new_lr = self._set_ratios(chosen) or lr
        for rate in self._rates:
            rate.written_lr = rate.read("lr")
        return new_lr

    def _recognise(self, groups: Sequence[Group], lr: float, default_lr: Any) -> None:
        """Match what is remembered to the groups; read or join groups that are not known."""
        if [id(group) for group in groups] == [id(rate.group) for rate in self._rates]:
            return
        rates = self._of(groups)
        is_known = [rate in self._rates or _KEYS["ratio"] in rate.group for rate in rates]
        self._rates = list(compress(rates, is_known))
        for group in compress(groups, map(operator.not_, is_known)):
            self.join(group, lr, brings_lr=group["lr"] is not default_lr and group["lr"] != default_lr)
        self._rates = self._of(groups)  # in their order

    # --- steps -------------------------------------------------------------------------------------------------------

    def all_zero(self, groups: Sequence[Group]) -> bool:
        """Return whether every ``group["lr"]`` is 0."""
        return all(rate.read("lr") == 0.0 for rate in self._of(groups))

    def shares(self, lr: float) -> list[float]:
        """Return each group's part of α, without a scheduler's factor; 0 for frozen groups."""
        return [lr * rate.ratio for rate in self._rates]

    def factors(self) -> list[float]:
        """Return each group's factor from its scheduler; 1 without one."""
        return [rate.factor() for rate in self._rates]

    def factor(self) -> float:
        """Return the factor of the first group that moves, whose learning rate is measured; 0 if none moves."""
        factors = (rate.factor() for rate in self._rates if rate.ratio > 0.0)
        return next((factor for factor in factors if factor), 0.0)

    def rates_in_force(self, lr: float) -> list[float]:
        """Return the learning rate of each group in a step at α, the scheduler's factor included."""
        return [lr * rate.ratio * rate.factor() for rate in self._rates]

    @contextmanager
    def in_force(self, rates: Sequence[float], unfinished: Unfinished) -> Iterator[None]:
        """Have the groups show ``rates`` for a step of the base optimizer, and put back what they showed."""
        shown = [rate.read("lr") for rate in self._rates]
        with unfinished.ending_with(partial(self._show, shown)):
            self._show(rates)
            yield

    def _show(self, rates: Sequence[float]) -> None:
        for rate, shown in zip(self._rates, rates, strict=True):
            rate.write(shown)

    def settle(self, lr: float, used: Sequence[float]) -> None:
        """End a step that ``used`` these learning rates: write α to the groups that no scheduler writes."""
        for rate, taken in zip(self._rates, used, strict=True):
            # Without its initial_lr a scheduler has been taken off. Not before a step: resumed groups may get it still.
            rate.is_scheduled = rate.is_scheduled and "initial_lr" in rate.group
            share, shown = lr * rate.ratio, rate.group["lr"]
            if type(shown) is float and shown == rate.written_lr == rate.last_lr == share == taken:
                continue
            if not rate.is_scheduled:
                rate.write(share)
            rate.written_lr = rate.read("lr")
            # Without a scheduler the two agree, even if the lr is a tensor that cannot hold every float.
            rate.last_lr = rate.written_lr if taken == share and not rate.is_scheduled else taken

    def last_lr(self, groups: Sequence[Group]) -> list[float]:
        """Return the learning rates that the last step used."""
        return [rate.last_lr for rate in self._of(groups)]

    def _of(self, groups: Iterable[Group]) -> list[GroupRate]:
        """Return what is remembered of each group, here or in the numbers that it carries."""
        known = {id(rate.group): rate for rate in self._rates}
        return [known.get(id(group)) or GroupRate.from_numbers(group) for group in groups]

    def _set_ratios(self, chosen: Sequence[float]) -> float:
        """Set the ratios to those of ``chosen`` and return α, the first that is not 0."""
        for index, rate in enumerate(chosen):
            check_lr(index, rate)
        lr = next((rate for rate in chosen if rate > 0.0), 0.0)
        for known, rate in zip(self._rates, chosen, strict=True):
            known.ratio = rate / lr if lr else 0.0
        return lr


def _is_rate(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0.0 <= value < math.inf


def check_lr(index: int, rate: Any) -> None:
    """Raise a ValueError if the learning rate of a group is no number, negative or not finite."""
    if not (isinstance(rate, Real | Tensor) and 0.0 <= float(rate) < math.inf):
        raise ValueError(f"param_groups[{index}]['lr'] must be a finite number of at least 0, got {rate!r}")


def write_lr(group: Group, rate: float) -> None:
    """Set ``group["lr"]``; a tensor stays the same tensor."""
    if isinstance(group["lr"], Tensor):
        with torch.no_grad():
            group["lr"].fill_(rate)
    else:
        group["lr"] = rate
