"""The micro-batches of a step, for frameworks that accumulate gradients themselves and then call ``step()`` bare."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gen_optim.closures.losses import Loss, check_loss, copied
from gen_optim.optimizer import GeNOptimizer
from gen_optim.tensors.rng import RandomStreams, random_devices

__all__ = ["MicroBatches", "unwrap"]


def unwrap(optimizer: Any) -> GeNOptimizer:
    """The GeNOptimizer inside of what a framework has wrapped around it.

    Raises:
        TypeError: If there is none.
    """
    inner = optimizer
    while inner is not None:
        if isinstance(inner, GeNOptimizer):
            return inner
        inner = getattr(inner, "optimizer", None)
    raise TypeError(
        f"optimizer must be a GeNOptimizer or a framework's wrapper around one, got {type(optimizer).__name__}; "
        "wrap it before it is prepared: GeNOptimizer(optimizer)"
    )


class MicroBatches:
    """Evaluates the loss of each micro-batch, and in probes that of all micro-batches of the step once more.

    It hands the optimizer a closure at every step. The loss where the step begins is that of the passes with gradients,
    so that a lazy step costs nothing; probes call the same functions again with the same arguments on the same random
    streams, without gradients.

    Args:
        optimizer: The GeNOptimizer, or what a framework has wrapped around it. The attribute of that name is the
            GeNOptimizer.
        is_last: Says of the micro-batch being evaluated whether the optimizer steps after it.
        average: Whether the loss of the step is the mean over its micro-batches, or their sum, where each has been
            scaled to its share already.
    """

    def __init__(self, optimizer: Any, *, is_last: Callable[[], bool], average: bool = True) -> None:
        self.optimizer = unwrap(optimizer)
        self._is_last, self._average = is_last, average
        self._devices = random_devices(each for group in self.optimizer.param_groups for each in group["params"])
        self._calls: list[tuple[RandomStreams, Callable[[], Any]]] = []
        self._losses: list[Loss] = []
        self._is_complete = False
        # Handed over at each step, since a bare step at a learning rate of 0 (the first of a warm-up) calls none.
        self.optimizer.register_step_pre_hook(self._give_closure)
        self.optimizer.register_step_post_hook(lambda *_: self.clear())
        # Where there is no loss to hand over this one raises.
        self.optimizer.closure = self._loss

    def evaluate(self, loss_of: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return ``loss_of(*args, **kwargs)``, and remember the call for the probes of this step.

        Raises:
            TypeError: If it returns no loss.
        """
        if self._is_complete:  # a gradient scaler has skipped the step
            self.clear()
        streams = RandomStreams(self._devices)
        loss = loss_of(*args, **kwargs)
        kept = copied(check_loss(loss, "loss_of"))
        self._calls.append((streams, lambda: loss_of(*args, **kwargs)))
        self._losses.append(kept)
        self._is_complete = self._is_last()
        return loss

    def clear(self) -> None:
        """Forget the micro-batches of a step that is not going to be taken."""
        self._calls, self._losses, self._is_complete = [], [], False

    def _give_closure(self, optimizer: Any, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        return (args[:1], {**kwargs, "closure": self._loss}) if self._calls else None

    def _loss(self) -> Loss:
        """The optimizer's closure: the gradients have been computed."""
        if not self._calls:
            raise RuntimeError(
                "step() must follow the loss of at least one micro-batch, but none was evaluated: compute the loss by "
                "evaluate(loss_of, inputs, ...) before each backward pass"
            )
        losses = self._losses
        if self.optimizer.is_probing:
            losses = []
            for streams, call in self._calls:
                streams.restore()
                losses.append(check_loss(call(), "loss_of"))
        return sum(losses[1:], losses[0]) / (len(losses) if self._average else 1)
