"""Fully connected network, and the loss per learning rate along its first direction.

-from gen_optim import optimizer_direction
+from gen_optim import GeNOptimizer, optimizer_direction
-optimizer = AdamW(model.parameters(), lr=lr)
+optimizer = GeNOptimizer(AdamW(model.parameters()))
-optimizer.zero_grad()
-loss = cross_entropy(model(images), labels)
-loss.backward()
-optimizer.step()
+def closure():
+    optimizer.zero_grad()
+    loss = cross_entropy(model(images), labels)
+    loss.backward()
+    return loss
+optimizer.step(closure)
"""

import argparse
import itertools
import time

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.optim import AdamW
from torch.optim.lr_scheduler import LinearLR

from gen_optim import GeNOptimizer, optimizer_direction
from gen_optim.plotting import plot_loss_along

images, labels = (torch.tensor(each) for each in load_digits(return_X_y=True))
training, validation = (images[:1400].float() / 16, labels[:1400]), (images[1400:].float() / 16, labels[1400:])


def make_model() -> nn.Module:
    """Return a network with two hidden layers."""
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))


def draw_first_direction(path: str) -> None:
    """Draw the loss of a batch along the first step of AdamW, and its parabola."""
    torch.manual_seed(0)
    model = make_model()
    images, labels = training[0][:128], training[1][:128]
    cross_entropy(model(images), labels).backward()
    direction = optimizer_direction(AdamW(model.parameters()), model.named_parameters())

    def loss_of(params: dict[str, torch.Tensor]) -> torch.Tensor:
        return cross_entropy(functional_call(model, params, images), labels)

    plot_loss_along(loss_of, dict(model.named_parameters()), direction).figure.savefig(path, dpi=110)


def train(bare: bool, lr: float, seed: int, steps: int) -> float:
    """Return the validation loss."""
    torch.manual_seed(seed)
    model = make_model()
    if bare:
        optimizer = AdamW(model.parameters(), lr=lr)
    else:
        optimizer = GeNOptimizer(AdamW(model.parameters()))
    scheduler = LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    for _ in range(steps):
        chosen = torch.randint(1400, (128,))
        images, labels = training[0][chosen], training[1][chosen]
        if bare:
            optimizer.zero_grad()
            loss = cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
        else:

            def closure():
                optimizer.zero_grad()
                loss = cross_entropy(model(images), labels)
                loss.backward()
                return loss

            optimizer.step(closure)
        scheduler.step()
    return cross_entropy(model(validation[0]), validation[1]).item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="a short run")
    parser.add_argument("--lr", type=float, default=1e-2, help="learning rate of the bare optimizer")
    parser.add_argument("--picture", default="fully_connected.png", help="where to draw the first direction")
    options = parser.parse_args()
    draw_first_direction(options.picture)
    steps = 30 if options.quick else 600
    for seed, bare in itertools.product(range(1 if options.quick else 3), (True, False)):
        began = time.perf_counter()
        loss = train(bare, options.lr, seed, steps)
        ms = 1e3 * (time.perf_counter() - began) / steps
        print(f"seed {seed}, {'AdamW' if bare else 'GeN(AdamW)'}: loss {loss:.4f}, {ms:.2f} ms per step")
