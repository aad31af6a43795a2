"""A lazy step, a step that looks back, and a step that looks ahead.

A lazy step is the base optimizer's step. The other two are probe steps: they call the closure, measure the loss along a
step, let the controller decide, and put the parameters where the decision says. Whatever happens in between, an
exception included, the step is finished, as the lazy step that it would have been: once the base optimizer's moments
have advanced, the parameters must follow.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, compress
from typing import Any, Literal, NamedTuple

import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from gen_optim.averaging import AveragedWeights
from gen_optim.closures.gradients import Measure, mark_used
from gen_optim.closures.interception import postponed_step_hooks
from gen_optim.closures.losses import DIFFERENT, Closure, Loss, agree, copied
from gen_optim.closures.session import ClosureCaller, Session
from gen_optim.controller import Controller
from gen_optim.distributed import ranks_of
from gen_optim.measurement import Mode, StepLoss
from gen_optim.measurement.interpolation import Interpolation
from gen_optim.measurement.lookahead import measure_initial_search, searched_lr
from gen_optim.measurement.start_point import StartPoint
from gen_optim.records import ProbeRecord
from gen_optim.rules import Parabola, RuleState
from gen_optim.tensors.dtensor import local
from gen_optim.tensors.foreach import has_infinities
from gen_optim.tensors.interrupts import Unfinished
from gen_optim.warning import warn


class Probed(NamedTuple):
    """What a probe step evaluates again: the closure, or the probe that was given next to it or alone.

    ``loss`` is the value that the caller gives for it at the present parameters, if any.
    """

    call: Closure
    name: Literal["closure", "probe"]
    loss: Loss | None = None


class StepResult(NamedTuple):
    """The loss where a step began, None if it was not evaluated, and the record of a probe step."""

    loss: Loss | None
    record: ProbeRecord | None = None


@dataclass
class StepContext:
    """What the steps of one optimizer share."""

    base_optim: Optimizer
    controller: Controller
    mode: Mode
    caller: ClosureCaller
    offload_copies: bool = False
    process_group: dist.ProcessGroup | Literal["local"] | None = None
    is_stepping: bool = False
    """Whether a step is being taken: its closure must not take another one."""
    start_point: StartPoint | None = None
    """Where the last step began, if the next one is going to look back at it."""
    initial_point: StartPoint | None = None
    """Where training began, for as long as it may have to restart there."""
    trusts_losses: bool | None = None
    """Whether a loss that the caller gave was the one that the probe returned; None until the two are compared."""
    allows_writes: bool = False
    """Whether a step is looked back at after something else has written to the parameters, if that does not lengthen
    it: from the first such write on, since it costs a pass over the parameters."""
    holds_infinities: bool = False
    """Whether some of the parameters that were ``looked_through`` are infinite on purpose."""
    looked_through: list[int] = field(default_factory=list)
    has_warned_of_failure: bool = False
    has_warned_of_gradients: bool = False

    @property
    def unfinished(self) -> Unfinished:
        """What ends the step that is being taken, whatever happens."""
        return self.caller.unfinished

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The parameter groups."""
        return self.base_optim.param_groups

    def parameters(self) -> list[Tensor]:
        """All parameters."""
        return list(chain.from_iterable(group["params"] for group in self.groups))

    def unfrozen(self) -> list[list[Tensor]]:
        """The parameters of each group whose learning rate is not 0."""
        is_moving = [ratio > 0.0 for ratio in self.controller.rates.shares(1.0)]
        return [group["params"] for group in compress(self.groups, is_moving)]

    def moving(self) -> list[list[Tensor]]:
        """The parameters that a step can change, of each group whose learning rate is not 0."""
        return [[each for each in group if each.requires_grad or each.grad is not None] for group in self.unfrozen()]

    def keeps_infinities(self) -> bool:
        """Whether parameters that move are infinite on purpose, such as a mask of −∞; looked up when others do."""
        moving = list(chain(*self.moving()))
        if self.looked_through != (seen := list(map(id, moving))):
            self.looked_through, self.holds_infinities = seen, has_infinities(list(map(local, moving)))
        return self.holds_infinities

    def session(self, probed: Probed) -> Session:
        """Begin the calls of a probe step."""
        parameters = self.parameters()
        modules = self.caller.owners(parameters)
        ranks = ranks_of(self.process_group, parameters, modules, warns=not self.controller.state.probes)
        return Session(
            self.caller, self.groups, modules, probed.call, probed.name, ranks, tolerance=self.mode.tolerance
        )

    def take_over(self, given: Loss | None, step_loss: StepLoss, multiple: float) -> None:
        """Take over the loss that the caller has given, if it is what the probe returns at this multiple of the step.

        The first one is compared with what the probe returns. They differ with dropout, since the caller's forward pass
        used other masks, and if the loss is scaled or that of another batch. Several ranks compare together, so that
        they evaluate equally often; if one was given no loss, those of the others are not used, then or later.
        """
        session = step_loss.session
        if self.trusts_losses is None and (given is not None or len(session.ranks) > 1):
            probed = step_loss.evaluate(multiple)
            numbers = [math.nan if given is None else copied(given), probed, session.rounding([probed])]
            _, (loss, expected, rounding, missing) = session.read([], [*numbers, float(given is None)])
            if missing:
                self.trusts_losses = False
            elif math.isfinite(loss) and math.isfinite(expected):
                self.trusts_losses = agree(loss, expected, rounding)
                if not self.trusts_losses:
                    warn(
                        f"At step {self.controller.state.step + 1} GeNOptimizer was given loss={loss:.9g}, but probe() "
                        f"returns {expected:.9g} at the same parameters: dropout has drawn other masks, or it is the "
                        "loss of another batch, or scaled, or something has stepped since. Losses given are not used; "
                        "the probe is called once more instead. With dropout, leave loss= out, or give a closure, all "
                        "of whose calls see the same masks."
                    )
        elif self.trusts_losses and given is not None:
            step_loss.losses[multiple] = copied(given)

    def call(self, session: Session, closure: Closure, measure: Measure = tuple) -> Loss:
        """Make the first call of a probe step (``session.first``); one that steps the base optimizer is refused."""
        with _refusing_steps(self.base_optim, self.unfinished):
            loss = session.first(closure, measure)
        if session.origin.adds_to_used and not self.has_warned_of_gradients:
            self.has_warned_of_gradients = True
            warn(
                f"At step {self.controller.state.step + 1} the closure of GeNOptimizer has added to the gradients of "
                "the step before, so that the step follows the gradients of all batches so far. Begin the closure with "
                "optimizer.zero_grad()."
            )
        return loss

    def warn_of_failure(self, failure: Exception | None) -> None:
        """Warn once of an exception at a point that only a probe has visited."""
        if failure is not None and not self.has_warned_of_failure:
            self.has_warned_of_failure = True
            warn(
                f"At step {self.controller.state.step} a probe of GeNOptimizer raised {type(failure).__name__}: "
                f"{failure}. The loss counts as infinite there. Later probes that fail are not reported."
            )

    def keep_start_point(self, lr: float, loss: Loss | None, last: StartPoint | None) -> StartPoint | None:
        """Keep where the parameters are now, before a step at α = ``lr``; None if that step does not move them.

        ``loss`` is that of the step's own batch; the copies of the ``last`` start point are used again if they can be.
        """
        taken = lr * self.controller.rates.factor()
        if not taken > 0.0:
            return None
        parameters, on_host = list(chain(*self.moving())), self.offload_copies
        copies = None if last is None else last.present_copies(parameters)
        own_loss = math.inf if loss is None else copied(loss)
        return StartPoint(parameters, taken, loss=own_loss, copies=copies, on_host=on_host)

    def keep_initial_point(self) -> None:
        """Keep where training begins, in the host's memory; called when the closure has returned, before a step.

        Only optimizers of torch are known to keep all of their state in ``state``, which a restart clears. The point is
        let go once training will not restart. A restart would undo what something else than the optimizer, the closure
        included, has written to the parameters, and parameters that did not move at first were not kept.
        """
        point, state = self.initial_point, self.controller.state
        if not self.controller.rule.may_restart(state):
            self.initial_point = None
            return
        moving = list(chain(*self.moving()))
        if point is not None:
            if not (point.is_of_exactly(moving) and point.is_intact()):
                self.initial_point = None
        elif not state.step and _begins_without_state(self.base_optim):
            copies = [local(each).detach().to("cpu", copy=True) for each in moving]  # not pinned: hardly ever read
            self.initial_point = StartPoint(moving, 0.0, copies=copies, on_host=True)


