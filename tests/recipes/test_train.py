"""Tests of `fused-steer train` on a tiny model: each method and kind of data, resuming, and a launcher."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from command import assert_refused, invoke, plain_output  # noqa: F401 - an autouse fixture
from models import LAYERS, logits, refused
from text import save_tiny, tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("trl", reason="needs TRL (the extra trl)")

from fused_steer import SteerConfig, load_joint, patch_model  # noqa: E402
from fused_steer.paper.answering import Text  # noqa: E402
from fused_steer.paper.data import load  # noqa: E402
from fused_steer.recipes import read_recipe, train  # noqa: E402

SUMS = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(8) for b in range(8)]
CHAT = "{% for m in messages %}{{ m['role'][0] + ':' + m['content'] + '!' }}{% endfor %}"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    folder = save_tiny(tmp_path_factory.mktemp("tiny"))
    encoder = tokenizer()
    encoder.chat_template = CHAT + "{% if add_generation_prompt %}a:{% endif %}"
    encoder.save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(tiny, tmp_path, monkeypatch):
    """Write a recipe with these sections and its rows; return its path."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("CI", "1")  # keeps TRL from sending telemetry

    def write(rows=SUMS, data=None, method=None, training=None) -> Path:
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        fields = {
            "model": str(tiny),
            "out": str(tmp_path / "out"),
            "data": {"train": str(tmp_path / "rows.jsonl"), "held_out": 0.25, **(data or {})},
            "method": {"steering": {"rank": 4}, **(method or {})},
            "training": {"learning_rate": 2e-2, "logging_steps": 2, "max_steps": 6, **(training or {})},
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(fields))
        return tmp_path / "recipe.yaml"

    return write


def base(tiny: Path):
    return AutoModelForCausalLM.from_pretrained(tiny).eval()


def test_train_by_a_recipe(recipe, tiny, tmp_path):
    result = invoke("train", recipe(training={"max_steps": 24}))
    assert result.exit_code == 0, result.output
    out = tmp_path / "out"
    figures = json.loads((out / "training.json").read_text())
    assert figures["eval_loss_after"] < figures["eval_loss_before"] - 0.5 and figures["rows"] == [48, 16]
    model = patch_model(base(tiny), out)
    assert model.steering.config() == SteerConfig(rank=4, activation="identity")
    assert not torch.equal(logits(model), logits(base(tiny)))
    assert figures["trained_parameters"] == model.steering.count_parameters()
    assert [layer["layer"] for layer in figures["shifts"]] == list(range(LAYERS))
    assert all(layer["shift"]["mean"] > 0 for layer in figures["shifts"])
    for name in ("losses.png", "shifts.png"):
        assert (out / name).read_bytes()[:4] == b"\x89PNG"
    card = (out / "README.md").read_text()
    for part in ("PeftModel.from_pretrained", "patch_model(model,", "learning_rate: 0.02", "before training,"):
        assert part in card
    assert f"{figures['eval_loss_after']:.4f} after it" in card
    assert {p.name for p in (out / "run").glob("checkpoint-*")} == {
        "checkpoint-6",
        "checkpoint-12",
        "checkpoint-18",
        "checkpoint-24",
    }
    assert not list(out.rglob("model*.safetensors"))
    for part in ("48 rows (completion)", "steering (lowrank of rank 4, identity)", "before, ", "‖δ‖/‖h‖"):
        assert part in result.stdout


def test_train_keeps_the_recipes_settings(recipe, monkeypatch):
    """The trainer gets each setting, and a constant rate by default."""
    from trl import SFTTrainer

    seen = {}

    def stop(trainer, *args, **kwargs):
        seen["args"], seen["trainer"] = trainer.args, trainer
        raise KeyboardInterrupt

    monkeypatch.setattr(SFTTrainer, "train", stop)
    training = {"batch_size": 2, "accumulate": 3, "weight_decay": 0.1, "seed": 7, "arguments": {"packing": False}}
    with pytest.raises(KeyboardInterrupt):
        train(read_recipe(recipe(training=training, data={"max_length": 33})))
    args = seen["args"]
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (2, 3)
    assert (args.weight_decay, args.seed, args.max_length, args.learning_rate) == (0.1, 7, 33, 2e-2)
    assert (args.lr_scheduler_type, args.get_warmup_steps(100), args.report_to) == ("constant", 0, [])


