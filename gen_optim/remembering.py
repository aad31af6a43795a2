"""What GeN remembers between steps: where it stands, and how checkpoints, copies and pickles keep it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, compress
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from gen_optim.control import ControlState, PublishedRule
from gen_optim.gradients import mark_used
from gen_optim.looking_back import KeptPoint
from gen_optim.moving import movable
from gen_optim.scheduling import LearningRates
from gen_optim.wrapping import OptimizerWrapper

__all__ = ["RememberingOptimizer"]

_KEPT = "gen_kept"
"""The entry of a state dictionary for the point where the last step began, where that is kept."""


class RememberingOptimizer(OptimizerWrapper):
    """An optimizer's wrapper with a memory: plain numbers in the parameter groups, and a pending point to look back at.

    What stands in the groups goes through every kind of checkpoint: distributed ones drop what stands elsewhere, and
    refuse enums. The pending point is an entry of the state dictionary of its own; where that is lost, one parabola is
    skipped.

    Args:
        base_optim: The optimizer to wrap.
        rule: How learning rates are chosen.
    """

    def __init__(self, base_optim: Optimizer, rule: PublishedRule) -> None:
        super().__init__(base_optim)
        self._rule = rule
        self._rates = LearningRates(self, base_optim)
        self._kept: KeptPoint | None = None

    def _recall(self) -> ControlState:
        """Read the state from the parameter groups, and take in what others have written there."""
        groups = self.param_groups
        if not ControlState.is_in(groups[0]):
            # Constructed just now, or loaded from a checkpoint of the bare base optimizer.
            state = ControlState(lr=self._rates.begin(groups))
        else:
            state = ControlState.load(groups[0])
            lr = self._rates.refresh(groups, state.lr, self.defaults.get("lr"))
            if lr is None:
                return state
            state = self._rule.restart_averages(state, lr)
        groups[0].update(state.dump())
        return state

    def _remember(self, state: ControlState, used: Sequence[float]) -> None:
        """Write the state, and the learning rates that the step used, to the parameter groups."""
        self.param_groups[0].update(state.dump())
        mark_used(self.param_groups)
        self._rates.settle(self.param_groups, state.lr, used)

    def _rates_in_force(self, lr: float) -> list[float]:
        """Each group's learning rate when α is ``lr``, the scheduler's factor included."""
        groups = self.param_groups
        return [
            share * factor
            for share, factor in zip(self._rates.shares(groups, lr), self._rates.factors(groups), strict=True)
        ]

    def _take_kept(self) -> KeptPoint | None:
        """The point where the last step began, if there is one; it serves once."""
        kept, self._kept = self._kept, None
        return kept if kept is not None and kept.is_of(list(chain(*self._moving()))) else None

    def _moving(self) -> list[list[Tensor]]:
        """The parameters that a step can change, of each group that is not frozen."""
        is_moving = [ratio > 0.0 for ratio in self._rates.shares(self.param_groups, 1.0)]
        return [movable(group["params"]) for group in compress(self.param_groups, is_moving)]

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state dictionary, and a copy of the parameters where one is pending."""
        state_dict = super().state_dict()
        return state_dict if self._kept is None else {**state_dict, _KEPT: self._kept.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dictionary of this optimizer's or of the base's; nothing of it is shared afterwards.

        Raises:
            ValueError: If its groups do not match this optimizer's.
        """
        super().load_state_dict(state_dict)
        kept = state_dict.get(_KEPT)
        self._kept = None if kept is None else KeptPoint.load(list(chain(*self._moving())), kept)

    def _after_loading(self) -> None:
        self._recall()

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles keep; of the schedulers they know nothing."""
        return {name: value for name, value in super().__getstate__().items() if name != "_rates"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore what was kept, and set up the rest."""
        super().__setstate__(state)
        if "_rates" not in self.__dict__:
            self._rates = LearningRates(self, self.base_optim)
