"""Data sets, from a folder of downloaded files if one is given and otherwise from what installed packages contain."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from pydoc_data import topics

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn.functional import avg_pool2d

KINDS: dict[str, tuple[tuple[str, str] | None, str]] = {
    "images": (("cifar10k.npz", "cifar"), "digits"),
    "text": (("tinyshakespeare.txt", "shakespeare"), "topics"),
    "digits": (None, "digits"),
    "tables": (None, "scikit-learn"),
    "generated": (None, "generated"),
}
"""For each kind of data: the file in the folder with its name in results, if there is one, and the name otherwise."""

CLASSES = 10
"""Of the digits and of the images."""
_BRIGHTEST_PIXEL = 16.0


@dataclass(frozen=True)
class Split:
    """Examples with their targets, for training and for validation."""

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
class Text:
    """A text as numbers.

    Attributes:
        characters: One number per character, shape ``(length,)``, int64.
        alphabet: The number of distinct characters.
    """

    characters: Tensor
    alphabet: int


@dataclass(frozen=True)
class Data:
    """Loads data sets.

    Attributes:
        folder: A folder with ``cifar10k.npz`` and ``tinyshakespeare.txt``, or either; None for embedded data alone.
    """

    folder: Path | None = None

    def source(self, kind: str) -> str:
        """Returns the name of the data set that is used for a kind of data, as results have it."""
        file, otherwise = KINDS[kind]
        return file[1] if file is not None and self._path(kind) is not None else otherwise

    def images(self, seed: int) -> Split:
        """Returns images of ten classes, shape ``(count, channels, size, size)``, normalised.

        CIFAR's are averaged to 16 by 16 pixels, so that a run takes seconds.
        """
        path = self._path("images")
        return _digit_images(seed) if path is None else _cifar(path)

    def digits(self, seed: int) -> Split:
        """Returns handwritten digits, 8 by 8 pixels in [0, 1], shape ``(count, 64)``.

        Three quarters are for training. Each digit has the same share of both parts.

        Args:
            seed: Decides which image goes into which part.
        """
        return _digits(seed)

    def text(self) -> tuple[Text, Text]:
        """Returns the first nine tenths of a text for training and the rest for validation."""
        return _text(self._path("text"))

    def table(self, name: str, seed: int) -> Split:
        """Returns one of scikit-learn's embedded tables, its features unscaled but for one common factor.

        The factor changes no condition number. It brings the learning rates of SGD into the range of the other
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
    data = load_digits()
    train_x, valid_x, train_y, valid_y = train_test_split(
        data.data, data.target, test_size=0.25, stratify=data.target, random_state=seed
    )

    def images(pixels: object) -> Tensor:
        return torch.as_tensor(pixels, dtype=torch.float32) / _BRIGHTEST_PIXEL

    def labels(numbers: object) -> Tensor:
        return torch.as_tensor(numbers, dtype=torch.int64)

    return Split(images(train_x), labels(train_y), images(valid_x), labels(valid_y))


@cache
def _digit_images(seed: int) -> Split:
    split = _digits(seed)
    mean, deviation = split.train_x.mean(), split.train_x.std()
    train, valid = (((x - mean) / deviation).reshape(-1, 1, 8, 8) for x in (split.train_x, split.valid_x))
    return Split(train, split.train_y, valid, split.valid_y)


@cache
def _text(path: Path | None) -> tuple[Text, Text]:
    # Python's own help texts, if there is no file.
    text = "".join(topics.topics[name] for name in sorted(topics.topics)) if path is None else path.read_text("utf-8")
    alphabet = {character: number for number, character in enumerate(sorted(set(text)))}
    characters = torch.tensor([alphabet[character] for character in text])
    cut = len(characters) * 9 // 10
    return Text(characters[:cut], len(alphabet)), Text(characters[cut:], len(alphabet))


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
