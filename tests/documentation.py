"""The scripts of those pages of the documentation that other tests run, to look at what comes of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent.parent / "docs"


def script_of(page: str) -> str:
    """The one Python block of a page."""
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 1
    return blocks[0]


def run(page: str) -> dict[str, Any]:
    """Run the script of a page in the present directory; return its names."""
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(script_of(page), page, "exec"), names)
    return names
