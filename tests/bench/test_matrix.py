"""Tests of the matrix of versions: its sets, its constraints, and its page. They make no environment."""

import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def matrix():
    sys.path.append(str(ROOT))
    try:
        return importlib.import_module("bench.matrix")
    finally:
        sys.path.remove(str(ROOT))


def test_matrix_constraints_change_the_named_libraries_alone(matrix):
    text = "# why\ntorch==2.13.0\ntransformers==5.23.0; python_version >= '3.11'\ntransformers==5.20.2\npeft==0.21.2\n"
    changed = matrix.constraints(text, {"transformers": "5.24.*"})
    assert changed.splitlines() == ["# why", "torch==2.13.0", "transformers==5.24.*", "peft==0.21.2"]
    with pytest.raises(ValueError, match="does not name triton; expected a library of it"):
        matrix.constraints(text, {"triton": "3.9.*"})


def test_matrix_sets_fit_the_constraints_and_name_tests_that_exist(matrix):
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    for changed in matrix.SETS.values():
        matrix.constraints(text, changed)
    for file in [*matrix.CORE, *(file for files in matrix.OF_LIBRARY.values() for file in files)]:
        assert (ROOT / file).exists(), file


def test_matrix_page_shows_what_passed_failed_and_never_ran(matrix):
    versions = dict.fromkeys(matrix.SHOWN, "1.2.3")
    outcomes = {
        "pinned": matrix.Outcome("pinned", {}, versions, {"passed": 7}, commit="abcdef0123"),
        "triton-3.6": matrix.Outcome("triton-3.6", {}, versions, {"passed": 6, "failed": 1}, ["tests/a.py::test_b[c]"]),
        "trl-1.14": matrix.Outcome("trl-1.14", {}, note="cannot be installed together: so"),
    }
    rows = {
        line.split(" | ")[0].strip("| "): line for line in matrix.page(outcomes).splitlines() if line.startswith("|")
    }
    assert "| 1.2.3 | 1.2.3 |" in rows["pinned"] and "7 passed (abcdef0)" in rows["pinned"]
    assert "6 passed, **1 failed**: `a.py::test_b[c]`" in rows["triton-3.6"]
    assert "cannot be installed together: so" in rows["trl-1.14"]
    assert "| not run |" in rows["torch-2.15"]
    assert set(matrix.SETS) <= set(rows)


def test_matrix_page_is_that_of_the_kept_results(matrix):
    assert matrix.PAGE.read_text(encoding="utf-8") == matrix.page(matrix.load())
