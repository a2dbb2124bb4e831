"""The pages of docs/: their Python runs, block after block, on tiny models."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from models import build, tokens

DOCS = Path(__file__).parents[1] / "docs"
PAGES = ["migrating.md", "peft.md"]


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert blocks
    monkeypatch.chdir(tmp_path)
    names = {
        "AutoModelForCausalLM": SimpleNamespace(from_pretrained=lambda name: build()),
        "ids": tokens(),
        "torch": torch,
    }
    for number, block in enumerate(blocks):
        exec(compile(block, f"{page}, block {number + 1}", "exec"), names)


def test_no_page_names_a_page_that_is_not_there():
    for page in [*DOCS.glob("*.md"), DOCS.parent / "README.md"]:
        for target in re.findall(r"\]\(((?!https?:)[^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} names {target}"
