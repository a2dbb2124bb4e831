"""Tests of steering in vLLM over two processes and with speculation, with tiny models, against transformers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import vllm_compiled_on_cpu
from safetensors.torch import load_file, save_file
from vllm_models import CONFIGS, NEW_TOKENS, PROMPTS, SIZES, answers, engine_options, save_adapter, save_model

pytestmark = pytest.mark.vllm

WORKER = Path(__file__).with_name("vllm_worker.py")
NAMES = ("silu", "vector")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Make a folder with model/, two drafts and two adapters. Two processes share each pair of key and value heads."""
    root = tmp_path_factory.mktemp("served")
    sizes = {**SIZES, "num_key_value_heads": 2, "num_hidden_layers": 4}
    save_model(root / "model", **sizes)
    save_model(root / "draft", **{**sizes, "num_hidden_layers": 1})
    save_eagle(root / "draft", root / "eagle")
    for seed, name in enumerate(NAMES, 1):
        save_adapter(root / "model", root / name, CONFIGS[name], seed)
    return root


def save_eagle(draft: Path, out: Path) -> None:
    """Save an EAGLE draft with the layer of a model of one layer: it predicts from the target's last hidden state."""
    out.mkdir()
    shutil.copy(draft / "config.json", out)
    layer = {
        name.removeprefix("model."): tensor
        for name, tensor in load_file(draft / "model.safetensors").items()
        if name.startswith("model.layers.") and "input_layernorm" not in name
    }
    hidden = SIZES["hidden_size"]
    layer["fc.weight"] = torch.randn(hidden, 2 * hidden, generator=torch.Generator().manual_seed(3)) / hidden**0.5
    save_file(layer, out / "model.safetensors")


def run(folder: Path, out: Path, environment: dict[str, str], **options: Any) -> list[list[int]]:
    """Answer all prompts by the base and by each adapter, in one batch of an engine in a process of its own."""
    requests = [(name, name and str(folder / name), prompt) for prompt in PROMPTS for name in (None, *NAMES)]
    job = {
        "engine": engine_options(folder / "model", **options),
        "requests": requests,
        "new_tokens": NEW_TOKENS,
        "out": str(out),
    }
    done = subprocess.run(
        [sys.executable, str(WORKER)],
        input=json.dumps(job),
        env={**os.environ, "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", **environment},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert out.exists(), (done.stdout + done.stderr)[-20000:]
    return json.loads(out.read_text())["tokens"]


WAYS: dict[str, dict[str, Any]] = {
    "with LoRA": {"lora_target_modules": ["post_block"]},
    "without LoRA": {"enable_lora": False, "max_loras": 1, "additional_config": {"steering": {"rank": 4, "slots": 2}}},
}
#: On a CPU vLLM itself runs two stages only where it compiles.
ENGINES: dict[str, dict[str, Any]] = {
    "tensor parallel": {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"},
    "pipeline parallel": {
        "pipeline_parallel_size": 2, "distributed_executor_backend": "mp", "enforce_eager": False,
    },
    "draft model": {"speculative_config": {"method": "draft_model", "num_speculative_tokens": 3}},
    "EAGLE": {"speculative_config": {"method": "eagle", "num_speculative_tokens": 2}},
    "n-grams": {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}},
}  # fmt: skip


#: Started without --every-engine.
SAMPLE = [("tensor parallel", "without LoRA")]


@pytest.mark.parametrize(
    ("engine", "way"),
    [
        pytest.param(engine, way, marks=() if (engine, way) in SAMPLE else pytest.mark.every_engine)
        for engine in ENGINES
        for way in WAYS
    ],
)
def test_vllm_parallel_and_speculative_answers(folder, tmp_path, engine, way):
    options = {**ENGINES[engine], **WAYS[way], "max_num_batched_tokens": 256}  # vLLM wants more with drafts
    if engine in ("draft model", "EAGLE"):
        draft = folder / ("draft" if engine == "draft model" else "eagle")
        options["speculative_config"] = {**options["speculative_config"], "model": str(draft)}
    environment = {}
    if engine == "pipeline parallel" and way == "with LoRA":
        environment["PYTHONPATH"] = str(vllm_compiled_on_cpu.install(tmp_path / "plugin"))
    of = [answers(folder / "model", name and folder / name) for name in (None, *NAMES)]
    assert of[0] != of[1] != of[2]
    right = [each[index] for index in range(len(PROMPTS)) for each in of]
    assert run(folder, tmp_path / "out.json", environment, **options) == right
