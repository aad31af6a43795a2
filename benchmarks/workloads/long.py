"""Workloads of the battery at ten times their length, with data that do not run out.

Images are augmented at random, and validation is on other augmentations of the same images: no batch is ever repeated,
so that overfitting decides nothing. Text and random points suffice as they are: the networks are too small to learn the
text by heart.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from benchmarks.data import Data
from benchmarks.workloads.registry import WORKLOADS, Batch, Stream, Task

_ANGLE, _SCALE, _SHIFT, _NOISE = math.pi / 12, 0.1, 0.125, 0.1
"""The largest rotation, logarithm of a scale and shift (of half of the image), and the deviation of the noise."""
_BATCHES = 30
"""Batches that give training and validation loss."""
_TRAINING_SEED, _VALIDATION_SEED = 10**6, 2 * 10**6
"""Far from the seeds of runs."""


def augmented(images: Tensor, targets: Tensor, size: int, *, flips: bool) -> Stream:
    """Returns batches of images that are rotated, scaled, shifted and overlaid with noise at random.

    Args:
        images: Shape ``(count, channels, height, width)``.
        targets: Shape ``(count,)``.
        size: Images per batch.
        flips: Whether to reflect every other image.
    """

    def stream(seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)

        def uniform(limit: float) -> Tensor:
            return limit * (2.0 * torch.rand(size, generator=generator) - 1.0)

        while True:
            chosen = torch.randint(len(images), (size,), generator=generator)
            angle, scale, across, down = uniform(_ANGLE), uniform(_SCALE).exp(), uniform(_SHIFT), uniform(_SHIFT)
            cos, sin = scale * angle.cos(), scale * angle.sin()
            if flips:
                mirror = uniform(1.0).sign()
                rows = (mirror * cos, -sin, across, mirror * sin, cos, down)
            else:
                rows = (cos, -sin, across, sin, cos, down)
            grid = affine_grid(torch.stack(rows, 1).view(size, 2, 3), list(images[chosen].shape), align_corners=False)
            moved = grid_sample(images[chosen], grid, align_corners=False)
            yield moved + _NOISE * torch.randn(moved.shape, generator=generator), targets[chosen]

    return stream


def _of_digits(data: Data, seed: int, size: int) -> Stream:
    split = data.digits(seed)
    images = torch.cat([split.train_x, split.valid_x]).view(-1, 1, 8, 8)
    stream = augmented(images, torch.cat([split.train_y, split.valid_y]), size, flips=False)
    return lambda number: ((x.clamp(0.0, 1.0).flatten(1), y) for x, y in stream(number))


def _of_images(data: Data, seed: int, size: int) -> Stream:
    split = data.images(seed)
    return augmented(*split.train, size, flips=split.train_x.shape[1] == 3)


def _with(task: Task, stream: Stream) -> Task:
    def some(seed: int) -> list[Batch]:
        return list(itertools.islice(stream(seed), _BATCHES))

    return replace(task, batches=stream, training=some(_TRAINING_SEED), validation=some(_VALIDATION_SEED))


def _digits(name: str, size: int) -> Callable[[int, Data], Task]:
    return lambda seed, data: _with(WORKLOADS[name].make(seed, data), _of_digits(data, seed, size))


def _images(name: str) -> Callable[[int, Data], Task]:
    return lambda seed, data: _with(WORKLOADS[name].make(seed, data), _of_images(data, seed, 64))


@dataclass(frozen=True)
class _Entry:
    """A long workload: the short one, its length, and what differs.

    The middle of the learning rates is where the short one is tuned. Which ones are held out was decided before the
    first run; on both of text, rules had been tried already.
    """

    name: str
    steps: int
    sgd: float
    adamw: float
    is_held_out: bool
    make: Callable[[int, Data], Task] | None = None


for _entry in (
    _Entry("digits-mlp", 4000, 0.3, 3e-2, False, _digits("digits-mlp", 64)),
    _Entry("images-cnn", 4000, 3e-2, 3e-3, False, _images("images-cnn")),
    _Entry("text-transformer", 4000, 0.3, 1e-2, False),
    _Entry("text-lstm", 4000, 1.0, 3e-2, False),
    _Entry("pinn", 6000, 1e-2, 1e-2, False),
    _Entry("digits-logistic", 4000, 1.0, 0.1, True, _digits("digits-logistic", 64)),
    _Entry("digits-autoencoder", 8000, 3e-2, 1e-2, True, _digits("digits-autoencoder", 128)),
    _Entry("vae", 6000, 3e-2, 3e-3, True, _digits("vae", 128)),
    _Entry("images-resnet", 4000, 0.1, 1e-2, True, _images("images-resnet")),
    _Entry("images-vit", 4000, 3e-2, 3e-3, True, _images("images-vit")),
):
    _short = WORKLOADS[_entry.name]
    WORKLOADS[f"long-{_entry.name}"] = replace(
        _short,
        name=f"long-{_entry.name}",
        summary=_short.summary + ("; augmented images" if _entry.make else ""),
        steps=_entry.steps,
        version=1,
        suite="long",
        make=_entry.make or _short.make,
        centres={"SGD": _entry.sgd, "AdamW": _entry.adamw},
        is_held_out=_entry.is_held_out,
    )
