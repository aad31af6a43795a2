"""Handwritten digits, 8 by 8 pixels, and a small network that tells them apart."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from benchmarks.repeatable import seeded

CLASSES = 10
BRIGHTEST = 16.0  # pixels are whole numbers from 0 to 16


@dataclass(frozen=True)
class Images:
    """Images with their labels.

    Attributes:
        inputs: Pixels in [0, 1], shape ``(count, 64)``, float32.
        targets: Digits, shape ``(count,)``, int64.
    """

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)


def load(seed: int) -> tuple[Images, Images]:
    """Returns three quarters of the images for training and the rest for validation.

    The images come with scikit-learn, so that nothing is downloaded. Each digit has the same share
    of both parts.

    Args:
        seed: Decides which image goes where.
    """
    data = load_digits()
    train_x, valid_x, train_y, valid_y = train_test_split(
        data.data, data.target, test_size=0.25, stratify=data.target, random_state=seed
    )

    def images(pixels: object, labels: object) -> Images:
        return Images(
            torch.as_tensor(pixels, dtype=torch.float32) / BRIGHTEST,
            torch.as_tensor(labels, dtype=torch.int64),
        )

    return images(train_x, train_y), images(valid_x, valid_y)


def batches(images: Images, size: int, seed: int) -> Iterator[Images]:
    """Yields batches for ever, each pass over the images in a new order.

    Args:
        images: What to draw from.
        size: Images in a batch. A pass drops what does not fill one.
        seed: Decides the orders; the same seed gives the same batches.

    Raises:
        ValueError: If there are fewer images than a batch needs.
    """
    if not 1 <= size <= len(images):
        raise ValueError(f"batch size must be between 1 and {len(images)}, but is {size}")
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(images), generator=generator)
        for start in range(0, len(images) - size + 1, size):
            chosen = order[start : start + size]
            yield Images(images.inputs[chosen], images.targets[chosen])


def network(seed: int) -> nn.Module:
    """Returns a network with two hidden layers; the same seed gives the same weights.

    Args:
        seed: Decides the initial weights. The global random stream stays as it was.
    """
    return seeded(
        lambda: nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, CLASSES)),
        seed,
    )
