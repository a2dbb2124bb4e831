"""The stub driver: Triton's real launch path, in a process of its own, over a driver library that does nothing."""

import functools
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64") or shutil.which("gcc") is None,
    reason="the stub driver needs gcc, Linux and x86-64",
)


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "bench.stub", *arguments],
        cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@functools.cache
def worked() -> dict:
    done = run("tests/stub_worker.py", TRITON_INTERPRET="1", FUSED_STEER_BACKEND="torch")
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_stub_process_compiles_kernels_for_cpu_tensors():
    assert worked()["backend"] == "triton" and worked()["interpret"] is None


def test_stub_keeps_the_launches_of_each_call():
    few, many, training = (worked()[name] for name in ("few", "many", "training"))
    assert len(few) == len(many) == 1 and len(training) >= 3
    assert worked()["counted"] == len(few) + len(many) + len(training)
    for launch in few + many + training:
        assert launch["name"].isidentifier() and min(launch["grid"]) >= 1 and launch["block"] % 32 == 0
    programs = [grid[0] * grid[1] * grid[2] for grid in (few[0]["grid"], many[0]["grid"])]
    assert programs[1] > programs[0]
    assert len({launch["name"] for launch in training}) == len(training)


def test_host_contenders_launch_what_they_should():
    layers, rows = 3, worked()["host"]
    launches = {what: {name: row["launches"] for name, row in of.items()} for what, of in rows.items()}
    call, whole = launches["call"].pop("fused"), launches["train"].pop("fused")
    assert call >= 1 and launches["grouped"].pop("fused") >= 1
    assert whole >= 3 * layers and whole % layers == 0  # forward, and two of backward, at least
    assert launches["compiled"].pop("fused") == launches["compiled"].pop("eager") == call * layers
    assert {count for of in launches.values() for count in of.values()} == {0}  # none of the rivals' is Triton's


def test_host_samples_are_one_a_round():
    for of in worked()["host"].values():
        for row in of.values():
            assert len(row["samples"]) == 2 and min(row["samples"]) > 0


def test_stub_refuses_in_one_line():
    assert worked()["last"].startswith("ValueError: number is 1048576; expected 0 to")
    assert worked()["device"] == "ValueError: device is 'sm_75'; expected one of sm_80, sm_90"
    done = run()
    assert done.returncode == 2 and done.stderr == (
        "bench.stub: nothing to run; expected FILE or -m MODULE, and its arguments\n"
    )


def test_stub_without_gcc_is_one_line(tmp_path):
    done = run("tests/stub_worker.py", PATH=str(tmp_path), TMPDIR=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr == "bench.stub: there is no gcc; the stub driver is compiled by it (apt install gcc)\n"


def test_stub_in_a_process_that_interprets_is_one_line():
    program = "from bench.stub import arm; arm()"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.stderr.splitlines()[-1] == (
        "RuntimeError: TRITON_INTERPRET is set; expected a process without it: `python -m bench.stub FILE`"
    )
