"""Where examples come from: a folder of real data if one is given, else what the dependencies embed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_diabetes
from torch import Tensor
from torch.nn.functional import avg_pool2d

from benchmarks import digits, text

KINDS: dict[str, tuple[tuple[str, str] | None, str]] = {
    "images": (("cifar10k.npz", "cifar"), "digits"),
    "text": (("tinyshakespeare.txt", "shakespeare"), "topics"),
    "digits": (None, "digits"),
    "tables": (None, "scikit-learn"),
    "generated": (None, "generated"),
}
"""For each kind of data: the file in the folder and its name in results, if there is one; what is used otherwise."""


@dataclass(frozen=True)
class Split:
    """Examples with their targets, for training and validation."""

    train_x: Tensor
    train_y: Tensor
    valid_x: Tensor
    valid_y: Tensor

    @property
    def train(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets for training."""
        return self.train_x, self.train_y

    @property
    def valid(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets for validation."""
        return self.valid_x, self.valid_y


@dataclass(frozen=True)
class Data:
    """Hands out data.

    Attributes:
        folder: A folder with ``cifar10k.npz`` and ``tinyshakespeare.txt``, or either; None for embedded data alone.
    """

    folder: Path | None = None

    def source(self, kind: str) -> str:
        """The name of what this kind of data comes from, as it stands in results."""
        file, otherwise = KINDS[kind]
        return file[1] if file is not None and self._path(kind) is not None else otherwise

    def images(self, seed: int) -> Split:
        """Images of ten classes, shape ``(count, channels, size, size)``, normalised.

        CIFAR's are averaged to 16 by 16 pixels, so that a run takes seconds.
        """
        path = self._path("images")
        return _digit_images(seed) if path is None else _cifar(path)

    def digits(self, seed: int) -> Split:
        """Handwritten digits, shape ``(count, 64)``, in [0, 1]."""
        return _digits(seed)

    def text(self) -> tuple[text.Text, text.Text]:
        """Running text for training and for validation."""
        return _text(self._path("text"))

    def table(self, name: str, seed: int) -> Split:
        """One of scikit-learn's embedded tables, features as they are but for one factor common to all of them.

        The factor changes no condition number; it brings the learning rates of SGD into the range of the other
        workloads.

        Args:
            name: ``"diabetes"`` (target standardised) or ``"cancer"``.
            seed: Decides which rows are for validation.
        """
        return _table(name, seed)

    def _path(self, kind: str) -> Path | None:
        file = KINDS[kind][0]
        if self.folder is None or file is None:
            return None
        path = self.folder / file[0]
        return path if path.exists() else None


@cache
def _cifar(path: Path) -> Split:
    with np.load(path) as arrays:
        pixels = {name: torch.from_numpy(arrays[name]) for name in ("X", "y", "Xt", "yt")}

    def small(images: Tensor) -> Tensor:
        return torch.cat(
            [avg_pool2d(part.permute(0, 3, 1, 2).float() / 255.0, 2) for part in torch.split(images, 1000)]
        )

    train, valid = small(pixels["X"]), small(pixels["Xt"])
    mean, deviation = train.mean((0, 2, 3), keepdim=True), train.std((0, 2, 3), keepdim=True)
    return Split((train - mean) / deviation, pixels["y"].long(), (valid - mean) / deviation, pixels["yt"].long())


@cache
def _digits(seed: int) -> Split:
    train, valid = digits.load(seed)
    return Split(train.inputs, train.targets, valid.inputs, valid.targets)


@cache
def _digit_images(seed: int) -> Split:
    split = _digits(seed)
    mean, deviation = split.train_x.mean(), split.train_x.std()
    train, valid = (((x - mean) / deviation).reshape(-1, 1, 8, 8) for x in (split.train_x, split.valid_x))
    return Split(train, split.train_y, valid, split.valid_y)


@cache
def _text(path: Path | None) -> tuple[text.Text, text.Text]:
    return text.load(path)


@cache
def _table(name: str, seed: int) -> Split:
    if name == "diabetes":
        rows, raw = load_diabetes(return_X_y=True, scaled=False)
        features, targets = torch.tensor(rows).float() / 100.0, torch.tensor(raw).float()
        targets = (targets - targets.mean()) / targets.std()
    else:
        rows, raw = load_breast_cancer(return_X_y=True)
        features, targets = torch.tensor(rows).float() / 300.0, torch.tensor(raw).float()
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
    cut = len(order) * 3 // 4
    train, valid = order[:cut], order[cut:]
    return Split(features[train], targets[train], features[valid], targets[valid])
