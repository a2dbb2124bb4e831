"""Tests of the matrix of versions: its sets, its constraints, and its page. They make no environment."""

import ast
import json
import re
from pathlib import Path

import pytest

from fused_steer import _tried

ROOT = Path(__file__).resolve().parents[2]


def test_matrix_constraints_change_the_named_libraries_alone(matrix):
    text = "# why\ntorch==2.13.0\ntransformers==5.23.0; python_version >= '3.11'\ntransformers==5.20.2\npeft==0.21.2\n"
    changed = matrix.constraints(text, {"transformers": "5.24.*"})
    assert changed.splitlines() == ["# why", "torch==2.13.0", "transformers==5.24.*", "peft==0.21.2"]
    cuda = "nvidia-nvjitlink==13.5.37\ncuda-toolkit==13.0.2\nnumpy==2.0\ntorch==2.13.0\n"
    assert matrix.constraints(cuda, {"torch": "2.11.*"}).splitlines() == ["numpy==2.0", "torch==2.11.*"]
    assert len(matrix.constraints(cuda, {}).splitlines()) == 4
    with pytest.raises(ValueError, match="does not name triton; expected a library of it"):
        matrix.constraints(text, {"triton": "3.9.*"})


def test_matrix_sets_fit_the_constraints_and_name_tests_that_exist(matrix):
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    for changed in matrix.SETS.values():
        matrix.constraints(text, changed)
    for changed in matrix.SETS.values():
        for file in matrix.files_of(changed):
            assert (ROOT / file).exists(), file


def imported(*files: Path) -> set[str]:
    """The packages that these files import, at the top or anywhere inside."""
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    return {name.partition(".")[0] for name in names}


def test_matrix_leaves_out_the_tests_of_what_does_not_import_a_library(matrix):
    assert set(matrix.KERNELS) <= set(matrix.files_of({})) & set(matrix.files_of({"triton": "3.9.*"}))
    assert not set(matrix.KERNELS) & set(matrix.files_of({"transformers": "5.24.*"}))
    assert not imported(*(ROOT / "kernels").rglob("*.py")) & {"transformers", "peft", "trl"}
    assert matrix.files_of({"trl": "1.14.*"}) == list(matrix.OF_LIBRARY["trl"])
    sources = (ROOT / "fused_steer").rglob("*.py")
    assert sorted(file.name for file in sources if "trl" in imported(file)) == ["running.py", "trl.py"]


def test_matrix_page_shows_what_passed_failed_and_never_ran(matrix):
    versions = dict.fromkeys(matrix.SHOWN, "1.2.3")
    outcomes = {
        "pinned": matrix.Outcome("pinned", {}, versions, {"passed": 7}, commit="abcdef0123"),
        "triton-3.6": matrix.Outcome("triton-3.6", {}, versions, {"passed": 6, "failed": 1}, ["tests/a.py::test_b[c]"]),
        "triton-3.9": matrix.Outcome("triton-3.9", {}, versions, {"passed": 5}, commit="abcdef0123", one_in=4),
        "trl-1.14": matrix.Outcome("trl-1.14", {}, note="cannot be installed together: so"),
    }
    rows = {
        line.split(" | ")[0].strip("| "): line
        for line in matrix.page(outcomes, {}).splitlines()
        if line.startswith("|")
    }
    assert "| 1.2.3 | 1.2.3 |" in rows["pinned"] and "7 passed (abcdef0)" in rows["pinned"]
    assert "6 passed, **1 failed**: `a.py::test_b[c]`" in rows["triton-3.6"]
    assert "| 5 passed of one test in 4 (abcdef0) |" in rows["triton-3.9"]
    assert "cannot be installed together: so" in rows["trl-1.14"]
    assert "| not run |" in rows["triton-3.8"]
    assert "| not run: this torch is a CUDA build, several gigabytes |" in rows["torch-2.15"]
    assert set(matrix.SETS) <= set(rows)


def test_matrix_files_are_those_of_the_kept_results(matrix, tmp_path, monkeypatch):
    """The page, and the series that are tried without a warning."""
    kept = {name: getattr(matrix, name) for name in ("PAGE", "TRIED")}
    for name, file in kept.items():
        monkeypatch.setattr(matrix, name, tmp_path / file.name)
    matrix.write(matrix.load())
    for file in kept.values():
        assert (tmp_path / file.name).read_text(encoding="utf-8") == file.read_text(encoding="utf-8"), file
    assert set(_tried.MATRIX) == set(matrix.SHOWN)


def test_matrix_series_are_tried_if_every_test_of_their_set_passed(matrix):
    versions = {"torch": "2.20.1", "triton": "3.10.0", "transformers": "5.9.0", "peft": "0.30.0", "trl": "1.2.0"}
    changed = {"torch": "2.20.*", "triton": "3.10.*"}

    def series(**counts: int) -> dict[str, list[str]]:
        outcome = matrix.Outcome("new", changed, versions, counts)
        return matrix.tried({"new": outcome}, "torch==2.3.0\ntriton==3.9.0\ntrl==1.4.0\n")

    pinned = {"torch": ["2.3"], "triton": ["3.9"], "transformers": [], "peft": [], "trl": ["1.4"]}
    assert series(passed=9, skipped=1) == pinned | {"torch": ["2.3", "2.20"], "triton": ["3.9", "3.10"]}
    for counts in (
        {},
        {"skipped": 4},
        {"passed": 9, "failed": 1},
        {"passed": 9, "error": 1},
        {"passed": 9, "errors": 2},
    ):
        assert series(**counts) == pinned


def test_matrix_page_shows_what_releases_require(matrix):
    asked = {"torch": {"2.1.0": ["triton==3.0.0"], "2.2.0": ["triton==3.0.0"], "2.3.0": []}}
    rows = [line for line in matrix.page({}, asked).splitlines() if line.startswith("| torch 2.")]
    assert rows == ["| torch 2.1.0, 2.2.0 | triton==3.0.0 |", "| torch 2.3.0 | – |"]
    kept = json.loads(matrix.REQUIREMENTS.read_text(encoding="utf-8"))
    for library, series in matrix.wanted_releases().items():
        assert {f"{number}.*" for version in kept[library] for number in re.findall(r"^\d+\.\d+", version)} == set(
            series
        )


def test_matrix_says_which_requirements_exclude_each_other(matrix):
    printed = """ERROR: Cannot install a and b because these package versions have conflicting dependencies.

The conflict is caused by:
    a 1 depends on c<2
    b 2 depends on c>=2
    b 2 depends on c>=2

To fix this you could try to: loosen the range
"""
    assert matrix.conflict(printed) == "a 1 depends on c<2; b 2 depends on c>=2"
    assert matrix.conflict("ERROR: no such thing\nERROR: more") == "no such thing"
    assert matrix.conflict("") == "pip failed"
