"""The README: its code runs as it stands, and its commands are the ones that are checked."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim import AdamW
from torch.optim.lr_scheduler import LinearLR

from benchmarks import digits
from gen_optim import GeNOptimizer
from tests.training import mlp, regression_data

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^( *)```python\n(.*?)^ *```", README, flags=re.MULTILINE | re.DOTALL)


def test_every_python_block_runs_in_order() -> None:
    inputs, targets = regression_data()
    names: dict[str, Any] = {
        "torch": torch,
        "model": mlp(),
        "loss_fn": torch.nn.functional.mse_loss,
        "loader": [(inputs, targets)] * 60,
        "steps": 60,
    }
    assert len(BLOCKS) >= 4
    for indent, block in BLOCKS:
        exec(re.sub(f"^{indent}", "", block, flags=re.MULTILINE), names)
    assert names["loss"].item() < 0.5
    assert len(names["history"]) > 0


def test_the_commands_are_marked_for_the_checks() -> None:
    for name, module in (("main job", "benchmarks"), ("tests", "pytest")):
        command = README.split(f"<!-- command: {name} -->\n```sh\n")[1].split("\n```")[0]
        assert "\n" not in command
        assert f".venv/bin/python -m {module}" in command
        assert "-c constraints.txt" in command


def validation_loss(lr: float) -> float:
    """Train the README's example on the digits."""
    train, valid = digits.load(seed=0)
    model, batches = digits.network(seed=0), digits.batches(train, 128, seed=0)
    optimizer = GeNOptimizer(AdamW(model.parameters(), lr=lr))
    scheduler = LinearLR(optimizer, start_factor=1.0, end_factor=0.0, total_iters=200)
    for batch in itertools.islice(batches, 200):

        def closure(batch: digits.Images = batch) -> Tensor:
            optimizer.zero_grad()
            loss = cross_entropy(model(batch.inputs), batch.targets)
            loss.backward()
            return loss

        optimizer.step(closure)
        scheduler.step()
    with torch.no_grad():
        return cross_entropy(model(valid.inputs), valid.targets).item()


def test_the_example_ends_at_the_same_validation_loss_from_any_learning_rate() -> None:
    losses = [validation_loss(lr) for lr in (1e-7, 1e-3, 10.0)]
    assert max(losses) < 0.25
    assert max(losses) <= 1.1 * min(losses)
