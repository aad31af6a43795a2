import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn, optim
from torch.optim import Optimizer
from torch.optim.optimizer import (
    _global_optimizer_post_hooks,
    _global_optimizer_pre_hooks,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from gen_optim.wrapper import OptimizerWrapper, without_global_hooks


class Stepping(OptimizerWrapper):
    """The least that a wrapper has to add."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.step_base()


def parameters(size: int = 3) -> list[nn.Parameter]:
    weights = [nn.Parameter(torch.ones(size)), nn.Parameter(torch.ones(size, size))]
    for weight in weights:
        weight.grad = torch.full_like(weight, 0.5)
    return weights


def wrapped(**options: Any) -> Stepping:
    return Stepping(optim.AdamW(parameters(), **options))


def assert_equal_states(one: Optimizer, other: Optimizer) -> None:
    left, right = one.state_dict(), other.state_dict()
    assert left["param_groups"] == right["param_groups"]
    assert left["state"].keys() == right["state"].keys()
    for index, values in left["state"].items():
        assert values.keys() == right["state"][index].keys()
        for name, value in values.items():
            assert torch.equal(value, right["state"][index][name])


# --- what is shared --------------------------------------------------------------------------------------------------


def assert_shares_all(optimizer: OptimizerWrapper) -> None:
    assert optimizer.param_groups is optimizer.base_optim.param_groups
    assert optimizer.state is optimizer.base_optim.state
    assert optimizer.defaults is optimizer.base_optim.defaults
    assert not {"param_groups", "state", "defaults"} & vars(optimizer).keys()


def test_wrapper_is_an_optimizer_that_shares_groups_state_and_defaults() -> None:
    optimizer = wrapped()
    assert isinstance(optimizer, Optimizer)
    assert_shares_all(optimizer)


def test_wrapping_changes_nothing_in_the_base() -> None:
    base, twin = optim.AdamW(parameters()), optim.AdamW(parameters())
    Stepping(base)
    assert base.defaults == twin.defaults
    assert_equal_states(base, twin)


def test_what_is_written_through_the_wrapper_is_the_bases() -> None:
    optimizer = wrapped()
    optimizer.param_groups[0]["lr"] = 0.25
    assert optimizer.base_optim.param_groups[0]["lr"] == 0.25
    groups = [dict(optimizer.param_groups[0])]
    optimizer.param_groups = groups
    assert optimizer.base_optim.param_groups is groups
    assert_shares_all(optimizer)


def test_group_added_to_either_is_in_both() -> None:
    optimizer = wrapped()
    optimizer.add_param_group({"params": parameters(), "lr": 0.5})
    optimizer.base_optim.add_param_group({"params": parameters()})
    assert len(optimizer.param_groups) == len(optimizer.base_optim.param_groups) == 3
    assert_shares_all(optimizer)


def test_step_of_the_base_goes_through_once() -> None:
    optimizer, bare = wrapped(), optim.AdamW(parameters())
    for _ in range(3):
        optimizer.step()
        bare.step()
    for ours, theirs in zip(optimizer.param_groups[0]["params"], bare.param_groups[0]["params"], strict=True):
        assert torch.equal(ours, theirs)
    assert_equal_states(optimizer, bare)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_are_zeroed_as_the_base_does(set_to_none: bool) -> None:
    optimizer = wrapped()
    optimizer.zero_grad(set_to_none=set_to_none)
    for parameter in optimizer.param_groups[0]["params"]:
        assert parameter.grad is None if set_to_none else not parameter.grad.any()


def test_zero_grad_of_a_base_whose_own_takes_no_argument_is_called() -> None:
    class Zeroing(torch.optim.SGD):
        def zero_grad(self) -> None:
            super().zero_grad()

    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    Stepping(Zeroing([weight], lr=0.1)).zero_grad()
    assert weight.grad is None


def test_zero_grad_of_a_base_that_has_its_own_is_called() -> None:
    calls = []

    class Own(optim.SGD):
        def zero_grad(self, set_to_none: bool = True) -> None:
            calls.append(set_to_none)

    optimizer = Stepping(Own(parameters(), lr=0.1))
    optimizer.zero_grad(set_to_none=False)
    optimizer.zero_grad()
    assert calls == [False, True]


def test_scheduler_attaches_to_the_wrapper() -> None:
    optimizer = wrapped(lr=1.0)
    scheduler = optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    optimizer.step()
    scheduler.step()
    assert optimizer.base_optim.param_groups[0]["lr"] == 0.5


# --- hooks -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def global_calls() -> Iterator[list[Optimizer]]:
    calls: list[Optimizer] = []
    handles = [
        register_optimizer_step_pre_hook(lambda optimizer, *_: calls.append(optimizer)),
        register_optimizer_step_post_hook(lambda optimizer, *_: calls.append(optimizer)),
    ]
    yield calls
    for handle in handles:
        handle.remove()


def test_global_step_hooks_fire_once_and_for_the_wrapper(global_calls: list[Optimizer]) -> None:
    optimizer = wrapped()
    optimizer.step()
    assert len(global_calls) == 2  # before and after
    assert all(each is optimizer for each in global_calls)


def test_global_step_hooks_fire_for_other_optimizers_as_before(global_calls: list[Optimizer]) -> None:
    wrapped().step()
    global_calls.clear()
    other = optim.SGD(parameters(), lr=0.1)
    other.step()
    assert global_calls == [other, other]


def test_global_hooks_are_back_after_a_step_that_raises(global_calls: list[Optimizer]) -> None:
    class Failing(optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            raise RuntimeError("stop")

    tables = dict(_global_optimizer_pre_hooks), dict(_global_optimizer_post_hooks)
    with pytest.raises(RuntimeError, match="stop"):
        Stepping(Failing(parameters(), lr=0.1)).step()
    assert (dict(_global_optimizer_pre_hooks), dict(_global_optimizer_post_hooks)) == tables


def test_global_hooks_keep_their_order_and_can_be_removed_after_being_held_still() -> None:
    order: list[str] = []
    first = register_optimizer_step_pre_hook(lambda *_: order.append("first"))
    second = register_optimizer_step_pre_hook(lambda *_: order.append("second"))
    with without_global_hooks():
        assert not _global_optimizer_pre_hooks
    optimizer = wrapped()
    optimizer.step()
    assert order == ["first", "second"]
    first.remove()
    second.remove()
    optimizer.step()
    assert order == ["first", "second"]


def note(calls: list[str], words: str) -> Callable[..., None]:
    return lambda *_: calls.append(words)


def test_a_profiler_sees_the_steps_of_wrapper_and_base() -> None:
    optimizer = wrapped()
    optimizer.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        optimizer.step()
    names = [event.name for event in profiler.events() if event.name.startswith("Optimizer.step")]
    assert sorted(names) == ["Optimizer.step#AdamW.step", "Optimizer.step#Stepping.step"]


def test_step_hooks_of_wrapper_and_base_fire_once_each() -> None:
    optimizer = wrapped()
    calls: list[str] = []
    for name, each in (("wrapper", optimizer), ("base", optimizer.base_optim)):
        each.register_step_pre_hook(note(calls, f"before {name}"))
        each.register_step_post_hook(note(calls, f"after {name}"))
    optimizer.step()
    assert calls == ["before wrapper", "before base", "after base", "after wrapper"]


def test_state_dict_hooks_of_wrapper_and_base_fire_once_each() -> None:
    optimizer = wrapped()
    calls: list[str] = []
    for name, each in (("wrapper", optimizer), ("base", optimizer.base_optim)):
        each.register_state_dict_pre_hook(note(calls, f"before {name}"))
        each.register_state_dict_post_hook(note(calls, f"after {name}"))
    optimizer.state_dict()
    assert calls == ["before wrapper", "before base", "after base", "after wrapper"]


def test_load_state_dict_hooks_of_wrapper_and_base_fire_once_each() -> None:
    optimizer = wrapped()
    calls: list[str] = []
    for name, each in (("wrapper", optimizer), ("base", optimizer.base_optim)):
        each.register_load_state_dict_pre_hook(note(calls, f"before {name}"))
        each.register_load_state_dict_post_hook(note(calls, f"after {name}"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["before wrapper", "before base", "after base", "after wrapper"]


def test_state_dict_hooks_may_replace_what_is_saved_and_loaded() -> None:
    optimizer = wrapped(lr=0.5)
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "note": "saved"})
    saved = optimizer.state_dict()
    assert saved["note"] == "saved"

    def halve(_: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        groups = [{**group, "lr": group["lr"] / 2} for group in state["param_groups"]]
        return {**state, "param_groups": groups}

    optimizer.register_load_state_dict_pre_hook(halve)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert saved["param_groups"][0]["lr"] == 0.5


# --- checkpoints -----------------------------------------------------------------------------------------------------


def test_state_dict_is_the_bases() -> None:
    optimizer = wrapped()
    optimizer.step()
    assert_equal_states(optimizer, optimizer.base_optim)


def test_checkpoint_of_the_wrapper_and_of_the_base_load_into_each_other() -> None:
    optimizer = wrapped()
    optimizer.step()
    bare = optim.AdamW(parameters())
    bare.load_state_dict(optimizer.state_dict())
    other = wrapped()
    other.load_state_dict(bare.state_dict())
    assert_equal_states(optimizer, other)
    assert_shares_all(other)


def test_checkpoint_survives_a_weights_only_file() -> None:
    optimizer, other = wrapped(), wrapped()
    optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert_equal_states(optimizer, other)


def test_what_is_loaded_is_shared_with_nobody() -> None:
    optimizer, other = wrapped(), wrapped()
    optimizer.step()
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved)
    other.load_state_dict(saved)
    other.step()
    other.param_groups[0]["lr"] = 99.0
    assert saved["param_groups"] == kept["param_groups"]
    for index, values in saved["state"].items():
        for name, value in values.items():
            assert torch.equal(value, kept["state"][index][name])


def test_state_dict_with_other_groups_is_refused_and_changes_nothing() -> None:
    optimizer = wrapped(lr=0.5)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    other = Stepping(optim.AdamW([{"params": [each]} for each in parameters()]))
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict(other.state_dict())
    assert optimizer.state_dict()["param_groups"] == before["param_groups"]
    assert_shares_all(optimizer)


def test_hook_that_edits_what_is_loaded_leaves_the_checkpoint_alone() -> None:
    optimizer = wrapped()
    saved = optimizer.state_dict() | {"extra": 1}
    optimizer.register_load_state_dict_pre_hook(lambda _, state: state.pop("extra") and None)
    optimizer.load_state_dict(saved)
    assert saved["extra"] == 1


# --- copies and pickles ----------------------------------------------------------------------------------------------


def copied(optimizer: Stepping) -> Stepping:
    return copy.deepcopy(optimizer)


def pickled(optimizer: Stepping) -> Stepping:
    loaded = pickle.loads(pickle.dumps(optimizer))
    assert isinstance(loaded, Stepping)
    return loaded


@pytest.mark.parametrize("duplicate", [copied, pickled])
def test_duplicate_has_the_same_state_and_shares_it_with_its_own_base_alone(duplicate: Any) -> None:
    optimizer = wrapped(lr=0.5)
    optimizer.step()
    twin = duplicate(optimizer)
    assert type(twin.base_optim) is optim.AdamW
    assert_equal_states(optimizer, twin)
    assert_shares_all(twin)
    assert twin.base_optim is not optimizer.base_optim
    assert twin.param_groups is not optimizer.param_groups


@pytest.mark.parametrize("duplicate", [copied, pickled])
def test_duplicate_goes_on_training_by_itself(duplicate: Any) -> None:
    optimizer = wrapped()
    optimizer.step()
    twin = duplicate(optimizer)
    before = [parameter.detach().clone() for parameter in optimizer.param_groups[0]["params"]]
    for parameter in twin.param_groups[0]["params"]:
        parameter.grad = torch.full_like(parameter, 0.5)
    twin.step()
    for parameter, kept in zip(optimizer.param_groups[0]["params"], before, strict=True):
        assert torch.equal(parameter, kept)
    optimizer.step()
    for ours, theirs in zip(optimizer.param_groups[0]["params"], twin.param_groups[0]["params"], strict=True):
        assert torch.equal(ours, theirs)
    assert_equal_states(optimizer, twin)


@pytest.mark.parametrize("duplicate", [copied, pickled])
def test_duplicate_of_an_optimizer_under_a_scheduler_steps_itself(duplicate: Any) -> None:
    optimizer = wrapped()
    scheduler = optim.lr_scheduler.StepLR(optimizer, step_size=1)
    twin = duplicate(optimizer)
    del scheduler, optimizer  # what the scheduler attached knows the original by a weak reference
    for parameter in twin.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    twin.step()
    assert all(twin.state[parameter]["step"] == 1 for parameter in twin.param_groups[0]["params"])


@pytest.mark.parametrize("duplicate", [copied, pickled])
def test_duplicate_has_hooks_of_its_own(duplicate: Any) -> None:
    optimizer = wrapped()
    calls: list[str] = []
    optimizer.register_step_pre_hook(_no_hook)
    twin = duplicate(optimizer)
    assert not twin._optimizer_step_pre_hooks
    twin.register_step_pre_hook(lambda *_: calls.append("twin"))
    optimizer.step()
    assert calls == []
    twin.step()
    assert calls == ["twin"]


def _no_hook(*_: Any) -> None:
    pass


def test_copy_of_an_optimizer_with_its_model_trains_the_copied_model() -> None:
    model = nn.Linear(3, 1)
    optimizer = Stepping(optim.SGD(model.parameters(), lr=0.1))
    twin_model, twin = copy.deepcopy((model, optimizer))
    assert twin.param_groups[0]["params"][0] is twin_model.weight


def test_stock_set_state_reaches_the_base() -> None:
    """Contract: ``Optimizer.__setstate__`` writes ``__dict__``, which the shared properties must not be hidden by."""
    optimizer, source = wrapped(), wrapped(lr=0.125)
    source.step()
    optimizer.__setstate__({"state": source.state, "param_groups": source.param_groups})
    assert optimizer.base_optim.param_groups is source.param_groups
    assert optimizer.base_optim.state is source.state
    assert_shares_all(optimizer)
