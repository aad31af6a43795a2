"""Images of ten classes: a convolutional network, a residual network, a vision transformer."""

from __future__ import annotations

from torch import Tensor, nn, zeros
from torch.nn.functional import relu

from benchmarks.data import CLASSES, Data
from benchmarks.determinism import seeded
from benchmarks.workloads.registry import TRAINING_SAMPLE, Task, chunks, classification, shuffled, workload


def _classifier(make: type[nn.Module], data: Data, seed: int) -> Task:
    """``make(channels, size)`` on the images."""
    split = data.images(seed)
    _, channels, size, _ = split.train_x.shape
    return Task(
        model=seeded(lambda: make(channels, size), seed),
        loss=classification,
        batches=shuffled(split.train, 64),
        training=chunks(split.train, TRAINING_SAMPLE),
        validation=chunks(split.valid),
    )


class ConvolutionalNetwork(nn.Module):
    """Three times convolution, batch normalisation, ReLU; pooling in between."""

    def __init__(self, channels: int, size: int, width: int = 16) -> None:
        super().__init__()
        widths = (channels, width, 2 * width, 4 * width)
        layers: list[nn.Module] = []
        for number in range(3):
            layers += [
                nn.Conv2d(widths[number], widths[number + 1], 3, padding=1),
                nn.BatchNorm2d(widths[number + 1]),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ]
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(widths[3] * (size // 8) ** 2, CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        """Returns the scores of the classes."""
        scores: Tensor = self.layers(images)
        return scores


class Residual(nn.Module):
    """Two convolutions beside an identity, normalised before."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(4, width), nn.GroupNorm(4, width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        """Returns features of the same shape."""
        inner = self.conv1(relu(self.norm1(features)))
        outer: Tensor = features + self.conv2(relu(self.norm2(inner)))
        return outer


class ResidualNetwork(nn.Module):
    """Three residual blocks with group normalisation, halving the image in between."""

    def __init__(self, channels: int, size: int, width: int = 8) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            Residual(width),
            nn.Conv2d(width, 2 * width, 3, padding=1, stride=2),
            Residual(2 * width),
            nn.Conv2d(2 * width, 4 * width, 3, padding=1, stride=2),
            Residual(4 * width),
            nn.ReLU(),
            nn.AvgPool2d(size // 4),
            nn.Flatten(),
            nn.Linear(4 * width, CLASSES),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Returns the scores of the classes."""
        scores: Tensor = self.layers(images)
        return scores


class VisionTransformer(nn.Module):
    """Sixteen patches, two pre-norm blocks, averaged."""

    def __init__(self, channels: int, size: int, width: int = 48) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, width, size // 4, size // 4)
        self.positions = nn.Parameter(zeros(1, 16, width))
        nn.init.normal_(self.positions, std=0.02)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, activation="gelu", batch_first=True, norm_first=True)
            for _ in range(2)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Returns the scores of the classes."""
        features = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            features = block(features)
        scores: Tensor = self.head(self.norm(features).mean(1))
        return scores


@workload(
    family="images", summary="3 × (conv, BatchNorm, ReLU, pool), 16 to 64 channels, batch 64", steps=400, data="images"
)
def images_cnn(seed: int, data: Data) -> Task:
    """Batch normalisation: buffers, and a tolerance of large learning rates."""
    return _classifier(ConvolutionalNetwork, data, seed)


@workload(
    family="images", summary="3 residual blocks with GroupNorm, 8 to 32 channels, batch 64", steps=300, data="images"
)
def images_resnet(seed: int, data: Data) -> Task:
    """Residual connections."""
    return _classifier(ResidualNetwork, data, seed)


@workload(
    family="images", summary="vision transformer, 16 patches, 2 blocks, width 48, batch 64", steps=300, data="images"
)
def images_vit(seed: int, data: Data) -> Task:
    """Attention over patches."""
    return _classifier(VisionTransformer, data, seed)
