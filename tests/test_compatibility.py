import copy
import random
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
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

from gen_optim.compatibility import check_wrappable
from tests import optimizers_of_others as others
from tests.training import muon

Make = Callable[[list[nn.Parameter]], Any]


def parameters() -> list[nn.Parameter]:
    """Matrices, which every optimizer takes, Muon included."""
    return [nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(2, 2))]


def groups(of: list[nn.Parameter], *options: dict[str, Any]) -> list[dict[str, Any]]:
    """Parameter groups of one parameter each."""
    return [{"params": [parameter], **each} for parameter, each in zip(of, options, strict=True)]


class Plain(Optimizer):
    """Gradient descent written at home; ``step_lr`` is what it makes of its learning rate."""

    def __init__(self, params: Any, lr: float = 0.1, **defaults: Any) -> None:
        super().__init__(params, {"lr": lr, **defaults})

    def step_lr(self, lr: float) -> float:
        return lr

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(self.step_lr(group["lr"]) * parameter.grad)


class Capped(Plain):
    def step_lr(self, lr: float) -> float:
        return min(lr, 0.5)


class CappedForMatrices(Capped):
    def __init__(self, params: Any, lr: float = 0.1, **defaults: Any) -> None:
        super().__init__(params, lr, **defaults)
        if any(parameter.dim() != 2 for group in self.param_groups for parameter in group["params"]):
            raise ValueError("takes matrices only")


class SquareRoot(Plain):
    def step_lr(self, lr: float) -> float:
        return float(lr**0.5)


class Constant(Plain):
    def step_lr(self, lr: float) -> float:
        return 0.01


class Delayed(Plain):
    """Uses the learning rate of the step before."""

    last = 1.0

    def step_lr(self, lr: float) -> float:
        used, self.last = self.last, lr
        return used


class DecayRegardlessOfLr(Plain):
    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.mul_(0.9)


class WithoutLr(Optimizer):
    def __init__(self, params: Any) -> None:
        super().__init__(params, {"pace": 0.1})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        raise AssertionError("was stepped")


class NeedsArguments(Plain):
    """Its constructor asks for more than parameters and options."""

    def __init__(self, params: Any, trust: Callable[[float], float], *, name: str) -> None:
        super().__init__(params)
        self.trust, self.name = trust, name

    def step_lr(self, lr: float) -> float:
        return self.trust(lr)


class NeedsClosure(Plain):
    def step(self, closure: Any) -> None:  # type: ignore[override]
        super().step(closure)


