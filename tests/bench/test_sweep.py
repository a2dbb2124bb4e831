"""Tests of the sweep over layouts: it runs, its candidates are right, and it tries what the schedule chooses."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fused_steer.kernels import triton_backend
from fused_steer.kernels.schedule import (
    TARGETS,
    columns_schedule,
    finish_schedule,
    forward_schedule,
    resident_schedule,
    rows_schedule,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def sweep(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("bench.sweep.__main__")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench.sweep", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("arguments", [(), ("--backward",)], ids=["forward", "backward"])
def test_sweep_every_kind_of_candidate_runs_over_the_stub_driver(arguments):
    done = run("--rehearse", *arguments)
    assert done.returncode == 0, done.stderr
    assert ", 0 cannot run here, " in done.stdout


def test_sweep_without_a_gpu_says_so_in_one_line(tmp_path):
    done = run("--out", str(tmp_path))
    assert done.returncode == 1 and not list(tmp_path.iterdir())
    assert done.stderr.splitlines() == [
        "bench.sweep: there is no CUDA GPU; expected one (--rehearse shows on a CPU that the run works)"
    ]


def test_sweep_tries_the_layouts_that_an_h100_gets(sweep):
    device, forward = TARGETS["sm_90"], sweep.candidates_of("forward")
    missing = []
    for tokens, hidden in forward.SIZES:
        for rank in forward.RANKS:
            tried = forward.candidates(tokens, hidden, rank, device)
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


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_sweep_tries_the_layouts_of_the_backward_that_a_gpu_gets(sweep, target):
    device, backward = TARGETS[target], sweep.candidates_of("backward")
    missing = []
    for tokens, hidden in backward.SIZES:
        for rank in backward.RANKS:
            tried = {
                (c.form, c.rows, c.columns, c.warps, c.stages)
                for c in backward.candidates(tokens, hidden, rank, device)
            }
            for form, layout in (
                ("rows", rows_schedule(tokens, hidden, rank, "bf16", device)),
                ("columns", columns_schedule(tokens, hidden, rank, "bf16", device)),
                ("finish", finish_schedule(hidden, rank)),
            ):
                rows = 0 if form == "finish" else layout.block_n
                key = (form, rows, layout.block_d, layout.num_warps, layout.num_stages)
                if key not in tried:
                    missing.append((tokens, hidden, rank, key))
    assert not missing


def test_sweep_times_the_candidates_of_the_backward_with_right_results(sweep, monkeypatch):
    backward, cpu, tokens, hidden = sweep.candidates_of("backward"), torch.device("cpu"), 80, 136
    launched = []

    def launch(kernel, grid, *arguments, schedule, **constants):
        launched.append((kernel.__name__.split("_")[3], grid, schedule))
        return run_kernel(kernel, grid, *arguments, schedule=schedule, **constants)

    run_kernel = triton_backend.launch
    problem = backward.Problem(tokens, hidden, 4, cpu, 1, False)
    monkeypatch.setattr(triton_backend, "launch", launch)
    candidates = [
        backward.Candidate("chosen"),
        backward.Candidate("packed"),
        backward.Candidate("rows", 16, 64, 4, 2),
        backward.Candidate("columns", 32, 32, 2, 3, 4),
        backward.Candidate("finish", 0, 16, 1, 3),
    ]
    assert {c.form for c in candidates} == set(backward.FORMS)
    for candidate in candidates:
        launched.clear()
        assert problem.error(problem.call_of(candidate)(*problem.sets[0])) < sweep.WORST
        of_form = [(grid, layout) for form, grid, layout in launched if form == candidate.form]
        for grid, layout in of_form:
            assert (layout.block_d, layout.num_warps) == (candidate.columns, candidate.warps)
            assert layout.num_stages == candidate.stages and layout.block_n in (candidate.rows, 64)
            across = -(-tokens // 16) if candidate.form == "rows" else -(-hidden // candidate.columns)
            assert grid[0] == across + (candidate.form == "columns")  # a program for daᵀ h
        assert len(of_form) == (candidate.form not in ("chosen", "packed"))
    wrong = [one + 1 for one in problem.call_of(candidates[0])(*problem.sets[0])]
    assert problem.error(wrong) > sweep.WORST


def test_sweep_prints_the_launches_of_the_chosen_layout(sweep):
    backward = sweep.candidates_of("backward")
    size = {"tokens": 4096, "hidden": 1152, "rank": 8, "add": 2e-6, "error": 0.002}
    chosen = backward.Candidate("chosen")
    rows = [size | vars(chosen) | {"seconds": 4e-6, "launches": [("rows", 1e-6), ("columns", 3e-6)]}]
    first, *launches, _ = sweep.lines(rows, backward.FORMS)
    assert first.split()[-3:] == ["us", "2.00", "adds"] and [line.split()[-1] for line in launches] == [
        "rows",
        "columns",
    ]


def test_sweep_prints_the_best_right_candidate_of_each_form(sweep):
    forward = sweep.candidates_of("forward")
    first, second, third = forward.candidates(16384, 2048, 8, TARGETS["sm_90"])[:3]
    size = {"tokens": 16384, "hidden": 2048, "rank": 8, "add": 2e-6}

    def row(candidate, **outcome):
        return size | vars(candidate) | outcome

    rows = [row(first, seconds=1e-6, error=1.0), row(second, seconds=4e-6, error=0.002), row(third, status="failed: X")]
    best, last = sweep.lines(rows, forward.FORMS)
    assert "4.0 us  2.00 adds" in best and last == "3 candidates, 1 cannot run here, 1 are wrong"
