"""Lightning: an autoencoder, with clipping and a schedule per step.

-from lightning.pytorch.callbacks import LearningRateMonitor
+from gen_optim import GeNOptimizer
+from gen_optim.integrations.lightning import GeNCallback
-optimizer = AdamW(self.parameters(), lr=self.lr)
+optimizer = GeNOptimizer(AdamW(self.parameters()))
-callbacks = [LearningRateMonitor()]
+callbacks = [GeNCallback()]
"""

import argparse
import itertools
import logging
import tempfile
import time

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader

from gen_optim import GeNOptimizer
from gen_optim.integrations.lightning import GeNCallback

images = torch.tensor(load_digits().data, dtype=torch.float32) / 16


class Autoencoder(LightningModule):
    """Compresses an image of 64 pixels to eight numbers."""

    def __init__(self, bare: bool, lr: float) -> None:
        super().__init__()
        self.bare, self.lr = bare, lr
        self.encoder = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 8))
        self.decoder = nn.Sequential(nn.Linear(8, 128), nn.ReLU(), nn.Linear(128, 64))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        loss = nn.functional.mse_loss(self.decoder(self.encoder(batch)), batch)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Log the loss of a validation batch."""
        self.log("validation_loss", nn.functional.mse_loss(self.decoder(self.encoder(batch)), batch))

    def configure_optimizers(self) -> dict[str, object]:
        """Return the optimizer and its schedule."""
        bare = self.bare
        if bare:
            optimizer = AdamW(self.parameters(), lr=self.lr)
        else:
            optimizer = GeNOptimizer(AdamW(self.parameters()))
        scheduler = CosineAnnealingLR(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def train(bare: bool, lr: float, seed: int, epochs: int) -> float:
    """Return the validation loss."""
    seed_everything(seed, verbose=False)
    if bare:
        callbacks = [LearningRateMonitor()]
    else:
        callbacks = [GeNCallback()]
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        gradient_clip_val=1.0,
        callbacks=callbacks,
        logger=CSVLogger(tempfile.mkdtemp()),
        log_every_n_steps=10,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    train_loader = DataLoader(images[:1400], batch_size=64, shuffle=True)
    trainer.fit(Autoencoder(bare, lr), train_loader, DataLoader(images[1400:], batch_size=397))
    return trainer.callback_metrics["validation_loss"].item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="a short run")
    parser.add_argument("--lr", type=float, default=1e-2, help="learning rate of the bare optimizer")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    epochs = 2 if options.quick else 30
    for seed, bare in itertools.product(range(1 if options.quick else 3), (True, False)):
        began = time.perf_counter()
        loss = train(bare, options.lr, seed, epochs)
        ms = 1e3 * (time.perf_counter() - began) / (22 * epochs)
        print(f"seed {seed}, {'AdamW' if bare else 'GeN(AdamW)'}: loss {loss:.5f}, {ms:.1f} ms per step")