class Noisy(Plain):
    """Adds noise to the gradient, in proportion to the learning rate like the rest."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                noise = torch.randn_like(parameter) * (1.0 + random.random() + float(np.random.rand()))
                parameter.sub_(group["lr"] * (parameter.grad + noise))


# --- taken -----------------------------------------------------------------------------------------------------------

TAKEN: dict[str, Make] = {
    "SGD": lambda p: optim.SGD(p, lr=0.1),
    "SGD, momentum": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.1, weight_decay=0.1),
    "SGD, Nesterov": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "SGD, maximize": lambda p: optim.SGD(p, lr=0.1, maximize=True),
    "SGD, fused": lambda p: optim.SGD(p, lr=0.1, fused=True),
    "SGD, foreach": lambda p: optim.SGD(p, lr=0.1, foreach=True),
    "SGD, tensor lr": lambda p: optim.SGD(p, lr=torch.tensor(0.1)),
    "Adam": optim.Adam,
    "Adam, weight decay": lambda p: optim.Adam(p, weight_decay=0.1, amsgrad=True),
    "Adam, fused": lambda p: optim.Adam(p, fused=True),
    "Adam, tensor lr": lambda p: optim.Adam(p, lr=torch.tensor(1e-3), foreach=False),
    "Adam, capturable": lambda p: optim.Adam(p, capturable=True),
    "Adam, capturable, tensor lr": lambda p: optim.Adam(p, lr=torch.tensor(1e-3), capturable=True),
    "AdamW": lambda p: optim.AdamW(p, weight_decay=0.5),
    "AdamW, lr 0": lambda p: optim.AdamW(p, lr=0.0),
    "AdamW, huge lr": lambda p: optim.AdamW(p, lr=1e6),
    "Adamax": optim.Adamax,
    "NAdam": lambda p: optim.NAdam(p, decoupled_weight_decay=True, weight_decay=0.1),
    "RAdam": optim.RAdam,
    "Adadelta": optim.Adadelta,
    "Adagrad": lambda p: optim.Adagrad(p, lr_decay=0.1),
    "RMSprop": lambda p: optim.RMSprop(p, momentum=0.9, centered=True),
    "SparseAdam": optim.SparseAdam,
    "Muon": muon,
    "Muon, as Adam": lambda p: muon(p, adjust_lr_fn="match_rms_adamw"),
    "home-made": Plain,
    "home-made, with options": lambda p: Plain(p, lr=0.3, flavour="plain"),
    "home-made, that needs arguments": lambda p: NeedsArguments(p, float, name="trusting"),
    "two groups": lambda p: optim.AdamW(groups(p, {"lr": 0.1}, {"weight_decay": 0.0})),
    "a frozen group": lambda p: optim.AdamW(groups(p, {"lr": 0.0}, {})),
    "named parameters": lambda p: optim.AdamW([("first", p[0]), ("second", p[1])]),
}


@pytest.mark.parametrize("make", TAKEN.values(), ids=TAKEN)
def test_optimizer_whose_update_is_proportional_to_its_lr_is_taken(make: Make) -> None:
    check_wrappable(make(parameters()))


def test_every_optimizer_of_torch_is_either_taken_or_refused_here() -> None:
    there_are = {
        name
        for name, value in vars(optim).items()
        if isinstance(value, type) and issubclass(value, Optimizer) and value is not Optimizer
    }
    named = {make(parameters()).__class__.__name__ for make in (*TAKEN.values(), *UNPROPORTIONAL.values())}
    assert there_are <= named | {"LBFGS"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.complex64], ids=str)
def test_parameters_of_any_dtype_are_taken(dtype: torch.dtype) -> None:
    check_wrappable(optim.AdamW([nn.Parameter(torch.ones(3, dtype=dtype))]))


@pytest.mark.parametrize("shape", [(), (1,), (0,), (5,), (2, 3), (2, 3, 4, 5), (1, 1, 1, 1, 1)])
def test_parameters_of_any_shape_are_taken(shape: tuple[int, ...]) -> None:
    check_wrappable(optim.SGD([nn.Parameter(torch.ones(shape))], lr=0.1))


def test_group_without_parameters_is_taken() -> None:
    empty_first: list[dict[str, Any]] = [{"params": []}, {"params": parameters()}]
    check_wrappable(optim.SGD(empty_first, lr=0.1))


def test_optimizer_that_has_stepped_with_a_scheduler_is_taken() -> None:
    trained = parameters()
    optimizer = optim.AdamW(trained)
    scheduler = optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=5)
    trained[0].grad = torch.ones(4, 3)
    optimizer.step()
    scheduler.step()
    check_wrappable(optimizer)


def test_noise_in_an_update_is_not_taken_for_disproportion() -> None:
    for _ in range(5):
        check_wrappable(Noisy(parameters()))


# --- refused ---------------------------------------------------------------------------------------------------------

UNPROPORTIONAL: dict[str, Make] = {
    "Rprop": optim.Rprop,
    "ASGD": optim.ASGD,
    "Adafactor": optim.Adafactor,
    "Adafactor, tiny lr": lambda p: optim.Adafactor(p, lr=1e-8),
    "home-made, capped": Capped,
    "home-made, capped, for matrices": CappedForMatrices,
    "home-made, square root": SquareRoot,
    "home-made, constant": Constant,
    "home-made, delayed": Delayed,
    "home-made, decay regardless of lr": DecayRegardlessOfLr,
    "home-made, capped, two groups": lambda p: Capped(groups(p, {"lr": 0.1}, {"lr": 0.2})),
}


@pytest.mark.parametrize("make", UNPROPORTIONAL.values(), ids=UNPROPORTIONAL)
def test_optimizer_whose_update_is_not_proportional_to_its_lr_is_refused(make: Make) -> None:
    base = make(parameters())
    with pytest.raises(ValueError, match=rf"base_optim must .*proportional .*{type(base).__name__} moves") as caught:
        check_wrappable(base)
    assert "Use it bare" in str(caught.value)


OTHERS_TAKEN: dict[str, Make] = {
    "decay after the update": others.DecayAfterwards,
    "decay after the update, large": lambda p: others.DecayAfterwards(p, lr=0.01, weight_decay=0.3),
    "LARS": others.LARS,
    "LARS, small lr": lambda p: others.LARS(p, lr=1e-3),
    "LAMB": others.LAMB,
    "a cache in the groups": others.Caching,
}


@pytest.mark.parametrize("make", OTHERS_TAKEN.values(), ids=OTHERS_TAKEN)
def test_optimizer_that_is_proportional_at_learning_rates_of_training_is_taken(make: Make) -> None:
    check_wrappable(make(parameters()))


OTHERS_REFUSED: dict[str, Make] = {
    "LaProp": others.LaProp,
    "MADGRAD": others.MADGRAD,
    "distance over gradients": others.DistanceOverGradients,
    "slow weights": others.Ranger,
    **{f"slow weights, k = {k}": partial(others.Ranger, k=k) for k in (2, 5, 8, 12)},
    "slow weights outside": others.lookahead,
    "slow weights around AdamW": lambda p: others.Lookahead(optim.AdamW(p)),
    "schedule-free outside": lambda p: others.ScheduleFree(optim.SGD(p, lr=0.1)),
    "TRAC": lambda p: others.TRAC(optim.AdamW(p)),
}


@pytest.mark.parametrize("make", OTHERS_REFUSED.values(), ids=OTHERS_REFUSED)
def test_optimizer_that_keeps_copies_or_adapts_itself_is_refused(make: Make) -> None:
    base = make(parameters())
    with pytest.raises(ValueError, match=rf"base_optim must .*{type(base).__name__} moves.*Use it bare, or wrap"):
        check_wrappable(base)


def test_optimizer_that_keeps_copies_outside_of_its_state_is_refused() -> None:
    """A twin with small parameters does not fit the copies; one with all parameters does."""

    class OwnCopies(others.Outer):
        def __init__(self, optimizer: Optimizer) -> None:
            super().__init__(optimizer)
            self.slow = [each.detach().clone() for group in self.param_groups for each in group["params"]]

        def synchronise(self, parameter: torch.Tensor, slow: torch.Tensor) -> None:
            own = next(each for each in self.slow if each.shape == parameter.shape)
            parameter.lerp_(own, 0.5)

    with pytest.raises(ValueError, match="OwnCopies moves"):
        check_wrappable(OwnCopies(optim.SGD(parameters(), lr=0.1)))


def test_optimizer_that_cannot_be_tried_is_warned_of() -> None:
    class Particular(Plain):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            raise RuntimeError("needs a machine of its own")

    with pytest.warns(UserWarning, match="could not check .* of Particular .* RuntimeError: needs a machine"):
        check_wrappable(Particular(parameters()))


def test_check_does_not_share_mutable_options() -> None:
    base, twin = others.Caching(parameters(), lr=0.1), others.Caching(parameters(), lr=0.1)
    check_wrappable(base)
    assert base.param_groups[0]["cache"] == base.defaults["cache"] == [None] * 10
    for optimizer in (base, twin):
        optimizer.param_groups[0]["params"][0].grad = torch.ones(4, 3)
        optimizer.step()
    assert base.param_groups[0]["cache"] == twin.param_groups[0]["cache"]


@pytest.mark.parametrize("inner", [optim.SGD, optim.AdamW])
def test_optimizer_whose_optional_closure_is_required_is_refused(inner: Any) -> None:
    with pytest.raises(TypeError, match=r"SAM\.step requires one.*Use it bare"):
        check_wrappable(others.SAM(inner(parameters(), lr=0.1)))


def test_parameters_on_the_meta_device_are_refused() -> None:
    meta = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.empty(2, device="meta"))]
    with pytest.raises(ValueError, match=r"param_groups\[0\] has some on the meta device.*to_empty"):
        check_wrappable(optim.SGD(meta, lr=0.1))


def test_parameters_of_lazy_modules_are_refused_before_they_are_initialized() -> None:
    lazy = nn.LazyLinear(2)
    with pytest.raises(ValueError, match=r"param_groups\[0\] has some of lazy modules.*Call the model once"):
        check_wrappable(optim.SGD(lazy.parameters(), lr=0.1))
    lazy(torch.ones(1, 3))
    check_wrappable(optim.SGD(lazy.parameters(), lr=0.1))


@pytest.mark.parametrize("make", [optim.LBFGS, NeedsClosure])
def test_optimizer_that_evaluates_the_closure_itself_is_refused(make: Make) -> None:
    base = make(parameters())
    with pytest.raises(TypeError, match=rf"{type(base).__name__}\.step requires one.*Use it bare"):
        check_wrappable(base)


def test_optimizer_without_a_learning_rate_is_refused() -> None:
    with pytest.raises(ValueError, match=r"param_groups\[0\] has no 'lr'"):
        check_wrappable(WithoutLr(parameters()))


def test_group_without_a_learning_rate_is_named() -> None:
    base = Plain([{"params": parameters()}, {"params": parameters()}])
    del base.param_groups[1]["lr"]
    with pytest.raises(ValueError, match=r"param_groups\[1\] has no 'lr'"):
        check_wrappable(base)


def test_differentiable_optimizer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"param_groups\[0\] has differentiable=True.*differentiable=False"):
        check_wrappable(optim.SGD(parameters(), lr=0.1, differentiable=True))


def test_groups_that_disagree_on_maximize_are_refused() -> None:
    with pytest.raises(ValueError, match="base_optim must have the same maximize in all groups"):
        check_wrappable(optim.SGD(groups(parameters(), {"maximize": True}, {}), lr=0.1))


@pytest.mark.parametrize("value", [None, 0.1, [torch.ones(1)], nn.Linear(1, 1), optim.AdamW])
def test_what_is_no_optimizer_is_refused(value: Any) -> None:
    got = "the class AdamW" if value is optim.AdamW else type(value).__name__
    with pytest.raises(TypeError, match=rf"base_optim must be a torch\.optim\.Optimizer.*got {got}"):
        check_wrappable(value)


# --- without a trace -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [*TAKEN.values(), *UNPROPORTIONAL.values(), *OTHERS_REFUSED.values()],
    ids=[*TAKEN, *UNPROPORTIONAL, *OTHERS_REFUSED],
)
def test_check_leaves_the_optimizer_alone(make: Make) -> None:
    trained = parameters()
    for parameter in trained:
        parameter.grad = torch.full_like(parameter, 0.5)
    base = make(trained)
    gradients = [parameter.grad for parameter in trained]
    options, state, defaults = copy.deepcopy(base.param_groups), copy.deepcopy(dict(base.state)), dict(base.defaults)
    own_groups = list(base.param_groups)
    try:
        check_wrappable(base)
    except ValueError:
        assert make in (*UNPROPORTIONAL.values(), *OTHERS_REFUSED.values())
    assert all(now is then for now, then in zip(base.param_groups, own_groups, strict=True))
    assert str(base.param_groups) == str(options)
    assert str(dict(base.state)) == str(state)
    assert all(base.defaults[name] is value for name, value in defaults.items())
    for parameter, gradient, like in zip(trained, gradients, parameters(), strict=True):
        assert torch.equal(parameter, like)
        assert parameter.grad is gradient
        assert torch.equal(gradient, torch.full_like(like, 0.5))  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [optim.AdamW, Noisy])
def test_check_leaves_the_random_streams_alone(make: Make) -> None:
    def streams() -> list[Any]:
        return [torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())]

    base = make(parameters())
    before = streams()
    check_wrappable(base)
    assert streams() == before


@pytest.mark.parametrize("make", [optim.AdamW, optim.SparseAdam, Capped], ids=lambda make: make.__name__)
def test_check_calls_no_global_hook_and_keeps_them_all(make: Make) -> None:
    calls: list[Optimizer] = []
    handles = [
        register_optimizer_step_pre_hook(lambda optimizer, *_: calls.append(optimizer)),
        register_optimizer_step_post_hook(lambda optimizer, *_: calls.append(optimizer)),
    ]
    tables = dict(_global_optimizer_pre_hooks), dict(_global_optimizer_post_hooks)
    try:
        try:
            check_wrappable(make(parameters()))
        except ValueError:
            assert make is Capped
        assert calls == []
        assert (dict(_global_optimizer_pre_hooks), dict(_global_optimizer_post_hooks)) == tables
    finally:
        for handle in handles:
            handle.remove()


def test_check_never_steps_the_optimizer_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    base = optim.AdamW(parameters())
    monkeypatch.setattr(base, "step", lambda closure=None: pytest.fail("was stepped"))
    check_wrappable(base)


def test_interrupt_during_the_check_is_raised() -> None:
    class Interrupted(Plain):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check_wrappable(Interrupted(parameters()))


def test_check_is_not_misled_by_warnings_that_are_errors() -> None:
    class Talkative(Capped):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            warnings.warn("each step warns", stacklevel=1)
            super().step()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="proportional"):
            check_wrappable(Talkative(parameters()))


def test_refusal_needs_no_gradients() -> None:
    trained = parameters()
    with torch.no_grad(), pytest.raises(ValueError, match="proportional"):
        check_wrappable(optim.Adafactor(trained))
    assert all(each.grad is None for each in trained)
