"""The scripts of docs/examples: the diff at the top is the difference between bare and wrapped, and they run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.examples import FOLDER, Example, assert_diff_is_true, assert_it_trains_bare_and_wrapped

EXAMPLES = [Example(path.stem) for path in sorted(FOLDER.glob("*.py"))]
NEED_A_FRAMEWORK = {"lightning_autoencoder", "trainer_lora"}
"""Run by tests/integrations/test_examples.py."""


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_the_diff_is_what_differs_between_bare_and_wrapped(example: Example) -> None:
    assert_diff_is_true(example)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_it_can_be_read_at_a_glance(example: Example) -> None:
    assert len(example.source.splitlines()) < 100


@pytest.mark.timeout(600)  # a compiler runs in one of them
@pytest.mark.parametrize(
    "example",
    [each for each in EXAMPLES if each.name not in NEED_A_FRAMEWORK],
    ids=lambda example: example.name,
)
def test_it_trains_bare_and_wrapped(example: Example, tmp_path: Path) -> None:
    assert_it_trains_bare_and_wrapped(example, tmp_path)
