"""An optimizer that shares everything with the one it wraps."""

from __future__ import annotations

import copy
import functools
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

__all__ = ["OptimizerWrapper", "without_global_hooks"]


class OptimizerWrapper(Optimizer):
    """A ``torch.optim.Optimizer`` around another: same groups, state and defaults, hooks of its own.

    Everything is read through the base optimizer each time, which may be loaded or given groups directly.

    Args:
        base_optim: The optimizer to wrap.
    """

    base_optim: Optimizer

    def __init__(self, base_optim: Optimizer) -> None:
        # Not the parent's __init__, which would empty the shared groups; what it sets up besides them, hooks and a
        # step that calls them, it also sets up after unpickling.
        super().__setstate__({"base_optim": base_optim})

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's parameter groups."""
        return self.base_optim.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.base_optim.param_groups = value

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """The base optimizer's state."""
        return self.base_optim.state

    @state.setter
    def state(self, value: defaultdict[Tensor, Any]) -> None:
        self.base_optim.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        """The base optimizer's defaults."""
        return self.base_optim.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.base_optim.defaults = value

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of all parameters, as the base optimizer does."""
        if set_to_none:
            self.base_optim.zero_grad()  # those of some optimizers take no argument
        else:
            self.base_optim.zero_grad(set_to_none=False)

    @staticmethod
    def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap ``step`` in hooks and the profiler's record, as torch asks; left out where nobody would see them.

        They take 10 µs, and the base optimizer's step has them too.
        """
        wrapped = Optimizer.profile_hook_step(func)
        uncompiled = torch._disable_dynamo(func)  # type: ignore[attr-defined]  # imports the compiler when called

        @functools.wraps(func)
        def step(self: OptimizerWrapper, *args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_dynamo_compiling():
                return uncompiled(self, *args, **kwargs)
            is_seen = (
                torch.autograd.profiler._is_profiler_enabled
                or self._optimizer_step_pre_hooks
                or self._optimizer_step_post_hooks
                or _global_optimizer_pre_hooks
                or _global_optimizer_post_hooks
            )
            return (wrapped if is_seen else func)(self, *args, **kwargs)

        return step

    def step_base(self) -> None:
        """Step the base optimizer, once."""
        if _global_optimizer_pre_hooks or _global_optimizer_post_hooks:
            with without_global_hooks():
                self.base_optim.step()
        else:
            self.base_optim.step()

    def propose(self) -> None:
        """Step the base optimizer, once; :meth:`call_post_hooks` follows where the step proposed has been taken."""
        with _without(self._base_post_hooks):
            self.step_base()

    def call_post_hooks(self) -> None:
        """Call what the base optimizer calls after a step: hooks may write to the parameters or average them."""
        for hook in list(self._base_post_hooks.values()):
            hook(self.base_optim, (self.base_optim,), {})

    @property
    def _base_post_hooks(self) -> dict[int, Any]:
        """The base optimizer's hooks; wrappers around others that skip their parent's set-up have none."""
        return getattr(self.base_optim, "_optimizer_step_post_hooks", {})

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state dictionary, and what the wrapper adds to it."""
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state_dict = self._contents()
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            changed = post_hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dictionary of the wrapper's or of the base optimizer's; nothing of it is shared afterwards.

        Raises:
            ValueError: If its groups do not match this optimizer's.
        """
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        # torch's own loading keeps the tensors it is given, and two optimizers would go on writing into one state.
        self.base_optim.load_state_dict(copy.deepcopy(state_dict))
        self._after_loading(state_dict)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _contents(self) -> dict[str, Any]:
        """The state dictionary that the hooks of saving are handed."""
        return self.base_optim.state_dict()

    def _after_loading(self, state_dict: dict[str, Any]) -> None:
        """What a subclass has to take in before the hooks of loading run."""

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles keep: as in torch not the hooks, nor the ``step`` that schedulers attach."""
        return {
            name: value
            for name, value in self.__dict__.items()
            if name != "step" and not (name.startswith("_optimizer_") and name.endswith("_hooks"))
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore what was kept; what is shared goes to the base optimizer, since ``__dict__`` would hide it."""
        shared = ("state", "param_groups", "defaults")
        super().__setstate__({name: value for name, value in state.items() if name not in shared})
        for name in shared:
            if name in state:
                setattr(self, name, state[name])


def without_global_hooks() -> AbstractContextManager[None]:
    """Keep torch's global optimizer hooks still: they belong to the outer of two optimizers, once a step."""
    return _without(_global_optimizer_pre_hooks, _global_optimizer_post_hooks)


@contextmanager
def _without(*tables: dict[int, Any]) -> Iterator[None]:
    """Keep the hooks of some tables still."""
    kept = [dict(table) for table in tables]
    try:
        for table in tables:
            table.clear()
        yield
    finally:
        for table, hooks in zip(tables, kept, strict=True):
            table.update(hooks)
