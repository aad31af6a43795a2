"""The README and the documentation: their code runs, their links lead somewhere, nothing public is left out."""

from __future__ import annotations

import ast
import doctest
import importlib.util
import itertools
import pkgutil
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim import AdamW
from torch.optim.lr_scheduler import LinearLR

import gen_optim
from benchmarks.data import Data
from benchmarks.workloads.digits import digit_network
from benchmarks.workloads.registry import Batch, shuffled
from gen_optim import GeNOptimizer
from tests.training import mlp, regression_data

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
EXAMPLES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "gen_optim").rglob("*.py")
    if path.name != "__init__.py"
    and any(">>> " in line and "+SKIP" not in line for line in path.read_text("utf-8").splitlines())
)
"""Modules whose docstrings hold examples that run by themselves."""
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
CONTINUED = ["tutorial.md"]
"""Pages whose blocks continue each other, a script first."""
FRAMEWORKS = ("accelerate", "datasets", "lightning", "matplotlib", "peft", "tensorboard", "torchao", "transformers")
"""What a page may ask for and the tests do without; anything else that is missing is an error."""
LONGEST_SCRIPT = 40


@dataclass(frozen=True)
class Block:
    """A Python block of a page.

    Attributes:
        code: Its lines, at the margin.
        line: The number of the first one.
        run_by: The test that runs it, from the comment ``<!-- run by tests/... -->`` before it; None if this file does.
    """

    code: str
    line: int
    run_by: str | None

    @property
    def is_script(self) -> bool:
        """Whether it runs alone. Other blocks find a model, data, and what the blocks before them have defined."""
        return "import torch" in self.code.splitlines()


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    pattern = r"^(?:<!-- run by (?P<run_by>\S+) -->\n+)?(?P<indent> *)```python\n(?P<code>.*?)^ *```"
    return [
        Block(
            code=re.sub(f"^{found['indent']}", "", found["code"], flags=re.MULTILINE),
            line=text.count("\n", 0, found.start("code")) + 1,
            run_by=found["run_by"],
        )
        for found in re.finditer(pattern, text, flags=re.MULTILINE | re.DOTALL)
    ]


def missing_frameworks(blocks: list[Block]) -> list[str]:
    names = {
        (node.module if isinstance(node, ast.ImportFrom) else alias.name).split(".")[0]
        for block in blocks
        for node in ast.walk(ast.parse(block.code))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    return sorted(name for name in names.intersection(FRAMEWORKS) if importlib.util.find_spec(name) is None)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.timeout(600)  # a compiler may run
# Importing inductor meets a deprecation of torch's own.
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page)], ids=name_of)
def test_every_python_block_runs_in_order(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = [block for block in blocks_of(page) if block.run_by is None]
    missing = missing_frameworks(blocks)
    if missing:
        pytest.skip(f"{name_of(page)} needs {', '.join(missing)}, which is not installed")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    inputs, targets = regression_data()
    shared: dict[str, Any] = {
        "torch": torch,
        "model": mlp(),
        "loss_fn": torch.nn.functional.mse_loss,
        "loader": [(inputs, targets)] * 60,
        "steps": 60,
    }
    for block in blocks:
        # Numbered as in the page, for the traceback.
        code = compile("\n" * (block.line - 1) + block.code, str(page), "exec")
        exec(code, {"__name__": "__main__"} if block.is_script and page.name not in CONTINUED else shared)
    if page == README:
        assert len(blocks) >= 3
        assert shared["loss"].item() < 0.5
        assert len(shared["history"]) > 0


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_what_another_test_is_said_to_run_is_run_there(page: Path) -> None:
    for block in blocks_of(page):
        if block.run_by is not None:
            assert re.search(rf'(run|script_of)\("{page.name}"\)', (ROOT / block.run_by).read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES[3:], ids=name_of)
def test_no_script_is_longer_than_can_be_read_at_a_glance(page: Path) -> None:
    for block in blocks_of(page):
        lines = [line for line in block.code.splitlines() if line.strip()]
        assert len(lines) <= LONGEST_SCRIPT, f"{name_of(page)}:{block.line}"


def without_code(page: Path) -> str:
    return re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def anchors_of(page: Path) -> set[str]:
    """The headings, as links to them spell them."""
    headings = re.findall(r"^#+ (.+)$", without_code(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)[^)]*\)", without_code(page)):
        target, _, anchor = link.partition("#")
        if "://" not in link:
            assert (page.parent / target).exists(), link
            assert not anchor or anchor in anchors_of(page.parent / target if target else page), link


def test_everything_public_is_in_the_reference() -> None:
    reference = (ROOT / "docs" / "reference" / "index.md").read_text(encoding="utf-8")
    for name in gen_optim.__all__:
        assert re.search(rf"auto(class|function):: {name}$", reference, flags=re.MULTILINE), name
    subpackages = [Path(gen_optim.__file__).parent / "integrations"]
    integrations = [f"gen_optim.integrations.{each.name}" for each in pkgutil.iter_modules(map(str, subpackages))]
    for name in ("gen_optim.plotting", *integrations):
        if not name.rpartition(".")[2].startswith("_"):
            assert f"automodule:: {name}\n" in reference, name


def test_the_commands_are_marked_for_the_checks() -> None:
    for name, module in (("main job", "benchmarks"), ("tests", "pytest")):
        command = README.read_text(encoding="utf-8").split(f"<!-- command: {name} -->\n```sh\n")[1].split("\n```")[0]
        assert "\n" not in command
        assert f".venv/bin/python -m {module}" in command
        assert "-c constraints.txt" in command


def validation_loss(lr: float) -> float:
    """Train the README's example on the digits."""
    split = Data().digits(seed=0)
    model, batches = digit_network(seed=0), shuffled(split.train, 128)(0)
    optimizer = GeNOptimizer(AdamW(model.parameters(), lr=lr))
    scheduler = LinearLR(optimizer, start_factor=1.0, end_factor=0.0, total_iters=200)
    for batch in itertools.islice(batches, 200):

        def closure(batch: Batch = batch) -> Tensor:
            optimizer.zero_grad()
            loss = cross_entropy(model(batch[0]), batch[1])
            loss.backward()
            return loss

        optimizer.step(closure)
        scheduler.step()
    with torch.no_grad():
        return cross_entropy(model(split.valid_x), split.valid_y).item()


def test_the_example_ends_at_the_same_validation_loss_from_any_learning_rate() -> None:
    losses = [validation_loss(lr) for lr in (1e-7, 1e-3, 10.0)]
    assert max(losses) < 0.25
    assert max(losses) <= 1.1 * min(losses)


@pytest.mark.parametrize("module", EXAMPLES)
def test_examples_in_docstrings(module: str) -> None:
    outcome = doctest.testmod(importlib.import_module(module))
    assert outcome.attempted > 0
    assert outcome.failed == 0
