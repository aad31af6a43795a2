"""Reads the scripts of docs/examples, which train with the bare and with the wrapped optimizer, and runs them."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "examples"


@dataclass(frozen=True)
class Example:
    """A script that branches on the name ``bare``, with the difference between its branches in its docstring."""

    name: str

    @property
    def path(self) -> Path:
        return FOLDER / f"{self.name}.py"

    @property
    def source(self) -> str:
        return self.path.read_text(encoding="utf-8")

    def stated(self, sign: str) -> Counter[str]:
        """The lines of the diff in the docstring that begin with a sign."""
        docstring = ast.get_docstring(ast.parse(self.source)) or ""
        return Counter(line[1:].strip() for line in docstring.splitlines() if line.startswith(sign))

    def lines(self, *, bare: bool) -> Counter[str]:
        """The lines of the script as one would write it with the bare, or with the wrapped optimizer alone."""
        source = _decided(self.source, bare=bare)
        tree = ast.parse(source)
        used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        lines = source.splitlines()
        for node in tree.body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                node.names = [each for each in node.names if each.name.split(".")[0] in used]
                lines[node.lineno - 1] = ast.unparse(node) if node.names else ""
        return Counter(line for line in lines[tree.body[0].end_lineno :] if line)

    def run(self, folder: Path) -> str:
        """Run it in short in an empty folder; return what it prints. What GeN warns of is an error."""
        command = [sys.executable, "-W", "error:GeNOptimizer", str(self.path), "--quick"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout


def _decided(source: str, *, bare: bool) -> str:
    """A script with its branches on the name ``bare`` decided."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.If) or ast.unparse(node.test) not in ("bare", "not bare"):
            continue
        chosen = node.body if bare is (ast.unparse(node.test) == "bare") else node.orelse
        kept = range(chosen[0].lineno, (chosen[-1].end_lineno or 0) + 1) if chosen else range(0)
        for number in range(node.lineno, (node.end_lineno or 0) + 1):
            lines[number - 1] = lines[number - 1][4:] if number in kept else ""
    return "\n".join(lines)


def assert_diff_is_true(example: Example) -> None:
    bare, wrapped = example.lines(bare=True), example.lines(bare=False)
    removed, added = bare - wrapped, wrapped - bare
    assert example.stated("-") == Counter(map(str.strip, removed.elements()))
    assert example.stated("+") == Counter(map(str.strip, added.elements()))
    assert example.stated(" ") <= Counter(map(str.strip, (bare & wrapped).elements()))


def assert_it_trains_bare_and_wrapped(example: Example, folder: Path) -> None:
    printed = example.run(folder)
    assert "seed 0, GeN(" in printed
    assert printed.count("ms per step") == 2
