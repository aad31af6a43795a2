"""Hugging Face Trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gen_optim.integrations.micro_batches import MicroBatches, unwrap
from gen_optim.optimizer import GeNOptimizer

if TYPE_CHECKING:
    from transformers import Trainer
else:
    Trainer = object

__all__ = ["GeNTrainerMixin"]


class GeNTrainerMixin(Trainer):
    """Makes a Trainer find its learning rate.

    Put it before the Trainer, or before any of its subclasses:

        class GeNTrainer(GeNTrainerMixin, Trainer): ...

    The optimizer that the Trainer makes or was given is wrapped in a :class:`~gen_optim.GeNOptimizer`, unless it is
    one. A probe calls ``training_step`` again on all micro-batches of the step, with the random streams that each saw
    and without gradients. The Trainer's schedule multiplies what GeN chooses; ``learning_rate`` in the logs is the
    learning rate of the last step, in place of the scheduler's.

    Args:
        args: The Trainer's.
        gen_options: Options of :class:`~gen_optim.GeNOptimizer`.
        kwargs: The Trainer's.

    Raises:
        TypeError: If a class is made that has the mixin after the Trainer.
        ValueError: When training begins under DeepSpeed, whose engine runs the backward pass and the step itself.
    """

    _gen_options: Mapping[str, Any]
    _gen_micro_batches: MicroBatches | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse a class in which the Trainer comes first and hides the mixin."""
        super().__init_subclass__(**kwargs)
        first = next(each for each in cls.__mro__ if "create_optimizer" in vars(each))
        if not issubclass(first, GeNTrainerMixin):
            raise TypeError(
                f"GeNTrainerMixin must come before {first.__name__} in the bases of {cls.__name__}: "
                f"class {cls.__name__}(GeNTrainerMixin, {first.__name__})"
            )

    def __init__(self, *args: Any, gen_options: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        self._gen_options = dict(gen_options or {})
        super().__init__(*args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Make the optimizer as the Trainer does, and wrap it; called whenever training begins."""
        if self.is_deepspeed_enabled:
            raise ValueError(
                "GeNTrainerMixin cannot train under DeepSpeed, whose engine runs the backward pass and the step "
                "itself. Use DistributedDataParallel, or train without the mixin."
            )
        optimizer = super().create_optimizer(*args, **kwargs)
        # On a second call of train() it is what Accelerate has made of ours.
        if not isinstance(getattr(optimizer, "optimizer", optimizer), GeNOptimizer):
            self.optimizer = GeNOptimizer(optimizer, **self._gen_options)
        if self._gen_micro_batches is None or self._gen_micro_batches.optimizer is not unwrap(self.optimizer):
            self._gen_micro_batches = MicroBatches(
                self.optimizer, is_last=lambda: self.accelerator.sync_gradients, average=False
            )
        self._gen_micro_batches.clear()  # an exception may have left some behind
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Make the scheduler as the Trainer does, attached to the GeNOptimizer itself, which looks for it."""
        optimizer = self.optimizer if optimizer is None else optimizer
        # With a scaler Accelerate replaces the step() that a scheduler watches, which would make that one warn.
        is_watched = self.accelerator.scaler is None
        return super().create_scheduler(num_training_steps, unwrap(optimizer) if is_watched else optimizer)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Forward and backward pass of a micro-batch, as the Trainer does, remembered for the probes."""
        if self._gen_micro_batches is None:
            return super().training_step(*args, **kwargs)
        return self._gen_micro_batches.evaluate(super().training_step, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as the Trainer does, with the learning rate of the last step in place of the scheduler's."""
        if "learning_rate" in logs and self._gen_micro_batches is not None:
            logs = {**logs, "learning_rate": self._gen_micro_batches.optimizer.get_last_lr()[0]}
        super().log(logs, *args, **kwargs)
