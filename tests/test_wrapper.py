import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn, optim
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from gen_optim.closures.interception import postponed_step_hooks
from gen_optim.tensors.interrupts import Unfinished
from gen_optim.wrapper import OptimizerWrapper, step_without_hooks


class Stepping(OptimizerWrapper):
    """The least that a wrapper has to add."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.base_optim.step()


class Counting(Stepping):
    """Remembers one number between steps, in an attribute; checkpoints carry it in the first group."""

    def __init__(self, base_optim: Optimizer) -> None:
        super().__init__(base_optim)
        self.count = 0
        self._save_numbers()

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        self.count += 1

    def _save_numbers(self) -> None:
        self.param_groups[0]["count"] = self.count

    def _load_numbers(self) -> None:
        self.count = self.param_groups[0].get("count", 0)

    def _check_numbers(self, state_dict: Any) -> None:
        if state_dict["param_groups"][0].get("count", 0) < 0:
            raise ValueError("negative count")


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


def test_global_step_hooks_fire_for_the_wrapper_and_for_the_base(global_calls: list[Optimizer]) -> None:
    optimizer = wrapped()
    optimizer.step()
    assert global_calls == [optimizer, optimizer.base_optim, optimizer.base_optim, optimizer]


def test_step_without_hooks_calls_none(global_calls: list[Optimizer]) -> None:
    optimizer, bare = optim.AdamW(parameters()), optim.AdamW(parameters())
    optimizer.register_step_post_hook(lambda *_: pytest.fail("called"))
    for _ in range(3):
        step_without_hooks(optimizer)
    assert global_calls == []
    for _ in range(3):
        bare.step()
    assert_equal_states(optimizer, bare)


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


def test_post_hooks_of_a_proposed_step_are_called_when_it_has_been_taken() -> None:
    optimizer = wrapped()
    calls: list[str] = []
    optimizer.base_optim.register_step_pre_hook(note(calls, "before"))
    optimizer.base_optim.register_step_post_hook(note(calls, "after"))
    with postponed_step_hooks(optimizer.base_optim, Unfinished()) as call_hooks:
        optimizer.base_optim.step()
    assert calls == ["before"]
    call_hooks()
    assert calls == ["before", "after"]
    optimizer.step()
    assert calls == ["before", "after"] * 2


def test_post_hooks_are_back_after_a_proposed_step_that_raises() -> None:
    class Failing(optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            raise RuntimeError("stop")

    optimizer = Stepping(Failing(parameters(), lr=0.1))
    optimizer.base_optim.register_step_post_hook(_no_hook)
    with pytest.raises(RuntimeError, match="stop"), postponed_step_hooks(optimizer.base_optim, Unfinished()):
        optimizer.base_optim.step()
    assert list(optimizer.base_optim._optimizer_step_post_hooks.values()) == [_no_hook]


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


class WithoutHooks(optim.SGD):
    """Has a ``state_dict`` of its own, which calls no hooks."""

    def state_dict(self) -> dict[str, Any]:
        groups = [{**each, "params": [0, 1]} for each in self.param_groups]
        return {"state": {}, "param_groups": groups}


@pytest.mark.parametrize("base", [optim.SGD, WithoutHooks])
def test_a_state_dict_collects_what_is_remembered_once(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = Counting(base(parameters(), lr=0.1))
    calls: list[str] = []
    for name in ("_save_numbers", "_add_tensors"):
        method = getattr(Counting, name)
        monkeypatch.setattr(
            Counting, name, lambda *args, name=name, method=method: (calls.append(name), method(*args))[1]
        )
    optimizer.state_dict()
    assert calls == ["_save_numbers", "_add_tensors"]


def test_a_base_whose_state_dict_calls_no_hooks_has_what_is_remembered() -> None:
    optimizer = Counting(WithoutHooks(parameters(), lr=0.1))
    optimizer.step(), optimizer.step()
    assert optimizer.state_dict()["param_groups"][0]["count"] == 2


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


def test_loading_shares_nothing_with_the_state_dict() -> None:
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


BROKEN: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no state": (lambda saved: saved.pop("state"), r"lacks \['state'\]"),
    "no groups": (lambda saved: saved.pop("param_groups"), r"lacks \['param_groups'\]"),
    "fewer parameters": (lambda saved: saved["param_groups"][0]["params"].pop(), "expected 2 parameters, got 1"),
    "no learning rate": (lambda saved: saved["param_groups"][0].pop("lr"), r"options \['lr'\]"),
    "no betas": (lambda saved: saved["param_groups"][0].pop("betas"), r"param_groups\[0\] .* options \['betas'\]"),
    "impossible number": (lambda saved: saved["param_groups"][0].update(count=-1), "negative count"),
}


@pytest.mark.parametrize("through", ["wrapper", "base"])
@pytest.mark.parametrize(("damage", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_state_dict_is_refused_before_anything_is_written(damage: Any, message: str, through: str) -> None:
    optimizer = Counting(optim.AdamW(parameters(), lr=0.5))
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.step()
    groups, state, before = optimizer.param_groups, optimizer.state, str(optimizer.state_dict())
    damage(saved)
    with pytest.raises(ValueError, match=message):
        (optimizer if through == "wrapper" else optimizer.base_optim).load_state_dict(saved)
    assert optimizer.param_groups is groups
    assert optimizer.state is state
    assert str(optimizer.state_dict()) == before
    assert optimizer.count == 2


def test_a_load_that_the_base_gives_up_in_the_middle_changes_nothing() -> None:
    class Demanding(optim.AdamW):
        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            super().load_state_dict(state_dict)
            if "extra" not in state_dict:
                raise KeyError("extra")

    optimizer = Counting(Demanding(parameters()))
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.step()
    before = str(optimizer.state_dict())
    with pytest.raises(KeyError, match="extra"):
        optimizer.load_state_dict(saved)
    assert str(optimizer.state_dict()) == before
    assert optimizer.count == 2


def test_a_checkpoint_of_an_older_version_whose_options_the_base_completes_is_loaded() -> None:
    optimizer = wrapped()
    saved = optimizer.state_dict()
    for key in ("maximize", "foreach", "capturable", "differentiable", "fused"):
        del saved["param_groups"][0][key]
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["maximize"] is False


# --- remembered numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [lambda o: o.state_dict(), lambda o: o.base_optim.state_dict()])
@pytest.mark.parametrize(
    "load",
    [
        lambda optimizer, saved: optimizer.load_state_dict(saved),
        lambda optimizer, saved: optimizer.base_optim.load_state_dict(saved),
        Optimizer.load_state_dict,
    ],
    ids=["wrapper", "base", "unbound"],
)
def test_numbers_are_in_checkpoints_of_wrapper_and_base(save: Any, load: Any) -> None:
    optimizer, other = (Counting(optim.AdamW(parameters())) for _ in range(2))
    for _ in range(3):
        optimizer.step()
    load(other, save(optimizer))
    assert other.count == 3


def test_numbers_are_kept_though_the_base_has_no_hooks() -> None:
    class Bare(optim.SGD):
        """Skips its parent's set-up, as wrappers around other optimizers do."""

        def __init__(self, params: list[nn.Parameter]) -> None:
            self.__dict__.update(vars(optim.SGD(params, lr=0.1)))
            for name in [name for name in vars(self) if name.endswith("_hooks")]:
                delattr(self, name)

        state_dict = lambda self: {"state": {}, "param_groups": [{**self.param_groups[0], "params": [0, 1]}]}  # noqa: E731

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.param_groups[0].update({**state_dict["param_groups"][0], "params": self.param_groups[0]["params"]})

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            pass

    optimizer, other = Counting(Bare(parameters())), Counting(Bare(parameters()))
    optimizer.step()
    with postponed_step_hooks(optimizer.base_optim, Unfinished()) as call_hooks:
        optimizer.base_optim.step()
    call_hooks()
    other.load_state_dict(optimizer.state_dict())
    assert other.count == 1


def test_hooks_on_the_base_do_not_keep_the_wrapper_alive() -> None:
    optimizer = Counting(optim.AdamW(parameters()))
    base, freed = optimizer.base_optim, weakref.ref(optimizer)
    optimizer.step()
    gc.collect()
    gc.disable()
    try:
        del optimizer
        assert freed() is None
    finally:
        gc.enable()
    base.load_state_dict(base.state_dict())


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


@pytest.mark.parametrize("duplicate", [copied, pickled])
def test_checkpoints_of_the_base_of_a_duplicate_carry_its_own_numbers(duplicate: Any) -> None:
    optimizer = Counting(optim.AdamW(parameters()))
    optimizer.step()
    twin = duplicate(optimizer)
    twin.step()
    assert twin.base_optim.state_dict()["param_groups"][0]["count"] == 2
    assert optimizer.base_optim.state_dict()["param_groups"][0]["count"] == 1
    optimizer.base_optim.load_state_dict(twin.base_optim.state_dict())
    assert (optimizer.count, twin.count) == (2, 2)


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
