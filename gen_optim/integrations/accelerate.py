"""Hugging Face Accelerate: gradient accumulation, gradient scaling, and a prepared optimizer's ``step()``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gen_optim.integrations.micro_batches import MicroBatches

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["micro_batches"]


def micro_batches(accelerator: Accelerator, optimizer: Any) -> MicroBatches:
    """Let the probes of a prepared optimizer see all micro-batches of its step.

    A prepared optimizer takes no closure while it accumulates, and with a gradient scaler none at all. So the loop
    stays as it is, and the loss is computed by ``evaluate``, which takes the batch as arguments: a lambda would see
    the last batch in all of them.

    Args:
        accelerator: The accelerator that prepared the optimizer.
        optimizer: The prepared optimizer.

    Returns:
        What evaluates the loss.

    Raises:
        TypeError: If ``optimizer`` is no prepared GeNOptimizer.
        ValueError: Under DeepSpeed, whose engine runs the backward pass and the step itself.

    Example:
        >>> model, optimizer, loader = accelerator.prepare(model, optimizer, loader)  # doctest: +SKIP
        >>> losses = micro_batches(accelerator, optimizer)  # doctest: +SKIP
        >>> for inputs, targets in loader:  # doctest: +SKIP
        ...     with accelerator.accumulate(model):
        ...         loss = losses.evaluate(lambda inputs, targets: loss_fn(model(inputs), targets), inputs, targets)
        ...         accelerator.backward(loss)
        ...         optimizer.step()
        ...         optimizer.zero_grad()
    """
    if accelerator.distributed_type == "DEEPSPEED":
        raise ValueError(
            "GeNOptimizer cannot train under DeepSpeed, whose engine runs the backward pass and the step itself. Use "
            "DistributedDataParallel, or FullyShardedDataParallelPlugin(fsdp_version=2)."
        )
    return MicroBatches(optimizer, is_last=lambda: accelerator.sync_gradients)