@pytest.mark.parametrize("chat", [False, True])
def test_train_a_task_on_the_prompts_that_eval_tests(tiny, tmp_path, monkeypatch, chat):
    """A shipped recipe trains the tokens of the paper's experiments: the prompt of `eval`, then the completion."""
    from trl import SFTTrainer

    for name, value in {"ACCELERATE_USE_CPU": "true", "CI": "1"}.items():
        monkeypatch.setenv(name, value)
    seen = []
    monkeypatch.setattr(SFTTrainer, "train", lambda trainer, **_: seen.append(trainer) or 1 / 0)
    rows = [{"question": f"{i}+{i}?", "answer": f"so {i} {'x' * 9 * i}\n#### {2 * i}"} for i in range(10)]
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    lines, changes = [], [f"data.chat={str(chat).lower()}", f"model={tiny}", f"out={tmp_path / 'out'}"]
    with pytest.raises(ZeroDivisionError):
        train(read_recipe("llama-3.2-1b", [*changes, f"data.train={tmp_path}", "data.max_length=60"]), say=lines.append)
    examples = {split: load("gsm8k", tmp_path)[split] for split in ("train", "validation")}
    encoder = tokenizer()
    encoder.chat_template = AutoTokenizer.from_pretrained(tiny).chat_template
    for dataset, split in ((seen[0].train_dataset, "train"), (seen[0].eval_dataset, "validation")):
        assert len(dataset) == len(examples[split])
        for row, example in zip(dataset, examples[split], strict=True):
            asked = Text(encoder, chat).batch([example])["input_ids"][0].tolist()  # what `eval` gives to the model
            text = asked + encoder(example.completion, add_special_tokens=False)["input_ids"]
            expected = text + encoder("!")["input_ids"] if chat else text  # the template ends an answer
            assert row["input_ids"] == expected[:60]
            assert row["labels"] == [-100] * len(asked) + row["input_ids"][len(asked) :]
            if not chat:
                features, _ = Text(encoder, chat).features(example, 60)  # that of bench.paper
                assert [row[name] for name in ("input_ids", "labels")] == [features["input_ids"], features["labels"]]
    assert any(len(row["input_ids"]) == 60 for row in seen[0].train_dataset)  # one is cut, as bench.paper cuts it
    assert f"data      6 rows (paper:gsm8k) to train on, {len(examples['validation'])} to evaluate on" in lines


def test_train_without_an_end_of_text(recipe, tiny, tmp_path):
    """Rows of texts, and of prompts, of which the recipe cuts some off before their completion."""
    rows = [{"prompt": "a" * (i % 3 + 1) * 12, "completion": "b"} for i in range(12)]
    lines = []
    found = train(read_recipe(recipe(rows, data={"end_of_text": False, "max_length": 30})), say=lines.append)
    assert found.rows == (9, 3) and "cut       3 rows are left out: their completion begins beyond 30 tokens" in lines
    texts = recipe([{"text": "abc"}] * 8, data={"end_of_text": False}, training={"max_steps": 1})
    found = train(read_recipe(texts, [f"out={tmp_path / 'texts'}"]))
    assert math.isfinite(found.loss_after)
    long = recipe([{"prompt": "a" * 20, "completion": "b"}] * 4, {"end_of_text": False, "max_length": 20})
    with refused(ValueError, "no row of", "has a completion within 20 tokens; expected one (data.max_length)"):
        train(read_recipe(long, [f"out={tmp_path / 'long'}"]))
    with refused(ValueError, "no row to train on has a completion within 20 tokens; expected one (data.max_length)"):
        train(read_recipe(long, [f"out={tmp_path / 'long'}", "data.end_of_text=null"]))


def test_train_refuses_rows_beyond_a_models_positions(recipe, tmp_path):
    save_tiny(tmp_path / "learned", family="gpt2")
    path = recipe([{"prompt": "a" * 70, "completion": "b"}] * 4)
    with refused(ValueError, "a row has 72 tokens; expected at most 64, the positions of the model (data.max_length)"):
        train(read_recipe(path, [f"model={tmp_path / 'learned'}"]))


def test_train_refuses_chats_without_a_template(recipe, tiny, tmp_path, monkeypatch):
    """Before the model's weights are loaded."""
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: 1 / 0)
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "config.json").write_text((tiny / "config.json").read_text())
    tokenizer().save_pretrained(plain)
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 4
    with refused(ValueError, "the tokenizer of", "plain has no chat template; expected one"):
        train(read_recipe(recipe(rows), [f"model={plain}"]))


def test_train_names_the_row_that_its_chat_template_refuses(recipe, tmp_path):
    """And leaves no folder. Templates may raise any exception, such as jinja2's of a role that they do not know."""
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]} for _ in range(4)]
    rows[2]["messages"][0]["content"] = None
    with refused(ValueError, "chat template fails on", "'content': None", "expected messages that it takes"):
        train(read_recipe(recipe(rows)))
    assert not (tmp_path / "out").exists()


def test_train_refused_after_its_trainer_is_made_leaves_no_folder(recipe, tmp_path):
    with refused(ValueError, "no row to train on has a completion within 8 tokens"):
        train(read_recipe(recipe([{"prompt": "a" * 50, "completion": "b"}] * 4, data={"max_length": 8})))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["joint", "joint-orth"])
