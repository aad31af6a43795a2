"""The peak memory of a step, and how often parameters go through its operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.cost.cases import Case
from benchmarks.cost.methods import Bare, Method, Wrapped


def memory(case: Case, method: Method) -> tuple[int, int]:
    """Returns the most bytes that one period holds beyond those held before, and those that it leaves behind.

    They are what torch's allocator hands out, by the profiler's record of it. Gradients count.

    Args:
        case: What is trained.
        method: How.
    """
    case.model.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        method.period()
        case.model.zero_grad()
    results = profiler.profiler.kineto_results
    changes = sorted((event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak, held


def extra_memory(case: Case, makers: dict[str, Callable[[], Method]], bare: Bare) -> dict[str, tuple[float, float]]:
    """Returns each method's peak above a bare step's, and what it leaves behind, in sizes of the parameters."""
    bare.period()
    plain, _ = memory(case, bare)
    found = {}
    for name, make in makers.items():
        method = make()
        method.period()
        peak, left = memory(case, method)
        found[name] = ((peak - plain) / case.bytes, left / case.bytes)
    return found


class _Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors that go into and come out of operations."""

    def __init__(self, lasting: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._lasting = lasting
        self.is_counting = True
        self.all = self.lasting = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.is_counting and not getattr(func, "is_view", False):
            seen: dict[tuple[int, int], Tensor] = {}
            for leaf in tree_leaves((args, kwargs, result)):
                if isinstance(leaf, Tensor) and leaf.numel() > 1:
                    seen[leaf.data_ptr(), leaf.numel()] = leaf
            for each in seen.values():
                size = each.numel() * each.element_size()
                self.all += size
                # A temporary of a chunk, smaller than its tensor, stays in the cache.
                self.lasting += size * (each.untyped_storage().nbytes() in self._lasting)
        return result


def traffic(case: Case, mode: str, make: Callable[[Any], Any]) -> tuple[float, float]:
    """Returns how often parameters go into or come out of operations in a period without forward passes and base steps.

    Args:
        case: What is trained.
        mode: How.
        make: Makes the base optimizer.

    Returns:
        All tensors, and without small temporaries, in sizes of the parameters.
    """
    method = Wrapped(case, make(case.parameters), mode, counts_forwards=False)
    counter = _Traffic({each.untyped_storage().nbytes() for each in case.parameters})

    def on_others(begins: bool) -> None:
        counter.is_counting = not begins

    method.on_others = on_others
    with counter:
        method.period()
    return counter.all / case.bytes, counter.lasting / case.bytes
