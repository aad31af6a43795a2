"""What the main job says of its runs."""

from __future__ import annotations

import math

import pytest

from benchmarks.main_job.report import sentence
from benchmarks.main_job.runs import Result, Spec


def run(gen: bool, learning_rate: float, loss: float) -> Result:
    spec = Spec(base="SGD", gen=gen, learning_rate=learning_rate, steps=1, schedule="linear", batch_size=1, seed=0)
    return Result(
        spec=spec,
        evaluated=(0, 1),
        training_losses=(3.0, loss),
        validation_accuracy=0.5,
        learning_rates=(learning_rate,),
        learning_rate_found=None,
        seconds=1.0,
        extra_forwards=0,
    )


@pytest.mark.parametrize(("last", "said"), [(0.5, "0.5000"), (0.6, "0.5000 to 0.6000")])
def test_the_sentence_compares_with_the_best_of_the_sweep(last: float, said: str) -> None:
    bare = [run(False, 1e-4, 2.0), run(False, 0.1, 0.7), run(False, 10.0, math.nan), run(False, 100.0, 1e6)]
    assert sentence([*bare, run(True, 1e-4, 0.5), run(True, 100.0, last)]) == (
        "SGD at the best learning rate of the sweep, 0.1, ends at a training loss of 0.7000; wrapped, from 0.0001 or "
        f"100, at {said}."
    )
