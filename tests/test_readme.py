"""Tests of README: its code runs, and its counts are correct."""

import functools
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from models import build, logits, randomize, tokens
from text import tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TrainingArguments

from fused_steer import SteerConfig, load_joint, patch_model
from fused_steer.tools import demo

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(marker: str, page: str = README) -> str:
    """Return the code block under a marker of README or another page."""
    after = page.partition(f"<!-- {marker} -->\n\n```python\n")[2]
    assert after, f"there is no block under {marker}"
    return after.partition("```")[0]


def run_block(code: str, names: dict[str, Any]) -> dict[str, Any]:
    exec(compile(code, "README.md", "exec"), names)
    return names


def test_readme_try_it(tmp_path, monkeypatch, capsys):
    """The block runs unchanged, with a tiny model and a character tokenizer in place of SmolLM2."""
    monkeypatch.chdir(tmp_path)
    model = build()
    monkeypatch.setattr(demo, "load_smollm2", lambda: (model, tokenizer()))
    before = logits(model)
    names = run_block(block("try"), {})
    assert len(names["rows"]) == 20 and names["step"] == 59
    (said, tuned), trained = capsys.readouterr().out.splitlines(), logits(model.eval())
    assert said.startswith("before:") and tuned.startswith("after: ")
    assert not torch.equal(trained, before) and torch.equal(logits(patch_model(build(), "pirate")), trained)
    first = names["encode"]("Q: What is the sun?\nA: Arr, the sun be a great ball o' fire!\n")
    with torch.no_grad(), model.steering.disabled():
        base = model(input_ids=first, labels=first).loss
    with torch.no_grad():
        assert model(input_ids=first, labels=first).loss < base


def test_readme_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda name: build())
    names = {
        "AutoModelForCausalLM": AutoModelForCausalLM,
        "TrainingArguments": TrainingArguments,
        "dataset": [{"input_ids": ids, "labels": ids} for ids in tokens(batch=8)],
    }
    run_block(block("training"), names)
    trained = logits(names["model"].eval())
    assert not torch.equal(trained, logits(build()))
    for adapter in ("polite", "out/checkpoint-3"):
        assert torch.equal(logits(patch_model(build(), adapter)), trained)
    assert not list(tmp_path.rglob("model*.safetensors"))  # no checkpoint has the base


@pytest.mark.skipif(shutil.which("git") is None or not (ROOT / ".git").exists(), reason="needs git and a checkout")
def test_readme_two_commands_begin_in_an_empty_directory(tmp_path):
    """The two commands work in an empty directory. The first clones, here from this checkout."""
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


def test_readme_joint_adaptation_in_ten_lines(tmp_path, monkeypatch):
    code = block("joint", (ROOT / "docs" / "joint.md").read_text(encoding="utf-8"))
    assert sum(bool(line.strip()) for line in code.splitlines()) <= 10
    monkeypatch.chdir(tmp_path)
    arguments = TrainingArguments("out", max_steps=2, report_to="none", disable_tqdm=True, use_cpu=True)
    names = {
        "torch": torch,
        "arguments": arguments,
        "model": build(),
        "dataset": [{"input_ids": ids, "labels": ids} for ids in tokens(batch=8)],
    }
    run_block(code, names)
    model = names["model"].eval()
    again = load_joint(build(), tmp_path / "both")
    with torch.no_grad():
        assert torch.equal(again(tokens()).logits, model(tokens()).logits)
    for layer in model.get_base_model().model.layers:
        b, w = layer.mlp.down_proj.lora_B["default"].weight, layer.post_block.steer_up["default"].weight
        assert 0 < b.norm() and 0 < w.norm() and (b.T @ w).norm() <= 1e-5 * b.norm() * w.norm()


def test_readme_peft(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = run_block(block("peft"), {"model": build()})["model"]
    assert model.peft_config["default"].r == 8
    assert patch_model(build(), "polite").steering.config().rank == 8


def test_readme_trl(tmp_path, monkeypatch):
    trl = pytest.importorskip("trl", reason="needs TRL (the extra trl)")
    from datasets import Dataset

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CI", "1")  # keeps TRL from sending telemetry
    few = {"max_steps": 2, "bf16": False, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    names = {
        "patch_model": patch_model,
        "SteerConfig": SteerConfig,
        "SFTConfig": functools.partial(trl.SFTConfig, **few),
        "model": build(),
        "tokenizer": tokenizer(),
        "completions": Dataset.from_list([{"prompt": f"{a}+1=", "completion": str(a + 1)} for a in range(8)]),
    }
    trained = logits(run_block(block("trl"), names)["model"].eval())
    assert not torch.equal(trained, logits(build()))
    assert torch.equal(logits(patch_model(build(), "polite")), trained)


def test_readme_serving_and_run_time(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("polite", "terse")):
        model = patch_model(build(), SteerConfig(rank=4))
        randomize(model, seed=seed)
        model.steering.save(name)
    ids = tokens(batch=3)
    names = {"patch_model": patch_model, "model": build(), "ids": ids, "mask": torch.ones_like(ids)}
    model = run_block(block("serving").replace("=64)", "=4)"), names)["model"]
    assert model.steering.names == ["polite", "terse"]
    run_block(block("runtime"), names)
    assert capsys.readouterr().out.count(" fused ") == 3
    assert torch.equal(logits(model), logits(build()))


def test_readme_each_use_is_at_most_five_lines():
    for marker in ("training", "peft", "trl", "serving"):
        lines = [line for line in block(marker).splitlines() if line.strip()]
        assert len(lines) <= 5, marker


def test_readme_parameters_of_lora_and_of_steering_are_counted():
    """README's table of parameters agrees with the modules of Llama-3.2-1B."""
    sizes = {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=32, num_key_value_heads=8))
    linear = [m for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    lora = sum(8 * (module.in_features + module.out_features) for module in linear)
    steering = 2 * 8 * sizes["hidden_size"] * sizes["num_hidden_layers"]
    assert f"| {lora:,} (every linear layer) | {steering:,} (every block) |" in README


def test_readme_coverage_is_that_of_the_table():
    table = (ROOT / "docs" / "coverage.md").read_text(encoding="utf-8")
    passed, types = re.search(r"\*\*(\d+) of (\d+) model types pass\*\*", table).groups()
    counts = dict(re.findall(r"^\| (\w+) \| (\d+) \|", table, re.MULTILINE))
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    said = f"Of the {types} causal model types of transformers 5.23, {passed} pass, {counts['fused']} of them fused in"
    assert said in readme and "Versions: fused-steer" in table and "transformers 5.23.0" in table
    assert counts["wrong"] == "0" and "none silently wrong" in readme
