"""The scripts of docs/examples that need a framework."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.examples import Example, assert_it_trains_bare_and_wrapped


@pytest.mark.timeout(600)  # importing the frameworks takes most of it
@pytest.mark.parametrize(
    ("name", "needs"),
    [("lightning_autoencoder", ["lightning"]), ("trainer_lora", ["transformers", "accelerate", "peft"])],
)
def test_it_trains_bare_and_wrapped(name: str, needs: list[str], tmp_path: Path) -> None:
    for framework in needs:
        pytest.importorskip(framework, reason=f"needs {framework}")
    assert_it_trains_bare_and_wrapped(Example(name), tmp_path)
