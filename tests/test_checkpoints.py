"""Training resumed from any kind of checkpoint continues as if it had never stopped."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import SGD, AdamW, lr_scheduler

from gen_optim import GeNOptimizer, History, ProbeStatus, RelaxedRule
from tests.training import Training, gen_adamw, gen_sgd, looks_back_next, mlp, parameters_of, same

Resume = Callable[[Training], Training]


def through_torch_save(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def test_training_goes_on_after_loading_in_inference_mode() -> None:
    training, other = Training.of(gen_sgd), Training.of(gen_sgd)
    training.train(7), other.train(7)
    with torch.inference_mode():
        other.optimizer.load_state_dict(through_torch_save(training.optimizer.state_dict()))
    training.train(20), other.train(20)
    assert same(parameters_of(training.model), parameters_of(other.model))


def fresh_like(training: Training) -> Training:
    """The same script started anew: another initialisation, another learning rate."""
    model = mlp(seed=99)
    model.load_state_dict(through_torch_save(training.model.state_dict()))
    base = type(training.optimizer.base_optim)(model.parameters(), lr=0.77)
    if isinstance(base, SGD):
        base = SGD(model.parameters(), lr=0.77, momentum=training.optimizer.defaults["momentum"])
    # A bare base optimizer stands for itself in one test.
    mode = getattr(training.optimizer, "mode", "lookback")
    optimizer = GeNOptimizer(base, mode=mode, rule=RelaxedRule(burn_in=4, period=3))
    return Training(model, optimizer, training.inputs, training.targets)


def by_state_dict(training: Training) -> Training:
    resumed = fresh_like(training)
    resumed.optimizer.load_state_dict(through_torch_save(training.optimizer.state_dict()))
    return resumed


def by_stock_loading(training: Training) -> Training:
    """Frameworks may call the parent's method unbound."""
    resumed = fresh_like(training)
    state = copy.deepcopy(training.optimizer.state_dict())
    torch.optim.Optimizer.load_state_dict(resumed.optimizer, state)
    return resumed


def by_loading_the_base(training: Training) -> Training:
    resumed = fresh_like(training)
    resumed.optimizer.base_optim.load_state_dict(copy.deepcopy(training.optimizer.base_optim.state_dict()))
    return resumed


def by_deepcopy(training: Training) -> Training:
    model, optimizer = copy.deepcopy((training.model, training.optimizer))
    return Training(model, optimizer, training.inputs, training.targets)


def by_pickle(training: Training) -> Training:
    model, optimizer = pickle.loads(pickle.dumps((training.model, training.optimizer)))
    return Training(model, optimizer, training.inputs, training.targets)


def by_distributed_state_dict(training: Training, *, flatten: bool = False) -> Training:
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    saved = copy.deepcopy(get_optimizer_state_dict(training.model, training.optimizer, options=options))
    resumed = fresh_like(training)
    set_optimizer_state_dict(resumed.model, resumed.optimizer, saved, options=options)
    return resumed


def by_flat_distributed_state_dict(training: Training) -> Training:
    return by_distributed_state_dict(training, flatten=True)


RESUMES: list[Resume] = [
    by_state_dict,
    by_stock_loading,
    by_loading_the_base,
    by_deepcopy,
    by_pickle,
    by_distributed_state_dict,
    by_flat_distributed_state_dict,
]


@pytest.mark.parametrize("make", [gen_adamw, gen_sgd])
@pytest.mark.parametrize(
    ("resume", "mode"),
    [(resume, "approximate") for resume in RESUMES] + [(resume, "lookback") for resume in RESUMES],
)
@pytest.mark.parametrize("steps", [0, 1, 3, 5, 6])
def test_resuming_is_exact(resume: Resume, steps: int, make: Any, mode: str) -> None:
    training = Training.of(lambda parameters: make(parameters, mode=mode, burn_in=4, period=3))
    training.train(steps)
    resumed = resume(training)
    histories = History(), History()
    for each, history in zip((training, resumed), histories, strict=True):
        each.optimizer.register_probe_hook(history)
    if steps:  # before the first step there is nothing to remember but the learning rate given
        assert resumed.optimizer.get_last_lr() == training.optimizer.get_last_lr()
    expected = training.train(8)
    assert resumed.train(8) == expected
    assert same(parameters_of(resumed.model), parameters_of(training.model))
    assert histories[0].to_dicts() == histories[1].to_dicts() or steps == 0