def _begins_without_state(optimizer: Optimizer) -> bool:
    is_of_torch = f"{type(optimizer).__module__}.".startswith("torch.optim.")
    return is_of_torch and not any(optimizer.state.values())


def lazy_step(context: StepContext, closure: Closure | None, *, keeps_start: bool = True) -> StepResult:
    """The base optimizer's step at the last learning rate; with ``keeps_start`` the next step may look back at it."""
    loss = None if closure is None else context.caller.call(closure, context.groups)
    context.controller.recall()
    _step_base(context, context.controller.skip(), loss, keeps_start=keeps_start)
    return StepResult(loss)


def look_back_step(
    context: StepContext,
    closure: Closure | None,
    probed: Probed,
    start_point: StartPoint,
    averages: AveragedWeights | None = None,
) -> StepResult:
    """Measure the loss along the last step on the new batch, decide, and let the base optimizer step.

    ``closure`` evaluates the loss, with gradients, where the last step ended; None if the caller has done that.
    ``averages`` are given if the rule asks how far the loss there is above that at averaged weights.
    """
    controller = context.controller
    session = context.session(probed)
    start_point.keeps_infinities = context.keeps_infinities()
    is_own = probed.call is closure
    marks = start_point.marks()

    def measure() -> tuple[Loss, Loss]:
        # A closure may move the parameters for its backward pass: sharpness-aware minimization, noise on weights.
        if start_point.marks() != marks:
            return math.nan, math.nan
        return start_point.end_slope(), math.nan if averages is None else averages.excess_loss()

    try:
        loss = None if closure is None else context.call(session, closure, measure if is_own else tuple)
    except Exception as error:
        if len(session.ranks) > 1:  # the others would wait for this one in a collective operation
            raise
        return _revert_failed_step(context, session, start_point.duplicate(), error)
    state = controller.recall()
    context.start_point = None  # it serves once; but a closure that has failed may be called again

    def leave() -> None:
        """Put the parameters back to where the last step ended."""
        if averages is not None:
            averages.leave()
        start_point.leave()

    context.unfinished.add(leave)
    after, is_reverted = controller.skip(), False
    try:
        known = session.origin.differentiated() if is_own else None
        differentiated, (end_slope, excess_loss) = known or ([], (math.nan, math.nan))
        with session.probing():
            step_loss = StepLoss(
                start_point,
                start_point.lr,
                session,
                {1.0: loss if is_own else None},
                end_slope=end_slope,
                excess_loss=excess_loss,
                own_loss=start_point.loss,
                differentiated=differentiated,
                averaged=None if averages is None else partial(averages.swapped, is_probe=True),
                valid=1.0,
            )
            if closure is None:
                context.take_over(probed.loss, step_loss, 1.0)
            if not state.probes:
                _check_repeatability(session, probed, step_loss.evaluate(1.0), session.probe())
            measurement = context.mode.measure(step_loss)
            loss = step_loss.evaluate(1.0) if loss is None else loss
        factor = controller.rates.factor()
        decision = controller.decide(measurement, factor)
        is_reverted = decision.is_reverted
        is_used = is_reverted or not controller.note_batch(measurement.loss_start, step_loss.own_loss)
        if is_used:
            after = decision.state
    finally:
        if is_reverted:
            _revert(context, session, start_point, after)
        else:  # after an exception, too: the lazy step that it would have been without looking back
            leave()
            _step_base(context, after, loss, start_point)
    context.unfinished.drop(leave)
    context.warn_of_failure(step_loss.failure)
    return StepResult(loss, ProbeRecord.of(state, measurement, decision, factor) if is_used else None)


