"""Finding the modules that a closure calls."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

from gen_optim import GeNOptimizer
from gen_optim.closures import session
from gen_optim.closures.modules import check_modules, live_modules, owners_of, with_children
from gen_optim.closures.session import ClosureCaller
from tests.closures.probes import parameters_of
from tests.training import mlp


class Trainee(nn.Module):
    """A module above the model, as trainers have it."""

    def __init__(self) -> None:
        super().__init__()
        self.network = mlp(norm=True)
        self.register_buffer("steps", torch.zeros(()))


def test_owners_are_found_up_to_the_top_and_no_others() -> None:
    model, stranger = Trainee(), mlp()
    found = owners_of([model.network[0].weight])
    assert set(found) == {model, model.network, model.network[0]}
    assert stranger not in found


def test_all_below_the_owners_and_the_named_modules_are_known() -> None:
    model, critic = Trainee(), mlp(seed=1)
    caller = ClosureCaller([critic])
    assert set(caller.owners(parameters_of(model))) == {*model.modules(), *critic.modules()}


def test_all_modules_alive_are_looked_through_once_per_set_of_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    walks = []

    def count(parameters: Any) -> list[nn.Module]:
        walks.append(len(parameters))
        return owners_of(parameters)

    monkeypatch.setattr(session, "owners_of", count)
    model, critic = mlp(), mlp(seed=1)
    caller = ClosureCaller()
    for _ in range(3):
        caller.owners(parameters_of(model))
    assert walks == [4]
    caller.owners(parameters_of(model, critic))
    assert walks == [4, 8]


def test_they_are_not_looked_through_for_parameters_that_named_modules_own(monkeypatch: pytest.MonkeyPatch) -> None:
    walks = []
    monkeypatch.setattr(session, "owners_of", lambda parameters: walks.append(len(parameters)) or [])
    model, critic = mlp(), mlp(seed=1)
    assert set(ClosureCaller([critic, model]).owners(parameters_of(model))) == {*model.modules(), *critic.modules()}
    assert walks == []
    ClosureCaller([model[0]]).owners(parameters_of(model))
    assert walks == [2]


def test_owners_are_not_kept_alive() -> None:
    model = Trainee()
    parameters, caller = parameters_of(model), ClosureCaller()
    caller.owners(parameters)
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None
    assert caller.owners(parameters) == []


def test_a_module_that_is_not_ready_is_passed_over() -> None:
    unready = nn.Linear.__new__(nn.Linear)
    assert unready not in live_modules()


def test_modules_that_contain_each_other_are_listed_once() -> None:
    one, other = nn.Module(), nn.Module()
    one.other, other.parts = other, nn.ModuleList([one])
    assert sorted(map(id, with_children([other, one]))) == sorted(map(id, (one, other, other.parts)))


def test_a_class_may_override_what_lists_its_parts() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 1)

        def named_parameters(self) -> Any:  # type: ignore[override]
            raise NotImplementedError

        named_children = named_modules = named_buffers = named_parameters

    odd = Odd()
    assert set(ClosureCaller().owners([odd.inner.weight])) == {odd, odd.inner}


def test_with_several_processes_what_is_above_a_named_module_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be a DistributedDataParallel, by which the ranks are coupled."""
    model = Trainee()
    caller = ClosureCaller([model.network])
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert model in caller.owners(parameters_of(model))


# --- the option ------------------------------------------------------------------------------------------------------


def test_one_module_or_several_may_be_named() -> None:
    one, other = mlp(), mlp()
    assert check_modules(one) == (one,)  # a Sequential can be iterated over, but is one
    assert check_modules([one, other]) == check_modules(iter((one, other))) == (one, other)
    assert check_modules(()) == ()
    assert GeNOptimizer(SGD(one.parameters()), modules=other).modules == (other,)


@pytest.mark.parametrize(
    ("modules", "came"),
    [
        (None, "NoneType"),
        ("model", "str"),
        (3, "int"),
        ({"model": nn.Linear(1, 1)}, "dict"),
        ([nn.Linear(1, 1), nn.Linear], "contains a class, Linear"),
        ([torch.ones(1)], "contains Tensor"),
        (nn.Linear(1, 1).parameters(), "contains Parameter"),
    ],
)
def test_anything_else_is_a_type_error_that_names_the_argument(modules: Any, came: str) -> None:
    with pytest.raises(TypeError, match=f"modules must be a torch.nn.Module or a sequence of them, got .*{came}"):
        GeNOptimizer(SGD(mlp().parameters()), modules=modules)


def test_copies_keep_the_modules() -> None:
    model, critic = mlp(), mlp(seed=1)
    optimizer = GeNOptimizer(SGD(model.parameters()), modules=critic)
    twin_critic, twin = copy.deepcopy((critic, optimizer))
    assert twin.modules == (twin_critic,)
    [loaded] = pickle.loads(pickle.dumps(optimizer)).modules
    assert torch.equal(loaded[0].weight, critic[0].weight)