@pytest.mark.parametrize("make", [gen_adamw, gen_sgd])
def test_resuming_from_a_state_dict_is_exact_after_every_step_looking_back(make: Any) -> None:
    training = Training.of(lambda parameters: make(parameters, mode="lookback", burn_in=4, period=3))
    runs = []
    for step in range(21):
        resumed = by_state_dict(training)
        assert looks_back_next(training.optimizer) == (training.optimizer._context.start_point is not None)
        runs.append((step, resumed, resumed.train(22 - step)))
        training.train(1)
    training.train(1)
    reference = runs[1][2]  # before the first step there is nothing to remember but the learning rate given
    for step, resumed, losses in runs[1:]:
        assert losses == reference[step - 1 :]
        assert same(parameters_of(resumed.model), parameters_of(training.model))


@pytest.mark.parametrize("make", [lambda p: SGD(p, lr=0.1), lambda p: SGD(p, lr=0.1, momentum=0.9), AdamW])
@pytest.mark.parametrize("steps", [1, 4, 5])
def test_a_checkpoint_has_the_same_keys_whether_the_last_step_is_looked_back_at_or_not(make: Any, steps: int) -> None:
    """Distributed checkpoints are read into what a fresh optimizer would save, key by key."""
    training = Training.of(lambda p: GeNOptimizer(make(p), rule=RelaxedRule(burn_in=4, period=3)))
    training.train(steps)
    saved = get_optimizer_state_dict(training.model, training.optimizer)
    fresh = fresh_like(training)
    expected = get_optimizer_state_dict(fresh.model, fresh.optimizer)
    assert {name: set(state) for name, state in saved["state"].items()} == {
        name: set(state) for name, state in expected["state"].items()
    }
    assert all("gen_start" in state for state in saved["state"].values())
    assert set(saved["param_groups"][0]) == set(expected["param_groups"][0])


def test_a_mode_that_looks_ahead_saves_no_start_points() -> None:
    training = Training.of(lambda p: gen_adamw(p, mode="approximate"))
    training.train(3)
    assert not any("gen_start" in state for state in training.optimizer.state_dict()["state"].values())


def test_the_keys_that_distributed_checkpoints_ask_for_leave_the_state_with_the_next_step() -> None:
    training = Training.of(gen_adamw)
    get_optimizer_state_dict(training.model, training.optimizer)
    assert all("gen_start" in state for state in training.optimizer.state.values())
    training.train(1)
    assert not any("gen_start" in state for state in training.optimizer.state.values())


def test_saving_does_not_change_training() -> None:
    trainings = [Training.of(lambda p: gen_sgd(p, mode="lookback", burn_in=4, period=3)) for _ in range(2)]
    for _ in range(12):
        for training in trainings:
            training.train(1)
        get_optimizer_state_dict(trainings[0].model, trainings[0].optimizer)
        through_torch_save(trainings[0].optimizer.state_dict())
        copy.deepcopy(trainings[0].optimizer)
        assert same(parameters_of(trainings[0].model), parameters_of(trainings[1].model))


def test_a_point_to_look_back_at_does_not_outlive_loading_another_checkpoint() -> None:
    training, other = (Training.of(lambda p: gen_adamw(p, mode="lookback")) for _ in range(2))
    training.train(5), other.train(3)
    saved = through_torch_save(other.optimizer.state_dict())
    saved["param_groups"][0]["gen_start_lr"] = 0.0
    training.optimizer.load_state_dict(saved)
    assert training.optimizer._context.start_point is None


