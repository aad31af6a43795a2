"""GeNOptimizer: the lifecycle of a step, and checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain, compress
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.optim import Optimizer

from gen_optim.closures.gradients import GradientMark, GradientOrigin, complete_gradients
from gen_optim.closures.interception import around_backward, watch
from gen_optim.closures.losses import Closure, Loss, check_callable, rounding_of
from gen_optim.closures.modules import check_twice_differentiable
from gen_optim.closures.session import Evaluator, Session
from gen_optim.compatibility import check_wrappable
from gen_optim.distributed import Ranks, ranks_of
from gen_optim.measurement.interpolation import Move
from gen_optim.measurement.lookahead import MODES, Line, Measurement, check_mode, check_tolerance, search, searched_lr
from gen_optim.measurement.lookback import KeptPoint, look_back
from gen_optim.remembering import RememberingOptimizer
from gen_optim.rules import make_rule
from gen_optim.rules.base import ControlState
from gen_optim.tensors.dtensor import whole

__all__ = ["GeNOptimizer"]


class GeNOptimizer(RememberingOptimizer):
    r"""Finds the learning rate of any optimizer while training, by the generalized Newton's method.

    The base optimizer proposes a step from θ to θ − αω. Along it the loss is modelled as a parabola,

    .. math:: L(\theta - \alpha\omega) \approx L(\theta) - \text{slope}\,\alpha + \tfrac12\,\text{curvature}\,\alpha^2,

    whose lowest point, slope / curvature, is where the learning rate is led (Bu and Xu, "Gradient descent with
    generalized Newton's method", ICLR 2025, arXiv:2407.02772).

    A probe step, one in ``period`` for the most part, looks back at the step before:

    1. The closure is called once, with gradients. It evaluates the loss where the last step has led, on a new batch,
       and its gradients times that step are the slope there.
    2. The parameters are put where the last step began, and the loss is evaluated there on the same batch and the same
       dropout masks, without gradients.
    3. The numbers are averaged over the processes that train the model together, and read, all at once.
    4. A parabola is fitted and judged, and the learning rate chosen.
    5. The parameters are put back, and the base optimizer steps once, at that learning rate and the scheduler's factor.
       A step that has led far up is taken back instead.
    6. Gradients, buffers, grad mode and random streams are as after 1, whatever happened in between. After an exception
       in a probe the step is taken at the last learning rate (that given, where a start is still to be found), and the
       exception raised again.

    With ``mode="approximate"`` or ``"exact"`` it looks ahead: the base optimizer steps once after 1, the loss is
    measured along that step on the batch of the gradients, and the multiple that is called for is written.

    Every other step is lazy: the base optimizer's step at the last learning rate, and nothing else (before a step that
    looks back it keeps a copy of the parameters).

    The wrapper shares ``param_groups``, ``state`` and ``defaults`` with the base optimizer. Learning-rate schedulers
    attach to it as to any optimizer, and their factor multiplies what GeN chooses. Writing ``param_groups[i]["lr"]``
    by hand sets the learning rate there.

    Args:
        base_optim: The optimizer that proposes the direction; its update must be proportional to its learning rate.
            The learning rates given to its groups count only by their ratios (with ``rule="published"`` and ``"cdat"``
            also as the start); a group at 0 is frozen.
        closure: Called by :meth:`step` where that is given none; for frameworks that call ``step()`` bare.
        probe: Likewise for the ``probe`` of :meth:`step`.
        mode: How slope and curvature are measured. ``"lookback"``: along the step before, on a batch that it was not
            made for, at one forward pass; at two (from three losses) where the gradients are not those of the loss
            (clipped, scaled or penalised in the closure, or the caller's), three where a ``probe`` is given.
            ``"approximate"``: from the losses at −α, 0 and +α. ``"exact"``: by differentiating the closure's loss
            twice, which costs a second forward pass with its backward pass and a double backward pass. Both measure on
            the gradient's own batch, and are for ``rule="published"``, unless a ``probe`` evaluates another one.
        rule: How the learning rate is chosen from them. ``"relaxed"``: a multiple of mean slope / mean curvature, from
            a start found in the loss itself, which asks for measurements on another batch than the gradient's: looking
            back, or a ``probe`` on one (see ``gen_optim.rules.relaxed``). ``"published"``: as published,
            with ``mode="approximate"``. ``"cdat"``: that of arXiv:2407.06183, to compare with. Options below that
            belong to one rule alone say so.
        period: A probe step every ``period`` steps; with ``"relaxed"`` at every step where it asks for that.
        smoothing: Weight of what was averaged before, in [0, 1).
        max_change: Factor by which the learning rate is cut where steps go astray; with ``rule="published"``, by which
            an optimum may count above or below the present learning rate.
        lr_min: Lower limit of the learning rate of the first unfrozen group.
        lr_max: Upper limit of the learning rate of the first unfrozen group.
        start_fraction: Fraction of the first direction's best learning rate at which training begins (``"relaxed"``).
        burn_in: Number of probe steps at the beginning that follow each other at every step (``"relaxed"``).
        relaxation: Multiple of mean slope / mean curvature that is aimed at, in [1, 2) (``"relaxed"``).
        explosion: A loss above the first one, and above the moving average of losses by this many times their mean
            absolute deviation, has exploded, and the learning rate is cut (``"relaxed"``).
        tolerance: Relative rounding error of a loss, in machine epsilons of its dtype (in sixteenths of those where the
            loss, or what autocast computes it from, is of half precision). A slope or curvature that this alone can
            produce is taken as unknown (``"relaxed"``).
        offload_copies: Whether the copies of the parameters that measuring needs are kept in the host's memory (pinned
            where parameters are on a CUDA device) and not next to the parameters: for models that nearly fill their
            device. Probe steps then wait for the copies to be sent there and back.
        process_group: The processes over which measured losses are averaged, so that all choose the same learning
            rate. By default those of the DistributedDataParallel module to which the parameters belong, and those over
            which parameters are spread that are DTensors (``fully_shard``, tensor parallel). A
            ``torch.distributed.ProcessGroup`` where gradients are averaged in another way; ``"local"`` where each
            process trains a model of its own. Copies and pickles do not keep a group.

    Raises:
        TypeError: If ``base_optim`` is no optimizer, another GeNOptimizer, or one that requires a closure; if
            ``closure`` or ``probe`` cannot be called; if ``process_group`` is none of the above.
        ValueError: If the base optimizer's update is not proportional to its learning rate, or an option is out of
            range; if parameters are spread over processes that ``process_group`` leaves out.
        RuntimeError: If ``mode="exact"`` and the parameters belong to a module sharded by ``fully_shard``.

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
        process_group: The option of that name.
        offload_copies: The option of that name; may be set at any time.
    """

    closure: Closure | None
    probe: Closure | None
    process_group: dist.ProcessGroup | Literal["local"] | None

    def __init__(
        self,
        base_optim: Optimizer,
        closure: Closure | None = None,
        *,
        probe: Closure | None = None,
        mode: str = "lookback",
        rule: str = "relaxed",
        period: int = 8,
        smoothing: float = 0.9,
        max_change: float = 2.0,
        lr_min: float = 0.0,
        lr_max: float = math.inf,
        start_fraction: float = 0.03,
        burn_in: int = 50,
        relaxation: float = 1.8,
        explosion: float = 10.0,
        tolerance: float = 8.0,
        offload_copies: bool = False,
        process_group: dist.ProcessGroup | Literal["local"] | None = None,
    ) -> None:
        if isinstance(base_optim, GeNOptimizer):
            raise TypeError("base_optim must be the optimizer to wrap, got another GeNOptimizer; wrap its base_optim")
        check_wrappable(base_optim)
        check_mode(mode)
        chosen_rule = make_rule(
            rule,
            period=period,
            smoothing=smoothing,
            max_change=max_change,
            lr_min=lr_min,
            lr_max=lr_max,
            start_fraction=start_fraction,
            burn_in=burn_in,
            explosion=explosion,
            relaxation=relaxation,
        )
        super().__init__(base_optim, chosen_rule, rule, mode, offload_copies=offload_copies)
        self._set_up()
        self._tolerance = check_tolerance(tolerance)
        self.closure = check_callable("closure", closure)
        self.probe = check_callable("probe", probe)
        self.process_group = process_group
        parameters = list(chain.from_iterable(group["params"] for group in base_optim.param_groups))
        ranks_of(process_group, parameters)
        if mode == "exact":
            check_twice_differentiable(parameters)
        self._recall()

    @property
    def is_probing(self) -> bool:
        """Whether a probe runs right now, so that a closure can skip its logging and metrics."""
        return self._evaluator.is_probing

    # --- the step ------------------------------------------------------------------------------------------------

    def step(self, closure: Closure | None = None, *, probe: Closure | None = None) -> Loss | None:  # type: ignore[override]
        """Take one step.

        With neither ``closure`` nor ``probe``, here or given to the constructor, it is the base optimizer's step at the
        present learning rate, and nothing is measured.

        Args:
            closure: Evaluates the loss and returns it. It is called once with gradients enabled. It may zero the
                gradients and call ``backward()``, or leave that to the optimizer. On probe steps it is called again
                without gradients, where ``backward()`` does nothing.
            probe: Evaluates the loss without gradients, for loops that have called ``backward()`` themselves; called
                on probe steps alone, for the loss at 0 too. Next to a ``closure`` it is what gets probed.

        Returns:
            The loss where the step began; None where it was not evaluated.

        Raises:
            TypeError: If ``closure`` or ``probe`` cannot be called, or returns no loss.
            ValueError: If somebody wrote a learning rate that is negative or not finite.
            RuntimeError: Under ``torch.inference_mode()``; where a probe step failed on another process.

        Warns:
            UserWarning: If the first ten steps had neither. If ten times in a row a start has failed, a probe was due
                but there was nothing to look back at, or somebody wrote a learning rate by hand.

        Example:
            >>> weight = torch.nn.Parameter(torch.tensor([3.0]))
            >>> optimizer = GeNOptimizer(torch.optim.SGD([weight]))
            >>> optimizer.step(lambda: (weight**2).sum())  # calls backward() itself
            tensor(9., grad_fn=<CloneBackward0>)
            >>> weight.grad = 2.0 * weight.detach()
            >>> optimizer.step(probe=lambda: (weight**2).sum())  # for gradients that are there; None: it was lazy
        """
        if torch.is_inference_mode_enabled():
            raise RuntimeError("step() needs gradients: call it outside of torch.inference_mode()")
        groups = self.param_groups
        if closure is None and probe is None and self._rates.all_zero(groups):
            # Asked for nothing but the base optimizer's state, as distributed checkpoints do before they load.
            self.step_base()
            return None
        closure = check_callable("closure", self.closure if closure is None else closure)
        probe = check_callable("probe", self.probe if probe is None else probe)
        probed = closure if probe is None else probe
        state = self._recall()
        if probed is None:
            self._warn_of_bare_steps(state)
        if probed is None or not self._rule.is_probe_due(state) or not any(self._rates.shares(groups, state.lr)):
            return self._lazy_step(state, closure, looks_back=probed is not None)
        measure = search if self._rule.needs_start(state) else MODES[self._mode].measure
        if measure is not None:
            return self._probe_step(state, closure, probed, measure)
        kept = self._pending()
        return self._look_back_step(state, closure, probed, kept) if kept else self._lazy_step(state, closure)

    def _lazy_step(self, state: ControlState, closure: Closure | None, *, looks_back: bool = True) -> Loss | None:
        loss = None if closure is None else self._call(closure)
        state = self._reconsider(state)
        self._advance(self._rule.skip(state), looks_back=looks_back)
        return loss

    def _look_back_step(
        self, state: ControlState, closure: Closure | None, probed: Closure, kept: KeptPoint
    ) -> Loss | None:
        caller = "closure" if probed is closure else "probe"
        session, ranks, probe = self._begin(probed, caller, state)
        origin = GradientOrigin(self.param_groups)
        with around_backward(origin.around_backward):
            loss = None if closure is None else self._first(session, closure, ranks, origin)
        state = self._reconsider(state)
        self._kept = None  # it serves once, but a closure that fails may be called again
        end = loss if probed is closure else None
        after, is_done = self._rule.skip(state), False
        try:
            gradient_of = origin.differentiated() if probed is closure else None
            rise = None if gradient_of is None else kept.rise()
            with session.probing():
                measurement = look_back(
                    kept,
                    end,
                    gradient_of=gradient_of,
                    rise=rise,
                    call=lambda: ranks.attempt(probe, instead=math.nan),
                    read=partial(self._read, ranks),
                    rounding=lambda losses: self._tolerance * rounding_of(losses, session.computed_in),
                    is_alone=len(ranks) == 1,
                )
            factor = self._rates.factor(self.param_groups)
            decision = self._rule.decide(
                state, measurement.loss, measurement.found, factor=factor, arrival=measurement.arrival
            )
            after, is_done = decision.state, decision.takes_back
        finally:
            # After an exception in a probe this is the lazy step, as it would have been without looking back.
            if is_done:
                kept.stay()
                session.take_back()
                self._remember(after, self._rates_in_force(after.lr))
            else:
                kept.leave()
                self._advance(after, kept)
        self._report(state, measurement, decision, factor)
        return measurement.raw if loss is None else loss

    def _probe_step(
        self,
        state: ControlState,
        closure: Closure | None,
        probed: Closure,
        measure: Callable[[Line], Measurement],
    ) -> Loss | None:
        groups = self.param_groups
        caller = "closure" if probed is closure else "probe"
        session, ranks, probe = self._begin(probed, caller, state)
        with MODES[self._mode].kernels():
            loss = None if closure is None else self._first(session, closure, ranks)
            state = self._reconsider(state)
            here = loss if probed is closure else None
            lr = state.lr
            if measure is search:
                if here is None:
                    with session.probing():
                        here = ranks.attempt(probe, instead=math.nan)
                # A loss that is not finite asks for the base optimizer's own step, bit for bit.
                lr = searched_lr(state.probes) if math.isfinite(self._read(ranks, [here])[0]) else state.lr
            factor = self._rates.factor(groups)
            factors = list(compress(self._rates.factors(groups), self._rates.shares(groups, state.lr)))
            move = Move(self._moving(), on_host=self.offload_copies)
            after, is_proposed = self._rule.skip(state), False
            try:
                with self._rates.in_force(groups, self._rates.shares(groups, lr)):
                    self.propose()
                move.arrive()
                is_proposed = True
            except BaseException as error:
                move.cancel()
                if not ranks.keep(error):
                    raise
                move.arrive()  # where it began: the others count on this rank for their probes

            taken = after.lr
            try:
                with session.probing():
                    line = Line(
                        move,
                        lr,
                        here=here,
                        call=probe,
                        call_with_graph=lambda: whole(session.differentiable(probed, caller)),
                        ranks=ranks,
                        read=partial(self._read, ranks),
                        tolerance=self._tolerance,
                        computed_in=session.computed_in,
                    )
                    measurement = measure(line)
                decision = self._rule.decide(state, measurement.loss, measurement.found, factor=factor)
                after, taken = decision.state, decision.taken_lr
            finally:
                # After an exception in a probe this is the lazy step, to which the base's moments belong.
                move.settle([taken * each / lr for each in factors])
                rates = self._rates_in_force(taken)
                if is_proposed and taken > 0.0:
                    with self._rates.in_force(groups, rates):
                        self.call_post_hooks()
                self._remember(after, rates)
        self._report(state, measurement, decision, factor)
        return measurement.raw if loss is None else loss

    def _begin(self, probed: Closure, caller: str, state: ControlState) -> tuple[Session, Ranks, Callable[[], Loss]]:
        """What a step that measures needs: the session, the ranks that take part, and how to evaluate the loss."""
        everything = list(chain.from_iterable(group["params"] for group in self.param_groups))
        session = self._evaluator.session(everything)
        ranks = ranks_of(self.process_group, everything, self._evaluator.owners(everything), warns=not state.probes)
        return session, ranks, lambda: whole(session.probe(probed, caller))

    def _first(self, session: Session, closure: Closure, ranks: Ranks, origin: GradientOrigin | None = None) -> Loss:
        first = partial(session.first, lambda: whole(self._call(closure, origin)))
        return ranks.attempt(first, instead=math.nan, went_backward=lambda: watch.went_backward)

    def _call(self, closure: Closure, origin: GradientOrigin | None = None) -> Loss:
        before = GradientMark.of(self.param_groups)
        loss, went_backward = self._evaluator.call(closure)
        if not went_backward and complete_gradients(self.param_groups, loss, before) and origin is not None:
            origin.note(loss)
        return loss

    def _read(self, ranks: Ranks, losses: Sequence[Loss]) -> list[float]:
        """Losses as numbers, to be minimised, averaged over the ranks."""
        sign = -1.0 if self.param_groups[0].get("maximize") else 1.0
        return [sign * loss for loss in ranks.mean(losses)]

    # --- copies and pickles --------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles keep: not the closures, nor a process group."""
        dropped = ("closure", "probe", "_evaluator")
        kept = {name: value for name, value in super().__getstate__().items() if name not in dropped}
        return kept if self.process_group == "local" else {**kept, "process_group": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore what was kept, and set up the rest."""
        super().__setstate__(state)
        if "_evaluator" not in self.__dict__:
            self._set_up()

    def _set_up(self) -> None:
        self.closure = self.probe = None
        self._evaluator = Evaluator()
