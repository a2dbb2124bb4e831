"""The pages of docs/: their Python runs, block after block, on tiny models."""

import re
from types import SimpleNamespace

import pytest
import torch
from models import build, tokens
from pages import DOCS, run_page

from fused_steer import SteerConfig, patch_model

PAGES = ["migrating.md", "modes.md", "peft.md"]  # trainer.md and trl.md: test_trainer.py, test_trl.py


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {
        "AutoModelForCausalLM": SimpleNamespace(from_pretrained=lambda name: build()),
        "ids": tokens(),
        "torch": torch,
    }
    run_page(page, names)


def test_the_code_of_the_page_on_serving_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        patch_model(build(), SteerConfig(rank=4)).steering.save(tmp_path / "adapters" / name)
    ids = tokens(batch=3)
    names = {"model": build(), "ids": ids, "mask": torch.ones_like(ids)}
    run_page("serving.md", names)
    assert names["output"].shape == (3, ids.shape[1] + 4)
    assert "2 adapters, 2 in 2 slots of rank 8" in capsys.readouterr().out


def test_no_page_names_a_page_that_is_not_there():
    for page in [*DOCS.glob("*.md"), DOCS.parent / "README.md"]:
        for target in re.findall(r"\]\(((?!https?:)[^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} names {target}"
