"""What the main job says of its runs."""

from __future__ import annotations

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


@pytest.mark.parametrize(("last", "said"), [(0.5, "each wrapped optimizer at the same one"), (0.6, "not the same one")])
def test_the_sentence_compares_all_initial_learning_rates(last: float, said: str) -> None:
    results = [run(False, 1e-4, 2.0), run(False, 100.0, 1e6), run(True, 1e-4, 0.5), run(True, 100.0, last)]
    assert sentence(results) == (
        "From initial learning rates of 0.0001 to 100, bare runs end at training losses of 2.0000 to 1.00e+06, wrapped "
        f"ones at 0.5000 to {last:.4f}: {said} from all of them."
    )
