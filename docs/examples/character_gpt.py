"""Character GPT: accumulation over four micro-batches, bfloat16 autocast, torch.compile.

+from torch.optim.lr_scheduler import LinearLR
+from gen_optim import GeNOptimizer
+from gen_optim.integrations.micro_batches import MicroBatches
-optimizer = AdamW(model.parameters(), lr=lr)
+optimizer = GeNOptimizer(AdamW(model.parameters()))
+scheduler = LinearLR(optimizer, 1.0, 0.0, steps)
+micro_batches = MicroBatches(optimizer, is_last=lambda: micro == 3)
-for group in optimizer.param_groups:
-    group["lr"] = lr * min((step + 1) / 20, 1 - step / steps)
-loss = loss_of(*excerpts(characters[:-20000]))
+loss = micro_batches.evaluate(loss_of, *excerpts(characters[:-20000]))
 (loss / 4).backward()
 optimizer.step()
+scheduler.step()
"""

import argparse
import itertools
import time
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import AdamW
from torch.optim.lr_scheduler import LinearLR

from gen_optim import GeNOptimizer
from gen_optim.integrations.micro_batches import MicroBatches

characters = torch.tensor(list("".join(topics.values()).encode("ascii", "replace")))  # the manual of Python


def excerpts(text: Tensor) -> tuple[Tensor, Tensor]:
    """Return eight random excerpts, and the characters that follow each of theirs."""
    chosen = text[torch.randint(len(text) - 64, (8, 1)) + torch.arange(65)]
    return chosen[:, :-1], chosen[:, 1:]


class GPT(nn.Module):
    """Predicts the next of 128 characters."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(128, 64), nn.Parameter(torch.zeros(64, 64))
        block = nn.TransformerEncoderLayer(64, 4, 256, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks, self.head = nn.TransformerEncoder(block, 2, enable_nested_tensor=False), nn.Linear(64, 128)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss."""
        features = self.blocks(self.embed(inputs) + self.places, nn.Transformer.generate_square_subsequent_mask(64))
        return cross_entropy(self.head(features).float().flatten(0, 1), targets.flatten())


def train(bare: bool, lr: float, seed: int, steps: int) -> tuple[float, float]:
    """Return the validation loss, and the milliseconds of a step once everything is compiled."""
    torch.manual_seed(seed)
    model = torch.compile(GPT())

    def loss_of(inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(inputs, targets)

    if bare:
        optimizer = AdamW(model.parameters(), lr=lr)
    else:
        optimizer = GeNOptimizer(AdamW(model.parameters()))
        scheduler = LinearLR(optimizer, 1.0, 0.0, steps)
        micro_batches = MicroBatches(optimizer, is_last=lambda: micro == 3)
    for step in range(steps):
        if step == 9:
            began = time.perf_counter()
        if bare:
            for group in optimizer.param_groups:
                group["lr"] = lr * min((step + 1) / 20, 1 - step / steps)
        for micro in range(4):
            if bare:
                loss = loss_of(*excerpts(characters[:-20000]))
            else:
                loss = micro_batches.evaluate(loss_of, *excerpts(characters[:-20000]))
            (loss / 4).backward()
        optimizer.step()
        optimizer.zero_grad()
        if not bare:
            scheduler.step()
    ms = 1e3 * (time.perf_counter() - began) / (steps - 9)
    return sum(loss_of(*excerpts(characters[-20000:])).item() for _ in range(40)) / 40, ms


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="a short run")
    parser.add_argument("--lr", type=float, default=1e-2, help="learning rate of the bare optimizer")
    options = parser.parse_args()
    for seed, bare in itertools.product(range(1 if options.quick else 3), (True, False)):
        loss, ms = train(bare, options.lr, seed, 12 if options.quick else 300)
        print(f"seed {seed}, {'AdamW' if bare else 'GeN(AdamW)'}: loss {loss:.4f}, {ms:.1f} ms per step")
