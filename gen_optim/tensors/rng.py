"""The global random streams: torch's of every device in use, Python's and numpy's."""

from __future__ import annotations

import random
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

__all__ = ["RandomStreams", "random_devices"]


class RandomStreams:
    """The state of every global random stream, taken at construction.

    Args:
        devices: Those besides the CPU.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._python = random.getstate()
        self._numpy = np.random.get_state()  # noqa: NPY002 - the global stream is what closures draw from
        self._torch = torch.get_rng_state()
        self._devices = [(device, torch.get_device_module(device).get_rng_state(*_index(device))) for device in devices]

    def restore(self) -> None:
        """Put the streams back to where they were."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)  # noqa: NPY002
        torch.set_rng_state(self._torch)
        for device, state in self._devices:
            torch.get_device_module(device).set_rng_state(state, *_index(device))


def _index(device: torch.device) -> tuple[torch.device, ...]:
    """What the random-state functions of a device's module take; the one for MPS knows a single device."""
    return () if device.type == "mps" else (device,)


def random_devices(parameters: Iterable[Tensor]) -> set[torch.device]:
    """The devices besides the CPU whose random stream a closure may draw from."""
    devices = {parameter.device for parameter in parameters if parameter.device.type not in ("cpu", "meta")}
    # Not asked for where nothing has used it yet: that alone would take up memory there.
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        devices.add(torch.device("cuda", torch.cuda.current_device()))
    return devices
