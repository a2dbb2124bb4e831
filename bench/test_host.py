"""Benchmark of the host time of a block's call over the hooked block's; runs `python -m bench.host` in a subprocess.

It runs on a GPU or over the stub driver, where Triton compiles and launches for real and no kernel runs. The goals are
printed and recorded; no time is asserted.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

from bench import goals, host
from bench.checkout import ROOT
from bench.results import Results, Row


def test_host_time_of_a_blocks_call(benchmark, capsys: pytest.CaptureFixture) -> None:
    over = [] if torch.cuda.is_available() else ["bench.stub", "-m"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}

    def measure() -> Results:
        command = [sys.executable, "-m", *over, "bench.host", "--json"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode and done.stderr.startswith("bench.stub:"):
            pytest.skip(done.stderr.strip())
        assert done.returncode == 0, done.stderr[-3000:]
        return Results({"kind": "stub" if over else "gpu"}, rows=[Row(**row) for row in json.loads(done.stdout)])

    results = benchmark.pedantic(measure, rounds=1)
    benchmark.extra_info["ratios"] = {
        f"{row.what}, {row.contender}": goals.host_ratio(
            results, row.what, row.contender, host.RIVALS_ON_HOST[row.what]
        )
        for row in results.rows
    }
    benchmark.extra_info["goals"] = {o.name: (o.value, o.limit, o.met) for o in goals.judge(goals.HOST_GOALS, results)}
    with capsys.disabled():
        print("", *host.lines(results), sep="\n")
    assert all(outcome.value is not None for outcome in goals.judge(goals.HOST_GOALS, results))