def _revert_failed_step(
    context: StepContext, session: Session, start_point: StartPoint, error: Exception
) -> StepResult:
    """Revert the last step if the closure fails where it ended, twice, and not where it began; else raise the error."""
    controller = context.controller
    state = controller.recall()
    context.unfinished.add(start_point.leave)
    try:
        with session.probing(), _refusing_steps(context.base_optim, context.unfinished):
            step_loss = StepLoss(start_point, start_point.lr, session, {})
            loss = step_loss.evaluate(0.0)
            measurement = context.mode.measure(step_loss)
        factor = controller.rates.factor()
        decision = controller.decide(measurement, factor)
        is_reverted = step_loss.failure is not None and decision.is_reverted
    except Exception:  # noqa: BLE001 - the closure fails where the step began, too
        is_reverted = False
    if not is_reverted:
        start_point.leave()
        context.unfinished.drop(start_point.leave)
        raise error
    context.start_point = None
    _revert(context, session, start_point, decision.state)
    context.unfinished.drop(start_point.leave)
    context.warn_of_failure(step_loss.failure)
    return StepResult(loss, ProbeRecord.of(state, measurement, decision, factor))


def _revert(context: StepContext, session: Session, start_point: StartPoint, state: RuleState) -> None:
    """Put the parameters back to where the last step began, for good, and keep the state after the step."""
    context.keep_initial_point()

    def revert() -> None:
        start_point.stay()
        session.revert_buffers()
        _remember(context, state, context.controller.rates.rates_in_force(state.lr))

    context.unfinished.do(revert)


