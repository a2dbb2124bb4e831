"""Test of `fused-steer verify-vllm` on a tiny model, with vLLM's own engines."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from vllm_models import save_model

pytestmark = pytest.mark.vllm


def test_verify_vllm_all_promises_are_kept_on_this_machine(tmp_path):
    model = save_model(tmp_path / "model")
    code = "from fused_steer.cli import app; app()"
    options = ["--rows", "6", "--adapters", "2", "--length", "36", "--new-tokens", "8", "--rounds", "1", "--json"]
    command = [sys.executable, "-c", f"if __name__ == '__main__':\n    {code}", "verify-vllm", "--model", str(model)]
    done = subprocess.run([*command, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    report = json.loads(done.stdout[done.stdout.index("{") :])
    kept = {check["promise"]: check["kept"] for check in report["checks"]}
    assert kept == {
        "steering acts as in Hugging Face": True,
        "steered differs from base": True,
        "unsteered as in Hugging Face": True,
        "neighbours untouched": True,
        "reload under one name is clean": True,
        "CUDA graphs are captured": None,
    }
    assert report["ratios"]["vanilla"] == [1.0, 1.0, 1.0] and report["kept"]
    assert {"idle", "one request", "all, one adapter", "all, 2 adapters"} <= report["ratios"].keys()
    assert all(Path(name).name for name in report["machine"])
