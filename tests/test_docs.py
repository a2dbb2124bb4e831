"""The pages of docs/: their Python runs, block after block, on tiny models."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import build, tokens

DOCS = Path(__file__).parents[1] / "docs"
PAGES = ["migrating.md", "modes.md", "peft.md"]  # trainer.md and trl.md: test_trainer.py, test_trl.py


def run_page(page: str, names: dict[str, Any]) -> None:
    """Run all Python of a page; `names` is what it finds, and afterwards what it made."""
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert blocks
    for number, block in enumerate(blocks):
        exec(compile(block, f"{page}, block {number + 1}", "exec"), names)


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {
        "AutoModelForCausalLM": SimpleNamespace(from_pretrained=lambda name: build()),
        "ids": tokens(),
        "torch": torch,
    }
    run_page(page, names)


def test_no_page_names_a_page_that_is_not_there():
    for page in [*DOCS.glob("*.md"), DOCS.parent / "README.md"]:
        for target in re.findall(r"\]\(((?!https?:)[^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} names {target}"
