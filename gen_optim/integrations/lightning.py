"""Lightning: probes without logging, hooks and metrics, and the learning rate in the logs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateFinder, LearningRateMonitor
from lightning.pytorch.core.optimizer import do_nothing_closure
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torchmetrics import Metric

from gen_optim.optimizer import GeNOptimizer
from gen_optim.tensors.rng import RandomStreams, random_devices
from gen_optim.warning import warn

__all__ = ["GeNCallback"]


class GeNCallback(Callback):
    """Lets Lightning train with a GeNOptimizer as with any other: ``Trainer(callbacks=[GeNCallback()])``.

    Lightning's closure runs ``training_step``, hooks, the backward pass and clipping. A probe runs ``training_step``
    alone, without gradients: what it passes to ``self.log`` is dropped, and metrics (of torchmetrics) that belong to
    the module are put back. With ``accumulate_grad_batches`` probes see all batches of the step. In manual optimisation
    they see the closure or probe that is given to the optimizer's ``step``.

    After each batch it logs the learning rates of the last step, one a parameter group of each GeNOptimizer, to the
    loggers and in the progress bar. ``LearningRateMonitor`` draws a scheduler's own values instead, which is warned of.

    Args:
        name: Under which name; where there are several learning rates, a slash and a number are appended.
    """

    def __init__(self, name: str = "learning_rate") -> None:
        self._name = name
        self._handles: list[RemovableHandle] = []
        self._optimizers: list[GeNOptimizer] = []
        self._devices: set[torch.device] = set()
        self._batches: list[tuple[RandomStreams, tuple[Any, ...]]] = []
        self._global_step = 0
        self._takes_index = True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what leaves no step, or no learning rate, to a GeNOptimizer.

        Raises:
            ValueError: Under DeepSpeed, whose engine runs the backward pass and the step itself; if Lightning is to
                find a learning rate.
        """
        if any(isinstance(each, LearningRateFinder) for each in trainer.callbacks):
            raise ValueError(
                "GeNCallback cannot train with Lightning's learning-rate finder (Tuner.lr_find, LearningRateFinder): "
                "it writes learning rates, which GeNOptimizer finds itself. Leave the finder out, and train from any "
                "learning rate."
            )
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            raise ValueError(
                "GeNCallback cannot train under DeepSpeed, whose engine runs the backward pass and the step itself. "
                "Use strategy='ddp', or ModelParallelStrategy with fully_shard."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the GeNOptimizers and watch their steps.

        Raises:
            ValueError: If there is none, or if ``training_step`` draws its batches itself.
        """
        self._release()
        if is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
            raise ValueError(
                "GeNCallback needs a training_step that takes a batch, but it takes a dataloader_iter, from which each "
                "probe would draw another batch; write it as training_step(self, batch, batch_idx)"
            )
        self._optimizers = [each for each in trainer.optimizers if isinstance(each, GeNOptimizer)]
        if not self._optimizers:
            raise ValueError(
                "GeNCallback needs a GeNOptimizer, but configure_optimizers returned none; wrap one there: "
                "return GeNOptimizer(torch.optim.AdamW(self.parameters()))"
            )
        is_scheduled = any("initial_lr" in group for each in self._optimizers for group in each.param_groups)
        if is_scheduled and any(isinstance(each, LearningRateMonitor) for each in trainer.callbacks):
            warn(
                "LearningRateMonitor draws the scheduler's own values, not the learning rates in force, which follow "
                f"from what GeNOptimizer finds. GeNCallback logs those, as {self._name!r}: leave the monitor out."
            )
        self._devices = random_devices(pl_module.parameters())
        self._takes_index = is_param_in_hook_signature(pl_module.training_step, "batch_idx", min_args=2)
        before_step = partial(self._before_step, trainer, pl_module)
        self._handles = [each.register_step_pre_hook(before_step) for each in self._optimizers]

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget a batch that a hook has skipped."""
        self._batches = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remember the batch until the step that it belongs to."""
        if not pl_module.automatic_optimization:
            return
        if self._global_step != trainer.global_step:
            self._batches, self._global_step = [], trainer.global_step
        arguments = (batch, batch_idx) if self._takes_index else (batch,)
        self._batches.append((RandomStreams(self._devices), arguments))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the learning rates."""
        rates = [rate for optimizer in self._optimizers for rate in optimizer.get_last_lr()]
        names = [self._name] if len(rates) == 1 else [f"{self._name}/{index}" for index in range(len(rates))]
        pl_module.log_dict(dict(zip(names, rates, strict=True)), on_step=True, on_epoch=False, prog_bar=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the optimizers as they were."""
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the optimizers as they were."""
        self._release()

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._optimizers, self._batches = [], [], []

    def _before_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Any, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """What Lightning passes to ``optimizer.step``, with closures whose probes are quiet."""
        closure: Callable[[], Any] | None = kwargs.pop("closure", None)
        probe: Callable[[], Any] | None = kwargs.pop("probe", None)
        probed: Any = closure
        if pl_module.automatic_optimization:
            # With a gradient scaler the closure has run already, and of several batches it sees the last alone.
            if closure is None or len(self._batches) > 1:
                probe = partial(self._loss, trainer, rewind=True)
            probed = partial(self._loss, trainer, rewind=False)
        elif isinstance(closure, partial):
            # Lightning's precision plugins put the user's closure last, after what their hooks need.
            probed = closure.args[-1]
            if probed is do_nothing_closure:
                closure()  # the hooks before a step
                closure = None
        if closure is not None:
            kwargs["closure"] = partial(_closure, optimizer, closure, partial(_quietly, pl_module, probed))
        if probe is not None:
            kwargs["probe"] = partial(_quietly, pl_module, probe)
        return args, kwargs

    def _loss(self, trainer: Trainer, *, rewind: bool) -> Any:
        """The loss of the step's batches."""
        losses = []
        for streams, arguments in self._batches:
            if rewind:
                streams.restore()
            output = trainer.strategy.training_step(*arguments)
            losses.append(output["loss"] if isinstance(output, Mapping) else output)
        return sum(losses[1:], losses[0]) / trainer.accumulate_grad_batches


def _closure(optimizer: GeNOptimizer, closure: Callable[[], Any], probe: Callable[[], Any]) -> Any:
    return probe() if optimizer.is_probing else closure()


def _quietly(pl_module: LightningModule, probe: Callable[[], Any]) -> Any:
    with _without_logging(pl_module), _preserving_metrics(pl_module):
        return probe()


@contextmanager
def _without_logging(pl_module: LightningModule) -> Iterator[None]:
    """Let what a module logs vanish, and skip the hooks around its backward pass."""
    replacements: dict[str, Callable[..., Any]] = {
        "log": lambda *_, **__: None,
        "manual_backward": lambda loss, *_, **__: loss.backward(),  # which does nothing in a probe
    }
    kept = {name: vars(pl_module)[name] for name in replacements if name in vars(pl_module)}
    vars(pl_module).update(replacements)
    try:
        yield
    finally:
        for name in replacements:
            del vars(pl_module)[name]
        vars(pl_module).update(kept)


_OF_A_METRIC = ("_update_count", "_computed", "_forward_cache")
"""What a metric changes when it is called, besides its states."""


@contextmanager
def _preserving_metrics(module: nn.Module) -> Iterator[None]:
    """Let calls of a module's metrics change copies of their states, and put the states back."""
    copies: dict[int, Any] = {}  # one of each state: the metrics of a collection share theirs
    kept: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for metric in (each for each in module.modules() if isinstance(each, Metric)):
        attributes = vars(metric)
        kept.append((attributes, {name: attributes[name] for name in (*metric._defaults, *_OF_A_METRIC)}))
        for name in metric._defaults:
            state = attributes[name]
            if id(state) not in copies:
                copies[id(state)] = state.clone() if isinstance(state, Tensor) else list(state)
            attributes[name] = copies[id(state)]
    try:
        yield
    finally:
        for attributes, own in kept:
            attributes.update(own)
