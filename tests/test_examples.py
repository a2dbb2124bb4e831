"""Tests of examples/: each script trains a tiny model unchanged, and its saved adapter improves on the base model."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typer
from huggingface_hub import HfApi
from models import logits
from text import save_tiny
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer import Typer
from typer.testing import CliRunner

from fused_steer import SteerConfig, load_joint, patch_model

EXAMPLES = Path(__file__).parents[1] / "examples"
FAST = ["--rank", "4", "--rate", "2e-2"]
SUMS = [(f"{a}+{b}=", str(a + b), f"{a + b}, i think!") for a in range(10) for b in range(10)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def example(tiny, tmp_path, monkeypatch) -> Callable[..., str]:
    """Return a function that runs an example with the tiny model and returns its output."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("CI", "1")  # keeps TRL from sending telemetry

    def run(name: str, *options: str) -> str:
        torch.manual_seed(0)
        app = Typer()
        app.command()(runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"])
        result = CliRunner().invoke(app, ["--model", str(tiny), "--out", str(tmp_path), *FAST, *options])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0, result.output
        return result.output

    return run


def base(tiny: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(tiny).eval()


def log_probabilities(model: nn.Module, tiny: Path, which: int) -> float:
    """Compute the mean log-probability of the toy data's completions: 1 is the terse ones, 2 the chatty ones."""
    tokenizer, total = AutoTokenizer.from_pretrained(tiny), 0.0
    for row in SUMS:
        prompt, ids = tokenizer(row[0])["input_ids"], tokenizer(row[0] + row[which], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            steps = model(ids).logits.log_softmax(-1)[0, :-1]
        total += steps.gather(1, ids[0, 1:, None])[len(prompt) - 1 :].sum().item()
    return total / len(SUMS)


def test_examples_every_example_is_tested():
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    text = Path(__file__).read_text(encoding="utf-8")
    assert names and all(f'"{name}"' in text or f'"{name}.py"' in text for name in names)
    assert all(len(path.read_text(encoding="utf-8").splitlines()) < 90 for path in EXAMPLES.glob("*.py"))


def test_examples_trainer(example, tiny, tmp_path):
    example("train_trainer", "--steps", "32")
    whole = patch_model(base(tiny), tmp_path)
    assert log_probabilities(whole, tiny, 1) > log_probabilities(base(tiny), tiny, 1) + 1
    best = {path.name for path in (tmp_path / "run").glob("checkpoint-*")}
    assert best == {f"checkpoint-{step}" for step in (8, 16, 24, 32)}
    assert not list(tmp_path.rglob("model*.safetensors"))


def test_examples_trainer_resumes_and_pushes(example, tiny, tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr(HfApi, "create_repo", lambda api, repo_id, **_: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(HfApi, "file_exists", lambda *_, **__: False)
    monkeypatch.setattr(
        HfApi,
        "upload_folder",
        lambda api, **what: (
            pushed.append((what["repo_id"], sorted(os.listdir(what["folder_path"])))) or SimpleNamespace(commit_url="u")
        ),
    )
    example("train_trainer", "--steps", "8")
    output = example("train_trainer", "--steps", "12", "--resume", "--push", "me/sums")
    assert (tmp_path / "run" / "checkpoint-12").is_dir() and output.rstrip().endswith("u")
    assert pushed == [("me/sums", ["README.md", "adapter_config.json", "adapter_model.safetensors"])]


def test_examples_a_file_of_ones_own(example, tiny, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "hello", "completion": " world"}\n' * 16, encoding="utf-8")
    example("train_trainer", "--steps", "24", "--data", str(data))
    steered, tokenizer = patch_model(base(tiny), tmp_path), AutoTokenizer.from_pretrained(tiny)
    answer = steered.generate(**tokenizer("hello", return_tensors="pt"), max_new_tokens=6, do_sample=False)
    assert "".join(tokenizer.convert_ids_to_tokens(answer[0, 5:])) == " world"


def test_examples_joint(example, tiny, tmp_path):
    example("train_joint", "--steps", "24", "--lora-rate", "1e-2")
    both = load_joint(base(tiny), tmp_path).eval()
    assert log_probabilities(both, tiny, 1) > log_probabilities(base(tiny), tiny, 1) + 1
    with both.steering.mode("lora"):
        lora_alone = logits(both)
    assert not torch.equal(lora_alone, logits(both)) and not torch.equal(lora_alone, logits(base(tiny)))


def test_examples_do_not_share_a_folder_by_default():
    """The second one was refused at its save, after its training."""
    text = {path.stem: path.read_text(encoding="utf-8") for path in EXAMPLES.glob("train_*.py")}
    folders = [re.search(r"out: Path = Path\(\"(\w+)\"\)", source) for source in text.values()]
    assert len({found[1] for found in folders if found}) == len(text)


def test_examples_refuse_a_folder_of_another_kind_before_they_load_a_model(example, tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "POST_BLOCK"}', encoding="utf-8")
    with pytest.raises(ValueError, match="holds an adapter of POST_BLOCK; expected another directory"):
        example("train_joint", "--model", "missing")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}', encoding="utf-8")
    with pytest.raises(ValueError, match="holds an adapter of LORA; expected another directory"):
        example("train_accelerate", "--model", "missing")


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_examples_refuse_an_empty_out_and_broken_rows_in_one_line(path, tmp_path, monkeypatch):
    """`--out ''` wrote into the current directory, after the training; broken JSON ended in a traceback."""
    if "trl" in path.read_text(encoding="utf-8") and find_spec("trl") is None:
        pytest.skip("needs TRL (the extra trl)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    app = Typer()
    app.command()(of := runpy.run_path(str(path))["main"])
    refused = CliRunner().invoke(app, ["--model", "missing", "--out", ""])
    assert refused.exit_code == 2 and "out is '.'; expected" in " ".join(refused.output.replace("│", "").split())
    if "data" not in of.__annotations__:
        return
    data = tmp_path / "rows.json"
    for content in (b'[{"instruction": 1,', b"\xff", b'[{"instruction": null, "question": null}]'):
        data.write_bytes(content)
        read = of.__globals__["read"]
        given = {"size": 1} if path.stem == "train_grpo_math" else {}
        source = str(data) if path.stem in ("train_grpo_math", "train_alpaca") else data
        with pytest.raises(typer.BadParameter, match=r"rows.json .*expected"):
            read(source, **given)


@pytest.mark.parametrize("name", ["trainer", "joint", "accelerate", "trl_sft", "trl_dpo", "trl_grpo"])
def test_examples_rows_without_columns_are_refused_in_one_line(tmp_path, name):
    if name.startswith("trl"):
        pytest.importorskip("trl")
    read = runpy.run_path(str(EXAMPLES / f"train_{name}.py"))["read"]
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "a", "text": "b"}\n', encoding="utf-8")
    with pytest.raises(
        typer.BadParameter, match=r"row 1 of .*rows.jsonl has the columns prompt, text; expected prompt, "
    ):
        read(data)
    whole = {"prompt": "a\u2028b", "completion": "b", "chosen": "c", "rejected": "d", "answer": "e"}
    data.write_text("\n" + json.dumps(whole, ensure_ascii=False) + "\n", encoding="utf-8")
    assert [row["prompt"] for row in read(data)] == ["a\u2028b"]  # which ends no line


def test_examples_trainer_refuses_data_without_a_fourth_row(example, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 3, encoding="utf-8")
    with pytest.raises(AssertionError, match="has 3 rows; expected at least 4"):
        example("train_trainer", "--data", str(tmp_path / "rows.jsonl"))


LAUNCH = "accelerate.commands.launch --cpu --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no"
TORCHRUN = "torch.distributed.run --standalone --nproc_per_node 2"  # accelerate needs MPI for CPU processes


@pytest.mark.parametrize(("launcher", "processes"), [(LAUNCH, 1), (TORCHRUN, 2)], ids=["accelerate launch", "torchrun"])
def test_examples_accelerate(tiny, tmp_path, launcher, processes):
    command = [sys.executable, "-m", *launcher.split(), str(EXAMPLES / "train_accelerate.py"), *FAST]
    result = subprocess.run(
        [*command, "--model", str(tiny), "--out", str(tmp_path)],
        env=os.environ | {"ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    (line,) = (line for line in result.stdout.splitlines() if line.startswith("epoch 4"))
    assert line.endswith(f", {processes} processes")
    steered = patch_model(base(tiny), tmp_path)
    assert log_probabilities(steered, tiny, 1) > log_probabilities(base(tiny), tiny, 1) + 1


# ---------------------------------------------------------------------------------------------------------------------
# TRL


needs_trl = pytest.mark.skipif(find_spec("trl") is None, reason="needs TRL (the extra trl)")


@needs_trl
def test_examples_trl_sft(example, tiny, tmp_path):
    example("train_trl_sft", "--steps", "24")
    steered = patch_model(base(tiny), tmp_path)
    assert log_probabilities(steered, tiny, 1) > log_probabilities(base(tiny), tiny, 1) + 1
    assert torch.equal(logits(patch_model(base(tiny), tmp_path / "run" / "checkpoint-24")), logits(steered))


@needs_trl
def test_examples_trl_dpo(example, tiny, tmp_path):
    example("train_trl_dpo", "--steps", "24")
    steered = patch_model(base(tiny), tmp_path)
    margins = [log_probabilities(m, tiny, 1) - log_probabilities(m, tiny, 2) for m in (steered, base(tiny))]
    assert margins[0] > margins[1] + 1


@needs_trl
def test_examples_trl_grpo(example, tiny, tmp_path):
    example("train_trl_grpo", "--steps", "2", "--beta", "0.1")
    steered = patch_model(base(tiny), tmp_path)
    assert not torch.equal(logits(steered), logits(base(tiny)))


@needs_trl
def test_examples_alpaca(example, tiny, tmp_path, monkeypatch):
    """Training covers only the responses, and the judge's file has the steered model's answers."""
    data = tmp_path / "alpaca.json"
    rows = [{"instruction": f"{a}+{b}=", "input": "", "output": str(a + b)} for a in range(10) for b in range(10)]
    data.write_text(json.dumps(rows), encoding="utf-8")
    example("train_alpaca", "--data", str(data), "--epochs", "2")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    app, answers = Typer(), tmp_path / "answers.json"
    app.command()(runpy.run_path(str(EXAMPLES / "generate_alpaca_eval.py"))["main"])
    late = CliRunner().invoke(app, ["--model", "missing", "--out", str(tmp_path / "no" / "answers.json")])
    assert late.exit_code == 2 and "expected a file in a directory" in " ".join(late.output.split())
    asked = [{"instruction": "1+1=", "dataset": "sums"}, {"instruction": "long " * 9, "dataset": "sums"}]
    data.write_text(json.dumps(asked), encoding="utf-8")
    options = ["--model", str(tiny), "--data", str(data), "--out", str(answers), "--tokens", "5", "--adapter"]
    for adapter in (str(tmp_path), ""):
        assert CliRunner().invoke(app, [*options, adapter], catch_exceptions=False).exit_code == 0
        found = json.loads(answers.read_text(encoding="utf-8"))
        name = Path(adapter or tiny).name
        assert [(row["instruction"], row["dataset"], row["generator"]) for row in found] == [
            (row["instruction"], "sums", name) for row in asked
        ]
        model, tokenizer = base(tiny), AutoTokenizer.from_pretrained(tiny)
        model = patch_model(model, adapter) if adapter else model
        prompt = runpy.run_path(str(EXAMPLES / "train_alpaca.py"))["example"]({**asked[0], "output": ""})["prompt"]
        inputs = tokenizer(prompt, return_tensors="pt")
        answer = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert found[0]["output"] == tokenizer.decode(answer, skip_special_tokens=True).strip()


@needs_trl
def test_examples_alpaca_trains_on_responses_with_the_papers_settings(tiny, tmp_path, monkeypatch):
    """The labels of a batch are its responses and the end of the sequence; the defaults are the paper's."""
    from fused_steer.trl import SteeringSFTTrainer

    trainers = []
    monkeypatch.setattr(SteeringSFTTrainer, "train", lambda self, **options: trainers.append(self))
    data = tmp_path / "alpaca.json"
    rows = [{"instruction": f"say {a}", "input": "" if a % 2 else "now", "output": str(a) * 3} for a in range(10)]
    data.write_text(json.dumps(rows), encoding="utf-8")
    app = Typer()
    app.command()(runpy.run_path(str(EXAMPLES / "train_alpaca.py"))["main"])
    options = ["--model", str(tiny), "--data", str(data), "--out", str(tmp_path / "out")]
    assert CliRunner().invoke(app, options, catch_exceptions=False).exit_code == 0
    (trainer,) = trainers
    arguments = trainer.args
    assert arguments.num_train_epochs == 3 and arguments.learning_rate == 2e-3
    assert arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps == 16
    assert (arguments.lr_scheduler_type, arguments.warmup_steps, arguments.weight_decay) == ("constant", 0, 0)
    assert trainer.model.steering.config() == SteerConfig(rank=8, activation="silu")
    said = []
    for batch in trainer.get_train_dataloader():
        for labels in batch["labels"]:
            text = trainer.processing_class.decode(labels[labels != -100], skip_special_tokens=True)
            said.append(text.replace(" ", ""))
    assert sorted(said) == sorted(row["output"] for row in rows)


@needs_trl
def test_examples_alpaca_refuses_rows_without_columns(tiny, tmp_path):
    data = tmp_path / "alpaca.jsonl"
    data.write_text('{"instruction": "a", "output": "b"}\n{"instruction": "a", "response": "b"}', encoding="utf-8")
    app = Typer()
    app.command()(runpy.run_path(str(EXAMPLES / "train_alpaca.py"))["main"])
    refused = CliRunner().invoke(app, ["--model", str(tiny), "--data", str(data), "--out", str(tmp_path / "out")])
    assert refused.exit_code == 2 and "expected instruction and output" in " ".join(refused.output.split())
    assert not (tmp_path / "out").exists()


@needs_trl
@pytest.mark.parametrize("data", ["gsm8k", "reasoning_gym"])
def test_examples_grpo_math(example, tiny, tmp_path, data):
    options = ["--steps", "2", "--length", "24", "--size", "8"]
    if data == "gsm8k":
        file = tmp_path / "gsm8k.jsonl"
        file.write_text('{"question": "1+1?", "answer": "one and one. #### 1,002"}\n' * 8, encoding="utf-8")
        options += ["--data", str(file)]
    else:
        pytest.importorskip("reasoning_gym", reason="needs reasoning-gym (the extra rl)")
    example("train_grpo_math", *options)
    assert not torch.equal(logits(patch_model(base(tiny), tmp_path)), logits(base(tiny)))


@needs_trl
def test_examples_grpo_math_rewards(tmp_path):
    of = runpy.run_path(str(EXAMPLES / "train_grpo_math.py"))
    good = "<think>1000 + 2</think><answer> 1,002 </answer>"
    assert of["accuracy"]([good, "1002", good + "<answer>7</answer>"], ["1002", "1002", "1,002"]) == [1.0, 0.0, 0.0]
    assert of["form"]([good, "<think>", good + "<answer>"]) == [1.0, 0.25, 0.75]
    file = tmp_path / "gsm8k.jsonl"
    file.write_text('{"question": "q", "answer": "42"}', encoding="utf-8")
    with pytest.raises(typer.BadParameter, match="row 1 of .* lacks"):
        of["read"](str(file), 1)
