"""The README: its code runs as it stands, and its commands are the ones that are checked."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

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
