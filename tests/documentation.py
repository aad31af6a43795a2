"""The scripts of the documentation's pages."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent.parent / "docs"


def script_of(page: str) -> str:
    """The one Python block of a page: a complete script of at most 40 lines."""
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 1
    assert blocks[0].count("\n") <= 40, f"the script of {page} has more than 40 lines"
    return blocks[0]


def run(page: str) -> dict[str, Any]:
    """Run the script of a page in the present directory; return its names."""
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(script_of(page), page, "exec"), names)
    return names