def test_weights_written_after_loading_are_not_looked_back_at() -> None:
    training, other = (Training.of(lambda p: gen_sgd(p, mode="lookback")) for _ in range(2))
    training.train(20)
    other.model.load_state_dict(training.model.state_dict())
    other.optimizer.load_state_dict(through_torch_save(training.optimizer.state_dict()))
    with torch.no_grad():
        other.model[4].weight.fill_(2.0)  # a new head; the step before would be taken back, and it with it
    other.train(1)
    assert other.optimizer.last_probe is None
    assert other.model[4].weight.min() > 1.0
    other.train(1)
    assert other.optimizer.last_probe.step == 22


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda training: pickle.loads(pickle.dumps(training))])
def test_weights_written_in_a_copy_are_not_looked_back_at(duplicate: Any) -> None:
    training = Training.of(lambda p: gen_sgd(p, mode="lookback"))
    training.train(20)
    model, optimizer = duplicate((training.model, training.optimizer))
    twin = Training(model, optimizer, training.inputs, training.targets)
    with torch.no_grad():
        model[4].weight.fill_(2.0)
    twin.train(1)
    assert optimizer.last_probe is None
    assert model[4].weight.min() > 1.0


def test_a_point_that_parameters_have_left_by_another_hand_is_not_saved() -> None:
    training = Training.of(lambda p: gen_sgd(p, mode="lookback"))
    training.train(20)
    assert looks_back_next(training.optimizer)
    with torch.no_grad():
        training.model[4].weight.mul_(0.5)
    assert not looks_back_next(copy.deepcopy(training.optimizer))
    assert not looks_back_next(training.optimizer)


def test_hooks_of_loading_find_everything_loaded() -> None:
    training, other = (Training.of(lambda p: gen_adamw(p, mode="lookback")) for _ in range(2))
    training.train(5)
    saved = through_torch_save(training.optimizer.state_dict())
    found: list[bool] = []
    other.optimizer.register_load_state_dict_post_hook(
        lambda optimizer: found.append(optimizer._context.start_point is not None)
    )
    other.model.load_state_dict(training.model.state_dict())
    other.optimizer.load_state_dict(saved)
    assert found == [True]
    training.train(5), other.train(5)
    assert same(parameters_of(other.model), parameters_of(training.model))


def test_loading_forgets_the_last_probe_and_shares_nothing() -> None:
    training = Training.of(gen_adamw)
    training.train(3)
    saved = training.optimizer.state_dict()
    twin = fresh_like(training)
    twin.train(1)
    twin.optimizer.load_state_dict(saved)
    assert twin.optimizer.last_probe is None
    twin.train(2)
    for mine, theirs in zip(training.optimizer.state.values(), twin.optimizer.state.values(), strict=True):
        assert mine["exp_avg"].data_ptr() != theirs["exp_avg"].data_ptr()
    assert saved["param_groups"][0]["gen_step"] == 3


def test_with_a_scheduler() -> None:
    def make() -> tuple[Training, lr_scheduler.LRScheduler]:
        training = Training.of(lambda parameters: gen_adamw(parameters, burn_in=4, period=3))
        return training, lr_scheduler.CosineAnnealingLR(training.optimizer, 12)

    training, scheduler = make()
    training.train(5, scheduler)
    resumed, resumed_scheduler = make()
    resumed.model.load_state_dict(training.model.state_dict())
    resumed_scheduler.load_state_dict(through_torch_save(scheduler.state_dict()))
    resumed.optimizer.load_state_dict(through_torch_save(training.optimizer.state_dict()))
    assert training.train(6, scheduler) == resumed.train(6, resumed_scheduler)
    assert same(parameters_of(training.model), parameters_of(resumed.model))


def test_a_copy_of_an_optimizer_with_a_scheduler_steps_itself() -> None:
    training = Training.of(gen_adamw)
    scheduler = lr_scheduler.LinearLR(training.optimizer, 1.0, 0.0, 20)
    training.train(3, scheduler)
    model, optimizer, its_scheduler = copy.deepcopy((training.model, training.optimizer, scheduler))
    assert its_scheduler.optimizer is optimizer
    twin = Training(model, optimizer, training.inputs, training.targets)
    before = parameters_of(training.model)
    losses = twin.train(5, its_scheduler)
    assert same(parameters_of(training.model), before)
    assert training.train(5, scheduler) == losses


