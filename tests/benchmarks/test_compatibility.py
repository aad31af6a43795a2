from __future__ import annotations

import importlib.util
from typing import Any

import pytest
from torch.optim import SGD, AdamW, Optimizer

from benchmarks.compatibility import PACKAGES, Outcome, outcome_of, page
from tests import optimizers_of_others as others


class Failing(others.Elementary):
    """Fails after the check of the wrapper, as optimizers do that need something of their parameters."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if self.param_groups[0]["params"][0].shape == (32, 8):
            raise RuntimeError("no room")
        super().step()


def demanding(parameters: Any) -> Optimizer:
    raise ImportError("a kernel is missing")


def without_default(parameters: Any, lr: float) -> Optimizer:
    return AdamW(parameters, lr=lr)


@pytest.mark.parametrize(
    ("make", "kind", "reason"),
    [
        (AdamW, "trains", "loss"),
        (SGD, "trains", "loss"),
        (without_default, "trains", "loss"),
        (others.AdaHessian, "trains", "loss"),
        (others.DistanceOverGradients, "refused", "base_optim must"),
        (lambda parameters: SGD(parameters, lr=0.0), "does not train", "loss"),
        (Failing, "fails", "RuntimeError: no room"),
        (demanding, "not constructed", "ImportError: a kernel is missing"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_outcomes(make: Any, kind: str, reason: str) -> None:
    outcome = outcome_of(make, steps=60)
    assert outcome.kind == kind
    assert outcome.reason.startswith(reason)


@pytest.mark.parametrize("name", PACKAGES)
def test_a_sample_of_each_package_that_is_installed(name: str) -> None:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    known = {"AdamW": "trains", "Lion": "trains", "Prodigy": "refused", "SAM": "not constructed", "Yogi": "trains"}
    classes = {each.__name__: each for each in PACKAGES[name]()}
    chosen = [each for each in known if each in classes]
    assert {each: outcome_of(classes[each]).kind for each in chosen} == {each: known[each] for each in chosen}


def test_the_page_counts_outcomes_and_gives_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.compatibility.version", lambda _: "1.0")
    text = page(
        {
            "optimi": {
                "A": Outcome("trains", "loss 2 to 1"),
                "B": Outcome("refused", "it caps"),
                "C": Outcome("trains", ""),
            }
        }
    )
    assert "torch-optimi 1.0" in text
    assert "Accepted, and train: A, C." in text
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    assert ["trains", "2"] in rows
    assert ["refused", "1"] in rows
    assert ["B", "refused: it caps"] in rows
