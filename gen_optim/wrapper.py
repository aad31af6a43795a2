"""An optimizer that shares everything with the one it wraps."""

from __future__ import annotations

import copy
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def _shared(name: str) -> Any:
    """Return a property that is an attribute of the base optimizer, which may be given another at any time."""

    def write(self: OptimizerWrapper, value: Any) -> None:
        setattr(self.base_optim, name, value)

    return property(attrgetter(f"base_optim.{name}"), write, doc=f"The ``{name}`` of the base optimizer.")


class OptimizerWrapper(Optimizer):
    """Wraps an optimizer in another with the same groups, state and defaults, and hooks of its own.

    A subclass that remembers something between steps overrides the first methods under *checkpoints*. Hooks registered
    on the base optimizer call them, so that ``base_optim.state_dict()`` and ``base_optim.load_state_dict()`` include
    what is remembered, too.

    Both optimizers are optimizers to torch: its global hooks (``register_optimizer_step_pre_hook``,
    ``register_optimizer_step_post_hook``) and the profiler see two steps, the base optimizer's inside the wrapper's.
    """

    base_optim: Optimizer
    param_groups: list[dict[str, Any]] = _shared("param_groups")
    state: defaultdict[Tensor, Any] = _shared("state")
    defaults: dict[str, Any] = _shared("defaults")

    def __init__(self, base_optim: Optimizer) -> None:
        # Not the parent's __init__, which would empty the shared groups. Its __setstate__ sets up the rest: hooks, and
        # a step that calls them.
        self.__setstate__({"base_optim": base_optim})

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of all parameters, as the base optimizer does."""
        if set_to_none:
            self.base_optim.zero_grad()  # some optimizers' takes no argument
        else:
            self.base_optim.zero_grad(set_to_none=False)

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def _save_numbers(self) -> None:
        """Write what is remembered to ``param_groups``; called before a state dictionary is made."""

    def _load_numbers(self) -> None:
        """Read what is remembered from ``param_groups`` and ``state``; called after a state dictionary was loaded."""

    def _add_tensors(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return a state dictionary with what is remembered of each parameter added to its state."""
        return state_dict

    def _take_tensors(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return a state dictionary without that, and keep it for :meth:`_load_numbers`."""
        return state_dict

    def _set_aside(self) -> Any:
        """Return what is remembered and not in the groups; called before a state dictionary is loaded."""

    def _put_back(self, kept: Any) -> None:
        """Put back what was set aside; called if loading has failed and groups and state are as before."""
        self._load_numbers()

    def _check_numbers(self, state_dict: Mapping[str, Any]) -> None:
        """Check what :meth:`_load_numbers` will read; called before anything is loaded."""

    def _add_to_base(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Add to a state dictionary that the base optimizer is making."""
        self._is_added = True
        return self._add_tensors(state_dict)

    def state_dict(self) -> dict[str, Any]:
        """Return the base optimizer's state dictionary, and what the wrapper adds to it."""
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        self._is_added = False
        state_dict = self.base_optim.state_dict()
        if not self._is_added:  # it has no hooks, or a state_dict() of its own that calls none
            self._save_numbers()
            state_dict = self._add_tensors(self.base_optim.state_dict())
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            changed = post_hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dictionary of the wrapper or of the base optimizer, without sharing anything with it.

        Everything is checked before anything is written. If loading fails nevertheless, groups and state are put back.

        Raises:
            ValueError: If the groups do not match this optimizer's, lack options of theirs, or carry impossible
                numbers.
        """
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        self._check_loaded(state_dict)
        self._save_numbers()
        state, groups, kept = self.state, self.param_groups, self._set_aside()
        try:
            # torch's own loading keeps the tensors it is given, and two optimizers would go on writing into one state.
            with torch.inference_mode(mode=False):  # else steps could not write to the copies
                state_dict = copy.deepcopy(state_dict)
                if self._is_hooked:
                    self.base_optim.load_state_dict(state_dict)
                else:
                    self.base_optim.load_state_dict(self._take_tensors(state_dict))
                    self._load_numbers()
        except BaseException:
            self.state, self.param_groups = state, groups
            self._put_back(kept)
            raise
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _check_loaded(self, state_dict: Mapping[str, Any]) -> None:
        """Check that a state dictionary can be loaded, without changing anything."""
        if missing := [key for key in ("state", "param_groups") if key not in state_dict]:
            raise ValueError(f"the state dict must have the keys 'state' and 'param_groups', but lacks {missing}")
        loaded = state_dict["param_groups"]
        if len(loaded) != len(self.param_groups):
            raise ValueError(
                "the state dict has a different number of parameter groups: expected "
                f"{len(self.param_groups)}, got {len(loaded)}"
            )
        completed = self._completed(loaded)
        for index, (group, own, whole) in enumerate(zip(loaded, self.param_groups, completed, strict=True)):
            if len(group.get("params", ())) != len(own["params"]):
                raise ValueError(
                    f"param_groups[{index}] of the state dict doesn't match the size of the optimizer's: expected "
                    f"{len(own['params'])} parameters, got {len(group.get('params', ()))}"
                )
            if missing := [key for key in self.defaults if key in own and key not in whole]:
                raise ValueError(f"param_groups[{index}] of the state dict must have the optimizer's options {missing}")
        self._check_numbers(state_dict)

    def _completed(self, loaded: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return loaded groups with the options that the base optimizer adds to those of older versions."""
        groups = [dict(group) for group in loaded]
        stand_in: Optimizer = object.__new__(type(self.base_optim))
        stand_in.__dict__.update(self.base_optim.__dict__)
        stand_in.__setstate__({"state": defaultdict(dict), "param_groups": groups})
        return groups

    # --- copies and pickles -------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles keep: as in torch not the hooks, nor the ``step`` that schedulers attach."""
        self._save_numbers()
        return {
            name: value
            for name, value in self.__dict__.items()
            if name != "step" and not (name.startswith("_optimizer_") and name.endswith("_hooks"))
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore what was kept; what is shared goes to the base optimizer, as torch would write it to ``__dict__``."""
        shared = {"state", "param_groups", "defaults"} & set(state)
        super().__setstate__({name: value for name, value in state.items() if name not in shared})
        for name in shared:
            setattr(self, name, state[name])
        if "base_optim" in state:
            self._register_hooks()
        elif "param_groups" in state:  # torch's own load_state_dict, called unbound
            self._load_numbers()

    def _register_hooks(self) -> None:
        """Have the base optimizer's checkpoints include what is remembered."""
        base = self.base_optim
        try:
            base.register_state_dict_pre_hook(_Relay(self, "_save_numbers"))
            base.register_state_dict_post_hook(_Relay(self, "_add_to_base"))
            base.register_load_state_dict_pre_hook(_Relay(self, "_check_loaded"))
            base.register_load_state_dict_pre_hook(_Relay(self, "_take_tensors"))
            base.register_load_state_dict_post_hook(_Relay(self, "_load_numbers"))
            self._is_hooked = True
        except AttributeError:
            # An optimizer that skips its parent's set-up has no hooks; its checkpoints go through this wrapper.
            self._is_hooked = False


class _Relay:
    """A hook that calls a method of a wrapper. It does not keep the wrapper alive, and its copies do nothing."""

    def __init__(self, wrapper: OptimizerWrapper | None, name: str) -> None:
        self._wrapper = None if wrapper is None else weakref.ref(wrapper)
        self._name = name

    def __call__(self, _: Optimizer, *args: Any) -> Any:
        wrapper = None if self._wrapper is None else self._wrapper()
        return None if wrapper is None else getattr(wrapper, self._name)(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Relay, (None, self._name)


def take_entry(state_dict: Mapping[str, Any], key: str) -> tuple[dict[str, Any], dict[int, Any]]:
    """Return a state dictionary without an entry of the parameters' states, and these entries by position.

    The state dictionary given is not changed. Its parameters may have names instead of numbers.
    """
    states, taken = dict(state_dict["state"]), {}
    for position, name in enumerate(chain.from_iterable(group["params"] for group in state_dict["param_groups"])):
        if key in (state := states.get(name, {})):
            taken[position] = state[key]
            states[name] = {other: value for other, value in state.items() if other != key}
            if not states[name]:
                del states[name]
    return {**state_dict, "state": states}, taken


def copy_optimizer(optimizer: Optimizer, memo: dict[int, Any]) -> Optimizer:
    """Copy an optimizer with all its attributes, and the optimizers that it holds, without hooks.

    ``copy.deepcopy`` keeps state, groups and defaults only, and drops what else a class has. ``memo`` has the copies
    that exist already by the id of the original, mostly parameters.
    """
    twin: Optimizer = object.__new__(type(optimizer))
    memo[id(optimizer)] = twin
    for value in vars(optimizer).values():
        for inner in value if isinstance(value, list | tuple) else [value]:
            if isinstance(inner, Optimizer) and id(inner) not in memo:
                copy_optimizer(inner, memo)
    for name, value in vars(optimizer).items():
        if name.startswith("_optimizer_"):
            twin.__dict__[name] = OrderedDict()
        elif name != "step":  # a scheduler's, which counts
            twin.__dict__[name] = copy.deepcopy(value, memo)
    return twin


def step_without_hooks(optimizer: Optimizer) -> None:
    """Step an optimizer without calling hooks or the profiler, torch's global hooks included."""
    step = type(optimizer).step
    # torch wraps ``step`` in what calls them, and marks the result.
    (step.__wrapped__ if getattr(step, "hooked", False) else step)(optimizer)  # type: ignore[attr-defined]
