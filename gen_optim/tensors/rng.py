"""Global random number streams: torch's on each device in use, Python's and numpy's."""

from __future__ import annotations

import random
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor


class RandomStreams:
    """The state of the global random streams at construction, with torch's on ``devices`` besides the CPU."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._python = random.getstate()
        self._numpy = np.random.get_state()  # noqa: NPY002 - the global stream is what closures draw from
        self._torch = torch.get_rng_state()
        self._devices = [(device, torch.get_device_module(device).get_rng_state(*_index(device))) for device in devices]

    def restore(self) -> None:
        """Set the streams to their state at construction."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)  # noqa: NPY002
        torch.set_rng_state(self._torch)
        for device, state in self._devices:
            torch.get_device_module(device).set_rng_state(state, *_index(device))


def _index(device: torch.device) -> tuple[torch.device, ...]:
    """Return the arguments of a device module's random-state functions; those of MPS take no device."""
    return () if device.type == "mps" else (device,)


def random_devices(parameters: Iterable[Tensor]) -> set[torch.device]:
    """Return the devices besides the CPU whose random streams a closure may use: the parameters' and the GPU in use."""
    devices = {parameter.device for parameter in parameters if parameter.device.type not in ("cpu", "meta")}
    # Reading the state of a GPU that is not in use yet would initialize CUDA, which takes memory there.
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        devices.add(torch.device("cuda", torch.cuda.current_device()))
    return devices