def look_ahead_step(context: StepContext, closure: Closure | None, probed: Probed, *, searches: bool) -> StepResult:
    """Let the base optimizer propose a step, measure the loss along it, decide, and move to the learning rate chosen.

    ``closure`` evaluates the loss, with gradients, where the step begins; None if the caller has done that. If it
    ``searches``, it looks along the step for an initial learning rate, in any mode.
    """
    controller = context.controller
    session = context.session(probed)
    around = ExitStack()
    with context.unfinished.ending_with(around.close):
        around.enter_context(context.mode.around_calls())
        loss = None if closure is None else context.call(session, closure)
        state = controller.recall()
        loss_start = loss if probed.call is closure else None
        lr = state.lr
        if searches or not state.probes:
            with session.probing():
                loss_start = session.probe() if loss_start is None else loss_start
                again = session.probe()
                if not state.probes:
                    _check_repeatability(session, probed, loss_start, again)
        if searches:
            assert loss_start is not None, "it has been evaluated above"
            # If the loss is not finite, the step is the base optimizer's own, bit for bit.
            [start], _ = session.read([loss_start])
            if math.isfinite(start):
                lr = searched_lr(state.probes)
                # The first call of a closure that is not repeatable may differ from all others: every learning rate
                # would seem to lower the loss, the smallest too.
                loss_start = again
        factor = controller.rates.factor()
        factors = list(compress(controller.rates.factors(), controller.rates.shares(state.lr)))
        context.keep_initial_point()
        step = Interpolation(
            context.moving(), on_host=context.offload_copies, keeps_infinities=context.keeps_infinities()
        )
        after, is_proposed = controller.skip(), False
        taken = after.lr

        def end() -> None:
            """Write where the step ends: after an exception the lazy step, to which the base's moments belong."""
            if is_proposed:
                step.settle([taken * each / lr for each in factors])
            else:
                step.write(0.0)

        context.unfinished.add(end)
        try:
            with (
                controller.rates.in_force(controller.rates.shares(lr), context.unfinished),
                postponed_step_hooks(context.base_optim, context.unfinished) as call_step_hooks,
            ):
                context.base_optim.step()
            step.arrive()
            is_proposed = True
        except BaseException as error:
            step.write(0.0)
            if not session.ranks.keep(error):
                raise
            step.arrive()  # at its start: the other ranks count on this one for their probes

        try:
            with session.probing():
                step_loss = StepLoss(step, lr, session, {0.0: loss_start})
                if closure is None and not searches:
                    context.take_over(probed.loss, step_loss, 0.0)
                measurement = measure_initial_search(step_loss) if searches else context.mode.measure(step_loss)
                loss = step_loss.evaluate(0.0) if loss is None else loss
            decision = controller.decide(measurement, factor)
            after, taken = decision.state, decision.lr_taken
        finally:
            end()
            rates = controller.rates.rates_in_force(taken)
            if is_proposed and taken > 0.0:
                with controller.rates.in_force(rates, context.unfinished):
                    call_step_hooks()
            _remember(context, after, rates)
    context.unfinished.drop(end)
    context.warn_of_failure(step_loss.failure)
    if not (isinstance(measurement.found, Parabola) or measurement.found.is_bounded):
        warn(
            "The loss has no minimum along the first direction, or none that is closer than a step as long as the "
            "parameters. GeNOptimizer begins with a short step, and lets it grow as the loss allows. If the loss is "
            "unbounded, give lr_max."
        )
    record = ProbeRecord.of(state, measurement, decision, factor)
    return StepResult(loss, record)


