"""A test of `fused-steer verify-vllm` with vLLM's own engines and a tiny random model."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from vllm_models import save_model

pytestmark = pytest.mark.vllm


def test_verify_vllm_finds_that_all_is_well(tmp_path):
    model = save_model(tmp_path / "model")
    options = ["--rows", "7", "--adapters", "2", "--length", "36", "--new-tokens", "8", "--rounds", "1", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "fused_steer", "verify-vllm", "--model", str(model), *options],
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.stdout.startswith("{"), done.stderr[-2000:]
    report = json.loads(done.stdout)
    kept = {check["promise"]: check["kept"] for check in report["checks"]}
    assert kept == {
        "steering acts as in Hugging Face": True,
        "wrong steering would be seen": True,
        "unsteered as in Hugging Face": True,
        "neighbours untouched": True,
        "reload under one name is clean": True,
        "CUDA graphs are captured": None,
    }, report["checks"]
    assert report["kept"] and done.returncode == 0
    assert report["ratios"]["vanilla"] == [1.0, 1.0, 1.0]
    assert {"idle", "one request", "all, one adapter", "all, 2 adapters", "all, 7 strengths"} <= report["ratios"].keys()
