"""Tests of evaluation by lm-evaluation-harness on a local task, where it is installed; intervals by hand anywhere."""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from command import assert_refused, invoke, plain_output  # noqa: F401 - an autouse fixture
from models import build, randomize, refused
from peft import LoraConfig, PeftModel, get_peft_model
from text import save_tiny, tokenizer
from transformers import AutoModelForCausalLM

from fused_steer import SteerConfig, load_joint, patch_model, save_joint
from fused_steer.evaluation import on_paper
from fused_steer.evaluation.comparing import compare_adapters, scores
from fused_steer.evaluation.on_paper import load_documents, paper_tasks
from fused_steer.paper.answering import answers
from fused_steer.paper.tasks import TASKS
from fused_steer.tools.sources import note_parts

needs_harness = pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs lm-evaluation-harness (the extra eval)")
QUESTIONS = [(f"{a}+{b}=", [str((a + b + k) % 10) for k in range(3)], (a * b) % 3) for a in range(4) for b in range(3)]
TASK = """
task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny model, two adapters of it, and a task on a local file."""
    folder = tmp_path_factory.mktemp("eval")
    save_tiny(folder / "base")
    for seed, (name, config) in enumerate({"one": SteerConfig(rank=3), "two": SteerConfig("vector")}.items()):
        model = patch_model(AutoModelForCausalLM.from_pretrained(folder / "base"), config)
        randomize(model, seed=seed)
        model.steering.save(folder / name)
    rows = [{"question": q, "choices": choices, "answer": answer} for q, choices, answer in QUESTIONS]
    (folder / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "sums.yaml").write_text(TASK.format(data=folder / "sums.jsonl"))
    return folder


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))


def right(place, adapter=None, scale=None) -> list[float]:
    """Return for each question whether the model finds the right choice the likeliest, by its logits."""
    model = AutoModelForCausalLM.from_pretrained(place / "base").eval()
    if adapter == "lora":
        model = PeftModel.from_pretrained(model, place / adapter).eval()
    elif adapter == "joint":
        model = load_joint(model, place / adapter).eval()
        model.steering.scale = 1.0 if scale is None else scale
    elif adapter is not None:
        model = patch_model(model, place / adapter)
        model.steering.scale = model.steering.scale if scale is None else scale
    found = []
    for question, choices, answer in QUESTIONS:
        ids = torch.tensor([tokenizer()(question)["input_ids"]])
        with torch.no_grad():
            logits = model(ids).logits[0, -1]
        tokens = [tokenizer()(choice)["input_ids"][0] for choice in choices]
        found.append(float(int(logits[tokens].argmax()) == answer))
    return found


@needs_harness
def test_eval_compares_adapters_with_the_base(place, tmp_path):
    arguments = ("--model", place / "base", "--adapter", place / "one", "--adapter", f"second={place / 'two'}")
    out = tmp_path / "scores.json"
    result = invoke("eval", place / "sums.yaml", *arguments, "--device", "cpu", "--batch-size", 5, "--out", out)
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())["scores"]
    truth = {"base": right(place), "one": right(place, "one"), "second": right(place, "two")}
    assert len({tuple(values) for values in truth.values()}) == 3
    assert [row["adapter"] for row in found] == list(truth)
    for row, values in zip(found, truth.values(), strict=True):
        assert (row["task"], row["metric"], row["documents"]) == ("sums", "acc", len(QUESTIONS))
        assert row["mean"] == pytest.approx(np.mean(values))
        assert row["interval"][0] <= row["mean"] <= row["interval"][1]
    expected = np.mean(truth["one"]) - np.mean(truth["base"])
    assert found[1]["difference"] == pytest.approx(expected) and found[0]["difference"] is None
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.stdout.splitlines() if "│" in line]
    assert cells[1][2:5] == ["one", str(len(QUESTIONS)), f"{np.mean(truth['one']):.3f}"]