def message_of_nested_step(optimizer: Optimizer) -> str:
    """What is wrong with a closure that steps the optimizer."""
    return (
        f"closure must not step the optimizer, but calls {type(optimizer).__name__}.step(): GeNOptimizer does that "
        "itself, once the closure has returned. Remove this line from the closure."
    )


@contextmanager
def _refusing_steps(base_optim: Optimizer, unfinished: Unfinished) -> Iterator[None]:
    """Refuse steps of the base optimizer inside the context."""
    handles: list[RemovableHandle] = []

    def refuse(*_: Any) -> None:
        raise RuntimeError(message_of_nested_step(base_optim))

    def allow() -> None:
        for handle in handles:
            handle.remove()

    with unfinished.ending_with(allow):
        # An optimizer that skips its parent's set-up has no hooks.
        with suppress(AttributeError):
            handles.append(base_optim.register_step_pre_hook(refuse))
        yield


def _check_repeatability(session: Session, probed: Probed, loss: Loss, loss_again: Loss) -> None:
    """Warn if two losses differ that were evaluated at the same parameters."""
    losses = [loss, loss_again]
    stored = [each for each in session.parameters() if each.is_floating_point()]  # losses may be more exact than these
    (first, again), [rounding] = session.read(losses, [session.rounding([*losses, *stored])])
    size = max(abs(first), abs(again))
    if math.isfinite(size) and abs(first - again) > max(rounding, DIFFERENT) * size:
        warn(
            f"The {probed.name} returned different losses when it was called twice at the same parameters: {first:.9g} "
            f"and {again:.9g}. GeNOptimizer takes such differences for slope and curvature, and the learning rate will "
            f"be wrong. Does the {probed.name} draw its batch or random numbers, carry a state from call to call, or "
            "step another optimizer? Do that before the step, or in it `if not optimizer.is_probing`. "
            "check_closure(optimizer, closure) finds out more."
        )


def _step_base(
    context: StepContext,
    state: RuleState,
    loss: Loss | None,
    last: StartPoint | None = None,
    *,
    keeps_start: bool = True,
) -> None:
    """Let the base optimizer step at the state's learning rate; keep where it began if the next step looks back.

    With ``keeps_start=False`` nothing is kept: steps without a closure are never measured.
    """
    if keeps_start:
        context.keep_initial_point()
    else:
        context.initial_point = None
    looks_back = keeps_start and context.mode.looks_back and context.controller.rule.is_probe_due(state)
    start_point = context.keep_start_point(state.lr, loss, last) if looks_back else None
    rates = context.controller.step_base(state.lr, context.unfinished)
    if start_point is not None:
        start_point.arrive(measures_length=context.allows_writes)
    context.start_point = start_point
    _remember(context, state, rates)


def _remember(context: StepContext, state: RuleState, used: list[float]) -> None:
    """Mark the gradients as used, and keep the state after the step."""

    def remember() -> None:
        mark_used(context.groups)
        context.controller.remember(state, used)
        if context.initial_point is not None:
            context.initial_point.arrive()

    context.unfinished.do(remember)
