"""Characters of running text: a transformer with dropout, an LSTM."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks import text
from benchmarks.battery.data import Data
from benchmarks.battery.task import Batch, Task, workload
from benchmarks.repeatable import seeded

_EXCERPTS = 128  # that give training and validation loss


def _guess(model: nn.Module, batch: Batch) -> Tensor:
    return cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


def _excerpts(part: text.Text) -> list[Batch]:
    """Excerpts evenly spaced over a text."""
    starts = torch.linspace(0, len(part.characters) - text.CONTEXT - 1, _EXCERPTS).long().tolist()
    whole = torch.stack([part.characters[start : start + text.CONTEXT + 1] for start in starts])
    return [(some[:, :-1], some[:, 1:]) for some in torch.split(whole, 64)]


def _language_model(make: Callable[[int], nn.Module], size: int, data: Data, seed: int) -> Task:
    """``make(alphabet)`` on the text, ``size`` excerpts a batch."""
    train, valid = data.text()
    return Task(
        model=seeded(lambda: make(train.alphabet), seed),
        loss=_guess,
        batches=lambda number: text.batches(train, size, number),
        training=_excerpts(train),
        validation=_excerpts(valid),
    )


class CharacterLSTM(nn.Module):
    """An embedding, an LSTM, a linear layer."""

    def __init__(self, alphabet: int, width: int = 96) -> None:
        super().__init__()
        self.characters = nn.Embedding(alphabet, 32)
        self.lstm = nn.LSTM(32, width, batch_first=True)
        self.head = nn.Linear(width, alphabet)

    def forward(self, characters: Tensor) -> Tensor:
        """Scores of each possible next character."""
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
    return _language_model(lambda alphabet: text.Transformer(alphabet, width=48, dropout=0.1), 8, data, seed)


@workload(family="text", summary="character LSTM, width 96, batch 16 × 64", steps=400, data="text")
def text_lstm(seed: int, data: Data) -> Task:
    """Recurrence: steep walls."""
    return _language_model(CharacterLSTM, 16, data, seed)
