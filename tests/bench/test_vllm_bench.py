"""Tests of `python -m bench.vllm`: both engines answer in turn, and their times are in the results file."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm
ROOT = Path(__file__).parents[2]


@pytest.mark.every_engine
def test_vllm_bench_steered_and_unsteered_are_measured_side_by_side(tmp_path):
    command = "-m bench.vllm --layers 2 --batches 4:4,4:1 --length 16 --rounds 2 --out".split()
    done = subprocess.run([sys.executable, *command, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stdout.splitlines() if "adapters: unsteered" in line]
    assert len(lines) == 2 and not any("wrong" in line for line in lines), lines
    sys.path.insert(0, str(ROOT))
    try:
        from bench.results import load
    finally:
        sys.path.remove(str(ROOT))
    (file,) = tmp_path.iterdir()
    results = load(file)
    assert results.machine["versions"]["vllm"] and results.machine["command"].startswith("python -m bench.vllm")
    names = ("unsteered", "no-adapter", "one-adapter", "fused", "fused-again")
    assert [row.contender for row in results.rows] == [*names, *names]
    assert all(row.status == "ok" and len(row.samples) == 2 for row in results.rows), results.rows


def test_vllm_bench_an_engine_that_does_not_start_is_one_line(tmp_path):
    command = "-m bench.vllm --layers 1 --batches 1:1 --dtype float16 --length 100000 --rounds 1 --out".split()
    done = subprocess.run([sys.executable, *command, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "bench.vllm: vLLM did not start: " in done.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())
