"""Running text, and a small transformer that guesses its next character."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics

import torch
from torch import Tensor, nn

from benchmarks.repeatable import seeded

CONTEXT = 64


@dataclass(frozen=True)
class Text:
    """A text as numbers.

    Attributes:
        characters: One number a character, shape ``(length,)``, int64.
        alphabet: How many distinct characters there are.
    """

    characters: Tensor
    alphabet: int


def load(path: Path | None = None) -> tuple[Text, Text]:
    """Returns the first nine tenths of a text for training and the rest for validation.

    Args:
        path: A text file; None for the help texts that come with Python.
    """
    text = "".join(topics.topics[name] for name in sorted(topics.topics)) if path is None else path.read_text("utf-8")
    alphabet = {character: number for number, character in enumerate(sorted(set(text)))}
    characters = torch.tensor([alphabet[character] for character in text])
    cut = len(characters) * 9 // 10
    return Text(characters[:cut], len(alphabet)), Text(characters[cut:], len(alphabet))


def batches(text: Text, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields excerpts and what follows each of their characters for ever, both of shape ``(size, CONTEXT)``.

    Args:
        text: What to draw from.
        size: Excerpts in a batch.
        seed: Decides which.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(text.characters) - CONTEXT - 1, (size,), generator=generator)
        excerpts = torch.stack([text.characters[start : start + CONTEXT + 1] for start in starts.tolist()])
        yield excerpts[:, :-1], excerpts[:, 1:]


class Transformer(nn.Module):
    """A character-level GPT: pre-norm blocks with causal attention.

    Args:
        alphabet: Number of distinct characters.
        width: Features of a character.
        layers: Number of blocks.
        heads: Attention heads in each.
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


def network(alphabet: int, seed: int, *, dropout: float = 0.0) -> Transformer:
    """Returns a small transformer; the same seed gives the same weights.

    Args:
        alphabet: Number of distinct characters.
        seed: Decides the initial weights. The global random stream stays as it was.
        dropout: Share of features that are dropped while training.
    """
    return seeded(lambda: Transformer(alphabet, dropout=dropout), seed)
