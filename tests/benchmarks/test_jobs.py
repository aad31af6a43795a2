"""The benchmarks run, write what they say they write, and their helpers do what they say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import curvature, markdown
from benchmarks.__main__ import JOBS, main
from benchmarks.data import Data
from benchmarks.workloads import WORKLOADS
from benchmarks.workloads.text import CONTEXT, excerpts
from gen_optim.measurement import MODES


@pytest.mark.timeout(600)  # on a busy machine
@pytest.mark.parametrize(
    ("arguments", "files"),
    [
        (["--quick"], ["digits-quick.md", "digits-quick.png"]),
        (["digits", "--quick", "--no-picture"], ["digits-quick.md"]),
        (["--quick", "--no-picture", "--schedule", "constant"], ["digits-constant-quick.md"]),
        (["curvature", "--quick"], ["curvature-quick.md", "curvature-quick.png"]),
        (["balance", "--quick"], ["balance-quick.md"]),
        (["directions", "--quick", "--only", "digits-cnn"], ["direction-digits-cnn-quick.png"]),
        (["precision", "--quick"], ["precision-quick.md"]),
        (["cost", "--quick"], ["cost-quick.md"]),
    ],
    ids=" ".join,
)
def test_a_job_writes_its_files_and_leaves_no_mode_behind(
    arguments: list[str], files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([*arguments, "--output", str(tmp_path)])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(files)
    printed = capsys.readouterr().out
    assert all(str(tmp_path / name) in printed for name in files)
    assert set(MODES) == {"lookback", "approximate", "exact"}


def test_help_lists_every_job(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = capsys.readouterr().out
    assert all(job.name in printed for job in JOBS)


@pytest.mark.parametrize("name", ["regression", "digits-mlp", "digits-cnn", "character-transformer"])
def test_a_workload_is_the_same_for_the_same_seed_and_its_loss_function_is_its_loss(name: str) -> None:
    state = torch.get_rng_state()
    first, second = (WORKLOADS[name].make(3, Data()) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    batch, again = next(first.batches(3)), next(second.batches(3))
    assert all(map(torch.equal, batch, again))
    loss = first.loss(first.model, batch)
    assert torch.equal(loss, second.loss_function(again)(dict(second.model.named_parameters())))


def test_text_is_split_and_each_target_is_the_next_character() -> None:
    train, valid = Data().text()
    assert len(train.characters) == pytest.approx(9 * len(valid.characters), rel=1e-3)
    assert train.alphabet == valid.alphabet > train.characters.max()
    inputs, targets = next(excerpts(train, 4)(0))
    assert inputs.shape == targets.shape == (4, CONTEXT)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_text_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "tinyshakespeare.txt").write_text("ab" * 100, "utf-8")
    train, valid = Data(tmp_path).text()
    assert (len(train.characters), len(valid.characters), train.alphabet) == (180, 20, 2)


def test_tables_line_up() -> None:
    assert markdown.markdown_table(["name", "n"], [["a", "1"], ["long", "100"]]).splitlines() == [
        "| name |   n |",
        "| ---- | --: |",
        "| a    |   1 |",
        "| long | 100 |",
    ]


def test_the_study_of_the_curvature_counts_signs_that_are_wrong() -> None:
    seen = ((1.1, 0.001), (1.1, 0.001), (-0.5, 0.001), (0.0, 0.1))  # what was probed where 1 is exact, and its noise
    comparisons = [curvature.Comparison(m, 1.0, *each) for m in curvature.MULTIPLES for each in seen]

    def cells(table: str) -> list[list[str]]:
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]

    assert {(row[1], row[-1]) for row in cells(curvature._by_multiple(comparisons))} == {("4", "50.0%")}
    found = [(row[0], row[1], row[5]) for row in cells(curvature._by_noise(comparisons))]
    count = len(curvature.MULTIPLES)
    assert found == [("0 to 0.01", str(3 * count), "33.3%"), ("10 to inf", str(count), "100.0%")]
