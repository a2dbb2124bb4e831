"""The code that a page of docs/ shows, to be run."""

from __future__ import annotations

from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def page_block(page: str, marker: str) -> str:
    """The code right under a marker of the page."""
    text = (DOCS / page).read_text(encoding="utf-8")
    after = text.partition(f"<!-- {marker} -->\n\n```python\n")[2]
    assert after, f"{page} has no block under {marker}"
    return after.partition("```")[0]