def test_train_joint_with_a_rate_for_each(recipe, tiny, tmp_path, kind, monkeypatch):
    from trl import SFTTrainer

    rates, step = [], SFTTrainer.training_step

    def watched(trainer, *args, **kwargs):
        rates.append([group["lr"] for group in trainer.optimizer.param_groups])
        return step(trainer, *args, **kwargs)

    monkeypatch.setattr(SFTTrainer, "training_step", watched)
    path = recipe(method={"kind": kind}, training={"lora_learning_rate": 1e-2, "schedule": "constant", "warmup": 0})
    found = train(read_recipe(path))
    assert rates[0] == [2e-2, 1e-2] and found.loss_after < found.loss_before
    both = load_joint(base(tiny), tmp_path / "out").eval()
    with both.steering.mode("lora"):
        lora = logits(both)
    assert not torch.equal(lora, logits(both)) and not torch.equal(lora, logits(base(tiny)))
    assert both.steering.config().orthogonal_to == ("lora" if kind == "joint-orth" else None)


def test_train_a_lora_alone(recipe, tiny, tmp_path):
    from peft import PeftModel

    path = recipe(method={"kind": "lora", "steering": {}, "lora": {"rank": 2, "target_modules": ["q_proj"]}})
    found = train(read_recipe(path))
    assert found.diagnosis is None and found.loss_after < found.loss_before
    model = PeftModel.from_pretrained(base(tiny), tmp_path / "out")
    assert model.peft_config["default"].r == 2 and model.peft_config["default"].target_modules == {"q_proj"}
    assert not torch.equal(logits(model), logits(base(tiny)))


PREFERENCES = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": "no idea"} for row in SUMS]


def test_train_a_lora_on_preferences_leaves_no_copy_of_it(recipe, tiny, tmp_path):
    """The reference is the base model. TRL would make it a second adapter, and save that beside the trained one."""
    lora = {"rank": 2, "target_modules": ["q_proj"]}
    found = train(read_recipe(recipe(PREFERENCES, method={"kind": "lora", "steering": {}, "lora": lora})))
    assert found.loss_after < found.loss_before
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.is_dir()) == ["run"]
    assert found.total == found.trained + sum(p.numel() for p in base(tiny).parameters())


def test_train_on_preferences(recipe, tiny, tmp_path):
    found = train(read_recipe(recipe(PREFERENCES)))
    assert found.loss_after < found.loss_before
    assert patch_model(base(tiny), tmp_path / "out").steering.count_parameters() == found.trained


def test_train_on_chats_learns_the_answer_alone(recipe):
    rows = [
        {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]}
        for row in SUMS
    ]
    found = train(read_recipe(recipe(rows, training={"max_steps": 12}, method={"steering": {"form": "vector"}})))
    assert found.loss_after < found.loss_before and found.rows == (48, 16)


def test_train_resumes_to_the_same_adapter(recipe, tmp_path):
    path = recipe(training={"save_steps": 3, "schedule": "constant"})
    train(read_recipe(path))
    whole = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    other = str(tmp_path / "other")
    train(read_recipe(path, [f"out={other}", "training.max_steps=3"]))
    assert Path(other, "adapter_model.safetensors").read_bytes() != whole
    train(read_recipe(path, [f"out={other}"]), resume=True)
    files = [patch_file(folder) for folder in (tmp_path / "out", other)]
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])


def test_train_into_the_folder_of_another_run_is_refused_before_it_trains(recipe, tmp_path, monkeypatch):
    path = recipe(method={"steering": {"rank": 2}})

    def refuses(message, *changes, resume=False, error=ValueError):
        with refused(error, message):
            train(read_recipe(path, changes), resume=resume)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded"))
    out = tmp_path / "out"
    refuses("run has no checkpoint; expected one", resume=True, error=FileNotFoundError)
    (out / "run" / "checkpoint-7").mkdir(parents=True)
    refuses("checkpoint-7 is of an earlier run; expected --resume")
    refuses("checkpoint-7 has no trainer_state.json, as a save", resume=True, error=FileNotFoundError)
    (out / "run" / "checkpoint-7").rmdir()
    for held, refusals in {
        "POST_BLOCK": {"lora": "holds POST_BLOCK", "joint": "holds an adapter of POST_BLOCK"},
        "LORA": {"steering": "holds an adapter of LORA", "joint-orth": "holds an adapter of LORA"},
    }.items():
        (out / "adapter_config.json").write_text(json.dumps({"peft_type": held}))
        for kind, message in refusals.items():
            refuses(message, f"method.kind={kind}", *(["method.steering=null"] if kind == "lora" else []))
    (out / "adapter_config.json").unlink()
    (out / "joint.json").write_text("{}")
    for kind, steering in {"steering": "{rank: 2}", "lora": "null"}.items():
        refuses("holds a LoRA and steering together", f"method.kind={kind}", f"method.steering={steering}")