@needs_harness
def test_eval_a_limit_and_no_base(place):
    arguments = ("--model", place / "base", "--adapter", place / "one", "--no-base", "--limit", 5, "--json")
    result = invoke("eval", place / "sums.yaml", *arguments, "--device", "cpu")
    assert result.exit_code == 0, result.output
    [row] = json.loads(result.stdout[result.stdout.index('{\n  "model"') :])["scores"]
    assert (row["adapter"], row["documents"]) == ("one", 5)
    assert row["mean"] == pytest.approx(np.mean(right(place, "one")[:5]))


@needs_harness
@pytest.mark.parametrize(
    ("arguments", "adapter"),
    [
        ("", None),
        ("adapter={}/one,scale=-3", "one"),
        ("adapter={}/lora", "lora"),
        ("adapter={}/joint,scale=-3", "joint"),
    ],
)
def test_eval_the_harnesss_own_model(table, arguments, adapter):
    """`--model fused-steer --model_args pretrained=…,adapter=…,scale=…`."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    import fused_steer.evaluation.harness  # noqa: F401 (it makes the name known)

    place, _ = table
    given = f"pretrained={place / 'base'},{arguments.format(place)}".rstrip(",")
    manager = TaskManager(include_defaults=False)
    result = simple_evaluate(
        "fused-steer", given, [str(place / "sums.yaml")], device="cpu", task_manager=manager, bootstrap_iters=0
    )
    assert result["results"]["sums"]["acc,none"] == pytest.approx(np.mean(right(place, adapter, -3.0)))


@needs_harness
def test_eval_the_harnesss_model_of_another_name(place, tmp_path):
    """There was no `check_base`, as the commands have it."""
    from fused_steer.evaluation.harness import SteeredLM

    other = str(shutil.copytree(place / "base", tmp_path / "other"))
    given = {"adapter": str(place / "one"), "device": "cpu"}
    with refused(ValueError, "base", "check_base=False"):
        SteeredLM(other, **given)
    with refused(TypeError, "check_base is 'no'; expected True or False"):
        SteeredLM(other, check_base="no", **given)
    model = SteeredLM.create_from_arg_string(f"pretrained={other},adapter={place / 'one'},check_base=False,device=cpu")
    assert model.model.steering.active == "adapter"


@needs_harness
def test_eval_the_harnesss_model_refuses_before_it_loads(table, monkeypatch):
    place, _ = table
    from fused_steer.evaluation.harness import SteeredLM

    def loaded(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loaded)
    with refused(FileNotFoundError, "no adapter directory"):
        SteeredLM(str(place / "base"), adapter=str(place / "none"))
    with refused(ValueError, "scale is 2.0 without an adapter"):
        SteeredLM(str(place / "base"), scale="2")
    with refused(ValueError, "scale is 2.0, and", "lora is a LoRA; expected an adapter that steers"):
        SteeredLM(str(place / "base"), adapter=str(place / "lora"), scale="2")


@needs_harness
def test_eval_refusals(place, tmp_path, monkeypatch):
    def loaded(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loaded)
    task = place / "sums.yaml"
    for arguments, parts in (
        ((tmp_path / "none.yaml",), ("no file", "none.yaml; expected a task")),
        ((task, "--adapter", tmp_path / "none"), ("no adapter directory",)),
        ((task, "--adapter", f"a b={place / 'one'}"), ("adapter name is 'a b'",)),
        ((task, "--adapter", place / "one", "--adapter", place / "one"), ("there are two adapters 'one'",)),
        ((task, "--adapter", f"base={place / 'one'}"), ("an adapter has the name 'base', that of the base model",)),
        ((task, "--no-base"), ("neither --base nor an --adapter",)),
        ((task, "--limit", 0), ("limit is 0",)),
        ((task, "--seed", -1), ("seed is -1; expected 0 or more",)),
        ((task, "--out", tmp_path / "none" / "x.json"), ("there is no directory",)),
        ((task, "--out", tmp_path), (f"out is {tmp_path}, a directory; expected a file",)),
    ):
        assert_refused(invoke("eval", *arguments, "--model", place / "base", "--device", "cpu"), *parts)


def test_eval_where_an_adapter_does_not_steer_is_refused():
    with refused(ValueError, "LlamaForCausalLM is not steered"):
        compare_adapters(build(), None, [None], [])
    model = patch_model(build())
    with model.steering.disabled(), refused(RuntimeError, "compare_adapters is called while steering is disabled"):
        compare_adapters(model, None, [None], [])
    with model.steering.batch([None]), refused(RuntimeError, "compare_adapters is called inside steering.batch"):
        compare_adapters(model, None, [None], [])


def test_eval_without_the_harness_says_how_to_install_it(place, monkeypatch):
    monkeypatch.setattr("fused_steer.evaluation.command.find_spec", lambda name: None)
    assert_refused(invoke("eval", "x"), "pip install 'fused-steer[eval]'")


# --------------------------------------------------------------------------------------------------- the paper's tasks


def says(place, adapter, task, rows) -> list[str]:
    """Return a model's text after the prompt of each row, generated row by row, without padding."""
    model = AutoModelForCausalLM.from_pretrained(place / "base").eval()
    if adapter is not None:
        model = patch_model(model, place / adapter)
    found = []
    for row in rows:
        ids = torch.tensor([tokenizer()(task.prompt(row))["input_ids"]])
        tokens = model.generate(ids, max_new_tokens=task.new_tokens, do_sample=False, pad_token_id=0)
        found.append(tokenizer().decode(tokens[0, ids.shape[1] :], skip_special_tokens=True))
    return found


