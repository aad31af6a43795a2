"""Physics-informed network: the heat equation, from a loss of its residual and a loss of its initial and edge values.

+from gen_optim import GeNOptimizer
-optimizer = Adam(model.parameters(), lr=lr)
+optimizer = GeNOptimizer(Adam(model.parameters()))
-optimizer.zero_grad()
-loss = residual(model, inside) + 10.0 * mismatch(model, *border)
-loss.backward()
-optimizer.step()
+def closure():
+    optimizer.zero_grad()
+    loss = residual(model, inside) + 10.0 * mismatch(model, *border)
+    loss.backward()
+    return loss
+optimizer.step(closure)
"""

import argparse
import itertools
import math
import time

import torch
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.lr_scheduler import LinearLR

from gen_optim import GeNOptimizer


def solution(points: Tensor) -> Tensor:
    """Return u(x, t) = exp(-π²t / 4) sin πx, which solves uₜ = uₓₓ / 4 on [0, 1] × [0, 1]."""
    x, t = points.unbind(dim=1)
    return torch.exp(-(math.pi**2) * t / 4) * torch.sin(math.pi * x)


def residual(model: nn.Module, points: Tensor) -> Tensor:
    """Return the mean square of uₜ - uₓₓ / 4."""
    points = points.clone().requires_grad_()
    first = torch.autograd.grad(model(points).sum(), points, create_graph=True)[0]
    second = torch.autograd.grad(first[:, 0].sum(), points, create_graph=True)[0]
    return (first[:, 1] - second[:, 0] / 4).square().mean()


def mismatch(model: nn.Module, points: Tensor, values: Tensor) -> Tensor:
    """Return the mean square of the difference to values that are known."""
    return (model(points).squeeze(1) - values).square().mean()


def draw_border() -> tuple[Tensor, Tensor]:
    """Draw points at time 0 and on both edges, where u is known."""
    points = torch.rand(192, 2)
    points[:96, 1] = 0.0
    points[96:, 0] = torch.randint(2, (96,)).float()
    return points, solution(points)


def train(bare: bool, lr: float, seed: int, steps: int) -> float:
    """Return the relative error of the solution found, in the mean square over a grid."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 1))
    if bare:
        optimizer = Adam(model.parameters(), lr=lr)
    else:
        optimizer = GeNOptimizer(Adam(model.parameters()))
    scheduler = LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    for _ in range(steps):
        inside, border = torch.rand(256, 2), draw_border()
        if bare:
            optimizer.zero_grad()
            loss = residual(model, inside) + 10.0 * mismatch(model, *border)
            loss.backward()
            optimizer.step()
        else:

            def closure():
                optimizer.zero_grad()
                loss = residual(model, inside) + 10.0 * mismatch(model, *border)
                loss.backward()
                return loss

            optimizer.step(closure)
        scheduler.step()
    grid = torch.cartesian_prod(torch.linspace(0, 1, 50), torch.linspace(0, 1, 50))
    with torch.no_grad():
        return (mismatch(model, grid, solution(grid)) / solution(grid).square().mean()).sqrt().item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="a short run")
    parser.add_argument("--lr", type=float, default=1e-2, help="learning rate of the bare optimizer")
    options = parser.parse_args()
    steps = 50 if options.quick else 2000
    for seed, bare in itertools.product(range(1 if options.quick else 3), (True, False)):
        began = time.perf_counter()
        error = train(bare, options.lr, seed, steps)
        ms = 1e3 * (time.perf_counter() - began) / steps
        print(f"seed {seed}, {'Adam' if bare else 'GeN(Adam)'}: relative error {error:.4f}, {ms:.1f} ms per step")