@pytest.mark.parametrize("method", [{"steering": {"rank": 2}}, {"kind": "lora", "steering": {}}], ids=["", "lora"])
def test_train_resumes_a_run_that_is_done_without_a_step_more(recipe, tmp_path, method):
    path = recipe(method=method, training={"max_steps": 2, "save_steps": 1})
    first = train(read_recipe(path))
    whole = patch_file(tmp_path / "out")
    again = train(read_recipe(path), resume=True)
    assert again.loss_after == first.loss_after and again.history[0] == first.history[0]
    assert all(torch.equal(tensor, whole[name]) for name, tensor in patch_file(tmp_path / "out").items())
    for steps in ("training.max_steps=1", "training.max_steps=null"):
        with refused(ValueError, "the last checkpoint is of step 2; expected at most 1, the steps of the recipe"):
            train(read_recipe(path, [steps, "training.epochs=0.01"]), resume=True)


def test_train_resumes_a_run_that_is_done_to_its_best_checkpoint(recipe, tmp_path):
    """`out` got the last checkpoint's adapter in place of the best one's."""
    arguments = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    path = recipe(training={"max_steps": 2, "save_steps": 1, "eval_steps": 1, "arguments": arguments})
    train(read_recipe(path))
    best, run = patch_file(tmp_path / "out"), tmp_path / "out" / "run"
    assert all(torch.equal(tensor, best[name]) for name, tensor in patch_file(run / "checkpoint-1").items())
    train(read_recipe(path), resume=True)
    assert all(torch.equal(tensor, best[name]) for name, tensor in patch_file(tmp_path / "out").items())


def patch_file(folder):
    from safetensors.torch import load_file

    return load_file(Path(folder, "adapter_model.safetensors"))


def test_train_under_a_launcher_of_two_processes(recipe, tiny, tmp_path):
    path = recipe(training={"max_steps": 4})
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run(
        [*launcher, "-m", "fused_steer", "train", str(path)],
        env=dict(os.environ),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert sum(line.startswith("adapter ") for line in result.stdout.splitlines()) == 1
    assert patch_model(base(tiny), tmp_path / "out").steering.count_parameters() > 0


def test_train_checks_before_a_model_is_loaded(recipe, tmp_path, monkeypatch):
    """Whatever a recipe has wrong is refused without loading weights, in one line, and nothing is written."""

    def loaded(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loaded)

    def refuses(*parts, more=(), **sections):
        assert_refused(invoke("train", recipe(**sections), *more), *parts)
        assert not (tmp_path / "out").exists()

    refuses("unknown key training.max_step; expected training.max_steps", more=("--set", "training.max_step=3"))
    refuses("has the columns question; expected those of a kind", rows=[{"question": "a"}])
    refuses(f"layers has {LAYERS}", method={"steering": {"layers": [LAYERS]}})
    refuses("unknown key training.arguments.packng; expected packing", training={"arguments": {"packng": True}})
    for kind in ("joint", "joint-orth"):
        wrong = {"arguments": {"optim": "lion_8bit"}}
        refuses(f"training.arguments has optim with kind {kind!r}", method={"kind": kind}, training=wrong)
    refuses("arguments has learning_rate; expected the recipe's", training={"arguments": {"learning_rate": 1}})
    refuses("training.eval_steps is 1, and no rows are held out", training={"eval_steps": 1}, data={"held_out": 0})
    refuses("training.beta is 0.3 with rows of kind completion", training={"beta": 0.3})
    refuses("data.config is 'main', and the data are files", data={"config": "main"})
    refuses("a split of", "'test', is given, and it is a file", data={"split": "test"})
    refuses("no file", "none.jsonl", data={"train": "none.jsonl"})
    refuses("method.steering: activation is 'swish'", method={"steering": {"activation": "swish"}})
    assert_refused(invoke("train"), "RECIPE is not given")
    result = invoke("train", recipe(), "--check")
    assert result.exit_code == 0 and "is well: 48 rows (completion), 16 to evaluate on" in result.stdout
    assert not (tmp_path / "out").exists()


def test_train_lists_the_recipes_that_come_along():
    assert_refused(
        invoke("train", "--list", "a.yaml", "--check"), "--list is given with RECIPE, --check; expected it alone"
    )
    result = invoke("train", "--list")
    assert result.exit_code == 0
    assert [line.split()[0] for line in result.stdout.splitlines()] == [
        "gemma-3-1b", "llama-3.1-8b", "llama-3.2-1b", "qwen3-4b", "smollm2",
    ]  # fmt: skip
    assert result.stdout in (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
