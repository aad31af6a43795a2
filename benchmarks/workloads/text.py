"""Characters of running text: a transformer, with dropout and without, and an LSTM."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.data import Data, Text
from benchmarks.determinism import seeded
from benchmarks.workloads.registry import Batch, Model, Stream, Task, workload

CONTEXT = 64
"""Characters per excerpt."""
_EVALUATED = 128
"""Excerpts that give training and validation loss."""


def excerpts(text: Text, size: int) -> Stream:
    """Returns batches of random excerpts with the character that follows each of theirs, both ``(size, CONTEXT)``."""

    def stream(seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            starts = torch.randint(len(text.characters) - CONTEXT - 1, (size,), generator=generator)
            yield _excerpts_from(text, starts)

    return stream


def _excerpts_from(text: Text, starts: Tensor) -> Batch:
    whole = torch.stack([text.characters[start : start + CONTEXT + 1] for start in starts.tolist()])
    return whole[:, :-1], whole[:, 1:]


def _evenly_spaced(text: Text) -> list[Batch]:
    starts = torch.linspace(0, len(text.characters) - CONTEXT - 1, _EVALUATED).long()
    return [_excerpts_from(text, some) for some in torch.split(starts, 64)]


def _cross_entropy(model: Model, batch: Batch) -> Tensor:
    return cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


def _language_model(make: Callable[[int], nn.Module], size: int, data: Data, seed: int) -> Task:
    """``make(alphabet)`` on the text, ``size`` excerpts per batch."""
    train, valid = data.text()
    return Task(
        model=seeded(lambda: make(train.alphabet), seed),
        loss=_cross_entropy,
        batches=excerpts(train, size),
        training=_evenly_spaced(train),
        validation=_evenly_spaced(valid),
    )


class Transformer(nn.Module):
    """A character-level GPT: pre-norm blocks with causal attention.

    Args:
        alphabet: Number of distinct characters.
        width: Features per character.
        layers: Number of blocks.
        heads: Attention heads per block.
        dropout: Share of features that are dropped while training.
    """

    def __init__(
        self, alphabet: int, *, width: int = 64, layers: int = 2, heads: int = 4, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.characters = nn.Embedding(alphabet, width)
        self.positions = nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, 4 * width, dropout, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, alphabet)

    def forward(self, characters: Tensor) -> Tensor:
        """Returns a score for each possible next character, shape ``(batch, length, alphabet)``."""
        length = characters.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=characters.device)
        features = self.characters(characters) + self.positions.weight[:length]
        for block in self.blocks:
            features = block(features, src_mask=mask, is_causal=True)
        scores: Tensor = self.head(self.norm(features))
        return scores


class CharacterLSTM(nn.Module):
    """An embedding, an LSTM, a linear layer."""

    def __init__(self, alphabet: int, width: int = 96) -> None:
        super().__init__()
        self.characters = nn.Embedding(alphabet, 32)
        self.lstm = nn.LSTM(32, width, batch_first=True)
        self.head = nn.Linear(width, alphabet)

    def forward(self, characters: Tensor) -> Tensor:
        """Returns a score for each possible next character, shape ``(batch, length, alphabet)``."""
        scores: Tensor = self.head(self.lstm(self.characters(characters))[0])
        return scores


@workload(
    family="text",
    summary="character transformer, 2 layers, width 48, dropout 0.1, batch 8 × 64",
    steps=400,
    data="text",
)
def text_transformer(seed: int, data: Data) -> Task:
    """Dropout: the loss is noisy unless masks are repeated."""
    return _language_model(lambda alphabet: Transformer(alphabet, width=48, dropout=0.1), 8, data, seed)


@workload(family="text", summary="character LSTM, width 96, batch 16 × 64", steps=400, data="text")
def text_lstm(seed: int, data: Data) -> Task:
    """Recurrence: steep walls."""
    return _language_model(CharacterLSTM, 16, data, seed)


@workload(
    family="text",
    summary="character transformer, 2 layers, width 64, no dropout, batch 16 × 64",
    steps=300,
    data="text",
    suite="study",
)
def character_transformer(seed: int, data: Data) -> Task:
    """Attention, with the same loss each time."""
    return _language_model(Transformer, 16, data, seed)