@pytest.fixture(scope="module")
def papers(place):
    """Local rows of two tasks: GSM8K, with a right answer of the base model in every other row; and BoolQ."""
    rows = [{"question": f"{i} and {i * i}?", "answer": "#### 0"} for i in range(6)]
    for row, said in list(zip(rows, says(place, None, TASKS["gsm8k"], rows), strict=True))[::2]:
        row["answer"] = f"so #### {TASKS['gsm8k'].read(said):g}"
    truths = [{"question": f"is {i} odd", "passage": "what?", "answer": i % 2 == 1} for i in range(3)]
    for name, content in (("gsm8k", rows), ("boolq", truths)):
        (place / "rows" / name).mkdir(parents=True)
        (place / "rows" / name / "test.jsonl").write_text("\n".join(map(json.dumps, content)))
    return place, rows


def test_eval_papers_tasks_from_local_files(papers, tmp_path, monkeypatch):
    """Several adapters on the paper's tasks, offline, without lm-evaluation-harness."""
    place, rows = papers
    monkeypatch.setattr("fused_steer.evaluation.command.find_spec", lambda name: None)
    out = tmp_path / "scores.json"
    adapters = ("--adapter", place / "one", "--adapter", place / "two")
    arguments = ("--model", place / "base", *adapters, "--data", place / "rows", "--device", "cpu", "--batch-size", 4)
    result = invoke("eval", "paper:gsm8k", "paper:boolq", *arguments, "--out", out)
    assert result.exit_code == 0, result.output
    assert "…" not in result.stdout  # no name is cut, however narrow the screen
    found = {(row["task"], row["metric"], row["adapter"]): row for row in json.loads(out.read_text())["scores"]}
    names, metrics = ("base", "one", "two"), ("exact_match", "as_released", "unreadable")
    expected = {("paper:gsm8k", metric, name) for metric in metrics for name in names}
    expected |= {("paper:boolq", metric, name) for metric in ("exact_match", "unreadable") for name in names}
    assert found.keys() == expected
    task, means = TASKS["gsm8k"], {}
    for name in names:
        said = says(place, None if name == "base" else name, task, rows)
        means[name] = np.mean([task.is_exact(text, task.answer(row)) for text, row in zip(said, rows, strict=True)])
        row = found["paper:gsm8k", "exact_match", name]
        assert row["mean"] == pytest.approx(means[name]) and row["documents"] == len(rows)
        assert row["interval"][0] <= row["mean"] <= row["interval"][1]
        assert found["paper:boolq", "unreadable", name]["documents"] == 3
    assert means["base"] >= 0.5 and len(set(means.values())) > 1
    difference = found["paper:gsm8k", "exact_match", "two"]["difference"]
    assert difference == pytest.approx(means["two"] - means["base"])


