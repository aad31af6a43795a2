"""GeNOptimizer: options, the lifecycle of a step, hooks, parameter groups, checkpoints and copies."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from difflib import get_close_matches
from functools import wraps
from inspect import signature
from itertools import chain
from typing import Any, Literal, ParamSpec

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from gen_optim.averaging import AveragedWeights
from gen_optim.closures.losses import Closure, Loss, check_callable, check_given_loss
from gen_optim.closures.modules import check_modules
from gen_optim.closures.session import ClosureCaller
from gen_optim.compatibility import check_groups, check_wrappable
from gen_optim.controller import Controller
from gen_optim.diagnostics import Diagnostics
from gen_optim.distributed import processes, ranks_of
from gen_optim.measurement import Mode, make_mode
from gen_optim.measurement.start_point import StartPoint
from gen_optim.records import ProbeRecord
from gen_optim.rules import RULES, ProbeStatus, Rule, make_rule
from gen_optim.steps import (
    Probed,
    StepContext,
    StepResult,
    lazy_step,
    look_ahead_step,
    look_back_step,
    message_of_nested_step,
)
from gen_optim.tensors.interrupts import despite_interrupts
from gen_optim.wrapper import OptimizerWrapper, take_entry

P = ParamSpec("P")

ProbeHook = Callable[[Any, ProbeRecord], None]

_START = "gen_start"
"""The key of the start point of the last step in the state of a parameter, in checkpoints."""
_START_LR, _START_LOSS, _START_FINGERPRINT = "gen_start_lr", "gen_start_loss", "gen_start_fingerprint"
"""Keys of the first parameter group: of that step the learning rate, 0 if it is not looked back at, and the loss where
it began; a checksum."""

_ALLOWS_WRITES = "gen_allows_writes"
"""Key of the first parameter group: whether a step may end where something else has written after it."""


def _refusing_options_of_others(init: Callable[P, None]) -> Callable[P, None]:
    """Say where an option belongs that GeNOptimizer does not have."""
    known = signature(init).parameters

    @wraps(init)
    def checked(*args: P.args, **options: P.kwargs) -> None:
        unknown = [name for name in options if name not in known]
        if unknown:
            [name, *_] = unknown
            of_rules = [rule.__name__ for rule in RULES.values() if name in signature(rule).parameters]
            if of_rules:
                advice = f"It belongs to the rule: GeNOptimizer(base, rule={of_rules[0]}({name}={options[name]!r}))"
            elif similar := get_close_matches(name, known):
                advice = f"Did you mean {similar[0]!r}?"
            else:
                advice = (
                    "Options of the base optimizer belong there: "
                    f"GeNOptimizer(torch.optim.AdamW(model.parameters(), {name}={options[name]!r}))"
                )
            raise TypeError(f"GeNOptimizer has no option {name!r}. {advice}")
        init(*args, **options)

    return checked


class GeNOptimizer(OptimizerWrapper):
    r"""Finds the learning rate of any optimizer while training, by the generalized Newton's method.

    The base optimizer proposes a step from θ to θ − αω. Along it the loss is modelled as a parabola,

    .. math::

        L(\theta - \alpha\omega) \approx L(\theta) - \text{slope}\,\alpha + \tfrac{1}{2}\,\text{curvature}\,\alpha^2,

    whose lowest point is slope / curvature (Bu and Xu, "Gradient descent with generalized Newton's method", ICLR 2025,
    arXiv:2407.02772). ``rule="published"`` leads the learning rate there. The default rule goes by it in the first
    steps, and then by the average of the weights.

    A probe step, usually one in ``period``, looks back at the last step:

    1. The closure is called once, with gradients. It evaluates the loss at the end of the last step, on a new batch.
       The gradients times that step are the slope there.
    2. The parameters are put to the start of the last step. The loss is evaluated there on the same batch, with the
       same dropout masks, without gradients.
    3. These numbers are averaged over the processes that train the model together.
    4. A parabola is fitted and judged, and the learning rate is chosen.
    5. The parameters are put back, and the base optimizer steps once, at the learning rate times the scheduler's
       factor. If the last step has led far up, or to where the closure fails, it is reverted instead.
    6. Gradients, buffers, grad mode and random streams are as after 1, whatever happened in between. An exception at a
       point that only a probe visits counts as an infinite loss there. After any other exception or an interrupt in a
       probe, the step is taken at the last learning rate, and that is raised again.

    With ``mode="approximate"`` or ``"exact"`` it looks ahead: the base optimizer steps once after 1, the loss is
    measured along that step on the batch of its gradients, and the multiple that the rule chooses is written.

    All other steps are lazy: the base optimizer's step at the last learning rate. Before a step that looks back, a copy
    of the parameters is kept; every fourth step updates the average of the weights.

    The wrapper shares ``param_groups``, ``state`` and ``defaults`` with the base optimizer. Learning-rate schedulers
    attach to it as to any optimizer, and their factor multiplies the learning rate. Writing ``param_groups[i]["lr"]``
    sets the learning rate there. torch's global optimizer hooks are called twice a step, for the wrapper and for the
    base optimizer.

    Args:
        base_optim: The optimizer that proposes the direction. Its update must be proportional to its learning rate. The
            learning rates of its groups count only by their ratios (with ``rule="published"`` they are the initial
            ones, too); a group at 0 is frozen.
        closure: Called by :meth:`step` if that is given none; for frameworks that call ``step()`` with no argument.
        probe: The same for the ``probe`` of :meth:`step`.
        mode: How slope and curvature are measured: ``"lookback"``, ``"approximate"``, ``"exact"``, or a
            :class:`~gen_optim.Mode` with options of its own: :class:`~gen_optim.LookBack`,
            :class:`~gen_optim.LookAhead`, :class:`~gen_optim.Exact`, or your own. The latter two measure on the
            gradient's own batch, and are for ``rule="published"``, unless a ``probe`` evaluates another batch.
        rule: How the learning rate is chosen from them: ``"relaxed"``, ``"published"``, or a
            :class:`~gen_optim.Rule` with options of its own: :class:`~gen_optim.RelaxedRule`,
            :class:`~gen_optim.PublishedRule`, or your own.
        period: A probe step every ``period`` steps on average, 8 by default; an option of a rule given by name.
        lr_min: Lower limit of the learning rate of the first unfrozen group, 0 by default; an option of a rule, too.
        lr_max: Upper limit of that learning rate, infinite by default; an option of a rule, too.
        modules: A module or several that the closure calls, whose buffers (statistics of BatchNorm) and gradients
            probes must leave as they are. By default the modules to which the parameters belong, and those above them.
            A module that owns none of the parameters, such as a teacher or a discriminator, has to be named here.
        average: Whether an average of the weights is kept, for :meth:`averaged`, and for the default rule, which
            compares the loss with that at the average. It takes one more copy of the parameters, in float32 if they are
            in half precision.
        offload_average: Whether that copy is in the host's memory.
        offload_copies: Whether the copies of the parameters that measuring needs are kept in the host's memory (pinned
            if the parameters are on a CUDA device), for models that nearly fill their device. Probe steps then wait for
            the copies to be sent there and back.
        process_group: The processes over which measured losses are averaged, so that all choose the same learning rate.
            By default those of the DistributedDataParallel module to which the parameters belong, and those over which
            parameters are spread that are DTensors (``fully_shard``, tensor parallel). A
            ``torch.distributed.ProcessGroup`` if gradients are averaged in another way; ``"local"`` if each process
            trains a model of its own. Copies and pickles do not keep a group.

    Raises:
        TypeError: If ``base_optim`` is no optimizer, another GeNOptimizer, or one that requires a closure; if
            ``closure`` or ``probe`` cannot be called; if ``mode``, ``rule``, ``modules`` or ``process_group`` is of
            another type than said above.
        ValueError: If the base optimizer's update is not proportional to its learning rate, or an option is out of
            range; if an option of the rule is given next to a rule object; if parameters are spread over processes that
            ``process_group`` leaves out.
        RuntimeError: If ``mode="exact"`` and the parameters belong to a module sharded by ``fully_shard``, or are
            DTensors and torch is older than 2.13.

    Example:
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = GeNOptimizer(torch.optim.AdamW(model.parameters()))
        >>> inputs, targets = torch.randn(8, 3), torch.randn(8, 1)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = torch.nn.functional.mse_loss(model(inputs), targets)
        ...     loss.backward()
        ...     return loss
        >>> loss = optimizer.step(closure)
        >>> optimizer.last_probe.status
        <ProbeStatus.STARTED: 'started'>

    Attributes:
        base_optim: The wrapped optimizer.
        closure: The closure for ``step()``; may be set at any time.
        probe: The probe for ``step()``; may be set at any time.
        last_probe: What the last probe step saw and decided; None before the first and after loading.
    """

    closure: Closure | None
    probe: Closure | None
    last_probe: ProbeRecord | None

    @_refusing_options_of_others
    def __init__(
        self,
        base_optim: Optimizer,
        closure: Closure | None = None,
        *,
        probe: Closure | None = None,
        mode: str | Mode = "lookback",
        rule: str | Rule = "relaxed",
        period: int | None = None,
        lr_min: float | None = None,
        lr_max: float | None = None,
        modules: nn.Module | Iterable[nn.Module] = (),
        average: bool = True,
        offload_average: bool = False,
        offload_copies: bool = False,
        process_group: dist.ProcessGroup | Literal["local"] | None = None,
    ) -> None:
        if isinstance(base_optim, GeNOptimizer):
            raise TypeError("base_optim must be the optimizer to wrap, got another GeNOptimizer; wrap its base_optim")
        check_wrappable(base_optim)
        chosen_mode = make_mode(mode)
        options = {"period": period, "lr_min": lr_min, "lr_max": lr_max}
        chosen_rule = make_rule(rule, **{name: value for name, value in options.items() if value is not None})
        switches = {"average": average, "offload_average": offload_average, "offload_copies": offload_copies}
        for name, value in switches.items():
            if not isinstance(value, bool):
                raise TypeError(f"{name} must be True or False, got {value!r}")
        modules = check_modules(modules)
        closure, probe = check_callable("closure", closure), check_callable("probe", probe)
        parameters = list(chain.from_iterable(group["params"] for group in base_optim.param_groups))
        ranks_of(process_group, parameters)
        chosen_mode.check(parameters)
        super().__init__(base_optim)
        self._begin(chosen_rule, chosen_mode, modules, offload_copies=offload_copies, process_group=process_group)
        self.closure, self.probe = closure, probe
        self.average = average
        self._averages = AveragedWeights(base_optim, on_host=offload_average)
        self._loaded_averages: dict[int, Tensor] = {}
        self._has_state_keys = False
        self._loaded_starts: dict[int, Tensor] = {}
        self._save_numbers()

    def _begin(self, rule: Rule, mode: Mode, modules: Sequence[nn.Module], **options: Any) -> None:
        """Set up what copies and pickles do not have."""
        self._context = StepContext(
            self.base_optim, Controller(self.base_optim, rule), mode, ClosureCaller(modules), **options
        )
        self.closure = self.probe = self.last_probe = None
        self._probe_hooks: OrderedDict[int, ProbeHook] = OrderedDict()
        self._diagnostics = Diagnostics()

    # --- the step -----------------------------------------------------------------------------------------------------

    def step(  # type: ignore[override]
        self, closure: Closure | None = None, *, probe: Closure | None = None, loss: Loss | None = None
    ) -> Loss | None:
        """Take one step.

        With neither ``closure`` nor ``probe``, here or given to the constructor, it is the base optimizer's step at the
        present learning rate, and nothing is measured.

        Args:
            closure: Evaluates the loss and returns it. It is called once with gradients enabled. It may zero the
                gradients and call ``backward()``, or leave that to the optimizer. On probe steps it is called again
                without gradients, where ``backward()`` does nothing.
            probe: Evaluates the loss without gradients, for loops that have called ``backward()`` themselves; called
                on probe steps alone, for the loss at 0 too. Next to a ``closure`` it is what gets probed.
            loss: What the loop has called ``backward()`` on, if that is the loss that ``probe`` returns, neither scaled
                nor of another batch: a probe step then takes one forward pass less. The first one is compared with what
                ``probe`` returns. If they differ, as with dropout, a warning says so, and losses given are not used.

        Returns:
            The loss where the step began; None if it was neither evaluated nor given.

        Raises:
            TypeError: If ``closure`` or ``probe`` cannot be called, or returns no loss; if ``loss`` is none.
            ValueError: If ``loss`` is given with a closure, which returns its own, or without a probe. If a learning
                rate was written that is negative or not finite.
            RuntimeError: Under ``torch.inference_mode()``; if a probe step failed on another process.

        Warns:
            UserWarning: If the first probe step finds that ``closure`` or ``probe`` returns another loss when it is
                called again at the same parameters. If the first ten steps had neither of them. If ten times in a row
                no initial learning rate was found, the loss was not finite, or a probe was due but there was nothing
                to look back at. If a learning rate was written before three steps, the closure does not zero the
                gradients of the step before, a probe has raised an exception, or ``loss`` is another one than the
                probe's.

        Example:
            >>> weight = torch.nn.Parameter(torch.tensor([3.0]))
            >>> optimizer = GeNOptimizer(torch.optim.SGD([weight]))
            >>> optimizer.step(lambda: (weight**2).sum())  # calls backward() itself
            tensor(9., grad_fn=<CloneBackward0>)
            >>> weight.grad = 2.0 * weight.detach()
            >>> optimizer.step(probe=lambda: (weight**2).sum())  # for gradients that are there; None: it was lazy
            >>> optimizer.zero_grad()
            >>> loss = (weight**2).sum()
            >>> loss.backward()
            >>> loss = optimizer.step(probe=lambda: (weight**2).sum(), loss=loss)  # the loss need not be probed, too
        """
        if torch.is_inference_mode_enabled():
            raise RuntimeError("step() needs gradients: call it outside of torch.inference_mode()")
        if torch.compiler.is_dynamo_compiling():
            # A compiled function that holds a step breaks its graph here; nothing of the step is traced.
            return torch.compiler.disable(self._step)(closure, probe, loss)  # type: ignore[no-any-return,no-untyped-call]
        return self._step(closure, probe, loss)

    def _step(self, closure: Closure | None, probe: Closure | None, loss: Loss | None) -> Loss | None:
        context, is_grad_enabled = self._context, torch.is_grad_enabled()
        if context.is_stepping:
            raise RuntimeError(message_of_nested_step(self))
        self._averages.refuse_if_swapped("step()")
        if loss is not None:
            loss = self._check_given_loss(loss, closure, probe)
        if closure is None and probe is None and context.controller.rates.all_zero(self.param_groups):
            self._set_up_state()
            return None
        context.unfinished.forget()
        try:
            context.is_stepping = True
            result = self._restarted(self._take_step(closure, probe, loss))
            context.is_stepping = False
        except BaseException:
            context.is_stepping = False
            torch.set_grad_enabled(is_grad_enabled)
            context.unfinished.finish()
            raise
        status = None if result.record is None else result.record.status
        if self.average and status is not ProbeStatus.RESTARTED:
            self._averages.update(begins=status is not ProbeStatus.REVERTED)
        if result.record is not None:
            self._report(result.record)
        return result.loss if loss is None else loss

    def _check_given_loss(self, loss: Loss, closure: Closure | None, probe: Closure | None) -> Loss:
        if closure is not None or self.closure is not None:
            raise ValueError(
                "loss must be given with a probe and no closure, which returns the loss itself: step(closure)"
            )
        if probe is None and self.probe is None:
            raise ValueError(
                "loss must be given next to a probe, which evaluates it at other parameters: "
                "step(probe=lambda: loss_fn(model(inputs), targets), loss=loss)"
            )
        return check_given_loss(loss)

    def _take_step(self, closure: Closure | None, probe: Closure | None, loss: Loss | None) -> StepResult:
        """Take the step that is due: a lazy one, one that looks back, or one that looks ahead."""
        controller = self._context.controller
        if self._has_state_keys:
            self._pop_starts()
        closure = check_callable("closure", self.closure if closure is None else closure)
        probe = check_callable("probe", self.probe if probe is None else probe)
        state = controller.recall()
        if probe is not None:
            probed = Probed(probe, "probe", loss)
        elif closure is not None:
            probed = Probed(closure, "closure")
        else:
            self._diagnostics.look_at_bare_step(state)
            return lazy_step(self._context, None, keeps_start=False)
        rule = controller.rule
        if not any(controller.rates.shares(state.lr)):
            self._diagnostics.look_at_frozen_step(state)
            return lazy_step(self._context, closure)
        if not rule.is_probe_due(state):
            return lazy_step(self._context, closure)
        if (searches := rule.needs_search(state)) or not self.mode.looks_back:
            return look_ahead_step(self._context, closure, probed, searches=searches)
        if (start_point := self._pending_start_point()) is not None:
            compares = rule.needs_excess_loss(state) and not controller.has_one_batch  # without noise none is taken out
            needs_average = self.average and compares and self._averages.is_known
            averages = self._averages if needs_average else None
            return look_back_step(self._context, closure, probed, start_point, averages)
        return lazy_step(self._context, closure)

    def _restarted(self, result: StepResult) -> StepResult:
        """Restart training where it began, if the rule calls for that after a probe step; return what then holds."""
        context, controller, point = self._context, self._context.controller, self._context.initial_point
        if result.record is None or (state := self.rule.restart(controller.state)) is None:
            return result
        # The rule says the same on all ranks, but something may have written to the parameters on one of them alone.
        parameters = context.parameters()
        ranks = ranks_of(context.process_group, parameters, context.caller.owners(parameters))
        if ranks.mean([float(point is not None)]) != [1.0] or point is None:
            return result

        def restart() -> None:
            despite_interrupts(point.stay, self.base_optim.state.clear)
            self._averages.forget()
            context.start_point = context.initial_point = None
            controller.remember(state, controller.rates.rates_in_force(state.lr))

        context.unfinished.do(restart)
        return StepResult(result.loss, replace(result.record, status=ProbeStatus.RESTARTED, lr_after=state.lr))

    def _set_up_state(self) -> None:
        """Have the base optimizer set up its state, and add the keys that a checkpoint holds.

        Distributed checkpoints ask for it by a step at learning rate 0 before they load. Flattened ones load only what
        is in the live state.
        """
        self._pop_starts()
        self.base_optim.step()
        if self.average:
            self._averages.begin()
        self._has_state_keys = True
        for parameter, start in self._starts().items():
            self.base_optim.state[parameter][_START] = start

    def _report(self, record: ProbeRecord) -> None:
        """Keep the record of a probe step, and call the probe hooks."""
        self.last_probe = record
        self._diagnostics.look_at(record, self.param_groups, probes=self._context.controller.state.probes)
        for hook in list(self._probe_hooks.values()):
            hook(self, record)

    def _pending_start_point(self) -> StartPoint | None:
        """Where the last step began, for a probe step that is due; None if that is not known any more."""
        start_point = self._context.start_point
        if start_point is not None:
            if start_point.is_of(list(chain(*self._context.unfrozen()))):
                self._diagnostics.hit()
                return start_point
            self._context.start_point = None
            self._context.allows_writes |= not start_point.is_intact()
        if self._context.controller.rates.factor() > 0.0:
            self._diagnostics.miss(self._context.controller.state)
        return None

    # --- averaged weights -------------------------------------------------------------------------------------------

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Context in which the parameters are the averaged weights; they are put back at its end.

        They are the weights to validate, to save and to serve: a power-law average over about the last sixteenth of
        the steps so far. The parameters are back bit for bit, whatever happens inside. Before the fourth step, and
        with ``average=False``, the block has the present parameters. A nested block changes nothing.

        Inside the block ``step()``, ``state_dict()``, ``load_state_dict()`` and copies of the optimizer raise a
        RuntimeError. Nothing should write to the parameters.

        Example:
            >>> with optimizer.averaged():  # doctest: +SKIP
            ...     accuracy = evaluate(model)
        """
        if not self.average:
            yield
            return
        context = self._context
        points = context.start_point, context.initial_point
        intact = [each for each in points if each is not None and each.is_intact()]
        try:
            with self._averages.swapped():
                yield
        finally:
            if not self._averages.is_swapped:
                # The parameters are what they were, though they have been written to.
                for point in intact:
                    point.arrive(measures_length=context.allows_writes and point is context.start_point)

    def write_averaged(self) -> None:
        """Write the averaged weights into the parameters for good; without an average it changes nothing.

        Raises:
            RuntimeError: Inside :meth:`averaged`.

        Example:
            >>> optimizer.write_averaged()  # doctest: +SKIP
            >>> torch.save(model.state_dict(), "model.pt")  # doctest: +SKIP
        """
        if self.average:
            if self._averages.updates and not self._averages.is_swapped:
                self._context.start_point = None  # the jump is no step
            self._averages.write()

    # --- what it is, and what it does ---------------------------------------------------------------------------------

    def __repr__(self) -> str:
        """What it is doing, what it is made of, and the options of the groups."""
        controller, record = self._context.controller, self.last_probe
        rates = ", ".join(f"{rate:.3g}" for rate in self.get_last_lr())
        if any("initial_lr" in group for group in self.param_groups):
            rates += f" ({controller.state.lr:.3g} found, times the scheduler's factor)"
        if record is not None:
            status = f"{record.status.value} at step {record.step}"
        else:
            status = "nothing measured " + ("since it was loaded" if controller.state.probes else "yet")
        options = ", ".join(
            f"{field.name}={value!r}"
            for field in fields(self.rule)
            if field.name != "period" and (value := getattr(self.rule, field.name)) != field.default
        )
        facts = {
            "learning rate": rates,
            "status": status,
            "step": controller.state.step,
            "base": type(self.base_optim).__name__,
            "mode": self.mode,
            "rule": type(self.rule).__name__ + (f"({options})" if options else ""),
            "period": self.rule.period,
        }
        lines = [f"{type(self).__name__} (", *(f"    {name}: {fact}" for name, fact in facts.items())]
        for index, group in enumerate(self.param_groups):
            own = sorted(name for name in group if name not in ("params", "lr") and not name.startswith("gen_"))
            lines += [f"Parameter Group {index}", *(f"    {name}: {group[name]}" for name in own)]
        return "\n".join([*lines, ")"])

    @property
    def mode(self) -> Mode:
        """How slope and curvature are measured."""
        return self._context.mode

    @property
    def rule(self) -> Rule:
        """How the learning rate is chosen from them."""
        return self._context.controller.rule

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """The option of that name."""
        return self._context.caller.modules

    @property
    def process_group(self) -> dist.ProcessGroup | Literal["local"] | None:
        """The option of that name; may be set at any time, after copying for instance."""
        return self._context.process_group

    @process_group.setter
    def process_group(self, value: dist.ProcessGroup | Literal["local"] | None) -> None:
        ranks_of(value, self._context.parameters())
        self._context.process_group = value

    @property
    def offload_copies(self) -> bool:
        """The option of that name."""
        return self._context.offload_copies

    @property
    def is_probing(self) -> bool:
        """Whether a probe runs right now, so that a closure can skip its logging and metrics."""
        return self._context.caller.is_probing

    def get_last_lr(self) -> list[float]:
        """The learning rates that the last step used, one per parameter group, with the scheduler's factor.

        Example:
            >>> optimizer.get_last_lr()  # doctest: +SKIP
            [0.0123, 0.00123]
        """
        return self._context.controller.rates.last_lr(self.param_groups)

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
        given: Any = hook
        if not callable(given) or isinstance(given, type):
            got = f"the class {given.__name__}" if isinstance(given, type) else type(given).__name__
            raise TypeError(f"hook must be a callable that takes the optimizer and a record, got {got}")
        handle = RemovableHandle(self._probe_hooks)
        self._probe_hooks[handle.id] = hook
        return handle

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group. Its ratio to the others is that of its ``lr`` to the present one; 1 without an ``lr``.

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
        group = {**self.defaults, **param_group}
        if isinstance(group.get("params"), Iterator):  # it is looked through before torch does that
            group["params"] = param_group["params"] = list(group["params"])
        brings_lr = "lr" in param_group
        controller = self._context.controller
        controller.recall()
        check_groups([*self.param_groups, group])
        self.base_optim.add_param_group(param_group)
        controller.rates.join(self.param_groups[-1], controller.state.lr, brings_lr=brings_lr)

    # --- checkpoints, copies and pickles ------------------------------------------------------------------------------

    def _save_numbers(self) -> None:
        """Write what GeN remembers to the parameter groups; called before a state dictionary is made."""
        self._averages.refuse_if_swapped("saving, loading or copying the optimizer")
        self._context.controller.save()
        start_point = self._context.start_point
        if start_point is not None and not start_point.is_intact():
            # Something else has written over its step since: in a copy nothing would show it.
            self._context.start_point, self._context.allows_writes = None, True
            start_point = None
        self.param_groups[0].update(
            {
                _START_LR: 0.0 if start_point is None else start_point.lr,
                _START_LOSS: math.inf if start_point is None else float(start_point.loss),
                _START_FINGERPRINT: 0 if start_point is None else start_point.fingerprint(),
                _ALLOWS_WRITES: self._context.allows_writes,
            }
        )

    def _load_numbers(self) -> None:
        """Read it back; called after a state dictionary was loaded."""
        self.last_probe = None
        group = self.param_groups[0]
        self._averages.load(self._loaded_averages if self.average else {})
        parameters = self._context.parameters()
        starts = self._pop_starts() | {parameters[index]: start for index, start in self._loaded_starts.items()}
        self._loaded_starts, self._loaded_averages = {}, {}
        lr, fingerprint = float(group.get(_START_LR, 0.0)), int(group.get(_START_FINGERPRINT, 0))
        # A checkpoint has the loss of one process: where others train too, the loss is not known.
        is_alone = processes() == 1 or self._context.process_group == "local"
        loss = float(group.get(_START_LOSS, math.inf)) if is_alone else math.inf
        self._context.controller.load()
        self._context.start_point, self._context.initial_point, self._context.looked_through = None, None, []
        self._context.allows_writes = bool(group.get(_ALLOWS_WRITES, False))
        if lr > 0.0 and starts and self._context.mode.looks_back:
            # A parameter without a gradient has no state: it has not moved.
            moving = {each: starts.get(each, each.detach()) for each in chain(*self._context.moving())}
            self._context.start_point = StartPoint.load(moving, lr, fingerprint, loss=loss, on_host=self.offload_copies)

    def _check_numbers(self, state_dict: Mapping[str, Any]) -> None:
        """Check what :meth:`_load_numbers` will read; called before anything is loaded."""
        self._context.controller.check(state_dict["param_groups"])

    def _add_tensors(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return a state dictionary with the start of the last step added to the state of each parameter."""
        starts, state = self._starts(), dict(state_dict["state"])
        for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=True):
            for key, parameter in zip(saved["params"], group["params"], strict=True):
                if parameter in starts:
                    state[key] = {**state.get(key, {}), _START: starts[parameter]}
        return {**state_dict, "state": state}

    def _take_tensors(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return a state dictionary without starts and averages, and keep these for :meth:`_load_numbers`."""
        state_dict, self._loaded_averages = self._averages.take_from(state_dict)
        state_dict, self._loaded_starts = take_entry(state_dict, _START)
        return state_dict

    def _set_aside(self) -> tuple[StartPoint | None, StartPoint | None, ProbeRecord | None]:
        return self._context.start_point, self._context.initial_point, self.last_probe

    def _put_back(self, kept: tuple[StartPoint | None, StartPoint | None, ProbeRecord | None]) -> None:
        self._loaded_starts, self._loaded_averages = {}, {}
        self._load_numbers()
        self._context.start_point, self._context.initial_point, self.last_probe = kept

    def _starts(self) -> dict[Tensor, Tensor]:
        """What a checkpoint holds per parameter: the start of the last step, or the parameter itself.

        Distributed checkpoints load only the keys that the live state dictionary has, and insist on all of these. So
        the key is there whether the last step is looked back at or not.
        """
        if not self._context.mode.looks_back:
            return {}
        start_point = self._context.start_point
        starts = {} if start_point is None else start_point.tensors()
        state = self.base_optim.state
        # Many optimizers take an empty state for one that has to be set up. If all are empty after a step, this one
        # does not, unless training has restarted.
        step, last = self._context.controller.state.step, self.last_probe
        is_restarted = last is not None and last.step == step and last.status is ProbeStatus.RESTARTED
        has_stepped = step > 0 and not is_restarted
        is_stateless = not any(state.values()) and (self._has_state_keys or has_stepped)
        return {
            # A copy, since distributed checkpoints are loaded into what this returns.
            each: starts[each] if each in starts else each.detach().clone()
            for each in chain(*self._context.moving())
            if is_stateless or state.get(each)
        }

    def _pop_starts(self) -> dict[Tensor, Tensor]:
        """Take the starts out of the base optimizer's state, where loading has put them."""
        self._has_state_keys = False
        state = self.base_optim.state
        starts: dict[Tensor, Tensor] = {}
        for parameter in self._context.parameters():
            own = state.get(parameter)
            if own is not None and _START in own:
                starts[parameter] = own.pop(_START)
                if not own:
                    del state[parameter]
        return starts

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles keep: not the closures, hooks and records, nor a process group."""
        kept = super().__getstate__()
        for name in ("closure", "probe", "last_probe", "_context", "_probe_hooks", "_diagnostics"):
            del kept[name]
        context = self._context
        kept["_kept"] = {
            "rule": context.controller.rule,
            "mode": context.mode,
            "modules": context.caller.modules,
            "offload_copies": context.offload_copies,
            "process_group": context.process_group if context.process_group == "local" else None,
            "start_point": context.start_point,
            "allows_writes": context.allows_writes,
        }
        return kept

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore what was kept, and set up the rest."""
        kept = state.pop("_kept", None)
        super().__setstate__(state)
        if kept is not None:
            self._begin(**kept)