def test_copies_drop_closures_hooks_and_records() -> None:
    training = Training.of(gen_adamw)
    training.optimizer.closure = training.closure
    training.optimizer.register_probe_hook(History())
    training.optimizer.register_step_pre_hook(lambda *_: None)
    training.train(1)
    twin = copy.deepcopy(training.optimizer)
    assert (twin.closure, twin.probe, twin.last_probe) == (None, None, None)
    assert not twin._probe_hooks
    assert not twin._optimizer_step_pre_hooks
    assert twin.rule == training.optimizer.rule
    assert repr(twin.mode) == repr(training.optimizer.mode)
    assert twin.base_optim is not training.optimizer.base_optim


@pytest.mark.parametrize("resume", [by_state_dict, by_stock_loading])
def test_a_checkpoint_of_the_bare_base_optimizer_loads(resume: Resume) -> None:
    bare = Training.of(lambda parameters: AdamW(parameters, lr=0.01))
    bare.train(5)
    bare.optimizer.base_optim = bare.optimizer  # what fresh_like reads
    resumed = resume(bare)
    assert resumed.optimizer.param_groups[0]["lr"] == 0.01
    assert resumed.optimizer.get_last_lr() == [0.01]
    assert {int(state["step"]) for state in resumed.optimizer.state.values()} == {5}
    losses = resumed.train(30)
    assert losses[-1] < losses[0]
    assert resumed.optimizer.state_dict()["param_groups"][0]["gen_step"] == 30


def test_a_bare_checkpoint_loads_into_one_that_has_already_trained() -> None:
    bare = Training.of(lambda parameters: AdamW(parameters, lr=0.01))
    bare.train(5)
    training = Training.of(gen_adamw)
    training.train(60)
    training.optimizer.load_state_dict(bare.optimizer.state_dict())
    training.train(1)
    # It searches anew, along moments of another run, which may not descend here.
    assert training.optimizer.last_probe.status in (ProbeStatus.STARTED, ProbeStatus.START_FAILED)
    assert training.optimizer.last_probe.lr_before == 0.01


def test_the_bare_base_optimizer_loads_ours() -> None:
    training = Training.of(gen_adamw)
    training.train(5)
    bare = Training.of(AdamW)
    bare.model.load_state_dict(training.model.state_dict())
    bare.optimizer.load_state_dict(through_torch_save(training.optimizer.state_dict()))
    assert bare.optimizer.param_groups[0]["lr"] == training.optimizer.param_groups[0]["lr"]
    losses = bare.train(10)
    assert losses[-1] < losses[0]


def test_what_is_remembered_is_plain_numbers_from_construction_on() -> None:
    training = Training.of(gen_adamw)
    keys = set(training.optimizer.param_groups[0])
    training.train(20)
    group = training.optimizer.param_groups[0]
    assert set(group) == keys
    ours = {key: value for key, value in group.items() if key.startswith("gen_")}
    assert len(ours) > 10
    assert {type(value) for value in ours.values()} <= {int, float, bool}


def test_a_checkpoint_that_does_not_match_is_refused_and_changes_nothing() -> None:
    training = Training.of(gen_adamw)
    training.train(3)
    before, last_probe = str(training.optimizer.state_dict()), training.optimizer.last_probe
    other = torch.optim.AdamW([{"params": [torch.zeros(1)]}, {"params": [torch.zeros(1)]}]).state_dict()
    with pytest.raises(ValueError, match="different number of parameter groups"):
        training.optimizer.load_state_dict(other)
    assert str(training.optimizer.state_dict()) == before
    assert training.optimizer.last_probe is last_probe is not None


def test_hooks_of_saving_and_loading_run_once() -> None:
    calls: list[str] = []
    optimizer = Training.of(gen_adamw).optimizer
    optimizer.register_state_dict_pre_hook(lambda opt: calls.append("save"))
    optimizer.register_state_dict_post_hook(lambda opt, state: {**state, "extra": 1})
    optimizer.register_load_state_dict_pre_hook(lambda opt, state: calls.append(f"load {state.pop('extra')}"))
    optimizer.register_load_state_dict_post_hook(lambda opt: calls.append("loaded"))
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    assert calls == ["save", "load 1", "loaded"]
    assert saved["extra"] == 1