def test_eval_papers_tasks_in_the_chat_template_and_with_a_limit(papers, tmp_path, monkeypatch):
    place, _ = papers
    prompts = []
    monkeypatch.setattr(
        "fused_steer.paper.answering.Text.batch", lambda self, rows: prompts.extend(map(self.prompt, rows)) or 1 / 0
    )
    shutil.copytree(place / "base", tmp_path / "chats")
    encoder = tokenizer()
    encoder.chat_template = "{{ messages | map(attribute='role') | list }} {{ messages[-1]['content'] }}"
    encoder.save_pretrained(tmp_path / "chats")
    arguments = ("--model", tmp_path / "chats", "--data", place / "rows", "--chat", "--limit", 2, "--device", "cpu")
    assert isinstance(invoke("eval", "paper:gsm8k", *arguments).exception, ZeroDivisionError)
    assert prompts == [f"['system', 'user'] {i} and {i * i}?\n" for i in range(2)]


@needs_harness
def test_eval_papers_tasks_beside_the_harnesss(papers):
    place, _ = papers
    arguments = ("--model", place / "base", "--data", place / "rows", "--device", "cpu", "--json")
    result = invoke("eval", place / "sums.yaml", "paper:boolq", *arguments)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout[result.stdout.index('{\n  "model"') :])["scores"]
    assert [row["task"] for row in found] == ["sums", "paper:boolq", "paper:boolq"]
    assert found[0]["mean"] == pytest.approx(np.mean(right(place)))


def test_eval_papers_tasks_all_six():
    assert paper_tasks(["hellaswag", "paper:arc", "paper"]) == ["arc", *(name for name in TASKS if name != "arc")]


def test_eval_papers_tasks_refusals(papers, tmp_path, monkeypatch):
    """One line each, before a model is loaded."""
    place, _ = papers

    def loaded(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loaded)
    data = ("--data", place / "rows")
    (tmp_path / "boolq").mkdir()
    (tmp_path / "boolq" / "test.jsonl").write_text('{"question": "is it", "answer": true}')
    for arguments, parts in (
        (("paper:boolqs", *data), ("the task is 'paper:boolqs'", "did you mean paper:boolq?")),
        (("paper:arc", *data), ("arc has no test.jsonl, test.json or test.parquet; expected one of them",)),
        (("paper:gsm8k", *data, "--shots", 3), ("shots is 3", "expected it not given")),
        (("paper:boolq", "--data", tmp_path), ("has no column passage in row 1; expected question, passage, answer",)),
        ((place / "sums.yaml", *data), ("--data is given without a task of the paper",)),
        (("paper:boolq",), ("google/boolq cannot be loaded", "expected a connection", "boolq/test.jsonl")),
    ):
        assert_refused(invoke("eval", *arguments, "--model", place / "base", "--device", "cpu"), *parts)


# ------------------------------------------------------------------------------------------ LoRA, and LoRA and steering


def with_lora(place, **fields):
    """The base with a LoRA of random values."""
    torch.manual_seed(7)
    lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False, **fields)
    return get_peft_model(AutoModelForCausalLM.from_pretrained(place / "base"), lora)


