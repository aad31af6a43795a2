"""What GeN remembers between steps and tells of them; how checkpoints, copies and pickles keep it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import chain, compress
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from gen_optim.closures.gradients import mark_used
from gen_optim.compatibility import check_groups
from gen_optim.learning_rates import Group, LearningRates
from gen_optim.measurement.interpolation import movable
from gen_optim.measurement.lookahead import MODES, Measurement
from gen_optim.measurement.lookback import KeptPoint
from gen_optim.records import ProbeRecord
from gen_optim.rules.base import ControlState, Decision, ProbeStatus, PublishedRule, check_option
from gen_optim.warning import warn
from gen_optim.wrapper import OptimizerWrapper

__all__ = ["RememberingOptimizer"]

ProbeHook = Callable[[Any, ProbeRecord], None]

_KEPT = "gen_kept"
"""The entry of a state dictionary for the point where the last step began, where that is kept."""


_PATIENCE = 10
"""Failed starts, or steps that nothing could be measured in, after which the user is warned."""


class RememberingOptimizer(OptimizerWrapper):
    """An optimizer's wrapper with a memory: plain numbers in the parameter groups, and a pending point to look back at.

    What stands in the groups goes through every kind of checkpoint: distributed ones drop what stands elsewhere, and
    refuse enums. The pending point is an entry of the state dictionary of its own; where that is lost, one parabola is
    skipped.

    Args:
        base_optim: The optimizer to wrap.
        rule: How learning rates are chosen.
        rule_name: The option of which it was made.
        mode: How slope and curvature are measured.
        offload_copies: Whether copies of parameters are in the host's memory.
    """

    def __init__(
        self, base_optim: Optimizer, rule: PublishedRule, rule_name: str, mode: str, *, offload_copies: bool
    ) -> None:
        check_option("offload_copies", offload_copies, "True or False", isinstance(offload_copies, bool))
        super().__init__(base_optim)
        self._rule, self._rule_name, self._mode = rule, rule_name, mode
        self.offload_copies = offload_copies
        self._rates = LearningRates(self, base_optim)
        self._kept: KeptPoint | None = None
        self._be_silent()

    def _be_silent(self) -> None:
        self.last_probe: ProbeRecord | None = None
        self._probe_hooks: OrderedDict[int, ProbeHook] = OrderedDict()
        self._missed = self._by_hand = 0
        self._last_by_hand = -1
        self._seen: list[Any] = []

    def add_param_group(self, param_group: Group) -> None:
        """Add a parameter group, whose ratio to the others is that of its ``lr`` to the present one; 1 without.

        Args:
            param_group: Its parameters under ``"params"``, and options that differ from the base optimizer's defaults.

        Raises:
            TypeError: If ``param_group`` is no dictionary, or what it holds are no parameters.
            ValueError: If its learning rate is negative or not finite, if it is ``differentiable`` or has another
                ``maximize`` than the other groups, or if one of its parameters is in another group already.

        Example:
            >>> import torch
            >>> from gen_optim import GeNOptimizer
            >>> trunk, head = torch.nn.Linear(3, 3), torch.nn.Linear(3, 1)
            >>> optimizer = GeNOptimizer(torch.optim.SGD(trunk.parameters(), lr=0.1))
            >>> optimizer.add_param_group({"params": head.parameters(), "lr": 0.2})  # twice the trunk's from now on
            >>> optimizer.get_last_lr()
            [0.1, 0.2]
        """
        brings_lr = "lr" in param_group
        state = self._recall()
        check_groups([*self.param_groups, {**self.defaults, **param_group}])
        self.base_optim.add_param_group(param_group)
        self._rates.join(self.param_groups, len(self.param_groups) - 1, state.lr, brings_lr=brings_lr)

    # --- what it tells -------------------------------------------------------------------------------------------

    @property
    def mode(self) -> str:
        """The option of that name."""
        return self._mode

    @property
    def rule(self) -> str:
        """The option of that name."""
        return self._rule_name

    def get_last_lr(self) -> list[float]:
        """The learning rates that the last step used, one a parameter group, the scheduler's factor included.

        Example:
            >>> optimizer.get_last_lr()  # doctest: +SKIP
            [0.0123, 0.00123]
        """
        return self._rates.last_lr(self.param_groups)

    def register_probe_hook(self, hook: ProbeHook) -> RemovableHandle:
        """Have ``hook(optimizer, record)`` called after each probe step.

        Returns:
            A handle whose ``remove()`` takes the hook away again.

        Raises:
            TypeError: If ``hook`` cannot be called.

        Example:
            >>> def log(optimizer, record):
            ...     print(record.step, record.losses[0], record.lr_after)
            >>> handle = optimizer.register_probe_hook(log)  # doctest: +SKIP
        """
        if not callable(hook):
            raise TypeError(f"hook must be a callable that takes the optimizer and a record, got {type(hook).__name__}")
        handle = RemovableHandle(self._probe_hooks)
        self._probe_hooks[handle.id] = hook
        return handle

    def _report(self, before: ControlState, measurement: Measurement, decision: Decision, factor: float) -> None:
        record = self.last_probe = ProbeRecord.of(before, measurement, decision, factor)
        if record.status is ProbeStatus.START_FAILED and decision.state.probes == _PATIENCE:
            warn(
                f"GeNOptimizer has found no learning rate that lowers the loss in {_PATIENCE} steps, and stands still. "
                "Does the closure return the same loss when it is called twice, and does it depend on the parameters?"
            )
        for hook in list(self._probe_hooks.values()):
            hook(self, record)

    def _warn_of_bare_steps(self, state: ControlState) -> None:
        if state.probes == 0 and state.step + 1 == _PATIENCE:
            warn(
                f"GeNOptimizer has taken {_PATIENCE} steps without a closure or a probe, at the base optimizer's "
                "learning rate: nothing was measured. Call step(closure), or step(probe=...) where the loop calls "
                "backward() itself."
            )

    def _warn_of_missed_probe(self) -> None:
        """Called where a probe is due and there is nothing to look back at; once in a while that is normal."""
        self._missed += self._rates.factor(self.param_groups) > 0.0
        if self._missed == _PATIENCE:
            warn(
                f"GeNOptimizer could not look back in {_PATIENCE} steps in a row in which a probe was due, and keeps "
                "its learning rate: between its steps somebody else writes to the parameters (the loop, a forward "
                "pass, an optimizer that shares them), or steps lie without a closure or a probe. Write to parameters "
                "in base_optim.register_step_post_hook(...), give every step a closure or a probe, or use "
                "mode='approximate' with a probe on another batch."
            )

    def _warn_of_hands(self, step: int) -> None:
        """Called where somebody has written a learning rate."""
        if step != self._last_by_hand:
            self._by_hand = self._by_hand + 1 if step == self._last_by_hand + 1 else 1
            self._last_by_hand = step
            if self._by_hand == _PATIENCE:
                warn(
                    f"param_groups[...]['lr'] has been written by hand before each of {_PATIENCE} steps in a row, so "
                    "that GeNOptimizer's own learning rate is never used. Attach a scheduler instead, for example "
                    "torch.optim.lr_scheduler.LambdaLR: its factor multiplies what GeNOptimizer finds."
                )

    # --- what it remembers ---------------------------------------------------------------------------------------

    def _recall(self) -> ControlState:
        """Read the state from the parameter groups, and take in what others have written there."""
        state = self._take_in(self.param_groups)
        self._seen = self._rates.marks(self.param_groups)
        return state

    def _reconsider(self, state: ControlState) -> ControlState:
        """The state after the closure, which may have set the learning rate: manual warm-ups do."""
        return state if self._rates.marks(self.param_groups) == self._seen else self._recall()

    def _take_in(self, groups: list[Group]) -> ControlState:
        if not ControlState.is_in(groups[0]):
            # Constructed just now, or loaded from a checkpoint of the bare base optimizer.
            state = ControlState(lr=self._rates.begin(groups))
        else:
            state = ControlState.load(groups[0])
            if self._rates.stand(groups, state.lr):
                return state
            lr = self._rates.refresh(groups, state.lr, self.defaults.get("lr"))
            if lr is None:
                return state
            self._warn_of_hands(state.step)
            state = self._rule.restart_averages(state, lr)
        groups[0].update(state.dump())
        return state

    def _remember(self, state: ControlState, used: Sequence[float]) -> None:
        """Write the state, and the learning rates that the step used, to the parameter groups."""
        self.param_groups[0].update(state.dump())
        mark_used(self.param_groups)
        self._rates.settle(self.param_groups, state.lr, used)

    def _advance(self, state: ControlState, left: KeptPoint | None = None, *, looks_back: bool = True) -> None:
        """Let the base optimizer step, and remember; keep where the step began if the next one looks back at it."""
        groups = self.param_groups
        looks_back &= MODES[self._mode].measure is None and self._rule.is_probe_due(state)
        kept = self._keep(state.lr, left) if looks_back else None
        if self._rates.stand(groups, state.lr):
            rates = self._rates.shares(groups, state.lr)
            self.step_base()
        else:
            rates = self._rates_in_force(state.lr)
            with self._rates.in_force(groups, rates):
                self.step_base()
        if kept is not None:
            kept.arrive()
        self._kept = kept
        self._remember(state, rates)

    def _keep(self, lr: float, left: KeptPoint | None) -> KeptPoint | None:
        """Where the parameters are, to look back at when they have made a step at α; None if they make none."""
        taken = lr * self._rates.factor(self.param_groups)
        if not taken > 0.0:
            return None
        return KeptPoint(list(chain(*self._moving())), taken, last=left, on_host=self.offload_copies)

    def _rates_in_force(self, lr: float) -> list[float]:
        """Each group's learning rate when α is ``lr``, the scheduler's factor included."""
        groups = self.param_groups
        return [
            share * factor
            for share, factor in zip(self._rates.shares(groups, lr), self._rates.factors(groups), strict=True)
        ]

    def _pending(self) -> KeptPoint | None:
        """The point where the last step began, for a probe that is due, if there is one."""
        if self._kept is not None and not self._kept.is_of(list(chain(*self._unfrozen()))):
            self._kept = None
        if self._kept is None:
            self._warn_of_missed_probe()
        else:
            self._missed = 0
        return self._kept

    def _drop_stale(self) -> None:
        """Keep no point that parameters have left since by another hand: in a copy nothing would tell."""
        if self._kept is not None and not self._kept.is_intact():
            self._kept = None

    def _moving(self) -> list[list[Tensor]]:
        """The parameters that a step can change, of each group that is not frozen."""
        return [movable(parameters) for parameters in self._unfrozen()]

    def _unfrozen(self) -> list[list[Tensor]]:
        """The parameters of each group that is not frozen."""
        is_moving = [ratio > 0.0 for ratio in self._rates.shares(self.param_groups, 1.0)]
        return [group["params"] for group in compress(self.param_groups, is_moving)]

    def _contents(self) -> dict[str, Any]:
        """The base optimizer's state dictionary, and a copy of the parameters where one is pending."""
        self._drop_stale()
        contents = super()._contents()
        return contents if self._kept is None else {**contents, _KEPT: self._kept.state_dict()}

    def _after_loading(self, state_dict: dict[str, Any]) -> None:
        self.last_probe = None
        self._recall()
        kept = state_dict.get(_KEPT) if MODES[self._mode].measure is None else None
        parameters = list(chain(*self._moving()))
        self._kept = None if kept is None else KeptPoint.load(parameters, kept, on_host=self.offload_copies)

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles keep; not the records and their hooks, and of schedulers they know nothing."""
        self._drop_stale()
        dropped = ("_rates", "last_probe", "_probe_hooks", "_missed", "_by_hand", "_last_by_hand", "_seen")
        return {name: value for name, value in super().__getstate__().items() if name not in dropped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore what was kept, and set up the rest."""
        super().__setstate__(state)
        if "_rates" not in self.__dict__:
            self._rates = LearningRates(self, self.base_optim)
            self._be_silent()
