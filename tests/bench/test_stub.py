"""Tests of the stub driver: Triton's real launch path over a driver library that does nothing, in a subprocess."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench.rehearsal import rehearse_tests

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64") or shutil.which("gcc") is None,
    reason="the stub driver needs gcc, Linux and x86-64",
)


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "bench.stub", *arguments],
        cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.fixture(scope="module")
def worked() -> dict:
    """Run the worker; return its findings."""
    done = run("tests/stub_worker.py", TRITON_INTERPRET="1", FUSED_STEER_BACKEND="torch")
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_stub_process_compiles_kernels_for_cpu_tensors(worked):
    assert worked["backend"] == "triton" and worked["interpret"] is None


def test_stub_keeps_the_launches_of_each_call(worked):
    few, many, training = (worked[name] for name in ("few", "many", "training"))
    assert len(few) >= 1 and len(many) >= 1 and len(training) >= 3
    assert worked["counted"] == len(few) + len(many) + len(training)
    for launch in few + many + training:
        assert launch["name"].isidentifier() and min(launch["grid"]) >= 1 and launch["block"] % 32 == 0
    assert few[-1]["grid"] != many[-1]["grid"]
    assert len({launch["name"] for launch in training}) >= 3


def test_stub_host_contenders_launch_what_they_should(worked):
    layers, rows = 3, worked["host"]
    launches = {what: {name: row["launches"] for name, row in of.items()} for what, of in rows.items()}
    call, whole = launches["call"].pop("fused"), launches["train"].pop("fused")
    assert call >= 1 and launches["grouped"].pop("fused") >= 1
    assert whole >= 3 * layers and whole % layers == 0  # at least one of forward and two of backward
    assert launches["pass"].pop("fused") == call * layers
    assert launches["compiled"].pop("fused") == launches["compiled"].pop("eager") == call * layers
    assert {count for of in launches.values() for count in of.values()} == {0}  # the rivals launch no Triton kernels


def test_stub_host_samples_are_one_a_round(worked):
    for of in worked["host"].values():
        for row in of.values():
            assert len(row["samples"]) == 2 and min(row["samples"]) > 0


def test_stub_refuses_in_one_line(worked):
    assert worked["last"].startswith("ValueError: number is 1048576; expected 0 to")
    assert worked["device"] == "ValueError: device is 'sm_75'; expected one of sm_80, sm_90"
    done = run()
    assert done.returncode == 2 and done.stderr == (
        "bench.stub: nothing to run; expected FILE or -m MODULE, and its arguments\n"
    )
    done = run("--help")
    assert done.returncode == 0 and done.stdout.startswith("`python -m bench.stub FILE ...`")


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


# ------------------------------------------------------------------------------------------------------------ rehearsal


def test_stub_rehearsal_of_the_gpu_run_finds_no_problem(worked):
    assert worked["rehearsal"]["problems"] == [] and worked["rehearsal"]["steps"] == 7
    assert worked["rehearsal"]["cuda"] == "cpu"


def test_stub_rehearsal_finds_a_wrong_name(worked):
    misspelt = worked["rehearsal"]["misspelt"]
    assert misspelt and all("failed: " in line and "profile" in line for line in misspelt)


def test_stub_rehearsal_of_tests_expects_wrong_numbers_and_nothing_else(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import torch\n"
        "def test_numbers(): assert torch.ones(1, device='cuda').sum() == 2\n"
        "def test_close(): torch.testing.assert_close(torch.zeros(1).cuda(), torch.ones(1))\n"
        "def test_misspelt(): torch.cuda.synchronise()\n"
        "def test_right(): torch.cuda.synchronize()\n"
    )
    done = run("-m", "bench.checkout", "-p", "bench.stub.pretence", "-q", "-p", "no:cacheprovider", str(tmp_path))
    assert done.returncode == 1 and "1 failed, 1 passed, 2 xfailed" in done.stdout, done.stdout[-2000:]
    assert "FAILED" in done.stdout and "test_misspelt" in done.stdout


def test_stub_rehearsal_on_few_sizes_runs_gpu_tests():
    said: list[str] = []
    assert rehearse_tests(True, said.append) == []
    assert len(said) == 1 and re.match(r"gpu tests, fp16: .*[1-9]\d* (passed|xfailed)", said[0]), said


def test_stub_rehearsal_writes_no_results(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu", "--rehearse", "--out", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and not list(tmp_path.iterdir())
    assert done.stderr == f"bench.gpu: out is {str(tmp_path)!r}; expected none, as a rehearsal writes no results\n"
