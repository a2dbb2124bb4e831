"""What README shows runs."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from models import build, logits, tokens
from transformers import AutoModelForCausalLM, TrainingArguments

from fused_steer import SteerConfig, load_joint, patch_model

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(marker: str) -> str:
    """The code under a marker."""
    after = README.partition(f"<!-- {marker} -->\n\n```python\n")[2]
    assert after, f"README has no block under {marker}"
    return after.partition("```")[0]


def test_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda name, dtype: build())
    names = {"dataset": [{"input_ids": ids, "labels": ids} for ids in tokens(batch=8)]}
    exec(compile(block("training"), "README.md", "exec"), names)
    trained = logits(names["model"].eval())
    assert not torch.equal(trained, logits(build()))
    for adapter in ("polite", "out/checkpoint-3"):
        assert torch.equal(logits(patch_model(build(), adapter)), trained)
    assert not list(tmp_path.rglob("model*.safetensors"))  # the base is in no checkpoint


@pytest.mark.skipif(shutil.which("git") is None or not (ROOT / ".git").exists(), reason="needs git and a checkout")
def test_two_commands_begin_in_an_empty_directory(tmp_path):
    """The first is a clone, which leads to all files that the two commands name. It is made of this checkout."""
    clone, demo, tests = re.findall(r"```bash\n(.*?)\n```", README, re.DOTALL)[:3]
    url = re.fullmatch(r"git clone (https://\S+) && cd \S+", clone)[1]
    config = {f"url.{ROOT}.insteadOf": url, "safe.directory": "*"}
    environment = {**os.environ, "GIT_CONFIG_COUNT": str(len(config))}
    for number, (key, value) in enumerate(config.items()):
        environment |= {f"GIT_CONFIG_KEY_{number}": key, f"GIT_CONFIG_VALUE_{number}": value}
    listed = subprocess.run(
        ["bash", "-euc", f"{clone}\nls"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert listed.returncode == 0, listed.stderr
    assert all(command.startswith('pip install -c constraints.txt -e ".[') for command in (demo, tests))
    assert {"constraints.txt", "pyproject.toml", "setup.py", "tests"} <= set(listed.stdout.split())


def test_joint_adaptation_in_ten_lines(tmp_path, monkeypatch):
    code = block("joint")
    assert sum(bool(line.strip()) for line in code.splitlines()) <= 10
    monkeypatch.chdir(tmp_path)
    arguments = TrainingArguments("out", max_steps=2, report_to="none", disable_tqdm=True, use_cpu=True)
    names = {
        "torch": torch,
        "arguments": arguments,
        "model": build(),
        "dataset": [{"input_ids": ids, "labels": ids} for ids in tokens(batch=8)],
    }
    exec(compile(code, "README.md", "exec"), names)
    model = names["model"].eval()
    again = load_joint(build(), tmp_path / "both")
    with torch.no_grad():
        assert torch.equal(again(tokens()).logits, model(tokens()).logits)
    for layer in model.get_base_model().model.layers:
        b, w = layer.mlp.down_proj.lora_B["default"].weight, layer.post_block.steer_up["default"].weight
        assert 0 < b.norm() and 0 < w.norm() and (b.T @ w).norm() <= 1e-5 * b.norm() * w.norm()


def test_serving(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("customer-17", "customer-4711"):
        patch_model(build(), SteerConfig(rank=4)).steering.save(tmp_path / "adapters" / name)
    model = patch_model(build(), adapter_name="polite")
    model.steering.add("terse", SteerConfig(rank=2))
    ids = tokens(batch=3)
    names = {"model": model, "ids": ids, "mask": torch.ones_like(ids)}
    exec(compile(block("serving").replace("=64)", "=4)"), "README.md", "exec"), names)
    assert names["pool"].loaded == ["customer-17", "customer-4711"] and names["pool"].statistics.loads == 2