@pytest.fixture(scope="module")
def table(papers):
    """Beside the steering `one`: a LoRA, a joint save, and a Trainer's checkpoint of both. Return the rows, too."""
    place, rows = papers
    with_lora(place, lora_alpha=8).save_pretrained(place / "lora")
    model = patch_model(with_lora(place, lora_alpha=4), SteerConfig(rank=2, orthogonal_to="lora"))
    randomize(model, seed=3)
    save_joint(model, place / "joint")
    with_lora(place, lora_alpha=2).save_pretrained(place / "checkpoint")
    shutil.copytree(place / "two", place / "checkpoint" / "fused_steer" / "default")
    return place, rows


def told(place, rows, name) -> list[str]:
    """Return the answers of an adapter that is alone on a model of its own, loaded by its own library."""
    model = AutoModelForCausalLM.from_pretrained(place / "base")
    if name == "joint":
        model = load_joint(model, place / "joint")
    elif name in ("lora", "checkpoint"):
        model = PeftModel.from_pretrained(model, place / name)
    if name in ("one", "checkpoint", "steering"):
        model = patch_model(model, place / {"one": "one", "checkpoint": "two", "steering": "joint/steering"}[name])
    texts = [example.prompt for example in load_documents(["boolq"], place / "rows")["boolq"]]
    said = []
    for text in texts:
        ids = tokenizer()(text, return_tensors="pt")["input_ids"]
        tokens = model.eval().generate(input_ids=ids, max_new_tokens=10, do_sample=False, pad_token_id=0)
        said.append(tokenizer().decode(tokens[0, ids.shape[1] :], skip_special_tokens=True))
    return said


@needs_harness
def test_eval_lora_steering_and_both_on_the_harnesss_tasks(table):
    place, _ = table
    names = ("one", "lora", "joint")
    arguments = [part for name in names for part in ("--adapter", place / name)]
    result = invoke("eval", place / "sums.yaml", "--model", place / "base", *arguments, "--device", "cpu", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout[result.stdout.index('{\n  "model"') :])["scores"]
    truth = [right(place, name) for name in (None, *names)]
    assert len({tuple(values) for values in truth}) > 2
    assert [row["mean"] for row in found] == pytest.approx([np.mean(values) for values in truth])


def test_eval_lora_steering_and_both_side_by_side(table, tmp_path, monkeypatch):
    """The comparison of the paper's Table 2 by one command: each adapter answers as it does alone on a fresh base."""
    place, rows = table
    names, seen = ("one", "lora", "joint", "checkpoint", "steering"), []
    monkeypatch.setattr(on_paper, "answers", lambda *given: seen.append(answers(*given)) or seen[-1])
    paths = {name: place / name for name in names} | {"steering": place / "joint" / "steering"}
    adapters = [part for name in names for part in ("--adapter", f"{name}={paths[name]}")]
    out = tmp_path / "scores.json"
    where = ("--model", place / "base", "--data", place / "rows", "--device", "cpu", "--batch-size", 1, "--out", out)
    result = invoke("eval", "paper:boolq", *where, *adapters)
    assert result.exit_code == 0, result.output
    expected = [told(place, rows, name) for name in ("base", *names)]
    assert seen == expected and len(set(map(tuple, expected))) == len(expected)
    found = json.loads(out.read_text())
    both = "LoRA and steering"
    assert list(found["adapters"].values()) == ["steering", "LoRA", both, both, "steering"]
    assert [row["adapter"] for row in found["scores"][: len(expected)]] == ["base", *names]
    whole = (place / "joint").resolve()
    assert [line for line in result.stderr.splitlines() if line.startswith("note")] == [
        f"note      {place / 'joint' / 'steering'} was trained together with the other part in {whole} and runs here "
        f"without it; expected {whole} for both"
    ]
    seen.clear()  # no steering at all
    assert invoke("eval", "paper:boolq", *where, "--adapter", place / "lora", "--no-base").exit_code == 0
    assert seen == [expected[2]]


