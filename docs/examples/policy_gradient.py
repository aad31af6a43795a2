"""Reinforcement learning: a policy gradient that balances a pole on a cart.

+from gen_optim import GeNOptimizer
-optimizer = Adam(policy.parameters(), lr=lr)
+optimizer = GeNOptimizer(Adam(policy.parameters()))
-optimizer.zero_grad()
-loss = -(log_probability(policy, states, actions) * advantages).mean()
-loss.backward()
-optimizer.step()
+old = log_probability(policy, states, actions).detach()
+def closure():
+    optimizer.zero_grad()
+    ratio = torch.exp(log_probability(policy, states, actions) - old)
+    loss = -(ratio * advantages).mean()
+    loss.backward()
+    return loss
+optimizer.step(closure)
"""

import argparse
import itertools
import time

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from torch.optim import Adam

from gen_optim import GeNOptimizer


def push(states: Tensor, actions: Tensor) -> Tensor:
    """Push carts to the left (-1) or to the right (1) for a fiftieth of a second."""
    _, speed, angle, turning = states.unbind(dim=1)
    force = (10 * actions + 0.05 * turning**2 * angle.sin()) / 1.1
    swing = (9.8 * angle.sin() - angle.cos() * force) / (2 / 3 - 0.05 * angle.cos() ** 2 / 1.1)
    return states + 0.02 * torch.stack([speed, force - 0.05 * swing * angle.cos() / 1.1, turning, swing], dim=1)


@torch.no_grad()
def play(policy: nn.Module, episodes: int) -> tuple[Tensor, Tensor, Tensor, float]:
    """Play episodes; return states, actions, the advantage of each action, and the mean number of steps survived."""
    states, alive, history = 0.1 * torch.rand(episodes, 4) - 0.05, torch.ones(episodes), []
    for _ in range(200):
        actions = 2.0 * (torch.rand(episodes) < torch.sigmoid(policy(states).squeeze(1))) - 1.0
        history.append((states, actions, alive))
        states = push(states, actions)
        alive = alive * ((states[:, 0].abs() < 2.4) & (states[:, 2].abs() < 0.21))
    states, actions, alive = (torch.stack(each) for each in zip(*history, strict=True))
    to_go = alive.flip(0).cumsum(0).flip(0) / 200
    advantages = to_go - to_go.sum(dim=1, keepdim=True) / alive.sum(dim=1, keepdim=True).clamp(min=1)
    return states[alive > 0], actions[alive > 0], advantages[alive > 0], alive.sum().item() / episodes


def log_probability(policy: nn.Module, states: Tensor, actions: Tensor) -> Tensor:
    """Return the logarithm of the probability of each action."""
    return logsigmoid(actions * policy(states).squeeze(1))


def train(bare: bool, lr: float, seed: int, steps: int) -> float:
    """Return the mean number of steps for which the pole stays up, at most 200."""
    torch.manual_seed(seed)
    policy = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 1))
    if bare:
        optimizer = Adam(policy.parameters(), lr=lr)
    else:
        optimizer = GeNOptimizer(Adam(policy.parameters()))
    for _ in range(steps):
        states, actions, advantages, _survived = play(policy, 32)
        if bare:
            optimizer.zero_grad()
            loss = -(log_probability(policy, states, actions) * advantages).mean()
            loss.backward()
            optimizer.step()
        else:
            old = log_probability(policy, states, actions).detach()

            def closure():
                optimizer.zero_grad()
                ratio = torch.exp(log_probability(policy, states, actions) - old)
                loss = -(ratio * advantages).mean()
                loss.backward()
                return loss

            optimizer.step(closure)
    return play(policy, 256)[3]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="a short run")
    parser.add_argument("--lr", type=float, default=1e-2, help="learning rate of the bare optimizer")
    options = parser.parse_args()
    steps = 5 if options.quick else 50
    for seed, bare in itertools.product(range(1 if options.quick else 3), (True, False)):
        began = time.perf_counter()
        survived = train(bare, options.lr, seed, steps)
        ms = 1e3 * (time.perf_counter() - began) / steps
        print(f"seed {seed}, {'Adam' if bare else 'GeN(Adam)'}: up for {survived:.0f} of 200, {ms:.0f} ms per step")
