"""Tests of the sweep over the forward's layouts: it runs, and it tries what the schedule chooses."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from fused_steer.kernels.schedule import TARGETS, forward_schedule, resident_schedule

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def sweep(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("bench.sweep")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench.sweep", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


def test_sweep_every_kind_of_candidate_runs_over_the_stub_driver():
    done = run("--rehearse")
    assert done.returncode == 0, done.stderr
    assert ", 0 cannot run here, " in done.stdout


def test_sweep_without_a_gpu_says_so_in_one_line(tmp_path):
    done = run("--out", str(tmp_path))
    assert done.returncode == 1 and not list(tmp_path.iterdir())
    assert done.stderr.splitlines() == [
        "bench.sweep: there is no CUDA GPU; expected one (--rehearse shows on a CPU that the run works)"
    ]


def test_sweep_tries_the_layouts_that_an_h100_gets(sweep):
    device = TARGETS["sm_90"]
    missing = []
    for tokens, hidden in sweep.SIZES:
        for rank in sweep.RANKS:
            tried = sweep.candidates(tokens, hidden, rank)
            layout = resident_schedule(tokens, hidden, rank, 2, 2, device)
            if layout is not None:
                form = "direct" if layout.direct else "rows"
                found = any(
                    (c.form, c.rows, c.columns, c.warps, c.ahead, c.held)
                    == (form, layout.block_n, layout.block_d, layout.num_warps, layout.ahead, layout.held)
                    for c in tried
                )
            elif tokens <= 64:
                continue
            else:
                tile = forward_schedule(tokens, hidden, rank, 2, device)
                # A ragged width narrows a tile.
                found = hidden % tile.block_d or any(
                    (c.form, c.rows, c.columns, c.columns_out, c.warps)
                    == ("tiles", tile.block_n, tile.block_d, tile.block_d2, tile.num_warps)
                    for c in tried
                )
            if not found:
                missing.append((tokens, hidden, rank, layout or tile))
    assert not missing


def test_sweep_prints_the_best_right_candidate_of_each_form(sweep):
    first, second, third = sweep.candidates(16384, 2048, 8)[:3]
    size = {"tokens": 16384, "hidden": 2048, "rank": 8, "add": 2e-6}

    def row(candidate, **outcome):
        return size | vars(candidate) | outcome

    rows = [row(first, seconds=1e-6, error=1.0), row(second, seconds=4e-6, error=0.002), row(third, status="failed: X")]
    best, last = sweep.lines(rows)
    assert "4.0 us  2.00 adds" in best and last == "3 candidates, 1 cannot run here, 1 are wrong"