def test_eval_of_lora_and_both_on_the_hub(table, tmp_path, monkeypatch):
    """Their files are downloaded, and no others of the repository."""
    place, rows = table
    names, fetched = ("lora", "joint", "checkpoint"), set()

    def download(repo_id, allow_patterns):
        owner, name = repo_id.split("/")
        assert owner == "me"
        for file in filter(Path.is_file, (place / name).rglob("*")):
            inside = file.relative_to(place / name)
            if any(fnmatch(inside.as_posix(), pattern) for pattern in allow_patterns):
                (tmp_path / name / inside.parent).mkdir(parents=True, exist_ok=True)
                shutil.copy(file, tmp_path / name / inside)
                fetched.add((name, inside.as_posix()))
        return str(tmp_path / name)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    (place / "joint" / "checkpoint-1").mkdir()
    shutil.copy(place / "one" / "adapter_model.safetensors", place / "joint" / "checkpoint-1")
    seen = []
    monkeypatch.setattr(on_paper, "answers", lambda *given: seen.append(answers(*given)) or seen[-1])
    adapters = [part for name in names for part in ("--adapter", f"me/{name}")]
    where = ("--model", place / "base", "--data", place / "rows", "--device", "cpu", "--batch-size", 1, "--no-base")
    result = invoke("eval", "paper:boolq", *where, *adapters)
    assert result.exit_code == 0, result.output
    assert seen == [told(place, rows, name) for name in names]
    assert not any("checkpoint-1" in file for _, file in fetched)
    assert load_joint(AutoModelForCausalLM.from_pretrained(place / "base"), "me/joint").steering.config().rank == 2
    with refused(ValueError, "holds a LoRA and steering together"):
        patch_model(build(), "me/joint")


def test_eval_refuses_parts_before_a_model_is_loaded(table, tmp_path, monkeypatch):
    place, _ = table
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: 1 / 0)
    for name, change in {"ia3": {"peft_type": "IA3"}, "biased": {"bias": "all"}, "empty": {}}.items():
        shutil.copytree(place / "lora", tmp_path / name)
        config = tmp_path / name / "adapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | change))
    (tmp_path / "empty" / "adapter_model.safetensors").unlink()
    shutil.copytree(place / "joint", tmp_path / "torn")
    shutil.copy(place / "one" / "adapter_model.safetensors", tmp_path / "torn" / "steering")
    for arguments, parts in (
        (("--adapter", tmp_path / "ia3"), ("holds an adapter of IA3; expected steering, a LoRA, or both",)),
        (("--adapter", tmp_path / "biased"), ("has bias 'all'; expected 'none'",)),
        (("--adapter", tmp_path / "empty"), ("has no adapter_model.safetensors; expected a LoRA",)),
        (("--adapter", tmp_path / "torn"), ("was not saved together with the other parts",)),
        (("--model", place / "lora"), ("lora holds an adapter and no model; expected the model that",)),
        (("--model", place / "joint"), ("joint holds an adapter and no model",)),
    ):
        model = () if "--model" in arguments else ("--model", place / "base")
        given = ("paper:gsm8k", "--data", place / "rows", "--device", "cpu", *model)
        assert_refused(invoke("eval", *given, *arguments), *parts)
    monkeypatch.setattr("fused_steer.tools.sources.find_spec", lambda name: None)
    given = ("paper:gsm8k", "--data", place / "rows", "--model", place / "base", "--adapter", place / "lora")
    assert_refused(invoke("eval", *given, "--device", "cpu"), "pip install 'fused-steer[peft]'")


def test_eval_refuses_what_does_not_fit(table, tmp_path):
    place, _ = table
    save_tiny(tmp_path / "other", hidden_size=64)
    given = ("eval", "paper:boolq", "--data", place / "rows", "--device", "cpu", "--model")
    for more, told in (
        (
            (tmp_path / "other", "--adapter", place / "lora"),
            f"the LoRA default in {place / 'lora'} does not fit the model",
        ),
        ((place / "base", "--chat"), f"the tokenizer of {place / 'base'} has no chat template; expected one"),
    ):
        result = invoke(*given, *more)
        *_, line = result.stderr.splitlines()  # before it is the progress of loading the model
        assert result.exit_code == 1 and told in line and len(line) < 500


