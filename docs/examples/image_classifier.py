"""Image classifier: DataLoader, warm-up and cosine per epoch, clipping, weight averaging, checkpoint and resume.

-from torch.optim import AdamW, lr_scheduler, swa_utils
+from torch.optim import AdamW, lr_scheduler
+from gen_optim import GeNOptimizer, refreshed_batch_norm
-optimizer = AdamW(model.parameters(), lr=lr)
-warm_up = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=2)
-cosine = lr_scheduler.CosineAnnealingLR(optimizer, epochs - 2)
-scheduler = lr_scheduler.SequentialLR(optimizer, [warm_up, cosine], milestones=[2])
-averaged = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.98), use_buffers=True)
-parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "averaged": averaged}
+optimizer = GeNOptimizer(AdamW(model.parameters()))
+scheduler = lr_scheduler.CosineAnnealingLR(optimizer, epochs)
+parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
-optimizer.step()
-averaged.update_parameters(model)
+optimizer.step(probe=lambda: cross_entropy(model(images), labels))
-loss = loss_of(averaged.eval())
+with optimizer.averaged(), refreshed_batch_norm(model, loader):
+    loss = loss_of(model.eval())
"""

import argparse
import itertools
import tempfile
import time
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch.nn import BatchNorm2d, Conv2d, Dropout, Flatten, Linear, MaxPool2d, ReLU, Sequential
from torch.nn.functional import cross_entropy
from torch.optim import AdamW, lr_scheduler, swa_utils
from torch.utils.data import DataLoader, TensorDataset

from gen_optim import GeNOptimizer, refreshed_batch_norm

images, labels = (torch.tensor(each) for each in load_digits(return_X_y=True))
data = TensorDataset(images.float().view(-1, 1, 8, 8) / 16, labels)


def loss_of(model: torch.nn.Module) -> float:
    """Return the validation loss."""
    images, labels = data[1400:]
    return cross_entropy(model(images), labels).item()


def train(bare: bool, lr: float, seed: int, epochs: int, until: int, checkpoint: Path) -> float:
    """Train until an epoch, from the checkpoint if there is one; return the validation loss."""
    torch.manual_seed(seed)
    loader = DataLoader(TensorDataset(*data[:1400]), batch_size=64, shuffle=True, drop_last=True)
    layers = Conv2d(1, 32, 3, padding=1), BatchNorm2d(32), ReLU(), MaxPool2d(2), Conv2d(32, 64, 3), BatchNorm2d(64)
    model = Sequential(*layers, ReLU(), Flatten(), Dropout(0.2), Linear(256, 10))
    if bare:
        optimizer = AdamW(model.parameters(), lr=lr)
        warm_up = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=2)
        cosine = lr_scheduler.CosineAnnealingLR(optimizer, epochs - 2)
        scheduler = lr_scheduler.SequentialLR(optimizer, [warm_up, cosine], milestones=[2])
        averaged = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.98), use_buffers=True)
        parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "averaged": averaged}
    else:
        optimizer = GeNOptimizer(AdamW(model.parameters()))
        scheduler = lr_scheduler.CosineAnnealingLR(optimizer, epochs)
        parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    for name, state in torch.load(checkpoint).items() if checkpoint.exists() else ():
        parts[name].load_state_dict(state)
    for _ in range(scheduler.last_epoch, until):
        for images, labels in loader:
            optimizer.zero_grad()
            cross_entropy(model(images), labels).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if bare:
                optimizer.step()
                averaged.update_parameters(model)
            else:
                optimizer.step(probe=lambda: cross_entropy(model(images), labels))
        scheduler.step()
        torch.save({name: part.state_dict() for name, part in parts.items()}, checkpoint)
    if bare:
        loss = loss_of(averaged.eval())
    else:
        with optimizer.averaged(), refreshed_batch_norm(model, loader):
            loss = loss_of(model.eval())
    return loss


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="a short run")
    parser.add_argument("--lr", type=float, default=3e-3, help="learning rate of the bare optimizer")
    options = parser.parse_args()
    epochs = 4 if options.quick else 20
    for seed, bare in itertools.product(range(1 if options.quick else 3), (True, False)):
        checkpoint = Path(tempfile.mkdtemp(), "checkpoint.pt")
        began = time.perf_counter()
        for until in (epochs // 2, epochs):  # interrupted at half, and resumed
            loss = train(bare, options.lr, seed, epochs, until, checkpoint)
        ms = 1e3 * (time.perf_counter() - began) / (epochs * (1400 // 64))
        print(f"seed {seed}, {'AdamW' if bare else 'GeN(AdamW)'}: loss {loss:.4f}, {ms:.1f} ms per step")
