"""Handwritten digits: classifiers, an autoencoder, a variational autoencoder."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss

from benchmarks.data import CLASSES, Data, Split
from benchmarks.determinism import seeded
from benchmarks.workloads.registry import TRAINING_SAMPLE, Task, chunks, classification, shuffled, workload

PIXELS = 64


def digit_network(seed: int) -> nn.Module:
    """Returns a network with two hidden layers; the same seed gives the same weights."""
    return seeded(
        lambda: nn.Sequential(
            *(nn.Linear(PIXELS, 128), nn.ReLU()), *(nn.Linear(128, 128), nn.ReLU()), nn.Linear(128, CLASSES)
        ),
        seed,
    )


def digit_classifier(model: nn.Module, split: Split, *, batch_size: int = 64) -> Task:
    """Returns the task of classifying digits.

    Args:
        model: Maps images to a score for each digit.
        split: The digits.
        batch_size: Images per batch.
    """
    return Task(
        model=model,
        loss=classification,
        batches=shuffled(split.train, batch_size),
        training=chunks(split.train, TRAINING_SAMPLE),
        validation=chunks(split.valid),
    )


@workload(family="digits", summary="multinomial logistic regression, 64-10, batch 64", steps=400, data="digits")
def digits_logistic(seed: int, data: Data) -> Task:
    """A convex problem with noise in the gradient."""
    return digit_classifier(seeded(lambda: nn.Linear(PIXELS, CLASSES), seed), data.digits(seed))


@workload(family="digits", summary="ReLU network 64-128-128-10, batch 64", steps=400, data="digits")
def digits_mlp(seed: int, data: Data) -> Task:
    """The network of the main job."""
    return digit_classifier(digit_network(seed), data.digits(seed))


@workload(
    family="digits",
    summary="2 × (conv, BatchNorm, ReLU, pool), 16 and 32 channels, batch 64",
    steps=300,
    data="digits",
    suite="study",
)
def digits_cnn(seed: int, data: Data) -> Task:
    """The digits as pictures, and batch normalisation."""
    split = data.digits(seed)
    train_x, valid_x = (images.reshape(-1, 1, 8, 8) for images in (split.train_x, split.valid_x))
    model = seeded(
        lambda: nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(128, CLASSES)),
        ),
        seed,
    )
    return digit_classifier(model, Split(train_x, split.train_y, valid_x, split.valid_y))


@workload(
    family="digits",
    summary="tanh autoencoder 64-48-24-8-24-48-64, squared error summed over pixels, batch 128",
    steps=800,
    data="digits",
)
def digits_autoencoder(seed: int, data: Data) -> Task:
    """Deep and narrow: long valleys."""
    sizes = (PIXELS, 48, 24, 8, 24, 48, PIXELS)

    def make() -> nn.Module:
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(sizes):
            layers += [nn.Linear(fan_in, fan_out), nn.Tanh()]
        return nn.Sequential(*layers[:-1])

    split = data.digits(seed)
    return Task(
        model=seeded(make, seed),
        loss=lambda model, batch: PIXELS * mse_loss(model(batch[0]), batch[0]),
        batches=shuffled(split.train[:1], 128),
        training=chunks(split.train[:1], TRAINING_SAMPLE),
        validation=chunks(split.valid[:1]),
    )


class VariationalAutoencoder(nn.Module):
    """Gaussian codes, Bernoulli pixels; its output is the negative evidence lower bound, averaged over images."""

    def __init__(self, width: int = 64, codes: int = 8) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(PIXELS, width), nn.ReLU(), nn.Linear(width, 2 * codes))
        self.decoder = nn.Sequential(nn.Linear(codes, width), nn.ReLU(), nn.Linear(width, PIXELS))

    def forward(self, images: Tensor) -> Tensor:
        """Returns the loss on images, with fresh noise from the global stream."""
        mean, log_variance = self.encoder(images).chunk(2, dim=1)
        code = mean + torch.randn_like(mean) * torch.exp(0.5 * log_variance)
        reconstruction = binary_cross_entropy_with_logits(self.decoder(code), images, reduction="sum")
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).sum()
        loss: Tensor = (reconstruction + divergence) / len(images)
        return loss


@workload(
    family="generative",
    summary="variational autoencoder of digits, 8 codes, batch 128; noise in the loss",
    steps=600,
    data="digits",
)
def vae(seed: int, data: Data) -> Task:
    """The loss falls fastest at learning rates that make the network ignore its codes."""
    split = data.digits(seed)
    return Task(
        model=seeded(VariationalAutoencoder, seed),
        loss=lambda model, batch: torch.as_tensor(model(batch[0])),
        batches=shuffled(split.train[:1], 128),
        training=chunks(split.train[:1], TRAINING_SAMPLE),
        validation=chunks(split.valid[:1]),
    )