def test_commands_for_steering_alone_say_what_takes_a_lora_or_both(table, tmp_path):
    pytest.importorskip("matplotlib", reason="diagnose needs matplotlib (the extra demo)")
    place, _ = table
    (tmp_path / "prompts.txt").write_text("a b c")
    model, prompts = ("--model", place / "base"), ("--prompts", tmp_path / "prompts.txt")
    out = ("--out", tmp_path / "figures", "--device", "cpu")
    commands = {
        "chat": lambda adapter: invoke("chat", adapter, *model),
        "inspect": lambda adapter: invoke("inspect", adapter),
        "compare": lambda adapter: invoke("compare", adapter, place / "one"),
        "export": lambda adapter: invoke("export", "vector", adapter, "--out", tmp_path / "x.gguf"),
        "diagnose": lambda adapter: invoke("diagnose", place / "base", "--adapter", adapter, *prompts, *out),
    }
    for run in commands.values():
        takes = "`fused-steer eval --adapter`", "`fused-steer fit`", "`fused-steer diagnose --joint`"
        assert_refused(run(place / "joint"), "joint holds a LoRA and steering together", *takes)
        assert_refused(run(place / "lora"), "peft_type is 'LORA'; expected 'POST_BLOCK'", "eval --adapter")
    for name in ("chat", "diagnose"):  # which run a part without the other
        result = commands[name](place / "joint" / "steering")
        assert result.exit_code == 0 and f"part in {(place / 'joint').resolve()} and runs here" in result.stderr


def test_notes_of_parts(table, tmp_path, capsys):
    place, _ = table

    def said(source) -> str:
        note_parts(str(source))
        return capsys.readouterr().err

    for part in ("joint/steering", "joint/lora/default", "checkpoint/fused_steer/default"):
        assert f"part in {(place / part.split('/')[0]).resolve()} and runs here" in said(place / part)
    shutil.copytree(place / "joint" / "steering", tmp_path / "alone")
    assert "was trained together with a LoRA (orthogonal_to)" in said(tmp_path / "alone")
    assert [said(place / whole) for whole in ("joint", "checkpoint", "lora", "one", "none")] == [""] * 5


# ---------------------------------------------------------------------------------------------------------- intervals

KEY = ("task", "acc", "none")


def test_eval_intervals_are_those_of_a_bootstrap():
    generator = np.random.default_rng(3)
    base, other = generator.random(40), generator.random(40)
    first, second = scores({"base": {KEY: dict(enumerate(base))}, "b": {KEY: dict(enumerate(other))}})
    assert (first.mean, second.mean) == pytest.approx((base.mean(), other.mean()))
    assert second.difference == pytest.approx(other.mean() - base.mean()) and first.difference is None
    # For means of 40 numbers the bootstrap's ends are about 1.96 standard errors away; a wrong one is off by far more.
    for low, high, values in ((*first.interval, base), (*second.difference_interval, other - base)):
        error = values.std() / np.sqrt(40)
        assert abs(low - (values.mean() - 1.96 * error)) < error / 3 > abs(high - (values.mean() + 1.96 * error))


def test_eval_differences_are_paired():
    """Two adapters that err on the same documents differ for sure, however much the documents differ."""
    base = {KEY: {i: float(i % 2) for i in range(50)}}
    better = {KEY: {i: value + 0.01 for i, value in base[KEY].items()}}
    second = scores({"base": base, "b": better})[1]
    assert second.difference_interval == pytest.approx((0.01, 0.01))
    assert second.interval[1] - second.interval[0] > 0.2
    with refused(ValueError, "b and base have other documents of task"):
        scores({"base": base, "b": {KEY: {0: 1.0}}})
