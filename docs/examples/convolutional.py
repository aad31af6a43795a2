"""Shallow convolutional network, and the loss per learning rate along its first direction.

-from gen_optim import optimizer_direction
+from gen_optim import GeNOptimizer, optimizer_direction
-optimizer = SGD(model.parameters(), lr=lr, momentum=0.9)
+optimizer = GeNOptimizer(SGD(model.parameters(), momentum=0.9))
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
from torch.optim import SGD
from torch.optim.lr_scheduler import LinearLR

from gen_optim import GeNOptimizer, optimizer_direction
from gen_optim.plotting import plot_loss_along

images, labels = (torch.tensor(each) for each in load_digits(return_X_y=True))
training, validation = (images[:1400].float() / 16, labels[:1400]), (images[1400:].float() / 16, labels[1400:])


def make_model() -> nn.Module:
    """Return a network with one convolution."""
    return nn.Sequential(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(576, 10))


def draw_first_direction(path: str) -> None:
    """Draw the loss of a batch along the first step of SGD, and its parabola."""
    torch.manual_seed(0)
    model = make_model()
    images, labels = training[0][:128], training[1][:128]
    cross_entropy(model(images), labels).backward()
    direction = optimizer_direction(SGD(model.parameters()), model.named_parameters())

    def loss_of(params: dict[str, torch.Tensor]) -> torch.Tensor:
        return cross_entropy(functional_call(model, params, images), labels)

    plot_loss_along(loss_of, dict(model.named_parameters()), direction).figure.savefig(path, dpi=110)


def train(bare: bool, lr: float, seed: int, steps: int) -> float:
    """Return the validation loss."""
    torch.manual_seed(seed)
    model = make_model()
    if bare:
        optimizer = SGD(model.parameters(), lr=lr, momentum=0.9)
    else:
        optimizer = GeNOptimizer(SGD(model.parameters(), momentum=0.9))
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
    parser.add_argument("--lr", type=float, default=0.1, help="learning rate of the bare optimizer")
    parser.add_argument("--picture", default="convolutional.png", help="where to draw the first direction")
    options = parser.parse_args()
    draw_first_direction(options.picture)
    steps = 30 if options.quick else 600
    for seed, bare in itertools.product(range(1 if options.quick else 3), (True, False)):
        began = time.perf_counter()
        loss = train(bare, options.lr, seed, steps)
        ms = 1e3 * (time.perf_counter() - began) / steps
        print(f"seed {seed}, {'SGD' if bare else 'GeN(SGD)'}: loss {loss:.4f}, {ms:.2f} ms per step")
